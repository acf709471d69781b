"""What the examples share: flags, and the scripts' model, samples and learning rate before the first step.

The model starts from the scripts' weights and sees at each step their samples, so that its losses can be laid beside
theirs. Everything comes from GPTLike-Base.py; batch, optimizer and precision come from the JSON.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.append(str(Path(__file__).resolve().parents[1] / "scripts" / "tools"))
from common import ROOT, cpu_default, load_script
from export_hf import to_gpt2 as to_gpt2  # for with_trainer.py

cpu_default()
base = load_script("GPTLike-Base.py")
zero = load_script("DeepSpeed-GPTLike-ZeRO-Offload.py")  # at every stage it finds what a rank holds
DEFAULTS = {"dataset": "wikitext2", "tokenizer": "auto", "n_layer": 6, "n_head": 12, "d_model": 768, "block_size": 256}
DEFAULTS |= {"dropout": 0.1, "max_steps": 100, "seed": 42, "local_rank": 0}
FIXED = {"warmup_steps": 20, "activation_checkpointing": False, "timeout": 600}  # as the scripts' defaults
WANTED = {"train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping", "bf16", "optimizer"}
WANTED |= {"zero_optimization"}
ADAM = {"lr", "betas", "eps", "weight_decay"}
RANK = int(os.environ.get("RANK", 0))
RANKS = int(os.environ.get("WORLD_SIZE", 1))
RANKS_HERE = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # on this host


class Samples(torch.utils.data.Dataset):
    """All samples of the run, in the scripts' order: those of step k are those that the scripts give to step k."""

    def __init__(self, data: torch.utils.data.Dataset, num_samples: int, seed: int):
        self.data, self.num_samples, self.seed = data, num_samples, seed

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, sample: int) -> tuple[Tensor, Tensor]:  # each (block_size,)
        epoch, place = divmod(sample, len(self.data))
        block = base.epoch_order(epoch, len(self.data), self.seed)[place]
        return self.data[block, :-1].long(), self.data[block, 1:].long()  # the framework moves them


def read_config(path: str) -> dict:
    """The JSON's settings, with PyTorch's Adam. UserError where it lacks one that the examples pass on."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        missing = (WANTED - config.keys()) | (ADAM - config.get("optimizer", {}).get("params", {}).keys())
    except (OSError, ValueError, AttributeError) as error:
        raise base.UserError(f"--ds_config {path} holds no settings: {error}") from error
    if missing:
        raise base.UserError(f"--ds_config {path} has no {', '.join(sorted(missing))}: take a file of configs/")
    offloads = config["zero_optimization"].keys() & {"offload_optimizer", "offload_param"}
    if config["optimizer"]["type"] in ("Adam", "AdamW") and not offloads:
        config["optimizer"]["params"] |= {"torch_adam": True, "fused": True}  # DeepSpeed's needs nvcc
    return config


def prepare(args: argparse.Namespace, config: dict) -> tuple[torch.nn.Module, Samples]:
    """The scripts' model with their first weights, and the samples of the whole run."""
    args.rank = 0  # each rank trains its own bpe:SIZE: GPTLike-Base.py knows no other ranks
    corpus = base.load_corpus(args)
    data = corpus.streams["train"].unfold(0, args.block_size + 1, args.block_size)
    global_batch = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * RANKS
    args.rank, args.world_size = RANK, RANKS
    args.batch_size = config["train_micro_batch_size_per_gpu"]
    args.gradient_accumulation_steps = config["gradient_accumulation_steps"]
    torch.manual_seed(args.seed)
    return base.GPTLike(args, corpus.vocab_size), Samples(data, args.max_steps * global_batch, args.seed)


def start_ranks(args: argparse.Namespace, config: dict, highest_stage: int = 3, why: str = "") -> None:
    """The ranks meet, each with its device, as in the ZeRO scripts. UserError: not so, or a stage above the highest."""
    if config["zero_optimization"].get("stage", 0) > highest_stage:
        raise base.UserError(f"--ds_config {args.ds_config}: {why}; take a JSON of stage {highest_stage} or below")
    try:
        zero.start_distributed(args)
    except zero.UserError as error:
        raise base.UserError(str(error)) from error


def must_divide(name: str, args: argparse.Namespace, **numbers: int) -> None:
    """UserError where the flag of that name does not divide one of the numbers."""
    flag = getattr(args, name)
    for what, number in numbers.items():
        if flag < 1 or number % flag:
            raise base.UserError(f"--{name} {flag} does not divide {what} {number}")


def schedule(args: argparse.Namespace) -> Callable:
    """The scripts' warm-up and decay, as deepspeed.initialize takes it."""
    return lambda optimizer: torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: base.lr_factor(step, args))


def mean_over_ranks(values: Tensor) -> Tensor:
    torch.distributed.all_reduce(values)
    return values / RANKS


def show_held(place: str, engine: torch.nn.Module) -> None:
    """A line for each rank: the bytes of its parameters, and of its optimizer's fp32 weights and moments."""
    sizes = {}
    for kind, tensors in zero.model_states(engine).items():
        floats = [tensor for tensor in tensors if tensor.is_floating_point()]
        sizes[kind] = sum(tensor.numel() * tensor.element_size() for tensor in floats)
    line = f"rank {RANK}, {place}: {sizes['parameters']:,} bytes of parameters, "
    base.log("\n".join(zero.gather(f"{line}{sizes['optimizer_states']:,} of optimizer states")))


def start(main: Callable, doc: str, ds_config: str = "zero2.json", **own: object) -> None:
    """Read the flags and the JSON, run main(args, config), leave the process group. own: an example's own flags."""
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ds_config", default=str(ROOT / "configs" / ds_config), help="DeepSpeed's JSON")
    for name, value in (DEFAULTS | own).items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help=f"({value})")
    parser.set_defaults(**FIXED)
    args = parser.parse_args()
    if args.d_model % args.n_head:
        parser.error(f"--d_model {args.d_model} is not a multiple of --n_head {args.n_head}")
    try:
        main(args, read_config(args.ds_config))
    except base.UserError as error:
        sys.exit(f"{parser.prog}: error: {error}" if RANK == 0 else 1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # transformers' Trainer leaves threads of gloo, which now and then abort an interpreter's own end
