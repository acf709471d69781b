"""Compile the C++ ops that DeepSpeed would compile at its first use, so that no training run waits for them.

DeepSpeed finds them in ~/.cache/torch_extensions (or $TORCH_EXTENSIONS_DIR), one set for each version of Python and
kind of device. Compiled already, each takes a second or two.

Run: python scripts/compile_ops.py     exit 0: ready, or nothing to compile them with; 1: an op does not build
"""

import argparse
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch.utils import cpp_extension

ON_CPU = {"ShareMemCommBuilder": "collectives", "CPUAdamBuilder": "AdamW of ZeRO-Offload"}
ON_GPU = {"FusedAdamBuilder": "AdamW", "CPUAdamBuilder": "AdamW of ZeRO-Offload"}
FIRST_ERROR = re.compile(r"^.*\b(?:fatal )?error:.*$", re.MULTILINE)


def explain(error: Exception) -> str:
    """The compiler's first error out of a log of hundreds of lines."""
    found = FIRST_ERROR.search(str(error))
    return found[0].strip() if found else (str(error).strip() or repr(error)).splitlines()[0]


def announce_wait(lock: Path) -> None:
    """PyTorch waits, in silence and for ever, for whoever made the lock: perhaps a process that was killed."""
    if lock.exists():
        print(f"  waiting for another process that compiles. If there is none, delete {lock}", flush=True)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False).parse_args()
    on_gpu = torch.cuda.is_available()
    if on_gpu and not cpp_extension.CUDA_HOME:
        print("no nvcc: DeepSpeed's own Adam is skipped, training takes PyTorch's, which is slower. To have it, "
              f"install the CUDA toolkit {torch.version.cuda}")
        return
    os.environ.setdefault("DS_ACCELERATOR", "cuda" if on_gpu else "cpu")  # or DeepSpeed warns that it found no GPU
    from deepspeed.accelerator import get_accelerator

    print("DeepSpeed's C++ ops, compiled once per machine in 1-2 minutes:", flush=True)
    for builder_name, use in (ON_GPU if on_gpu else ON_CPU).items():
        op, start = builder_name.removesuffix("Builder"), time.perf_counter()
        try:
            builder = get_accelerator().create_op_builder(builder_name)
            announce_wait(Path(cpp_extension._get_build_directory(builder.name, verbose=False), "lock"))
            builder.load(verbose=False)
        except (RuntimeError, ImportError, OSError, subprocess.CalledProcessError) as error:
            sys.exit(f"compile_ops.py: error: DeepSpeed's {op} ({use}) does not build: {explain(error)}\n"
                     "It needs g++ and Python's headers; on Debian and Ubuntu: apt-get install g++ python3-dev")
        print(f"  {op} ({use}): {time.perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
