"""What the tests share: scripts loaded by path, scripts run as a user would run them, and a cache of such runs."""

import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
from functools import lru_cache
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
BASE = "GPTLike-Base.py"
ZERO = {
    "zero1": "DeepSpeed-GPTLike-ZeRO-1.py",
    "zero2": "DeepSpeed-GPTLike-ZeRO-2.py",
    "zero3": "DeepSpeed-GPTLike-ZeRO-3.py",
    "zero_offload": "DeepSpeed-GPTLike-ZeRO-Offload.py",
    "zero3_offload": "DeepSpeed-GPTLike-ZeRO-Offload.py",
    "multihosts": "DeepSpeed-GPTLike-Multihosts.py",
}  # by JSON
SCRIPTS = [BASE, *dict.fromkeys(ZERO.values())]
TINY = {"dataset": "sample", "tokenizer": "bpe:1024", "n_layer": 2, "n_head": 4, "d_model": 64, "block_size": 32}


@lru_cache
def load_script(name: str) -> ModuleType:
    """A script of the root or of scripts/ as a module; importing it has no side effect. What a test file has imported
    by name is not loaded again, since what is pickled for another process names it."""
    path = next(path for path in (ROOT / name, ROOT / "scripts" / name) if path.is_file())
    spec = importlib.util.spec_from_file_location(path.stem.replace("-", "_"), path)
    if getattr(sys.modules.get(spec.name), "__file__", None) == str(path):
        return sys.modules[spec.name]
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def signal_handlers():
    """A script that runs inside pytest leaves its handlers; pytest would then not end on SIGTERM. And a shell starts
    what runs in the background with SIGINT ignored, which the processes that tests start would inherit."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def command(script: str, *, ranks: int = 1, launcher: str = "torchrun", **flags: object) -> list[str]:
    """The command line of a script. A flag that is True has no value; one that is None is left out."""
    words = [str(ROOT / script)]
    for flag, value in flags.items():
        words += [] if value is None else [f"--{flag}"] if value is True else [f"--{flag}", str(value)]
    if launcher == "python":
        return [sys.executable, *words]
    port = ["--master_port", str(free_port())]
    if launcher == "deepspeed":
        return [str(BIN / "deepspeed"), "--num_gpus", str(ranks), *port, *words]
    return [str(BIN / "torchrun"), "--nproc_per_node", str(ranks), *port, *words]


def run(words: list[str], *, timeout: int = 240, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess:
    """Run to the end; stdout and stderr are kept apart. The Hub is out of reach unless env says otherwise."""
    inherited = {key: value for key, value in os.environ.items() if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    offline = {"HF_HUB_OFFLINE": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    variables = {key: value for key, value in (inherited | offline | env).items() if value}
    return subprocess.run(words, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout)


def require_nvme() -> None:
    """Skip the test where DeepSpeed's NVMe op cannot be compiled."""
    from deepspeed.ops.op_builder import AsyncIOBuilder

    if not AsyncIOBuilder().is_compatible(verbose=False):
        pytest.skip("NVMe offload needs libaio: apt-get install libaio-dev")


class Run(NamedTuple):
    """What a training run left behind."""

    output: str
    folder: Path

    def metrics(self, name: str) -> list[float]:
        lines = (self.folder / "metrics.jsonl").read_text().splitlines()
        return [record[name] for record in map(json.loads, lines) if name in record]

    def json(self, name: str) -> dict:
        return json.loads((self.folder / f"{name}.json").read_text())


@pytest.fixture(scope="session", autouse=True)
def token_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Tests neither use nor fill the user's own token cache."""
    os.environ["GPTLIKE_CACHE"] = str(tmp_path_factory.mktemp("tokens"))


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory):
    """A function that trains and returns its Run; the same arguments train once in a test session."""
    done: dict[str, Run] = {}

    def train(config: str | None, **options: object) -> Run:
        key = json.dumps([config, options], sort_keys=True)
        if key not in done:
            folder = tmp_path_factory.mktemp(config or "base")
            options = TINY | {"max_steps": 20, "log_interval": 1, "ds_config": None} | options
            if config:
                options["ds_config"] = options["ds_config"] or ROOT / "configs" / f"{config}.json"
            else:
                options["launcher"] = "python"
            result = run(command(ZERO[config] if config else BASE, output_dir=folder, **options))
            assert result.returncode == 0, result.stdout + result.stderr
            done[key] = Run(result.stdout, folder)
        return done[key]

    return train
