"""The GPU check: every script on this machine's NVIDIA GPUs, what it holds and how fast it is, as one page.

    python scripts/dev/gpu_check.py --minutes 12                 every row that fits, first what tells most a second
    python scripts/dev/gpu_check.py --parts speed profile
    python scripts/dev/gpu_check.py --dry_run                    the rows and their commands
    python scripts/dev/gpu_check.py --device cpu                 a rehearsal at tiny size: measures nothing about GPUs

start     each script trains in bf16, one rank per GPU, and its loss falls
ledger    what a script says it holds, beside torch.cuda.memory_allocated and the formulas
parity    its losses beside those of GPTLike-Base.py on the CPU in fp32
speed     tokens per second, MFU and peak memory at 124M parameters and 1,024 tokens, eager and then compiled
profile   a GPU's time in one step by kind of kernel (torch.profiler)
offload   ZeRO-Offload trains a model that Base cannot hold under the same limit of GPU memory
nvme      parameters and optimizer states on disk

Each row is printed, and the page written anew, as it is found. A row that would not fit into --minutes is not started,
and says so. Exit code 0: no row failed, 1: one did, or there is no GPU, 2: wrong usage.
"""

import argparse
import json
import os
import platform
import re
import shlex
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import NamedTuple

import psutil
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from benchmark import write_data
from common import ROOT, SCRIPTS, ToolError, exit_with, mfu, read_json
from gpu_runs import GIB, Launch, Launcher, Run, Skipped, reason, shares_of_kinds

PARTS = ("start", "ledger", "parity", "speed", "profile", "offload", "nvme")
BASE, ZERO1, _, ZERO3, OFFLOAD, _ = SCRIPTS
STEPS = 10  # optimizer steps of the runs that start, ledger and parity share
TOLERANCE = {"bf16": 0.02, "fp32": 1e-3}  # largest loss difference to a CPU in fp32, at any step
SLACK, WORKSPACE = 0.02, 2**27  # the allocator may hold 2 % and 128 MiB more than the ledger: batch, cuBLAS, rounding
BARS = {"eager": 0.35, "compiled": 0.45}  # MFU of Base
ZERO1_BAR = 0.95  # speed of ZeRO-1 on one GPU, eager, as a multiple of Base's
SIZES = ((48, 25, 1600), (36, 20, 1280), (24, 16, 1024))  # n_layer, n_head, d_model of 1.5B, 774M and 355M


class Row(NamedTuple):
    part: str
    what: str
    wanted: str
    launches: list[Launch]
    judge: Callable[..., str]  # of a Run for each launch; what was found; raises ToolError or Skipped


def shape(n_layer: int, n_head: int, d_model: int, block_size: int) -> str:
    return f"--n_layer {n_layer} --n_head {n_head} --d_model {d_model} --block_size {block_size} --dropout 0"


