"""Turn a trained model into a transformers GPT-2 folder, and prove that it is the same model.

    python scripts/export_hf.py runs/DeepSpeed-GPTLike-ZeRO-2 gpt2-wikitext2
    python scripts/export_hf.py runs/DeepSpeed-GPTLike-ZeRO-3/checkpoints/step500 gpt2-step500
    python scripts/generate.py gpt2-wikitext2 --prompt "The first"

The model of the training scripts is GPT-2's; only names differ, and that transformers keeps most matrices transposed.
The folder works wherever a GPT-2 works: AutoModelForCausalLM and AutoTokenizer.from_pretrained, pipelines, fine-tuning.
It holds weights (safetensors), both configs, the tokenizer, and README.md, a model card with what the run has recorded.

Nothing gets its place in OUT_DIR before it was read back with from_pretrained: its logits have to be the original's to
1e-4, in fp32, and its loss over the whole validation split the one that the run recorded, to 1e-4 (to 1e-3 where the
run computes in 16 bits). Where the run's data cannot be had, or the run has recorded no such loss, it says so.

A checkpoint of a ZeRO script holds pieces, which DeepSpeed's zero_to_fp32 puts together, on one host and on CPU. Export
no ZeRO checkpoint of a stranger: DeepSpeed unpickles it, and a pickle can run any code. model/ is safetensors, and the
state.pt of GPTLike-Base.py is read with weights_only: neither can.
Exit code 0: exported, 1: it cannot be, nothing is written, 2: wrong usage.

Source: https://huggingface.co/docs/transformers/model_doc/gpt2
"""

import argparse
import contextlib
import importlib.util
import io
import json
import math
import os
import pickle
import re
import socket
import sys
import tempfile
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import NamedTuple

import safetensors
import tokenizers
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import nn
from tqdm import tqdm

os.environ.setdefault("DS_ACCELERATOR", "cpu")  # transformers looks for DeepSpeed, which would warn where no GPU is
from huggingface_hub import ModelCardData
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
    logging,
)

BASE_SCRIPT = Path(__file__).resolve().parent.parent / "GPTLike-Base.py"
TOLERANCE = 1e-4  # of logits and losses in fp32: other kernels, the same numbers
TOLERANCE_16_BITS = 1e-3  # of losses: other kernels round each activation to 2 or 3 digits, at other places
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
UNREADABLE = (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError, AssertionError,
              pickle.UnpicklingError)  # fmt: skip
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
SIZES = ("n_layer", "n_head", "d_model", "block_size")
ARGS = {"dataset": str, "tokenizer": str}  # what is needed of args.json, and of which type
SETTINGS = dict.fromkeys((*SIZES, "batch_size", "gradient_accumulation_steps", "ZeRO stage", "world size"), int)
SETTINGS |= {"data and tokenizer": str, "precision": str}  # the same of a manifest's settings
SUMMARY = {"steps": int, "validation_loss": float}
DATA = {
    "wikitext2": "WikiText-2, raw: `Salesforce/wikitext`, `wikitext-2-raw-v1`",
    "sample": "the language reference that comes with Python (`pydoc_data.topics`), split by topic",
}


class Trained(NamedTuple):
    """A model, and what its run has recorded about it; {} and None where there is no record."""

    shape: dict
    weights: dict[str, torch.Tensor]
    tokenizer: tokenizers.Tokenizer
    step: int | None
    loss: float | None  # on the validation split, as the run has found it
    summary: dict
    args: dict
    settings: dict  # of a checkpoint's manifest
    corpus: tuple | None  # the run's data, a Corpus of the training scripts
    reason: str  # why they are not at hand


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


# What a run leaves, read.
def read_record(path: Path, kinds: dict[str, type]) -> dict:
    """A JSON object of which these names have these types; {} where there is no such file. Raises ValueError."""
    if not path.is_file():
        return {}
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        check_kinds(record, kinds)
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise ValueError(f"cannot read {path}: {error!r:.200}. Is it of a training run?") from error
    return record


def check_kinds(record: dict, kinds: dict[str, type]) -> None:
    for name, kind in kinds.items():
        if type(record[name]) is not kind:
            raise ValueError(f"{name} is {record[name]!r:.60}")


