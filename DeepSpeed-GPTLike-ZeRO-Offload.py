"""The same GPT under DeepSpeed ZeRO-Offload: model states leave the GPU for the host's memory, or for its NVMe disk.

Adds to DeepSpeed-GPTLike-ZeRO-3.py:
- "offload_optimizer" in the JSON (configs/zero_offload.json, stage 2): optimizer states live in host memory and the CPU
  steps them (DeepSpeedCPUAdam), so that the GPU holds 2P bytes of parameters and its gradients
- "offload_param", which needs stage 3 (configs/zero3_offload.json): parameters wait in host memory until a layer runs
- "device": "nvme" with an nvme_path of your own (configs/zero_infinity.json): both wait on disk
Partitioned across ranks: as the JSON's stage says; what is offloaded is partitioned first, then moved.
Resumed, losses are within 1e-6 of the undisturbed run's: DeepSpeedCPUAdam takes its powers of beta anew.

Run:
    deepspeed --num_gpus 2 DeepSpeed-GPTLike-ZeRO-Offload.py
    deepspeed --num_gpus 2 DeepSpeed-GPTLike-ZeRO-Offload.py --ds_config configs/zero3_offload.json
    torchrun --nproc_per_node 2 DeepSpeed-GPTLike-ZeRO-Offload.py --ds_config configs/zero_infinity.json

Source: ZeRO-Offload, arXiv:2101.06840; ZeRO-Infinity, arXiv:2104.07857
"""

import contextlib
import difflib
import fcntl
import functools
import gc
import glob
import hashlib
import json
import math
import os
import shutil
import signal
import socket
import sys
import time
import urllib.request
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError, Namespace
from datetime import timedelta
from pathlib import Path
from pydoc_data.topics import topics
from resource import RUSAGE_SELF, getrusage

import deepspeed
import hjson
import safetensors.torch
import tokenizers
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.elastic.multiprocessing.errors import record as report_to_torchrun
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

ZERO_STAGE = "Offload"
DEFAULTS = {"ds_config": "configs/zero_offload.json"}


# region arguments (owner: GPTLike-Base.py)
class UserError(Exception):
    """Something that the user can mend: one message and exit code 1, no traceback."""


@contextlib.contextmanager
def explain(failure, ways_out=""):
    """An error inside of this becomes a UserError that says what has failed, and what there is to do."""
    try:
        yield
    except Exception as error:
        raise UserError(f"{failure}: {error.__cause__ or error!r}. {ways_out}".rstrip()) from error


