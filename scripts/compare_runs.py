"""One table and five pictures of training runs, from what the training scripts leave in their output folders.

Run:
    python scripts/compare_runs.py runs/DeepSpeed-GPTLike-ZeRO-1 runs/DeepSpeed-GPTLike-ZeRO-2
    python scripts/compare_runs.py runs/* --output runs/comparison

Writes to --output and prints the table of compare.md:
    loss.png, loss_by_tokens.png, loss_by_time.png   train loss as lines, validation loss as large hollow marks
    ledger.png                                       bytes that rank 0 holds, by kind, above the formula's
    throughput.png                                   tokens a second: a run's median, and how much its lines vary

A run that still trains, or was cut off, is shown as far as it went; what a run has not recorded is a dash, and missing
in a picture. Tokens are counted from the settings in the run's checkpoints, time from tokens and their rate: without
validations, saves and start-up. Pictures are transparent; their colours differ for colour-blind readers too and have a
contrast of at least 3 to white and to GitHub's dark background (tests/test_compare_runs.py computes both).
Exit 0: written; 1: a run cannot be read; 2: wrong usage.
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy

matplotlib.use("Agg")  # files only: works without a display
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

PALETTE = ("#0f96ff", "#e1780f", "#692dff", "#c30f2d", "#b400b4", "#b48778", "#8787a5")
GREY = "#797979"  # of text: 4.3 to white and to #0d1117; no colour does better on both
LONGEST = 40  # characters of a run's name in a picture
PLAIN = "{x:,.12g}"  # numbers of an axis
MARKERS, DASHES = "osD^vPX", ("-", "--", ":")  # the same again in another dash, when there are more runs than colours
STYLE = {"font.size": 12, "savefig.transparent": True, "savefig.dpi": 150, "figure.figsize": (9, 5.5),
         "legend.frameon": False, "grid.alpha": 0.4, "axes.axisbelow": True} | dict.fromkeys(
    ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color"), GREY)  # fmt: skip
NUMBERS = set("""parameters loss validation_loss validation_perplexity validation_bits_per_byte tokens_per_second
    peak_memory_gib""".split())
KINDS = ("parameters", "gradients_and_buckets", "optimizer_states")
LARGEST = 2**53  # of the whole numbers that a float holds
BATCH = ("batch_size", "gradient_accumulation_steps", "world size", "block_size")


class Run(NamedTuple):
    name: str
    lines: list[dict]  # of metrics.jsonl
    args: dict
    summary: dict  # empty while the run is not finished
    checkpoint: dict = {}  # the newest manifest

    def series(self, field: str) -> tuple[list[int], list[float]]:
        """Steps and values of the lines that have the field."""
        points = [(line["step"], line[field]) for line in self.lines if field in line]
        return [step for step, _ in points], [value for _, value in points]

    def last(self, field: str) -> float | None:
        return next((line[field] for line in reversed(self.lines) if field in line), None)

    def step_tokens(self) -> int | None:
        """Tokens of one optimizer step, all ranks together."""
        sizes = [self.checkpoint.get("settings", {}).get(name) for name in BATCH]
        return math.prod(sizes) if all(type(size) is int and 0 < size < 2**31 for size in sizes) else None

    def seconds(self, steps: list[int]) -> list[float] | None:
        """Of training up to these steps: from each line's rate, which holds since the line before."""
        at, rates = self.series("tokens_per_second")
        if not (tokens := self.step_tokens()) or not at or not all(map(is_rate, rates)):
            return None
        spans = numpy.diff(at, prepend=0) * tokens / rates
        return numpy.interp(steps, [0, *at], [0, *numpy.cumsum(spans)]).tolist()

    def ledger(self) -> dict[str, dict]:
        """Bytes by kind and place, "parameters on cuda": {"held": ..., "formula": ...}."""
        return self.summary.get("ledger") or self.checkpoint.get("ledger") or {}


# Reading.
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
            sound = type(lines[-1]["step"]) is int and 0 <= lines[-1]["step"] < LARGEST
        except (ValueError, KeyError, TypeError, RecursionError):
            sound = False
        if not sound:
            raise ValueError(f"{path}, line {number} is no JSON object with a step: {text[:60]}")
        check_numbers(lines[-1], f"{path}, line {number}")
    return lines


def check_numbers(fields: dict, place: str) -> None:
    """Raises ValueError where a field that the table shows is no number."""
    for name in NUMBERS & fields.keys():
        kinds = (int,) if name == "parameters" else (int, float)
        if type(fields[name]) not in kinds or type(fields[name]) is int and abs(fields[name]) >= LARGEST:
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
    for name in ("ledger", "settings"):
        if not isinstance(value.get(name, {}), dict):
            raise ValueError(f"{path}: {name} is no object: {value[name]!r:.60}")
    for place, sizes in value.get("ledger", {}).items():
        found = [sizes.get(name) for name in ("held", "formula")] if isinstance(sizes, dict) else [None]
        if not all(type(size) is int and 0 <= size < LARGEST for size in found):
            raise ValueError(f"{path}: ledger has no bytes for {place}: {sizes!r:.60}")
    return value


