"""What the three examples share: flags, and the scripts' model, samples and learning rate before the first step.

The model starts from the scripts' weights and sees at each step their samples, so that a framework's losses can be laid
beside theirs. Everything comes from GPTLike-Base.py; batch, optimizer and precision come from the JSON.
"""

import argparse
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import torch

ROOT = Path(__file__).resolve().parent.parent
DEFAULTS = {"dataset": "wikitext2", "tokenizer": "auto", "n_layer": 6, "n_head": 12, "d_model": 768, "block_size": 256}
DEFAULTS |= {"dropout": 0.1, "max_steps": 100, "seed": 42, "local_rank": 0}
FIXED = {"warmup_steps": 20, "activation_checkpointing": False}  # as the scripts' defaults
FIXED |= {"resume": "auto", "overwrite": False, "output_dir": "runs"}  # for their check of the flags alone
WANTED = set("train_micro_batch_size_per_gpu gradient_accumulation_steps gradient_clipping bf16 optimizer".split())
ADAM = {"lr", "betas", "eps", "weight_decay"}
RANK, RANKS, RANKS_HERE = (  # by torchrun; here: on this host
    int(os.environ.get(name, alone)) for name, alone in {"RANK": 0, "WORLD_SIZE": 1, "LOCAL_WORLD_SIZE": 1}.items()
)

base = SimpleNamespace(**runpy.run_path(str(ROOT / "GPTLike-Base.py")))


def read_config(path: str) -> dict:
    """The JSON's settings. UserError where it lacks one that the examples pass on."""
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
        missing = (WANTED - config.keys()) | (ADAM - config.get("optimizer", {}).get("params", {}).keys())
    except (OSError, ValueError, AttributeError) as error:
        raise base.UserError(f"--ds_config {path} holds no settings: {error}") from error
    if missing:
        raise base.UserError(f"--ds_config {path} has no {', '.join(sorted(missing))}: take a file of configs/")
    return config


def prepare(args: argparse.Namespace, config: dict) -> tuple[torch.nn.Module, torch.utils.data.Dataset]:
    """The model, and the samples of the whole run in the order in which they are to be read."""
    corpus = base.load_corpus(args)
    blocks = base.TokenizedDataset(corpus.streams["train"], args.block_size)
    step_blocks = config["train_micro_batch_size_per_gpu"] * config["gradient_accumulation_steps"] * RANKS
    order = base.step_indices(0, len(blocks), global_batch=args.max_steps * step_blocks, seed=args.seed)
    torch.manual_seed(args.seed)
    return base.GPTLike(args, corpus.vocab_size), torch.utils.data.Subset(blocks, order)


def start(main: Callable[[argparse.Namespace, dict], None], title: str) -> None:
    """Read the flags and the JSON, run main(args, config), leave the process group."""
    parser = argparse.ArgumentParser(
        description=title, formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--ds_config", default=str(ROOT / "configs" / "zero2.json"), help="DeepSpeed's JSON")
    for name, value in DEFAULTS.items():
        parser.add_argument(f"--{name}", type=type(value), default=value, help="as in the scripts")
    parser.set_defaults(**FIXED)
    if RANK > 0:
        parser.error = lambda message: sys.exit(2)  # rank 0 prints it
    base.check_args(parser, args := parser.parse_args())
    try:
        main(args, read_config(args.ds_config))
    except base.UserError as error:
        sys.exit(f"{parser.prog}: error: {error}" if RANK == 0 else 1)
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        sys.stdout.flush()
        os._exit(0)  # transformers' Trainer leaves threads of gloo, which now and then abort an interpreter's own end