def parse_args(words=None):
    """The flags of all six scripts. What the JSON holds, too, has a default in GPTLike-Base.py only."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter, allow_abbrev=False)

    def add(name, default, text, kind=int, low=1, high=2_000_000_000):
        def number(word):
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
    if ZERO_STAGE:
        parser.add_argument("--ds_config", help="DeepSpeed's JSON")
    parser.set_defaults(**DEFAULTS)
    args = parser.parse_args(words)
    if args.d_model % args.n_head:
        parser.error(f"--d_model {args.d_model} is not a multiple of --n_head {args.n_head}")
    return args


def run(main):
    """Call main, but what a user can mend ends in one line and exit code 1."""
    try:
        main()
        os._exit(0)  # all is written; gloo's threads can abort an interpreter that takes its time to end
    except (UserError, OSError, safetensors.SafetensorError) as error:
        # A host's ranks often meet the same error. The first one speaks; then the launcher ends the others.
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        time.sleep(0 if os.environ.get("LOCAL_RANK", "0") == "0" else 2)
        place = f"{Path(__file__).name}, rank {os.environ.get('RANK', 0)} on {socket.gethostname()}"
        print(f"{place}: error: {error}", file=sys.stderr, flush=True)
        os._exit(1)  # at once: to tidy up would be to wait for ranks that are elsewhere


# region data (owner: GPTLike-Base.py)
HUB_DATASET, HUB_TOKENIZER = "Salesforce/wikitext", "openai-community/gpt2"
FILE_TYPES = {".txt": "text", ".raw": "text", ".tokens": "text", ".jsonl": "json", ".parquet": "parquet"}  # or .txt.gz
DATA_HELP = """What there is:
  Hub      --dataset wikitext2; from a mirror: export HF_ENDPOINT=https://YOUR-MIRROR
  cache    copy ~/.cache/huggingface from a host that has it, then export HF_HUB_OFFLINE=1
  folder   --dataset DIR --tokenizer bpe:8192, with DIR/train.txt and DIR/valid.txt (or .jsonl, .parquet)
  sample   --dataset sample: English prose that comes with Python and needs no network"""


def inputs_and_targets(blocks):
    """Tokens, and the same shifted by one, each (batch, block_size). blocks: (batch, block_size + 1)."""
    blocks = blocks.long()
    if torch.cuda.is_available():
        blocks = blocks.pin_memory().cuda(non_blocking=True)  # does not wait for the GPU
    return blocks[:, :-1], blocks[:, 1:]


@functools.lru_cache(maxsize=2)  # drawn once an epoch; a step touches two at most
def epoch_order(epoch, num_blocks, seed):
    return torch.randperm(num_blocks, generator=torch.Generator().manual_seed(seed * 1_000_003 + epoch))


def micro_batches(blocks, step, args):
    """This rank's micro batches. A step's samples depend on seed, step and global batch alone, not on the ranks."""
    per_rank = args.batch_size * args.gradient_accumulation_steps
    first = (step * args.world_size + args.rank) * per_rank
    places = [divmod(sample, len(blocks)) for sample in range(first, first + per_rank)]
    index = torch.stack([epoch_order(epoch, len(blocks), args.seed)[place] for epoch, place in places])
    for part in index.split(args.batch_size):
        yield inputs_and_targets(blocks[part])


def load_rows(dataset):
    """A DatasetDict with a column "text" in each split; joined, its rows are the split. No silent fallback."""
    import datasets  # after load_corpus has asked the Hub

    datasets.disable_progress_bars()
    if dataset == "wikitext2":
        return datasets.load_dataset(HUB_DATASET, "wikitext-2-raw-v1")
    if dataset == "sample":
        articles = [topics[name] for name in sorted(topics)]  # the language reference behind Python's help()
        texts = {"train": [text for i, text in enumerate(articles) if i % 10], "validation": articles[::10]}
        return datasets.DatasetDict({name: datasets.Dataset.from_dict({"text": texts[name]}) for name in texts})
    kinds = {FILE_TYPES[end] for path in Path(dataset).rglob("*") for end in path.suffixes if end in FILE_TYPES}
    if len(kinds) != 1:
        raise ValueError(f"it is no folder with files of one kind: {sorted(kinds)}")
    options = {"keep_linebreaks": True, "encoding": "utf-8-sig"} if kinds == {"text"} else {}  # drops a byte-order mark
    return datasets.load_dataset(kinds.pop(), data_dir=dataset, **options)


def load_corpus(args):
    """Token streams (int32, by split) with their tokenizer. `datasets` caches them, once for all ranks of a host."""
    auto = "gpt2" if args.dataset == "wikitext2" else "bpe:8192"
    name = auto if args.tokenizer == "auto" else args.tokenizer
    if args.dataset == "wikitext2" or not (name.startswith("bpe:") or os.path.isdir(name)):
        try:
            url = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
            urllib.request.urlopen(f"{url}/datasets/{HUB_DATASET}/resolve/main/README.md", timeout=5).close()
        except (OSError, ValueError) as error:
            os.environ["HF_HUB_OFFLINE"] = "1"  # read at the first import; else huggingface_hub retries for minutes
            log(f"the Hugging Face Hub does not answer ({error}); its cache may have what is needed")
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    def encode(batch):
        # A row ends with a line break. The Hub has WikiText's blank lines as "", the original as " \n".
        texts = [text if text.endswith("\n") else text + " \n" for text in batch["text"]]
        return {"ids": tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]}

    with explain(f"cannot take --dataset {args.dataset} with --tokenizer {name}", DATA_HELP):
        rows, streams = load_rows(args.dataset).select_columns("text"), {}
        if name.startswith("bpe:"):  # byte-level as GPT-2's, trained by rank 0
            bpe = tokenizers.ByteLevelBPETokenizer()
            if args.rank == 0:
                bpe.train_from_iterator(rows["train"]["text"], int(name[4:]), min_frequency=0, show_progress=False)
            tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizers.Tokenizer.from_str(gather(bpe.to_str())[0]))
        else:
            tokenizer = AutoTokenizer.from_pretrained(HUB_TOKENIZER if name == "gpt2" else name)
        for split, table in rows.map(encode, batched=True, remove_columns="text").items():
            ids = table.data.column("ids").combine_chunks().flatten().to_numpy()
            streams[split] = torch.tensor(ids, dtype=torch.int32)
        shortest = min(len(streams["train"]), len(streams["validation"]))
        if shortest <= args.block_size:
            raise ValueError(f"a split of {shortest} tokens is too short for --block_size {args.block_size}")
    args.data = hashlib.sha256(streams["train"].numpy()).hexdigest()
    return Namespace(streams=streams, tokenizer=tokenizer, vocab_size=max(tokenizer.get_vocab().values()) + 1)


# region model (owner: GPTLike-Base.py)
class CausalSelfAttention(nn.Module):
    """Attention has no dropout of its own: with it, PyTorch's fused CPU attention would be switched off."""

    def __init__(self, args):
        super().__init__()
        self.n_head = args.n_head
        self.qkv = nn.Linear(args.d_model, 3 * args.d_model)
        self.projection = nn.Linear(args.d_model, args.d_model)
        self.projection.std = 0.02 / math.sqrt(2 * args.n_layer)  # as it adds to the residual stream; for initialize()
        self.dropout = nn.Dropout(args.dropout)

    def forward(self, x):  # (batch, seq, d_model)
        qkv = self.qkv(x).unflatten(-1, (3, self.n_head, -1))  # (batch, seq, 3, n_head, head_dim)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)  # each (batch, n_head, seq, head_dim)
        heads = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.dropout(self.projection(heads.transpose(1, 2).flatten(2)))  # (batch, seq, d_model)


