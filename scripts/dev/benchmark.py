"""Speed of the scripts beside other ways to train the same GPT, on this machine's CPU, in one run.

    python scripts/dev/benchmark.py                                     all contestants, two vocabularies
    python scripts/dev/benchmark.py --contestants base nanogpt --vocab 8192 --rounds 1

Each round launches every contestant once, so that a slow minute of the machine hits all alike. Scripts and rivals
(scripts/dev/rivals.py) run by their command lines, on the same random tokens, with the same share of the cores for a
rank and the same allocator, until they have logged --steps steps. Tokens per second are the median over the rounds of
the median over the steps, without the first three. "imports" is the time to the first step as a multiple of two
imports at once of deepspeed, datasets and transformers.

Exit code 0: all measured, 1: a contestant failed and its log is named, 2: wrong usage.
"""

import argparse
import os
import platform
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import NamedTuple

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from common import ROOT, SCRIPTS, ToolError, exit_with, launch_command, launch_environment, read_metrics, table

RIVALS = "scripts/dev/rivals.py"
SKIPPED = 3  # first steps: caches fill, and the second counts its memory
ALLOCATOR = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}  # glibc keeps freed memory
IMPORTS = "import deepspeed, datasets, transformers"
PATIENCE_S = 900  # for one launch


class Contestant(NamedTuple):
    words: tuple[str, ...]  # script and own flags
    several: bool  # runs on --ranks
    beside: tuple[str, ...]  # whom its speed is divided by


CONTESTANTS = {
    "base": Contestant((SCRIPTS[0],), False, ("nanogpt", "original")),
    "nanogpt": Contestant((RIVALS, "nanogpt"), False, ()),
    "original": Contestant((RIVALS, "original"), False, ()),
    "ddp": Contestant((RIVALS, "ddp"), True, ()),
}
for stage in (1, 2, 3):
    config = ("--ds_config", f"configs/zero{stage}.json")
    CONTESTANTS[f"zero{stage}"] = Contestant((SCRIPTS[stage], *config), True, ("ddp", f"trainer{stage}"))
    CONTESTANTS[f"trainer{stage}"] = Contestant((RIVALS, "trainer", *config), True, ())


class Measured(NamedTuple):
    first_step_s: float  # from the command to the first logged step
    tokens_per_second: float  # NaN where too few steps were made
    peak_memory_gib: float  # of rank 0


