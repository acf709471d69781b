"""A decoder-only GPT on WikiText-2 in plain PyTorch: the script that the other five are compared with.

One process holds all model states: with Adam in mixed precision 16 bytes per parameter, namely 2 for the 16-bit
weight, 2 for its gradient and 12 for the optimizer (fp32 copy, momentum, variance).
Partitioned across ranks: nothing; there is one process.

Run:
    python GPTLike-Base.py
    python GPTLike-Base.py --dataset sample --n_layer 2 --n_head 4 --d_model 128 --block_size 64 --max_steps 50

Source: GPT-2 (Radford et al., 2019); fp32 master weights, arXiv:1710.03740; model states, arXiv:1910.02054.
"""

import fcntl
import functools
import gc
import hashlib
import json
import math
import os
import resource
import shutil
import signal
import socket
import sys
import time
import urllib.request
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import safetensors.torch
import tokenizers
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

ZERO_STAGE = 0  # no ZeRO: one process holds everything
# The numbers of configs/zero1.json, so that all scripts start from one recipe.
DEFAULTS = {"batch_size": 8, "gradient_accumulation_steps": 1, "lr": 6e-4, "weight_decay": 0.1, "precision": "bf16"}
BETAS, EPS, GRADIENT_CLIPPING = (0.9, 0.95), 1e-8, 1.0


# region arguments (owner: GPTLike-Base.py)
class UserError(Exception):
    """Something that the user can mend: one message and exit code 1, no traceback."""


