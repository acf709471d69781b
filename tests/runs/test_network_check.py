"""scripts/tools/network_check.py: hosts that meet, one that is missing, one that comes twice; and two hosts train."""

import subprocess
import sys

import pytest
from conftest import MULTIHOSTS, ROOT, TINY, environment, free_port

pytestmark = pytest.mark.drill
CHECK = ROOT / "scripts" / "tools" / "network_check.py"


def start(words: list, **env: str) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([str(word) for word in words], cwd=ROOT, env=environment(**env), **pipes)


def finish(*processes: subprocess.Popen, timeout: int = 120) -> list[tuple[int, str]]:
    try:
        printed = [process.communicate(timeout=timeout)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, printed, strict=True)]


@pytest.mark.parametrize("launcher", ["python", "torchrun"])
def test_hosts_meet(launcher):
    """Each in its row, with interface, versions and device, and the rate of an all-reduce."""
    place = ["--nnodes=2", "--master_addr=127.0.0.1", f"--master_port={free_port()}"]
    if launcher == "torchrun":
        words = [sys.executable, "-m", "torch.distributed.run", *place, "--nproc_per_node=1"]
        commands = [[*words, f"--node_rank={rank}", CHECK, "--mib", 4] for rank in (0, 1)]
    else:
        commands = [[sys.executable, CHECK, *place, f"--node_rank={rank}", "--mib", 4] for rank in (0, 1)]
    (code, text), other = finish(*map(start, commands))
    assert (code, *other) == (0, 0, ""), text
    heads, first, second, verdict = text.splitlines()[-4:]
    assert heads.split() == "rank host interface Python torch deepspeed transformers device".split()
    assert " lo 127.0.0.1 " in first and second.startswith("1 ") and second.endswith("CPU")
    assert verdict.startswith("ok: 2 ranks met at 127.0.0.1:") and verdict.endswith(" GB/s by each rank")


@pytest.mark.parametrize(
    ("ranks", "size", "messages"),
    [
        ([1], 2, [" does not reach 127.0.0.1:{port} within 4 s: "]),
        ([0, 2], 3, ["FAIL: rank 1 did not come to 127.0.0.1:{port} within 4 s; there are rank 0 on ", "FAIL: rank "]),
    ],
)
def test_who_is_missing(ranks, size, messages):
    port = free_port()
    words = [sys.executable, CHECK, "--timeout", 4, f"--nnodes={size}", "--master_addr=127.0.0.1"]
    ends = finish(*[start([*words, f"--master_port={port}", f"--node_rank={rank}"]) for rank in ranks])
    for (code, text), message in zip(ends, messages, strict=True):
        assert code == 1 and "a firewall closes the port" in text and "Traceback" not in text
        assert message.format(port=port) in text


def test_wrong_flags():
    [(code, text)] = finish(start([sys.executable, CHECK, "--nnodes=2", "--node_rank=2", "--master_addr=127.0.0.1"]))
    assert code == 2 and "--node_rank runs from 0 to below --nnodes" in text


def test_run_multihost_trains_on_two_hosts_by_deepspeed(tmp_path):
    """Two commands on this machine, as on two hosts. By torchrun it trains in the rehearsal's drill elastic."""
    (tmp_path / "hosts").write_text("localhost slots=1\n127.0.0.1 slots=1\n")
    flags = ["--launcher", "deepspeed", "--no_ssh", "--hostfile", tmp_path / "hosts"]
    words = ["bash", "scripts/run_multihost.sh", *flags, MULTIHOSTS, *TINY, "--max_steps", 3]
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "RDZV_TIMEOUT": "60"}
    hosts = [start([*words, "--output_dir", tmp_path / "run"], NODE_RANK=str(rank), **place) for rank in (0, 1)]
    (code, text), (other, _) = finish(*hosts, timeout=200)
    assert (code, other) == (0, 0), text
    assert "world size 2" in text and (tmp_path / "run" / "model" / "model.safetensors").is_file()