def write_data(folder: Path, vocabulary: int, blocks: int, block_size: int) -> list[str]:
    """Random tokens, the k-th as often as 1/k, as words of a file. Returns the flags with which a script reads them."""
    import tokenizers
    import torch

    (folder / "text").mkdir(parents=True)
    (folder / "tokenizer").mkdir()
    torch.manual_seed(0)
    frequencies = 1 / torch.arange(1, vocabulary + 1)
    for name, count in (("train", blocks), ("valid", 4)):
        ids = torch.multinomial(frequencies, (count + 1) * block_size, replacement=True)
        lines = [" ".join(map(str, line.tolist())) for line in ids.split(block_size)]
        (folder / "text" / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({str(k): k for k in range(vocabulary)}, "0"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer" / "tokenizer.json"))
    return ["--dataset", str(folder / "text"), "--tokenizer", str(folder / "tokenizer")]


def ranks_of(name: str, args: argparse.Namespace) -> int:
    return args.ranks if CONTESTANTS[name].several else 1


def precision_of(name: str, args: argparse.Namespace) -> str:
    return "fp32" if name == "original" else args.precision  # it knows no other


def environment(ranks: int) -> dict[str, str]:
    threads = str(max(1, len(os.sched_getaffinity(0)) // ranks))
    return launch_environment(gpus=False, OMP_NUM_THREADS=threads, **ALLOCATOR)


def command(name: str, data: list[str], output: Path, args: argparse.Namespace) -> list[str]:
    script, *own = CONTESTANTS[name].words
    ranks = ranks_of(name, args)
    words = [*launch_command(script, ranks), *own, *data, "--output_dir", str(output)]
    for flag in ("n_layer", "n_head", "d_model", "block_size", "dropout"):
        words += [f"--{flag}", str(getattr(args, flag))]
    words += ["--batch_size", str(args.batch_size // ranks), "--precision", precision_of(name, args)]
    words += ["--max_steps", str(args.steps + 1000), "--log_interval", "1"]
    return [*words, "--eval_interval", "0", "--save_interval", "0"]


def end(process: subprocess.Popen) -> None:
    """Kill a run and its ranks: torchrun's are in sessions of their own."""
    with suppress(psutil.NoSuchProcess):
        for member in psutil.Process(process.pid).children(recursive=True):
            with suppress(psutil.NoSuchProcess):
                member.kill()
    process.kill()
    process.wait()


def logged_steps(output: Path) -> int:
    metrics = output / "metrics.jsonl"
    return metrics.read_text().count("\n") if metrics.exists() else 0


def launch(words: list[str], output: Path, env: dict[str, str], steps: int) -> float:
    """Run until so many steps are logged. Returns the seconds to the first. Raises ToolError that names the log."""
    log, first = output.with_suffix(".log"), None
    with log.open("w") as file:
        start = time.perf_counter()
        process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=file, stderr=file)
        try:
            while logged_steps(output) < steps:
                if process.poll() is not None or time.perf_counter() - start > PATIENCE_S:
                    raise ToolError(f"{output.name} ended, or hung, before step {steps}: see {log}")
                if first is None and logged_steps(output):
                    first = time.perf_counter() - start
                time.sleep(0.05)
            return first or time.perf_counter() - start
        finally:
            end(process)


def steady(rates: list[float]) -> float:
    """The median rate of the steps after the first ones; NaN where there is none."""
    return median(rates[SKIPPED:]) if len(rates) > SKIPPED else float("nan")


def run_once(name: str, data: list[str], folder: Path, args: argparse.Namespace) -> Measured:
    output = folder / name
    shutil.rmtree(output, ignore_errors=True)
    words = command(name, data, output, args)
    first = launch(words, output, environment(ranks_of(name, args)), args.steps)
    lines = list(read_metrics(output).values())[: args.steps]
    peak = max(line["peak_memory_gib"] for line in lines)
    return Measured(first, steady([line["tokens_per_second"] for line in lines]), peak)


def imports_s() -> float:
    """Seconds that two processes at once take to import what two ranks import."""
    start = time.perf_counter()
    both = [subprocess.Popen([sys.executable, "-c", IMPORTS], env=environment(2)) for _ in range(2)]
    codes = [process.wait() for process in both]
    if any(codes):
        raise ToolError(f"{IMPORTS!r} fails in this environment")
    return time.perf_counter() - start


def medians(rounds: list[Measured]) -> Measured:
    return Measured(*(median(values) for values in zip(*rounds, strict=True)))


def speed_table(runs: dict[str, list[Measured]], imports: float, args: argparse.Namespace) -> str:
    """imports: seconds that two imports at once take."""
    found, rows = {name: medians(rounds) for name, rounds in runs.items()}, []
    for name, row in found.items():
        others = [other for other in CONTESTANTS[name].beside if other in found]
        ratios = [f"{row.tokens_per_second / found[other].tokens_per_second:.2f}x {other}" for other in others]
        rates = [round(measured.tokens_per_second) for measured in runs[name]]
        cells = [name, ranks_of(name, args), precision_of(name, args), round(row.tokens_per_second)]
        cells += [", ".join(ratios) or "-", round(row.first_step_s, 1), f"{row.first_step_s / imports:.2f}x"]
        rows.append([*cells, round(row.peak_memory_gib, 2), f"{min(rates)} to {max(rates)}"])
    heads = ["contestant", "ranks", "precision", "tokens/s", "ratio", "first step s", "imports", "peak GiB", "rounds"]
    return table(heads, rows)


def heading(args: argparse.Namespace) -> str:
    cpu = Path("/proc/cpuinfo").read_text()
    names = [line.partition(":")[2].strip() for line in cpu.splitlines() if line.startswith("model name")]
    bf16 = "with" if "bf16" in cpu else "without"
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    shape = f"{args.n_layer} layers, d_model {args.d_model}, {args.n_head} heads, {args.batch_size} x {args.block_size}"
    machine = f"{(names or [platform.machine()])[0]}, {len(os.sched_getaffinity(0))} cores {bf16} bf16 instructions"
    software = f"{packages}, Python {platform.python_version()}; {time.strftime('%Y-%m-%d')}"
    runs = f"dropout {args.dropout}, {args.precision}, rounds {args.rounds}, steps {args.steps}"
    return f"{machine}; {software}.\n{shape} tokens, {runs}."


def benchmark(args: argparse.Namespace, folder: Path) -> None:
    print(heading(args))
    for vocabulary in args.vocab:
        runs, imports = {name: [] for name in args.contestants}, []
        data = write_data(folder / str(vocabulary), vocabulary, 16 * args.batch_size, args.block_size)
        for number in range(args.rounds):
            imports.append(imports_s())
            for name in args.contestants:
                runs[name].append(run_once(name, data, folder / str(vocabulary), args))
                print(f"round {number + 1}, vocabulary {vocabulary}, {name}: {runs[name][-1]}", file=sys.stderr)
        print(f"\nvocabulary {vocabulary}; two at once, {IMPORTS}: {median(imports):.1f} s")
        print(speed_table(runs, median(imports), args), flush=True)


def parse_args(words: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--contestants", nargs="+", choices=list(CONTESTANTS), default=list(CONTESTANTS), help="all if left out")
    add("--vocab", type=int, nargs="+", default=[8192, 50257], help="sizes, each measured by itself (8192 50257)")
    add("--rounds", type=int, default=3, help="launches of each contestant (3)")
    add("--steps", type=int, default=12, help=f"optimizer steps; the first {SKIPPED} do not count (12)")
    add("--ranks", type=int, default=2, help="of the contestants that run on several (2)")
    add("--precision", choices=["bf16", "fp32"], default="bf16", help="of all but original, which knows fp32 (bf16)")
    shape = {"n_layer": 6, "n_head": 6, "d_model": 384, "block_size": 256, "batch_size": 8}
    for name, default in shape.items():
        add(f"--{name}", type=int, default=default, help=f"of the model and its batch, all ranks together ({default})")
    add("--dropout", type=float, default=0.1, help="as each contestant uses it (0.1)")
    args = parser.parse_args(words)
    if args.steps <= SKIPPED:
        parser.error(f"--steps {args.steps}: must be more than the {SKIPPED} that do not count")
    if min(args.rounds, args.ranks, args.batch_size) < 1 or args.batch_size % args.ranks:
        parser.error(f"--batch_size {args.batch_size} is not a multiple of --ranks {args.ranks}, or one is below 1")
    return args


def main(words: list[str] | None = None) -> None:
    args = parse_args(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing stays behind
    folder = Path(tempfile.mkdtemp(prefix="benchmark-"))
    try:
        benchmark(args, folder)
    except KeyboardInterrupt:
        shutil.rmtree(folder)
        sys.exit(130)
    except (ToolError, OSError) as error:
        exit_with(error)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
