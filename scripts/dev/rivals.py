"""Other ways to train the same GPT, for scripts/dev/benchmark.py to compare the six scripts with, on the CPU.

    python scripts/dev/rivals.py nanogpt --dataset sample --max_steps 20 --output_dir runs/nanogpt
    torchrun --nproc_per_node 2 scripts/dev/rivals.py ddp --dataset sample --max_steps 20 --output_dir runs/ddp

nanogpt    the model and step of https://github.com/karpathy/nanoGPT: dropout in the attention too, no biases, fp32
           weights under autocast, AdamW that is not fused on a CPU
original   what the tutorial's first scripts do: nn.MultiheadAttention with a boolean mask, fp32, unfused AdamW, no
           clipping, loss.item() twice each micro batch
ddp        GPTLike-Base.py's model and optimizer in DistributedDataParallel
trainer    transformers' Trainer: examples/with_trainer.py on --ds_config, but for its batch and precision

The flags are GPTLike-Base.py's, and so are the data: all read the same tokens in the same order and leave the same
metrics.jsonl. A rival does not validate, saves nothing and is not resumed.
"""

import argparse
import copy
import functools
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from common import ROOT, load_script

base = load_script("GPTLike-Base.py")


class NanoBlock(nn.Module):
    """No biases, and dropout on the attention weights, on the CPU at the price of the fused kernel."""

    def __init__(self, args: argparse.Namespace):
        super().__init__()
        width, self.n_head, self.dropout = args.d_model, args.n_head, nn.Dropout(args.dropout)
        self.norm1, self.norm2 = nn.LayerNorm(width, bias=False), nn.LayerNorm(width, bias=False)
        self.qkv, self.attended = nn.Linear(width, 3 * width, bias=False), nn.Linear(width, width, bias=False)
        up, down = nn.Linear(width, 4 * width, bias=False), nn.Linear(4 * width, width, bias=False)
        self.feed_forward = nn.Sequential(up, nn.GELU(), down, self.dropout)

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, d_model)
        parts = self.qkv(self.norm1(x)).chunk(3, dim=-1)
        heads = [part.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for part in parts]
        rate = self.dropout.p if self.training else 0.0
        mixed = F.scaled_dot_product_attention(*heads, dropout_p=rate, is_causal=True)  # (batch, n_head, seq, head_dim)
        x = x + self.dropout(self.attended(mixed.transpose(1, 2).flatten(2)))
        return x + self.feed_forward(self.norm2(x))


class OriginalBlock(nn.Module):
    def __init__(self, args: argparse.Namespace):
        super().__init__()
        width = args.d_model
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = nn.MultiheadAttention(width, args.n_head, dropout=args.dropout, batch_first=True)
        up, down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.feed_forward = nn.Sequential(up, nn.GELU(), down, nn.Dropout(args.dropout))

    def forward(self, x: Tensor) -> Tensor:  # (batch, seq, d_model)
        ahead = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)  # True: not to be seen
        normed = self.norm1(x)
        x = x + self.attention(normed, normed, normed, attn_mask=ahead, need_weights=False)[0]
        return x + self.feed_forward(self.norm2(x))


class RivalGPT(nn.Module):
    """Blocks of one kind between a tied embedding and head. Weights are fp32; under autocast the matmuls are bf16."""

    def __init__(self, args: argparse.Namespace, vocab_size: int, block: type[nn.Module]):
        super().__init__()
        self.autocast = args.precision == "bf16"
        self.tokens = nn.Embedding(-(-vocab_size // 64) * 64, args.d_model)
        self.positions = nn.Embedding(args.block_size, args.d_model)
        self.dropout = nn.Dropout(args.dropout)
        self.blocks = nn.ModuleList(block(args) for _ in range(args.n_layer))
        self.final_norm = nn.LayerNorm(args.d_model, bias=block is OriginalBlock)
        for weight in self.parameters():
            if weight.dim() > 1:
                nn.init.normal_(weight, std=0.02)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:  # both (batch, seq)
        with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
            x = self.dropout(self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1])))
            for block in self.blocks:
                x = block(x)  # (batch, seq, d_model)
            logits = F.linear(self.final_norm(x), self.tokens.weight)  # (batch, seq, rows)
            return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class NanoGPT:
    def __init__(self, args: argparse.Namespace, vocab_size: int):
        self.args, self.model = args, RivalGPT(args, vocab_size, NanoBlock)
        groups = base.parameter_groups(self.model)
        self.optimizer = torch.optim.AdamW(groups, betas=base.BETAS, weight_decay=args.weight_decay)

    def take_step(self, step: int, batches: Iterator) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * base.lr_factor(step, self.args)
        for inputs, targets in batches:
            loss = self.model(inputs, targets) / self.args.gradient_accumulation_steps
            loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item() * self.args.gradient_accumulation_steps  # as nanoGPT logs it: of the last micro batch


class Original:
    def __init__(self, args: argparse.Namespace, vocab_size: int):
        self.args, self.model = args, RivalGPT(args, vocab_size, OriginalBlock)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=args.lr, weight_decay=args.weight_decay)

    def take_step(self, step: int, batches: Iterator) -> float:
        total = 0.0
        for inputs, targets in batches:
            loss = self.model(inputs, targets) / self.args.gradient_accumulation_steps
            loss.backward()
            total += loss.item()
            self.shown = loss.item()  # a second time, for the progress bar
        self.optimizer.step()
        self.optimizer.zero_grad()
        return total


