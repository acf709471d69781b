"""The same GPT under DeepSpeed ZeRO stage 3: each rank keeps only its share of the parameters, too.

Adds to DeepSpeed-GPTLike-ZeRO-2.py:
- "stage": 3 in the JSON (configs/zero3.json)
- `deepspeed.zero.Init` around the model's construction: no rank ever holds the whole model
- weights that are gathered before they are saved: on its own, a rank's state_dict() holds empty tensors
Partitioned across ranks: optimizer states, gradients and parameters; 16P/N bytes are left on each of N ranks. Layers
are gathered just before they run, which costs half as much communication again: 3P elements a step.

Run:
    deepspeed --num_gpus 2 DeepSpeed-GPTLike-ZeRO-3.py
    torchrun --nproc_per_node 2 DeepSpeed-GPTLike-ZeRO-3.py --dataset sample
    python DeepSpeed-GPTLike-ZeRO-3.py --dataset sample --n_layer 2 --n_head 4 --d_model 128 --max_steps 50

Source: ZeRO, arXiv:1910.02054, section 5.3; https://deepspeed.readthedocs.io/en/latest/zero3.html
"""

import argparse
import contextlib
import ctypes
import difflib
import fcntl
import functools
import gc
import hashlib
import http.client
import itertools
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.request
import warnings
import weakref
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from statistics import median
from typing import NamedTuple, NoReturn

import torch

# The device that this script will use: left alone, DeepSpeed guesses, and warns of its guess or takes another.
os.environ.setdefault("DS_ACCELERATOR", "cuda" if torch.cuda.is_available() else "cpu")
import deepspeed
import hjson
import psutil
import pydantic
import safetensors.torch
import tokenizers
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

PREVIOUS = "DeepSpeed-GPTLike-ZeRO-2.py"
ZERO_STAGE = 3  # ZeRO-3: parameters are partitioned as well
DEFAULT_DS_CONFIG = "configs/zero3.json"


# region arguments (owner: GPTLike-Base.py)
VERSION = "0.1.0"


class UserError(Exception):
    """Something that the user can mend: one message on each host's screen, exit code 1, no traceback."""


class LoneError(UserError):
    """The same, met by one rank in the midst of common work: that rank prints it, and its launcher ends the others."""


