"""Train all six scripts alike, and print as Markdown how far their losses and their model states lie apart.

    python scripts/parity.py                      fp32: every loss within 1e-5 of GPTLike-Base.py's
    python scripts/parity.py --precision bf16     within 0.02; its second table is the README's ledger

Base runs alone on a global batch of 8, each ZeRO script on two ranks with 4 each: 20 steps of a tiny model on the
sample text, without dropout, on the CPU (GPUs are hidden, so that the figures are the same everywhere). The tables go
to stdout, progress to stderr. Exit code 0: all within the tolerance, 1: one is not, or did not run.
"""

import argparse
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
BASE, RANKS, STEPS, GLOBAL_BATCH = "GPTLike-Base.py", 2, 20, 8
ZERO = ("ZeRO-1", "ZeRO-2", "ZeRO-3", "ZeRO-Offload", "Multihosts")
SCRIPTS = (BASE, *(f"DeepSpeed-GPTLike-{name}.py" for name in ZERO))
TINY = "--dataset sample --tokenizer bpe:1024 --n_layer 2 --n_head 4 --d_model 64 --block_size 32 --dropout 0"
TOLERANCE = {"fp32": 1e-5, "bf16": 0.02}  # bf16 keeps 8 bits, and ranks round their halves of a gradient apart
KINDS = ("parameters", "gradients_and_buckets", "optimizer_states")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--precision", choices=list(TOLERANCE), default="fp32", help="of weights and activations")
    return parser


def command(script: str, precision: str, output: Path) -> list[str]:
    """The command line that trains one script: Base in one process, the others on RANKS ranks of this Python."""
    ranks = 1 if script == BASE else RANKS
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        torchrun = f"-m torch.distributed.run --nproc_per_node {ranks} --master_port {free.getsockname()[1]}".split()
    words = [str(ROOT / script), *TINY.split(), "--precision", precision, "--batch_size", str(GLOBAL_BATCH // ranks)]
    words += ["--max_steps", str(STEPS), "--log_interval", "1", "--output_dir", str(output)]
    return [sys.executable, *([] if script == BASE else torchrun), *words]


def train(script: str, precision: str, output: Path) -> tuple[list[float], dict]:
    """The losses of every step, and the run's summary. Exits with the run's own output if it fails."""
    print(f"{script} ...", end=" ", file=sys.stderr, flush=True)
    start, words = time.perf_counter(), command(script, precision, output)
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"  # this Python's ninja: another one compiles ops anew
    done = subprocess.run(words, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"exit code {done.returncode}\n{done.stdout}{done.stderr}")
    print(f"{time.perf_counter() - start:.0f} s", file=sys.stderr)
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line], json.loads((output / "summary.json").read_text())


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def ledger_row(script: str, summary: dict) -> str:
    """By kind, bytes that rank 0 holds / bytes by the formula; what lies in two places is added up."""
    cells = []
    for kind in KINDS:
        places = [sizes for place, sizes in summary["ledger"].items() if place.startswith(kind)]
        held, formula = sum(sizes["held"] for sizes in places), max(sizes["formula"] for sizes in places)
        cells.append(f"{held:,} / {formula:,}")
    return row(f"`{script}`", 1 if script == BASE else RANKS, *cells)


def main() -> None:
    args = build_parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        runs = {script: train(script, args.precision, Path(folder, script)) for script in SCRIPTS}
    base, worst = runs[BASE][0], 0.0
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    print(f"{packages}, Python {platform.python_version()}, {os.cpu_count()} CPU cores, {time.strftime('%Y-%m-%d')}, "
          f"{args.precision}\n")  # fmt: skip
    print(row("script", "ranks", f"largest loss difference to Base in {STEPS} steps", "loss at step 1", "at step 20"))
    print("|---|--:|--:|--:|--:|")
    for script, (losses, _) in runs.items():
        apart = max(abs(loss - other) for loss, other in zip(losses, base, strict=True))
        worst = max(worst, apart)
        ends = f"{losses[0]:.6f}", f"{losses[-1]:.6f}"
        print(row(f"`{script}`", 1 if script == BASE else RANKS, "-" if script == BASE else f"{apart:.1e}", *ends))
    print(f"\nModel states of rank 0, {runs[BASE][1]['parameters']:,} parameters, in bytes: held / by the formula\n")
    print(row("script", "ranks", *(kind.replace("_", " ") for kind in KINDS)), "|---|--:|--:|--:|--:|", sep="\n")
    print(*(ledger_row(script, summary) for script, (_, summary) in runs.items()), sep="\n")
    sys.exit(worst >= TOLERANCE[args.precision])


if __name__ == "__main__":
    main()
