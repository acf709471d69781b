"""Turn a trained model into a transformers GPT-2 folder, and prove that it is the same model.

    python scripts/tools/export_hf.py runs/DeepSpeed-GPTLike-ZeRO-2 gpt2-wikitext2
    python scripts/tools/export_hf.py runs/DeepSpeed-GPTLike-ZeRO-3/checkpoints/step500 gpt2-step500
    python scripts/tools/generate.py gpt2-wikitext2 --prompt "The first"

The model of the training scripts is GPT-2's; only names differ, and that transformers keeps most matrices transposed.
The embedding keeps its padding rows, up to a multiple of 64; generation_config.json never lets them be sampled.

Nothing gets its place in OUT before it was read back with from_pretrained: its logits have to be those of our own
GPTLike to 1e-4, in fp32, and its loss over the validation split the one that the run has recorded, to 1e-4 (1e-3 for a
run in 16 bits, 1e-2 where --dtype rounds). So a damaged model.safetensors fails, unless the run's data are gone.

A ZeRO checkpoint holds pieces, which DeepSpeed's zero_to_fp32 puts together on CPU. It unpickles them, and a pickle can
run any code: export no checkpoint of a stranger. model/ is safetensors and cannot.
Exit code 0: exported, 1: it cannot be, nothing is written, 2: wrong usage.
Source: https://huggingface.co/docs/transformers/model_doc/gpt2
"""

import argparse
import contextlib
import io
import math
import os
import pickle
import re
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from common import ToolError, cpu_default, exit_with, load_script, read_json, read_metrics
from safetensors.torch import load_file
from torch import Tensor, nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOGITS_TOLERANCE = 1e-4  # in fp32: other kernels, the same numbers
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-3, "fp16": 1e-3, "rounded": 1e-2}  # kernels round at different places
GPT2_SIZES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "d_model", "n_positions": "block_size"}
SENTENCE = "The tower is 1,063 feet (324 m) tall,\n\n  as high as an 81 @-@ storey building – naïve café.\n"
END, GENERATION = "<|endoftext|>", "generation_config.json"
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


class Trained(NamedTuple):
    source: Path  # model/, or a checkpoint
    run: Path
    shape: dict  # the sizes
    weights: dict[str, Tensor]  # without the tied head
    args: argparse.Namespace  # the run's, as for one rank
    loss: float | None  # on the validation split, as the run has found it