def stop_on_user_error(main: Callable[[], None]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C: no traceback
    sys.stdout.reconfigure(line_buffering=True)  # into a file or a pipe, too: each line when it is said
    try:
        main()
    except LoneError as error:
        end_alone(str(error))
    except UserError as error:
        leave(f"{Path(__file__).name}: error: {error}" if local_rank() == 0 else 1)
    except SystemExit as stop:
        leave(stop.code)
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            end_alone(f"not enough memory for this model and batch ({str(error).splitlines()[0]}). Less is needed with "
                      "a smaller --batch_size or --block_size, --activation_checkpointing, or a smaller model")
        if world_size() == 1 or not re.search("(closed|reset) by peer|[Tt]imed out|timeout", str(error)):
            raise
        end_alone(f"another rank is gone or stuck ({str(error).split('. ')[0]}). What it said stands above or on its "
                  "host's screen. The same command on all hosts continues from the last checkpoint")  # fmt: skip
    else:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def leave(code: int | str | None) -> NoReturn:
    """Like sys.exit, but on several ranks without tidying up the interpreter, which gloo's threads can abort."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
    if world_size() == 1:
        sys.exit(code)
    if isinstance(code, str):
        sys.stderr.write(f"{code}\n")
    os._exit(1 if isinstance(code, str) else code or 0)


def end_alone(message: str) -> NoReturn:
    """Without a goodbye to the other ranks, which are elsewhere."""
    sys.stderr.write(f"{Path(__file__).name}: error: rank {rank()} on host {socket.gethostname()}: {message}\n")
    os._exit(1)


def build_parser() -> argparse.ArgumentParser:
    """The flags of all six scripts. Those that the JSON knows too have no default here: left out, the JSON's holds."""
    looks = {"description": __doc__.splitlines()[0], "formatter_class": argparse.ArgumentDefaultsHelpFormatter}
    parser = argparse.ArgumentParser(**looks, allow_abbrev=False)
    versions = f"%(prog)s {VERSION}, torch {torch.__version__}, Python {sys.version.split()[0]}"
    parser.add_argument("--version", action="version", version=versions)
    unset, add = argparse.SUPPRESS, parser.add_argument_group("model").add_argument
    add("--n_layer", type=int, default=6, help="transformer blocks")
    add("--n_head", type=int, default=12, help="attention heads per block")
    add("--d_model", type=int, default=768, help="width of the residual stream")
    add("--block_size", type=int, default=256, help="tokens per sequence")
    add("--dropout", type=float, default=0.1, help="on embeddings and residual branches")
    add("--activation_checkpointing", action="store_true", help="recompute activations in the backward pass")
    add("--compile", action="store_true", help="torch.compile the model")
    add = parser.add_argument_group("optimization").add_argument
    add("--epochs", type=int, default=3, help="passes over the train split")
    add("--max_steps", type=int, help="optimizer steps; wins over --epochs")
    add("--batch_size", type=int, default=unset, help="micro batch: sequences per rank per forward")
    add("--gradient_accumulation_steps", type=int, default=unset, help="micro batches per optimizer step")
    add("--lr", type=float, default=unset, help="peak learning rate")
    add("--weight_decay", type=float, default=unset, help="on matrices, not on biases and norms")
    add("--warmup_steps", type=int, default=20, help="optimizer steps of linear warm-up; then cosine decay to lr/10")
    add("--precision", choices=["bf16", "fp16", "fp32"], default=unset, help="of weights and activations")
    add("--seed", type=int, default=42, help="of initialization, data order and dropout")
    add = parser.add_argument_group("data and output").add_argument
    add("--dataset", default="wikitext2", help="wikitext2 (Hub), sample (offline), or a folder with train*, valid*")
    add("--tokenizer", default="auto", help="auto, gpt2 (Hub), bpe:SIZE (trained here), or a tokenizer.json's path")
    add("--output_dir", default=f"runs/{Path(__file__).stem}", help="metrics, checkpoints, final model")
    add("--resume", default="auto", help="auto (newest checkpoint in --output_dir), never, or a checkpoint's path")
    add("--overwrite", action="store_true", help="start afresh: delete the run that --output_dir holds")
    add("--log_interval", type=int, default=10, help="optimizer steps between lines")
    add("--eval_interval", type=int, default=200, help="optimizer steps between validations; 0: at the end only")
    add("--save_interval", type=int, default=500, help="optimizer steps between checkpoints; 0: at the end only")
    add("--peak_tflops", type=float, help="of one device, for MFU where it is not known")
    add("--memory_report", action="store_true", help="write memory.json: what each phase of the first steps holds")
    add("--local_rank", "--local-rank", type=int, default=0, help="set by launchers; LOCAL_RANK wins")
    if local_rank() > 0:
        parser.error = lambda message: sys.exit(2)  # the host's first rank prints it
    return parser


def check_args(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends in usage, one message and exit code 2 where a number makes no sense."""
    may_be_zero = {"dropout", "weight_decay", "warmup_steps", "seed", "eval_interval", "save_interval", "local_rank"}
    for name, value in vars(args).items():
        if isinstance(value, list):  # Python 3.11's argparse makes [] of --name=--
            parser.error(f"argument --{name}: expected one argument")
        if value == "":
            parser.error(f"--{name} is empty")
        if type(value) in (int, float) and not (0 < value < 2**31 or value == 0 and name in may_be_zero):
            limit = "below 2**31" if value >= 2**31 else f"{'at least' if name in may_be_zero else 'above'} 0"
            parser.error(f"--{name} {value}: must be {limit}")
    if args.dropout >= 1:
        parser.error(f"--dropout {args.dropout} must be below 1")
    if args.d_model % args.n_head:
        parser.error(f"--d_model {args.d_model} is not a multiple of --n_head {args.n_head}")
    inside = os.path.realpath(args.resume).startswith(os.path.realpath(args.output_dir) + os.sep)
    if args.overwrite and inside and args.resume not in ("auto", "never"):
        parser.error(f"--overwrite deletes --resume {args.resume} with all of --output_dir: leave one of them out")
    size = args.tokenizer.removeprefix("bpe:")
    if size != args.tokenizer and not (re.fullmatch("[0-9]{1,6}", size) and int(size) >= 256):
        parser.error(f"--tokenizer {args.tokenizer}: write bpe:SIZE with a SIZE from 256 to 999999")
# endregion arguments


# region data (owner: GPTLike-Base.py)
HUB_DATASET, HUB_TOKENIZER = "Salesforce/wikitext", "openai-community/gpt2"
WAYS_OUT = """Ways out:
  mirror   export HF_ENDPOINT=https://YOUR-MIRROR
  cache    copy ~/.cache/huggingface from a host that has it, then export HF_HUB_OFFLINE=1
  folder   --dataset DIR with train.txt and valid.txt, or the official wiki.train.raw and wiki.valid.raw
  sample   --dataset sample: English prose that comes with Python and needs no network"""


class Corpus(NamedTuple):
    streams: dict[str, torch.Tensor]  # int32 token ids of "train", "validation" and, if there is one, "test"
    sizes: dict[str, dict[str, int]]  # "bytes" and "words" (between white space) of each split
    tokenizer: str  # JSON
    vocab_size: int
    digest: str  # of texts and tokenizer


class TokenizedDataset(torch.utils.data.Dataset):
    """Inputs stream[i*T : i*T+T] and, shifted by one, their targets. A last block shorter than T is left out, or with
    pad filled up with targets of -100, which no loss counts."""

    def __init__(self, stream: torch.Tensor, block_size: int, *, pad: bool = False):
        missing = -(len(stream) - 1) % block_size if pad else 0
        self.blocks = F.pad(stream, (0, missing), value=-100).unfold(0, block_size + 1, block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        blocks = self.blocks[index].long()
        return blocks[..., :-1].clamp_min(0), blocks[..., 1:]  # each (batch, block_size)


def step_indices(step: int, num_blocks: int, *, global_batch: int, seed: int) -> torch.Tensor:
    """The blocks of one optimizer step, all ranks together. They depend on seed and step alone, so that any number of
    ranks and micro batches sees the same data and a resumed run goes on in the middle of an epoch."""
    place = torch.arange(step * global_batch, (step + 1) * global_batch)
    epochs = range(int(place[0]) // num_blocks, int(place[-1]) // num_blocks + 1)
    seeds = [torch.Generator().manual_seed(seed * 1_000_003 + epoch) for epoch in epochs]
    return torch.cat([torch.randperm(num_blocks, generator=s) for s in seeds])[place - epochs[0] * num_blocks]


def from_hub(what: str, load: Callable[[], object]) -> object:
    """`load()` from the Hub, or from its local cache where the Hub does not answer. UserError within 15 seconds."""
    endpoint, answers = os.environ.get("HF_ENDPOINT", "https://huggingface.co"), ["no answer in 6 s"]

    def probe() -> None:  # for one byte of a real file: left to itself, an unreachable Hub is retried for minutes
        url = f"{endpoint}/datasets/{HUB_DATASET}/resolve/main/wikitext-2-raw-v1/test-00000-of-00001.parquet"
        try:
            urllib.request.urlopen(urllib.request.Request(url, headers={"Range": "bytes=0-0"}), timeout=6).close()
            answers.append("")
        except (OSError, ValueError, http.client.HTTPException) as error:
            answers.append(str(error))

    if os.environ.get("HF_HUB_OFFLINE", "0") in ("", "0"):
        (thread := threading.Thread(target=probe, daemon=True)).start()  # name resolution knows no timeout
        thread.join(6)
        if answers[-1]:
            os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is first used: a cached copy still loads
    from huggingface_hub.errors import HTTPError

    try:
        return load()
    except (OSError, ValueError, HTTPError) as error:
        raise UserError(f"cannot get {what} from {endpoint}: {answers[-1] or error}. {WAYS_OUT}") from error


def join_rows(rows: list[str]) -> str:
    """The Hub's rows lack the " \n" of blank lines; with it the text is the official wiki.*.raw, byte for byte."""
    return "".join(row if row.endswith("\n") else row + " \n" for row in rows)


def read_texts(dataset: str) -> dict[str, str]:
    """{"train": text, "validation": text, perhaps "test": text}; never one source in place of another."""
    if dataset == "wikitext2":
        import datasets

        datasets.disable_progress_bars()
        rows = datasets.load_dataset(HUB_DATASET, "wikitext-2-raw-v1")
        return {split: join_rows(rows[split]["text"]) for split in ("train", "validation", "test")}
    if dataset == "sample":
        from pydoc_data.topics import topics  # the language reference behind Python's help()

        articles = [re.split(r"\n{2,}", topics[name].strip("\n")) for name in sorted(topics)]
        held_out = [paragraph for article in articles[::10] for paragraph in article]
        others = [paragraph for article in articles for paragraph in article]  # some topics quote each other
        return {"train": "\n\n".join(p for p in others if p not in held_out), "validation": "\n\n".join(held_out)}
    if not os.path.isdir(dataset):
        raise UserError(f"--dataset {dataset}: no such folder; else write wikitext2 or sample")
    texts, names = {}, sorted(path.name for path in Path(dataset).iterdir())
    for split, stem in {"train": "train", "validation": "val", "test": "test"}.items():
        files = [n for n in names if re.fullmatch(rf"(wiki\.)?{stem}.*\.(txt|raw|tokens|parquet)", n)]
        if len({Path(file).suffix for file in files}) > 1:
            raise UserError(f"{dataset} has {split} in several formats, keep one: {', '.join(files)}")
        if not files and split != "test":
            raise UserError(f"{dataset} has no {stem}* that ends in .txt, .raw, .tokens or .parquet, but {names[:8]}")
        if files:
            texts[split] = "".join(read_file(Path(dataset, file)) for file in files)
    return texts


def read_file(path: Path) -> str:
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            rows = parquet.read_table(path, columns=["text"])["text"].to_pylist()
            if not all(isinstance(row, str) for row in rows):
                raise ValueError("its column text holds more than text")
            return join_rows(rows)
        if not (text := path.read_bytes().decode("utf-8")).strip():
            raise UserError(f"{path} is empty")
        return text
    except (OSError, ValueError) as error:  # not UTF-8, not parquet, not readable
        raise UserError(f"cannot read {path}: {error}") from error


def read_tokenizer(name: str) -> str:
    """A tokenizer's JSON; for bpe:SIZE the name itself, since it is trained only where its tokens are not cached."""
    if name.startswith("bpe:"):
        return name
    path = Path(name, "tokenizer.json") if os.path.isdir(name) else Path(name)
    if name == "gpt2":
        from huggingface_hub import hf_hub_download

        path = Path(from_hub(f"tokenizer {HUB_TOKENIZER}", lambda: hf_hub_download(HUB_TOKENIZER, "tokenizer.json")))
    try:
        json.loads(text := path.read_text(encoding="utf-8"))["model"]["vocab"]
        return text
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"--tokenizer {name}: {path} is not a tokenizer.json ({error!r})") from error


def build_tokenizer(source: str, text: str) -> tokenizers.Tokenizer:
    """From JSON, or for bpe:SIZE a byte-level BPE like GPT-2's trained on text: it gives any text back unchanged."""
    if not source.startswith("bpe:"):
        return tokenizers.Tokenizer.from_str(source)
    tokenizer, bytewise = tokenizers.Tokenizer(tokenizers.models.BPE()), tokenizers.pre_tokenizers.ByteLevel
    tokenizer.pre_tokenizer, tokenizer.decoder = bytewise(add_prefix_space=False), tokenizers.decoders.ByteLevel()
    size, alphabet = int(source.removeprefix("bpe:")), bytewise.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    return tokenizer


def checksum(corpus: str, streams: dict[str, torch.Tensor]) -> str:
    parts = [corpus.encode()]
    for split, stream in sorted(streams.items()):
        parts += [f"{split} {stream.dtype} {[*stream.shape]}".encode(), stream.numpy().tobytes()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


def read_tokens(path: Path) -> Corpus | None:
    """What the cache holds, or None where it is missing or damaged."""
    with contextlib.suppress(OSError, safetensors.SafetensorError, LookupError, TypeError, ValueError):
        with safetensors.safe_open(path, "pt") as file:
            facts, streams = file.metadata(), {split: file.get_tensor(split).clone() for split in file.keys()}  # noqa: SIM118
        if facts["checksum"] == checksum(facts["corpus"], streams):
            return Corpus(streams, **json.loads(facts["corpus"]))
    return None


def prepare_tokens(args: argparse.Namespace) -> Path:
    """The cache file with the tokens of --dataset, named by content; written by rename, so nobody reads half a file."""
    if args.dataset == "wikitext2":
        auto, texts = "gpt2", from_hub(f"data set {HUB_DATASET}", lambda: read_texts(args.dataset))
    else:
        auto, texts = "bpe:8192", read_texts(args.dataset)
    source = read_tokenizer(auto if args.tokenizer == "auto" else args.tokenizer)
    digest = hashlib.sha256(json.dumps([source, texts]).encode()).hexdigest()
    path = Path(os.environ.get("GPTLIKE_CACHE", Path.home() / ".cache" / "deepspeed-gptlike"), f"{digest}.safetensors")
    if read_tokens(path):
        return path
    log(f"tokenizing {args.dataset} into {path}")
    streams, sizes = {}, {}
    try:
        tokenizer = build_tokenizer(source, texts["train"])
        for split, text in texts.items():
            lines = tokenizer.encode_batch(text.splitlines(keepends=True), add_special_tokens=False)
            streams[split] = torch.tensor([token for line in lines for token in line.ids], dtype=torch.int32)
            sizes[split] = {"bytes": len(text.encode()), "words": len(text.split())}
        if any(stream.numel() and stream.max() >= tokenizer.get_vocab_size() for stream in streams.values()):
            raise ValueError(f"it has ids above its {tokenizer.get_vocab_size()} tokens")
    except Exception as error:  # tokenizers raises nothing narrower
        raise UserError(f"--tokenizer {args.tokenizer} does not work: {error}") from error
    corpus = {"sizes": sizes, "tokenizer": tokenizer.to_str(), "vocab_size": tokenizer.get_vocab_size()}
    corpus = json.dumps(corpus | {"digest": digest})
    facts = {"corpus": corpus, "checksum": checksum(corpus, streams)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        safetensors.torch.save_file(streams, part := path.with_suffix(f".{os.getpid()}"), facts)
        os.replace(part, path)
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"cannot write the token cache {path.parent}: {error}; set GPTLIKE_CACHE") from error
    return path


def load_corpus(args: argparse.Namespace) -> Corpus:
    """The same token streams on every rank: the first local rank of each host prepares them, the others wait."""
    corpus = read_tokens(once_per_host(lambda: prepare_tokens(args)))
    for split in ("train", "validation"):
        if len(corpus.streams[split]) <= args.block_size:
            raise UserError(f"--block_size {args.block_size} does not fit {split}: {len(corpus.streams[split])} tokens")
    return corpus
# endregion data


# region model (owner: GPTLike-Base.py)
def kept(x: torch.Tensor, p: float) -> torch.Tensor:
    """Which elements dropout keeps, on a CPU: PyTorch's random numbers take a tenth of a training step there, here a
    draw of 64 bits serves four elements. An operator, since torch.compile would stop at what it does."""
    bits = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return bits[: x.numel()].view_as(x) >= round(p * 2**16) - 2**15


if not hasattr(torch.ops.gptlike, "kept"):  # once in a process: to register it anew would pull it from under the first
    operator = torch.library.custom_op("gptlike::kept", kept, mutates_args=(), tags=torch.Tag.nondeterministic_seeded)
    operator.register_fake(lambda x, p: x.new_empty(x.shape, dtype=torch.bool))  # all that torch.compile has to know


class Dropout(nn.Dropout):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or not self.p or x.device.type != "cpu":
            return super().forward(x)
        return x * torch.ops.gptlike.kept(x, self.p) / (1 - self.p)


class CausalSelfAttention(nn.Module):
    """Attention has no dropout of its own: with it, PyTorch's fused CPU attention would be switched off."""

    def __init__(self, d_model: int, n_head: int, dropout: float):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.projection = nn.Linear(d_model, d_model)
        self.projection.is_residual = True
        self.dropout = Dropout(dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, seq, d_model)
        qkv = self.qkv(x).unflatten(-1, (3, self.n_head, -1))  # (batch, seq, 3, n_head, head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, n_head, seq, head_dim)
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.dropout(self.projection(heads.transpose(1, 2).flatten(2)))  # (batch, seq, d_model)


class FeedForward(nn.Sequential):
    def __init__(self, d_model: int, dropout: float):
        up, down = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)
        down.is_residual = True
        super().__init__(up, nn.GELU(approximate="tanh"), down, Dropout(dropout))


class TransformerBlock(nn.Module):
    def __init__(self, d_model: int, n_head: int, dropout: float):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(d_model), CausalSelfAttention(d_model, n_head, dropout)
        self.norm2, self.feed_forward = nn.LayerNorm(d_model), FeedForward(d_model, dropout)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, seq, d_model)
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class LinearCrossEntropy(torch.autograd.Function):
    """Mean cross-entropy of logits x @ weight.T over the targets that are not -100. A few rows at a time and with the
    gradients taken at once, so that all logits never exist together. (PyTorch 2.13's own linear_cross_entropy gives the
    loss in x's dtype: in bf16 two digits, too few for a perplexity.)"""

    @staticmethod
    def forward(ctx, x, weight, targets):  # (tokens, d_model), (vocab, d_model), (tokens,)
        loss, grad_x, grad_weight = 0.0, torch.empty_like(x), torch.zeros_like(weight, dtype=torch.float32)
        rows = min(len(x), 256 * (1 + len(weight) // 2**14))  # what fits the cache; more where grad_weight is large
        all_logits, product = x.new_empty(rows, len(weight)), torch.empty_like(weight)
        all_logs = torch.empty_like(all_logits, dtype=torch.float32)
        for part, target, grad_part in zip(x.split(rows), targets.split(rows), grad_x.split(rows), strict=True):
            counts, target = (target != -100).unsqueeze(1), target.clamp_min(0).unsqueeze(1)
            logits, logs = all_logits[: len(part)], all_logs[: len(part)]  # (rows, vocab)
            torch.mm(part, weight.T, out=logits)
            torch.log_softmax(logits, dim=-1, dtype=torch.float32, out=logs)
            loss -= (logs.gather(1, target) * counts).sum()
            if any(ctx.needs_input_grad):  # of the logits: probabilities, and 1 less at the target
                logits.copy_(logs.exp_().scatter_add_(1, target, -torch.ones_like(target, dtype=torch.float32)))
                grad_part.copy_(logits @ weight * counts)
                grad_weight += torch.mm(logits.T, part * counts, out=product)
        count = (targets != -100).sum().clamp_min(1)
        ctx.save_for_backward(grad_x, grad_weight, count)
        return loss / count

    @staticmethod
    def backward(ctx, grad_loss):
        grad_x, grad_weight, count = ctx.saved_tensors
        scale = grad_loss / count  # only here: fp16 could not hold gradients divided by count before they are scaled
        return grad_x * scale.to(grad_x.dtype), (grad_weight * scale).to(grad_x.dtype), None


class LanguageModelHead(nn.Module):
    """The output layer, on the embedding's weight. The loss is taken in here, since under ZeRO-3 a weight is whole only
    while a module that owns it runs."""

    def __init__(self, weight: nn.Parameter):
        super().__init__()
        self.weight = weight  # (vocab, d_model)

    def forward(self, x: torch.Tensor, targets: torch.Tensor | None) -> torch.Tensor:
        if targets is None:
            return F.linear(x, self.weight)  # (batch, seq, vocab)
        return LinearCrossEntropy.apply(x.flatten(0, 1), self.weight, targets.flatten())  # ()


class GPTLike(nn.Module):
    """Pre-norm decoder-only transformer with learned positions and a tied head, initialized as GPT-2."""

    def __init__(self, args: argparse.Namespace, vocab_size: int):
        super().__init__()
        self.activation_checkpointing = args.activation_checkpointing
        self.token_embedding = nn.Embedding(-(-vocab_size // 64) * 64, args.d_model)  # rows padded: faster matmuls
        self.position_embedding = nn.Embedding(args.block_size, args.d_model)
        self.dropout = Dropout(args.dropout)
        blocks = (TransformerBlock(args.d_model, args.n_head, args.dropout) for _ in range(args.n_layer))
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = nn.LayerNorm(args.d_model)
        self.head = LanguageModelHead(self.token_embedding.weight)
        self.apply(self.initialize)  # apply() works under zero.Init too; a loop over parameters() would see empty ones

    def initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            scale = math.sqrt(2 * len(self.blocks)) if hasattr(module, "is_residual") else 1  # 2 branches per block
            drawn = torch.empty(module.weight.shape, device="cpu")  # under zero.Init, too: a GPU draws other numbers
            module.weight.data.copy_(drawn.normal_(std=0.02 / scale))
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (batch, seq, vocab), or with targets (batch, seq) their mean loss. tokens: (batch, seq)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))  # (batch, seq, d_model)
        for block in self.blocks:
            recompute = self.activation_checkpointing and self.training
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return self.head(self.final_norm(x), targets)


def parameter_groups(model: nn.Module) -> list[dict]:
    """All parameters once: matrices decay at the optimizer's rate, biases and norms never. By name, since under ZeRO-3
    the shapes are gone."""
    groups = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[name.endswith("weight") and "norm" not in name].append(parameter)
    return [{"params": groups[True]}, {"params": groups[False], "weight_decay": 0.0}]
# endregion model


# region checkpoints (owner: GPTLike-Base.py)
FACTS = {"step": int, "best": float | None, "validation_loss": float | None, "seconds": float, "saving": float,
         "ledger": dict, "settings": dict, "hosts": list, "files": dict}  # fmt: skip
KEPT = "The checkpoints before it are as they were: free some space, and the same command continues from there"


def open_output(args: argparse.Namespace, ds_config: dict) -> None:
    """Make --output_dir on each disk. A run found there is continued, or with --overwrite deleted, never mixed with
    another. Finds out whether all hosts share the disk of rank 0."""
    args.run_id = together(lambda: os.urandom(8).hex())[0]
    args.hosts = together(socket.gethostname)  # by rank
    together(lambda: take_output(args) if rank() == 0 else None)
    args.shared_disk = all(together(lambda: local_rank() != 0 or sees_output(args)))
    together(lambda: None if sees_output(args) or local_rank() != 0 else take_output(args))
    if not args.shared_disk:  # then each host needs all that its own ranks will load
        ds_config.setdefault("checkpoint", {})["use_node_local_storage"] = True
    once_per_disk(lambda: write(Path(args.output_dir, ".ds_config.json"), ds_config), args)  # named by resume()


def take_output(args: argparse.Namespace) -> None:
    output = Path(args.output_dir)
    try:
        output.mkdir(parents=True, exist_ok=True)
        fcntl.lockf(os.open(output / ".lock", os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)  # until this ends
        names = "checkpoints model ds_config.json metrics.jsonl memory.json summary.json args.json".split()
        for old in [output / name for name in names] if args.overwrite and (output / "args.json").exists() else []:
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        if args.resume == "never" and (output / "args.json").exists():
            raise UserError(f"{output} holds a run: add --overwrite, or choose another --output_dir")
        write(output / ".args.json", vars(args))  # renamed by resume(), which may refuse this run
        if not (output / "args.json").exists():
            write(output / "args.json", vars(args))
    except BlockingIOError as error:
        raise UserError(f"another run is writing to {output}: wait for it, or choose another --output_dir") from error
    except OSError as error:
        raise UserError(f"cannot write to --output_dir {output}: {error}") from error


def sees_output(args: argparse.Namespace) -> bool:
    """Whether what rank 0 has just written is to be seen here."""
    try:
        return json.loads(Path(args.output_dir, ".args.json").read_text())["run_id"] == args.run_id
    except (OSError, ValueError, LookupError):
        return False


def once_per_disk(work: Callable[[], object], args: argparse.Namespace) -> None:
    together(lambda: work() if (rank() if args.shared_disk else local_rank()) == 0 else None)


def write(path: Path, value: dict | str) -> None:
    """By rename, so that nobody ever reads half a file."""
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    part.write_text(value if isinstance(value, str) else json.dumps(value, indent=2) + "\n", encoding="utf-8")
    os.replace(part, path)


def settings(args: argparse.Namespace, corpus: Corpus) -> dict:
    """What has to be the same in a checkpoint and in the run that continues it."""
    names = "n_layer n_head d_model block_size seed precision batch_size gradient_accumulation_steps".split()
    facts = {"ZeRO stage": args.zero_stage, "world size": world_size(), "data and tokenizer": corpus.digest[:12]}
    return facts | {name: getattr(args, name) for name in names}


def save(run, args: argparse.Namespace, corpus: Corpus, loss: float | None) -> None:
    """A checkpoint by all ranks. It counts once every disk that holds a part of it has a manifest of its files."""
    folder, began = Path(args.output_dir, "checkpoints", f"step{run.step}"), time.monotonic()
    here, width = int(os.environ.get("LOCAL_WORLD_SIZE", 1)), 4 if args.precision == "fp32" else 2
    size = run.num_params * (width + 12 * (world_size() if args.shared_disk else here) // world_size())
    once_per_disk(lambda: make_room(folder, size), args)
    try:
        run.save(folder)
    except (OSError, RuntimeError) as error:  # torch.save turns a full disk into a RuntimeError
        raise LoneError(f"cannot save {folder}: {str(error).splitlines()[0]}. {KEPT}") from error
    now = time.monotonic()
    run.seconds, run.saving, run.began = run.seconds + now - run.began, run.saving + now - began, now
    facts = {name: getattr(run, name) for name in CARRIED}
    facts |= {"validation_loss": loss, "settings": settings(args, corpus), "hosts": args.hosts}
    once_per_disk(lambda: seal(folder, facts, run), args)


def make_room(folder: Path, size: int) -> None:
    try:
        shutil.rmtree(folder, ignore_errors=True)  # what a killed run left of this very step
        folder.mkdir(parents=True)
        if (free := shutil.disk_usage(folder).free) < size:
            raise OSError(f"it needs about {size:,} bytes and {free:,} are free")
    except OSError as error:
        raise UserError(f"cannot save {folder}: {error}. {KEPT}") from error


def seal(folder: Path, facts: dict, run) -> None:
    """The manifest, written last and by rename. Then `latest` names the step, and of the others only the one before and
    the best by validation loss stay."""
    files = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
    try:
        write(folder / "run.json", facts | {"files": files})
        write(folder.with_name("latest"), folder.name)
    except OSError as error:
        raise UserError(f"cannot save {folder}: {error}. {KEPT}") from error
    known, _ = whole_steps(folder.parent, "step*", run, facts["settings"])
    best = sorted((facts["validation_loss"], step) for step, facts in known.items() if facts["validation_loss"])[:1]
    keep = {f"step{step}" for step in sorted(known)[-2:] + [step for _, step in best]}
    for path in folder.parent.glob("step*"):
        if path.name not in keep and path.name[4:].isdecimal():
            shutil.rmtree(path, ignore_errors=True)


def whole_steps(root: Path, pattern: str, run, wanted: dict) -> tuple[dict[int, dict], list[str]]:
    """The facts of the checkpoints under root of which this rank has all it needs, and why the others do not count.
    Those with other settings than wanted count, too: load() refuses them."""
    known, problems = {}, []
    for folder in sorted(root.glob(pattern)) if pattern == "step*" else [root / pattern]:
        try:
            facts = json.loads((folder / "run.json").read_text())
            if wrong := [name for name, kind in FACTS.items() if not isinstance(facts[name], kind)]:
                raise ValueError(f"run.json has a wrong {' and '.join(wrong)}")
            for name, size in facts["files"].items():
                if (found := (folder / name).stat().st_size) != size:
                    raise ValueError(f"{name} has {found} bytes instead of {size}")
            if folder.name != f"step{facts['step']}" or facts["settings"] == wanted and not run.has(folder):
                raise ValueError(f"it has no files of rank {rank()} at this step")
            known[facts["step"]] = facts
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            problems.append(f"{folder} on host {socket.gethostname()} is not a whole checkpoint: {error}")
    return known, problems


def resume(run, args: argparse.Namespace, corpus: Corpus) -> None:
    """Continue from --resume PATH, or with auto from the newest step in --output_dir that is whole on every rank."""
    output, path = Path(args.output_dir), Path(args.resume)
    root, pattern = (output / "checkpoints", "step*") if args.resume == "auto" else (path.parent, path.name)
    mine = whole_steps(root, pattern, run, settings(args, corpus)) if args.resume != "never" else ({}, [])
    found = together(lambda: (socket.gethostname(), *mine))
    problems = list(dict.fromkeys(problem for _, _, problems in found for problem in problems))
    common = set(found[0][1]).intersection(*(known for _, known, _ in found))
    if not common and (args.resume not in ("auto", "never") or any(known for _, known, _ in found)):
        held = {host: " ".join(map(str, sorted(known))) or "none" for host, known, _ in found}
        more = "".join(f"{problem}. " for problem in problems)
        raise UserError(f"--resume {args.resume}: {root / pattern} is not one checkpoint that is whole on every rank. "
                        f"Whole steps by host: {held}. {more}Bring back what is missing, or start afresh with "
                        "--overwrite or another --output_dir")  # fmt: skip
    for problem in problems:
        log(f"{problem}: passed over{'' if common else ', the run starts at step 0'}")
    if common:
        load(run, root / f"step{max(common)}", mine[0][max(common)], args, corpus)
    if rank() == 0:  # forget what was logged after the checkpoint
        metrics = output / "metrics.jsonl"
        try:
            lines = metrics.read_text().splitlines(keepends=True) if metrics.exists() else []
            kept = [line for line in lines if line.endswith("\n") and (now := json.loads(line))["step"] <= run.step
                    and not (now["step"] == args.max_steps and "validation_loss" in now)]  # finish() logs that again
            write(metrics, "".join(kept))
        except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
            raise LoneError(f"{metrics} is not what a run writes ({error!r}): mend it or move it away") from error
    names = "args.json", "ds_config.json"
    once_per_disk(lambda: [os.replace(output / f".{name}", output / name) for name in names], args)


def load(run, folder: Path, saved: dict, args: argparse.Namespace, corpus: Corpus) -> None:
    for name, wanted in settings(args, corpus).items():
        if (had := saved["settings"].get(name)) != wanted:
            movable = name in ("world size", "ZeRO stage") and args.zero_stage and saved["settings"].get("ZeRO stage")
            way = ", move it with scripts/reshape_checkpoint.py" if movable else ""
            raise UserError(f"{folder} has {name} {had}, this run {wanted}: take the former{way}, or start afresh with "
                            "--overwrite or another --output_dir")  # fmt: skip
    if saved["step"] >= args.max_steps and together(Path(args.output_dir, "summary.json").exists)[0]:
        log(f"this run is finished: {saved['step']} steps, see {args.output_dir}/summary.json. More --max_steps "
            "would continue it, --overwrite start afresh")  # fmt: skip
        sys.exit(0)
    try:
        run.load(folder)
    except (OSError, RuntimeError, ValueError, LookupError, TypeError, AttributeError, EOFError,
            pickle.UnpicklingError) as error:  # fmt: skip
        reason = (str(error) or repr(error)).splitlines()[0]
        raise LoneError(f"cannot load {folder}: {reason}. Name another checkpoint with --resume, or start afresh with "
                        "--overwrite or another --output_dir") from error  # fmt: skip
    for name in CARRIED:
        setattr(run, name, saved[name])
    log(f"resumed from {folder} at step {run.step}")
# endregion checkpoints


# region metrics (owner: GPTLike-Base.py)
PEAK_TFLOPS = {"H200": 989, "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "A100": 312, "L40S": 362, "L4": 121,
               "4090 D": 147, "4090": 165, "3090": 71}  # fmt: skip  # 16 bit, dense
CARRIED = ("step", "best", "seconds", "saving", "ledger")  # of a run, through its checkpoints
FORMATS = {"step": "d", "lr": ".2e", "tokens_per_second": ".0f", "peak_memory_gib": ".2f", "mfu": ".3f"}


@torch.no_grad()
def evaluate(
    model, corpus: Corpus, split: str, args: argparse.Namespace, device: torch.device, *, alone: bool = False
) -> dict[str, float]:
    """Mean loss over every token of a split, and with it perplexity per token and per word, and bits per byte. By all
    ranks together, or by one alone with a model of its own."""
    data = TokenizedDataset(corpus.streams[split], args.block_size, pad=True)
    ranks, me = (1, 0) if alone else (world_size(), rank())
    total = torch.zeros(2, dtype=torch.float64, device=device)
    model.eval()
    for first in range(0, len(data), args.batch_size * ranks):
        index = first + me * args.batch_size + torch.arange(args.batch_size)
        inputs, targets = data[index.clamp_max(len(data) - 1)]
        targets[index >= len(data)] = -100  # every rank makes every pass: ZeRO-3 would wait for an absent one
        count = (targets != -100).sum().to(device)
        total += torch.stack((model(inputs.to(device), targets.to(device)) * count, count))
    model.train()
    nats, tokens = (total if alone else sum_over_ranks(total)).tolist()
    return {
        f"{split}_loss": nats / tokens,
        f"{split}_perplexity": math.exp(min(nats / tokens, 700)),
        f"{split}_word_perplexity": math.exp(min(nats / corpus.sizes[split]["words"], 700)),
        f"{split}_bits_per_byte": nats / math.log(2) / corpus.sizes[split]["bytes"],
    }


def bytes_held(parameters: list, states: list, gradients: list, activations: list | None = None) -> dict[str, int]:
    """Bytes of the floating-point tensors that live in this process, by kind and place. All that is none of the others
    counts as gradients: between two passes only they and the buckets they travel in are left."""
    held, counted, _ = {}, set(), gc.collect()
    rest = gradients + [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
    kinds = {"parameters": parameters, "optimizer_states": states}
    if activations is not None:  # what autograd saved, masks too, and what leads there
        saved = activations + [tensor for tensor in rest if tensor is not None and tensor.grad_fn]
        kinds["activations"] = [tensor for tensor in saved if type(tensor) is not nn.Parameter]
    for kind, tensors in (kinds | {"gradients_and_buckets": rest}).items():
        for tensor in tensors:
            counts = tensor is not None and (tensor.is_floating_point() or kind == "activations")
            if not counts or tensor.device.type == "meta" or torch._is_functional_tensor(tensor):  # a tracer's
                continue
            memory, place = tensor.untyped_storage(), f"{kind} on {tensor.device.type}"
            if memory.data_ptr() not in counted:
                counted.add(memory.data_ptr())
                held[place] = held.get(place, 0) + memory.nbytes()
    return held


def show_ledger(run, args: argparse.Namespace) -> dict[str, dict[str, int]]:
    """Print and return the model states that rank 0 holds, beside the formulas of arXiv:1910.02054, section 3.1. Called
    between a backward pass and a step other than the first: only then all three kinds are there at once."""
    width, ranks, ledger = 4 if args.precision == "fp32" else 2, world_size(), {}
    states = 8 if args.precision == "fp32" and args.zero_stage == 0 else 12  # momentum and variance, and a copy in fp32
    log(f"model states of rank 0 in bytes: held, by the formula (P = {run.num_params:,} parameters, N = {ranks} ranks)")
    for place, size in run.held().items():
        stage, unit = {"p": (3, width), "g": (2, width), "o": (1, states)}[place[0]]
        formula = unit * run.num_params // (ranks if stage <= args.zero_stage else 1)
        ledger[place] = {"held": size, "formula": formula}
        log(f"  {place:29}{size:16,}{formula:16,} = {unit}P{'/N' if stage <= args.zero_stage else ''}")
    return ledger


@contextlib.contextmanager
def memory_phase(run, name: str, args: argparse.Namespace) -> Iterator[None]:
    """Around a phase of the first two steps. With --memory_report rank 0 writes into memory.json what it holds after
    each, and why this stage did or did not save memory."""
    if not args.memory_report or rank() > 0 or len(run.phases) == 7:
        yield
        return
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(weakref.ref(t)) or t, lambda t: t):
        yield
    run.phases[f"step {run.step + 1}, {name}"] = run.held([tensor for ref in saved if (tensor := ref()) is not None])
    if len(run.phases) == 7:
        above = {place: row["held"] - row["formula"] for place, row in run.ledger.items()}
        held, plain = sum(row["held"] for row in run.ledger.values()), 16 * run.num_params
        active = max(size for phase in run.phases.values() for place, size in phase.items() if place.startswith("act"))
        verdict = "saved" if held < plain else "did not save"
        why = f"ZeRO stage {args.zero_stage} on {world_size()} ranks {verdict} memory: {held:,} bytes of model states "
        why += f"beside 16P = {plain:,} without ZeRO; most above its formula: "
        why += f"{max(above, key=above.get)}, by {max(above.values()):,}; activations, which no stage cuts: {active:,}"
        write(Path(args.output_dir, "memory.json"), {"bytes": run.phases, "why": why})
        log(why)


def peak_memory_gib(device: torch.device) -> float:
    """On a GPU the allocator's peak since the last call; on a CPU the process's peak since its start."""
    if device.type == "cpu":
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts in KiB
    peak = torch.cuda.max_memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    return peak / 2**30


def show_start(run, corpus: Corpus, args: argparse.Namespace, device: torch.device) -> None:
    script, card = Path(__file__), torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    hosts = sum_over_ranks(torch.tensor(float(local_rank() == 0), device=device)).item()
    tokens = ", ".join(f"{split} {len(stream):,}" for split, stream in corpus.streams.items())
    log(f"{script.name} sha256={hashlib.sha256(script.read_bytes()).hexdigest()[:16]} ZeRO stage {args.zero_stage}")
    log(f"world size {world_size()}, hosts {hosts:.0f}, device {card}, precision {args.precision}")
    log(f"{args.dataset}: tokens {tokens}, vocabulary {corpus.vocab_size:,}; model: {run.num_params:,} parameters")


def record(fields: dict, args: argparse.Namespace) -> None:
    """One object in metrics.jsonl and the same as a line on the screen."""
    log(" ".join(f"{name}={value:{FORMATS.get(name, '.4f')}}" for name, value in fields.items()))
    if rank() == 0:
        path = Path(args.output_dir, "metrics.jsonl")
        try:
            with path.open("a") as file:
                file.write(json.dumps(fields) + "\n")
        except OSError as error:
            raise LoneError(f"cannot write {path}: {error}. {KEPT}") from error
# endregion metrics


# region training-loop (owner: GPTLike-Base.py)
def set_max_steps(args: argparse.Namespace, corpus: Corpus) -> None:
    global_batch = args.batch_size * args.gradient_accumulation_steps * world_size()
    blocks = (len(corpus.streams["train"]) - 1) // args.block_size
    args.max_steps = args.max_steps or math.ceil(args.epochs * blocks / global_batch)


def lr_factor(step: int, args: argparse.Namespace) -> float:
    """What the peak learning rate is multiplied by: linear warm-up, then half a cosine down to a tenth."""
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, progress))


def micro_batches(data: TokenizedDataset, step: int, args: argparse.Namespace, device: torch.device) -> Iterator:
    """This rank's (inputs, targets), each (micro batch, seq), of one optimizer step: its slice of the global batch."""
    mine = args.batch_size * args.gradient_accumulation_steps
    index = step_indices(step, len(data), global_batch=mine * world_size(), seed=args.seed)
    for part in index[rank() * mine : (rank() + 1) * mine].split(args.batch_size):
        parts = data[part] if device.type == "cpu" else [tensor.pin_memory() for tensor in data[part]]
        yield tuple(tensor.to(device, non_blocking=True) for tensor in parts)


def prepare_cpu() -> None:
    """Have glibc keep large freed blocks for the next tensors: by itself it gives them back to the system and gets them
    page by page again, at GPT-2's vocabulary a quarter of a step. And let one thread alone make MKL's first call: of
    two at once one now and then takes exponentials that are 1e-4 off, and a run repeated would not be the same."""
    torch.zeros(1).exp()
    with contextlib.suppress(AttributeError):  # another libc
        for option, value in ((-1, -1), (-4, 0)):  # M_TRIM_THRESHOLD: never; M_MMAP_MAX: no mappings for single blocks
            ctypes.CDLL(None).mallopt(option, value)


def catch_signals() -> list[tuple[int, float]]:
    """A list that grows by number and time of each SIGTERM and SIGINT. One that comes a second after the first ends the
    process at once; before that it is the first again, since launchers repeat theirs."""
    caught = []

    def catch(number: int, _frame) -> None:
        caught.append((number, time.monotonic()))
        if caught[-1][1] - caught[0][1] > 1:
            os._exit(128 + number)

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, catch)
    return caught


def train(run, corpus: Corpus, args: argparse.Namespace, device: torch.device) -> dict:
    """The loop that all scripts share; `run` does what differs between them. Returns the ledger."""
    data = TokenizedDataset(corpus.streams["train"], args.block_size)
    step_tokens = args.batch_size * args.gradient_accumulation_steps * world_size() * args.block_size
    flops = 6 * run.num_params + 12 * args.n_layer * args.block_size * args.d_model  # per token, forward and backward
    card = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    known = (tflops for name, tflops in PEAK_TFLOPS.items() if re.search(rf"\b{name}\b", card))
    peak = args.peak_tflops or next(known, None)
    bar = tqdm(total=args.max_steps, initial=run.step, unit="step", disable=None if rank() == 0 else True)
    caught, stops, run.phases = catch_signals(), torch.zeros((), device=device), {}
    clock, clocked, first, run.began = time.perf_counter(), run.step, run.step, time.monotonic()
    with memory_phase(run, "init", args):
        pass
    while run.step < args.max_steps:
        torch.manual_seed((args.seed * 1_000_003 + run.step) * 4_099 + rank())  # dropout, the same after a resume
        loss = run.forward_backward(micro_batches(data, run.step, args, device))
        if run.step == first + 1:
            run.ledger = show_ledger(run, args)
        lr, validation = run.learning_rate(), None
        with memory_phase(run, "step", args):
            run.update()
        run.step += 1
        bar.update()  # shows on a terminal only
        stopping = stops.item() > 0  # of the step before
        stops = sum_over_ranks(torch.full((), float(bool(caught)), device=device))
        log_due, eval_due, save_due = (
            run.step == args.max_steps or interval and run.step % interval == 0
            for interval in (args.log_interval, args.eval_interval, args.save_interval)
        )
        if log_due or save_due or stopping:
            loss = sum_over_ranks(loss).item() / world_size()  # the loop's only wait for the device
            if not math.isfinite(loss + (0 if args.precision == "fp16" else run.grad_norm())):  # fp16 skips such steps
                raise UserError(f"step {run.step}: the loss is {loss}, the norm of the gradients {run.grad_norm()}. "
                                "Nothing was saved since; --output_dir holds what was before. Try a lower --lr, more "
                                "--warmup_steps, or --precision fp32")  # fmt: skip
        if log_due:
            rate = step_tokens * (run.step - clocked) / (time.perf_counter() - clock)
            line = {"step": run.step, "loss": loss, "lr": lr, "tokens_per_second": rate}
            mfu = {"mfu": rate * flops / (peak * 1e12 * world_size())} if peak else {}
            record(line | {"peak_memory_gib": peak_memory_gib(device)} | mfu, args)
        if eval_due and run.step < args.max_steps:  # finish() makes the last one
            record({"step": run.step} | (found := evaluate(run.model, corpus, "validation", args, device)), args)
            validation = found["validation_loss"]
            if validation < (run.best or math.inf):
                run.best, save_due = validation, True
        if save_due or stopping:
            save(run, args, corpus, validation)
        if stopping:
            log(f"stopped by a signal: step {run.step} is saved, the same command continues")
            sys.exit(128 + (caught[0][0] if caught else signal.SIGTERM))
        if log_due or eval_due or save_due:
            clock, clocked = time.perf_counter(), run.step
    bar.close()
    return run.ledger


def finish(run, ledger: dict, corpus: Corpus, args: argparse.Namespace, device: torch.device) -> None:
    """Write model/ and summary.json. All ranks call this: the last evaluation and the weights need them all."""
    output, final = Path(args.output_dir), {}
    for split in sorted(corpus.streams.keys() - {"train"}):
        final |= evaluate(run.model, corpus, split, args, device)
    record({"step": run.step} | final, args)
    weights = run.full_weights()
    if rank() > 0:
        return
    shape = {name: getattr(args, name) for name in ("n_layer", "n_head", "d_model", "block_size")}
    rows = {"vocab_size": corpus.vocab_size, "padded_vocab_size": len(weights["token_embedding.weight"])}
    try:
        (output / "model").mkdir(exist_ok=True)
        safetensors.torch.save_file(weights, output / "model" / "model.safetensors", {"format": "pt"})
        write(output / "model" / "tokenizer.json", corpus.tokenizer)
        write(output / "model" / "config.json", shape | rows)
    except (OSError, safetensors.SafetensorError) as error:
        raise LoneError(f"cannot write {output / 'model'}: {error}. {KEPT}") from error
    check_model(output / "model", final["validation_loss"], corpus, args, device)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    losses, rates, peaks = ([line[name] for line in lines if name in line]
                            for name in ("validation_loss", "tokens_per_second", "peak_memory_gib"))
    facts = {"steps": run.step, "parameters": run.num_params, "best_validation_loss": min(losses), "ledger": ledger}
    facts |= {"tokens_per_second": median(rates[1:] or rates), "peak_memory_gib": max(peaks)}
    facts |= {"seconds": run.seconds, "saving_seconds": run.saving}  # of training, over all its resumptions
    write(output / "summary.json", facts | final)
    log(f"saved {output / 'model'} and {output / 'summary.json'}")


def check_model(folder: Path, loss: float, corpus: Corpus, args: argparse.Namespace, device: torch.device) -> None:
    """Read the saved weights back: by themselves they have to give the validation loss that the run has found."""
    weights = safetensors.torch.load_file(folder / "model.safetensors")
    try:
        model = GPTLike(args, corpus.vocab_size).to(device, weights["final_norm.weight"].dtype)
        model.load_state_dict(weights | {"head.weight": weights["token_embedding.weight"]})
        again = evaluate(model, corpus, "validation", args, device, alone=True)["validation_loss"]
    except torch.OutOfMemoryError:
        log(f"{folder} is not checked: the model is too large for one device")
        return
    if not abs(again - loss) <= (1e-3 if args.compile else 1e-4):  # fused, 16-bit numbers are rounded elsewhere
        raise UserError(f"read back, {folder} has a validation loss of {again} and not the run's {loss}")
# endregion training-loop


# region launch (owner: DeepSpeed-GPTLike-ZeRO-1.py)
NO_MEETING = """Usual causes, the likeliest first:
  the command was not started on every host, or with another number of hosts or a rank given twice
  a firewall closes the port, or the ports above 1024 that ranks open to each other
  MASTER_ADDR is no address of the host of rank 0 that the others reach
  gloo or NCCL took another interface: export GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME on each host
  a host's own name resolves to 127.*: see /etc/hosts
scripts/check_env.sh --peer HOST:PORT, on both hosts at once, tells them apart."""


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def world_size() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def log(message: str) -> None:
    if rank() == 0:
        tqdm.write(message)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(tensor)
    return tensor


def together(work: Callable[[], object]) -> list:
    """What `work()` gives on each rank, on all ranks. A UserError on any is raised on all, so that none waits for one
    that has gone."""
    try:
        outcome = work(), None
    except UserError as error:
        several = int(os.environ.get("LOCAL_WORLD_SIZE", world_size())) < world_size()
        outcome = None, f"host {socket.gethostname()}: {error}" if several else str(error)
    outcomes = [outcome] * world_size()
    dist.all_gather_object(outcomes, outcome)
    with contextlib.suppress(RuntimeError):  # nobody leaves, and cuts its connections, before all have heard
        dist.barrier()
    for _, failure in outcomes:
        if failure:
            raise UserError(failure)
    return [result for result, _ in outcomes]


def once_per_host(work: Callable[[], object]) -> object:
    """`work()`, run by each host's first rank while its others wait; the result on all of them."""
    return together(lambda: work() if local_rank() == 0 else None)[rank() - local_rank()]


def start_distributed(args: argparse.Namespace) -> torch.device:
    """Join the ranks. Returns this rank's device: its GPU, or the CPU with the host's cores divided among its ranks."""
    if "RANK" not in os.environ:  # plain `python SCRIPT.py`: one rank, at any free port
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    os.environ.setdefault("LOCAL_RANK", str(args.local_rank))
    os.environ.setdefault("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE", "1"))  # torchrun's name, deepspeed's name
    ranks_here = int(os.environ["LOCAL_WORLD_SIZE"])
    refuse_dropped_devices()
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # one ninja for all launches
    deepspeed.utils.set_log_level_from_string("info" if args.verbose else "warning")
    warnings.filterwarnings("ignore", ".*torch.distributed.* is deprecated", FutureWarning)  # DeepSpeed's calls
    if os.environ.get("OMP_NUM_THREADS", "1") in ("", "1"):  # unset, or the 1 that torchrun sets
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // ranks_here))  # of the cores that are ours
    if os.environ["DS_ACCELERATOR"] == "cuda":
        if ranks_here > torch.cuda.device_count():
            raise UserError(f"{ranks_here} ranks here but {torch.cuda.device_count()} GPUs: start one rank per GPU")
        torch.cuda.set_device(local_rank())  # before anything is allocated, or every rank would fill GPU 0
        join_ranks("nccl", args)
        return torch.device("cuda", local_rank())
    prepare_cpu()
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # compiled for 20 s, for inference alone
    join_ranks("gloo", args)
    return torch.device("cpu")