class TransformerBlock(nn.Module):
    def __init__(self, args):
        super().__init__()
        self.norm1 = nn.LayerNorm(args.d_model)
        self.attention = CausalSelfAttention(args)
        self.norm2 = nn.LayerNorm(args.d_model)
        up, down = nn.Linear(args.d_model, 4 * args.d_model), nn.Linear(4 * args.d_model, args.d_model)
        down.std = self.attention.projection.std
        self.feed_forward = nn.Sequential(up, nn.GELU(approximate="tanh"), down, nn.Dropout(args.dropout))

    def forward(self, x):  # (batch, seq, d_model)
        x = x + self.attention(self.norm1(x))
        return x + self.feed_forward(self.norm2(x))


class GPTLike(nn.Module):
    """Pre-norm decoder-only transformer with learned positions and a tied head, initialized as GPT-2."""

    def __init__(self, args, vocab_size):
        super().__init__()
        self.recompute = args.activation_checkpointing
        rows = -(-vocab_size // 64) * 64  # a multiple of 64: faster matmuls
        self.token_embedding = nn.Embedding(rows, args.d_model)
        self.position_embedding = nn.Embedding(args.block_size, args.d_model)
        self.dropout = nn.Dropout(args.dropout)
        self.blocks = nn.ModuleList([TransformerBlock(args) for _ in range(args.n_layer)])
        self.final_norm = nn.LayerNorm(args.d_model)
        torch.manual_seed(args.seed)  # what layers drew when they were made depends on the device
        self.apply(self.initialize)  # zero.Init gathers for apply(); a loop over parameters would see empty ones
        self.head = nn.Linear(args.d_model, rows, bias=False)  # after apply(): it has no weight of its own
        self.head.weight = self.token_embedding.weight  # tied: one parameter under two names

    def initialize(self, module):
        if isinstance(module, nn.Linear | nn.Embedding):
            drawn = torch.empty(module.weight.shape, device="cpu").float()  # zero.Init would make it 16-bit, on the GPU
            module.weight.data.copy_(drawn.normal_(std=getattr(module, "std", 0.02)))
        if isinstance(module, nn.Linear):
            nn.init.zeros_(module.bias)

    def forward(self, tokens, targets=None):
        """Logits (batch, seq, rows), or with targets (batch, seq) their mean loss. tokens: (batch, seq)."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)
        x = self.dropout(self.token_embedding(tokens) + self.position_embedding(positions))  # (batch, seq, d_model)
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.recompute and self.training else block(x)
        logits = self.head(self.final_norm(x))  # (batch, seq, rows)
        return logits if targets is None else F.cross_entropy(logits.float().flatten(0, 1), targets.flatten())


def parameter_groups(model):
    """Matrices decay at the optimizer's rate, biases and norms never. By name: under ZeRO-3 the shapes are gone."""
    decay, rest = [], []
    for name, parameter in model.named_parameters():
        group = decay if name.endswith("weight") and "norm" not in name else rest
        group.append(parameter)
    return [{"params": decay}, {"params": rest, "weight_decay": 0.0}]


def lr_factor(step, args):
    """What the peak learning rate is multiplied by: linear warm-up, then half a cosine down to a tenth."""
    if step < args.warmup_steps:
        return (step + 1) / args.warmup_steps
    progress = (step - args.warmup_steps) / max(1, args.max_steps - args.warmup_steps)
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, progress))


# region metrics (owner: GPTLike-Base.py)
NUMBER_FORMATS = {"step": "d", "lr": ".2e", "tokens_per_second": ".0f", "peak_memory_gib": ".2f"}
# What has to be the same in a checkpoint and in the run that continues it. "data" is a digest of the train tokens.
MUST_MATCH = """n_layer n_head d_model block_size dropout seed precision batch_size gradient_accumulation_steps lr
    weight_decay warmup_steps zero_stage world_size data""".split()


