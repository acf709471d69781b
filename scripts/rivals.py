"""Other ways to train the same GPT, for scripts/benchmark.py and scripts/quality.py to compare the six scripts with.

    python scripts/rivals.py nanogpt --dataset sample --max_steps 20 --output_dir runs/nanogpt
    torchrun --nproc_per_node 2 scripts/rivals.py ddp --dataset sample --max_steps 20 --output_dir runs/ddp

nanogpt    nanoGPT's model and step: dropout in the attention too, full logits, fp32 weights under autocast, and AdamW
           that is not fused on a CPU
original   what the tutorial's first scripts do: nn.MultiheadAttention with a boolean mask, full logits, fp32, unfused
           AdamW, no clipping, loss.item() twice each micro step
ddp        GPTLike-Base.py's model and step in DistributedDataParallel
trainer    transformers' Trainer with its GPT-2 and --ds_config, on as many ranks as are started
link       no rival: what the ranks' all-reduce sends a second, in DeepSpeed's way, for the planner's prediction

On the CPU. The flags are GPTLike-Base.py's, and so is the loop (Trainer has its own): all read the same tokens in the
same order and leave the same metrics.jsonl, and a summary.json. A rival saves no weights and is not resumed.

Sources: https://github.com/karpathy/nanoGPT (model.py, train.py); https://huggingface.co/docs/transformers/deepspeed
"""

import argparse
import importlib.util
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from types import ModuleType

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
RIVALS = ("nanogpt", "original", "ddp", "trainer", "link")


def load_script(name: str) -> ModuleType:
    """A script of the root as a module; importing it has no side effect."""
    spec = importlib.util.spec_from_file_location(Path(name).stem.replace("-", "_"), ROOT / name)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


base = load_script("GPTLike-Base.py")


def padded(vocab_size: int) -> int:
    return -(-vocab_size // 64) * 64


class NanoBlock(nn.Module):
    """No biases anywhere, and dropout on the attention weights, on the CPU at the price of the fused kernel."""

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        width, self.n_head, self.rate = args.d_model, args.n_head, args.dropout
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.attended = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.dropout = nn.Dropout(args.dropout)

    def attention(self, x: torch.Tensor) -> torch.Tensor:  # (batch, seq, d_model)
        heads = [part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, dim=-1)]
        rate = self.rate if self.training else 0.0
        mixed = F.scaled_dot_product_attention(*heads, dropout_p=rate, is_causal=True)  # (batch, n_head, seq, head_dim)
        return self.dropout(self.attended(mixed.transpose(1, 2).flatten(2)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, seq, d_model)
        x = x + self.attention(self.norm1(x))
        return x + self.dropout(self.down(F.gelu(self.up(self.norm2(x)))))


class OriginalBlock(nn.Module):
    def __init__(self, args: argparse.Namespace):
        super().__init__()
        width = args.d_model
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, args.n_head, dropout=args.dropout, batch_first=True)
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.feed_forward = nn.Sequential(up, nn.GELU(), down, nn.Dropout(args.dropout))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (batch, seq, d_model)
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).triu(1)  # True: not to be seen
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, attn_mask=ahead, need_weights=False)[0]
        return x + self.feed_forward(self.norm2(x))