def connect(seconds: int) -> dist.Store:
    """The key-value store at MASTER_ADDR:MASTER_PORT, which torchrun serves itself, and otherwise rank 0."""
    mine = rank() == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    patience = {"timeout": timedelta(seconds=seconds), "wait_for_workers": False, "multi_tenant": True}
    store = dist.TCPStore(host, port, is_master=mine, **patience)
    return dist.PrefixStore(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def join_ranks(backend: str, args: argparse.Namespace) -> None:
    """Meet all ranks at MASTER_ADDR:MASTER_PORT. UserError with those that are missing after --rendezvous_timeout."""
    keys, store, seconds = [f"rank{other}" for other in range(world_size())], None, args.rendezvous_timeout
    place, began = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}", time.monotonic()
    trouble = f"{world_size()} ranks did not meet at {place} in {seconds} s"
    (timer := threading.Timer(seconds + 5, end_alone, [f"{trouble}, rank0 missing: no answer. {NO_MEETING}"])).start()
    try:
        store = connect(seconds)  # which waits that long more than once
        timer.args[0] = f"{trouble}. {NO_MEETING}"  # gloo waits longer
        store.set(keys[rank()], socket.gethostname())
        store.wait(keys, timedelta(seconds=max(1, began + seconds - time.monotonic())))
        device = torch.device("cuda", local_rank()) if backend == "nccl" else None  # with it NCCL meets at once
        dist.init_process_group(backend, store=store, rank=rank(), world_size=world_size(), device_id=device)
        deepspeed.init_distributed(backend)  # takes what is there
    except RuntimeError as error:  # of the store, or of gloo or NCCL
        missing = keys[:1] if store is None else [key for key in keys if not store.check([key])]
        reason = f"{' '.join(missing) or 'none'} missing: {str(error).splitlines()[0]}"
        raise UserError(f"{trouble}, {reason}. {NO_MEETING}") from error
    finally:
        timer.cancel()