def log(message):
    if os.environ.get("RANK", "0") == "0":
        tqdm.write(message)
        sys.stdout.flush()


def record(fields, args):
    """A line on the screen and in metrics.jsonl. A resumed run may repeat steps there: a step's last line counts."""
    log(" ".join(f"{name}={value:{NUMBER_FORMATS.get(name, '.4f')}}" for name, value in fields.items()))
    if args.rank == 0:
        with open(f"{args.output_dir}/metrics.jsonl", "a") as file:
            file.write(json.dumps(fields) + "\n")


def write_json(path, value):
    """By rename, so that nobody ever reads half a file."""
    part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    part.write_text(json.dumps(value, indent=2) + "\n")
    part.rename(path)


def show_start(corpus, args):
    log(f"{sys.argv[0]}: ZeRO stage {args.zero_stage}, world size {args.world_size}, precision {args.precision}")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "all")
    for place in gather(f"{socket.gethostname()}: {args.device_name}, {args.device} of CUDA_VISIBLE_DEVICES {visible}"):
        log(f"  a rank on {place}")
    tokens = [f"{split} {len(stream):,}" for split, stream in corpus.streams.items()]
    log(f"{args.dataset}: tokens {', '.join(tokens)}, vocabulary {corpus.vocab_size:,}; parameters {args.n_params:,}")


def average_and_check(loss, grad_norm, caught, args):
    """The mean loss over ranks, and whether any rank has caught a signal. Here the loop waits for the device."""
    losses, signals = zip(*gather((loss.item(), bool(caught))), strict=True)
    mean = sum(losses) / args.world_size
    if args.precision != "fp16" and not math.isfinite(mean + grad_norm):  # fp16 skips such steps by itself
        raise UserError(f"loss {mean}, gradient norm {grad_norm}: take a lower --lr or more --warmup_steps")
    return mean, any(signals)


@torch.no_grad()
def evaluate(model, corpus, args):
    """Mean loss over every token of the validation split, perplexity per token and per word, and bits per byte."""
    stream, stride = corpus.streams["validation"], args.batch_size * args.world_size
    missing = -(len(stream) - 1) % (args.block_size * stride)  # filled up, so that all ranks make as many passes
    blocks = F.pad(stream, (0, missing), value=-100).unfold(0, args.block_size + 1, args.block_size)
    nats = torch.zeros((), dtype=torch.float64, device=args.device)
    model.eval()
    for first in range(args.rank * args.batch_size, len(blocks), stride):
        inputs, targets = inputs_and_targets(blocks[first : first + args.batch_size])
        logits = model(inputs.clamp_min(0)).float().flatten(0, 1)
        nats += F.cross_entropy(logits, targets.flatten(), reduction="sum")  # targets of -100 do not count
    model.train()
    nats, text = sum(gather(nats.item())), corpus.tokenizer.decode(stream, clean_up_tokenization_spaces=False)
    loss = nats / (len(stream) - 1)
    fields = {"validation_loss": loss, "validation_perplexity": math.exp(min(700, loss))}
    fields["validation_word_perplexity"] = math.exp(min(700, nats / len(text.split())))
    return fields | {"validation_bits_per_byte": nats / math.log(2) / len(text.encode())}


def validate(model, step, best, corpus, args):
    """Evaluate and record. The model of the lowest loss so far stands in model/; returns its step and figures."""
    fields = {"step": step} | evaluate(model, corpus, args)
    record(fields, args)
    if best and not fields["validation_loss"] < best["validation_loss"]:
        return best
    weights = full_weights(model)  # on all ranks: ZeRO-3 gathers them together
    if args.rank == 0:
        folder = Path(args.output_dir, "model")
        corpus.tokenizer.save_pretrained(folder)
        safetensors.torch.save_file(weights, folder / "model.safetensors", {"format": "pt"})
        shape = {name: getattr(args, name) for name in "n_layer n_head d_model block_size".split()}
        write_json(folder / "config.json", shape | {"vocab_size": corpus.vocab_size})
    return fields


