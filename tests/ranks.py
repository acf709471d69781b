"""Runs Python files in ranks that are forked from this process, which has their imports: a start takes 2 s, not 15.

conftest.py starts it. A line of JSON on stdin asks for a run: words (a file and its flags), ranks, cwd, variables,
out and err (files), seconds. A line on stdout answers with the exit code: 0, that of the first rank that failed, or -9
after so many seconds. As under torchrun, a rank that fails ends the others. The launchers have tests of their own.
"""

import contextlib
import json
import os
import runpy
import signal
import sys
import time
from pathlib import Path

import datasets  # noqa: F401
import deepspeed  # noqa: F401
import torch._dynamo  # noqa: F401  the first optimizer imports it
import transformers
from deepspeed.runtime.zero.muon import muon_optimizer  # noqa: F401  deepspeed.initialize imports it

transformers.AutoTokenizer, transformers.PreTrainedTokenizerFast  # noqa: B018  imported at their first use


def become_rank(rank: int, ask: dict) -> None:
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(ask[name], os.O_WRONLY | os.O_APPEND | os.O_CREAT), number)
    os.chdir(ask["cwd"])
    os.environ.update(ask["variables"])
    if ask["ranks"] > 1:
        os.environ |= dict.fromkeys(("RANK", "LOCAL_RANK"), str(rank))
        os.environ |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), str(ask["ranks"]))
    sys.argv = ask["words"]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def fork(rank: int, ask: dict) -> int:
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        become_rank(rank, ask)
        code = 0
    except SystemExit as end:
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:  # noqa: BLE001  as the interpreter does: a traceback, and code 1
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def run(ask: dict) -> int:
    pids = [fork(rank, ask) for rank in range(ask["ranks"])]
    end, code = time.monotonic() + ask["seconds"], 0
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid:
            pids.remove(pid)
            code = code or os.waitstatus_to_exitcode(status)
        elif time.monotonic() > end:
            code = code or -signal.SIGKILL
        else:
            time.sleep(0.01)
        for other in pids if code else []:
            with contextlib.suppress(ProcessLookupError):
                os.kill(other, signal.SIGKILL)
    return code


if __name__ == "__main__":
    for line in sys.stdin:
        print(run(json.loads(line)), flush=True)
