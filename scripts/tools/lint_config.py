"""Say before a run what is wrong with a DeepSpeed JSON, which script it is for, and which keys do nothing there.

    python scripts/tools/lint_config.py my_config.json --world_size 8
    python scripts/tools/lint_config.py configs/variants/*.json

The scripts' own check comes first: what it refuses is FAIL. A warning is a key without effect, a bucket larger than the
model, or an "auto" that stays. Exit code 0: nothing FAILs; 1: something does.
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

from common import SCRIPTS, cpu_default, load_script, right_script
from plan_memory import Model

cpu_default()
import hjson  # noqa: E402

# Keys of zero_optimization that have an effect at these stages only, in deepspeed 0.19.
ONLY_1_AND_2 = ("allgather_bucket_size", "allgather_partitions", "round_robin_gradients")
ONLY_3 = ("sub_group_size", "leaf_module", "zero_hpz_partition_size", "mics_shard_size", "zero_quantized_weights")
BUCKETS = {"reduce_bucket_size": 500_000_000, "allgather_bucket_size": 0, "stage3_prefetch_bucket_size": 0}


def leaves(section: dict, path: str = "") -> Iterator[tuple[str, object]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield path + key, value


def lint(path: str, flags: argparse.Namespace) -> Iterator[tuple[str, str]]:
    """A verdict and a message for each finding."""
    try:
        name = right_script(hjson.loads(Path(path).read_text())["zero_optimization"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        name = ""
    script = load_script(name if name in SCRIPTS[1:] else SCRIPTS[1])  # its own check says what is wrong
    said = io.StringIO()
    ranks = mock.patch.multiple("deepspeed.comm", get_rank=lambda *_: 0, get_world_size=lambda *_: flags.world_size)
    args = script.parse_args(["--ds_config", path])
    args.world_size = flags.world_size
    try:
        with ranks, contextlib.redirect_stdout(said):
            config = script.load_ds_config(args)
            if hasattr(script, "check_offload"):
                script.check_offload(config["zero_optimization"], path)
    except script.UserError as error:
        yield "FAIL", str(error).removeprefix(f"--ds_config {path}").lstrip(": ")
        return
    zero = config["zero_optimization"]
    stage = zero["stage"]
    yield "ok", f"for {Path(script.__file__).name}, stage {stage}, precision {args.precision}"
    for line in said.getvalue().splitlines():
        if "auto" in line:
            yield "ok", line.removeprefix(f"{path}: ")
    for name, value in leaves(config):
        if value == "auto":
            yield "warn", f'{name} stays "auto", which means DeepSpeed\'s default here'
    for key in zero:
        for_3 = key in ONLY_3 or key.startswith("stage3_")
        if (stage == 3 and key in ONLY_1_AND_2) or (stage != 3 and for_3):
            yield "warn", f"zero_optimization.{key} does nothing at stage {stage}"
    rows = -(-flags.vocab_size // 64) * 64
    model = Model(args.n_layer, args.n_head, args.d_model, args.block_size, rows)
    parameters = flags.parameters or model.parameters
    for key, default in BUCKETS.items():
        size = zero.get(key, default)
        if isinstance(size, int | float) and size > parameters:
            yield "warn", f"{key} of {size:,.0f} elements is larger than the model's {parameters:,.0f} parameters"
    micro, accumulation, ranks = args.batch_size, args.gradient_accumulation_steps, flags.world_size
    yield "ok", f"{micro} x {accumulation} x {ranks} ranks = {micro * accumulation * ranks} sequences"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", metavar="FILE", nargs="+", help="JSON for --ds_config")
    parser.add_argument("--world_size", type=int, default=1, help="ranks on all hosts (1)")
    parser.add_argument("--parameters", type=float, help="of the model; left out: of the scripts' default shape")
    parser.add_argument("--vocab_size", type=int, default=50257, help="tokens, for that shape (50257, gpt2's)")
    args = parser.parse_args()
    failed = False
    for path in args.files:
        for verdict, message in lint(path, args):
            print(f"{verdict:5}{path}: {message}")
            failed = failed or verdict == "FAIL"
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
