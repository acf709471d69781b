"""What the tests share: scripts loaded by path, and scripts run as a user would run them."""

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
sys.path.insert(0, str(ROOT / "scripts" / "tools"))
os.environ.setdefault("DS_ACCELERATOR", "cpu" if not Path("/dev/nvidiactl").exists() else "cuda")
import common  # noqa: E402

BASE, ZERO1, ZERO2, ZERO3, OFFLOAD, MULTIHOSTS = common.SCRIPTS
PATIENT = os.cpu_count() >= 8 or "PATIENT" in os.environ  # for what takes minutes on few cores
patiently = pytest.mark.skipif(not PATIENT, reason="few cores, little time: set PATIENT=1 to wait for it")
TINY = """--dataset sample --tokenizer bpe:512 --n_layer 2 --n_head 4 --d_model 64 --block_size 32 --batch_size 4
    --precision fp32 --log_interval 1""".split()


@pytest.fixture(autouse=True)
def signal_handlers():
    """A shell starts background work with SIGINT ignored, which processes that tests start would inherit."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def load_script(name: str) -> ModuleType:
    return common.load_script(name)


def script_args(script: ModuleType, *words: str) -> Namespace:
    """The script's arguments as on one rank without a launcher."""
    args = script.parse_args(words)
    args.rank, args.world_size, args.local_rank, args.zero_stage = 0, 1, 0, 0
    args.device, args.device_name = "cpu", "CPU"
    return args


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(script: str, *words: object, ranks: int = 1, launcher: str = "torchrun") -> list[str]:
    """The command line of a script; Base, and others with launcher "python", are run without a launcher."""
    line = [str(ROOT / script), *map(str, words)]
    if script == BASE or launcher == "python":
        return [sys.executable, *line]
    port = ["--master_port", str(free_port())]
    if launcher == "deepspeed":
        return [str(BIN / "deepspeed"), "--num_gpus", str(ranks), *port, *line]
    return [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), *port, *line]


def environment(**changes: str) -> dict[str, str]:
    """This process's, without a launcher's variables and with the Hub out of reach, unless changes say otherwise."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return kept | {"HF_HUB_OFFLINE": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"} | changes


def run(words: list[str], *, timeout: int = 240, cwd: Path = ROOT, **changes: str) -> subprocess.CompletedProcess:
    """Run to the end; stdout and stderr apart."""
    variables = environment(**changes)
    return subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout)


@functools.cache
def rank_server() -> subprocess.Popen:
    """tests/ranks.py, which ends when this process does. One thread a rank, as under torchrun."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    return subprocess.Popen(
        [sys.executable, ROOT / "tests" / "ranks.py"], env=environment(OMP_NUM_THREADS="1"), **pipes
    )


def run_script(script: str | Path, *words: object, ranks: int = 1, cwd: Path = ROOT, **changes: str):
    """A Python file on so many ranks, to its end: forked from tests/ranks.py on CPUs, by torchrun on GPUs."""
    if os.environ["DS_ACCELERATOR"] != "cpu":
        return run(
            command(script, *words, ranks=ranks, launcher="torchrun" if ranks > 1 else "python"), cwd=cwd, **changes
        )
    with tempfile.TemporaryDirectory() as folder:
        line = [str(ROOT / script), *map(str, words)]
        files = {name: Path(folder, name) for name in ("out", "err")}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())} if ranks > 1 else {}
        ask = {"words": line, "ranks": ranks, "cwd": str(cwd), "variables": place | changes, "seconds": 240}
        server = rank_server()
        server.stdin.write(json.dumps(ask | {name: str(path) for name, path in files.items()}) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(line, code, files["out"].read_text(), files["err"].read_text())


def run_line(line: list[str]) -> subprocess.CompletedProcess:
    """What a printed or built command line would start, by run_script."""
    place = next(place for place, word in enumerate(line) if word.endswith(".py"))
    ranks = line[line.index("--nproc_per_node") + 1] if "--nproc_per_node" in line[:place] else 1
    return run_script(line[place], *line[place + 1 :], ranks=int(ranks))


def train(script: str, output: Path, *words: object, ranks: int = 1) -> str:
    """Run a tiny script to its good end; returns what it printed."""
    result = run_script(script, *TINY, "--output_dir", output, *words, ranks=ranks)
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def losses(output: Path, name: str = "loss") -> dict[int, float]:
    return {step: fields[name] for step, fields in common.read_metrics(output).items() if name in fields}


def weights(output: Path) -> bytes:
    return (output / "model" / "model.safetensors").read_bytes()


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def require_nvme() -> None:
    """Skip the test where DeepSpeed's NVMe op cannot be compiled, or takes minutes to."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("NVMe offload needs libaio: apt-get install libaio-dev")
    if not PATIENT:
        pytest.skip("DeepSpeed compiles its NVMe op, which takes minutes on few cores: set PATIENT=1 to wait for it")
