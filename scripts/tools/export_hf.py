"""Turn a trained model into a transformers GPT-2 folder, and prove that it is the same model.

    python scripts/tools/export_hf.py runs/DeepSpeed-GPTLike-ZeRO-2 gpt2-wikitext2
    python scripts/tools/export_hf.py runs/DeepSpeed-GPTLike-ZeRO-3/checkpoints/step500 gpt2-step500

The model of the training scripts is GPT-2's; only names differ, and that transformers keeps most matrices transposed.
The embedding keeps its padding rows, up to a multiple of 64; generation_config.json never lets them be sampled.

Nothing gets its place in OUT before it was read back with from_pretrained: its logits have to be those of our own
GPTLike to 1e-4, in fp32, and its loss over the validation split the one that the run has recorded, to 1e-4 (1e-3 for a
run in 16 bits, 1e-2 where --dtype rounds). So a damaged model.safetensors fails, unless the run's data are gone.

DeepSpeed unpickles a checkpoint, and a pickle can run any code. model/ is safetensors and cannot.
Exit code 0: exported, 1: it cannot be, nothing is written, 2: wrong usage.
Source: https://huggingface.co/docs/transformers/model_doc/gpt2
"""

import contextlib
import io
import math
import os
import pickle
import sys
import tempfile
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path
from typing import NamedTuple

import safetensors
import torch
from common import ToolError, cpu_default, exit_with, load_script, offload_devices, read_json, read_metrics, warn_pickle
from safetensors.torch import load_file
from torch import Tensor, nn

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
LOGITS_TOLERANCE = 1e-4  # in fp32: other kernels, the same numbers
LOSS_TOLERANCE = {"fp32": 1e-4, "bf16": 1e-3, "fp16": 1e-3, "rounded": 1e-2}  # kernels round at different places
GPT2_SIZES = {"n_layer": "n_layer", "n_head": "n_head", "n_embd": "d_model", "n_positions": "block_size"}
END = "<|endoftext|>"
NAMES = {  # ours, and GPT-2's
    "token_embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "final_norm": "transformer.ln_f",
    "head": "lm_head",  # the embedding again
    "blocks": "transformer.h",
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
    args: Namespace  # the run's, as for one rank
    loss: float | None  # on the validation split, as the run has found it


def to_gpt2(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a GPTLike under the names and in the shapes of GPT2LMHeadModel.

    GPT-2's Conv1D keeps (in, out) where nn.Linear keeps (out, in).
    """
    renamed = {}
    for name, tensor in state_dict.items():
        is_linear = name.startswith("blocks") and tensor.ndim == 2
        for ours, theirs in NAMES.items():
            name = name.replace(ours, theirs)
        renamed[name] = tensor.t().contiguous() if is_linear else tensor
    renamed.setdefault("lm_head.weight", renamed["transformer.wte.weight"])
    return renamed


def read_trained(source: Path) -> Trained:
    """Of RUN, RUN/model or RUN/checkpoints/stepN. Raises ToolError that names the file that is missing or damaged."""
    source = source.resolve()
    is_run = (source / "model").is_dir()
    if source.parent.name == "checkpoints" and not is_run:
        return read_checkpoint(source)
    if source.name != "model" or is_run:
        source = source / "model"
    shape, path = read_json(source / "config.json"), source / "model.safetensors"
    try:
        weights = load_file(path)
    except (OSError, safetensors.SafetensorError) as error:
        raise ToolError(f"cannot read {path}: {error}") from error
    run = source.parent
    args = one_rank(read_json(run / "args.json"), source / "config.json", shape)
    metrics = read_metrics(run) if (run / "metrics.jsonl").exists() else {}
    losses = [fields["validation_loss"] for fields in metrics.values() if "validation_loss" in fields]
    return Trained(source, run, shape, weights, args, min(losses, default=None))


def read_checkpoint(folder: Path) -> Trained:
    """That step of a ZeRO run, in fp32: --dtype fp32 gets more than model/ holds of a run in 16 bits."""
    run, marks = folder.parent.parent, sorted(folder.glob("rank*.json"))
    if not marks:
        raise ToolError(f"{folder} has no rank<R>.json, so it is no whole checkpoint of a ZeRO script: export {run}")
    mark = read_json(marks[0])
    args = one_rank(read_json(run / "args.json"), marks[0], mark.get("settings"))
    zero = read_json(run / "ds_config.json").get("zero_optimization", {})
    if "nvme" in offload_devices(zero):
        raise ToolError(f"the weights of {folder} lie on NVMe and not in its files: export {run}")
    warn_pickle(folder)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as put_together

            weights = put_together(str(folder.parent), tag=folder.name)
    except (OSError, RuntimeError, ValueError, LookupError, AssertionError, EOFError, pickle.UnpicklingError) as error:
        raise ToolError(f"cannot read {folder}: {error!r:.200}. Are all ranks' files on this host?") from error
    weights.pop("head.weight", None)  # the embedding again
    loss = read_metrics(run).get(mark.get("step"), {}).get("validation_loss")
    return Trained(folder, run, mark["settings"], weights, args, loss)


def one_rank(args: dict, path: Path, shape: object) -> Namespace:
    """The run's flags, for a look at its data by one rank. Raises ToolError where something is missing in a file."""
    if args.get("precision") not in DTYPES or not {"dataset", "tokenizer", "batch_size"} <= args.keys():
        raise ToolError("args.json of the run is not what a training script writes")
    for name in GPT2_SIZES.values():
        if not isinstance(shape, dict) or type(shape.get(name)) is not int or shape[name] < 1:
            raise ToolError(f"{path} has no {name}: it is not what a training script writes")
    place = {"rank": 0, "world_size": 1, "device": "cuda" if torch.cuda.is_available() else "cpu"}
    return Namespace(**args | place)


def load_data(trained: Trained, *, evaluated: bool) -> tuple[object, Namespace | None, str]:
    """The run's tokenizer, and its token streams with it; or None, and why not."""
    from transformers import PreTrainedTokenizerFast

    base, path = load_script("GPTLike-Base.py"), trained.run / "model" / "tokenizer.json"
    corpus, reason = None, "--skip_evaluation"
    if path.exists():  # not before a run's first validation
        trained.args.tokenizer = str(path.parent)
    if evaluated:
        try:
            corpus = base.load_corpus(trained.args)
        except base.UserError as error:
            reason = str(error).splitlines()[0]
    known = {"clean_up_tokenization_spaces": False, "model_max_length": trained.shape["block_size"]}
    if corpus and not path.exists():
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=corpus.tokenizer.backend_tokenizer, **known)
    else:
        read_json(path)  # a message where it is missing or damaged
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), **known)
    if END in tokenizer.get_vocab():
        tokenizer.bos_token = tokenizer.eos_token = END
    return tokenizer, corpus, reason