def build_parser() -> ArgumentParser:
    """The flags that all six scripts have. Those that stand in the JSON, too, have no default here."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False)

    def add(name: str, default: object, text: str, kind: type = int, low: float = 1, high: float = 2**31) -> None:
        def number(word: str) -> float:
            if low <= kind(word) < high:
                return kind(word)
            raise ArgumentTypeError(f"{word} is not from {low} to below {high}")

        parser.add_argument(name, default=default, help=text, type=str if kind is str else number)

    add("--n_layer", 6, "transformer blocks")
    add("--n_head", 12, "attention heads per block")
    add("--d_model", 768, "width of the residual stream, a multiple of --n_head")
    add("--block_size", 256, "tokens per sequence")
    add("--dropout", 0.1, "on embeddings and residual branches", float, 0, 1)
    add("--epochs", 3, "passes over the train split")
    add("--max_steps", None, "optimizer steps; wins over --epochs")
    add("--batch_size", None, "micro batch: sequences per rank per forward")
    add("--gradient_accumulation_steps", None, "micro batches per optimizer step")
    add("--lr", None, "peak learning rate", float, 1e-12)
    add("--weight_decay", None, "on matrices, not on biases and norms", float, 0)
    add("--warmup_steps", 20, "optimizer steps of linear warm-up; then cosine decay to lr/10", int, 0)
    add("--seed", 42, "of initialization, data order and dropout", int, 0)
    add("--dataset", "wikitext2", "wikitext2 (Hub), sample (offline), or a folder with train*, valid*", str)
    add("--tokenizer", "auto", "auto, gpt2 (Hub), bpe:SIZE (trained here), or a folder with a tokenizer.json", str)
    add("--output_dir", f"runs/{Path(__file__).stem}", "metrics, checkpoints, model", str)
    add("--log_interval", 10, "optimizer steps between lines")
    add("--eval_interval", 200, "optimizer steps between validations; 0: at the end only", int, 0)
    add("--save_interval", 500, "optimizer steps between checkpoints; 0: at the end only", int, 0)
    add("--timeout", 600, "seconds that ranks wait for each other before the run ends")
    parser.add_argument("--precision", choices=["bf16", "fp16", "fp32"], help="of weights and activations")
    parser.add_argument("--resume", choices=["auto", "never"], default="auto", help="auto: go on with --output_dir")
    parser.add_argument("--overwrite", action="store_true", help="start afresh: delete the run in --output_dir")
    parser.add_argument("--compile", action="store_true", help="torch.compile the model")
    parser.add_argument("--activation_checkpointing", action="store_true", help="recompute activations going backward")
    parser.add_argument("--local_rank", "--local-rank", type=int, default=0, help="of launchers; LOCAL_RANK wins")
    return parser


def parse_args(parser: ArgumentParser) -> Namespace:
    args = parser.parse_args()
    if args.d_model % args.n_head:
        parser.error(f"--d_model {args.d_model} is not a multiple of --n_head {args.n_head}")
    return args


def run(main: Callable[[], None]) -> None:
    """Call main, but what a user can mend ends in one line and exit code 1.

    Ranks of a host often meet the same error, and one rank's end makes the others fail. A host's first rank speaks at
    once and the others later: by then their launcher has ended them, unless the error is theirs alone.
    """
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115  # closed by the user; torch would trip over it
    place = f"{Path(__file__).name}, rank {os.environ.get('RANK', 0)} on {socket.gethostname()}"
    try:
        main()
        os._exit(0)  # all is written; gloo's threads can abort an interpreter that takes its time to end
    except (UserError, OSError, safetensors.SafetensorError) as error:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # not catch_signals(): a launcher may end this rank now
        time.sleep(0 if os.environ.get("LOCAL_RANK", "0") == "0" else 2)
        rest = "" if isinstance(error, UserError) else f" ({type(error).__name__}). Saved checkpoints are as they were"
        print(f"{place}: error: {error}{rest}", file=sys.stderr, flush=True)
        os._exit(1)  # at once: to tidy up would be to wait for ranks that are elsewhere
    except RuntimeError:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(5 if "RANK" in os.environ else 0)  # mostly it says that another rank is gone
        raise


# endregion arguments


# region data (owner: GPTLike-Base.py)
HUB_DATASET, HUB_TOKENIZER = "Salesforce/wikitext", "openai-community/gpt2"
FILE_TYPES = {".txt": "text", ".raw": "text", ".tokens": "text", ".jsonl": "json", ".parquet": "parquet"}  # or with .gz
WAYS_OUT = """Ways out:
  mirror   export HF_ENDPOINT=https://YOUR-MIRROR
  cache    copy ~/.cache/huggingface from a host that has it, then export HF_HUB_OFFLINE=1
  folder   --dataset DIR --tokenizer bpe:8192, with DIR/train.txt and DIR/valid.txt
  sample   --dataset sample: English prose that comes with Python and needs no network"""


class Corpus(NamedTuple):
    streams: dict[str, Tensor]  # all token ids in order, int32, of "train", "validation" and perhaps "test"
    tokenizer: object  # of transformers
    vocab_size: int


class TokenizedDataset(torch.utils.data.Dataset):
    """Blocks of block_size inputs, with the same tokens shifted by one as targets.

    A last block that is not full is left out. With pad_to, targets of -100, which no loss counts, fill it up and make
    more blocks, so that their number is a multiple of pad_to.
    """

    def __init__(self, stream: Tensor, block_size: int, pad_to: int = 0):
        missing = 0
        if pad_to:
            missing = -(len(stream) - 1) % (block_size * pad_to)
        self.blocks = F.pad(stream, (0, missing), value=-100).unfold(0, block_size + 1, block_size)

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, index: Tensor | slice) -> tuple[Tensor, Tensor]:  # each (len(index), block_size)
        blocks = self.blocks[index].long()
        if torch.cuda.is_available():
            blocks = blocks.pin_memory().cuda(non_blocking=True)  # does not wait for the GPU
        return blocks[:, :-1].clamp_min(0), blocks[:, 1:]


@functools.lru_cache(maxsize=2)  # drawn once an epoch; a step touches two at most
def epoch_order(epoch: int, num_blocks: int, seed: int) -> Tensor:
    return torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def micro_batches(data: TokenizedDataset, step: int, args: Namespace) -> Iterator:
    """This rank's (inputs, targets) of one optimizer step, each (micro batch, block_size).

    For one global batch, the samples of a step depend on seed and step alone, however many ranks and micro batches
    share them; and a resumed run goes on in the middle of an epoch.
    """
    per_rank = args.batch_size * args.gradient_accumulation_steps
    first = (step * args.world_size + args.rank) * per_rank
    epochs_and_places = [divmod(sample, len(data)) for sample in range(first, first + per_rank)]
    index = torch.stack([epoch_order(epoch, len(data), args.seed)[place] for epoch, place in epochs_and_places])
    for part in index.split(args.batch_size):
        yield data[part]


def hub_problem() -> str:
    """Why the Hub sends nothing, or "". Asked first, because huggingface_hub retries for minutes."""
    if os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0"):
        return "HF_HUB_OFFLINE is set, and the cache lacks it"
    url = os.environ.get("HF_ENDPOINT", "https://huggingface.co") + f"/datasets/{HUB_DATASET}/resolve/main/README.md"
    try:
        urllib.request.urlopen(url, timeout=5).close()
    except (OSError, ValueError) as error:
        os.environ["HF_HUB_OFFLINE"] = "1"  # read by huggingface_hub's first import: a cached copy still loads
        return str(error)
    return ""


def load_rows(dataset: str) -> dict:
    """A Dataset with a column "text" for each split; joined, its rows are the split. No silent fallback."""
    import datasets  # not before hub_problem() has been asked

    datasets.disable_progress_bars()
    if dataset == "wikitext2":
        return datasets.load_dataset(HUB_DATASET, "wikitext-2-raw-v1")
    if dataset == "sample":
        from pydoc_data.topics import topics  # the language reference behind Python's help()

        articles = [topics[name] for name in sorted(topics)]
        texts = {"train": [text for i, text in enumerate(articles) if i % 10], "validation": articles[::10]}
        return {split: datasets.Dataset.from_dict({"text": texts[split]}) for split in texts}
    formats = {FILE_TYPES[end] for path in Path(dataset).rglob("*") for end in path.suffixes if end in FILE_TYPES}
    if len(formats) != 1:
        raise UserError(f"--dataset {dataset}: write wikitext2, sample, or a folder of files in one of {[*FILE_TYPES]}")
    if formats == {"text"}:  # -sig: a byte-order mark is no text
        return datasets.load_dataset("text", data_dir=dataset, keep_linebreaks=True, encoding="utf-8-sig")
    return datasets.load_dataset(formats.pop(), data_dir=dataset)


def load_tokenizer(name: str, train_rows: list[str], args: Namespace) -> object:
    """transformers' tokenizer of that name. bpe:SIZE is trained here, by rank 0, and is byte-level as GPT-2's is."""
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    if name.startswith("bpe:"):
        trainer = tokenizers.ByteLevelBPETokenizer()
        if args.rank == 0:
            trainer.train_from_iterator(train_rows, int(name[4:]), min_frequency=0, show_progress=False)
        trained = tokenizers.Tokenizer.from_str(gather(trainer.to_str())[0])
        return PreTrainedTokenizerFast(tokenizer_object=trained)
    if os.path.isdir(name):
        return PreTrainedTokenizerFast(tokenizer_file=f"{name}/tokenizer.json")
    return AutoTokenizer.from_pretrained(HUB_TOKENIZER if name == "gpt2" else name)


def load_corpus(args: Namespace) -> Corpus:
    """The same token streams on every rank. `datasets` caches them by content and shares them within a host."""
    auto = "gpt2" if args.dataset == "wikitext2" else "bpe:8192"
    name = auto if args.tokenizer == "auto" else args.tokenizer
    local = name.startswith("bpe:") or os.path.isdir(name)
    problem = "" if local and args.dataset != "wikitext2" else hub_problem()
    from datasets.exceptions import DatasetsError

    try:
        rows = load_rows(args.dataset)
        tokenizer = load_tokenizer(name, rows["train"]["text"], args)

        def encode(batch: dict) -> dict:
            # A row ends with a line break. The Hub has WikiText's blank lines as "", the original as " \n".
            texts = [text if text.endswith("\n") else text + " \n" for text in batch["text"]]
            return {"ids": tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]}

        streams = {}
        for split in ("train", "validation", "test") if "test" in rows else ("train", "validation"):
            table = rows[split].map(encode, batched=True, remove_columns=rows[split].column_names).data
            ids = table.column("ids").combine_chunks().flatten().to_numpy()
            streams[split] = torch.tensor(ids, dtype=torch.int32)
            if len(ids) <= args.block_size:
                raise UserError(
                    f"{args.dataset}, {split}: {len(ids)} tokens are too few for --block_size {args.block_size}"
                )
    except (OSError, ValueError, KeyError, DatasetsError) as error:
        if problem:
            raise UserError(f"the Hugging Face Hub does not answer ({problem}). {WAYS_OUT}") from error
        reason = f"{error.__cause__ or error!r}. It needs train* and valid* with text, or lines with a field text"
        raise UserError(f"cannot read --dataset {args.dataset} with --tokenizer {name}: {reason}") from error
    return Corpus(streams, tokenizer, vocab_size=max(tokenizer.get_vocab().values()) + 1)


# endregion data


# region model (owner: GPTLike-Base.py)
class CausalSelfAttention(nn.Module):
    """Attention has no dropout of its own: with it, PyTorch's fused CPU attention would be switched off."""

    def __init__(self, d_model: int, n_head: int, dropout: float):
        super().__init__()
        self.n_head = n_head
        self.qkv = nn.Linear(d_model, 3 * d_model)
        self.projection = nn.Linear(d_model, d_model)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, d_model)
        qkv = self.qkv(x).unflatten(-1, (3, self.n_head, -1))  # (batch, seq, 3, n_head, head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, n_head, seq, head_dim)
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.dropout(self.projection(heads.transpose(1, 2).flatten(2)))  # (batch, seq, d_model)