class DataParallel:
    """Base's model and optimizer, and the gradients averaged while the backward pass goes on."""

    def __init__(self, args: argparse.Namespace, vocab_size: int):
        dist.init_process_group("gloo")
        model = base.GPTLike(args, vocab_size).to(torch.bfloat16 if args.precision == "bf16" else None)
        self.masters = copy.deepcopy(model).float()
        groups = base.parameter_groups(self.masters)
        self.optimizer = torch.optim.AdamW(groups, betas=base.BETAS, weight_decay=args.weight_decay, fused=True)
        self.args, self.model, self.ddp = args, model, nn.parallel.DistributedDataParallel(model)

    def take_step(self, step: int, batches: Iterator) -> float:
        total = torch.zeros(())
        for inputs, targets in batches:
            loss = self.ddp(inputs, targets) / self.args.gradient_accumulation_steps
            loss.backward()
            total += loss.detach()
        for weight, master in zip(self.model.parameters(), self.masters.parameters(), strict=True):
            master.grad = weight.grad.float()
        nn.utils.clip_grad_norm_(self.masters.parameters(), base.GRADIENT_CLIPPING)
        for group in self.optimizer.param_groups:
            group["lr"] = self.args.lr * base.lr_factor(step, self.args)
        self.optimizer.step()
        self.model.load_state_dict(self.masters.state_dict())
        self.optimizer.zero_grad()
        self.model.zero_grad()
        dist.all_reduce(total)
        return total.item() / self.args.world_size


def record_step(step: int, loss: float, seconds: float, args: argparse.Namespace) -> None:
    tokens = args.batch_size * args.gradient_accumulation_steps * args.world_size * args.block_size
    peak = base.getrusage(base.RUSAGE_SELF).ru_maxrss / 2**20
    fields = {"step": step, "loss": loss, "tokens_per_second": tokens / seconds, "peak_memory_gib": peak}
    base.record(fields, args)


def train(kind: type, args: argparse.Namespace) -> None:
    corpus = base.load_corpus(argparse.Namespace(**vars(args) | {"rank": 0}))  # each rank trains its own bpe:SIZE
    blocks = corpus.streams["train"].unfold(0, args.block_size + 1, args.block_size)
    torch.manual_seed(args.seed)
    rival = kind(args, corpus.vocab_size)
    for step in range(args.max_steps):
        start = time.perf_counter()
        loss = rival.take_step(step, base.micro_batches(blocks, step, args))
        record_step(step + 1, loss, time.perf_counter() - start, args)


def train_with_trainer(args: argparse.Namespace) -> None:
    sys.path.append(str(ROOT / "examples"))
    import with_trainer
    from shared import read_config
    from transformers import Trainer, TrainerCallback

    class Recorder(TrainerCallback):
        """Times from log to log, which is from step to step."""

        def on_train_begin(self, options, state, control, **_) -> None:
            self.clock = time.perf_counter()

        def on_log(self, options, state, control, logs: dict, **_) -> None:
            if "loss" in logs and state.is_world_process_zero:
                record_step(state.global_step, float(logs["loss"]), time.perf_counter() - self.clock, args)
                self.clock = time.perf_counter()

    args.ds_config = config = read_config(args.ds_config)
    config["train_micro_batch_size_per_gpu"] = args.batch_size
    config["gradient_accumulation_steps"] = args.gradient_accumulation_steps
    config["bf16"]["enabled"] = args.precision == "bf16"
    with_trainer.Trainer = functools.partial(Trainer, callbacks=[Recorder()])
    with_trainer.main(args, config)


KINDS = {"nanogpt": NanoGPT, "original": Original, "ddp": DataParallel}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], epilog="All other flags: GPTLike-Base.py's.")
    parser.add_argument("rival", choices=[*KINDS, "trainer"], help="what to train")
    parser.add_argument("--ds_config", default=str(ROOT / "configs/zero2.json"), help="DeepSpeed's JSON, for trainer")
    own, words = parser.parse_known_args()
    args = base.parse_args(["--output_dir", "runs/rival", "--max_steps", "20", *words])
    args.rival, args.ds_config = own.rival, own.ds_config
    if args.precision == "fp16" or (args.rival == "original" and args.precision != "fp32"):
        parser.error(f"{args.rival} does not train in {args.precision} on a CPU: add --precision fp32")
    if args.rival in ("ddp", "trainer") and "RANK" not in os.environ:
        parser.error(f"{args.rival} wants ranks: torchrun --nproc_per_node 2 {parser.prog} {args.rival} ...")
    args.rank, args.world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    return args


def main() -> None:
    args = parse_args()
    output = Path(args.output_dir)
    output.mkdir(parents=True, exist_ok=True)
    if args.rank == 0:
        (output / "metrics.jsonl").unlink(missing_ok=True)
    torch.zeros(1).exp()  # as in the scripts: MKL's first call by one thread
    if args.rival == "trainer":
        train_with_trainer(args)
    else:
        train(KINDS[args.rival], args)


if __name__ == "__main__":
    base.run(main)