def launchers() -> list[psutil.Process]:
    """The processes of torchrun or deepspeed above this one on this host."""
    words, found = {"torchrun", "torch.distributed.run", "deepspeed", "deepspeed.launcher.launch"}, []
    with contextlib.suppress(psutil.Error):  # those of other users cannot be asked
        for process in psutil.Process().parents():
            if words.intersection(Path(word).name for word in process.cmdline()[:4]):
                found.append(process)
    return found


def refuse_dropped_devices() -> None:
    """The deepspeed launcher drops the user's CUDA_VISIBLE_DEVICES where it is also given a number of GPUs."""
    for parent in psutil.Process().parents():
        try:
            counted = [word for word in parent.cmdline() if word.startswith(("--num_gpus", "--num_nodes"))]
            wanted = parent.environ().get("CUDA_VISIBLE_DEVICES")
        except psutil.Error:
            return
        if counted and wanted and wanted != os.environ.get("CUDA_VISIBLE_DEVICES"):
            raise UserError(f"{counted[0]} makes deepspeed ignore CUDA_VISIBLE_DEVICES={wanted}: leave {counted[0]} "
                            f"out, or unset the variable and write deepspeed --include localhost:{wanted}")
# endregion launch


# region ds-config (owner: DeepSpeed-GPTLike-ZeRO-1.py)
JSON_KEYS = """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler
    gradient_clipping bf16 fp16 data_types torch_autocast zero_optimization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer activation_checkpointing checkpoint aio communication_data_type prescale_gradients
    gradient_predivide_factor sparse_gradients steps_per_print wall_clock_breakdown dump_state memory_breakdown
    flops_profiler comms_logger tensorboard wandb csv_monitor comet compile compression_training
    data_efficiency elasticity autotuning tensor_parallel timers log_level disable_python_gc""".split()
