"""The fault drill: ranks are killed at random moments, and the same command is given again until the run is done.

Each script first trains undisturbed. Then it trains again, and N times SIGKILL takes one of its ranks: while it starts,
in the midst of its steps, or while a step folder is being written. Checked is that the launcher ends by itself, that
the next start goes on from no step older than the last one that the kill left whole, and that in the end weights
and metrics are those of the undisturbed run, byte for byte. Exit code 0: all so; 1: not; 2: wrong usage.
"""

import argparse
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import psutil

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
SCRIPTS = {
    "Base": "GPTLike-Base.py",
    "ZeRO-1": "DeepSpeed-GPTLike-ZeRO-1.py",
    "ZeRO-2": "DeepSpeed-GPTLike-ZeRO-2.py",
    "ZeRO-3": "DeepSpeed-GPTLike-ZeRO-3.py",
    "Offload": "DeepSpeed-GPTLike-ZeRO-Offload.py",
}
SAVE = 10
FLAGS = f"""--dataset sample --tokenizer bpe:1024 --n_layer 2 --n_head 4 --d_model 64 --block_size 32 --precision fp32
    --batch_size 4 --log_interval 1 --save_interval {SAVE} --eval_interval 25""".split()
RATES = {"tokens_per_second", "peak_memory_gib", "mfu"}
PATIENCE = 60  # seconds for a launcher to end once a rank is dead
HEADER = """\
| script | ranks | kills | while starting | training | saving | steps lost at most | launcher ended within | all equal |
|---|--:|--:|--:|--:|--:|--:|--:|---|"""


class Failed(Exception):
    """What a drill did not find."""


class Kill(NamedTuple):
    moment: str  # starting, training or saving
    whole: int  # newest whole step that it left
    reached: int  # last step that was logged
    seconds: float  # until the launcher had ended