def to_gpt2(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a GPTLike under the names and in the shapes of GPT2LMHeadModel.

    GPT-2's Conv1D keeps (in, out) where nn.Linear keeps (out, in). Raises ToolError for a name that no GPTLike has.
    """
    renamed = {}
    for name, tensor in state_dict.items():
        if name in OUTSIDE:
            renamed[OUTSIDE[name]] = tensor
            continue
        match = re.fullmatch(r"blocks\.(\d+)\.(.+)\.(weight|bias)", name)
        if not match or match[2] not in IN_BLOCK:
            raise ToolError(f"{name} is no weight of a GPTLike")
        layer, part, kind = match.groups()
        is_matrix = kind == "weight" and not part.startswith("norm")
        renamed[f"transformer.h.{layer}.{IN_BLOCK[part]}.{kind}"] = tensor.t().contiguous() if is_matrix else tensor
    renamed.setdefault("lm_head.weight", renamed["transformer.wte.weight"])
    return renamed


# What a run leaves, read.
def read_trained(source: Path) -> Trained:
    """Of RUN, RUN/model or RUN/checkpoints/stepN. Raises ToolError that names the file that is missing or damaged."""
    source = source.resolve()
    if source.parent.name == "checkpoints":
        return read_checkpoint(source)
    source = source if source.name == "model" else source / "model"
    shape, path = read_json(source / "config.json"), source / "model.safetensors"
    try:
        weights = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ToolError(f"cannot read {path}: {error}") from error
    summary_path = source.parent / "summary.json"
    best = (read_json(summary_path) if summary_path.exists() else {}).get("best") or {}
    args = one_rank(read_json(source.parent / "args.json"), source / "config.json", shape)
    return Trained(source, source.parent, shape, weights, args, best.get("validation_loss"))


def read_checkpoint(folder: Path) -> Trained:
    """That step of a ZeRO run, in fp32: --dtype fp32 gets more than model/ holds of a run in 16 bits."""
    run, marks = folder.parent.parent, sorted(folder.glob("rank*.json"))
    if not marks:
        raise ToolError(f"{folder} has no rank<R>.json, so it is no whole checkpoint of a ZeRO script: export {run}")
    mark = read_json(marks[0])
    args = one_rank(read_json(run / "args.json"), marks[0], mark.get("settings"))
    zero = read_json(run / "ds_config.json").get("zero_optimization", {})
    if "nvme" in [zero.get(f"offload_{what}", {}).get("device") for what in ("optimizer", "param")]:
        raise ToolError(f"the weights of {folder} lie on NVMe and not in its files: export {run}")
    weights = read_shards(folder)
    weights.pop("head.weight", None)  # the embedding again
    loss = read_metrics(run).get(mark.get("step"), {}).get("validation_loss")
    return Trained(folder, run, mark["settings"], weights, args, loss)


def one_rank(args: dict, path: Path, shape: object) -> argparse.Namespace:
    """The run's flags, for a look at its data by one rank. Raises ToolError where something is missing in a file."""
    if args.get("precision") not in DTYPES or not {"dataset", "tokenizer", "batch_size"} <= args.keys():
        raise ToolError("args.json of the run is not what a training script writes")
    for name in GPT2_SIZES.values():
        if not isinstance(shape, dict) or type(shape.get(name)) is not int or shape[name] < 1:
            raise ToolError(f"{path} has no {name}: it is not what a training script writes")
    place = {"rank": 0, "world_size": 1, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    return argparse.Namespace(**args | place)


def read_shards(folder: Path) -> dict[str, Tensor]:
    """All ranks' pieces of the optimizer's weights, put together in fp32."""
    print(f"warning: DeepSpeed unpickles {folder}, which can run any code: only for runs of your own", file=sys.stderr)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as put_together

            return put_together(str(folder.parent), tag=folder.name)
    except (OSError, RuntimeError, ValueError, LookupError, AssertionError, EOFError, pickle.UnpicklingError) as error:
        raise ToolError(f"cannot read {folder}: {error!r:.200}. Are all ranks' files on this host?") from error


def load_data(trained: Trained) -> tuple[tuple | None, str]:
    """The run's token streams with its own tokenizer; or None, and why not."""
    base, tokenizer = load_script("GPTLike-Base.py"), trained.run / "model" / "tokenizer.json"
    if tokenizer.exists():  # not before a run's first validation
        read_json(tokenizer)
        trained.args.tokenizer = str(tokenizer.parent)
    try:
        return base.load_corpus(trained.args), ""
    except base.UserError as error:
        return None, str(error).splitlines()[0]


def load_tokenizer(trained: Trained, corpus: tuple | None) -> object:
    from transformers import PreTrainedTokenizerFast

    path = trained.run / "model" / "tokenizer.json"
    if not path.exists() and corpus is None:
        raise ToolError(f"{trained.source} comes without its tokenizer: there is no {path}")
    known = {"tokenizer_file": str(path)} if path.exists() else {"tokenizer_object": corpus.tokenizer.backend_tokenizer}
    length = trained.shape["block_size"]
    tokenizer = PreTrainedTokenizerFast(**known, clean_up_tokenization_spaces=False, model_max_length=length)
    if END in tokenizer.get_vocab():
        tokenizer.bos_token = tokenizer.eos_token = END
    return tokenizer


# The folder.
def original_model(trained: Trained, vocab_size: int) -> nn.Module:
    """The GPTLike of the training scripts with these weights, in fp32."""
    args = argparse.Namespace(**trained.shape | {"dropout": 0.0, "activation_checkpointing": False, "seed": 0})
    try:
        model = load_script("GPTLike-Base.py").GPTLike(args, vocab_size)
        model.load_state_dict({"head.weight": trained.weights["token_embedding.weight"]} | trained.weights)
    except (KeyError, RuntimeError, AttributeError) as error:
        raise ToolError(f"the weights of {trained.source} do not fit GPTLike-Base.py's GPTLike: {error}") from error
    return model.float().eval()


def gpt2_model(trained: Trained, vocab_size: int, end_of_text: int | None) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    rows = len(trained.weights["token_embedding.weight"])
    config = GPT2Config(
        **{name: trained.shape[ours] for name, ours in GPT2_SIZES.items()},
        vocab_size=rows,
        activation_function="gelu_new",  # GELU's tanh approximation
        layer_norm_epsilon=1e-5,
        attn_pdrop=0.0,  # the training scripts drop on embeddings and residual branches only
        tie_word_embeddings=True,
        bos_token_id=end_of_text,
        eos_token_id=end_of_text,
    )
    model = GPT2LMHeadModel(config).to(trained.weights["token_embedding.weight"].dtype)
    model.load_state_dict(to_gpt2(trained.weights))
    model.generation_config.suppress_tokens = list(range(vocab_size, rows)) or None  # the padding rows
    return model


@torch.no_grad()
def write_and_compare(trained: Trained, tokenizer: object, folder: Path) -> float:
    """The largest difference between logits. Raises ToolError where more differs than rounding explains."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    vocab_size = max(tokenizer.get_vocab().values()) + 1
    original = original_model(trained, vocab_size)
    gpt2_model(trained, vocab_size, tokenizer.eos_token_id).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (2, trained.shape["block_size"]), generator=generator)
    difference = (original(tokens) - exported(tokens).logits).abs().max().item()
    if not difference <= LOGITS_TOLERANCE:
        raise ToolError(f"the export is wrong: its logits differ from the model's by {difference:.2e}")
    wanted, found = tokenizer(SENTENCE)["input_ids"], AutoTokenizer.from_pretrained(folder)(SENTENCE)["input_ids"]
    if found != wanted:
        raise ToolError(f"the export is wrong: its tokenizer gives {found} and not {wanted}")
    return difference


class AsGPTLike(nn.Module):
    """A transformers model in the place of a GPTLike that is evaluated."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens).logits  # (batch, seq, vocab_size)


def compare_loss(folder: Path, trained: Trained, corpus: tuple, dtype: str) -> str:
    """A sentence on how the export's validation loss compares to the run's. Raises ToolError where it is another."""
    from transformers import AutoModelForCausalLM

    print(f"evaluating {len(corpus.streams['validation']):,} tokens ...", file=sys.stderr)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[trained.args.precision]).to(trained.args.device)
    found = load_script("GPTLike-Base.py").evaluate(AsGPTLike(model), corpus, trained.args)
    loss, wanted = found["validation_loss"], trained.loss
    if wanted is None:
        return f"its validation loss is {loss:.6f}; the run has recorded none"
    rounded = dtype not in (trained.args.precision, "fp32")
    tolerance = LOSS_TOLERANCE["rounded" if rounded else trained.args.precision]
    if not math.isclose(loss, wanted, rel_tol=0, abs_tol=tolerance):
        raise ToolError(f"the export is wrong: its validation loss is {loss:.6f}, the run's {wanted:.6f}")
    return f"its validation loss is {loss:.6f}, the run's {wanted:.6f}"


def export(source: Path, target: Path, dtype: str | None, *, evaluated: bool) -> None:
    """Write the folder, but only what is the same model when read back. Raises ToolError otherwise."""
    cpu_default()
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if target.is_file() or target.is_dir() and any(target.iterdir()) and not (target / GENERATION).is_file():
        raise ToolError(f"{target} is something else than an export: choose another OUT")
    trained = read_trained(source)
    dtype = dtype or trained.args.precision
    trained = trained._replace(weights={name: tensor.to(DTYPES[dtype]) for name, tensor in trained.weights.items()})
    corpus, reason = load_data(trained) if evaluated else (None, "--skip_evaluation")
    tokenizer = load_tokenizer(trained, corpus)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export", dir=target) as name:  # nothing is replaced by what is wrong
        folder = Path(name)
        difference = write_and_compare(trained, tokenizer, folder)
        if corpus is None:
            sentence = f"its validation loss was NOT compared with the run's: {reason}"
        else:
            sentence = compare_loss(folder, trained, corpus, dtype)
        for file in folder.iterdir():
            os.replace(file, target / file.name)
    print(f"exported {trained.source} to {target}; reloaded, its logits differ by {difference:.1e} at most; {sentence}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("run", metavar="RUN", type=Path, help="--output_dir of a run, its model/, or a RUN/checkpoints/stepN")
    add("target", metavar="OUT", type=Path, help="folder to write")
    add("--dtype", choices=DTYPES, help="of the weights in OUT; left out: the run's precision")
    add("--skip_evaluation", action="store_true", help="do not compare the validation loss, which takes a CPU long")
    args = parser.parse_args()
    try:
        export(args.run, args.target, args.dtype, evaluated=not args.skip_evaluation)
    except (ToolError, OSError) as error:
        exit_with(error)


if __name__ == "__main__":
    main()
