"""Measure what a rank of each stage holds at 1, 2 and 4 ranks, and print it as Markdown beside the ZeRO formula.

    python scripts/measure_memory.py
    python scripts/measure_memory.py --ranks 1 2 --plot memory.png

Each script trains three steps with --memory_report, on CPU ranks of this machine (GPUs are hidden, so that the figures
are the same everywhere), in bf16, on the sample text. All ranks together take a global batch of 8 sequences, so that a
rank's activations shrink with the number of ranks for that reason alone. The tables go to stdout, progress to stderr.
Exit code 0: every run gave its figures, 1: one did not, 2: wrong usage.

Source of the formulas: ZeRO, arXiv:1910.02054, section 3.1.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {
    "Base": ("GPTLike-Base.py", None),
    "ZeRO-1": ("DeepSpeed-GPTLike-ZeRO-1.py", "zero1"),
    "ZeRO-2": ("DeepSpeed-GPTLike-ZeRO-2.py", "zero2"),
    "ZeRO-3": ("DeepSpeed-GPTLike-ZeRO-3.py", "zero3"),
    "ZeRO-2, optimizer offloaded": ("DeepSpeed-GPTLike-ZeRO-Offload.py", "zero_offload"),
    "ZeRO-3, all offloaded": ("DeepSpeed-GPTLike-ZeRO-Offload.py", "zero3_offload"),
}
MODEL = "--dataset sample --n_layer 6 --n_head 6 --d_model 384 --block_size 256 --precision bf16 --max_steps 3"
GLOBAL_BATCH = 8
KINDS = {"parameters": "#0072B2", "gradients_and_buckets": "#D55E00", "optimizer_states": "#009E73"}
MIB = 2**20


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--ranks", type=int, nargs="+", choices=(1, 2, 4, 8), default=[1, 2, 4], help="to measure at")
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help="also draw the table as stacked bars")
    parser.add_argument("--model", default=MODEL, help="flags of the model and the run, for another size")
    return parser


def measure(script: str, config: str | None, ranks: int, model: str, output: Path) -> dict:
    """What the run left: summary.json, and memory.json as its key "memory". Exits with the run's output if it fails."""
    words = [str(ROOT / script), *model.split(), "--batch_size", str(GLOBAL_BATCH // ranks), "--memory_report"]
    words += ["--output_dir", str(output)]
    if config:
        torchrun = f"-m torch.distributed.run --standalone --nproc_per_node {ranks}".split()
        words = [*torchrun, *words, "--ds_config", str(ROOT / "configs" / f"{config}.json")]
    env = os.environ | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"  # this Python's ninja: another one compiles ops anew
    done = subprocess.run([sys.executable, *words], cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{script} on {ranks} ranks: exit code {done.returncode}\n{done.stdout}{done.stderr}")
    read = {name: json.loads((output / f"{name}.json").read_text(encoding="utf-8")) for name in ("summary", "memory")}
    return read["summary"] | {"memory": read["memory"]}


def by_kind(ledger: dict[str, dict[str, int]], kind: str) -> tuple[int, int]:
    """(bytes held, bytes by the formula) of a kind, wherever it lies."""
    rows = [sizes for place, sizes in ledger.items() if place.startswith(kind)]
    return sum(sizes["held"] for sizes in rows), max((sizes["formula"] for sizes in rows), default=0)


def largest_activations(memory: dict) -> int:
    return max(size for phase in memory["bytes"].values() for place, size in phase.items() if place.startswith("act"))


def table(results: dict[tuple[str, int], dict]) -> str:
    heads = "stage", "ranks", *(kind.replace("_", " ") for kind in KINDS), "together", "of 16P", "activations"
    lines = [f"| {' | '.join(heads)} |", "|---" + "|--:" * (len(heads) - 1) + "|"]
    for (name, ranks), found in results.items():
        sizes = [by_kind(found["ledger"], kind) for kind in KINDS]
        held, formula = (sum(column) for column in zip(*sizes, strict=True))
        cells = [f"{size / MIB:.1f} / {wanted / MIB:.1f}" for size, wanted in [*sizes, (held, formula)]]
        cells += [f"{held / (16 * found['parameters']):.2f}", f"{largest_activations(found['memory']) / MIB:.1f}"]
        lines.append(f"| {name} | {ranks} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(results: dict[tuple[str, int], dict], path: Path) -> None:
    """Stacked bars of what is held, a black mark where the formula's sum lies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(9, 0.32 * len(results) + 1.6), layout="constrained")
    labels, bottom = [f"{name}, {ranks}" for name, ranks in results], [0.0] * len(results)
    for kind, colour in KINDS.items():
        widths = [by_kind(found["ledger"], kind)[0] / MIB for found in results.values()]
        axes.barh(labels, widths, left=bottom, color=colour, label=kind.replace("_", " "))
        bottom = [start + width for start, width in zip(bottom, widths, strict=True)]
    formulas = [sum(by_kind(found["ledger"], kind)[1] for kind in KINDS) / MIB for found in results.values()]
    axes.plot(formulas, labels, "|", color="black", markersize=14, label="the formula's sum")
    axes.invert_yaxis()
    axes.set(xlabel="model states of rank 0, MiB", ylabel="stage, ranks")
    figure.legend(loc="outside lower center", ncols=4)
    figure.savefig(path, dpi=120)


def main() -> None:
    args = build_parser().parse_args()
    runs = [(name, ranks) for name in SCRIPTS for ranks in (args.ranks if name != "Base" else [1])]
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for number, (name, ranks) in enumerate(tqdm(runs, unit="run", disable=None)):
            results[name, ranks] = measure(*SCRIPTS[name], ranks, args.model, Path(folder, str(number)))
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed"))
    print(f"{packages}, Python {platform.python_version()}, {os.cpu_count()} CPU cores, {time.strftime('%Y-%m-%d')}; "
          f"{results['Base', 1]['parameters']:,} parameters; MiB of rank 0, held / by the formula\n")  # fmt: skip
    print(table(results))
    for (name, ranks), found in results.items():
        print(f"\n{name}, {ranks}: {found['memory']['why']}.")
    if args.plot:
        draw(results, args.plot)


if __name__ == "__main__":
    main()
