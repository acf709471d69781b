"""Train the ZeRO scripts as GPTLike-Base.py trains, and print how far their losses lie from Base's.

    python scripts/dev/parity.py
    python scripts/dev/parity.py --ranks 4 --accumulation 4 --scripts ZeRO-2 ZeRO-3

Base runs alone on the whole global batch, the others on --ranks ranks, without dropout, on the sample text and the
CPU. Compared are the train loss of every step and the validation loss of every fourth part of the run. Exit code 0:
all within --tolerance, 1: one is not, or did not run; then the runs and their logs are kept.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from common import ROOT, ToolError, exit_with, launch_command, launch_environment, read_metrics, table

CASES = {  # name: script and its own flags
    "Base": ("GPTLike-Base.py",),
    "ZeRO-1": ("DeepSpeed-GPTLike-ZeRO-1.py",),
    "ZeRO-2": ("DeepSpeed-GPTLike-ZeRO-2.py",),
    "ZeRO-3": ("DeepSpeed-GPTLike-ZeRO-3.py",),
    "Offload": ("DeepSpeed-GPTLike-ZeRO-Offload.py",),
    "ZeRO-3-Offload": ("DeepSpeed-GPTLike-ZeRO-Offload.py", "--ds_config", "configs/zero3_offload.json"),
    "Multihosts": ("DeepSpeed-GPTLike-Multihosts.py",),
}
GLOBAL_BATCH = 16  # sequences: 4 ranks with 4 micro batches have one each
FLAGS = """--dataset sample --tokenizer bpe:512 --n_layer 2 --n_head 4 --d_model 64 --block_size 32 --dropout 0
    --warmup_steps 2 --log_interval 1 --save_interval 0""".split()
TOLERANCE = {"fp32": 1e-5, "bf16": 0.02}  # bf16 keeps 8 bits, and ranks round their shares of a gradient apart
HEADS = ["script", "ranks", "micro batches", "train loss apart", "validation loss apart", "first loss", "last loss"]


def train(name: str, ranks: int, accumulation: int, args: argparse.Namespace) -> dict:
    """The metrics of a run, by step. Raises ToolError that names its log, if it fails."""
    script, *own = CASES[name]
    output = args.folder / name
    flags = [*FLAGS, *own, "--precision", args.precision, "--seed", str(args.seed), "--output_dir", str(output)]
    flags += ["--batch_size", str(GLOBAL_BATCH // ranks // accumulation)]
    flags += ["--gradient_accumulation_steps", str(accumulation), "--max_steps", str(args.steps)]
    flags += ["--eval_interval", str(max(1, args.steps // 4))]
    log = args.folder / f"{name}.log"
    env = launch_environment(gpus=False)  # the figures are the same everywhere
    with log.open("w") as file:
        code = subprocess.call([*launch_command(script, ranks), *flags], cwd=ROOT, env=env, stdout=file, stderr=file)
    if code:
        raise ToolError(f"{name} ended with exit code {code}: see {log}")
    return read_metrics(output)


def apart(run: dict, base: dict, field: str) -> float:
    """The largest difference at any step. Raises ToolError if the steps are not the same."""
    values = {step: fields[field] for step, fields in run.items() if field in fields}
    others = {step: fields[field] for step, fields in base.items() if field in fields}
    if values.keys() != others.keys():
        raise ToolError(f"{field} is of the steps {[*values]}, Base's of {[*others]}")
    return max(abs(values[step] - others[step]) for step in values)


def compare(args: argparse.Namespace) -> float:
    """Print the table, and return the largest difference of all. Raises ToolError where a run fails."""
    base, largest, rows = None, 0.0, []
    for name in ["Base", *args.scripts]:
        ranks, accumulation = (1, 1) if name == "Base" else (args.ranks, args.accumulation)
        run = train(name, ranks, accumulation, args)
        base = base or run
        differences = [apart(run, base, field) for field in ("loss", "validation_loss")]
        largest = max(largest, *differences)
        losses = [fields["loss"] for fields in run.values()]
        ends = [f"{loss:.6f}" for loss in (losses[0], losses[-1])]
        rows.append([name, ranks, accumulation, *(f"{difference:.1e}" for difference in differences), *ends])
    print(table(HEADS, rows))
    return largest


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--scripts", nargs="+", choices=list(CASES)[1:], default=list(CASES)[1:], help="beside Base; all if left out")
    add("--ranks", type=int, choices=[1, 2, 4], default=2, help="of the ZeRO scripts (2)")
    add("--accumulation", type=int, choices=[1, 2, 4], default=1, help="micro batches a step; the batch stays (1)")
    add("--steps", type=int, default=20, help="optimizer steps (20)")
    add("--precision", choices=list(TOLERANCE), default="fp32", help="of weights and activations (fp32)")
    add("--tolerance", type=float, help="largest difference of a loss (1e-5 in fp32, 0.02 in bf16)")
    add("--seed", type=int, default=42, help="of all runs (42)")
    args = parser.parse_args(words)
    tolerance = TOLERANCE[args.precision] if args.tolerance is None else args.tolerance
    args.folder = Path(tempfile.mkdtemp(prefix="parity-"))
    try:
        largest = compare(args)
    except ToolError as error:
        exit_with(error)
    if not largest <= tolerance:
        print(f"a loss is {largest:.1e} from Base's, more than {tolerance:g}: see {args.folder}")
        return 1
    shutil.rmtree(args.folder)
    print(f"all losses within {tolerance:g} of Base's, {args.steps} steps, {args.precision}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