class Drill:
    """One script, killed again and again."""

    def __init__(self, name: str, kills: int, dice: random.Random, folder: Path):
        self.script, self.wanted, self.dice, self.folder = SCRIPTS[name], kills, dice, folder
        self.ranks = 1 if name == "Base" else 2
        self.steps = 25 * (kills + 1)  # a life takes two intervals at most, and what passes till it ends
        self.output, self.screen = folder / "run", folder / "screen.log"
        self.kills: list[Kill] = []
        self.lost = 0

    def start(self, output: Path) -> subprocess.Popen:
        """The command, always the same but for the port."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        launcher = [str(BIN / "torchrun"), "--nproc_per_node", str(self.ranks), "--master_port", port]
        words = [sys.executable] if self.ranks == 1 else launcher
        words += [str(ROOT / self.script), *FLAGS, "--max_steps", str(self.steps), "--output_dir", str(output)]
        own = {"GPTLIKE_CACHE": str(self.folder.parent / "tokens"), "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        own |= {"PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "PYTHONUNBUFFERED": "1"}
        own["OMP_NUM_THREADS"] = "1"  # Base with two threads crawls on cores that it shares
        with self.screen.open("w") as screen:
            return subprocess.Popen(words, cwd=ROOT, env=os.environ | own, stdout=screen, stderr=subprocess.STDOUT)

    def processes(self, launch: subprocess.Popen) -> list[psutil.Process]:
        """The ranks, once all are there."""
        while launch.poll() is None:
            found = [psutil.Process(launch.pid)]
            if self.ranks > 1:
                found = [child for child in found[0].children() if self.is_rank(child)]
            if len(found) == self.ranks:
                return found
            time.sleep(0.01)
        raise Failed(f"it ended by itself with {launch.returncode}")

    def is_rank(self, process: psutil.Process) -> bool:
        try:
            return any(word.endswith(self.script) for word in process.cmdline()[1:4])
        except psutil.Error:
            return False

    def life(self) -> None:
        """One start, and the death of a rank."""
        began, launch = time.time(), self.start(self.output)
        ranks = []
        try:
            ranks = self.processes(launch)
            victim = self.dice.choice(ranks)
            plan = self.dice.choices(["starting", "training", "saving"], [1, 2, 3])[0]
            self.wait(plan, launch, began)
            victim.kill()
            killed = time.monotonic()
            launch.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            raise Failed(f"still running {PATIENCE} s after a rank was killed") from None
        finally:
            end([psutil.Process(launch.pid)] if launch.poll() is None else [], ranks)
        if launch.returncode == 0:
            raise Failed("the launcher ended with 0 although a rank was killed")
        whole = self.whole_step()
        moment = "saving" if self.unsealed(began) else "training" if self.trained() else "starting"
        self.came_back()
        self.kills.append(Kill(moment, whole, self.last_step(), time.monotonic() - killed))
        print(f"  kill {len(self.kills)} of {self.wanted}: rank {ranks.index(victim)} while {moment}, step "
              f"{self.last_step()}, the last whole one {whole}", flush=True)  # fmt: skip

    def wait(self, plan: str, launch: subprocess.Popen, began: float) -> None:
        """Until the moment that is planned. One while saving is any from the step folder's first to its manifest."""
        delay = self.dice.uniform(0.2, 3 if self.ranks == 1 else 6)
        pause = self.dice.uniform(0, 0.002 if self.ranks == 1 else 0.015)  # a save takes 3 ms, or 20
        goal = 2 * SAVE if plan == "saving" else self.dice.randint(1, 2 * SAVE)
        while launch.poll() is None:
            trained = self.trained()
            if plan == "starting" and (trained or time.time() - began > delay) or trained >= goal:
                return
            if plan == "saving" and self.unsealed(began):
                time.sleep(pause)
                if self.unsealed(began):
                    return
            time.sleep(0.0002)
        raise Failed(f"it ended by itself with {launch.returncode}")

    def trained(self) -> int:
        """Steps that this life has shown."""
        return len(re.findall("^step=[0-9]+ loss", self.screen.read_text(errors="replace"), re.MULTILINE))

    def last_step(self) -> int:
        path = self.output / "metrics.jsonl"
        lines = path.read_text().splitlines() if path.exists() else []
        return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)

    def unsealed(self, since: float) -> list[Path]:
        """Step folders without a manifest that this life has made."""
        found = []
        for folder in self.output.glob("checkpoints/step*"):
            try:
                if folder.stat().st_ctime >= since and not (folder / "run.json").exists():
                    found.append(folder)
            except FileNotFoundError:
                continue  # it was one of the older ones, which are deleted
        return found

    def whole_step(self) -> int:
        """The newest one with a manifest and all its files. Older ones may be deleted meanwhile."""
        steps = [0]
        for manifest in self.output.glob("checkpoints/step*/run.json"):
            try:
                facts = json.loads(manifest.read_text())
                if all((manifest.parent / name).stat().st_size == size for name, size in facts["files"].items()):
                    steps.append(facts["step"])
            except FileNotFoundError:
                continue
        return max(steps)

    def came_back(self) -> None:
        """Where this life went on, if it came so far, is no older than what the kill before it left whole."""
        resumed = re.search("^resumed from .* at step ([0-9]+)$", self.screen.read_text(errors="replace"), re.MULTILINE)
        if self.kills and (resumed or self.trained()):
            step, before = int(resumed[1]) if resumed else 0, self.kills[-1]
            if step < before.whole:
                raise Failed(f"went on from step {step} although step {before.whole} was whole")
            self.lost = max(self.lost, before.reached - step)

    def run(self) -> str:
        """All lives; the row of the table."""
        self.finish(self.folder / "undisturbed")
        while len(self.kills) < self.wanted:
            self.life()
        self.finish(self.output)
        self.came_back()
        if self.lost > SAVE:
            raise Failed(f"{self.lost} steps were lost, with a checkpoint every {SAVE}")
        if difference := self.difference():
            raise Failed(difference)
        moments = [kill.moment for kill in self.kills]
        counts = " | ".join(str(moments.count(moment)) for moment in ("starting", "training", "saving"))
        slowest = max((kill.seconds for kill in self.kills), default=0)
        return f"| `{self.script}` | {self.ranks} | {len(moments)} | {counts} | {self.lost} | {slowest:.1f} s | yes |"

    def finish(self, output: Path) -> None:
        """A life that nobody disturbs."""
        launch = self.start(output)
        try:
            code = launch.wait(600)
        finally:
            end([psutil.Process(launch.pid)] if launch.poll() is None else [], [])
        if code:
            raise Failed(f"undisturbed it ended with {code}")

    def difference(self) -> str | None:
        files = [folder / "model" / "model.safetensors" for folder in (self.output, self.folder / "undisturbed")]
        if files[0].read_bytes() != files[1].read_bytes():
            return "the final weights are not those of the undisturbed run"
        mine, others = (figures(folder) for folder in (self.output, self.folder / "undisturbed"))
        return None if mine == others else "the metrics are not those of the undisturbed run"


