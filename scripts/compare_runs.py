"""One table and one plot of training runs, from the metrics.jsonl and summary.json that the training scripts leave.

Run:
    python scripts/compare_runs.py runs/DeepSpeed-GPTLike-ZeRO-1 runs/DeepSpeed-GPTLike-ZeRO-2
    python scripts/compare_runs.py runs/* --output runs/comparison

Writes compare.md and loss.png to --output and prints the table. A run that still trains, or was cut off, is shown as
far as it went. Exit 0: written; 1: a run cannot be read; 2: wrong usage.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib

matplotlib.use("Agg")  # files only: works without a display
from matplotlib import pyplot

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito: for all eyes
NUMBERS = set("""parameters loss validation_loss validation_perplexity validation_bits_per_byte tokens_per_second
    peak_memory_gib""".split())
DASHES = ("-", "--", ":")  # the next round of colours, when there are more runs than colours


class Run(NamedTuple):
    name: str
    lines: list[dict]  # of metrics.jsonl
    args: dict
    summary: dict  # empty while the run is not finished

    def series(self, field: str) -> tuple[list[int], list[float]]:
        """Steps and values of the lines that have the field."""
        points = [(line["step"], line[field]) for line in self.lines if field in line]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, field: str) -> float | None:
        return next((line[field] for line in reversed(self.lines) if field in line), None)


def read_lines(path: Path) -> list[dict]:
    """The objects of metrics.jsonl. A last line without its end is still being written, and left out.

    Raises ValueError naming path and line where anything else is no object with a step.
    """
    try:
        *complete, _ = path.read_text(encoding="utf-8").split("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    lines = []
    for number, text in enumerate(complete, start=1):
        try:
            lines.append(json.loads(text))
            sound = type(lines[-1]["step"]) is int
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise ValueError(f"{path}, line {number} is no JSON object with a step: {text[:60]}")
        check_numbers(lines[-1], f"{path}, line {number}")
    return lines


def check_numbers(fields: dict, place: str) -> None:
    """Raises ValueError where a field that the table shows is no number."""
    for name in NUMBERS & fields.keys():
        if type(fields[name]) not in (int, float) or name == "parameters" and type(fields[name]) is not int:
            raise ValueError(f"{place}: {name} is no number: {fields[name]!r:.60}")


def read_object(path: Path) -> dict:
    """A JSON file's object, {} where there is no such file."""
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object")
    check_numbers(value, str(path))
    return value


def read_runs(folders: list[Path]) -> list[Run]:
    """Raises ValueError with one line for each folder that holds no readable run."""
    runs, problems = [], []
    names = [folder.resolve().name for folder in folders]
    for folder, name in zip(folders, names, strict=True):
        try:
            lines = read_lines(folder / "metrics.jsonl")
            args, summary = read_object(folder / "args.json"), read_object(folder / "summary.json")
            name = name if names.count(name) == 1 else str(folder)
            runs.append(Run("".join(c if c.isprintable() else "?" for c in name), lines, args, summary))
        except FileNotFoundError:
            problems.append(f"{folder} has no metrics.jsonl: give the --output_dir of a training run")
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n  ".join(problems))
    return runs


def steps_cell(run: Run) -> str:
    done = run.lines[-1]["step"] if run.lines else 0
    return f"{done:,}" if run.summary else f"{done:,} of {run.args.get('max_steps') or '?'}, unfinished"


def best_loss(run: Run) -> float | None:
    return min(run.series("validation_loss")[1], default=None)


def peak_memory(run: Run) -> float | None:
    return max(run.series("peak_memory_gib")[1], default=None)


def throughput(run: Run) -> float | None:
    """Tokens a second of all ranks: the finished run's own median, else that of the last line."""
    return run.summary.get("tokens_per_second", run.last("tokens_per_second"))


COLUMNS: dict[str, tuple[Callable[[Run], object], str]] = {  # heading: value, format
    "run": (lambda run: run.name.replace("|", "\\|"), ""),
    "ZeRO stage": (lambda run: run.args.get("zero_stage"), ""),
    "precision": (lambda run: run.args.get("precision"), ""),
    "parameters": (lambda run: run.summary.get("parameters"), ",d"),
    "steps": (steps_cell, ""),
    "train loss": (lambda run: run.last("loss"), ".4f"),
    "validation loss": (lambda run: run.last("validation_loss"), ".4f"),
    "best": (best_loss, ".4f"),
    "perplexity per token": (lambda run: run.last("validation_perplexity"), ".1f"),
    "bits per byte": (lambda run: run.last("validation_bits_per_byte"), ".3f"),
    "tokens/s": (throughput, ",.0f"),
    "peak memory GiB": (peak_memory, ".2f"),
}


def table(runs: list[Run]) -> str:
    """Markdown, one row a run; what a run has not recorded is a dash."""
    rows = [list(COLUMNS), ["---"] * len(COLUMNS)]
    for run in runs:
        values = [(value(run), form) for value, form in COLUMNS.values()]
        rows.append(["-" if value is None else f"{value:{form}}" for value, form in values])
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def plot_losses(runs: list[Run], path: Path) -> None:
    """Train loss as a thin line, validation loss as points on a thick one, in one colour a run."""
    figure, axes = pyplot.subplots(figsize=(9, 5.5), dpi=120, layout="constrained")
    for number, run in enumerate(runs):
        name = run.name.replace("$", r"\$")  # or matplotlib reads formulas between two of them
        color, dashes = PALETTE[number % len(PALETTE)], DASHES[number // len(PALETTE) % len(DASHES)]
        for field, style in (
            ("loss", {"linewidth": 1, "marker": ".", "markersize": 3, "label": f"{name}: train"}),
            ("validation_loss", {"linewidth": 2, "marker": "o", "markersize": 5, "label": f"{name}: validation"}),
        ):
            steps, values = run.series(field)
            if any(map(math.isfinite, values)):
                axes.plot(steps, values, color=color, linestyle=dashes, **style)
    axes.set(xlabel="optimizer step", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(path)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="--output_dir of a training run")
    parser.add_argument("--output", default="runs/comparison", type=Path, help="folder for compare.md and loss.png")
    args = parser.parse_args()
    try:
        runs = read_runs(args.runs)
        args.output.mkdir(parents=True, exist_ok=True)
        text = table(runs)
        plot_losses(runs, args.output / "loss.png")
        (args.output / "compare.md").write_text(text, encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"compare_runs.py: error: {error}")
    print(text, end="")
    print(f"wrote {args.output / 'compare.md'} and {args.output / 'loss.png'}")


if __name__ == "__main__":
    main()