POSITIVE = dict.fromkeys(JSON_KEYS[:3], int) | {"lr": float, "gradient_clipping": float}
VALID_LR_SCHEDULES = deepspeed.runtime.lr_schedules.VALID_LR_SCHEDULES
REFUSALS = (pydantic.ValidationError, deepspeed.runtime.config.DeepSpeedConfigError, AssertionError, ArithmeticError,
            LookupError, ValueError, TypeError, AttributeError, RuntimeError)  # fmt: skip
ADAM_KEYS = "lr betas eps weight_decay torch_adam adam_w_mode amsgrad fused foreach".split()


def read_json(path: str) -> dict:
    """The settings in a file, read as DeepSpeed reads it: comments are legal."""
    try:
        twice = deepspeed.runtime.config_utils.dict_raise_error_on_duplicate_keys
        config = hjson.loads(Path(path).read_text(encoding="utf-8"), object_pairs_hook=twice)
    except FileNotFoundError:
        raise UserError(f"--ds_config {path}: no such file; the collection's own are in configs/") from None
    except (OSError, ValueError, OverflowError, RecursionError) as error:
        raise UserError(f"--ds_config {path} is not JSON: {error}") from error
    if not isinstance(config, dict) or not config:
        raise UserError(f"--ds_config {path} holds no settings: write an object with optimizer, zero_optimization, ...")
    return config


