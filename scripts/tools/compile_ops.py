"""Compile the C++ ops that the scripts use, so that no run waits for them.

CPUAdam is the AdamW of ZeRO-Offload. The shared-memory op is loaded in each run on a machine without a GPU.
DeepSpeed finds them in ~/.cache/torch_extensions (or $TORCH_EXTENSIONS_DIR), by Python's version and kind of device.

Run: python scripts/tools/compile_ops.py     exit 0: ready; 1: one does not build
"""

import argparse
import contextlib
import glob
import os
import subprocess
import time
from pathlib import Path

import torch
from common import exit_with
from torch.utils import cpp_extension

COMPILES_S = 300  # the longest that an op takes
CURE = "It needs g++ and Python's headers; on Debian and Ubuntu: apt-get install g++ python3-dev"


def heed_lock(lock: Path) -> None:
    """Remove the lock of a process that was killed: PyTorch waits for it, in silence and for ever."""
    if not lock.exists():
        return
    held = set(map(os.path.realpath, filter(os.path.exists, glob.glob("/proc/*/fd/*"))))
    if str(lock.resolve()) in held:
        print("  waiting for another process that compiles", flush=True)
        return
    with contextlib.suppress(FileNotFoundError):  # it is released meanwhile
        end = min(lock.stat().st_mtime, time.time()) + COMPILES_S
        if time.time() < end:
            print(f"  another host may hold {lock}: waiting {COMPILES_S} s. If none does, delete it", flush=True)
        while lock.exists() and time.time() < end:
            time.sleep(0.5)
        lock.unlink()
        print(f"  removed {lock}: its process was killed", flush=True)


def compile_op(name: str) -> None:
    """Where it does not build, the end, with the compiler's first error out of a log of hundreds of lines."""
    from deepspeed.accelerator import get_accelerator

    start = time.perf_counter()
    try:
        builder = get_accelerator().create_op_builder(name)
        heed_lock(Path(cpp_extension._get_build_directory(builder.name, verbose=False), "lock"))
        builder.load(verbose=False)
    except (RuntimeError, ImportError, OSError, subprocess.CalledProcessError) as error:
        lines = (str(error).strip() or repr(error)).splitlines()
        first = next((line for line in lines if "error:" in line), lines[0])
        exit_with(f"DeepSpeed's {name} does not build: {first.strip()}\n{CURE}")
    print(f"  {name.removesuffix('Builder')}: ready after {time.perf_counter() - start:.0f} s", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False).parse_args()
    on_gpu = torch.cuda.is_available()
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")  # or DeepSpeed warns that it found no GPU
    print("DeepSpeed's C++ ops, compiled once per machine in a minute or two:", flush=True)
    compile_op("CPUAdamBuilder")
    if not on_gpu:
        compile_op("ShareMemCommBuilder")


if __name__ == "__main__":
    main()
