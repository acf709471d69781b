"""What scripts/dev/gpu_check.py runs: the scripts as they are, but for a memory limit, an early end and a profiler.

As a program it is the training process; as a module it starts that, and reads what it leaves.
"""

import argparse
import json
import os
import re
import resource
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from benchmark import end
from common import ROOT, ToolError, launch_command, launch_environment, load_script, read_metrics

GIB = 2**30
KERNELS = {  # kind: what its kernels' names have, the first that fits; on a CPU names of operators
    "communication": "nccl|all_?reduce|gloo",
    "attention": "flash|fmha|attention|sdp",
    "matmul": "gemm|cutlass|nvjet|xmma|cublas|mm$",
    "optimizer": "multi_tensor|adam|foreach",
    "loss and norms": "softmax|norm|nll|cross_entropy",
    "copies": "mem(cpy|set)|copy|cat",
    "elementwise": "elementwise|gelu|dropout|add|mul|triton",
}


class Skipped(ToolError):
    """Why a row cannot be found here."""


class Launch(NamedTuple):
    script: str
    flags: str
    ranks: int
    device: str = "cuda"
    seconds: int = 30  # about, on one H100
    stop: int = 0  # end after so many steps, without validation and checkpoint
    profile: bool = False  # the last of them
    limit_gib: float = 0  # of memory for the process
    may_fail: bool = False


class Run(NamedTuple):
    code: int
    screen: str
    metrics: dict[int, dict]
    output: Path

    def series(self, name: str) -> list[float]:
        return [fields[name] for fields in self.metrics.values() if name in fields]

    def json(self, name: str) -> object:
        return json.loads((self.output / name).read_text())


# What runs in the training process.
def probe(options: dict, script: str, words: list[str]) -> None:
    """Run a script as it is, but for a memory limit and an early end; leave what the allocator and profiler say."""
    limit, on_gpu = int(options["limit_gib"] * GIB), torch.cuda.is_available()
    if limit and on_gpu:
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(0).total_memory)
    elif limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    module = load_script(script)
    show_ledger, micro_batches, profiler = module.show_ledger, module.micro_batches, torch.profiler.profile()

    def show_both(kinds: dict, args: argparse.Namespace) -> dict:
        held = torch.cuda.memory_allocated() if on_gpu else 0
        ledger = show_ledger(kinds, args)
        if args.rank == 0:
            Path(args.output_dir, "held.json").write_text(json.dumps({"allocated": held, "ledger": ledger}))
        return ledger

    def counted(data: object, step: int, args: argparse.Namespace) -> object:
        if options["profile"] and step == options["stop"] - 1:
            profiler.start()
        if options["stop"] and step == options["stop"]:
            if options["profile"]:
                profiler.stop()
                Path(args.output_dir, f"kernels{args.rank}.json").write_text(json.dumps(kernels(profiler, on_gpu)))
            os._exit(0)
        return micro_batches(data, step, args)

    module.show_ledger, module.micro_batches, sys.argv = show_both, counted, [script, *words]
    module.run(module.main)


def kernels(profiler: torch.profiler.profile, on_gpu: bool) -> list:
    """Name and microseconds of each kernel; on a CPU of each operator."""
    wanted = torch.autograd.DeviceType.CUDA if on_gpu else torch.autograd.DeviceType.CPU
    events = [event for event in profiler.key_averages() if event.device_type == wanted]
    return [[event.key, event.self_device_time_total if on_gpu else event.self_cpu_time_total] for event in events]


# What starts it.
class Launcher:
    """Runs each launch once."""

    def __init__(self, folder: Path, deadline: float):
        self.folder, self.deadline, self.known = folder, deadline, {}

    def seconds(self, launches: list[Launch]) -> int:
        return sum(launch.seconds for launch in set(launches) if launch not in self.known)

    def command(self, launch: Launch, output: Path) -> list[str]:
        start = launch_command("scripts/dev/gpu_runs.py", launch.ranks)
        options = {name: getattr(launch, name) for name in ("stop", "profile", "limit_gib")}
        flags = f"{launch.flags} --eval_interval 0 --save_interval 0".split()
        return [*start, json.dumps(options), launch.script, *flags, "--output_dir", str(output)]

    def run(self, launch: Launch) -> Run:
        """Raises ToolError with the run's own message."""
        if launch not in self.known:
            self.known[launch] = self.first(launch, self.folder / f"run{len(self.known)}")
        run = self.known[launch]
        if run.code and not launch.may_fail:
            raise ToolError(f"{launch.script}, exit code {run.code}: {reason(run.screen)}")
        return run

    def first(self, launch: Launch, output: Path) -> Run:
        env = launch_environment(gpus=launch.device == "cuda", NVIDIA_TF32_OVERRIDE="0")  # fp32 is to be fp32
        log = output.with_suffix(".log")
        with log.open("w") as file:
            words = self.command(launch, output)
            process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=file, stderr=file)
        try:
            code = process.wait(max(1.0, min(4 * launch.seconds + 60, self.deadline - time.monotonic())))
        except subprocess.TimeoutExpired:
            code = -1
        finally:
            end(process)
        for name in ("checkpoints", "model"):
            shutil.rmtree(output / name, ignore_errors=True)
        screen = log.read_text(errors="replace") + ("\nerror: it was still running\n" if code == -1 else "")
        if code and not launch.may_fail:
            print(screen[-3000:], file=sys.stderr)
        return Run(code, screen, {} if code else read_metrics(output), output)


def reason(screen: str) -> str:
    """The line that says why a run ended: its error, or the last one."""
    lines = [line.strip() for line in screen.splitlines() if line.strip()] or ["it printed nothing"]
    return next((line for line in lines if re.search("[eE]rror: ", line)), lines[-1])[:300]


def shares_of_kinds(run: Run) -> str:
    """A profiled step's time by kind of kernel."""
    kinds = Counter()
    for name, microseconds in run.json("kernels0.json"):
        fits = [kind for kind, words in KERNELS.items() if re.search(words, name.lower())]
        kinds[(fits or ["other"])[0]] += microseconds
    total = kinds.total() or 1.0
    shares = [f"{kind} {value / total:.0%}" for kind, value in kinds.most_common()]
    return f"{total / 1000:.1f} ms: {', '.join(shares)}"


if __name__ == "__main__":
    probe(json.loads(sys.argv[1]), sys.argv[2], sys.argv[3:])
