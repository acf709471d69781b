"""Say before a run what is wrong with a DeepSpeed JSON, which script it is for, and which keys do nothing there.

    python scripts/tools/lint_config.py my_config.json --world_size 8
    python scripts/tools/lint_config.py configs/*.json

The scripts' own check comes first: what it refuses is FAIL. A warning is a key without effect, a bucket larger than the
model, or an "auto" that stays. Exit code 0: nothing FAILs; 1: something does.
"""

import argparse
import contextlib
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from common import SCRIPTS, cpu_default, load_script, right_script

cpu_default()
import hjson  # noqa: E402

STAGES_OF = {  # where a key of zero_optimization has an effect, in deepspeed 0.19
    "allgather_bucket_size": (1, 2),
    "allgather_partitions": (1, 2),
    "round_robin_gradients": (1, 2),
    "sub_group_size": (3,),
    "leaf_module": (3,),
    "zero_hpz_partition_size": (3,),
    "mics_shard_size": (3,),
}
BUCKETS = ("reduce_bucket_size", "allgather_bucket_size", "stage3_prefetch_bucket_size")
Row = tuple[str, str]  # verdict, message


def parameters_of(args: argparse.Namespace) -> int:
    """P of the scripts' model: embeddings, blocks and norms; the head is tied."""
    rows, width = -(-args.vocab_size // 64) * 64, args.d_model
    return (rows + args.block_size) * width + args.n_layer * (12 * width**2 + 13 * width) + 2 * width


def leaves(section: dict, path: str = "") -> Iterator[tuple[str, object]]:
    for key, value in section.items():
        if isinstance(value, dict):
            yield from leaves(value, f"{path}{key}.")
        else:
            yield path + key, value


def script_for(path: str) -> ModuleType:
    """The script whose check is asked: the one that the JSON is for, else the first with a JSON, which says so."""
    try:
        name = right_script(hjson.loads(Path(path).read_text())["zero_optimization"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        name = ""
    return load_script(name if name in SCRIPTS[1:] else SCRIPTS[1])


def lint(path: str, flags: argparse.Namespace) -> list[Row]:
    script = script_for(path)
    args = script.parse_args(["--ds_config", path])
    args.world_size = flags.world_size
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said):
            config = script.load_ds_config(args)
    except script.UserError as error:
        return [("FAIL", str(error).removeprefix(f"--ds_config {path}").lstrip(": "))]
    zero = config["zero_optimization"]
    rows = [("ok", f"for {Path(script.__file__).name}, stage {zero['stage']}, precision {args.precision}")]
    rows += [("ok", line.removeprefix(f"{path}: ")) for line in said.getvalue().splitlines() if "auto" in line]
    rows += [
        ("warn", f'{name} stays "auto", which means DeepSpeed\'s default here')
        for name, v in leaves(config)
        if v == "auto"
    ]
    for key in zero:
        stages = STAGES_OF.get(key, (3,) if key.startswith("stage3_") else (1, 2, 3))
        if zero["stage"] not in stages:
            rows.append(("warn", f"zero_optimization.{key} does nothing at stage {zero['stage']}"))
    parameters = flags.parameters or parameters_of(argparse.Namespace(**vars(args), vocab_size=flags.vocab_size))
    for key in BUCKETS:
        size = zero.get(key, 500_000_000 if key == "reduce_bucket_size" else 0)
        if isinstance(size, int | float) and size > parameters:
            rows.append(
                ("warn", f"{key} of {size:,.0f} elements is larger than the model's {parameters:,.0f} parameters")
            )
    batch = args.batch_size * args.gradient_accumulation_steps * flags.world_size
    rows.append(
        (
            "ok",
            f"{args.batch_size} x {args.gradient_accumulation_steps} x {flags.world_size} ranks = {batch} sequences",
        )
    )
    return rows


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