def figures(folder: Path) -> list[dict]:
    """All that metrics.jsonl holds but rates and memory."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in record.items() if name not in RATES} for record in records]


def end(launches: list[psutil.Process], ranks: list[psutil.Process]) -> None:
    """Leave nothing running, whatever has happened."""
    for process in [*(child for launch in launches for child in launch.children(recursive=True)), *launches, *ranks]:
        if process.is_running():
            process.send_signal(signal.SIGKILL)


def drill(name: str, args: argparse.Namespace, folder: Path) -> tuple[str, bool]:
    """The row of one script, and whether all was as it has to be."""
    print(f"== {SCRIPTS[name]}", flush=True)
    (folder / name).mkdir()
    one = Drill(name, args.kills, random.Random(f"{args.seed} {name}"), folder / name)
    began = time.monotonic()
    try:
        row = one.run()
        print(f"PASS {name} ({time.monotonic() - began:.0f} s)", flush=True)
        return row, True
    except Failed as error:
        print(one.screen.read_text(errors="replace")[-4000:])
        print(f"FAIL {name}: after {len(one.kills)} kills: {error}", flush=True)
        return f"| `{one.script}` | {one.ranks} | {len(one.kills)} | | | | | | no: {error} |", False


def report(rows: list[str], words: list[str]) -> str:
    """A page with command, machine, versions and table."""
    versions = f"torch {version('torch')}, deepspeed {version('deepspeed')}, Python {sys.version.split()[0]}"
    return f"""# Fault drill

{__doc__.split(f"{chr(10)}{chr(10)}")[1].split(" Exit code")[0]}

```bash
{" ".join(["bash scripts/drill.sh", *words])}
```

{psutil.cpu_count()} CPU cores, no GPU used, {versions}, {date.today()}. A
checkpoint every {SAVE} steps. The seed draws ranks and moments; where a kill lands also depends on the machine.

{chr(10).join([HEADER, *rows])}
"""


def positive(word: str) -> int:
    if not (word.isdecimal() and int(word) > 0):
        raise argparse.ArgumentTypeError(f"{word} is not a number above 0")
    return int(word)


def main() -> None:
    parser = argparse.ArgumentParser(prog="drill.sh", description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=positive, default=20, help="of each script")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), metavar="NAME",
                        help=" ".join(SCRIPTS))  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the moments and the ranks")
    parser.add_argument("--output", type=Path, metavar="FILE.md", help="write the table there, too")
    args = parser.parse_args()
    if args.output and not args.output.parent.is_dir():
        parser.error(f"--output {args.output}: no folder {args.output.parent}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # nothing stays behind
    with tempfile.TemporaryDirectory() as folder:
        results = [drill(name, args, Path(folder)) for name in args.scripts]
    rows, fine = [row for row, _ in results], all(passed for _, passed in results)
    print("\n".join([HEADER, *rows]))
    if args.output:
        args.output.write_text(report(rows, sys.argv[1:]))
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
