"""scripts/check_env.sh: lines, verdicts and exit codes on machines made of stand-in commands."""

import json
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, free_port

SCRIPT = ROOT / "scripts" / "check_env.sh"
BASH = shutil.which("bash")
TORCH = """
__version__ = "2.13.0+{build}"
class version:
    cuda = {cuda!r}
class cuda:
    is_available = staticmethod(lambda: {seen})
"""


class Machine:
    """Stand-ins first on the PATH, and packages that only look installed."""

    def __init__(self, folder: Path):
        self.folder, self.bin, self.site = folder, folder / "bin", folder / "site"
        self.bin.mkdir(parents=True)
        for name in ("torch", "deepspeed", "transformers", "datasets", "ninja"):
            self.package(name, "2.13.0" if name == "torch" else "1.0")
        self.env = {"PATH": f"{self.bin}:/usr/bin:/bin", "HOME": str(folder), "PYTHON": str(self.bin / "python")}
        self.command("python", f'exec {sys.executable} -S "$@"')  # without this environment's packages
        self.env |= {"PYTHONPATH": str(self.site), "HF_HUB_OFFLINE": "1", "MASTER_PORT": str(free_port())}

    def command(self, name: str, body: str) -> None:
        path = self.bin / name
        path.write_text(f"#!{BASH}\n{body}\n")
        path.chmod(0o755)

    def package(self, name: str, version: str) -> None:
        info = self.site / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def torch(self, build: str, cuda: str | None, seen: bool) -> None:
        (self.site / "torch.py").write_text(TORCH.format(build=build, cuda=cuda, seen=seen))

    def gpus(self, count: int, driver: str, name: str = "NVIDIA GeForce RTX 3090") -> None:
        lines = "".join(f"GPU {number}: {name} (UUID: GPU-{number})\n" for number in range(count))
        self.command("nvidia-smi", f"[[ $1 == -L ]] && printf '%s' '{lines}' || echo {driver}")

    def run(self, *words: str, script: bool = True, **env: str) -> subprocess.CompletedProcess:
        """script false: fed on stdin, as over ssh."""
        line = [BASH, str(SCRIPT), *words] if script else [BASH, "-s", "--", *words]
        text = None if script else SCRIPT.read_text()
        variables = self.env | env
        return subprocess.run(
            line, input=text, env=variables, cwd=self.folder, capture_output=True, text=True, timeout=60
        )

    def check(self, **env: str) -> tuple[int, dict[str, dict]]:
        """Exit code, and the rows by name."""
        done = self.run("--json", **env)
        assert done.stderr == ""
        return done.returncode, {row["name"]: row for row in json.loads(done.stdout)["checks"]}


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    made = Machine(tmp_path / "machine")
    made.torch("cpu", None, False)
    return made


@pytest.mark.parametrize("script", [True, False], ids=["file", "stdin"])
def test_five_lines_and_verdicts(machine, script):
    machine.command("nvcc", "echo Cuda compilation tools, release 12.8, V12.8.61")
    machine.gpus(2, "570.124.06")
    machine.torch("cu128", "12.8", True)
    done = machine.run(script=script, CUDA_HOME="/none")
    lines = done.stdout.splitlines()
    assert (done.returncode, done.stderr) == (0, "")
    assert lines[0].startswith("===== Host: ") and lines[0].endswith(" =====")
    nvcc = "CUDA Version: Cuda compilation tools, release 12.8, V12.8.61"
    assert lines[1:5] == ["GPU Count: 2", nvcc, "PyTorch Version: 2.13.0+cu128", "CUDA Available: True"]
    assert {line.split()[0] for line in lines[5:]} <= {"ok", "warn"}


CU128, CU130 = "https://download.pytorch.org/whl/cu128", "https://download.pytorch.org/whl/cu130"


