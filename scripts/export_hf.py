"""Turn a trained model into a transformers GPT-2 folder, and prove that it gives the same logits.

The model of the training scripts is GPT-2's; only names differ, and that transformers keeps most matrices transposed.
The folder works wherever a GPT-2 works: AutoModelForCausalLM and AutoTokenizer.from_pretrained, pipelines, fine-tuning.

Run:
    python scripts/export_hf.py runs/DeepSpeed-GPTLike-ZeRO-2 gpt2-wikitext2
    python scripts/generate.py gpt2-wikitext2 --prompt "The first"

Source: https://huggingface.co/docs/transformers/model_doc/gpt2
"""

import argparse
import importlib.util
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import safetensors
import tokenizers
import torch
from safetensors.torch import load_file
from torch import nn

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers looks for DeepSpeed, which would warn where no GPU is
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    logging,
)

BASE_SCRIPT = Path(__file__).resolve().parent.parent / "GPTLike-Base.py"
TOLERANCE = 1e-4  # of logits in fp32: other kernels, the same numbers
SENTENCE = "The tower is 1,063 feet (324 m) tall,\n\n  as high as an 81 @-@ storey building – naïve café.\n"
OUTSIDE = {
    "token_embedding.weight": "transformer.wte.weight",
    "position_embedding.weight": "transformer.wpe.weight",
    "final_norm.weight": "transformer.ln_f.weight",
    "final_norm.bias": "transformer.ln_f.bias",
    "head.weight": "lm_head.weight",  # the embedding again
}
IN_BLOCK = {
    "norm1": "ln_1",
    "attention.qkv": "attn.c_attn",
    "attention.projection": "attn.c_proj",
    "norm2": "ln_2",
    "feed_forward.0": "mlp.c_fc",
    "feed_forward.2": "mlp.c_proj",
}


def to_gpt2(state_dict: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The weights of a GPTLike under the names and in the shapes of GPT2LMHeadModel.

    GPT-2's Conv1D keeps (in, out) where nn.Linear keeps (out, in). Raises ValueError for a name that no GPTLike has.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        if name in OUTSIDE:
            renamed[OUTSIDE[name]] = tensor
            continue
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if not match or match[2] not in IN_BLOCK:
            raise ValueError(f"{name} is no weight of a GPTLike")
        layer, part, kind = match.groups()
        is_matrix = kind == "weight" and not part.startswith("norm")
        renamed[f"transformer.h.{layer}.{IN_BLOCK[part]}.{kind}"] = tensor.t().contiguous() if is_matrix else tensor
    renamed.setdefault("lm_head.weight", renamed["transformer.wte.weight"])
    return renamed


def load_base() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gptlike_base", BASE_SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read_model(folder: Path) -> tuple[dict, dict[str, torch.Tensor], tokenizers.Tokenizer]:
    """(shape, weights, tokenizer) of a run's model/. Raises ValueError naming the file that is missing or damaged."""
    files = [folder / name for name in ("config.json", "model.safetensors", "tokenizer.json")]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}: give the --output_dir of a finished run, or its model/")
    try:
        weights = load_file(files[1])
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot read {files[1]}: {error}") from error
    try:
        json.loads(text := files[2].read_text(encoding="utf-8"))["model"]["vocab"]
        tokenizer = tokenizers.Tokenizer.from_str(text)
    except Exception as error:
        raise ValueError(f"cannot read {files[2]}: {error!r}") from error
    try:
        shape = json.loads(files[0].read_text(encoding="utf-8"))
        if absent := {"n_layer", "n_head", "d_model", "block_size", "vocab_size", "padded_vocab_size"} - shape.keys():
            raise ValueError(f"no {', '.join(sorted(absent))}; is it the model/ of a training run?")
        check_shape(shape, weights, tokenizer)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"cannot read {files[0]}: {error}") from error
    return shape, weights, tokenizer


def check_shape(shape: dict, weights: dict[str, torch.Tensor], tokenizer: tokenizers.Tokenizer) -> None:
    """Raises ValueError where config.json does not say what the other two files hold, before a model is built by it."""
    sizes = {name: list(tensor.shape) for name, tensor in weights.items()}
    rows, width = (sizes.get("token_embedding.weight", []) + [None, None])[:2]
    blocks = {name.split(".")[1] for name in weights if re.match(r"blocks\.\d+\.", name)}
    held = {"n_layer": len(blocks), "d_model": width, "block_size": sizes.get("position_embedding.weight", [None])[0]}
    held |= {"padded_vocab_size": rows, "vocab_size": tokenizer.get_vocab_size()}
    for name, size in held.items():
        if type(shape[name]) is not int or shape[name] != size:
            raise ValueError(f"{name} is {shape[name]!r:.60}, but {size} by the model's other files")
    heads = shape["n_head"]
    if type(heads) is not int or not 0 < heads <= width or width % heads:
        raise ValueError(f"n_head is {heads!r:.60}: the width {width} is no multiple of it")
    if found := {str(tensor.dtype) for tensor in weights.values() if not tensor.is_floating_point()}:
        raise ValueError(f"weights are {', '.join(sorted(found))}")