def show_ledger(kinds, args):
    """Print and return the bytes of model states that rank 0 holds, beside the formulas of arXiv:1910.02054, 3.1."""
    tensors = [thing for thing in gc.get_objects() if type(thing) in (torch.Tensor, nn.Parameter)]
    tensors = [tensor for tensor in tensors if not (tensor.is_meta or torch._is_functional_tensor(tensor))]  # no bytes
    tensors += [tensor.grad for tensor in tensors if tensor.is_leaf and tensor.grad is not None]
    width = 4 if args.precision == "fp32" else 2  # below: bytes a parameter, and the stage that divides them by ranks
    formulas = {"parameters": (width, 3), "optimizer_states": (12, 1), "gradients_and_buckets": (width, 2)}
    ledger, counted = {}, set()
    for kind, (bytes_each, stage) in formulas.items():
        formula = bytes_each * args.n_params // (args.world_size if args.zero_stage >= stage else 1)
        for tensor in kinds.get(kind, tensors):  # all others: gradients, buckets, at stage 3 small weights left whole
            memory = tensor.untyped_storage()
            if tensor.is_floating_point() and memory.data_ptr() not in counted:
                counted.add(memory.data_ptr())
                row = ledger.setdefault(f"{kind} on {tensor.device.type}", {"held": 0, "formula": formula})
                row["held"] += memory.nbytes()
    for name, row in ledger.items():
        log(f"  {name}: rank 0 holds {row['held']:,} bytes, by the formula {row['formula']:,}")
    return ledger