class RivalGPT(nn.Module):
    """Blocks of one kind between a tied embedding and head. Weights are fp32; with autocast the matmuls are bf16."""

    def __init__(self, args: argparse.Namespace, vocab_size: int, block: type[nn.Module]):
        super().__init__()
        biased, self.autocast = block is OriginalBlock, args.precision == "bf16"
        self.tokens = nn.Embedding(padded(vocab_size), args.d_model)
        self.positions = nn.Embedding(args.block_size, args.d_model)
        self.dropout = nn.Dropout(args.dropout)
        self.blocks = nn.ModuleList(block(args) for _ in range(args.n_layer))
        self.final_norm = nn.LayerNorm(args.d_model, bias=biased)
        for name, weight in self.named_parameters():
            if weight.dim() > 1:
                residual = block is NanoBlock and name.endswith(("attended.weight", "down.weight"))
                nn.init.normal_(weight, std=0.02 / ((2 * args.n_layer) ** 0.5 if residual else 1))

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (batch, seq, vocab), or with targets (batch, seq) their mean loss. tokens: (batch, seq)."""
        with torch.autocast(tokens.device.type, torch.bfloat16, enabled=self.autocast):
            positions = torch.arange(tokens.shape[1], device=tokens.device)
            x = self.dropout(self.tokens(tokens) + self.positions(positions))  # (batch, seq, d_model)
            for block in self.blocks:
                x = block(x)
            logits = F.linear(self.final_norm(x), self.tokens.weight)
            return logits if targets is None else F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Unsaved:
    def save(self, folder: Path) -> None:
        """Nothing: a rival is measured, not used."""


class NanoRun(Unsaved, base.PlainRun):
    """nanoGPT's step: clipping, AdamW that is not fused on a CPU, linear warm-up and cosine decay to a tenth."""

    def __init__(self, args: argparse.Namespace, corpus):
        model = RivalGPT(args, corpus.vocab_size, NanoBlock)
        super().__init__(model, argparse.Namespace(**vars(args) | {"precision": "fp32"}))  # no copies of weights
        self.stream = corpus.streams["train"]
        matrices, norms = ([weight for weight in self.weights if (weight.dim() > 1) == many] for many in (True, False))
        groups = [{"params": matrices}, {"params": norms, "weight_decay": 0.0}]
        options = {"lr": args.lr, "betas": (0.9, args.beta2), "weight_decay": args.weight_decay}
        self.optimizer = torch.optim.AdamW(groups, **options)
        self.scheduler = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: base.lr_factor(step, args))

    def crops(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Inputs and targets at random places of the stream, with replacement: nanoGPT knows no epochs."""
        length = self.args.block_size + 1
        starts = torch.randint(len(self.stream) - length, (self.args.batch_size,))
        blocks = torch.stack([self.stream[start : start + length].long() for start in starts])
        return blocks[:, :-1], blocks[:, 1:]

    def forward_backward(self, batches: Iterator) -> torch.Tensor:
        return super().forward_backward((self.crops() for _ in batches) if self.args.random_crops else batches)

    def update(self) -> None:
        self.norm = nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.scheduler.step()
        self.optimizer.zero_grad()


class OriginalRun(Unsaved, base.PlainRun):
    def __init__(self, args: argparse.Namespace, corpus):
        super().__init__(RivalGPT(args, corpus.vocab_size, OriginalBlock), args)
        self.optimizer = torch.optim.AdamW(self.weights, lr=args.lr, weight_decay=args.weight_decay)
        self.norm, self.shown = torch.zeros(()), 0.0

    def forward_backward(self, batches: Iterator) -> torch.Tensor:
        total = 0.0
        for inputs, targets in batches:
            loss = self.forward(inputs, targets) / self.args.gradient_accumulation_steps
            loss.backward()
            total += loss.item()  # once for the mean, and once more for the progress bar
            self.shown = loss.item()
        return torch.tensor(total)

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()


class DataParallelRun(Unsaved, base.PlainRun):
    """Base's own step; DistributedDataParallel averages the gradients while the backward pass goes on."""

    def __init__(self, args: argparse.Namespace, corpus):
        base.prepare_cpu()
        dtype = {"bf16": torch.bfloat16, "fp32": torch.float32}[args.precision]
        model = base.GPTLike(args, corpus.vocab_size).to(dtype)
        super().__init__(nn.parallel.DistributedDataParallel(model), args)


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    dist.all_reduce(tensor)
    return tensor


def join_ranks() -> None:
    """Let Base's loop, which is made for one process, run on several."""
    dist.init_process_group("gloo")
    base.rank, base.world_size, base.sum_over_ranks = dist.get_rank, dist.get_world_size, sum_over_ranks
    base.local_rank = lambda: int(os.environ["LOCAL_RANK"])
    if dist.get_rank() > 0:
        base.log = lambda message: None


def train_in_base_loop(args: argparse.Namespace, corpus) -> None:
    """Leaves metrics.jsonl, and in summary.json the losses of all splits but train."""
    device, kinds = torch.device("cpu"), {"nanogpt": NanoRun, "original": OriginalRun, "ddp": DataParallelRun}
    run = kinds[args.rival](args, corpus)
    base.show_start(run, corpus, args, device)
    base.train(run, corpus, args, device)
    final = {}
    for split in sorted(corpus.streams.keys() - {"train"}):
        final |= base.evaluate(run.model, corpus, split, args, device)
    base.record({"step": run.step} | final, args)
    write_summary(args, {"parameters": run.num_params} | final)


def trainer_arguments(args: argparse.Namespace) -> dict:
    """What TrainingArguments takes: the JSON as it is, but for the flags, and nothing that contradicts it.

    Raises UserError where the JSON cannot be read or lacks a key.
    """
    try:
        config = json.loads(Path(args.ds_config).read_text(encoding="utf-8"))
        params = config["optimizer"]["params"]
        params |= {"torch_adam": True, "fused": True}  # the Adam that the scripts take, too
        config["train_micro_batch_size_per_gpu"] = args.batch_size
        config["bf16"]["enabled"] = args.precision == "bf16"
        return {
            "deepspeed": config, "learning_rate": params["lr"], "weight_decay": params["weight_decay"],
            "adam_beta1": params["betas"][0], "adam_beta2": params["betas"][1], "adam_epsilon": params["eps"],
            "max_grad_norm": config["gradient_clipping"], "bf16": args.precision == "bf16",
            "per_device_train_batch_size": args.batch_size, "warmup_steps": args.warmup_steps,
            "gradient_accumulation_steps": config["gradient_accumulation_steps"],
        }  # fmt: skip
    except (OSError, ValueError) as error:
        raise base.UserError(f"--ds_config {args.ds_config} is not a JSON file: {error}") from error
    except (KeyError, TypeError) as error:
        raise base.UserError(f"--ds_config {args.ds_config} has no {error}: take one of configs/") from error


def train_with_trainer(args: argparse.Namespace, corpus) -> None:
    """Leaves metrics.jsonl, with the time from log to log, and summary.json."""
    import transformers

    class Blocks(torch.utils.data.Dataset):
        data = base.TokenizedDataset(corpus.streams["train"], args.block_size)

        def __len__(self) -> int:
            return len(self.data)

        def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
            return dict.fromkeys(("input_ids", "labels"), self.data[index][0])  # the model shifts the labels itself

    class Recorder(transformers.TrainerCallback):
        def on_step_begin(self, options, state, control, **_) -> None:
            self.clock = getattr(self, "clock", time.perf_counter())

        def on_log(self, options, state, control, logs: dict, **_) -> None:
            if "loss" in logs and state.is_world_process_zero:
                now = time.perf_counter()
                tokens = options.train_batch_size * options.gradient_accumulation_steps * options.world_size
                rate, self.clock = tokens * args.block_size / (now - self.clock), now
                fields = {"step": state.global_step, "loss": logs["loss"], "lr": logs["learning_rate"]}
                peak = base.peak_memory_gib(torch.device("cpu"))
                base.record(fields | {"tokens_per_second": rate, "peak_memory_gib": peak}, args)

    shape = {"n_layer": args.n_layer, "n_head": args.n_head, "n_embd": args.d_model, "n_positions": args.block_size}
    shape |= {"vocab_size": padded(corpus.vocab_size), "bos_token_id": 0, "eos_token_id": 0}
    dropout = dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), args.dropout)
    quiet = {"report_to": "none", "save_strategy": "no", "logging_steps": 1, "disable_tqdm": True, "use_cpu": True}
    options = transformers.TrainingArguments(args.output_dir, max_steps=args.max_steps, seed=args.seed, **quiet,
                                             **trainer_arguments(args))  # fmt: skip
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape, **dropout))
    parameters = model.num_parameters()
    transformers.Trainer(model, options, train_dataset=Blocks(), callbacks=[Recorder()]).train()
    write_summary(args, {"parameters": parameters})