def original_model(shape: dict, weights: dict[str, torch.Tensor]) -> nn.Module:
    """The GPTLike of the training scripts with these weights, in fp32."""
    sizes = {name: shape[name] for name in ("n_layer", "n_head", "d_model", "block_size")}
    args = SimpleNamespace(**sizes, dropout=0.0, activation_checkpointing=False)
    model = load_base().GPTLike(args, shape["vocab_size"])
    try:
        model.load_state_dict({"head.weight": weights["token_embedding.weight"]} | weights)
    except (KeyError, RuntimeError) as error:
        raise ValueError(f"the weights do not fit {BASE_SCRIPT.name}'s GPTLike: {error}") from error
    return model.float().eval()


def gpt2_model(shape: dict, weights: dict[str, torch.Tensor], end_of_text: int | None) -> GPT2LMHeadModel:
    config = GPT2Config(
        vocab_size=shape["padded_vocab_size"],
        n_positions=shape["block_size"],
        n_embd=shape["d_model"],
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        activation_function="gelu_new",  # GELU's tanh approximation
        layer_norm_epsilon=1e-5,
        attn_pdrop=0.0,  # the training scripts drop on embeddings and residual branches only
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    model = GPT2LMHeadModel(config).to(weights["token_embedding.weight"].dtype)
    model.load_state_dict(to_gpt2(weights))
    # The embedding's padding rows belong to no token: never sample them.
    model.generation_config.suppress_tokens = list(range(shape["vocab_size"], shape["padded_vocab_size"])) or None
    return model


@torch.no_grad()
def largest_difference(model: nn.Module, exported: nn.Module, shape: dict) -> float:
    """Between the logits of both, over random tokens that fill every position."""
    tokens = torch.randint(shape["vocab_size"], (2, shape["block_size"]), generator=torch.Generator().manual_seed(0))
    return (model(tokens) - exported(tokens).logits).abs().max().item()


def export(source: Path, target: Path) -> None:
    """Write the folder, but only what gives the same logits when read back. Raises ValueError otherwise."""
    if (source / "model").is_dir():
        source = source / "model"
    if target.exists() and target.resolve() == source.resolve():
        raise ValueError(f"{target} is the model itself: choose another OUT_DIR")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: choose another OUT_DIR")
    if target.exists() and any(target.iterdir()) and not (target / "generation_config.json").is_file():
        raise ValueError(f"{target} holds other files than an export: choose another OUT_DIR")
    parts = read_model(source)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export", dir=target) as folder:  # nothing is replaced by what is wrong
        difference = write_and_compare(*parts, Path(folder))
        for file in Path(folder).iterdir():
            os.replace(file, target / file.name)
    print(f"exported {source} to {target}; reloaded, its logits differ by {difference:.1e} at most")


def write_and_compare(
    shape: dict, weights: dict[str, torch.Tensor], tokenizer: tokenizers.Tokenizer, folder: Path
) -> float:
    """The largest difference between logits. Raises ValueError where more differs than rounding explains."""
    original = original_model(shape, weights)
    end_of_text = tokenizer.token_to_id("<|endoftext|>")
    special = {} if end_of_text is None else {"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}
    gpt2_model(shape, weights, end_of_text).save_pretrained(folder)
    wrapped = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, model_max_length=shape["block_size"], **special
    )
    wrapped.save_pretrained(folder)

    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    difference = largest_difference(original, exported, shape)
    if not difference <= TOLERANCE:
        raise ValueError(f"the export is wrong: its logits differ from the model's by {difference:.2e}")
    wanted, found = tokenizer.encode(SENTENCE, add_special_tokens=False).ids, AutoTokenizer.from_pretrained(folder)
    if found(SENTENCE)["input_ids"] != wanted:
        raise ValueError(f"the export is wrong: its tokenizer gives {found(SENTENCE)['input_ids']} and not {wanted}")
    return difference


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("model", metavar="MODEL_OR_RUN_DIR", type=Path, help="--output_dir of a run, or its model/")
    parser.add_argument("target", metavar="OUT_DIR", type=Path, help="folder to write")
    args = parser.parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        export(args.model, args.target)
    except (OSError, ValueError) as error:
        sys.exit(f"export_hf.py: error: {error}")


if __name__ == "__main__":
    main()