class FeedForward(nn.Sequential):
    def __init__(self, d_model: int, dropout: float):
        up, down = nn.Linear(d_model, 4 * d_model), nn.Linear(4 * d_model, d_model)
        super().__init__(up, nn.GELU(approximate="tanh"), down, nn.Dropout(dropout))


class TransformerBlock(nn.Module):
    def __init__(self, d_model: int, n_head: int, dropout: float):
        super().__init__()
        self.norm1 = nn.LayerNorm(d_model)
        self.attention = CausalSelfAttention(d_model, n_head, dropout)
        self.norm2 = nn.LayerNorm(d_model)
        self.feed_forward = FeedForward(d_model, dropout)

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, d_model)
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class GPTLike(nn.Module):
    """Pre-norm decoder-only transformer with learned positions and a tied head, initialized as GPT-2."""

    def __init__(self, args: Namespace, vocab_size: int):
        super().__init__()
        self.recompute = args.activation_checkpointing
        rows = -(-vocab_size // 64) * 64  # a multiple of 64: faster matmuls
        self.token_embedding = nn.Embedding(rows, args.d_model)
        self.position_embedding = nn.Embedding(args.block_size, args.d_model)
        self.dropout = nn.Dropout(args.dropout)
        blocks = [TransformerBlock(args.d_model, args.n_head, args.dropout) for _ in range(args.n_layer)]
        self.blocks = nn.ModuleList(blocks)
        self.final_norm = nn.LayerNorm(args.d_model)
        for block in blocks:  # the layers that add to the residual stream; initialize() reads std
            block.attention.projection.std = 0.02 / math.sqrt(2 * args.n_layer)
            block.feed_forward[2].std = 0.02 / math.sqrt(2 * args.n_layer)
        torch.manual_seed(args.seed)  # the layers have drawn, too, under zero.Init on the GPU
        self.apply(self.initialize)  # zero.Init gathers for apply(); a loop over parameters would see empty ones
        self.head = nn.Linear(args.d_model, rows, bias=False)
        self.head.weight = self.token_embedding.weight  # tied: one parameter under two names

    def initialize(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear | nn.Embedding):
            drawn = torch.empty(module.weight.shape, device="cpu").float()  # the same for every device and precision
            module.weight.data.copy_(drawn.normal_(std=getattr(module, "std", 0.02)))
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, targets: Tensor | None = None) -> Tensor:
        """Logits (batch, seq, rows), or with targets (batch, seq) their mean loss. tokens: (batch, seq)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))  # (batch, seq, d_model)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
        logits = self.head(self.final_norm(x))  # (batch, seq, rows)
        if targets is None:
            return logits
        return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())  # targets of -100 do not count


def parameter_groups(model: nn.Module) -> list[dict]:
    """Matrices decay at the optimizer's rate, biases and norms never. By name: under ZeRO-3 the shapes are gone."""
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith("weight") and "norm" not in name
        (decay if is_matrix else rest).append(parameter)
    return [{"params": decay}, {"params": rest, "weight_decay": 0.0}]