@pytest.mark.parametrize(
    ("driver", "build", "cuda", "seen", "name", "verdict", "found", "wanted", "fix"),
    [
        ("570.124.06", "cu130", "13.0", False, "GPU driver", "FAIL", "570.124.06", ">= 580 for CUDA 13.0", CU128),
        ("570.124.06", "cu130", "13.0", False, "torch's CUDA", "FAIL", "13.0", "torch.cuda.is_available()", CU128),
        ("570.124.06", "cu128", "12.8", True, "GPU driver", "ok", "570.124.06", ">= 525 for CUDA 12.8", ""),
        ("580.65", "cu130", "13.0", True, "GPU driver", "ok", "580.65", ">= 580 for CUDA 13.0", ""),
        ("580.65", "cpu", None, False, "torch's CUDA", "FAIL", "none", "torch.cuda.is_available()", CU130),
        ("470.1", "cu128", "12.8", False, "GPU driver", "FAIL", "470.1", ">= 525 for CUDA 12.8", "/whl/cpu"),
        ("", "cu128", "12.8", True, "GPU driver", "warn", "not known", ">= 525 for CUDA 12.8", "update the driver"),
    ],
)
def test_the_driver_against_torch(machine, driver, build, cuda, seen, name, verdict, found, wanted, fix):
    machine.gpus(1, driver)
    machine.torch(build, cuda, seen)
    code, rows = machine.check()
    row = rows[name]
    assert (row["verdict"], row["found"], row["wanted"]) == (verdict, found, wanted)
    assert fix in row["fix"] and bool(row["fix"]) == (verdict != "ok")
    assert code == (1 if verdict == "FAIL" else 0)


def remove(name: str):
    return lambda machine: shutil.rmtree(next(machine.site.glob(f"{name}-*")))


@pytest.mark.parametrize(
    ("harm", "env", "name", "verdict", "found"),
    [
        (remove("deepspeed"), {}, "deepspeed", "FAIL", "none"),
        (remove("ninja"), {}, "ninja", "warn", "none"),
        (lambda m: (m.site / "torch.py").write_text("raise OSError('libcuda')"), {}, "import torch", "FAIL", "libcuda"),
        (lambda m: m.command("nvidia-smi", "echo 'no driver'; exit 9"), {}, "GPUs", "FAIL", "fails: exit 9 no driver"),
        (lambda m: m.command("nvidia-smi", "exit 124"), {}, "GPUs", "FAIL", "nvidia-smi fails: exit 124"),
        (lambda m: m.gpus(1, "570.1"), {"CUDA_VISIBLE_DEVICES": "-1"}, "torch's CUDA", "warn", "none"),
        (None, {"MASTER_ADDR": "no-such-host.invalid"}, "route to master", "FAIL", "no-such-host.invalid"),
        (None, {"MASTER_ADDR": "127.0.0.1"}, "route to master", "ok", "this host"),
        (None, {"MASTER_ADDR": "8.8.8.8"}, "master is private", "warn", "8.8.8.8"),
        (None, {"GLOO_SOCKET_IFNAME": "eno77"}, "GLOO_SOCKET_IFNAME", "FAIL", "eno77"),
        (None, {"MASTER_ADDR": "::1"}, "route to master", "warn", "::1: "),
        (None, {"NCCL_SOCKET_IFNAME": "=lo"}, "NCCL_SOCKET_IFNAME", "ok", "lo"),
        (None, {"MASTER_PORT": "http"}, "port", "FAIL", "http"),
        (None, {"HF_HUB_OFFLINE": "", "HF_ENDPOINT": "http://127.0.0.1:1"}, "Hub", "warn", "refused"),
        (None, {}, "Hub", "ok", "the cache only"),
    ],
)
def test_verdicts(machine, harm, env, name, verdict, found):
    if harm:
        harm(machine)
    code, rows = machine.check(**env)
    if name == "master is private" and name not in rows:
        pytest.skip("this machine has no route out")
    assert rows[name]["verdict"] == verdict and found in rows[name]["found"]
    assert bool(rows[name]["fix"]) == (verdict != "ok")
    assert verdict != "FAIL" or code == 1


def test_a_port_in_use(machine):
    with socket.create_server(("", 0)) as taken:
        code, rows = machine.check(MASTER_PORT=str(taken.getsockname()[1]))
    assert code == 1 and rows["port"]["verdict"] == "FAIL" and "in use" in rows["port"]["found"]


