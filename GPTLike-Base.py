"""A decoder-only GPT on WikiText-2 in plain PyTorch: the script that all the others are compared with.

Here stand the model, the data and the training loop that all six scripts share, and what one process holds
without ZeRO: 16 bytes per parameter (2 parameter + 2 gradient + 12 optimizer states).
Partitioned across ranks: nothing; there is one process.

Run:
    python GPTLike-Base.py
    python GPTLike-Base.py --dataset sample --n_layer 2 --n_head 4 --d_model 128 --block_size 64 --max_steps 50

Source: GPT-2 (Radford et al., 2019); fp32 master weights, arXiv:1710.03740; model states, arXiv:1910.02054.
"""

import argparse
import contextlib
import ctypes
import fcntl
import gc
import hashlib
import http.client
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
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple, NoReturn

import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

# The numbers of configs/zero1.json, so that all scripts start from one recipe (a test compares them).
DEFAULTS = {"batch_size": 8, "gradient_accumulation_steps": 1, "lr": 6e-4, "weight_decay": 0.1, "precision": "bf16"}
BETAS, EPS, GRADIENT_CLIPPING = (0.9, 0.95), 1e-8, 1.0


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


# One process: what the distributed scripts do together is here done alone.
def rank() -> int:
    return 0


def local_rank() -> int:
    return 0


def world_size() -> int:
    return 1


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    return tensor


def together(work: Callable[[], object]) -> list:
    return [work()]


def once_per_host(work: Callable[[], object]) -> object:
    return work()


def log(message: str) -> None:
    tqdm.write(message)


class PlainRun:
    """By hand what `deepspeed.initialize` takes over in the other scripts: one step, its precision, saving, loading."""

    def __init__(self, model: nn.Module, args: argparse.Namespace):
        self.model, self.args, self.step = model, args, 0
        self.best, self.seconds, self.saving, self.ledger = None, 0.0, 0.0, {}
        self.forward = torch.compile(model) if args.compile else model
        groups = parameter_groups(model)
        self.weights = [weight for group in groups for weight in group["params"]]
        self.num_params = sum(weight.numel() for weight in self.weights)
        self.masters = self.weights
        if args.precision != "fp32":  # 16 bits are too few for Adam's small steps: it works on an fp32 copy
            self.masters = [weight.detach().float().requires_grad_() for weight in self.weights]
            copies = iter(self.masters)
            groups = [group | {"params": [next(copies) for _ in group["params"]]} for group in groups]
        options = {"lr": args.lr, "betas": BETAS, "eps": EPS, "weight_decay": args.weight_decay}
        self.optimizer = torch.optim.AdamW(groups, **options, fused=True)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: lr_factor(step, args))
        self.scaler = torch.amp.GradScaler(enabled=args.precision == "fp16")

    def forward_backward(self, batches: Iterator) -> torch.Tensor:
        """The mean loss of one optimizer step's micro batches, whose gradients add up."""
        total = torch.zeros((), device=self.weights[0].device)
        for inputs, targets in batches:
            with memory_phase(self, "forward", self.args):
                loss = self.forward(inputs, targets) / self.args.gradient_accumulation_steps
            with memory_phase(self, "backward", self.args):
                self.scaler.scale(loss).backward()
            total += loss.detach()
        return total

    def update(self) -> None:
        if self.masters is not self.weights:
            for master, weight in zip(self.masters, self.weights, strict=True):
                master.grad, weight.grad = weight.grad.float(), None
        self.scaler.unscale_(self.optimizer)
        self.norm = nn.utils.clip_grad_norm_(self.masters, GRADIENT_CLIPPING)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.scheduler.step()
        self.optimizer.zero_grad()
        for master, weight in zip(self.masters, self.weights, strict=True):
            weight.data.copy_(master.detach())

    def learning_rate(self) -> float:
        return self.optimizer.param_groups[0]["lr"]

    def grad_norm(self) -> float:
        return self.norm.item()

    def held(self, activations: list | None = None) -> dict[str, int]:
        states = [tensor for state in self.optimizer.state.values() for tensor in state.values()]
        return bytes_held(self.weights, self.masters + states, [weight.grad for weight in self.weights], activations)

    def full_weights(self) -> dict[str, torch.Tensor]:
        return {name: weight.detach().cpu() for name, weight in self.model.named_parameters()}

    def parts(self) -> dict[str, object]:
        return {"model": self.model, "optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self.scaler}

    def save(self, folder: Path) -> None:
        state = {name: part.state_dict() for name, part in self.parts().items()}
        torch.save(state | {"masters": [master.detach() for master in self.masters]}, folder / "state.pt")

    def has(self, folder: Path) -> bool:
        return (folder / "state.pt").exists()

    @torch.no_grad()
    def load(self, folder: Path) -> None:
        state = torch.load(folder / "state.pt", map_location="cpu", weights_only=True)
        for name, part in self.parts().items():
            part.load_state_dict(state[name])
        for master, saved in zip(self.masters, state["masters"], strict=True):
            master.copy_(saved)


def main() -> None:
    parser = build_parser()
    parser.set_defaults(**DEFAULTS)
    args = parser.parse_args()
    check_args(parser, args)
    args.zero_stage = 0
    if (ranks := os.environ.get("WORLD_SIZE", "1")) != "1":
        message = f"started on {ranks} ranks, but it trains in one process: run DeepSpeed-GPTLike-ZeRO-1.py there"
        sys.exit(f"{Path(__file__).name}: error: {message}" if os.environ.get("RANK") == "0" else 1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if args.precision == "fp16" and device.type == "cpu":
        raise UserError("fp16 does not run on a CPU: use --precision bf16 or fp32")
    if device.type == "cpu":
        prepare_cpu()
    corpus = load_corpus(args)
    set_max_steps(args, corpus)
    open_output(args, {})
    torch.manual_seed(args.seed)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[args.precision]
    run = PlainRun(GPTLike(args, corpus.vocab_size).to(device, dtype), args)
    show_start(run, corpus, args, device)
    resume(run, args, corpus)
    finish(run, train(run, corpus, args, device), corpus, args, device)


if __name__ == "__main__":
    stop_on_user_error(main)
