"""What the tools share: loading a script by path, reading what a run wrote, and printing tables."""

import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import NoReturn

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = (  # in teaching order
    "GPTLike-Base.py",
    "DeepSpeed-GPTLike-ZeRO-1.py",
    "DeepSpeed-GPTLike-ZeRO-2.py",
    "DeepSpeed-GPTLike-ZeRO-3.py",
    "DeepSpeed-GPTLike-ZeRO-Offload.py",
    "DeepSpeed-GPTLike-Multihosts.py",
)
# Dense, 16 bit, by the names that torch.cuda.get_device_name() gives.
PEAK_TFLOPS = {"NVIDIA H200": 989, "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA A100-SXM4-80GB": 312}


class ToolError(Exception):
    """Something that the user can mend."""


def exit_with(error: Exception | str) -> NoReturn:
    """One message for the user and exit code 1."""
    sys.exit(f"{Path(sys.argv[0]).name}: error: {error}")


def load_script(name: str) -> ModuleType:
    """A script of the root as a module."""
    path = ROOT / name
    module_name = path.stem.replace("-", "_")
    if module_name not in sys.modules:
        spec = importlib.util.spec_from_file_location(module_name, path)
        sys.modules[module_name] = importlib.util.module_from_spec(spec)  # before it runs: pickle and NamedTuple ask
        spec.loader.exec_module(sys.modules[module_name])
    return sys.modules[module_name]


def offload_devices(zero: dict) -> list[str]:
    """Where a JSON's zero_optimization puts optimizer states and parameters: each "none", "cpu" or "nvme"."""
    sections = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
    return [section.get("device", "none") for section in sections]


def right_script(zero: dict) -> str:
    """The script that a JSON's zero_optimization is for."""
    stage = zero.get("stage", 0)
    if offload_devices(zero) != ["none", "none"]:
        return SCRIPTS[4]
    return SCRIPTS[stage] if stage in (0, 1, 2, 3) else ""


def read_json(path: Path) -> dict:
    """Raises ToolError that names the file, if it is missing or not a JSON object."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ToolError(f"cannot read {path}: {error}") from error
    if not isinstance(value, dict):
        raise ToolError(f"{path} is no JSON object")
    return value


def read_metrics(run: Path) -> dict[int, dict]:
    """The fields of metrics.jsonl by step. A resumed run writes some steps again: of a field its last value counts.

    Raises ToolError that names file and line. A last line without its end, of a killed run, is passed over.
    """
    path, steps = Path(run, "metrics.jsonl"), {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    except (OSError, ValueError) as error:
        raise ToolError(f"{run} holds no run: {error}") from error
    for number, line in enumerate(lines, start=1):
        try:
            fields = json.loads(line)
            steps.setdefault(int(fields["step"]), {}).update(fields)
        except (ValueError, TypeError, KeyError) as error:
            if number < len(lines) or line.endswith("\n"):
                raise ToolError(f"{path}, line {number} is not what a run writes: {error!r}") from error
    return dict(sorted(steps.items()))


def mfu(tokens_per_second: float, args: dict) -> float | None:
    """Model FLOPs utilization: the share of its GPUs' 16-bit peak that a run reaches, forward and backward.

    args: the run's args.json. None where a card's peak is not known, and in fp32.
    """
    peak = PEAK_TFLOPS.get(args.get("device_name"))
    if peak is None or args["precision"] == "fp32":
        return None
    flops_per_token = 6 * args["n_params"] + 12 * args["n_layer"] * args["block_size"] * args["d_model"]
    return tokens_per_second * flops_per_token / (peak * 1e12 * args["world_size"])


def warn_pickle(checkpoint: Path) -> None:
    print(f"warning: DeepSpeed unpickles {checkpoint}, which can run any code: only of your own runs", file=sys.stderr)


def table(heads: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Columns of equal width; numbers to the right, all else to the left."""
    cells = [[str(head) for head in heads]] + [[str(cell) for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    numeric = [all(isinstance(row[i], int | float) for row in rows) for i in range(len(heads))]
    lines = []
    for row in cells:
        parts = [cell.rjust(w) if right else cell.ljust(w) for cell, w, right in zip(row, widths, numeric, strict=True)]
        lines.append("  ".join(parts).rstrip())
    return "\n".join(lines)


def cpu_default() -> None:
    """Without a GPU tell DeepSpeed so, before it is imported: else it warns of its guess."""
    if not os.environ.get("CUDA_VISIBLE_DEVICES") and not Path("/dev/nvidiactl").exists():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")


def launch_command(script: str, ranks: int) -> list[str]:
    """The beginning of a command line in this Python: plain for one rank, by torchrun at a free port for several."""
    if ranks == 1:
        return [sys.executable, str(ROOT / script)]
    launcher = ["-m", "torch.distributed.run", "--standalone", "--local_addr", "127.0.0.1"]
    return [sys.executable, *launcher, "--nproc_per_node", str(ranks), str(ROOT / script)]


def launch_environment(gpus: bool, **changes: str) -> dict[str, str]:
    """This process's, without a launcher's variables and without the Hub; GPUs are hidden where gpus is false."""
    dropped = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # this Python's ninja
    hidden = {} if gpus else {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    return kept | hidden | {"PATH": path, "HF_HUB_OFFLINE": "1"} | changes