def claim_output(args):
    """Lock --output_dir as long as this process lives. Refuse a run there, or delete it, as flags say."""
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    with explain(f"cannot lock {output}", "Wait for the run that holds it, or choose another --output_dir"):
        fcntl.lockf(os.open(output / ".lock", os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
    holds_run = (output / "args.json").exists()
    if holds_run and args.overwrite:
        shutil.rmtree(output / "checkpoints", ignore_errors=True)
        (output / "metrics.jsonl").unlink(missing_ok=True)
    elif holds_run and args.resume == "never":
        raise UserError(f"{output} holds a run: add --overwrite, or choose another --output_dir")


def check_settings(saved, args):
    now = vars(args)
    changed = [f"{name} {saved.get(name)}, now {now[name]}" for name in MUST_MATCH if saved.get(name) != now[name]]
    if changed:
        raise UserError(f"--output_dir holds a run with {'; '.join(changed)}. Take the former, or add --overwrite")


# region launch (owner: DeepSpeed-GPTLike-ZeRO-1.py)
def gather(value):
    """`value` of every rank, by rank, on all ranks; which is also where they wait for each other."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def start_distributed(args):
    """Join all ranks at MASTER_ADDR:MASTER_PORT, each with its GPU or with its share of the host's cores."""
    if "RANK" not in os.environ:  # plain `python SCRIPT.py`: one rank, at any free port
        os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    deepspeed.utils.set_log_level_from_string("warning")
    where = os.path.expandvars("RANK=$RANK WORLD_SIZE=$WORLD_SIZE MASTER_ADDR=$MASTER_ADDR MASTER_PORT=$MASTER_PORT")
    with explain(f"cannot join the other ranks, {where}", "Were all hosts started? Ask scripts/tools/network_check.py"):
        args.rank = int(os.environ["RANK"])
        args.local_rank = int(os.environ.setdefault("LOCAL_RANK", str(args.local_rank)))
        args.device, args.device_name = "cpu", "CPU"
        if torch.cuda.is_available():
            args.device, args.device_name = f"cuda:{args.local_rank}", torch.cuda.get_device_name(args.local_rank)
            torch.cuda.set_device(args.device)  # before anything is allocated, or every rank would fill GPU 0
        if os.environ.get("OMP_NUM_THREADS", "1") == "1":  # unset, or the 1 that torchrun sets
            ranks_here = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", 1)  # of which launcher
            torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // int(ranks_here)))
        # PyTorch would wait without end for the lock of a run that was killed while it loaded a C++ op.
        held = set(map(os.path.realpath, filter(os.path.exists, glob.glob("/proc/*/fd/*"))))
        for lock in Path.home().glob(".cache/torch_extensions/*/*/lock"):
            if str(lock.resolve()) not in held and time.time() - lock.stat().st_mtime > 3:  # younger: of another host?
                lock.unlink(missing_ok=True)
        deepspeed.init_distributed(auto_mpi_discovery=False, timeout=timedelta(seconds=args.timeout))
    args.world_size = dist.get_world_size()


# region ds-config (owner: DeepSpeed-GPTLike-ZeRO-1.py)
TOP_LEVEL_KEYS = """train_batch_size train_micro_batch_size_per_gpu gradient_accumulation_steps optimizer scheduler
    gradient_clipping bf16 fp16 data_types torch_autocast zero_optimization zero_allow_untested_optimizer
    zero_force_ds_cpu_optimizer activation_checkpointing checkpoint aio communication_data_type prescale_gradients
    gradient_predivide_factor sparse_gradients steps_per_print wall_clock_breakdown dump_state memory_breakdown
    flops_profiler comms_logger tensorboard wandb csv_monitor comet compile compression_training data_efficiency
    elasticity autotuning tensor_parallel timers log_level disable_python_gc""".split()
ADAMW = {"lr": 6e-4, "betas": [0.9, 0.95], "eps": 1e-8, "weight_decay": 0.1}
AUTO = {"train_micro_batch_size_per_gpu": 8, "gradient_accumulation_steps": 1, "reduce_bucket_size": 5_000_000}
AUTO |= {"stage3_prefetch_bucket_size": 10_000_000, "stage3_param_persistence_threshold": 100_000, "warmup_min_lr": 0}


def replace_auto(section, numbers):
    """Put numbers in the place of "auto", which transformers' Trainer would fill in."""
    for key, value in section.items():
        if isinstance(value, dict):
            replace_auto(value, numbers)
        elif value == "auto" and key in numbers:
            section[key] = numbers[key]


def load_ds_config(args):
    """DeepSpeed's settings: those of the JSON, but flags that were given win, and "auto" becomes a number."""
    source = f"--ds_config {args.ds_config}"
    with explain(f"{source} is not what this run can take"):
        in_json = hjson.loads(Path(args.ds_config).read_text(), object_pairs_hook=dict)  # comments are legal
        config = json.loads(json.dumps(in_json))
        micro, accumulation = "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"
        if args.batch_size or args.gradient_accumulation_steps or config.get("train_batch_size", "auto") == "auto":
            config.pop("train_batch_size", None)  # it follows from the others
            config[micro] = args.batch_size or config.get(micro, "auto")
            config[accumulation] = args.gradient_accumulation_steps or config.get(accumulation, "auto")
        for name in {"bf16", "fp16"} & {args.precision, *config}:
            section = config.setdefault(name, {})
            if args.precision or section.get("enabled") == "auto":
                section["enabled"] = name == (args.precision or "bf16")
        optimizer = config.setdefault("optimizer", {"type": "AdamW", "params": ADAMW})
        params = optimizer["params"] = {"lr": ADAMW["lr"], "weight_decay": 0.0} | optimizer.get("params", {})
        params |= {name: getattr(args, name) for name in ("lr", "weight_decay") if getattr(args, name) is not None}
        replace_auto(config, ADAMW | AUTO | {"gradient_clipping": 1.0, "warmup_num_steps": args.warmup_steps})
        settled = deepspeed.DeepSpeedConfig(config)  # knows the keys of sections, and the arithmetic of batches
    for key in config.keys() - TOP_LEVEL_KEYS:  # DeepSpeed would ignore it
        raise UserError(f"{source}: unknown key {key}; close: {difflib.get_close_matches(key, TOP_LEVEL_KEYS)}")
    for key, value in config.items():
        if value != in_json.get(key):
            log(f"{args.ds_config}: this run takes {key} {value} instead of {in_json.get(key)}")
    zero = settled.zero_config
    offloads = [place for place in (zero.offload_optimizer, zero.offload_param) if place and place.device != "none"]
    right = "Offload" if offloads else zero.stage
    if right != ZERO_STAGE:
        raise UserError(f"{source} is for DeepSpeed-GPTLike-ZeRO-{right}.py (stage 0: for GPTLike-Base.py, as flags)")
    args.zero_stage, args.batch_size = zero.stage, settled.train_micro_batch_size_per_gpu
    args.gradient_accumulation_steps = settled.gradient_accumulation_steps
    args.lr, args.weight_decay = params["lr"], params["weight_decay"]
    args.precision = "bf16" if settled.bfloat16_config.enabled else "fp16" if settled.float16_config.enabled else "fp32"
    if optimizer["type"].lower() in ("adam", "adamw") and not (offloads and shutil.which("c++")):
        # PyTorch's: DeepSpeed's own needs nvcc, and for offloading, where it is the faster one, a C++ compiler.
        params |= {"torch_adam": True, "fused": True}
    return config


# region checkpoints (owner: DeepSpeed-GPTLike-ZeRO-1.py)
def open_output(ds_config, args):
    """Claim --output_dir on each disk, and find out whether all hosts share the disk of rank 0."""
    probe = Path(args.output_dir, f".probe.{gather(os.urandom(8).hex())[0]}")
    if args.rank == 0:
        claim_output(args)
        probe.touch()
    gather(None)
    shared = gather(probe.exists())
    args.first_of_disk = args.rank == 0 or not (args.local_rank or shared[args.rank])
    if args.first_of_disk and args.rank:
        claim_output(args)
    if not all(shared):  # then DeepSpeed writes to each disk all that its ranks load
        ds_config.setdefault("checkpoint", {})["use_node_local_storage"] = True
    probe.unlink(missing_ok=True)


def load_checkpoint(engine, args):
    """Load the newest step of which every rank has its shard; returns its mark, which was written after all shards."""
    folder = Path(args.output_dir, "checkpoints")
    shards = sorted(path.parent.name for path in folder.glob(f"step*/*zero_pp_rank_{args.rank}_mp_rank_00_optim*"))
    marks = {path.parent.name: json.loads(path.read_text()) for path in folder.glob("step*/rank*.json")}
    found = gather((socket.gethostname(), shards, marks))
    marks = {tag: mark for _, _, theirs in found for tag, mark in theirs.items()}
    for mark in marks.values():
        check_settings(mark["settings"], args)
    if not marks:
        return {"step": 0, "best": None, "ledger": {}}
    whole = set(marks).intersection(*(theirs for _, theirs, _ in found))
    if not whole:
        held = [each[:2] for each in found]  # host and steps
        raise UserError(f"no step in {folder} is whole on every rank. By rank: {held}. Bring files back or --overwrite")
    tag = max(whole, key=lambda tag: marks[tag]["step"])
    with explain(f"cannot load {folder}/{tag}", "Without it the one before serves"):
        path, _ = engine.load_checkpoint(str(folder), tag=tag)  # the same on all ranks, not each host's `latest`
        assert path, "see DeepSpeed's warning above"
    log(f"resumed from step {marks[tag]['step']} of {args.output_dir}")
    return marks[tag]


def save_checkpoint(engine, mark, args):
    """All ranks save their shards of mark["step"]; then marks; then all but the two newest marked steps are deleted."""
    root, name = Path(args.output_dir, "checkpoints"), f"step{mark['step']}"
    if args.first_of_disk:
        shutil.rmtree(root / name, ignore_errors=True)  # what a killed run left of this very step
    gather(None)
    universal = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}  # ds_to_universal asks for it
    with explain(f"cannot save {root / name}", "The checkpoints before it are as they were"):
        engine.save_checkpoint(str(root), tag=name, client_state=universal, save_latest=False)
    gather(None)  # from here on the shards of all ranks are there
    write_json(root / name / f"rank{args.rank}.json", mark)
    gather(None)
    if args.first_of_disk:
        for old in sorted({int(path.parent.name[4:]) for path in root.glob("step*/rank*.json")})[:-2]:
            shutil.rmtree(root / f"step{old}", ignore_errors=True)


# endregion


def model_states(engine):
    # ZeRO-Offload: at stage 3 this rank keeps a piece of each weight, ds_tensor, at stage 2 the weight.
    weights = [getattr(weight, "ds_tensor", weight) for weight in engine.parameters()]
    # ZeRO-Offload: basic_optimizer is the Adam that ZeRO wraps: the one name that leads to it at all stages.
    # Its state's keys are this rank's fp32 share of the weights, the values their moments.
    states = engine.basic_optimizer.state
    moments = [value for state in states.values() for value in state.values() if torch.is_tensor(value)]
    return {"parameters": weights, "optimizer_states": list(states) + moments}


def full_weights(engine):
    whole = {}
    for name, weight in engine.module.named_parameters():
        # ZeRO-Offload: at stage 3 the pieces are gathered, from wherever they lie; at stage 2 this does nothing.
        with deepspeed.zero.GatheredParameters([weight], enabled=hasattr(weight, "ds_id")):
            if dist.get_rank() == 0:
                whole[name] = weight.detach().cpu().clone()
    return whole


def check_offload(zero, path):
    # ZeRO-Offload: DeepSpeed would ignore the first in silence and end in a traceback at the second.
    for name in ("offload_optimizer", "offload_param"):
        section = zero.get(name) or {}
        device = section.get("device", "none")
        if zero["stage"] < 3 and (device == "nvme" or (name == "offload_param" and device != "none")):
            raise UserError(f"--ds_config {path}: stage 2 offloads the optimizer to the CPU, all else needs stage 3")
        if device == "nvme" and not os.path.isdir(str(section.get("nvme_path"))):
            raise UserError(f"--ds_config {path}: {name}.nvme_path {section.get('nvme_path')} is no folder")


def build_engine(args, vocab_size, ds_config):
    """The model in an engine that owns optimizer, precision, clipping, accumulation and the ranks' communication."""
    schedule = functools.partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: lr_factor(step, args))
    with explain(f"DeepSpeed cannot run {args.ds_config} here, with its optimizer {ds_config['optimizer']}"):
        # ZeRO-Offload: at stage 3 each weight goes to its place in host memory or on NVMe as soon as it is built.
        with deepspeed.zero.Init(config_dict_or_path=ds_config, enabled=args.zero_stage == 3):
            model = GPTLike(args, vocab_size)
        engine, *_ = deepspeed.initialize(
            model=model,
            model_parameters=parameter_groups(model),
            lr_scheduler=None if "scheduler" in ds_config else schedule,
            config=ds_config,
        )
    # DeepSpeed's own group of all ranks would wait as long as PyTorch's default says, 10 or 30 minutes.
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=args.timeout), engine.data_parallel_group)
    if args.compile:
        engine.compile()
    return engine