def newest_checkpoint(folder: Path) -> dict:
    """The manifest of the newest whole checkpoint, {} where there is none."""
    steps = [path for path in folder.glob("checkpoints/step*/run.json") if path.parent.name[4:].isdecimal()]
    return read_object(max(steps, key=lambda path: int(path.parent.name[4:]))) if steps else {}


def read_runs(folders: list[Path]) -> list[Run]:
    """Raises ValueError with one line for each folder that holds no readable run."""
    runs, problems = [], []
    names = [folder.resolve().name for folder in folders]
    for folder, name in zip(folders, names, strict=True):
        try:
            lines = read_lines(folder / "metrics.jsonl")
            args, summary = read_object(folder / "args.json"), read_object(folder / "summary.json")
            check_numbers(summary, str(folder / "summary.json"))
            name = name if names.count(name) == 1 else str(folder)
            name = "".join(c if c.isprintable() else "?" for c in name)
            runs.append(Run(name, lines, args, summary, newest_checkpoint(folder)))
        except FileNotFoundError:
            problems.append(f"{folder} has no metrics.jsonl: give the --output_dir of a training run")
        except (OSError, ValueError) as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n  ".join(problems))
    return runs


# The table.
def steps_cell(run: Run) -> str:
    done = run.lines[-1]["step"] if run.lines else 0
    return f"{done:,}" if run.summary else f"{done:,} of {run.args.get('max_steps') or '?'}, unfinished"


def ranks(run: Run) -> int | None:
    return run.checkpoint.get("settings", {}).get("world size")


def tokens(run: Run) -> int | None:
    per_step = run.step_tokens()
    return per_step and run.lines and run.lines[-1]["step"] * per_step or None


def train_seconds(run: Run) -> float | None:
    found = run.seconds([run.lines[-1]["step"]]) if run.lines else None
    return found and found[0]


def best_loss(run: Run) -> float | None:
    return min(run.series("validation_loss")[1], default=None)


def peak_memory(run: Run) -> float | None:
    return max(run.series("peak_memory_gib")[1], default=None)


def is_rate(value: float | None) -> bool:
    return value is not None and 0 < value < math.inf


def throughput(run: Run) -> float | None:
    """Tokens a second of all ranks: the finished run's own median, else that of the last line."""
    return run.summary.get("tokens_per_second", run.last("tokens_per_second"))