def make_plan(device: str, data: str) -> SimpleNamespace:
    """What differs between GPUs and the rehearsal on a CPU. Raises ToolError where there is no GPU to check."""
    text = "--dataset sample --tokenizer bpe:"
    if device == "cpu":  # Offload saves nothing there, so that Base gets a model of 51 billion parameters
        small, lean = f"{shape(2, 4, 64, 32)} {text}512", f"{text}512 --batch_size 1"
        plan = {"ranks": 2, "small": small, "speed": f"{small} --batch_size 4", "nvme": shape(1, 4, 640, 32)}
        plan |= {"too_large": f"{shape(1, 4, 65536, 32)} {lean}", "offloaded": f"{shape(2, 4, 64, 32)} {lean}"}
        return SimpleNamespace(device=device, limit_gib=32, **plan)
    if not torch.cuda.is_available():
        raise ToolError(f"no NVIDIA GPU: torch {torch.__version__} sees none. --device cpu rehearses the check")
    memory, host = torch.cuda.get_device_properties(0).total_memory, psutil.virtual_memory().available
    fitting = int(memory / GIB / 1.6)  # sequences, of 0.9 GiB each in eager mode; the rest is left free
    batch = max(1, min(32, 2 ** fitting.bit_length() // 2))  # the power of two below
    large, limit = SIZES[0], 0.0
    for size in reversed(SIZES):
        parameters = 12 * size[0] * size[2] ** 2 + 50304 * size[2]
        needed = 6 * parameters / GIB + 2  # Offload takes 4 bytes of it at most, Base 16; 2 GiB for one sequence
        if needed < 0.9 * memory / GIB and 24 * parameters + 8 * GIB < host:  # there lie Offload's optimizer states
            large, limit = size, needed
    offloaded = f"{shape(*large, 1024)} {data} --batch_size 1 --activation_checkpointing"
    plan = {"small": f"{shape(12, 12, 768, 256)} {text}8192", "nvme": shape(4, 12, 768, 256)}
    plan |= {"speed": f"{shape(12, 12, 768, 1024)} {data} --batch_size {batch}"}
    plan |= {"too_large": offloaded, "offloaded": offloaded, "limit_gib": limit}
    return SimpleNamespace(device=device, ranks=torch.cuda.device_count(), **plan)


# What is looked for in the runs.
def describe(run: Run) -> str:
    losses = run.series("loss")
    return f"loss {losses[0]:.3f} to {losses[-1]:.3f}, peak {max(run.series('peak_memory_gib')):.2f} GiB"


def trains(run: Run) -> str:
    losses = run.series("loss")
    if not losses[-1] < losses[0]:
        raise ToolError(describe(run))
    return describe(run)


def agrees(run: Run, on_cpu: Run) -> str:
    tolerance = TOLERANCE["fp32" if "precision fp32" in run.screen else "bf16"]
    apart = max(abs(a - b) for a, b in zip(run.series("loss"), on_cpu.series("loss"), strict=True))
    if not apart <= tolerance:
        raise ToolError(f"{apart:.1e}")
    return f"{apart:.1e}"


def holds(run: Run) -> str:
    """Parameters and optimizer states within SLACK of the formula, and all within the allocator's bytes."""
    sizes, problems = run.json("held.json"), []
    for name, row in sizes["ledger"].items():
        if not name.startswith("gradients") and abs(row["held"] - row["formula"]) > SLACK * row["formula"]:
            problems.append(f"{name} {row['held']:,} bytes, by the formula {row['formula']:,}")
    on_gpu = sum(row["held"] for name, row in sizes["ledger"].items() if name.endswith(" on cuda"))
    found = f"ledger {on_gpu / GIB:.3f} GiB, allocator {sizes['allocated'] / GIB:.3f} GiB"
    if problems or not on_gpu <= sizes["allocated"] <= on_gpu * (1 + SLACK) + WORKSPACE:
        raise ToolError("; ".join([found, *problems]))
    return found


def fast(run: Run, base: Run) -> str:
    """The first line of a run holds warm-up and compilation."""
    rate, beside = (median(each.series("tokens_per_second")[1:]) for each in (run, base))
    found = f"{rate:,.0f} tokens/s, peak {max(run.series('peak_memory_gib')):.2f} GiB"
    found += "" if run is base else f", {rate / beside:.2f}x Base"
    args = run.json("args.json")
    share = mfu(rate, args)
    if share is None:
        return f"{found}, MFU unknown for this device"
    found += f", MFU {share:.1%}"
    slow = run is base and share < BARS["compiled" if args["compile"] else "eager"]
    alone = args["zero_stage"] == 1 and args["world_size"] == 1 and not args["compile"]
    if slow or (alone and rate < ZERO1_BAR * beside):
        raise ToolError(found)
    return found


def outgrows(base: Run | None = None, offloaded: Run | None = None) -> str:
    if base is None:
        raise Skipped("this host has too little memory for the optimizer states of a model that a GPU cannot hold")
    if not base.code or not re.search("out of memory|allocate memory|enough memory", base.screen.lower()):
        raise ToolError(f"Base ended with exit code {base.code}: {reason(base.screen)}")
    return f"Base: out of memory; Offload: {describe(offloaded)}"


def lies_on_disk(run: Run) -> str:
    if run.code and re.search("async_io|libaio", run.screen):
        raise Skipped("DeepSpeed cannot compile its NVMe op: it wants libaio-dev, and on a GPU nvcc")
    swapped = sum(path.stat().st_size for path in run.output.with_name("nvme").rglob("*") if path.is_file())
    if run.code or not swapped:
        raise ToolError(f"exit code {run.code}, {swapped} bytes on disk: {reason(run.screen)}")
    return f"{swapped / GIB:.3f} GiB on disk, {describe(run)}"


def make_rows(plan: SimpleNamespace, folder: Path) -> list[Row]:
    def launch(script: str, flags: str, **fields: object) -> Launch:
        return Launch(script, flags, **{"ranks": 1 if script == BASE else plan.ranks, "device": plan.device} | fields)

    def short(script: str, precision: str, **fields: object) -> Launch:
        batch = max(1, 4 // plan.ranks) * (plan.ranks if script == BASE else 1)  # the same of all ranks together
        flags = f"--batch_size {batch} --precision {precision} --log_interval 1 --lr 1e-3 --warmup_steps {STEPS}"
        return launch(script, f"{plan.small} {flags} --max_steps {STEPS}", **fields)

    def timed(script: str, more: str, **fields: object) -> Launch:
        return launch(script, f"{plan.speed} --max_steps 1000 --log_interval 10 {more}", **fields)

    on_cpu, bf16 = short(BASE, "fp32", device="cpu", seconds=60), [short(script, "bf16") for script in SCRIPTS]
    rows = [Row("start", run.script, "the loss falls", [run], trains) for run in bf16]
    rows += [Row("ledger", run.script, "the allocator's and the formulas' bytes", [run], holds) for run in bf16]
    rows += [Row("parity", f"{run.script}, bf16", f"{TOLERANCE['bf16']}", [run, on_cpu], agrees) for run in bf16]
    for mode, more, seconds in (("eager", "", 45), ("compiled", "--compile", 90)):
        runs = [timed(script, more, stop=50, seconds=seconds) for script in SCRIPTS[:4]]
        bars = {BASE: f"MFU {BARS[mode]:.0%}", ZERO1: f"eager on one GPU {ZERO1_BAR}x Base"}
        for run in runs:
            bar = bars.get(run.script, "it runs")
            rows.append(Row("speed", f"{run.script}, {mode}", bar, [run, runs[0]], fast))
    for more in ("", "--compile"):
        run = timed(BASE, more, stop=10, profile=True, seconds=60 if more else 30)
        rows.append(Row("profile", f"{BASE} {more}", "it is measured", [run], shares_of_kinds))
    few, fields = "--max_steps 1000 --log_interval 1", {"ranks": 1, "limit_gib": plan.limit_gib, "stop": 4}
    base = launch(BASE, f"{plan.too_large} {few}", may_fail=True, seconds=60, **fields)
    offloaded = launch(OFFLOAD, f"{plan.offloaded} {few}", seconds=150, **fields)
    what = f"{OFFLOAD} under {plan.limit_gib:.1f} GiB"
    launches = [base, offloaded] if plan.limit_gib else []
    rows.append(Row("offload", what, "Base fails, Offload trains", launches, outgrows))
    exact = [short(script, "fp32") for script in (BASE, ZERO3)]
    rows += [Row("parity", f"{run.script}, fp32", f"{TOLERANCE['fp32']}", [run, on_cpu], agrees) for run in exact]
    flags = f"{plan.nvme} --dataset sample --tokenizer bpe:512 --batch_size 1 {few} --ds_config {folder}/nvme.json"
    on_disk = launch(OFFLOAD, flags, ranks=1, stop=3, may_fail=True, seconds=90)
    return [*rows, Row("nvme", OFFLOAD, "bytes on disk", [on_disk], lies_on_disk)]


def judge(row: Row, launcher: Launcher) -> list[str]:
    """Part, what, found, wanted, verdict; whatever goes wrong with the row stays in it."""
    verdict, needed, left = "ok", launcher.seconds(row.launches), launcher.deadline - time.monotonic()
    try:
        if needed > left:
            raise Skipped(f"it takes about {needed} s, and of --minutes {max(0, left):.0f} s are left")
        found = row.judge(*(launcher.run(launch) for launch in row.launches))
    except (ToolError, OSError, ValueError, LookupError) as error:  # a run left something else than it has to
        verdict = "skipped" if isinstance(error, Skipped) else "FAIL"
        found = str(error) if isinstance(error, ToolError) else repr(error)
    return [row.part, row.what, found.replace("|", "/"), row.wanted, verdict]


def machine(plan: SimpleNamespace) -> str:
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    memory = psutil.virtual_memory().total / GIB
    host = f"{os.cpu_count()} CPU cores, {memory:.0f} GiB; {packages}, Python {platform.python_version()}"
    if plan.device == "cpu":
        return f"**A rehearsal on the CPU: it measures nothing about GPUs.** {plan.ranks} ranks, {host}."
    card = torch.cuda.get_device_properties(0)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    gpus = f"{plan.ranks} x {card.name}, {card.total_memory / GIB:.0f} GiB, CUDA {torch.version.cuda}, NCCL {nccl}"
    return f"{gpus}; {host}."


def write_page(path: Path, plan: SimpleNamespace, found: list[list[str]], seconds: float) -> None:
    verdicts = [cells[-1] for cells in found]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("ok", "FAIL", "skipped"))
    lines = ["# GPU check", "", machine(plan), "", "```bash", shlex.join(["python", *sys.argv]), "```", ""]
    lines += [f"{time.strftime('%Y-%m-%d')}, after {seconds / 60:.1f} minutes: {counts}.", ""]
    lines += ["| part | what | found | wanted | verdict |", "|---|---|---|---|---|"]
    path.write_text("\n".join(lines + [f"| {' | '.join(cells)} |" for cells in found]) + "\n", encoding="utf-8")


def check(args: argparse.Namespace, folder: Path) -> bool:
    """Whether no row failed."""
    start, found = time.monotonic(), []
    data = write_data(folder / "data", 50257, 600, 1024) if args.device == "cuda" else []
    plan, launcher = make_plan(args.device, " ".join(data)), Launcher(folder, start + 60 * args.minutes)
    config = read_json(ROOT / "configs/zero_infinity.json")
    for name in ("offload_optimizer", "offload_param"):
        config["zero_optimization"][name]["nvme_path"] = str(folder / "nvme")
    (folder / "nvme").mkdir()
    (folder / "nvme.json").write_text(json.dumps(config))
    for row in (row for row in make_rows(plan, folder) if row.part in args.parts):
        if args.dry_run:
            print(f"{row.part}: {row.what}; wanted: {row.wanted}; about {launcher.seconds(row.launches)} s")
            for launch in row.launches[:1]:
                print(f"  {shlex.join(launcher.command(launch, folder / 'run'))}")
            continue
        found.append(judge(row, launcher))
        part, what, result, wanted, verdict = found[-1]
        print(f"{verdict:8}{part:8}  {what}: {result} (wanted: {wanted})", flush=True)
        write_page(args.output, plan, found, time.monotonic() - start)
    return not any(cells[-1] == "FAIL" for cells in found)


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12, help="start no row that would end later (12)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), help="all if left out")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal")
    parser.add_argument("--dry_run", action="store_true", help="print rows and commands, run nothing")
    parser.add_argument("--output", type=Path, default=Path("gpu-check.md"), help="the page (gpu-check.md)")
    args = parser.parse_args(words)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: nothing stays behind
    (ROOT / "runs").mkdir(exist_ok=True)
    try:
        with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=ROOT / "runs") as folder:  # /tmp may be small
            return 0 if check(args, Path(folder)) else 1
    except KeyboardInterrupt:
        return 130
    except (ToolError, OSError) as error:
        exit_with(error)


if __name__ == "__main__":
    sys.exit(main())
