"""What the tests share: scripts loaded by path, and scripts run as a user would run them."""

import json
import os
import signal
import socket
import subprocess
import sys
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


def train(script: str, output: Path, *words: object, ranks: int = 1, launcher: str = "torchrun") -> str:
    """Run a tiny script to its good end; returns what it printed."""
    result = run(command(script, *TINY, "--output_dir", output, *words, ranks=ranks, launcher=launcher))
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


def losses(output: Path, name: str = "loss") -> dict[int, float]:
    return {step: fields[name] for step, fields in common.read_metrics(output).items() if name in fields}


def weights(output: Path) -> bytes:
    return (output / "model" / "model.safetensors").read_bytes()


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def require_nvme() -> None:
    """Skip the test where DeepSpeed's NVMe op cannot be compiled, or is not yet."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("NVMe offload needs libaio: apt-get install libaio-dev")
    if not any(Path.home().glob(".cache/torch_extensions/*/async_io/async_io.so")):
        load = "from deepspeed.ops.op_builder import AsyncIOBuilder; AsyncIOBuilder().load()"
        pytest.skip(f"async_io is not compiled here, which takes minutes: python -c '{load}'")