def original_model(trained: Trained, vocab_size: int) -> nn.Module:
    """The GPTLike of the training scripts with these weights, in fp32."""
    args = Namespace(**trained.shape | {"dropout": 0.0, "activation_checkpointing": False, "seed": 0})
    try:
        model = load_script("GPTLike-Base.py").GPTLike(args, vocab_size)
        model.load_state_dict({"head.weight": trained.weights["token_embedding.weight"]} | trained.weights)
    except (KeyError, RuntimeError, AttributeError) as error:
        raise ToolError(f"the weights of {trained.source} do not fit GPTLike-Base.py's GPTLike: {error}") from error
    return model.float().eval()


@torch.no_grad()
def write_and_reload(trained: Trained, tokenizer: object, folder: Path) -> tuple[nn.Module, float]:
    """The export as read back, in fp32, and how much its logits differ from our model's. ToolError: too much."""
    from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

    embedding, end = trained.weights["token_embedding.weight"], tokenizer.eos_token_id
    vocab_size, rows = max(tokenizer.get_vocab().values()) + 1, len(embedding)
    original = original_model(trained, vocab_size)
    settings = {name: trained.shape[ours] for name, ours in GPT2_SIZES.items()}
    settings |= {"vocab_size": rows, "bos_token_id": end, "eos_token_id": end}
    config = GPT2Config(**settings, attn_pdrop=0.0)  # the scripts drop on embeddings and residual branches only
    model = GPT2LMHeadModel(config).to(embedding.dtype)
    model.load_state_dict(to_gpt2(trained.weights))
    model.generation_config.suppress_tokens = list(range(vocab_size, rows)) or None  # the padding rows
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    exported = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocab_size, (2, trained.shape["block_size"]), generator=generator)
    difference = (original(tokens) - exported(tokens).logits).abs().max().item()
    if not difference <= LOGITS_TOLERANCE:
        raise ToolError(f"the export is wrong: its logits differ from the model's by {difference:.2e}")
    return exported, difference


def compare_loss(model: nn.Module, trained: Trained, corpus: Namespace, dtype: str) -> str:
    """A sentence on how the export's validation loss compares to the run's. Raises ToolError where it is another."""
    print(f"evaluating {len(corpus.streams['validation']):,} tokens ...", file=sys.stderr)
    precision, wanted = trained.args.precision, trained.loss
    model.to(trained.args.device, DTYPES[precision]).register_forward_hook(lambda *call: call[-1].logits)
    loss = load_script("GPTLike-Base.py").evaluate(model, corpus, trained.args)["validation_loss"]
    tolerance = LOSS_TOLERANCE[precision if dtype in (precision, "fp32") else "rounded"]
    if wanted is None:
        return f"its validation loss is {loss:.6f}; the run has recorded none"
    if not math.isclose(loss, wanted, rel_tol=0, abs_tol=tolerance):
        raise ToolError(f"the export is wrong: its validation loss is {loss:.6f}, the run's {wanted:.6f}")
    return f"its validation loss is {loss:.6f}, the run's {wanted:.6f}"


def export(source: Path, target: Path, dtype: str | None, *, evaluated: bool) -> None:
    """Write the folder, but only what is the same model when read back. Raises ToolError otherwise."""
    cpu_default()
    from transformers import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
    there = [file.name for file in target.iterdir()] if target.is_dir() else []
    if target.is_file() or (there and "generation_config.json" not in there):
        raise ToolError(f"{target} is something else than an export: choose another OUT")
    trained = read_trained(source)
    dtype = dtype or trained.args.precision
    trained = trained._replace(weights={name: tensor.to(DTYPES[dtype]) for name, tensor in trained.weights.items()})
    tokenizer, corpus, reason = load_data(trained, evaluated=evaluated)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export", dir=target) as name:  # nothing is replaced by what is wrong
        folder = Path(name)
        model, difference = write_and_reload(trained, tokenizer, folder)
        sentence = f"its validation loss was NOT compared with the run's: {reason}"
        if corpus:
            sentence = compare_loss(model, trained, corpus, dtype)
        for file in folder.iterdir():
            os.replace(file, target / file.name)
    print(f"exported {trained.source} to {target}; reloaded, its logits differ by {difference:.1e} at most; {sentence}")


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
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
