"""What a training run is doing, or has done, on one screen: also while it trains, and after it was cut off.

    python scripts/show_run.py runs/DeepSpeed-GPTLike-ZeRO-2
    python scripts/show_run.py runs/* --follow       refreshed each second until all of them are finished

Reads args.json, metrics.jsonl, checkpoints/ and summary.json, and touches nothing. A run trains while a process holds
its .lock: that can be told on the host of rank 0 only, elsewhere a run that trains looks stopped. The time left is
that of the steps still to do at the last rate, without validations. Plain text where the output is no terminal; there
--follow prints once, at the end.
Exit code 0: shown; 1: a folder holds no readable run; 2: wrong usage; 130: Ctrl-C.
"""

import argparse
import fcntl
import json
import math
import os
import struct
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import psutil
from rich import box
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

BARS, ASCII_BARS = "▁▂▃▄▅▆▇█", "_.:-=+*#"
WIDTH = 40  # characters of a sparkline
REFRESH_S = 1
COLOURS = {"training": "green", "finished": "cyan", "stopped": "yellow"}


class Run(NamedTuple):
    name: str
    args: dict
    lines: list[dict]  # of metrics.jsonl
    summary: dict  # empty while the run is not finished
    checkpoints: dict[int, dict]  # by step, what each one's run.json says
    latest: str  # folder that checkpoints/latest names
    process: int | None  # that holds the lock: the run trains

    def series(self, field: str) -> list[tuple[int, float]]:
        """(step, value) of the lines that have the field, as a finite number."""
        return [(int(number(line, "step") or 0), number(line, field)) for line in self.lines
                if number(line, field) is not None]  # fmt: skip

    def last(self, field: str) -> float | None:
        return next((value for _, value in reversed(self.series(field))), None)

    @property
    def step(self) -> int:
        return max((int(number(line, "step") or 0) for line in self.lines), default=max(self.checkpoints, default=0))

    @property
    def state(self) -> str:
        if self.summary and (number(self.summary, "steps") or 0) >= (number(self.args, "max_steps") or 0):
            return "finished"  # of a run that was given more steps since, the summary is an old one
        return "training" if self.process is not None else "stopped"


def number(fields: dict, name: str) -> float | None:
    value = fields.get(name)
    return value if type(value) in (int, float) and math.isfinite(value) else None


# --- reading ---


def read_object(path: Path) -> dict:
    """A JSON file's object, {} where there is none. Raises ValueError naming the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} is no JSON object")
    return value


def read_lines(path: Path) -> list[dict]:
    """The objects of metrics.jsonl; a last line without its end is still being written. Raises ValueError naming the
    line that is no object."""
    try:
        *complete, _ = path.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        return []
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8: {error}") from error
    lines = []
    for place, text in enumerate(complete, start=1):
        try:
            lines.append(json.loads(text))
        except (ValueError, RecursionError):
            lines.append(None)
        if not isinstance(lines[-1], dict):
            raise ValueError(f"{path}, line {place} is no JSON object: {text[:60]}")
    return lines


def lock_holder(path: Path) -> int | None:
    """The process that holds a run's lock, None without one. Only asks: taking it, even for a moment, could turn a run
    away that is about to start."""
    wanted = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)  # Linux's struct flock
    try:
        with path.open("rb") as file:
            kind, _, _, _, process = struct.unpack("hhqqi4x", fcntl.fcntl(file, fcntl.F_GETLK, wanted))
    except OSError:  # no such file, or a file system without locks
        return None
    return None if kind == fcntl.F_UNLCK else process


def read_run(folder: Path) -> Run:
    """Raises ValueError where the folder holds no run, or one that cannot be read."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is no folder: give the --output_dir of a training run")
    args, lines = read_object(folder / "args.json"), read_lines(folder / "metrics.jsonl")
    summary, checkpoints = read_object(folder / "summary.json"), folder / "checkpoints"
    if not (args or lines or summary):
        raise ValueError(f"{folder} holds no run, or one that has not begun: no args.json and no metrics")
    found = {int(path.name[4:]): facts for path in checkpoints.glob("step*")
             if path.name[4:].isdecimal() and (facts := read_object(path / "run.json"))}  # fmt: skip
    latest = checkpoints / "latest"
    name = latest.read_text(encoding="utf-8", errors="replace").strip() if latest.is_file() else ""
    return Run(str(folder), args, lines, summary, dict(sorted(found.items())), name, lock_holder(folder / ".lock"))


# --- what is shown ---