def lr_factor(step: int, args: Namespace) -> float:
    """What the peak learning rate is multiplied by: linear warm-up, then half a cosine down to a tenth."""
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, progress))


# endregion model


# region metrics (owner: GPTLike-Base.py)
PEAK_TFLOPS = {  # dense, 16 bit; names as torch.cuda.get_device_name() gives them
    "NVIDIA H200": 989,
    "NVIDIA H100 80GB HBM3": 989,
    "NVIDIA H100 PCIe": 756,
    "NVIDIA A100-SXM4-80GB": 312,
    "NVIDIA A100-SXM4-40GB": 312,
    "NVIDIA L40S": 362,
    "NVIDIA GeForce RTX 4090": 165,
    "NVIDIA GeForce RTX 4090 D": 147,
    "NVIDIA GeForce RTX 3090": 71,
}
NUMBER_FORMATS = {"step": "d", "lr": ".2e", "tokens_per_second": ".0f", "peak_memory_gib": ".2f", "mfu": ".3f"}


def log(message: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message)
        sys.stdout.flush()


def record(fields: dict, args: Namespace) -> None:
    """A line on the screen and in metrics.jsonl. A resumed run may repeat steps there: a step's last line counts."""
    log(" ".join(f"{name}={value:{NUMBER_FORMATS.get(name, '.4f')}}" for name, value in fields.items()))
    if args.rank == 0:
        with open(f"{args.output_dir}/metrics.jsonl", "a") as file:
            file.write(json.dumps(fields) + "\n")


