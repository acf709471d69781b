"""The kill drill: SIGKILL takes a rank at a random moment, and the same command is given again until the run is done.

Each script first trains undisturbed, on CPU ranks. Then it trains again and loses a rank N times: while it starts, in
the midst of its steps, or while it saves. A run that is done before all N begins anew. Checked is that the launcher
ends by itself and that in the end the weights in model/ and all losses are those of the undisturbed run: byte for byte,
and for ZeRO-Offload within 1e-6 (DeepSpeedCPUAdam takes its powers of beta anew after a load). Exit code 0: all so.

    python scripts/dev/drill.py --kills 5 --scripts ZeRO-2 ZeRO-3
"""

import argparse
import random
import shutil
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from benchmark import end, logged_steps
from common import ROOT, SCRIPTS, ToolError, exit_with, launch_command, launch_environment, read_metrics, table

CASES = dict(zip(("Base", "ZeRO-1", "ZeRO-2", "ZeRO-3", "Offload"), SCRIPTS[:5], strict=True))
FLAGS = """--dataset sample --tokenizer bpe:1024 --n_layer 2 --n_head 4 --d_model 64 --block_size 32 --precision fp32
    --batch_size 4 --log_interval 1 --save_interval 10 --eval_interval 25""".split()
PATIENCE_S = 60  # for a launcher to end once a rank is dead


def start(name: str, output: Path, steps: int) -> subprocess.Popen:
    command = launch_command(CASES[name], 1 if name == "Base" else 2)
    command += [*FLAGS, "--max_steps", str(steps), "--output_dir", str(output)]
    env = launch_environment(gpus=False)
    with output.with_suffix(".log").open("a") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=log, cwd=ROOT, start_new_session=True)


def train(name: str, output: Path, steps: int) -> None:
    """A run to its end. Raises ToolError that names its log, if it fails."""
    launcher = start(name, output, steps)
    try:
        code = launcher.wait()
    finally:
        end(launcher)
    if code:
        raise ToolError(f"{name} ended with exit code {code}: see {output}.log")


def ranks_of(launcher: subprocess.Popen, name: str) -> list[psutil.Process]:
    if name == "Base":
        return [psutil.Process(launcher.pid)]
    children = psutil.Process(launcher.pid).children()
    return [child for child in children if CASES[name] in " ".join(child.cmdline())]


def wait_for(moment: str, output: Path, launcher: subprocess.Popen, dice: random.Random) -> None:
    """Return at a random time while the run starts, trains or saves; earlier if it ends."""
    if moment == "starting":
        time.sleep(dice.uniform(2, 9))
        return
    saved = set(output.glob("checkpoints/step*"))
    steps = logged_steps(output) + dice.randrange(1, 12)
    while launcher.poll() is None:
        time.sleep(0.002)
        if moment == "training" and logged_steps(output) > steps:
            return
        saving = set(output.glob("checkpoints/step*")) - saved or (output / "checkpoints" / "state.part").exists()
        if moment == "saving" and saving:
            time.sleep(dice.uniform(0, 0.05))
            return


def kill_a_rank(name: str, launcher: subprocess.Popen, dice: random.Random) -> bool:
    """Whether there was one to kill before the launcher ended."""
    while launcher.poll() is None:
        with suppress(psutil.NoSuchProcess):
            ranks = ranks_of(launcher, name)
            if ranks:
                dice.choice(ranks).kill()
                return True
        time.sleep(0.01)  # torchrun has not started them yet
    return False


def run_and_kill(name: str, output: Path, steps: int, dice: random.Random) -> str:
    """Run until a rank is killed. Returns the moment, or "" where the run was over before."""
    moment = dice.choice(("starting", "training", "saving"))
    launcher = start(name, output, steps)
    try:
        wait_for(moment, output, launcher, dice)
        killed = kill_a_rank(name, launcher, dice)
        code = launcher.wait(PATIENCE_S)
    except subprocess.TimeoutExpired as error:
        raise ToolError(f"{name}: the launcher did not end within {PATIENCE_S} s of a kill while {moment}") from error
    finally:
        end(launcher)
    if code and not killed:
        raise ToolError(f"{name} ended by itself with exit code {code}: see {output}.log")
    return moment if code else ""


def compare(name: str, calm: Path, killed: Path) -> str:
    """ "equal", or the largest difference of a loss. Raises ToolError where that is too large."""
    wanted, found = read_metrics(calm), read_metrics(killed)
    largest = 0.0
    for step, fields in wanted.items():
        for field in fields.keys() & {"loss", "validation_loss"}:
            largest = max(largest, abs(fields[field] - found.get(step, {}).get(field, float("inf"))))
    weights = [(run / "model" / "model.safetensors").read_bytes() for run in (calm, killed)]
    if largest == 0 and weights[0] == weights[1]:
        return "equal"
    if name != "Offload" or largest > 1e-6:
        raise ToolError(f"{name}: weights or losses are not those of the undisturbed run, {largest:.1e} apart")
    return f"{largest:.1e}"


def drill(name: str, kills: int, steps: int, folder: Path, dice: random.Random) -> list:
    calm, killed = folder / f"{name}-calm", folder / f"{name}-killed"
    train(name, calm, steps)
    moments = []
    while len(moments) < kills:
        moment = run_and_kill(name, killed, steps, dice)
        moments += [moment] if moment else []
        if not moment:  # it finished before the dice said so: the next kills hit a run from its beginning
            compare(name, calm, killed)
            shutil.rmtree(killed)
    train(name, killed, steps)
    counts = [moments.count(moment) for moment in ("starting", "training", "saving")]
    return [name, len(moments), *counts, compare(name, calm, killed)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20, help="of each script (20)")
    parser.add_argument("--scripts", nargs="+", choices=list(CASES), default=list(CASES), help="all if left out")
    parser.add_argument("--steps", type=int, default=0, help="optimizer steps of a run (25 for each kill, and 20)")
    parser.add_argument("--seed", type=int, default=random.randrange(10**6), help="of moments and ranks")
    args = parser.parse_args()
    print(f"seed {args.seed}", flush=True)
    heads = ["script", "kills", "starting", "training", "saving", "beside the undisturbed run"]
    rows, folder = [], Path(tempfile.mkdtemp(prefix="drill-"))
    try:
        for name in args.scripts:
            steps = args.steps or 20 + 25 * args.kills
            rows.append(drill(name, args.kills, steps, folder, random.Random(f"{args.seed} {name}")))
            print(table(heads, rows), flush=True)
    except ToolError as error:
        exit_with(error)
    shutil.rmtree(folder)


if __name__ == "__main__":
    main()