def test_without_python_gpu_nvcc_and_tools(machine, tmp_path):
    """Only bash and what it cannot do without: verdicts all the same, and exit code 1."""
    bare = tmp_path / "bare"
    bare.mkdir()
    for name in ("bash", "uname", "tr"):
        (bare / name).symlink_to(shutil.which(name))
    done = machine.run(PATH=str(bare), PYTHON="nothing", CUDA_HOME="/none")
    assert done.returncode == 1
    for text in ("GPU Count: 0", "CUDA Version: none", "PyTorch Version: none", "warn GPUs none", "FAIL Python none"):
        assert text in done.stdout


def test_other_hosts_over_ssh_are_compared(machine):
    """A stand-in of ssh runs what it is fed: one host with another deepspeed, one that does not let us in."""
    other = Machine(machine.folder / "other")
    other.torch("cpu", None, False)
    remove("deepspeed")(other)
    other.package("deepspeed", "0.9")
    body = f"""[[ "$*" != *me@locked* ]] || {{ echo 'Permission denied (publickey).' >&2; exit 255; }}
echo 'a banner'; export PYTHONPATH={other.site}; while [[ $1 != -- ]]; do shift; done; exec bash -c "${{*:3}}" """
    machine.command("ssh", body)
    done = machine.run("--json", "--host", "me@node1", "me@locked")
    report = json.loads(done.stdout)
    assert done.returncode == 1 and [host["host"] for host in report["hosts"]] == ["me@node1", "me@locked"]
    rows = {row["name"]: row for row in report["hosts"][0]["checks"]}
    assert report["hosts"][0]["lines"][3] == "PyTorch Version: 2.13.0+cpu"
    assert (rows["same deepspeed"]["verdict"], rows["same deepspeed"]["found"]) == ("FAIL", "0.9, here 1.0")
    assert "same torch" not in rows
    assert len(report["hosts"][1]["checks"]) == 1  # nothing is known of it, so nothing differs
    locked = report["hosts"][1]["checks"][0]
    assert locked["found"] == "exit 255: Permission denied (publickey)." and "ssh-copy-id me@locked" in locked["fix"]


def test_the_other_host_is_asked_by_the_venv_of_the_same_folder(machine):
    """Over ssh no environment is active: the packages are those of .venv there."""
    project = machine.folder / "a project"
    for folder in ("scripts", ".venv/bin"):
        (project / folder).mkdir(parents=True)
    shutil.copy(SCRIPT, project / "scripts")
    python = project / ".venv" / "bin" / "python"
    python.write_text(f'#!{BASH}\nPYTHONPATH={machine.site} exec {sys.executable} -S "$@"\n')
    python.chmod(0o755)
    machine.command("ssh", 'while [[ $1 != -- ]]; do shift; done; cd /; exec bash -c "${*:3}"')
    env = {name: value for name, value in machine.env.items() if name not in ("PYTHON", "PYTHONPATH")}
    line = [BASH, str(project / "scripts" / "check_env.sh"), "--json", "--host", "me@node1"]
    done = subprocess.run(line, env=env, capture_output=True, text=True, timeout=60)
    rows = {row["name"]: row for row in json.loads(done.stdout)["hosts"][0]["checks"]}
    assert rows["torch"]["found"] == "2.13.0" and "same torch" not in rows, done.stdout


def test_a_port_both_ways(machine):
    here, there = free_port(), free_port()

    def other_host() -> None:
        with socket.create_server(("127.0.0.1", there)) as server:
            server.accept()[0].close()
            socket.create_connection(("127.0.0.1", here), timeout=5).close()

    thread = threading.Thread(target=other_host)
    thread.start()
    done = machine.run("--peer", f"127.0.0.1:{there}", "--listen", str(here), "--timeout", "20")
    thread.join()
    assert done.returncode == 0 and done.stdout.count("\nok ") == 2
    done = machine.run("--peer", f"127.0.0.1:{there}", "--listen", str(here), "--timeout", "1")
    assert done.returncode == 1 and "refused" in done.stdout and f"nobody came to {here}" in done.stdout


@pytest.mark.parametrize(
    "words", ["--fast", "--host", "--host -oProxyCommand=x", "--peer node1", "--peer a:99999", "--peer a:1 --host b"]
)
def test_wrong_usage(machine, words):
    done = machine.run(*words.split())
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("check_env.sh: ")