def key_problems(config: dict) -> list[str]:
    """Each key that DeepSpeed would ignore in silence, or refuse, with the key that it resembles, and sections and
    numbers that are none."""
    name = str(config["optimizer"].get("type")) if isinstance(config.get("optimizer"), dict) else "None"
    precision, zero = deepspeed.runtime.precision_config, deepspeed.runtime.zero.config
    offload = deepspeed.runtime.zero.offload_config
    sections = {
        (): dict.fromkeys(JSON_KEYS),
        ("optimizer",): dict.fromkeys(("type", "params", "legacy_fusion")),
        ("optimizer", "params"): dict.fromkeys(ADAM_KEYS) if name.lower() in ("adam", "adamw") else {},
        ("scheduler",): dict.fromkeys(("type", "params")),
        ("scheduler", "params"): {},
        ("bf16",): precision.DeepSpeedBF16Config.model_fields,
        ("fp16",): precision.DeepSpeedFP16Config.model_fields,
        ("zero_optimization",): zero.DeepSpeedZeroConfig.model_fields,
        ("zero_optimization", "offload_optimizer"): offload.DeepSpeedZeroOffloadOptimizerConfig.model_fields,
        ("zero_optimization", "offload_param"): offload.DeepSpeedZeroOffloadParamConfig.model_fields,
    }
    problems = []
    if name.lower() not in deepspeed.runtime.config.DEEPSPEED_OPTIMIZERS and not is_optimizer(name):
        problems.append(f'optimizer.type is {name}: write "optimizer": {{"type": "AdamW", "params": {{"lr": 3e-4}}}}')
    for path, fields in sections.items():
        known = [*fields, *(field.alias for field in fields.values() if field and field.alias)]
        section = config
        for key in path:
            section = section.get(key, {}) if isinstance(section, dict) else {}
        if not isinstance(section, dict):
            problems.append(f"{'.'.join(path)} is not an object")
            continue
        for key in section if known else ():
            if key not in known:
                near = difflib.get_close_matches(key, known, n=1)
                hint = f": did you mean {near[0]}?" if near else ""
                problems.append(f"unknown key {'.'.join([*path, key])}{hint}")
            elif key in POSITIVE and not (type(section[key]) in (int, POSITIVE[key]) and 0 < section[key] < 2**31):
                problems.append(f"{'.'.join([*path, key])} is {section[key]!r}, not a positive number below 2**31")
            elif path in (("bf16",), ("fp16",)) and key == "enabled" and type(section[key]) is not bool:
                problems.append(f"{'.'.join([*path, key])} is {section[key]!r}: write true or false")
    return problems