def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"


def show_start(num_params: int, corpus: Corpus, args: Namespace) -> None:
    script, ranks = Path(__file__).name, args.world_size
    log(f"{script}: ZeRO stage {args.zero_stage}, world size {ranks}, precision {args.precision}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    for place in gather(f"{socket.gethostname()}: {device_name()}, {args.device} of CUDA_VISIBLE_DEVICES {visible}"):
        log(f"  a rank on {place}")
    tokens = ", ".join(f"{split} {len(stream):,}" for split, stream in corpus.streams.items())
    log(f"{args.dataset}: tokens {tokens}, vocabulary {corpus.vocab_size:,}; model: {num_params:,} parameters")


def average_and_check(loss: Tensor, grad_norm: float | Tensor, caught: list, args: Namespace) -> tuple[float, bool]:
    """The mean loss over ranks, and whether any rank has caught a signal. The loop's only wait for the device.

    Raises UserError where loss or gradients are no numbers; fp16 skips such steps by itself.
    """
    total, signals = sum_over_ranks(torch.stack((loss, loss.new_tensor(bool(caught))))).tolist()
    if args.precision != "fp16" and not math.isfinite(total + grad_norm):
        found = f"the loss is {total / args.world_size}, the norm of its gradients {float(grad_norm)}"
        raise UserError(f"{found}. Checkpoints are as they were. Try a lower --lr or more --warmup_steps")
    return total / args.world_size, signals > 0


def speed(tokens_per_second: float, num_params: int, args: Namespace) -> dict:
    """That rate of all ranks, peak memory, and the share of the devices' peak (MFU) where that is known.

    Peak memory: on a GPU the allocator's since the last call; on a CPU the process's since its start.
    """
    peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    if torch.cuda.is_available():
        peak_memory = torch.cuda.max_memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    fields = {"tokens_per_second": tokens_per_second, "peak_memory_gib": peak_memory / 2**30}
    if device_name() in PEAK_TFLOPS and args.precision != "fp32":
        flops_per_token = 6 * num_params + 12 * args.n_layer * args.block_size * args.d_model  # forward and backward
        fields["mfu"] = tokens_per_second * flops_per_token / (PEAK_TFLOPS[device_name()] * 1e12 * args.world_size)
    return fields


@torch.no_grad()
def evaluate(model: nn.Module, corpus: Corpus, split: str, args: Namespace) -> dict:
    """Mean loss over every token of a split, and with it perplexity per token and per word, and bits per byte."""
    stream, stride = corpus.streams[split], args.batch_size * args.world_size
    data = TokenizedDataset(stream, args.block_size, pad_to=stride)  # the same number of passes for all ranks
    nats = torch.zeros((), dtype=torch.float64, device=args.device)
    model.eval()
    for first in range(args.rank * args.batch_size, len(data), stride):
        inputs, targets = data[first : first + args.batch_size]
        count = (targets != -100).sum()
        nats += torch.where(count > 0, model(inputs, targets) * count, 0)  # a mean over no targets is no number
    model.train()
    nats, text = sum_over_ranks(nats).item(), corpus.tokenizer.decode(stream, clean_up_tokenization_spaces=False)
    return {
        f"{split}_loss": nats / (len(stream) - 1),
        f"{split}_perplexity": math.exp(min(700, nats / (len(stream) - 1))),
        f"{split}_word_perplexity": math.exp(min(700, nats / len(text.split()))),
        f"{split}_bits_per_byte": nats / math.log(2) / len(text.encode()),
    }


def show_ledger(kinds: dict[str, list], num_params: int, args: Namespace) -> dict:
    """Print and return the bytes of model states that rank 0 holds, beside the formulas of arXiv:1910.02054, 3.1.

    Called between a backward pass and a step other than the first: only then all kinds are there at once. All other
    floating-point tensors of the process are buckets then, which gradients travel in.
    """
    rest = [thing for thing in gc.get_objects() if type(thing) in (Tensor, nn.Parameter)]
    width = 4 if args.precision == "fp32" else 2
    ledger, counted = {}, set()
    for kind, bytes_each, stage in (
        ("parameters", width, 3),
        ("optimizer_states", 12, 1),
        ("gradients_and_buckets", width, 2),
    ):
        formula = bytes_each * num_params // (args.world_size if args.zero_stage >= stage else 1)
        for tensor in kinds[kind] + (rest if kind == "gradients_and_buckets" else []):
            memory = tensor.untyped_storage()
            if tensor.is_floating_point() and not tensor.is_meta and memory.data_ptr() not in counted:
                counted.add(memory.data_ptr())
                row = ledger.setdefault(f"{kind} on {tensor.device.type}", {"held": 0, "formula": formula})
                row["held"] += memory.nbytes()
    for name, row in ledger.items():
        log(f"  {name}: rank 0 holds {row['held']:,} bytes, by the formula {row['formula']:,}")
    return ledger


# endregion metrics


# region output (owner: GPTLike-Base.py)
def write_json(path: Path, value: dict) -> None:
    """By rename, so that nobody ever reads half a file."""
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(part, path)


def claim_output(args: Namespace) -> None:
    """Lock --output_dir until this process ends, however it ends. Refuse a run there, or delete it, as flags say."""
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    try:
        fcntl.lockf(os.open(output / ".lock", os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The descriptor stays open on purpose: the lock goes with it.
    except BlockingIOError as error:
        raise UserError(f"another run is writing to {output}: wait for it, or choose another --output_dir") from error
    holds_run = (output / "args.json").exists()
    if holds_run and args.overwrite:
        for name in ("checkpoints", "model", "metrics.jsonl", "summary.json", "args.json"):
            shutil.rmtree(output / name, ignore_errors=True)
            (output / name).unlink(missing_ok=True)
    elif holds_run and args.resume == "never":
        raise UserError(f"{output} holds a run: add --overwrite, or choose another --output_dir")


def settings(corpus: Corpus, args: Namespace) -> dict:
    """What has to be the same in a checkpoint and in the run that continues it."""
    names = "n_layer n_head d_model block_size seed precision batch_size gradient_accumulation_steps "
    names += "zero_stage world_size lr weight_decay warmup_steps dropout"
    digest = hashlib.sha256(corpus.streams["train"].numpy()).hexdigest()
    return {name: getattr(args, name) for name in names.split()} | {"data and tokenizer": digest}


def check_settings(saved: dict, now: dict) -> None:
    changed = [f"{name} {saved[name]}, now {now[name]}" for name in now if saved[name] != now[name]]
    if changed:
        raise UserError(f"--output_dir holds a run with {'; '.join(changed)}. Take the former, or add --overwrite")


def validate(model: nn.Module, step: int, best: dict | None, corpus: Corpus, args: Namespace) -> dict:
    """Record the validation loss. The model of the lowest one so far stands in model/; returns its step and loss."""
    fields = {"step": step} | evaluate(model, corpus, "validation", args)
    record(fields, args)
    if best and not fields["validation_loss"] < best["validation_loss"]:
        return best
    weights = full_weights(model)  # on all ranks: ZeRO-3 gathers them together
    if args.rank == 0:
        folder = Path(args.output_dir, "model")
        folder.mkdir(exist_ok=True)
        safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
        corpus.tokenizer.save_pretrained(folder)
        shape = {name: getattr(args, name) for name in ("n_layer", "n_head", "d_model", "block_size")}
        write_json(folder / "config.json", shape | {"vocab_size": corpus.vocab_size})
    return fields


def finish(model: nn.Module, summary: dict, corpus: Corpus, args: Namespace) -> None:
    if "test" in corpus.streams:
        summary |= evaluate(model, corpus, "test", args)
    if args.rank == 0:
        write_json(Path(args.output_dir, "summary.json"), summary)
    log(f"finished: see {args.output_dir}/summary.json and {args.output_dir}/model")


def catch_signals() -> list[int]:
    """A list that grows by the number of each SIGTERM and SIGINT; launchers repeat theirs."""
    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: caught.append(number))
    return caught


# endregion output


# One process: what the other scripts do with collectives.
def gather(value: object) -> list:
    return [value]


def sum_over_ranks(tensor: Tensor) -> Tensor:
    return tensor


def build_optimizer(model: nn.Module, args: Namespace) -> tuple[list, list, torch.optim.Optimizer]:
    """The model's weights, fp32 copies of them, and AdamW on the copies: 16 bits are too few for its small steps."""
    groups = parameter_groups(model)
    weights = [weight for group in groups for weight in group["params"]]
    for group in groups:
        group["params"] = [weight.detach().float().clone().requires_grad_() for weight in group["params"]]
    masters = [master for group in groups for master in group["params"]]
    optimizer = torch.optim.AdamW(groups, lr=args.lr, betas=BETAS, eps=EPS, weight_decay=args.weight_decay, fused=True)
    return weights, masters, optimizer


@torch.no_grad()
def copy_all(sources: list[Tensor], targets: list[Tensor]) -> None:
    for source, target in zip(sources, targets, strict=True):
        target.copy_(source)


def full_weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: weight.detach().cpu() for name, weight in model.named_parameters()}


def main() -> None:
    parser = build_parser()
    parser.set_defaults(**DEFAULTS)
    args = parse_args(parser)
    args.zero_stage, args.rank, args.world_size = ZERO_STAGE, 0, 1
    args.device = "cuda" if torch.cuda.is_available() else "cpu"
    if os.environ.get("WORLD_SIZE", "1") != "1":
        raise UserError("it trains in one process: run DeepSpeed-GPTLike-ZeRO-1.py on several ranks")
    if args.precision == "fp16":
        raise UserError("fp16 needs loss scaling: run DeepSpeed-GPTLike-ZeRO-1.py, or take --precision bf16 or fp32")
    torch.zeros(1).exp()  # by one thread: of two that make MKL's first call at once, one may be 1e-4 off
    corpus = load_corpus(args)
    data = TokenizedDataset(corpus.streams["train"], args.block_size)
    global_batch = args.batch_size * args.gradient_accumulation_steps * args.world_size
    args.max_steps = args.max_steps or math.ceil(args.epochs * len(data) / global_batch)
    claim_output(args)

    model = GPTLike(args, corpus.vocab_size).to(args.device, torch.bfloat16 if args.precision == "bf16" else None)
    weights, masters, optimizer = build_optimizer(model, args)
    if args.compile:
        model.compile()
    num_params = sum(weight.numel() for weight in weights)
    show_start(num_params, corpus, args)

    step, best, checkpoint_path = 0, None, Path(args.output_dir, "checkpoints", "state.pt")
    if checkpoint_path.exists():
        state = torch.load(checkpoint_path, map_location="cpu", weights_only=True)
        check_settings(state["settings"], settings(corpus, args))
        step, best = state["step"], state["best"]
        copy_all(state["masters"], masters)
        copy_all(masters, weights)
        optimizer.load_state_dict(state["optimizer"])
        log(f"resumed from step {step} of {args.output_dir}")
    if step >= args.max_steps and Path(args.output_dir, "summary.json").exists():
        return log(f"this run is finished, see {args.output_dir}/summary.json; more --max_steps would go on")
    write_json(Path(args.output_dir, "args.json"), vars(args))
    shutil.copy(__file__, args.output_dir)
    Path(args.output_dir, "summary.json").unlink(missing_ok=True)  # of a run that goes on now

    caught, ledger = catch_signals(), {}
    bar = tqdm(total=args.max_steps, initial=step, disable=None)  # shows on a terminal only
    first_step, clock_step, clock = step, step, time.perf_counter()
    while step < args.max_steps:
        torch.manual_seed((args.seed * 1_000_003 + step) * 4_099 + args.rank)  # dropout: the same after a resume
        loss = torch.zeros((), device=args.device)
        for inputs, targets in micro_batches(data, step, args):
            micro_loss = model(inputs, targets) / args.gradient_accumulation_steps
            micro_loss.backward()
            loss += micro_loss.detach()
        if step == first_step + 1:
            moments = [value for state in optimizer.state.values() for value in state.values()]
            kinds = {"parameters": weights, "optimizer_states": masters + moments}
            ledger = show_ledger(
                kinds | {"gradients_and_buckets": [weight.grad for weight in weights]}, num_params, args
            )
        for weight, master in zip(weights, masters, strict=True):
            master.grad = weight.grad.float()
        grad_norm = nn.utils.clip_grad_norm_(masters, GRADIENT_CLIPPING)
        lr = args.lr * lr_factor(step, args)
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        copy_all(masters, weights)
        optimizer.zero_grad()
        model.zero_grad()
        step += 1
        bar.update()

        intervals = args.log_interval, args.eval_interval, args.save_interval
        log_due, eval_due, save_due = [step == args.max_steps or (i > 0 and step % i == 0) for i in intervals]
        if not (log_due or eval_due or save_due):
            continue
        loss, stopping = average_and_check(loss, grad_norm, caught, args)
        if log_due:
            rate = global_batch * args.block_size * (step - clock_step) / (time.perf_counter() - clock)
            record({"step": step, "loss": loss, "lr": lr} | speed(rate, num_params, args), args)
        if eval_due:
            best = validate(model, step, best, corpus, args)
        if save_due or stopping:
            state = {"step": step, "best": best, "settings": settings(corpus, args)}
            state |= {"masters": masters, "optimizer": optimizer.state_dict()}
            checkpoint_path.parent.mkdir(exist_ok=True)
            torch.save(state, checkpoint_path.with_suffix(".part"))
            checkpoint_path.with_suffix(".part").rename(checkpoint_path)  # a killed run leaves the one before
        if stopping:
            log(f"stopped by a signal: step {step} is saved, the same command continues")
            os._exit(128 + caught[0])
        clock_step, clock = step, time.perf_counter()
    bar.close()
    finish(model, {"steps": step, "parameters": num_params, "best": best, "ledger": ledger}, corpus, args)


if __name__ == "__main__":
    run(main)