def read_trained(folder: Path, base: ModuleType) -> Trained:
    """What there is to export. Raises ValueError naming the file that is missing or damaged."""
    if (folder / "run.json").is_file() or re.fullmatch(r".*/checkpoints/step\d+", str(folder.resolve())):
        return read_checkpoint(folder, base)
    shape, weights, tokenizer = read_model(folder)
    run = folder.resolve().parent
    summary = read_record(run / "summary.json", SUMMARY)
    known, _ = base.whole_steps(run / "checkpoints", "step*", SimpleNamespace(has=lambda folder: True), {})
    settings = known[max(known)]["settings"] if known else {}
    if settings:
        check_settings(settings, run / "checkpoints")
    args, loss = read_record(run / "args.json", ARGS), summary.get("validation_loss")
    data = find_corpus(args, settings, base)
    return Trained(shape, weights, tokenizer, summary.get("steps"), loss, summary, args, settings, *data)


def check_settings(settings: dict, place: Path) -> None:
    try:
        check_kinds(settings, SETTINGS)
    except (KeyError, ValueError) as error:
        raise ValueError(f"the settings in {place} are not what a run writes: {error}") from error


def read_model(folder: Path) -> tuple[dict, dict[str, torch.Tensor], tokenizers.Tokenizer]:
    """(shape, weights, tokenizer) of a run's model/. Raises ValueError naming the file that is missing or damaged."""
    files = [folder / name for name in ("config.json", "model.safetensors", "tokenizer.json")]
    if missing := [file.name for file in files if not file.is_file()]:
        raise ValueError(f"{folder} lacks {', '.join(missing)}: give the --output_dir of a finished run, its model/, "
                         "or a checkpoint such as RUN/checkpoints/step500")  # fmt: skip
    try:
        weights = load_file(files[1])
    except (OSError, safetensors.SafetensorError) as error:
        raise ValueError(f"cannot read {files[1]}: {error}") from error
    tokenizer = read_tokenizer(files[2])
    try:
        shape = json.loads(files[0].read_text(encoding="utf-8"))
        if absent := {*SIZES, "vocab_size", "padded_vocab_size"} - shape.keys():
            raise ValueError(f"no {', '.join(sorted(absent))}; is it the model/ of a training run?")
        check_shape(shape, weights, tokenizer)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise ValueError(f"cannot read {files[0]}: {error}") from error
    return shape, weights, tokenizer


def read_tokenizer(path: Path) -> tokenizers.Tokenizer:
    try:
        json.loads(text := path.read_text(encoding="utf-8"))["model"]["vocab"]
        return tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # tokenizers raises nothing narrower
        raise ValueError(f"cannot read {path}: {error!r}") from error


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


# Checkpoints.
def read_checkpoint(folder: Path, base: ModuleType) -> Trained:
    """A step: the weights that model/ would hold if the run had ended there."""
    folder = folder.resolve()
    run, any_run = folder.parent.parent, SimpleNamespace(has=lambda folder: True)
    known, problems = base.whole_steps(folder.parent, folder.name, any_run, {})
    if not known:
        raise ValueError(". ".join(problems))
    [manifest] = known.values()
    settings, loss, step = (manifest[name] for name in ("settings", "validation_loss", "step"))
    check_settings(settings, folder / "run.json")
    args, summary = read_record(run / "args.json", ARGS), read_record(run / "summary.json", SUMMARY)
    weights = read_weights(folder, settings, manifest["hosts"])
    corpus, reason = find_corpus(args, settings, base)
    saved = run / "model" / "tokenizer.json"  # of a finished run
    if corpus is None and not saved.is_file():
        raise ValueError(f"{folder} comes without its tokenizer: there is no {saved}, and {reason}")
    tokenizer = read_tokenizer(saved) if corpus is None else tokenizers.Tokenizer.from_str(corpus.tokenizer)
    if loss is None and step == summary.get("steps"):  # the last evaluation comes after the last save
        loss = summary["validation_loss"]
    shape = {name: settings[name] for name in SIZES} | {"vocab_size": tokenizer.get_vocab_size()}
    shape["padded_vocab_size"] = len(weights.get("token_embedding.weight", ()))
    try:
        check_shape(shape, weights, tokenizer)
    except ValueError as error:
        raise ValueError(f"{folder} is not what its run.json says: {error}") from error
    return Trained(shape, weights, tokenizer, step, loss, {}, args, settings, corpus, reason)


