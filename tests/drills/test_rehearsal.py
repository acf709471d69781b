"""scripts/rehearse_multihost.sh: two hosts in network namespaces train, lose each other and recover. The drills check
what they find themselves; here their verdicts are read, and that nothing stays behind."""

import os
import re
import signal
import subprocess
import time

import pytest
from conftest import ROOT, run

SCRIPT = ROOT / "scripts" / "rehearse_multihost.sh"
DRILLS = {
    "plain": r"100 losses of two hosts and of one host with two ranks are at most (\d\.\de[-+]\d\d) apart",
    "host-missing": r"the run ended; network_check.py named rank 1, and with both hosts the interface of each",
    "host-lost": r"continued from step 25; losses and final weights are those of the undisturbed run",
    "split-disks": r"continued after step \d+ exactly as undisturbed; a lost disk is refused",
    "version-mismatch": r"both hosts name the package and both versions",
    "elastic": r"restarted; losses and final weights are those of the undisturbed run",
}


def need_namespaces() -> None:
    user = [] if os.geteuid() == 0 else ["--user", "--map-root-user"]
    words = ["unshare", *user, "--net", "--mount", "--pid", "--fork", "--mount-proc", "ip", "link"]
    try:
        allowed = subprocess.run(words, capture_output=True).returncode == 0
    except FileNotFoundError:
        allowed = False
    if not allowed:
        pytest.skip("needs unshare, ip and the privilege to make network namespaces")


def processes(words: str) -> str:
    """The numbers of those that have these words in their command lines."""
    return subprocess.run(["pgrep", "-f", "--", words], capture_output=True, text=True).stdout


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--drill", "flood"], "no drill flood: write all or one of plain host-missing host-lost"),
        (["--drill"], "--drill needs a value"),
        (["--output"], "--output needs a value"),
        (["--output", str(ROOT / "configs")], f"{ROOT}/configs is not empty: name another --output"),
    ],
)
def test_wrong_usage(words, message):
    need_namespaces()
    done = run(["bash", str(SCRIPT), *words])
    assert done.returncode == 2 and message in done.stderr


@pytest.fixture(scope="module")
def rehearsal(tmp_path_factory):
    need_namespaces()
    folder = tmp_path_factory.mktemp("rehearsal")
    return run(["bash", str(SCRIPT), "--drill", "all", "--output", str(folder)], timeout=900), folder


@pytest.mark.drill
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", DRILLS)
def test_drill(rehearsal, name):
    done, folder = rehearsal
    verdict = next((line for line in done.stdout.splitlines() if re.match(f"(PASS|FAIL) {name}: ", line)), "none")
    found = re.fullmatch(rf"PASS {name}: ({DRILLS[name]}).*", verdict)
    assert found, verdict + done.stdout[-3000:]
    if name == "plain":
        assert float(found[2]) <= 1e-5 and done.returncode == 0
        command = "[node1] torchrun --nnodes=2 --nproc_per_node=1 --node_rank=1 --master_addr=172.25.0.100 "
        assert command + "--master_port=29500 DeepSpeed-GPTLike-Multihosts.py " in done.stdout
        assert not (folder / "node1" / "run" / "model").exists()  # no shared disk


@pytest.mark.drill
def test_interrupted_it_leaves_nothing(tmp_path):
    need_namespaces()
    seed = f"--seed {1_000_000 + os.getpid()}"  # tells its ranks from others'
    words = ["bash", str(SCRIPT), "--drill", "host-lost", *seed.split()]
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    process = subprocess.Popen(words, env=environment, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*/node0/run/metrics.jsonl")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.2)
    os.killpg(process.pid, signal.SIGINT)  # as Ctrl-C does
    assert process.wait(30) != 0
    assert list(tmp_path.iterdir()) == []
    assert processes(str(tmp_path)) == processes(seed) == ""