def main():
    args = parse_args()
    start_distributed(args)
    ds_config = load_ds_config(args)
    check_offload(ds_config["zero_optimization"], args.ds_config)
    torch.zeros(1).exp()  # by one thread: of two that make MKL's first call at once, one may be 1e-4 off
    corpus = load_corpus(args)
    blocks = corpus.streams["train"].unfold(0, args.block_size + 1, args.block_size)
    global_batch = args.batch_size * args.gradient_accumulation_steps * args.world_size
    args.max_steps = args.max_steps or math.ceil(args.epochs * len(blocks) / global_batch)
    replace_auto(ds_config, {"total_num_steps": args.max_steps, "warmup_max_lr": args.lr})
    open_output(ds_config, args)

    engine = build_engine(args, corpus.vocab_size, ds_config)
    # ZeRO-Offload: ds_numel is the size of a weight that stage 3 has partitioned.
    args.n_params = sum(getattr(weight, "ds_numel", weight.numel()) for weight in engine.parameters())
    show_start(corpus, args)

    mark, output = load_checkpoint(engine, args), Path(args.output_dir)
    start, best, ledger = mark["step"], mark["best"], mark["ledger"]
    # ZeRO-Offload: DeepSpeed reads swapped weights back, but neither Adam's moments nor weights too small to swap.
    if ds_config["zero_optimization"].get("offload_optimizer", {}).get("device") == "nvme":
        log("optimizer states on NVMe: DeepSpeed cannot resume such a run, a kill costs all of it")
        if 0 < start < args.max_steps:
            raise UserError(f"{output} stopped at step {start}: add --overwrite, or choose another --output_dir")
    if args.first_of_disk:
        write_json(output / "args.json", vars(args))
        write_json(output / "ds_config.json", ds_config)
        shutil.copy(__file__, output)

    caught = []
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, frame: caught.append(number))
    step, clock_step, clock = start, start, time.perf_counter()
    steps = range(start + 1, args.max_steps + 1)
    for step in tqdm(steps, initial=start, total=args.max_steps, disable=args.rank or None):  # None: on a terminal
        torch.manual_seed((args.seed * 1_000_003 + step - 1) * 4_099 + args.rank)  # dropout: the same after a resume
        loss, lr = torch.zeros((), device=args.device), engine.get_lr()[0]
        for inputs, targets in micro_batches(blocks, step - 1, args):
            micro_loss = engine(inputs, targets)
            engine.backward(micro_loss)  # divides by the accumulation, and averages over ranks
            loss += micro_loss.detach() / args.gradient_accumulation_steps
            if step > 1 and not ledger and engine.is_gradient_accumulation_boundary():  # step 1 makes Adam's states
                ledger = show_ledger(model_states(engine), args)
            engine.step()  # after the last micro batch: clip, step, clear gradients; before that it only counts

        intervals = args.log_interval, args.eval_interval, args.save_interval
        log_due, eval_due, save_due = [step == args.max_steps or (i and step % i == 0) for i in intervals]
        if not (log_due or eval_due or save_due):
            continue
        loss, stopping = average_and_check(loss, engine.get_global_grad_norm() or 0.0, caught, args)
        rate = global_batch * args.block_size * (step - clock_step) / (time.perf_counter() - clock)
        peak = torch.cuda.max_memory_allocated() or getrusage(RUSAGE_SELF).ru_maxrss * 1024  # a GPU's, or a process's
        record({"step": step, "loss": loss, "lr": lr, "tokens_per_second": rate, "peak_memory_gib": peak / 2**30}, args)
        if eval_due:
            best = validate(engine, step, best, corpus, args)
        if save_due or stopping:
            save_checkpoint(engine, {"step": step, "best": best, "ledger": ledger, "settings": vars(args)}, args)
        if stopping:
            log(f"stopped by a signal: step {step} is saved, the same command continues")
            os._exit(128 + (caught or [signal.SIGTERM])[0])  # it may be another rank that caught one
        clock_step, clock = step, time.perf_counter()
    if args.rank == 0:
        write_json(output / "summary.json", {"steps": step, "best": best, "ledger": ledger})
    log(f"finished: see {output}/summary.json and {output}/model")
    dist.destroy_process_group()


if __name__ == "__main__":
    report_to_torchrun(run)(main)  # then torchrun's last words name the rank that failed first