def read_weights(folder: Path, settings: dict, hosts: list[str]) -> dict[str, torch.Tensor]:
    """In the run's precision."""
    if settings["ZeRO stage"] == 0:
        weights = read_state(folder / "state.pt")
    elif missing := missing_shards(folder, settings, hosts):
        raise ValueError(f"{folder} on host {socket.gethostname()} lacks {', '.join(missing)}: copy them here from "
                         "this folder there")  # fmt: skip
    else:
        weights = read_shards(folder)
    dtype = DTYPES.get(settings["precision"], torch.float32)
    return {name: tensor.to(dtype) for name, tensor in weights.items() if name != "head.weight"}


def missing_shards(folder: Path, settings: dict, hosts: list[str]) -> list[str]:
    """The files of a ZeRO checkpoint that are not here, and their hosts: run.json lists those of its own host only."""
    prefix, by_rank = "bf16_" if settings["precision"] == "bf16" else "", settings["ZeRO stage"] == 3
    wanted = {} if by_rank else {"mp_rank_00_model_states.pt": 0}
    for rank in range(settings["world size"]):
        wanted[f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"] = rank
        if by_rank:
            wanted[f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt"] = rank
    missing = {name: rank for name, rank in wanted.items() if not (folder / name).is_file()}
    host = dict(enumerate(hosts))
    return [f"{name} of rank {rank}, written on host {host.get(rank)}" for name, rank in missing.items()]


def read_state(path: Path) -> dict[str, torch.Tensor]:
    try:
        state = torch.load(path, weights_only=True, map_location="cpu")
        return {name: tensor.detach() for name, tensor in state["model"].items()}
    except UNREADABLE as error:
        raise ValueError(f"cannot read {path}: {(str(error) or repr(error)).splitlines()[0]}") from error


def read_shards(folder: Path) -> dict[str, torch.Tensor]:
    """All ranks' pieces, put together in fp32. DeepSpeed unpickles them."""
    config = read_record(folder.parent.parent / "ds_config.json", {})
    zero = config.get("zero_optimization", {})
    if "nvme" in [(zero.get(f"offload_{what}") or {}).get("device") for what in ("optimizer", "param")]:
        raise ValueError(f"the weights of {folder} lie on NVMe and not in its files: export {folder.parent.parent}")
    print(f"putting the shards of {folder} together ...", file=sys.stderr)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint as put_together

            return put_together(str(folder.parent), tag=folder.name)
    except UNREADABLE as error:
        raise ValueError(f"cannot read {folder}: {(str(error) or repr(error)).splitlines()[0]}") from error


# The run's data, and the model's loss on them.
def find_corpus(args: dict, settings: dict, base: ModuleType) -> tuple[tuple | None, str]:
    """The tokens that the run was trained on, from the cache or read anew; or None, and why not."""
    if not settings or not args:
        return None, "there is no args.json or no checkpoint beside it that names the run's data"
    digest = settings["data and tokenizer"]
    cache = Path(os.environ.get("GPTLIKE_CACHE", Path.home() / ".cache" / "deepspeed-gptlike"))
    for path in sorted(cache.glob("*.safetensors")):
        if path.name.startswith(digest) and (corpus := base.read_tokens(path)):
            return corpus, ""
    try:
        corpus = base.load_corpus(SimpleNamespace(**args | {"block_size": settings["block_size"]}))
    except base.UserError as error:
        return None, str(error).splitlines()[0]
    if not corpus.digest.startswith(digest):
        return None, f"--dataset {args['dataset']} with --tokenizer {args['tokenizer']} is not here what it was there"
    return corpus, ""


class AsGPTLike(nn.Module):
    """A transformers model in the place of a GPTLike that is evaluated."""

    def __init__(self, model: GPT2LMHeadModel, bar: tqdm):
        super().__init__()
        self.model, self.bar = model, bar

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.bar.update()
        return F.cross_entropy(self.model(tokens).logits.float().flatten(0, 1), targets.flatten())  # ()


def evaluate(folder: Path, trained: Trained, base: ModuleType) -> tuple[dict[str, float], str]:
    """The exported model's figures on the run's validation split, and a sentence on how its loss compares to the run's.
    Raises ValueError where it is another."""
    if (corpus := trained.corpus) is None:
        return {}, f"its validation loss was NOT compared with the run's: {trained.reason}"
    sizes = SimpleNamespace(block_size=trained.shape["block_size"], batch_size=trained.settings["batch_size"])
    tokens = len(corpus.streams["validation"])
    print(f"evaluating {tokens:,} tokens ...", file=sys.stderr)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(device)
    passes = math.ceil(math.ceil((tokens - 1) / sizes.block_size) / sizes.batch_size)
    with tqdm(total=passes, disable=None) as bar:  # on a terminal only
        found = base.evaluate(AsGPTLike(model, bar), corpus, "validation", sizes, device, alone=True)
    loss, wanted = found["validation_loss"], trained.loss
    if wanted is None:
        return found, f"its validation loss is {loss:.4f}; the run has recorded none at step {trained.step}"
    if not abs(loss - wanted) <= (TOLERANCE if trained.settings["precision"] == "fp32" else TOLERANCE_16_BITS):
        raise ValueError(f"the export is wrong: its validation loss is {loss:.6f}, the run's {wanted:.6f}")
    return found, f"its validation loss is {loss:.6f}, the run's {wanted:.6f}"


# The folder.
def original_model(shape: dict, weights: dict[str, torch.Tensor], base: ModuleType) -> nn.Module:
    """The GPTLike of the training scripts with these weights, in fp32."""
    args = SimpleNamespace(**{name: shape[name] for name in SIZES}, dropout=0.0, activation_checkpointing=False)
    model = base.GPTLike(args, shape["vocab_size"])
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


def write_and_compare(trained: Trained, base: ModuleType, folder: Path) -> float:
    """The largest difference between logits. Raises ValueError where more differs than rounding explains."""
    shape, weights, tokenizer = trained.shape, trained.weights, trained.tokenizer
    original = original_model(shape, weights, base)
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


def model_card(trained: Trained, figures: dict[str, float]) -> str:
    """README.md of the folder: only what the run has recorded, or what was measured here."""
    source = trained.args.get("dataset")
    meta = ModelCardData(library_name="transformers", pipeline_tag="text-generation", tags=["gpt2"],
                         language="en" if source in DATA else None,
                         datasets=["Salesforce/wikitext"] if source == "wikitext2" else None)  # fmt: skip
    return f"""---
{meta}
---

# A GPT-2 of {trained.shape["n_layer"]} layers

Trained from scratch by a script of DeepSpeed GPTLike, for learning: what it writes was not filtered or aligned.

{markdown(("model", ""), model_rows(trained))}
## Evaluation

{evaluation(trained, figures)}
## Training settings

{markdown(("setting", "value"), setting_rows(trained))}
## Use

```python
from transformers import pipeline

print(pipeline("text-generation", "PATH_OF_THIS_FOLDER")("The first", max_new_tokens=40)[0]["generated_text"])
```
"""


def model_rows(trained: Trained) -> dict[str, object]:
    shape, source, weights = trained.shape, trained.args.get("dataset"), trained.weights.values()
    batch, step = global_batch(trained.settings), trained.step
    dtype = str(trained.weights["token_embedding.weight"].dtype).removeprefix("torch.")
    folder = f"the texts of a folder named `{Path(source).name}`" if source else None  # where it lay is private
    streams = trained.corpus.streams if trained.corpus else {}
    return {
        "data": DATA.get(source, folder),
        "tokens of the train split": f"{len(streams['train']):,}" if streams else None,
        "tokens seen in training": f"{step * batch * shape['block_size']:,}" if step and batch else None,
        "vocabulary": f"{shape['vocab_size']:,} tokens, in an embedding of {shape['padded_vocab_size']:,} rows",
        "parameters": f"{sum(tensor.numel() for tensor in weights):,}, in {dtype}",
        "shape": f"{shape['n_layer']} layers, {shape['n_head']} heads, width {shape['d_model']}, "
                 f"{shape['block_size']} positions",
    }  # fmt: skip


def setting_rows(trained: Trained) -> dict[str, object]:
    settings, args = trained.settings, trained.args
    names = ("lr", "weight_decay", "warmup_steps", "dropout", "seed", "precision", "tokenizer")
    rows = {"optimizer steps": trained.step, "sequences in a step": global_batch(settings)}
    rows |= {f"`--{name}`": args.get(name) for name in names}
    if os.path.exists(str(args.get("tokenizer"))):
        rows["`--tokenizer`"] = "a file"
    return rows | {"ZeRO stage": settings.get("ZeRO stage"), "ranks": settings.get("world size")}


def global_batch(settings: dict) -> int | None:
    parts = [settings.get(name) for name in ("batch_size", "gradient_accumulation_steps", "world size")]
    return None if None in parts else math.prod(parts)


def markdown(heading: tuple[str, str], rows: dict[str, object]) -> str:
    cells = [(name, "not recorded" if value is None else str(value)) for name, value in rows.items()]
    lines = [heading, ("---", "---"), *((name, value.replace("|", "\\|")) for name, value in cells)]
    return "".join(f"| {name} | {value} |\n" for name, value in lines)


def evaluation(trained: Trained, figures: dict[str, float]) -> str:
    """The table of perplexities, and where its numbers come from."""
    found = trained.summary | figures
    kinds = {"loss": ".4f", "perplexity": ".2f", "word_perplexity": ".2f", "bits_per_byte": ".4f"}
    lines = ["| split | loss, nats per token | perplexity per token | per word | bits per byte |\n| --- | --: | --: | "
             "--: | --: |\n"]  # fmt: skip
    for split in ("validation", "test"):
        if all(isinstance(found.get(f"{split}_{kind}"), float) for kind in kinds):
            cells = [f"{found[f'{split}_{kind}']:{form}}" for kind, form in kinds.items()]
            lines.append(f"| {split} | {' | '.join(cells)} |\n")
    if len(lines) == 1:
        return "Not evaluated: the run's records or data were not at hand.\n"
    who = "this folder's weights" if figures else "the training run"
    return "".join(lines) + f"\nOver every token of the split but the first. Validation: measured on {who}.\n"


def check_target(source: Path, target: Path) -> None:
    if target.exists() and target.resolve() == source.resolve():
        raise ValueError(f"{target} is the model itself: choose another OUT_DIR")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{target} is a file: choose another OUT_DIR")
    if target.exists() and any(target.iterdir()) and not (target / "generation_config.json").is_file():
        raise ValueError(f"{target} holds other files than an export: choose another OUT_DIR")


def export(source: Path, target: Path, *, evaluated: bool = True) -> None:
    """Write the folder, but only what is the same model when read back. Raises ValueError otherwise."""
    if (source / "model").is_dir():
        source = source / "model"
    check_target(source, target)
    base = load_base()
    trained = read_trained(source, base)
    target.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export", dir=target) as name:  # nothing is replaced by what is wrong
        folder = Path(name)
        difference = write_and_compare(trained, base, folder)
        skipped = {}, "its validation loss was NOT compared with the run's, as --skip_evaluation wants"
        figures, sentence = evaluate(folder, trained, base) if evaluated else skipped
        (folder / "README.md").write_text(model_card(trained, figures), encoding="utf-8")
        for file in folder.iterdir():
            os.replace(file, target / file.name)
    print(f"exported {source} to {target}; reloaded, its logits differ by {difference:.1e} at most; {sentence}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", metavar="MODEL_OR_RUN_DIR", type=Path,
                        help="--output_dir of a run, its model/, or a RUN/checkpoints/stepN")  # fmt: skip
    parser.add_argument("target", metavar="OUT_DIR", type=Path, help="folder to write")
    parser.add_argument("--skip_evaluation", action="store_true",
                        help="do not compare the validation loss: long, with a large model on a CPU")  # fmt: skip
    return parser


def main() -> None:
    args = build_parser().parse_args()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        export(args.model, args.target, evaluated=not args.skip_evaluation)
    except (OSError, ValueError) as error:
        sys.exit(f"export_hf.py: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
