"""Training runs side by side: a table, the bytes that rank 0 held, and a picture of the losses.

    python scripts/tools/compare_runs.py runs/* --output runs/comparison

A run that still trains, or was cut off, is shown as far as it went; a dash stands for what it has not recorded.
Of several folders those without a run are passed over.
"per word" is the perplexity of the best validation. tokens/s is the median of the run's lines without the first, which
pays for the start, and counts all ranks together. MFU, the share of the cards' 16-bit peak, is shown for cards whose
peak is known here, and not in fp32. peak GiB is rank 0's. To watch a run while it trains: docs/monitoring.md.
Exit code 0: fine, 1: no run, or one that is not readable, 2: wrong usage.
"""

import math
import os
import statistics
import sys
from argparse import ArgumentParser, RawDescriptionHelpFormatter
from pathlib import Path
from typing import NamedTuple

from common import ToolError, exit_with, mfu, read_json, read_metrics, table

# They differ for colour-blind readers, too, and have a contrast of at least 3 to white and to GitHub's dark background.
PALETTE = ("#0f96ff", "#e1780f", "#692dff", "#c30f2d", "#b400b4", "#b48778", "#8787a5")
MARKERS = "osD^vPX"
GREY = "#797979"
HEADS = ["run", "script", "stage", "ranks", "steps", "train loss", "best validation", "at step", "per word"]
HEADS += ["tokens/s", "MFU", "peak GiB"]


class Run(NamedTuple):
    name: str
    folder: Path
    args: dict
    metrics: dict[int, dict]  # fields by step
    summary: dict  # empty while the run has not finished

    def series(self, field: str) -> dict[int, float]:
        """The field's values by step. Raises ToolError where one is no number."""
        values = {step: fields[field] for step, fields in self.metrics.items() if field in fields}
        for step, value in values.items():
            if type(step) is not int or type(value) not in (int, float):
                raise ToolError(f"{self.folder}/metrics.jsonl: step {step!r:.40} has {field} {value!r:.40}, no number")
        return values


def read_run(folder: Path, names: list[str]) -> Run:
    """Named by its folder, or by the whole path where names, those of all folders, have that name twice.

    Raises ToolError that names the file, if one that has to be there is missing, or one is damaged.
    """
    name, path = folder.resolve().name, folder / "summary.json"
    name = name if names.count(name) == 1 else str(folder)
    metrics, summary = read_metrics(folder), read_json(path) if path.exists() else {}
    if summary.get("steps") not in metrics:  # of the run that was here before --overwrite
        summary = {}
    return Run(name, folder, read_json(folder / "args.json"), metrics, summary)


def cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


def row(run: Run) -> list[object]:
    """The run's cells under HEADS."""
    losses, rates = run.series("loss"), list(run.series("tokens_per_second").values())
    validation = {step: loss for step, loss in run.series("validation_loss").items() if math.isfinite(loss)}
    best_step = min(validation, key=validation.get, default=None)
    rate = statistics.median(rates[1:] or rates) if rates else None
    copies = sorted(run.folder.glob("*.py"), key=os.path.getmtime)  # the newest, if the folder was used for several
    script = copies[-1].stem.replace("DeepSpeed-", "").replace("GPTLike-", "") if copies else "-"
    done, planned = max(run.metrics, default=0), run.args.get("max_steps")
    return [
        run.name,
        script,
        run.args.get("zero_stage", "-"),
        run.args.get("world_size", "-"),
        f"{done}" if run.summary.get("steps") == planned else f"{done} of {planned}, unfinished",
        cell(losses[max(losses)] if losses else None, ".4f"),
        cell(validation.get(best_step), ".4f"),
        "-" if best_step is None else best_step,
        cell(run.series("validation_word_perplexity").get(best_step), ".6g"),
        cell(rate, ",.0f"),
        cell(None if rate is None else mfu(rate, run.args), ".1%"),
        cell(max(run.series("peak_memory_gib").values(), default=None), ".2f"),
    ]


def ledger_rows(run: Run) -> list[list[object]]:
    """The bytes of each kind of model state that rank 0 held, beside the formula of arXiv:1910.02054."""
    rows = []
    try:
        for kind, size in run.summary.get("ledger", {}).items():
            held, formula = size["held"], size["formula"]
            rows.append([run.name, kind.replace("_", " "), f"{held:,}", f"{formula:,}", f"{held / formula:.3f}"])
    except (TypeError, KeyError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise ToolError(f"{run.folder}/summary.json: the ledger is not what a run writes: {error!r}") from error
    return rows


def draw_losses(runs: list[Run], path: Path) -> None:
    """Transparent, with text in a grey that is legible on white and on black."""
    import matplotlib

    matplotlib.use("Agg")  # files only: works without a display
    from matplotlib import pyplot

    coloured = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
    with pyplot.rc_context(dict.fromkeys(coloured, GREY) | {"font.size": 12, "text.parse_math": False}):
        figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
        for number, run in enumerate(runs):
            color, marker = PALETTE[number % len(PALETTE)], MARKERS[number % len(MARKERS)]
            train, validation = run.series("loss"), run.series("validation_loss")
            axes.plot(list(train), list(train.values()), color=color, label=run.name)
            axes.plot(list(validation), list(validation.values()), marker, color=color, markersize=10, fillstyle="none")
        axes.set(xlabel="optimizer step", ylabel="loss, nats per token (hollow: validation)")
        axes.grid(alpha=0.4)
        figure.legend(loc="outside upper center", ncols=2, frameon=False)
        figure.savefig(path, dpi=150, transparent=True)


def main() -> None:
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="--output_dir of a training run")
    parser.add_argument("--output", type=Path, help="folder for loss.png; left out: none is drawn")
    args = parser.parse_args()
    try:
        folders = [folder for folder in args.runs if (folder / "args.json").exists()] or args.runs
        for folder in set(args.runs) - set(folders):
            print(f"{folder} holds no run: passed over", file=sys.stderr)
        names = [folder.resolve().name for folder in folders]
        runs = [read_run(folder, names) for folder in folders]
        print(table(HEADS, [row(run) for run in runs]))
        ledger = [line for run in runs for line in ledger_rows(run)]
        if ledger:
            print(f"\nWhat rank 0 held\n{table(('run', 'kind', 'bytes', 'by the formula', 'ratio'), ledger)}")
        if args.output:
            args.output.mkdir(parents=True, exist_ok=True)
            draw_losses(runs, args.output / "loss.png")
            print(f"\nwrote {args.output}/loss.png")
    except (ToolError, OSError) as error:
        exit_with(error)


if __name__ == "__main__":
    main()