def measure_link(args: argparse.Namespace) -> None:
    """Leaves summary.json with the 10**9 bytes a second that a rank sends while a bucket of configs/ is reduced."""
    import deepspeed

    deepspeed.init_distributed("gloo")
    bucket, seconds = torch.ones(5_000_000, dtype=torch.bfloat16), []
    for _ in range(10):
        dist.barrier()
        start = time.perf_counter()
        deepspeed.comm.all_reduce(bucket)
        seconds.append(time.perf_counter() - start)
        bucket.fill_(1)
    share = 2 * (dist.get_world_size() - 1) / dist.get_world_size()  # of its bytes a ring sends on
    write_summary(args, {"link_gb_s": share * bucket.nbytes / median(seconds) / 1e9})


def write_summary(args: argparse.Namespace, fields: dict) -> None:
    if base.rank() == 0:
        base.write(Path(args.output_dir, "summary.json"), fields)


def build_parser() -> argparse.ArgumentParser:
    parser = base.build_parser()
    parser.prog, parser.description = Path(__file__).name, __doc__.splitlines()[0]
    parser.add_argument("rival", choices=RIVALS, help="what to train")
    parser.add_argument("--ds_config", default=str(ROOT / "configs/zero2.json"), help="DeepSpeed's JSON, for trainer")
    parser.add_argument("--beta2", type=float, default=0.95, help="of nanogpt's AdamW")
    parser.add_argument("--random_crops", action="store_true", help="nanogpt's own sampling: random places, no epochs")
    parser.set_defaults(**base.DEFAULTS, output_dir="runs/rival")
    return parser


def train(args: argparse.Namespace, output: Path) -> None:
    corpus = base.load_corpus(args)
    base.set_max_steps(args, corpus)
    if base.rank() == 0:
        (output / "metrics.jsonl").unlink(missing_ok=True)
        base.write(output / "args.json", vars(args))
    torch.manual_seed(args.seed)
    train_with_trainer(args, corpus) if args.rival == "trainer" else train_in_base_loop(args, corpus)


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    base.check_args(parser, args)
    if args.rival == "original" and args.precision != "fp32":
        parser.error("original trains in fp32: add --precision fp32")
    if args.precision == "fp16":
        parser.error("--precision fp16 does not run on a CPU: take bf16 or fp32")
    if args.rival in ("ddp", "trainer", "link") and "RANK" not in os.environ:
        parser.error(f"{args.rival} wants ranks: torchrun --nproc_per_node 2 scripts/rivals.py {args.rival} ...")
    args.zero_stage, args.shared_disk, args.hosts = 0, True, [socket.gethostname()]
    if args.rival == "ddp":
        join_ranks()
    elif os.environ.get("RANK", "0") != "0":
        base.rank, base.log = lambda: int(os.environ["RANK"]), lambda message: None
    try:
        output = Path(args.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        measure_link(args) if args.rival == "link" else train(args, output)
    except (OSError, base.UserError) as error:
        sys.exit(f"rivals.py: error: {error}" if base.rank() == 0 else 1)
    if dist.is_initialized():
        dist.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # gloo's threads, which DistributedDataParallel keeps, now and then abort an interpreter's own end


if __name__ == "__main__":
    main()