def is_optimizer(name: str) -> bool:
    kind = getattr(torch.optim, name, None)
    return isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)


def offloads(config: dict) -> bool:
    zero = config.get("zero_optimization", {})
    return any((zero.get(f"offload_{what}") or {}).get("device", "none") != "none" for what in ("optimizer", "param"))


def right_script(config: dict) -> str:
    """The script that a JSON is for."""
    stage = config.get("zero_optimization", {}).get("stage", 0)
    if stage not in (1, 2, 3):
        return "GPTLike-Base.py, which takes no JSON"
    return f"DeepSpeed-GPTLike-ZeRO-{'Offload' if offloads(config) else stage}.py"


def take_flags(args: argparse.Namespace, config: dict) -> None:
    """Put the flags that were given into the JSON, and the JSON's numbers into the flags that were not."""
    found = next((name for name in ("bf16", "fp16") if config.get(name, {}).get("enabled")), "fp32")
    params = config["optimizer"].setdefault("params", {})
    accumulation, total = config.get("gradient_accumulation_steps", 1), config.get("train_batch_size", 0)
    micro = max(1, total // (accumulation * world_size())) if total else 1
    given = hasattr(args, "precision")
    for flag, section, key, default in (
        ("batch_size", config, "train_micro_batch_size_per_gpu", micro),
        ("gradient_accumulation_steps", config, "gradient_accumulation_steps", 1),
        ("lr", params, "lr", 1e-3),
        ("weight_decay", params, "weight_decay", 0.0),
        ("precision", {"precision": found}, "precision", found),
    ):
        old = section.get(key, default)
        if getattr(args, flag, old) != old:
            log(f"--{flag} {getattr(args, flag)} replaces {old} of {args.ds_config}")
            if section is config:
                config.pop("train_batch_size", None)  # follows from the others
        section[key] = getattr(args, flag, old)
        setattr(args, flag, section[key])
    for name in ("bf16", "fp16"):
        section = config.setdefault(name, {})
        section["enabled"] = name == args.precision if given else section.get("enabled", False)


def value_problems(args: argparse.Namespace, config: dict, device: torch.device) -> list[str]:
    """What cannot work in this run, before DeepSpeed says so in its own words or not at all."""
    problems, ranks = [], world_size()
    if all(config[name]["enabled"] for name in ("bf16", "fp16")):
        problems.append("bf16 and fp16 are both enabled: enable one, or give --precision")
    product = args.batch_size * args.gradient_accumulation_steps * ranks
    if config.get("train_batch_size", product) != product:
        problems.append(f"train_batch_size {config['train_batch_size']} is not micro batch {args.batch_size} x "
                        f"accumulation {args.gradient_accumulation_steps} x {ranks} ranks = {product}: leave it out")
    if args.precision == "fp16" and device.type == "cpu":
        problems.append("fp16 does not run on a CPU: use --precision bf16 or fp32")
    if args.precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):  # emulation
        problems.append(f"{torch.cuda.get_device_name(device)} has no bf16: use --precision fp16 or fp32")
    if not problems:
        try:
            deepspeed.DeepSpeedConfig(config)
            problems += trial_problems(config)
        except REFUSALS as error:
            problems.append(str(error) or repr(error))
    return problems


def trial_problems(config: dict) -> list[str]:
    """What PyTorch's optimizer and the JSON's scheduler say to their numbers, on a scrap of a parameter."""
    name, params = config["optimizer"]["type"], config["optimizer"]["params"]
    name = {"adam": "Adam", "adamw": "AdamW"}.get(name.lower(), name)
    if not is_optimizer(name):
        return []  # DeepSpeed's own
    try:
        what, given = "optimizer", {key: params[key] for key in params if key not in ("torch_adam", "adam_w_mode")}
        optimizer = getattr(torch.optim, name)([torch.zeros(1)], **given)
        allowed = config.get("zero_allow_untested_optimizer")
        if not allowed and type(optimizer) not in deepspeed.runtime.zero.utils.ZERO_SUPPORTED_OPTIMIZERS:
            return [f'optimizer.type is {name}, with which ZeRO wants "zero_allow_untested_optimizer": true']
        if "scheduler" in config:
            what, kind, given = "scheduler", config["scheduler"].get("type"), config["scheduler"].get("params", {})
            places = [place for place in (deepspeed.runtime.lr_schedules, torch.optim.lr_scheduler)
                      if isinstance(getattr(place, str(kind), None), type)]  # fmt: skip
            if not places:
                return [f"scheduler.type is {kind}: write one of {', '.join(VALID_LR_SCHEDULES)}"]
            getattr(places[0], kind)(optimizer, **given)
    except REFUSALS as error:
        return [f"{what}.params: {error or repr(error)}"]
    return []