def sparkline(values: list[float], bars: str = BARS) -> str:
    """Means of up to WIDTH stretches of the values, the lowest as the lowest bar."""
    count = min(WIDTH, len(values))
    edges = [len(values) * place // count for place in range(count + 1)] if count else []
    means = [sum(values[a:b]) / (b - a) for a, b in zip(edges, edges[1:], strict=False)]
    low, high = min(means, default=0), max(means, default=0)
    return "".join(bars[round((mean - low) / (high - low or 1) * (len(bars) - 1))] for mean in means)


def world_size(run: Run) -> int | None:
    """Ranks of a run that trains: its process was told by the launcher, or not, where it is alone."""
    try:
        return int(psutil.Process(run.process).environ().get("WORLD_SIZE", 1))
    except (psutil.Error, OSError, ValueError):  # gone meanwhile, of another user, or on another host
        return None


def time_left(run: Run) -> str:
    """Empty where the run does not train or has not yet told what it takes."""
    ranks = world_size(run) if run.state == "training" else None
    sizes = [
        number(run.args, name) for name in ("batch_size", "gradient_accumulation_steps", "block_size", "max_steps")
    ]
    rate = run.last("tokens_per_second")
    if not ranks or None in sizes or not rate:
        return ""
    *factors, max_steps = sizes
    return str(timedelta(seconds=round((max_steps - run.step) * math.prod(factors) * ranks / rate)))


def validation(run: Run) -> str:
    losses = run.series("validation_loss")
    if not losses:
        return ""
    best, step = min((loss, step) for step, loss in losses)
    return f"{losses[-1][1]:.4f} last, {best:.4f} best at step {step:,}"


def kept(run: Run) -> str:
    """The checkpoints, with the marks of the newest and of the one with the best validation loss."""
    losses = {step: loss for step, facts in run.checkpoints.items() if (loss := number(facts, "validation_loss"))}
    best = min(losses, key=losses.get) if losses else None
    shown = []
    for step in run.checkpoints:
        marks = ["latest"] * (f"step{step}" == run.latest) + ["best"] * (step == best)
        shown.append(f"step {step:,}" + f" ({', '.join(marks)})" * bool(marks))
    return ", ".join(shown)


def ledger(run: Run) -> dict[str, str]:
    """Model states of rank 0 by kind and place: bytes held, and by the formula."""
    newest = next(reversed(run.checkpoints.values()), {})
    entries = run.summary.get("ledger") or newest.get("ledger")
    rows = {}
    for place, entry in entries.items() if isinstance(entries, dict) else ():
        held, formula = (number(entry, name) if isinstance(entry, dict) else None for name in ("held", "formula"))
        if held is not None and formula is not None:
            rows[printable(place.replace("_", " "))] = f"{held:,.0f} bytes, {formula:,.0f} by the formula"
    return rows


def rows(run: Run, bars: str) -> dict[str, str]:
    """What there is to say of a run, in order; what it has not recorded is left out."""
    args, losses = run.args, [loss for _, loss in run.series("loss")]
    stage, limit = number(args, "zero_stage"), number(args, "max_steps") or 0
    rate = number(run.summary, "tokens_per_second") or run.last("tokens_per_second")
    peaks = [peak for _, peak in run.series("peak_memory_gib")]
    ranks = world_size(run) if run.process is not None else None
    setting = {"ZeRO stage": stage, "precision": args.get("precision"), "world size": ranks}
    shown = {
        "state": run.state + (f", process {run.process}" if run.state == "training" and run.process > 0 else ""),
        "setting": ", ".join(f"{name} {value}" for name, value in setting.items() if value is not None),
        "parameters": f"{value:,.0f}" if (value := number(run.summary, "parameters")) else "",
        "step": f"{run.step:,}" + (f" of {limit:,}, {run.step / limit:.0%}" if limit else ""),
        "loss": f"{losses[-1]:.4f}  {sparkline(losses, bars)}" if losses else "none yet",
        "validation loss": validation(run),
        "tokens/s": f"{rate:,.0f}" if rate else "",
        "time left": time_left(run),
        "peak memory": f"{max(peaks):.2f} GiB" if peaks else "",
        **ledger(run),
        "checkpoints": kept(run) or "none",
    }
    return {field: value for field, value in shown.items() if value}


def show(run: Run, console: Console) -> RenderableType:
    """A table, or lines where the output is no terminal."""
    bars = ASCII_BARS if console.options.ascii_only else BARS
    fields = {field: printable(value) for field, value in rows(run, bars).items()}
    if not console.is_terminal:
        width = max(map(len, fields))
        lines = [printable(run.name)] + [f"{field:{width}}  {value}" for field, value in fields.items()]
        return Text("\n".join(lines) + "\n")
    table = Table(title=Text(printable(run.name)), title_justify="left", show_header=False, box=box.ROUNDED)
    for field, value in fields.items():
        style = COLOURS[run.state] if field == "state" else "bold" if field == "loss" else ""
        table.add_row(Text(field), Text(value, style=style))
    return table


def printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


def follow(folders: list[Path], console: Console) -> None:
    with Live(console=console, auto_refresh=False) as live:
        while True:
            runs = [read_run(folder) for folder in folders]
            live.update(Group(*(show(run, console) for run in runs)), refresh=True)
            if all(run.state == "finished" for run in runs):
                return
            time.sleep(REFRESH_S)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("runs", metavar="RUN", nargs="+", type=Path, help="--output_dir of a training run")
    parser.add_argument("--follow", action="store_true", help="refresh until every run is finished; Ctrl-C ends")
    args = parser.parse_args()
    sys.stdout.reconfigure(errors="replace")  # a folder may have a name that the terminal cannot show
    console = Console()
    if not console.is_terminal:
        console.width = 10_000  # one line a field
    try:
        if args.follow:
            follow(args.runs, console)
        else:
            console.print(*[show(read_run(folder), console) for folder in args.runs], sep="\n")
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError) as error:
        sys.exit(f"show_run.py: error: {error}")


if __name__ == "__main__":
    main()
