"""The GPU check: every script on this machine's NVIDIA GPUs, what it holds, and how fast it is, as one page.

Parts: the six scripts in bf16 with one rank per GPU (scripts); their losses beside those of a CPU in fp32 (parity);
what they say they hold beside what PyTorch's allocator holds (ledger); ZeRO-Offload with a model that GPTLike-Base.py
cannot hold under the same limit (offload); the same on an NVMe disk (nvme); tokens per second and MFU, eager and
compiled (speed). Each row is found by itself: one that fails does not end the others. With --dry_run all of it runs at
tiny size on the CPU, which tries the check and measures nothing about GPUs. Exit code 0: no row failed; 1: one did, or
there is no GPU; 2: wrong usage.
"""

import argparse
import contextlib
import importlib.util
import json
import math
import os
import platform
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable
from datetime import date
from functools import partial
from importlib.metadata import version
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import NamedTuple

import psutil
import torch

ROOT = Path(__file__).resolve().parent.parent
BASE, OFFLOAD = "GPTLike-Base.py", "DeepSpeed-GPTLike-ZeRO-Offload.py"
ZERO_2, ZERO_3 = "DeepSpeed-GPTLike-ZeRO-2.py", "DeepSpeed-GPTLike-ZeRO-3.py"
SCRIPTS = (BASE, "DeepSpeed-GPTLike-ZeRO-1.py", ZERO_2, ZERO_3, OFFLOAD, "DeepSpeed-GPTLike-Multihosts.py")
PARTS = ("scripts", "parity", "ledger", "offload", "nvme", "speed")
STEPS, SEQUENCES = 10, 4  # of the runs that parts scripts, parity and ledger share; sequences at least, over all ranks
TOLERANCE = {"bf16": 0.02, "fp32": 1e-3}  # largest loss difference to a CPU in fp32, at any step
SLACK, WORKSPACE = 0.02, 2**27  # the allocator may hold 2 % and 128 MiB more than the ledger: batch, cuBLAS, rounding
BARS = {("124M", False): 0.30, ("124M", True): 0.45}  # MFU of Base by size and --compile
SPEED_STEPS = 40
TIMEOUT = 600  # seconds for one run
GIB = 2**30


class Failed(Exception):
    """What a row did not find."""


class Skipped(Exception):
    """Why a row cannot be found here."""