def load_ds_config(args: argparse.Namespace, device: torch.device) -> dict:
    """The settings that DeepSpeed gets. UserError with all problems of the JSON in one message."""
    config = read_json(args.ds_config)
    problems = key_problems(config)
    if not any(problem.endswith("is not an object") for problem in problems):
        problems += stage_problems(config)
    if not problems:
        take_flags(args, config)
        problems = value_problems(args, config, device)
    if problems:
        raise UserError(f"--ds_config {args.ds_config}:\n  " + "\n  ".join(problems))
    config.setdefault("steps_per_print", 2**31)  # metrics.jsonl says it already
    name, on_host = config["optimizer"]["type"].lower(), offloads(config) and shutil.which("c++")  # DeepSpeedCPUAdam
    ops = Path(os.environ.get("TORCH_EXTENSIONS_DIR", Path.home() / ".cache" / "torch_extensions"))
    if on_host and not any(ops.rglob("cpu_adam.so")):
        log("the first offload on a machine compiles DeepSpeed's Adam: a minute without a word")
    if name != "muon":  # DeepSpeed imports it nevertheless, and torch._inductor for its kernels: 0.6 s
        deepspeed.runtime.compiler.compile = lambda: lambda kernel: kernel
    if name in ("adam", "adamw") and not on_host:
        # PyTorch's fused Adam, the same formula: DeepSpeed's needs nvcc, and its CPU build resumes a last digit off.
        config["optimizer"]["params"] |= {"torch_adam": True, "fused": True}
    args.zero_stage = config["zero_optimization"]["stage"]
    return config
# endregion ds-config


# region engine-run (owner: DeepSpeed-GPTLike-ZeRO-1.py)
class EngineRun:
    """An optimizer step, saving and loading through a DeepSpeed engine. All ranks call all of it together."""

    def __init__(self, engine: deepspeed.DeepSpeedEngine, args: argparse.Namespace):
        self.model, self.args, self.step = engine, args, 0
        self.best, self.seconds, self.saving, self.ledger = None, 0.0, 0.0, {}
        self.progress, self.stepping, self.watcher, self.launchers = 0, False, None, launchers()
        self.num_params = sum(getattr(p, "ds_numel", p.numel()) for p in engine.module.parameters())

    def forward_backward(self, batches: Iterator) -> torch.Tensor:
        """This rank's mean loss over its micro batches; the engine scales the gradients and adds them up."""
        losses, self.stepping = [], True
        for inputs, targets in batches:
            self.progress += 1
            if losses:
                self.model.step()  # between two micro batches it only counts
            with memory_phase(self, "forward", self.args):
                loss = self.model(inputs, targets)
            with memory_phase(self, "backward", self.args):
                self.model.backward(loss)
            losses.append(loss.detach())
        return torch.stack(losses).mean()

    def update(self) -> None:
        self.model.step()
        if not all(launcher.is_running() for launcher in self.launchers):  # deepspeed's passes SIGTERM not on
            self.launchers = []
            signal.raise_signal(signal.SIGTERM)
        if self.watcher is None and world_size() > 1:  # not before: a first step may compile for long
            self.watcher = threading.Thread(target=self.watch, daemon=True)
            self.watcher.start()

    def watch(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store has gone with rank 0: gloo or NCCL tell that
            self.compare_progress(dist.PrefixStore("watch", connect(60)))

    def compare_progress(self, store: dist.Store) -> None:
        """Tell the other ranks how far this one is. The first two also look at all and, where a step takes longer than
        --stall_timeout seconds, end the run with the name of the rank that the others wait for."""
        limit, pause = self.args.stall_timeout, self.args.stall_timeout / 20
        heard, said, mine, since = {}, {}, None, time.monotonic()
        for beat in itertools.count():
            began = time.monotonic()
            guard = threading.Timer(limit, end_alone, ["rank 0, or the host at MASTER_ADDR, answers no more"])
            guard.daemon = True
            guard.start()
            store.set(str(rank()), json.dumps([beat, self.progress, socket.gethostname()]))
            for other in range(world_size() if rank() < 2 else 0):
                if said.get(other) != (word := store.get(str(other))):
                    heard[other], said[other] = time.monotonic(), word
            guard.cancel()
            time.sleep(pause)
            now = time.monotonic()
            stepping, was_stopped = self.stepping and self.model.training, now - began > 4 * pause
            if not stepping or was_stopped or mine != self.progress:
                mine, since = self.progress, now
            elif said and now - since > limit:
                cards = {other: json.loads(word) for other, word in said.items()}
                silent = [other for other in cards if now - heard[other] > 4 * pause]
                behind = [other for other in cards if cards[other][1] < max(card[1] for card in cards.values())]
                names = " and ".join(f"rank {other} on host {cards[other][2]}" for other in silent or behind)
                reason = "answers no more" if silent else "is behind: see what it does there"
                end_alone(f"step {self.step + 1} takes more than {limit} s: {names or 'no rank'} {reason}. The same "
                          "command continues from the last checkpoint")  # fmt: skip

    def learning_rate(self) -> float:
        return self.model.get_lr()[0]

    def grad_norm(self) -> float:
        return float(self.model.get_global_grad_norm() or 0)

    def held(self, activations: list | None = None) -> dict[str, int]:
        zero, states = self.model.optimizer, self.model.basic_optimizer.state.values()  # of each: momentum and variance
        tensors = [value for state in states for value in state.values() if torch.is_tensor(value)]
        copies = "fp32_partitioned_groups_flat single_partition_of_fp32_groups fp32_groups_flat_partition".split()
        tensors += next(getattr(zero, name) for name in copies if hasattr(zero, name))
        parameters = list(self.model.module.parameters())
        pieces = [getattr(parameter, "ds_tensor", parameter) for parameter in parameters]  # ZeRO-3 keeps this rank's
        return bytes_held(pieces, tensors, [parameter.grad for parameter in parameters], activations)

    def save(self, folder: Path) -> None:
        self.stepping = False
        universal = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}  # wanted by ds_to_universal
        self.model.save_checkpoint(str(folder.parent), tag=folder.name, client_state=universal, save_latest=False)

    def has(self, folder: Path) -> bool:
        """Whether this rank's own part is there: without it DeepSpeed only warns, and trains on from fresh weights."""
        return any(folder.glob(f"*zero_pp_rank_{rank()}_mp_rank_00_optim_states.pt"))

    def load(self, folder: Path) -> None:
        path, _ = self.model.load_checkpoint(str(folder.parent), tag=folder.name)
        if None in together(lambda: path):
            raise UserError(f"DeepSpeed could not load {folder}: its warning is above")

    def full_weights(self) -> dict[str, torch.Tensor]:
        self.stepping = False  # what follows, rank 0 does alone
        return {name: whole(weight) for name, weight in self.model.module.named_parameters()}
# endregion engine-run


def stage_problems(config: dict) -> list[str]:
    right = right_script(config)
    return [] if right == f"DeepSpeed-GPTLike-ZeRO-{ZERO_STAGE}.py" else [f"this JSON is for {right}"]


def whole(weight: nn.Parameter) -> torch.Tensor:
    # ZeRO-3: a rank holds a piece of each weight; all ranks gather it together, for as long as the copy takes.
    with deepspeed.zero.GatheredParameters([weight]):
        return weight.detach().cpu().clone()


def build_engine(args: argparse.Namespace, vocab_size: int, ds_config: dict) -> deepspeed.DeepSpeedEngine:
    """The model in an engine that owns optimizer, precision, clipping, accumulation and the ranks' communication."""
    # ZeRO-3: every parameter is partitioned as soon as its module is built.
    with deepspeed.zero.Init(config_dict_or_path=ds_config):
        model = GPTLike(args, vocab_size)
    warmup_and_cosine = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda s: lr_factor(s, args))
    engine, *_ = deepspeed.initialize(
        model=model,
        model_parameters=parameter_groups(model),
        lr_scheduler=None if "scheduler" in ds_config else warmup_and_cosine,
        config=ds_config,
    )
    if args.compile:
        engine.compile()
    return engine


def main() -> None:
    parser = build_parser()
    parser.add_argument("--ds_config", default=DEFAULT_DS_CONFIG, help="DeepSpeed's JSON")
    parser.add_argument("--rendezvous_timeout", type=int, default=300, help="seconds to wait for the other ranks")
    parser.add_argument("--stall_timeout", type=int, default=600, help="seconds after which a step counts as stuck")
    parser.add_argument("--verbose", action="store_true", help="show what DeepSpeed says while it starts")
    args = parser.parse_args()
    check_args(parser, args)
    device = start_distributed(args)
    ds_config = together(lambda: load_ds_config(args, device))[rank()]
    corpus = load_corpus(args)
    set_max_steps(args, corpus)
    open_output(args, ds_config)
    torch.manual_seed(args.seed)
    run = EngineRun(build_engine(args, corpus.vocab_size, ds_config), args)
    show_start(run, corpus, args, device)
    resume(run, args, corpus)
    finish(run, train(run, corpus, args, device), corpus, args, device)
    dist.barrier()  # rank 0 may still be writing


if __name__ == "__main__":
    stop_on_user_error(main)