COLUMNS: dict[str, tuple[Callable[[Run], object], str]] = {  # heading: value, format
    "run": (lambda run: run.name.replace("|", "\\|"), ""),
    "ZeRO stage": (lambda run: run.args.get("zero_stage"), ""),
    "ranks": (ranks, ""),
    "precision": (lambda run: run.args.get("precision"), ""),
    "parameters": (lambda run: run.summary.get("parameters"), ",d"),
    "steps": (steps_cell, ""),
    "tokens": (tokens, ",d"),
    "seconds": (train_seconds, ",.1f"),
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


# The pictures.
def label(run: Run) -> str:
    name = run.name if len(run.name) <= LONGEST else f"...{run.name[3 - LONGEST:]}"
    return name.replace("$", r"\$")  # or matplotlib reads formulas between two of them


def draw_losses(axes: Axes, runs: list[Run], place: Callable[[Run, list[int]], list[float] | None], what: str) -> None:
    """Train and validation loss; place gives the abscissa of a run's steps. Runs that do what they should lie on one
    line: their marks stand at different places on it."""
    handles = {}
    for number, run in enumerate(runs):
        color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
        dashes = DASHES[number // len(PALETTE) % len(DASHES)]
        between = max(1, len(run.series("loss")[0]) // 8)
        marks = (number * between // len(runs), between)
        for field, form in (("loss", {"linestyle": dashes}),
                            ("loss", {"linestyle": "", "marker": marker, "markevery": marks, "zorder": 3}),
                            ("validation_loss", {"linestyle": "", "marker": marker, "markersize": 12,
                                                 "fillstyle": "none"})):  # fmt: skip
            steps, values = run.series(field)
            at = place(run, steps)
            if at is not None and any(map(math.isfinite, values)):
                axes.plot(at, values, color=color, **form)
                handles[number] = Line2D([], [], color=color, marker=marker, linestyle=dashes, label=label(run))
    axes.set(xlabel=what, ylabel="loss, nats per token (hollow: validation)")
    axes.xaxis.set_major_formatter(PLAIN)
    axes.grid()
    if handles:
        columns = max(1, min(3, 80 // (8 + max(len(label(run)) for run in runs))))
        axes.figure.legend(handles=handles.values(), loc="outside upper center", ncols=columns)


def draw_ledger(axes: Axes, runs: list[Run]) -> None:
    """Two bars a run: what rank 0 holds, filled, and the formula, in outline. What a GPU's rank keeps in host memory is
    hatched."""
    held = [run for run in runs if run.ledger()]
    for row, run in enumerate(held):
        on_gpu = any(place.endswith(" on cuda") for place in run.ledger())
        for offset, size in ((-0.18, "held"), (0.18, "formula")):
            left = 0
            for place, sizes in sorted(run.ledger().items(), key=lambda item: (kind_of(item[0]), item[0])):
                color, width = PALETTE[kind_of(place)], sizes[size] / 2**20
                axes.barh(row + offset, width, 0.32, left, linewidth=1.5, edgecolor=color, hatch_linewidth=2,
                          facecolor=color if size == "held" and not (on_gpu and place.endswith(" on cpu")) else "none",
                          hatch="///" if size == "held" and on_gpu and place.endswith(" on cpu") else None)  # fmt: skip
                left += width
    axes.set(xlabel="MiB of rank 0")
    name_rows(axes, held, lambda run: f"stage {run.args.get('zero_stage', '?')}, {ranks(run) or '?'} ranks")
    if held:
        handles = [Patch(color=PALETTE[kind_of(f"{kind} on ")], label=kind.replace("_", " ")) for kind in KINDS]
        handles += [Patch(facecolor=face, edgecolor=GREY, hatch=hatch, label=name) for name, face, hatch in (
            ("held", GREY, ""), ("held in host memory", "none", "///"), ("formula", "none", ""))]  # fmt: skip
        axes.figure.legend(handles=handles, loc="outside upper center", ncols=3)


def kind_of(place: str) -> int:
    """Its number in KINDS, and so its colour."""
    return next((number for number, kind in enumerate(KINDS) if place.startswith(f"{kind} on ")), len(KINDS))


def draw_throughput(axes: Axes, runs: list[Run]) -> None:
    """A bar a run up to its median, and a line from the 10th to the 90th percentile of what its lines say."""
    measured = [run for run in runs if is_rate(throughput(run))]
    for row, run in enumerate(measured):
        axes.barh(row, throughput(run), 0.6, color=PALETTE[0], label="median" if row == 0 else None)
        if rates := [rate for rate in run.series("tokens_per_second")[1] if is_rate(rate)]:
            axes.plot(numpy.percentile(rates, (10, 90)), (row, row), color=PALETTE[1], linewidth=3,
                      label="10th to 90th percentile of the lines" if row == 0 else None)  # fmt: skip
    axes.set(xlabel="tokens per second, all ranks together")
    if measured:
        axes.figure.legend(loc="outside upper center", ncols=2)
    name_rows(axes, measured, lambda run: f"{throughput(run):,.0f}")


def name_rows(axes: Axes, runs: list[Run], more: Callable[[Run], str]) -> None:
    axes.set_yticks(range(len(runs)), [f"{label(run)}\n{more(run)}" for run in runs])
    axes.set_xlim(left=0)
    axes.xaxis.set_major_formatter(PLAIN)
    axes.invert_yaxis()  # the first run on top
    axes.grid(axis="x")


def by_tokens(run: Run, steps: list[int]) -> list[float] | None:
    per_step = run.step_tokens()
    return per_step and [step * per_step for step in steps]


PICTURES: dict[str, Callable[[Axes, list[Run]], None]] = {
    "loss.png": lambda axes, runs: draw_losses(axes, runs, lambda run, steps: steps, "optimizer step"),
    "loss_by_tokens.png": lambda axes, runs: draw_losses(axes, runs, by_tokens, "tokens seen"),
    "loss_by_time.png": lambda axes, runs: draw_losses(axes, runs, Run.seconds, "seconds of training"),
    "ledger.png": draw_ledger,
    "throughput.png": draw_throughput,
}


def draw(name: str, runs: list[Run], folder: Path) -> None:
    """Write one picture. Without anything to show it says so, so that no older one is taken for it."""
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(layout="constrained")
        PICTURES[name](axes, runs)
        if not axes.has_data():
            axes.text(0.5, 0.5, "recorded by none of the runs", transform=axes.transAxes, ha="center")
        figure.savefig(folder / name)
        pyplot.close(figure)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="--output_dir of a training run")
    parser.add_argument("--output", default="runs/comparison", type=Path,
                        help="folder for compare.md and the pictures (default: runs/comparison)")  # fmt: skip
    return parser


def main() -> None:
    args = build_parser().parse_args()
    try:
        runs = read_runs(args.runs)
        args.output.mkdir(parents=True, exist_ok=True)
        text = table(runs)
        for name in PICTURES:
            draw(name, runs, args.output)
        images = "".join(f"\n![{name.removesuffix('.png').replace('_', ' ')}]({name})\n" for name in PICTURES)
        (args.output / "compare.md").write_text(text + images, encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"compare_runs.py: error: {error}")
    print(text, end="")
    print(f"wrote compare.md, {', '.join(PICTURES)} to {args.output}")


if __name__ == "__main__":
    main()