class Shape(NamedTuple):
    n_layer: int
    n_head: int
    d_model: int
    block_size: int

    def parameters(self, vocab_size: int) -> int:
        """Of GPTLike: embeddings, then matrices, biases and norms of each block, then the last norm."""
        rows = -(-vocab_size // 64) * 64 + self.block_size
        return rows * self.d_model + self.n_layer * (12 * self.d_model**2 + 13 * self.d_model) + 2 * self.d_model

    def flags(self) -> dict[str, object]:
        return self._asdict()


SIZES = {  # GPT-2's, with its vocabulary of 50,257
    "1.5B": Shape(48, 25, 1600, 1024),
    "774M": Shape(36, 20, 1280, 1024),
    "355M": Shape(24, 16, 1024, 1024),
    "124M": Shape(12, 12, 768, 1024),
}


class Plan(NamedTuple):
    """What differs between a check on GPUs and its rehearsal on a CPU."""

    device: str  # cuda or cpu
    ranks: int
    memory: int  # bytes of one card
    bpe: int  # tokens that are trained; the rest up to vocab_size no text has
    vocab_size: int
    shape: Shape  # of the parts scripts, parity, ledger and nvme
    too_large: Shape  # what Base cannot hold under the limit
    offloaded: Shape  # what Offload trains under it
    limit: int  # bytes, in the part offload; 0 where no size is right for it
    speed: tuple[tuple[str, str, Shape, bool], ...]  # script, name of the size, shape, compiled

    @property
    def rehearsal(self) -> bool:
        return self.device == "cpu"


def gpu_plan(ranks: int, memory: int, host_memory: int) -> Plan:
    small, large = SIZES["124M"], offload_size(memory, host_memory)
    speed = [(BASE, size, SIZES[size], compiled) for size in ("124M", "1.5B") for compiled in (False, True)]
    speed += [(ZERO_2, "124M", small, compiled) for compiled in (False, True)]
    limit = offload_limit(large.parameters(50257)) if large else 0
    short = small._replace(block_size=256)  # a CPU has to train it in fp32, too
    return Plan("cuda", ranks, memory, 8192, 50257, short, large or small, large or small, limit, tuple(speed))


def rehearsal_plan() -> Plan:
    """Offload saves nothing on a CPU, so that there the two models of its part differ: Base gets one of 51 billion
    parameters."""
    tiny = Shape(2, 4, 64, 32)
    speed = tuple((BASE, "tiny", tiny, compiled) for compiled in (False, True))
    return Plan("cpu", 2, 2**40, 512, 600, tiny, Shape(1, 4, 65536, 32), tiny, 32 * GIB, speed)


def offload_limit(parameters: int) -> int:
    """Bytes that the part offload leaves to a process: 6 per parameter, of which ZeRO-Offload needs 4 at most and Base
    14, and 2 GiB for the activations and logits of one sequence."""
    return 6 * parameters + 2 * GIB


def offload_size(memory: int, host_memory: int) -> Shape | None:
    """The largest size above 124M for which the limit fits the card, and the optimizer states with what else Offload
    keeps there, some 24 bytes per parameter, the host."""
    for name in ("1.5B", "774M", "355M"):
        parameters = SIZES[name].parameters(50257)
        if offload_limit(parameters) < 0.9 * memory and 24 * parameters + 8 * GIB < host_memory:
            return SIZES[name]
    return None


def micro_batch(shape: Shape, vocab_size: int, memory: int) -> int:
    """Sequences per forward, a power of two up to 32, that leave a fifth of the card free: 18 bytes per parameter while
    Base steps, 40 per token, layer and unit of width for activations. 0 where none fits."""
    free = 0.8 * memory - 18 * shape.parameters(vocab_size) - 2 * GIB
    sequences = int(free / (40 * shape.block_size * shape.n_layer * shape.d_model))
    return min(32, 2 ** int(math.log2(sequences))) if sequences > 0 else 0


def global_batch(ranks: int) -> int:
    """Sequences of one step that any rank takes an equal share of: SEQUENCES, or a few more."""
    return ranks * math.ceil(SEQUENCES / ranks)


# What runs in the training process.
def probe(limit: int, script: str, words: list[str]) -> None:
    """Run a script as it is, under a memory limit unless that is 0, and leave in its output folder what the allocator
    holds at the moment of the ledger, which the script itself does not record."""
    if limit and torch.cuda.is_available():
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        total = torch.cuda.get_device_properties(local_rank).total_memory
        torch.cuda.set_per_process_memory_fraction(limit / total, local_rank)
    elif limit:
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    module = load_script(script)
    shown = module.show_ledger

    def show_ledger(run, args: argparse.Namespace) -> dict:
        ledger, on_gpu = shown(run, args), torch.cuda.is_available()
        held = torch.cuda.memory_allocated() if on_gpu else psutil.Process().memory_info().rss
        if module.rank() == 0:
            Path(args.output_dir, "allocator.json").write_text(json.dumps({"allocated": held}))
        return ledger

    module.show_ledger, sys.argv = show_ledger, [script, *words]
    module.stop_on_user_error(module.main)


def load_script(script: str) -> ModuleType:
    """A script as a module; importing it has no side effect."""
    spec = importlib.util.spec_from_file_location(Path(script).stem.replace("-", "_"), script)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # for pickle and NamedTuple
    spec.loader.exec_module(module)
    return module


# What starts such processes, and reads what they leave.
class Run(NamedTuple):
    screen: str
    lines: list[dict]  # of metrics.jsonl
    summary: dict
    allocated: int  # bytes, at the moment of the ledger

    def series(self, name: str) -> list[float]:
        return [line[name] for line in self.lines if name in line]

    def held(self, word: str) -> int:
        """Bytes of the ledger's rows with this word in their name: a kind, or a place."""
        return sum(row["held"] for name, row in self.summary["ledger"].items() if word in name.split())


class Launcher:
    """Runs each command once."""

    def __init__(self, plan: Plan, folder: Path):
        self.plan, self.folder, self.known = plan, folder, {}
        (folder / "nvme").mkdir()
        self.tokenizer = folder / "tokenizer.json"
        self.tokenizer.write_text(make_tokenizer(plan.bpe, plan.vocab_size), encoding="utf-8")

    def train(self, script: str, *, device: str, ranks: int, limit: int = 0, **flags: object) -> Run:
        """The run of a script on the sample text; the same arguments train once. Raises Failed with its message."""
        key = json.dumps([script, device, ranks, limit, flags])
        if key not in self.known:
            try:
                self.known[key] = self.first(script, device, ranks, limit, flags)
            except Failed as failure:
                self.known[key] = failure
        if isinstance(self.known[key], Failed):
            raise self.known[key]
        return self.known[key]

    def first(self, script: str, device: str, ranks: int, limit: int, flags: dict) -> Run:
        output = self.folder / f"run{len(self.known)}"
        code, screen = self.launch(script, device, ranks, limit, output, flags)
        if code:
            print(screen[-4000:], file=sys.stderr)
            raise Failed(f"exit code {code}: {reason(screen)}")
        for name in ("checkpoints", "model"):
            shutil.rmtree(output / name)  # tens of GB at 1.5B parameters
        lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
        allocated = json.loads((output / "allocator.json").read_text())["allocated"]
        return Run(screen, lines, json.loads((output / "summary.json").read_text()), allocated)

    def launch(self, script: str, device: str, ranks: int, limit: int, output: Path, flags: dict) -> tuple[int, str]:
        """Exit code, and what it printed."""
        flags = {"dataset": "sample", "tokenizer": self.tokenizer, "output_dir": output, "eval_interval": 0} | flags
        words = command(script, ranks=ranks, limit=limit, flags=flags)
        sharing = self.plan.ranks if self.plan.rehearsal else ranks  # Base's threads, too, crawl on cores in use
        env = environment(device, sharing, self.folder / "tokens")
        log = output.with_suffix(".log")
        with log.open("w", encoding="utf-8") as screen:
            process = subprocess.Popen(words, cwd=ROOT, env=env, stdout=screen, stderr=subprocess.STDOUT)
        try:
            code = process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            raise Failed(f"still running after {TIMEOUT} s") from None
        finally:
            end(process)
        return code, log.read_text(encoding="utf-8", errors="replace")


def make_tokenizer(bpe: int, vocab_size: int) -> str:
    """A tokenizer's JSON: BPE trained on the sample text, filled up with tokens that no text has. So the model gets the
    parameters and the output layer of GPT-2 without a download."""
    base = load_script(str(ROOT / BASE))
    tokenizer = json.loads(base.build_tokenizer(f"bpe:{bpe}", base.read_texts("sample")["train"]).to_str())
    vocab = tokenizer["model"]["vocab"]
    vocab |= {f"<unused{number}>": number for number in range(len(vocab), vocab_size)}
    return json.dumps(tokenizer)


def command(script: str, *, ranks: int, limit: int, flags: dict[str, object]) -> list[str]:
    """The command line of a script in this Python. A flag that is True has no value; one that is False is left out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        torchrun = f"-m torch.distributed.run --nproc_per_node {ranks} --master_port {free.getsockname()[1]}".split()
    words = [sys.executable, *(torchrun if ranks > 1 else []), str(Path(__file__).resolve()), "--probe", str(limit)]
    words.append(str(ROOT / script))
    for flag, value in flags.items():
        words += [f"--{flag}"] if value is True else [] if value is False else [f"--{flag}", str(value)]
    return words


def environment(device: str, sharing: int, tokens: Path) -> dict[str, str]:
    """Of a training process that shares the cores with so many others."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE")}
    env |= {"GPTLIKE_CACHE": str(tokens), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    env["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{env['PATH']}"  # this Python's ninja
    env["NVIDIA_TF32_OVERRIDE"] = "0"  # some containers turn TF32 on, and fp32 would be no fp32
    threads = max(1, len(os.sched_getaffinity(0)) // sharing)  # torchrun sets 1, with which Offload crawls
    env.setdefault("OMP_NUM_THREADS", str(threads))
    return env | ({"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"} if device == "cpu" else {})


def end(process: subprocess.Popen) -> None:
    """Leave nothing running: torchrun's ranks are in sessions of their own, where no Ctrl-C reaches them."""
    if process.poll() is None:
        family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for member in family:
            with contextlib.suppress(psutil.NoSuchProcess):  # it ended by itself meanwhile
                member.kill()
        process.wait()
        psutil.wait_procs(family, timeout=10)


def reason(screen: str) -> str:
    """The line that says why a run ended: the script's own message, or the last one."""
    lines = [line.strip() for line in screen.splitlines() if line.strip()] or ["it printed nothing"]
    return next((line for line in lines if re.search("[eE]rror: ", line)), lines[-1])[:300]


# What is looked for in the runs.
class Item(NamedTuple):
    part: str
    what: str
    wanted: str
    find: Callable[[], str]  # what was found; raises Failed or Skipped


class Row(NamedTuple):
    verdict: str  # ok, FAIL or skipped
    part: str
    what: str
    found: str
    wanted: str


class Check:
    """The items of all parts."""

    def __init__(self, plan: Plan, launcher: Launcher, peak_tflops: float | None):
        self.plan, self.launcher, self.peak = plan, launcher, peak_tflops

    def items(self) -> list[Item]:
        parity = [(script, "bf16") for script in SCRIPTS] + [(BASE, "fp32"), (ZERO_3, "fp32")]
        beside = f"of {BASE} on the CPU in fp32, at each of {STEPS} steps"
        limit = f"under {self.plan.limit / GIB:.1f} GiB Base says that memory does not suffice, and Offload trains"
        items = [Item("scripts", name, "the loss falls", partial(self.trains, name)) for name in SCRIPTS]
        for name, precision in parity:
            wanted = f"within {TOLERANCE[precision]:g} {beside}"
            items.append(Item("parity", f"{name}, {precision}", wanted, partial(self.agrees, name, precision)))
        items += [Item("ledger", name, self.wanted_ledger(), partial(self.ledger, name)) for name in SCRIPTS]
        items.append(Item("offload", OFFLOAD, limit, self.offload))
        items.append(Item("nvme", OFFLOAD, "parameters and optimizer states lie on NVMe", self.nvme))
        for script, size, shape, compiled in self.plan.speed:
            bar = BARS.get((size, compiled)) if script == BASE else None
            find = partial(self.speed, script, shape, compiled=compiled, bar=bar)
            what = f"{script}, {size}, {'compiled' if compiled else 'eager'}"
            items.append(Item("speed", what, f"MFU {bar:.0%}" if bar else "it runs", find))
        return items

    def wanted_ledger(self) -> str:
        states = f"parameters and optimizer states within {SLACK:.0%} of the formula"
        if self.plan.rehearsal:
            return f"{states}; the process holds no less than the ledger"
        return f"{states}; the allocator what the ledger says, or up to {SLACK:.0%} and {WORKSPACE // 2**20} MiB more"

    def short(self, script: str, precision: str, device: str) -> Run:
        """The run that scripts, parity and ledger share: a few steps without dropout."""
        batch, ranks = global_batch(self.plan.ranks), 1 if script == BASE else self.plan.ranks
        flags = self.plan.shape.flags() | {"precision": precision, "batch_size": batch // ranks, "dropout": 0}
        flags |= {"max_steps": STEPS, "log_interval": 1, "warmup_steps": STEPS, "lr": 1e-3}
        return self.launcher.train(script, device=device, ranks=ranks, **flags)

    def trains(self, script: str) -> str:
        run = self.short(script, "bf16", self.plan.device)
        first, *_, last = run.series("loss")
        card = "CPU" if self.plan.rehearsal else torch.cuda.get_device_name(0)
        if f"device {card}, precision bf16" not in run.screen:
            raise Failed(f"it did not run in bf16 on {card}")
        found = f"loss {first:.3f} to {last:.3f}, peak {run.summary['peak_memory_gib']:.2f} GiB"
        if not last < first:
            raise Failed(found)
        return found

    def agrees(self, script: str, precision: str) -> str:
        wanted = self.short(BASE, "fp32", "cpu").series("loss")
        losses = self.short(script, precision, self.plan.device).series("loss")
        if len(losses) != len(wanted):
            raise Failed(f"{len(losses)} steps, on the CPU {len(wanted)}")
        apart = (torch.tensor(losses) - torch.tensor(wanted)).abs().max().item()  # NaN if one is
        if not apart <= TOLERANCE[precision]:
            raise Failed(f"{apart:.1e}")
        return f"{apart:.1e}"

    def ledger(self, script: str) -> str:
        run, problems = self.short(script, "bf16", self.plan.device), []
        for kind in ("parameters", "optimizer_states"):
            formula = max(row["formula"] for name, row in run.summary["ledger"].items() if name.startswith(kind))
            if abs(run.held(kind) - formula) > SLACK * formula:
                problems.append(f"{kind} {run.held(kind):,} bytes, by the formula {formula:,}")
        held = run.held(self.plan.device)
        found = f"ledger {held / GIB:.3f} GiB, held {run.allocated / GIB:.3f} GiB"
        most = math.inf if self.plan.rehearsal else held * (1 + SLACK) + WORKSPACE
        if problems or not held <= run.allocated <= most:
            raise Failed(", ".join([found, *problems]))
        return found

    def offload(self) -> str:
        """Base has to fail under the limit, with its own message, and Offload to train under it."""
        plan = self.plan
        if not plan.limit:
            raise Skipped("355M parameters need 4.5 GiB of the card and 16 GiB of the host's memory")
        self.room(plan.offloaded)
        common = {"batch_size": 1, "max_steps": 4, "log_interval": 1, "activation_checkpointing": True, "dropout": 0}
        output, flags = self.launcher.folder / "too-large", common | plan.too_large.flags()
        code, screen = self.launcher.launch(BASE, plan.device, 1, plan.limit, output, flags)
        shutil.rmtree(output, ignore_errors=True)
        if code != 1 or "not enough memory for this model and batch" not in screen:
            raise Failed(f"{BASE} ended with exit code {code}: {reason(screen)}")
        flags = common | plan.offloaded.flags()
        run = self.launcher.train(OFFLOAD, device=plan.device, ranks=1, limit=plan.limit, **flags)
        parameters = [shape.parameters(plan.vocab_size) / 1e6 for shape in (plan.too_large, plan.offloaded)]
        return (f"not enough memory for Base's {parameters[0]:,.1f}M parameters; Offload trains {parameters[1]:,.1f}M, "
                f"peak {run.summary['peak_memory_gib']:.2f} GiB")  # fmt: skip

    def nvme(self) -> str:
        if why := no_nvme(on_gpu=not self.plan.rehearsal):
            raise Skipped(why)
        config = json.loads((ROOT / "configs" / "zero_infinity.json").read_text(encoding="utf-8"))
        for name in ("offload_optimizer", "offload_param"):
            config["zero_optimization"][name]["nvme_path"] = str(self.launcher.folder / "nvme")
        path = self.launcher.folder / "nvme.json"
        path.write_text(json.dumps(config), encoding="utf-8")
        shape = self.plan.shape
        if self.plan.rehearsal:
            shape = shape._replace(n_layer=1, d_model=640)  # what is under 1 MiB DeepSpeed keeps in memory
        flags = shape.flags() | {"batch_size": 1, "max_steps": 3, "ds_config": str(path)}
        run = self.launcher.train(OFFLOAD, device=self.plan.device, ranks=1, **flags)
        sizes = {name: row["held"] for name, row in run.summary["ledger"].items() if name.endswith(" on nvme")}
        found = ", ".join(f"{name} {size / GIB:.3f} GiB" for name, size in sizes.items()) or "nothing on NVMe"
        if not all(sizes.get(f"{kind} on nvme") for kind in ("parameters", "optimizer_states")):
            raise Failed(found)
        return found

    def speed(self, script: str, shape: Shape, *, compiled: bool, bar: float | None) -> str:
        plan = self.plan
        if not (batch := 4 if plan.rehearsal else micro_batch(shape, plan.vocab_size, plan.memory)):
            needed = 18 * shape.parameters(plan.vocab_size) / GIB
            raise Skipped(f"model states take {needed:.1f} GiB, the card has {plan.memory / GIB:.1f} GiB")
        self.room(shape)
        flags = shape.flags() | {"batch_size": batch, "compile": compiled, "dropout": 0, "max_steps": SPEED_STEPS}
        flags |= {"peak_tflops": self.peak} if self.peak else {}
        run = self.launcher.train(script, device=plan.device, ranks=1 if script == BASE else plan.ranks, **flags)
        found = f"{run.summary['tokens_per_second']:,.0f} tokens/s"
        found += f", {batch} sequences per rank, peak {run.summary['peak_memory_gib']:.2f} GiB"
        if not (shares := run.series("mfu")):
            raise Skipped(f"{found}; MFU needs the card's peak: --peak_tflops")
        mfu = median(shares[1:])  # the first holds warm-up and compilation
        found += f", MFU {mfu:.1%}{f' of {self.peak:g} TFLOP/s' if self.peak else ''}"
        if bar and not plan.rehearsal and mfu < bar:
            raise Failed(found)
        return found

    def room(self, shape: Shape) -> None:
        """Skips what the disk cannot save: checkpoint and model are 14 and 2 bytes per parameter."""
        needed, free = 17 * shape.parameters(self.plan.vocab_size), shutil.disk_usage(self.launcher.folder).free
        if free < needed:
            raise Skipped(f"a checkpoint takes {needed / GIB:.0f} GiB, and the disk has {free / GIB:.0f} GiB free")


def no_nvme(*, on_gpu: bool) -> str | None:
    """Why DeepSpeed's NVMe op cannot be built here, if so."""
    from deepspeed.ops.op_builder import AsyncIOBuilder
    from torch.utils import cpp_extension

    if on_gpu and not cpp_extension.CUDA_HOME:
        return f"on a GPU DeepSpeed's NVMe op wants the CUDA toolkit {torch.version.cuda}: set CUDA_HOME"
    return None if AsyncIOBuilder().is_compatible(verbose=False) else "no libaio: apt-get install libaio-dev"


def judge(item: Item) -> Row:
    """An item's row; whatever goes wrong with it stays in it."""
    try:
        verdict, found = "ok", item.find()
    except Skipped as why:
        verdict, found = "skipped", str(why)
    except Failed as failure:
        verdict, found = "FAIL", str(failure)
    except (OSError, ValueError, LookupError) as error:  # a run that left something else than it has to
        verdict, found = "FAIL", repr(error)
    return Row(verdict, item.part, item.what, found, item.wanted)


# The page.
def machine(plan: Plan) -> list[str]:
    """Lines with hardware, driver, versions and date."""
    memory = f"{psutil.virtual_memory().total / GIB:.0f} GiB of memory"
    lines = [f"Host: {cpu_name()}, {os.cpu_count()} cores, {memory}; {platform.system()} {platform.release()}."]
    if plan.rehearsal:
        lines.insert(0, f"Device: CPU, {plan.ranks} ranks. No GPU used.")
    else:
        cards = [torch.cuda.get_device_properties(number) for number in range(plan.ranks)]
        names = ", ".join(f"{card.name} ({card.total_memory / GIB:.0f} GiB)" for card in cards)
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        lines.insert(0, f"GPUs: {names}; driver {driver()}, CUDA {torch.version.cuda}, NCCL {nccl}.")
    packages = ", ".join(f"{name} {version(name)}" for name in ("torch", "deepspeed", "transformers"))
    return [*lines, f"Versions: {packages}, Python {platform.python_version()}. Date: {date.today()}."]


def cpu_name() -> str:
    found = re.search("^model name\\s*: (.*)$", Path("/proc/cpuinfo").read_text(encoding="utf-8"), re.MULTILINE)
    return found[1] if found else platform.machine()


def driver() -> str:
    if not shutil.which("nvidia-smi"):
        return "unknown"
    words = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    lines = subprocess.run(words, capture_output=True, text=True, timeout=60, check=False).stdout.split()
    return lines[0] if lines else "unknown"


def slug(name: str) -> str:
    return re.sub("[^a-z0-9]+", "-", name.lower()).strip("-")


def page(rows: list[Row], plan: Plan, words: list[str]) -> str:
    """The report as Markdown."""
    if plan.rehearsal:
        title = "GPU check: a rehearsal on the CPU"
        remark = "\n**This page measures nothing about GPUs.** It tried the check, at tiny size on the CPU.\n"
    else:
        title, remark = f"GPU check: {torch.cuda.get_device_name(0)}", ""
    table = ["| part | what | found | wanted | verdict |", "|---|---|---|---|---|"]
    table += [f"| {r.part} | {r.what} | {r.found.replace('|', '/')} | {r.wanted} | {r.verdict} |" for r in rows]
    verdicts = [row.verdict for row in rows]
    counts = ", ".join(f"{verdicts.count(verdict)} {verdict}" for verdict in ("ok", "FAIL", "skipped"))
    call = ["```bash", " ".join(["bash scripts/gpu_check.sh", *words]), "```"]
    return "\n".join([f"# {title}", remark, *call, "", *machine(plan), "", f"{counts}.", "", *table, ""])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--dry_run", action="store_true", help="rehearse at tiny size on the CPU; measures no GPU")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help=" ".join(PARTS))
    parser.add_argument("--peak_tflops", type=positive, metavar="N", help="of one card in bf16, where it is not known")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="the page; left out, docs/gpu-NAME.md with the "
                        "card's name, or with --dry_run runs/gpu-rehearsal.md")  # fmt: skip
    return parser


def positive(word: str) -> float:
    try:
        number = float(word)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{word} is not a number above 0")
    return number


def make_plan(dry_run: bool) -> Plan:
    """Raises ValueError where there is no GPU to check."""
    if dry_run:
        return rehearsal_plan()
    if not torch.cuda.is_available():
        build = "a build without CUDA" if torch.version.cuda is None else f"for CUDA {torch.version.cuda}"
        raise ValueError(f"no NVIDIA GPU: torch.cuda.is_available() is False (torch {torch.__version__} is {build}). "
                         "See scripts/check_env.sh; --dry_run rehearses the check on the CPU")  # fmt: skip
    cards = [torch.cuda.get_device_properties(number).total_memory for number in range(torch.cuda.device_count())]
    return gpu_plan(len(cards), min(cards), psutil.virtual_memory().available)


def check(plan: Plan, args: argparse.Namespace) -> list[Row]:
    """The rows of all parts that are asked for, shown as they are found."""
    (ROOT / "runs").mkdir(exist_ok=True)
    rows, peak = [], args.peak_tflops or (1.0 if plan.rehearsal else None)
    with tempfile.TemporaryDirectory(prefix="gpu-check-", dir=ROOT / "runs") as folder:  # /tmp may be small
        items = Check(plan, Launcher(plan, Path(folder)), peak).items()
        for item in (item for item in items if item.part in args.parts):
            rows.append(judge(item))
            print("{0.verdict:8}{0.part:8}  {0.what}: {0.found} (wanted: {0.wanted})".format(rows[-1]), flush=True)
    return rows


def main() -> None:
    if sys.argv[1:2] == ["--probe"]:  # the training process
        return probe(int(sys.argv[2]), sys.argv[3], sys.argv[4:])
    parser = build_parser()
    args = parser.parse_args()
    if args.output and not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: no folder {args.output.parent}")
    if args.output and args.output.is_dir():
        parser.error(f"--output {args.output} is a folder: name a file")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing stays behind
    try:
        plan = make_plan(args.dry_run)
        rows = check(plan, args)
        name = "runs/gpu-rehearsal.md" if plan.rehearsal else f"docs/gpu-{slug(torch.cuda.get_device_name(0))}.md"
        output = args.output or ROOT / name
        output.write_text(page(rows, plan, sys.argv[1:]), encoding="utf-8")
    except (OSError, ValueError) as error:
        sys.exit(f"gpu_check.sh: error: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"wrote {output}")
    sys.exit(any(row.verdict == "FAIL" for row in rows))


if __name__ == "__main__":
    main()
