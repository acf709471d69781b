"""scripts/check_env.sh: lines, verdicts and exit codes on machines made of stubs, over real ports and a real sshd."""

import getpass
import json
import os
import pty
import re
import shutil
import socket
import subprocess
import sys
import time
from contextlib import closing, suppress
from pathlib import Path
from typing import NamedTuple

import pytest
from conftest import ROOT, free_port
from hub_server import HANG, HubServer, wikitext_repo

SCRIPT = ROOT / "scripts" / "check_env.sh"
BASH = shutil.which("bash")
SSHD = shutil.which("sshd", path=os.environ["PATH"] + ":/usr/sbin:/sbin")
PINS = {"torch": "2.13.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "datasets": "5.2.0"}
CARDS = ("NVIDIA GeForce RTX 3090", "NVIDIA GeForce RTX 4090 D")
NVCC = "echo 'Cuda compilation tools, release {}, V{}.61'"
ROW = re.compile(r"(ok|warn|FAIL) +(\S.*?) {2,}(\S.*?) {2,}(\S.*?)(?: {2,}(\S.*))?")
GIB = 2**20  # in KiB
V1_LIMIT = "sys__fs__cgroup__memory__memory.limit_in_bytes"
RATE = "bus bandwidth, 2(n-1)/n x bytes / seconds"
TORCH = """
__version__ = "{version}"
class version: cuda = {cuda!r}
class cuda:
    is_available = staticmethod(lambda: {available})
    device_count = staticmethod(lambda: {count})
"""


class Answer(NamedTuple):
    """What the script printed."""

    code: int
    out: str
    err: str
    rows: dict[str, tuple[str, str, str, str]]  # verdict, found, wanted, fix, by name


def parse(out: str) -> dict[str, tuple[str, str, str, str]]:
    matches = [ROW.fullmatch(line) for line in out.splitlines() if re.match("(ok|warn|FAIL) ", line)]
    return {name: (verdict, found, wanted, fix or "") for verdict, name, found, wanted, fix in
            (match.groups() for match in matches)}  # fmt: skip


class Machine:
    """A copy of the script in a folder of its own, stubs first on the PATH, and packages that only look installed."""

    def __init__(self, folder: Path):
        self.folder, self.bin, self.site = folder, folder / "bin", folder / "site"
        for path in (self.bin, self.site, folder / "scripts", folder / "home"):
            path.mkdir(parents=True)
        self.script = Path(shutil.copy(SCRIPT, folder / "scripts"))
        pins = "".join(f"{name}=={version}\n" for name, version in PINS.items())
        (folder / "requirements.txt").write_text(f"# the packages\n{pins}numpy==2.4.6\n")
        for name, version in PINS.items():
            self.package(name, version)
        self.torch()
        self.env = {"PATH": f"{self.bin}:{os.environ['PATH']}", "HOME": str(folder / "home"), "PYTHON": sys.executable,
                    "PYTHONPATH": str(self.site), "HF_HUB_OFFLINE": "1"}  # fmt: skip

    def stub(self, name: str, body: str) -> Path:
        path = self.bin / name
        path.write_text(f"#!{BASH}\n{body}\n")
        path.chmod(0o755)
        return path

    def package(self, name: str, version: str | None) -> None:
        for old in self.site.glob(f"{name}-*"):
            shutil.rmtree(old)
        if version:
            folder = self.site / f"{name}-{version}.dist-info"
            folder.mkdir()
            (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")

    def torch(self, *, version: str = "2.13.0+cpu", cuda: str | None = None, count: int = 0) -> None:
        folder = self.site / "torch"
        shutil.rmtree(folder, ignore_errors=True)
        (folder / "cuda").mkdir(parents=True)
        text = TORCH.format(version=version, cuda=cuda, available=count > 0, count=count)
        (folder / "__init__.py").write_text(text.replace("class cuda:", "from torch import cuda\nclass _:"))
        is_available, device_count = f"lambda: {count > 0}", f"lambda: {count}"
        (folder / "cuda" / "__init__.py").write_text(f"is_available = {is_available}\ndevice_count = {device_count}\n")
        (folder / "cuda" / "nccl.py").write_text("def version():\n    return (2, 27, 5)\n")

    def gpus(self, *names: str, driver: str = "570.124.06") -> None:
        lines = "".join(f"GPU {number}: {name} (UUID: GPU-{number})\n" for number, name in enumerate(names))
        self.stub("nvidia-smi", f"case $1 in\n-L) printf '%s' '{lines}' ;;\n*) echo {driver}; echo {driver} ;;\nesac")

    def root(self, **files: str) -> dict[str, str]:
        """A stand-in for /proc and /sys; in a name, __ is a slash."""
        folder = self.folder / "root"
        shutil.rmtree(folder, ignore_errors=True)
        defaults = {"proc__sys__kernel__osrelease": "6.8.0-45-generic", "proc__sys__kernel__hostname": "node1",
                    "proc__meminfo": f"MemTotal: {64 * GIB} kB\nMemAvailable: {48 * GIB} kB\n",
                    "proc__self__cgroup": "0::/\n", "sys__class__net__eno1__operstate": "up",
                    "proc__net__tcp": "  sl  local_address\n"}  # fmt: skip
        for name, text in (defaults | files).items():
            path = folder / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        return {"CHECK_ENV_ROOT": str(folder)}

    def start(self, *words: str, **env: str) -> subprocess.Popen:
        variables = {key: value for key, value in (self.env | env).items() if value is not None}
        return subprocess.Popen([BASH, str(self.script), *words], env=variables, cwd=self.folder, text=True,
                                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip

    def check(self, *words: str, timeout: int = 60, **env: str) -> Answer:
        return finish(self.start(*words, **env), timeout)


def finish(process: subprocess.Popen, timeout: int = 60) -> Answer:
    try:
        out, err = process.communicate(timeout=timeout)
    finally:
        process.kill()
    return Answer(process.returncode, out, err, parse(out))


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    return Machine(tmp_path / "machine")


def test_script_is_sound():
    lines = SCRIPT.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash" and "set -euo pipefail" in lines and os.access(SCRIPT, os.X_OK)
    assert [number for number, line in enumerate(lines, 1) if len(line) > 120] == []
    assert not [line for line in lines if re.search(r"\beval\b|^\s*(source|\.)\s", line)]


def test_lines_and_verdicts_of_a_healthy_machine(machine):
    """Exactly the tutorial's five lines, then rows in aligned columns; no fix where nothing is to be fixed."""
    answer = machine.check(**machine.root())
    assert (answer.code, answer.err) == (0, "")
    lines = answer.out.splitlines()
    assert lines[0] == "===== Host: node1 ====="
    assert lines[1] == "GPU Count: 0"
    assert re.fullmatch(r"CUDA Version: (none \(no nvcc\)|.*release.*)", lines[2])
    assert lines[3:5] == ["PyTorch Version: 2.13.0+cpu", "CUDA Available: False"]
    assert len(answer.rows) == len(lines) - 5
    for name, (verdict, _, _, fix) in answer.rows.items():
        assert bool(fix) == (verdict != "ok"), name
    version = ".".join(map(str, sys.version_info[:3]))
    assert answer.rows["Python"] == ("ok", f"{version} ({sys.executable})", ">= 3.11", "")
    assert answer.rows["torch"] == ("ok", "2.13.0+cpu", "2.13.0", "")
    assert answer.rows["deepspeed"] == ("ok", "0.19.8", "0.19.8", "")
    assert answer.rows["kernel"] == ("ok", "6.8.0-45-generic", ">= 5.5", "")
    assert answer.rows["memory"] == ("ok", "48.0 GiB free of 64.0 GiB, cgroup limit none", ">= 8 GiB", "")
    assert answer.rows["interfaces"][:2] == ("ok", "eno1")
    assert answer.rows["route to master"][:2] == ("ok", "MASTER_ADDR is not set")
    assert answer.rows["GPUs"][:3] == ("warn", "none (no nvidia-smi)", "an NVIDIA GPU")


def test_columns_are_aligned(machine):
    lines = machine.check(**machine.root()).out.splitlines()[5:]
    wide = [max(len(row[index]) for row in parse("\n".join(lines)).values()) for index in (1, 2)]
    name_width = max(map(len, parse("\n".join(lines))))
    for line in lines:
        assert line[4:6] == "  " and line[6 + name_width :][:2] == "  " and line[8 + name_width] != " "
        wanted_at = 6 + name_width + 2 + wide[0] + 2
        assert line[wanted_at - 2 : wanted_at] == "  " and line[wanted_at] != " "


def test_json_is_the_text(machine):
    """One object, the same rows as the text, though a value holds what JSON and terminals choke on."""
    env = machine.root() | {"MASTER_ADDR": 'a"b\\c\n\t\x1b[31m é "', "GLOO_SOCKET_IFNAME": "\\\\\"'{}"}
    text, answer = machine.check(**env), machine.check("--json", **env)
    report = json.loads(answer.out)
    assert list(report) == ["host", "lines", "checks"]
    assert report["host"] == "node1" and report["lines"] == text.out.splitlines()[:5]
    rows = {row["name"]: (row["verdict"], row["found"], row["wanted"], row["fix"]) for row in report["checks"]}
    assert rows == text.rows and list(rows) == list(text.rows)
    assert rows["route to master"] == ("FAIL", 'a"b\\c ?[31m ?? "', "a host name or address", "mend MASTER_ADDR")
    assert rows["GLOO_SOCKET_IFNAME"][:2] == ("FAIL", "\\\\\"'{}")
    assert answer.code == text.code == 1


def test_an_emptied_path_is_survived(machine, tmp_path):
    """Not even the core utilities: each thing that cannot be asked is said to be unknown."""
    empty = tmp_path / "empty"
    empty.mkdir()
    answer = machine.check(PATH=str(empty), PYTHON=None, CUDA_HOME=str(empty))
    assert answer.code == 1
    lines = answer.out.splitlines()
    assert lines[1] == "GPU Count: 0" and lines[3:5] == ["PyTorch Version: none", "CUDA Available: False"]
    assert answer.rows["Python"][:3] == ("FAIL", "none", ">= 3.11")
    assert answer.rows["torch"] == ("warn", "not known (no Python)", "2.13.0", "see Python")
    assert answer.rows["g++"][:2] == ("warn", "none") and answer.rows["ninja"][:2] == ("warn", "none")
    assert answer.rows["disk"][:2] == ("warn", "not known") and answer.rows["/dev/shm"][:2] == ("warn", "not known")
    assert answer.rows["memory"][1].endswith(("none", "GiB"))
    assert [name for name, row in answer.rows.items() if row[0] == "FAIL"] == ["Python"]


def test_two_geforce_cards(machine):
    machine.gpus(*CARDS)
    machine.stub("nvcc", NVCC.format("12.8", "12.8"))
    machine.torch(version="2.13.0+cu128", cuda="12.8", count=2)
    answer = machine.check(**machine.root())
    assert answer.out.splitlines()[1:5] == [
        "GPU Count: 2",
        "CUDA Version: Cuda compilation tools, release 12.8, V12.8.61",
        "PyTorch Version: 2.13.0+cu128",
        "CUDA Available: True",
    ]
    assert answer.rows["GPUs"] == ("ok", f"1 x {CARDS[0]}, 1 x {CARDS[1]}", "any", "")
    assert answer.rows["GPU driver"] == ("ok", "570.124.06", ">= 525 for CUDA 12.8", "")
    assert answer.rows["torch's CUDA"] == ("ok", "12.8", "any", "")
    assert answer.rows["CUDA toolkit"] == ("ok", "12.8", "12.8, as torch", "")
    assert answer.rows["NCCL"] == ("ok", "2.27.5", "any", "")
    fix = "if the first step hangs: export NCCL_P2P_DISABLE=1"
    assert answer.rows["P2P of GPUs"] == ("warn", "GeForce, NCCL_P2P_DISABLE=0", "NCCL_P2P_DISABLE=1", fix)
    assert answer.code == 0
    assert machine.check(NCCL_P2P_DISABLE="1").rows["P2P of GPUs"][:2] == ("ok", "GeForce, NCCL_P2P_DISABLE=1")
    machine.gpus(CARDS[0])
    assert "P2P of GPUs" not in machine.check().rows
    machine.gpus("NVIDIA H100 80GB HBM3", "NVIDIA H100 80GB HBM3")
    rows = machine.check().rows
    assert rows["GPUs"][1] == "2 x NVIDIA H100 80GB HBM3" and "P2P of GPUs" not in rows


@pytest.mark.parametrize(
    ("toolkit", "cuda", "verdict"),
    [("12.8", "12.8", "ok"), ("12.1", "12.8", "ok"), ("11.8", "12.8", "warn"), ("13.0", "13.0", "ok"),
     ("13.1", "13.0", "warn"), ("12.8", "13.0", "warn")],
)  # fmt: skip
def test_toolkit_against_torch(machine, toolkit, cuda, verdict):
    machine.gpus("NVIDIA H200", driver="580.65.06")
    machine.stub("nvcc", NVCC.format(toolkit, toolkit))
    machine.torch(cuda=cuda, count=1)
    answer = machine.check(CUDA_HOME="/nonexistent")
    assert answer.rows["CUDA toolkit"][:3] == (verdict, toolkit, f"{cuda}, as torch")
    assert answer.code == 0


@pytest.mark.parametrize(
    ("cuda", "count", "driver", "env", "name", "row"),
    [
        (None, 0, "570.1", {}, "torch's CUDA", ("FAIL", "none", "CUDA, for 2 GPUs")),
        ("12.8", 0, "570.1", {}, "torch's CUDA", ("FAIL", "12.8, torch sees no GPU", "torch.cuda.is_available()")),
        ("12.8", 0, "570.1", {"CUDA_VISIBLE_DEVICES": ""}, "torch's CUDA",
         ("warn", "12.8, GPUs hidden", "GPUs to be seen")),
        ("13.0", 2, "570.1", {}, "GPU driver", ("FAIL", "570.1", ">= 580 for CUDA 13.0")),
        ("12.8", 2, "525.60.13", {}, "GPU driver", ("ok", "525.60.13", ">= 525 for CUDA 12.8")),
        ("12.8", 2, "oops", {}, "GPU driver", ("warn", "not known", "any")),
    ],
)  # fmt: skip
def test_gpu_hosts_that_cannot_train(machine, cuda, count, driver, env, name, row):
    machine.gpus(*CARDS, driver=driver)
    machine.torch(cuda=cuda, count=count)
    answer = machine.check(**env)
    assert answer.rows[name][:3] == row
    assert answer.code == (1 if row[0] == "FAIL" else 0)
    assert answer.rows["NCCL"][0] == ("ok" if cuda else "FAIL")


def test_a_broken_driver_fails_and_no_device_does_not(machine):
    machine.stub("nvidia-smi", "echo 'Failed to initialize NVML: Driver/library version mismatch'\nexit 9")
    answer = machine.check()
    message = "nvidia-smi fails, exit 9: Failed to initialize NVML: Driver/library version mismatch"
    assert answer.rows["GPUs"][:3] == ("FAIL", message, "a driver that answers")
    assert answer.code == 1 and answer.out.splitlines()[1] == "GPU Count: 0"
    machine.stub("nvidia-smi", "echo 'No devices were found'\nexit 6")
    answer = machine.check()
    assert answer.rows["GPUs"][:2] == ("warn", "none") and answer.code == 0


def test_a_card_without_a_driver(machine):
    root = machine.root(sys__bus__pci__devices__1__vendor="0x10de", sys__bus__pci__devices__1__class="0x030000")
    assert machine.check(**root).rows["GPUs"][:2] == ("warn", "an NVIDIA GPU without a driver (no nvidia-smi)")


def test_packages(machine):
    machine.package("deepspeed", None)
    machine.package("datasets", None)
    machine.package("transformers", "4.1.0")
    (machine.site / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.12: cannot open shared object')")
    # The real packages may lie behind the stand-ins: -S keeps this Python from its site-packages.
    rows = machine.check(PYTHON=str(machine.stub("bare", f'exec {sys.executable} -S "$@"'))).rows
    why = "OSError: libcudart.so.12: cannot open shared object"
    assert rows["torch"][:3] == ("FAIL", f"2.13.0 does not import: {why}", "2.13.0")
    assert rows["deepspeed"] == ("FAIL", "none", "0.19.8", "pip install deepspeed==0.19.8 (training needs it)")
    assert rows["datasets"] == ("warn", "none", "5.2.0", "pip install datasets==5.2.0 (WikiText-2 needs it)")
    fix = "tested with 5.23.0 only: pip install transformers==5.23.0"
    assert rows["transformers"] == ("warn", "4.1.0", "5.23.0", fix)
    (machine.folder / "requirements.txt").unlink()
    assert machine.check().rows["transformers"] == ("ok", "4.1.0", "any", "")


@pytest.mark.parametrize("version", ["3.10.14", "2.7.18", "3.11.0", "3.14.0", "4.0.1"])
def test_python_version(machine, version):
    python = machine.stub("python", f"cat >/dev/null; echo python={version}")
    answer = machine.check(PYTHON=str(python))
    old = version in ("3.10.14", "2.7.18")
    assert answer.rows["Python"][:3] == ("FAIL" if old else "ok", f"{version} ({python})", ">= 3.11")


def test_python_that_is_named_but_absent_or_broken(machine):
    """No other Python takes its place in silence."""
    assert machine.check(PYTHON="/no/python").rows["Python"][:2] == ("FAIL", "none")
    broken = machine.stub("python9", "echo 'pyenv: not found' >&2; exit 127")
    assert machine.check(PYTHON=str(broken)).rows["Python"][:2] == ("FAIL", f"none: {broken} does not run")


def test_venv_of_the_repository_comes_first(machine):
    venv = machine.folder / ".venv" / "bin"
    venv.mkdir(parents=True)
    (venv / "python").write_text(f"#!{BASH}\ncat >/dev/null; echo python=3.12.1\n")
    (venv / "python").chmod(0o755)
    (venv / "ninja").write_text(f"#!{BASH}\necho 1.13.0\n")
    (venv / "ninja").chmod(0o755)
    machine.stub("ninja", "echo 1.11.1")
    rows = machine.check().rows
    assert rows["Python"][1] == f"3.12.1 ({venv / 'python'})"
    assert rows["ninja"][:3] == ("warn", "1.13.0 beside Python, 1.11.1 on the PATH", "one version")
    machine.stub("ninja", "echo 1.13.0")
    assert machine.check().rows["ninja"][:2] == ("ok", "1.13.0")


def test_compiler(machine):
    machine.stub("c++", "echo 8.5.0")
    assert machine.check().rows["g++"][:3] == ("warn", "8.5.0", ">= 9, Python.h")
    machine.stub("c++", "exit 1")
    machine.stub("g++", "echo 13.2.0")
    python = machine.stub("python", "cat >/dev/null; echo python=3.12.1; echo headers=False")
    assert machine.check(PYTHON=str(python)).rows["g++"][:2] == ("warn", "13.2.0, no Python.h")
    python = machine.stub("python", "cat >/dev/null; echo python=3.12.1; echo headers=True")
    assert machine.check(PYTHON=str(python)).rows["g++"][:2] == ("ok", "13.2.0")


def test_compiled_ops(machine):
    ops = machine.folder / "home" / ".cache" / "torch_extensions" / "py{}{}_cpu".format(*sys.version_info)
    assert machine.check().rows["compiled ops"][:3] == ("warn", "none", "cpu_adam")
    for name, verdict in (("async_io", "warn"), ("cpu_adam", "ok")):
        (ops / name).mkdir(parents=True)
        (ops / name / f"{name}.so").touch()
        assert machine.check().rows["compiled ops"][0] == verdict
    assert machine.check(TORCH_EXTENSIONS_DIR=str(ops)).rows["compiled ops"][:2] == ("ok", "async_io cpu_adam")
    machine.gpus("NVIDIA H200")
    cuda = ops.parent / f"{ops.name.removesuffix('cpu')}cu128" / "async_io"
    cuda.mkdir(parents=True)
    (cuda / "async_io.so").touch()
    machine.torch(cuda="12.8", count=1)
    assert machine.check().rows["compiled ops"][:3] == ("warn", "async_io", "cpu_adam")
    machine.torch()
    (ops / "cpu_adam" / "lock").touch()
    assert machine.check().rows["compiled ops"][:2] == ("warn", f"locked: {ops}/cpu_adam/lock")


@pytest.mark.parametrize(
    ("free", "files", "verdict", "limit"),
    [
        (8 * GIB, {}, "ok", "none"),
        (8 * GIB - 1, {}, "warn", "none"),
        (GIB - 1, {}, "FAIL", "none"),
        (48 * GIB, {"sys__fs__cgroup__memory.max": "max"}, "ok", "none"),
        (48 * GIB, {"sys__fs__cgroup__memory.max": str(4 * 2**30)}, "warn", "4.0 GiB"),
        (48 * GIB, {"proc__self__cgroup": "0::/job/step", "sys__fs__cgroup__job__memory.max": str(2**29),
                    "sys__fs__cgroup__job__step__memory.max": "max"}, "FAIL", "0.5 GiB"),
        (48 * GIB, {"proc__self__cgroup": "5:cpu,memory:/docker/1f\n4:pids:/", V1_LIMIT: str(6 * 2**30)},
         "warn", "6.0 GiB"),
        (48 * GIB, {"proc__self__cgroup": "4:memory:/", V1_LIMIT: "9223372036854771712"}, "ok", "none"),
    ],
)  # fmt: skip
def test_memory_and_cgroups(machine, free, files, verdict, limit):
    root = machine.root(**{"proc__meminfo": f"MemTotal: {64 * GIB} kB\nMemAvailable: {free} kB\n"} | files)
    row = machine.check(**root).rows["memory"]
    shown = f"{free // GIB}.{free % GIB * 10 // GIB} GiB free of 64.0 GiB, cgroup limit {limit}"
    assert row[:3] == (verdict, shown, ">= 8 GiB")


@pytest.mark.parametrize(
    ("size", "free", "shm", "disk"),
    [
        (65536, 65532, ("warn", "67 MB free of 67"), ("FAIL", "0.0 GiB")),
        (65536, 60000, ("FAIL", "61 MB free of 67"), ("FAIL", "0.0 GiB")),
        (20 * GIB, 499999, ("warn", "511 MB free of 21474"), ("FAIL", "0.4 GiB")),
        (20 * GIB, 5 * GIB, ("ok", "5368 MB free of 21474"), ("warn", "5.0 GiB")),
        (20 * GIB, 10 * GIB, ("ok", "10737 MB free of 21474"), ("ok", "10.0 GiB")),
    ],
)
def test_shm_and_disk(machine, size, free, shm, disk):
    machine.stub("df", f"echo Filesystem; echo tmpfs {size} {size - free} {free} 1% /x")
    rows = machine.check().rows
    assert rows["/dev/shm"][:2] == shm
    assert rows["disk"][:2] == (disk[0], f"{disk[1]} free in {machine.folder}")
    if shm[0] != "ok":
        fix = "delete what killed runs left there; docker run" if free < size / 2 else "docker run"
        assert rows["/dev/shm"][3].startswith(fix)


@pytest.mark.parametrize(
    ("release", "verdict"), [("5.4.0-150", "warn"), ("5.5.0", "ok"), ("4.18", "warn"), ("10.0", "ok")]
)
def test_kernel(machine, release, verdict):
    assert machine.check(**machine.root(proc__sys__kernel__osrelease=release)).rows["kernel"][:2] == (verdict, release)


def test_host_name(machine):
    hosts = {"node1": "127.0.1.1", "node2": "172.25.0.200"}
    known = [f"[ $2 = {name} ] && echo '{address} STREAM' && exit" for name, address in hosts.items()]
    machine.stub("getent", "\n".join([*known, "exit 2"]))
    row = machine.check(**machine.root()).rows["host name"]
    assert row[:2] == ("warn", "node1 is 127.0.1.1") and "GLOO_SOCKET_IFNAME" in row[3] and "/etc/hosts" in row[3]
    assert machine.check(**machine.root(), GLOO_SOCKET_IFNAME="eno1").rows["host name"][0] == "ok"
    node2 = machine.root(proc__sys__kernel__hostname="node2")
    assert machine.check(**node2).rows["host name"][:2] == ("ok", "node2 is 172.25.0.200")
    node3 = machine.root(proc__sys__kernel__hostname="node3")
    assert machine.check(**node3).rows["host name"][:2] == ("warn", "node3 does not resolve")


@pytest.mark.parametrize(
    ("variable", "value", "verdict"),
    [("NCCL_SOCKET_IFNAME", "eno", "ok"), ("NCCL_SOCKET_IFNAME", "=eno", "FAIL"), ("NCCL_SOCKET_IFNAME", "=eno1", "ok"),
     ("NCCL_SOCKET_IFNAME", "ib,eno1", "ok"), ("NCCL_SOCKET_IFNAME", "^docker", "ok"),
     ("NCCL_SOCKET_IFNAME", "^lo,eno", "FAIL"), ("NCCL_SOCKET_IFNAME", "^=eno", "ok"),
     ("GLOO_SOCKET_IFNAME", "eno", "FAIL"), ("GLOO_SOCKET_IFNAME", "eno1", "ok"),
     ("GLOO_SOCKET_IFNAME", "eth7", "FAIL"), ("GLOO_SOCKET_IFNAME", "down0", "FAIL")],
)  # fmt: skip
def test_interfaces(machine, variable, value, verdict):
    root = machine.root(sys__class__net__down0__operstate="down", sys__class__net__lo__operstate="unknown")
    rows = machine.check(**root, **{variable: value}).rows
    assert rows["interfaces"][:2] == ("ok", "eno1")
    assert rows[variable][:2] == (verdict, value)


def test_route_to_the_master(machine):
    machine.stub("ip", 'case "${@: -1}" in\n172.25.0.100) echo "172.25.0.100 dev eno1 src 172.25.0.200 uid 0" ;;\n'
                 '172.25.0.200) echo "local 172.25.0.200 dev lo src 172.25.0.200" ;;\n'
                 '*) echo "RTNETLINK answers: Network is unreachable" >&2; exit 2 ;;\nesac')  # fmt: skip

    def row(**env: str) -> tuple:
        return machine.check(**machine.root(sys__class__net__eth0__operstate="up"), **env).rows["route to master"]

    assert row(MASTER_ADDR="172.25.0.100")[:2] == ("ok", "172.25.0.100 by eno1 from 172.25.0.200")
    assert row(MASTER_ADDR="172.25.0.200")[:2] == ("ok", "172.25.0.200 is this host")
    assert row(MASTER_ADDR="172.26.0.1")[:2] == ("FAIL", "172.26.0.1: Network is unreachable")
    assert row(MASTER_ADDR="no.such.host.invalid")[:2] == ("FAIL", "no.such.host.invalid does not resolve")
    for hostile in ("-oops", "a b", "$(touch x)", "a;b"):
        assert row(MASTER_ADDR=hostile)[:3] == ("FAIL", hostile, "a host name or address")
    expected = ("warn", "eno1, but GLOO_SOCKET_IFNAME=eth0", "one interface", "set GLOO_SOCKET_IFNAME=eno1")
    assert row(MASTER_ADDR="172.25.0.100", GLOO_SOCKET_IFNAME="eth0") == expected
    assert row(MASTER_ADDR="172.25.0.100", NCCL_SOCKET_IFNAME="en", GLOO_SOCKET_IFNAME="eno1")[0] == "ok"


@pytest.mark.parametrize(
    ("address", "verdict"),
    [(address, "warn") for address in "8.8.8.8 172.15.0.1 172.32.0.1 192.169.0.1 11.0.0.1 100.128.0.1".split()]
    + [(address, "warn") for address in "2001:db9::1 2a00::7 ff02::1".split()]
    + [(address, "ok") for address in "172.16.0.1 172.31.255.254 192.168.7.1 10.255.0.1 100.64.0.1 127.0.0.1".split()]
    + [(address, "ok") for address in "::1 fd00::7 fe80::1".split()],
)
def test_public_master(machine, address, verdict):
    machine.stub("ip", "echo '10.0.0.1 dev eno1 src 10.0.0.2'")
    answer = machine.check(MASTER_ADDR=address)
    row = answer.rows["master is private"]
    assert row[:2] == (verdict, f"{address} is public" if verdict == "warn" else address)
    assert ("firewall" in row[3]) == (verdict == "warn") and answer.code == 0


@pytest.mark.parametrize(
    ("env", "verdict", "found"),
    [
        ({}, "ok", "none"),
        ({"https_proxy": "http://me:secret@127.0.0.1:8889/"}, "warn", "https_proxy"),
        ({"http_proxy": "x", "ALL_PROXY": "y", "NO_PROXY": "localhost,10.0.0.0/8"}, "warn", "http_proxy ALL_PROXY"),
        ({"HTTPS_PROXY": "x", "NO_PROXY": "localhost,172.25.0.0/16"}, "ok", "HTTPS_PROXY"),
        ({"HTTPS_PROXY": "x", "NO_PROXY": "localhost, 172.25.0.100"}, "ok", "HTTPS_PROXY"),
        ({"HTTPS_PROXY": "x", "NO_PROXY": "172.25.0.10"}, "warn", "HTTPS_PROXY"),
        ({"HTTPS_PROXY": "x", "NO_PROXY": "*"}, "ok", "HTTPS_PROXY"),
        ({"HTTPS_PROXY": "x", "NO_PROXY": "172.25.0.100", "no_proxy": "localhost"}, "warn", "HTTPS_PROXY"),
    ],
)
def test_proxies(machine, env, verdict, found):
    machine.stub("ip", "echo '172.25.0.100 dev eno1 src 172.25.0.200'")
    answer = machine.check(MASTER_ADDR="172.25.0.100", **env)
    row = answer.rows["proxies"]
    assert row[:2] == (verdict, found) and "secret" not in answer.out
    assert row[3] == ("export NO_PROXY=$NO_PROXY,172.25.0.100, and no_proxy" if verdict == "warn" else "")


def test_proxies_and_a_master_with_a_name(machine):
    machine.stub("getent", "echo '172.25.0.100 STREAM'")
    machine.stub("ip", "echo '172.25.0.100 dev eno1 src 172.25.0.200'")
    expected = {".cluster.local": "ok", "cluster.local": "ok", "uster.local": "warn", "172.25.0.0/24": "ok"}
    for names, verdict in expected.items():
        env = {"MASTER_ADDR": "gpu1.cluster.local", "https_proxy": "x", "NO_PROXY": names}
        assert machine.check(**env).rows["proxies"][0] == verdict, names


def test_infiniband(machine):
    down = machine.root(sys__class__infiniband__mlx5_0__ports__1__state="1: DOWN")
    assert machine.check(**down).rows["InfiniBand"][:2] == ("warn", "mlx5_0 1: DOWN")
    row = machine.check(**down, NCCL_IB_DISABLE="1").rows["InfiniBand"]
    assert row[:2] == ("ok", "mlx5_0 1: DOWN NCCL_IB_DISABLE=1")
    up = machine.root(sys__class__infiniband__mlx5_0__ports__1__state="4: ACTIVE")
    assert machine.check(**up).rows["InfiniBand"][:2] == ("ok", "mlx5_0 4: ACTIVE")


def test_port(machine):
    with closing(socket.create_server(("127.0.0.1", 0))) as server:
        port = server.getsockname()[1]
        answer = machine.check(MASTER_PORT=str(port))
        assert answer.rows["port"][:3] == ("FAIL", f"{port} is in use", "free") and answer.code == 1
        machine.stub("ip", "echo '172.25.0.100 dev eno1 src 172.25.0.200'")
        assert machine.check(MASTER_PORT=str(port), MASTER_ADDR="172.25.0.100").rows["port"][0] == "warn"
    assert machine.check(MASTER_PORT=str(port)).rows["port"][:2] == ("ok", f"{port} is free")
    for wrong in ("0", "65536", "http", "-1", "29500x", "a[$(touch x)]"):
        assert machine.check(MASTER_PORT=wrong).rows["port"][:2] == ("FAIL", f"MASTER_PORT={wrong}")
    assert not (machine.folder / "x").exists()


def test_hub(machine):
    repo = wikitext_repo({split: ["A line ."] for split in ("train", "validation", "test")})
    with HubServer(datasets={"Salesforce/wikitext": repo}) as hub:
        site = hub.url.removeprefix("http://")
        row = machine.check(HF_HUB_OFFLINE="0", HF_ENDPOINT=hub.url).rows["Hub"]
        assert row == ("ok", f"{site} answers", "WikiText-2", "")
    answer = machine.check(HF_HUB_OFFLINE=None, HF_ENDPOINT=hub.url.replace("http://", "http://me:secret@"))
    verdict, found, _, fix = answer.rows["Hub"]
    assert (verdict, found) == ("warn", f"{site}: [Errno 111] Connection refused")
    for way_out in ("HF_ENDPOINT=https://MIRROR", "HF_HUB_OFFLINE=1", "--dataset FOLDER", "--dataset sample"):
        assert way_out in fix
    assert answer.code == 0 and "secret" not in answer.out
    with HubServer() as empty:
        found = machine.check(HF_HUB_OFFLINE=None, HF_ENDPOINT=empty.url).rows["Hub"][1]  # as the Hub: 401 for unknown
        assert found == f"{empty.url.removeprefix('http://')}: HTTP 401"
    assert machine.check(HF_HUB_OFFLINE=None, HF_ENDPOINT="mirror").rows["Hub"][1] == "HF_ENDPOINT is no http address"
    assert machine.check().rows["Hub"][:2] == ("ok", "HF_HUB_OFFLINE: the cache only")


@pytest.mark.slow
def test_a_silent_hub_is_not_waited_for(machine):
    with HubServer(fail={".": HANG}) as hub:
        start = time.monotonic()
        row = machine.check(HF_HUB_OFFLINE=None, HF_ENDPOINT=hub.url).rows["Hub"]
        assert time.monotonic() - start < 9
    assert row[0] == "warn" and "timed out" in row[1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jsn"], "unknown word --jsn: write --json, --host, --peer, --listen, --allreduce, --timeout or --help"),
        (["node2"], "unknown word node2: write"),
        (["--host"], "--host needs one USER@HOST or more"),
        (["--host", "--json"], "--host needs one USER@HOST or more"),
        (["--host", "-oProxyCommand=touch x"], "--host -oProxyCommand=touch x: write USER@HOST or HOST"),
        (["--host", "node2", "a b"], "--host a b: write USER@HOST or HOST"),
        (["--host", "node2;reboot"], "--host node2;reboot: write"),
        (["--host", "me@-x"], "--host me@-x: write"),
        (["--host", "me@you@node2"], "--host me@you@node2: write"),
        (["--host", ""], "--host : write"),
        (["--peer"], "--peer : write HOST:PORT"),
        (["--peer", "node2"], "--peer node2: write HOST:PORT"),
        (["--peer", "node2:0"], "--peer node2:0: write HOST:PORT"),
        (["--peer", "node2:65536"], "--peer node2:65536: write HOST:PORT"),
        (["--peer", "-x:1"], "--peer -x:1: write HOST:PORT"),
        (["--peer", "a;b:1"], "--peer a;b:1: write HOST:PORT"),
        (["--peer", "node2:29500", "--listen", "x"], "--listen x: write a port"),
        (["--listen", "29500"], "--listen goes with --peer"),
        (["--timeout", "0"], "--timeout 0: write seconds"),
        (["--timeout"], "--timeout : write seconds"),
        (["--peer", "node2:29500", "--allreduce"], "--peer and --allreduce: one at a time"),
        (["--allreduce", "--host", "node2"], "--allreduce and --host: one at a time"),
    ],
)
def test_usage_errors(machine, words, message):
    answer = machine.check(*words, timeout=10)
    assert (answer.code, answer.out) == (2, "")
    assert answer.err.startswith(f"check_env.sh: {message}") and answer.err.count("\n") == 1
    assert not (machine.folder / "x").exists()


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"NNODES": "two", "MASTER_ADDR": "10.0.0.1"}, "NNODES=two is not a number"),
        ({"NNODES": "2"}, "--allreduce over 2 hosts needs MASTER_ADDR, the first host's address"),
        ({"WORLD_SIZE": "4", "GPUS_PER_HOST": "2"}, "--allreduce over 2 hosts needs MASTER_ADDR"),
        ({"WORLD_SIZE": "3", "GPUS_PER_HOST": "2"}, "WORLD_SIZE=3 is no multiple of 2 per host"),
        ({"GPUS_PER_HOST": "0"}, "GPUS_PER_HOST=0 is not a number"),
        ({"MASTER_ADDR": "10.0.0.1"}, "--allreduce needs NNODES, NODE_RANK, MASTER_ADDR, or none of them"),
        ({"RANK": "-1"}, "RANK=-1 NODE_RANK=: not numbers"),
        ({"NNODES": "2", "MASTER_ADDR": "-x"}, "--allreduce over 2 hosts needs MASTER_ADDR"),
    ],
)  # fmt: skip
def test_usage_errors_of_allreduce(machine, env, message):
    answer = machine.check("--allreduce", timeout=10, **env)
    assert (answer.code, answer.out) == (2, "") and answer.err.startswith(f"check_env.sh: {message}")


def test_help_is_the_header(machine):
    answer = machine.check("--help")
    assert (answer.code, answer.err) == (0, "")
    header = SCRIPT.read_text().split("set -euo")[0].splitlines()[1:]
    assert answer.out.splitlines() == [line.removeprefix("# ") for line in header] and "--allreduce" in answer.out


def test_read_from_stdin(machine, tmp_path):
    """As `ssh HOST bash -s < check_env.sh` does: no file, so that presence is asked, not the pins of a file."""

    def check(*words: str) -> Answer:
        with SCRIPT.open() as stdin:
            result = subprocess.run([BASH, "-s", "--", *words], stdin=stdin, env=machine.env, cwd=tmp_path, timeout=60,
                                    capture_output=True, text=True)  # fmt: skip
        return Answer(result.returncode, result.stdout, result.stderr, parse(result.stdout))

    answer = check()
    assert (answer.code, answer.err) == (0, "")
    assert answer.rows["torch"] == ("ok", "2.13.0+cpu", "any", "")
    assert len(answer.rows) == len(machine.check().rows)
    assert json.loads(check("--json").out)["checks"][0]["name"] == "GPUs"
    answer = check("--host", "node2")
    message = "check_env.sh: --host sends this script and needs it as a file: bash check_env.sh --host ...\n"
    assert (answer.code, answer.out, answer.err) == (2, "", message)


@pytest.mark.parametrize("no_color", ["", "1"])
def test_colours_on_a_terminal_only(machine, no_color):
    parent, child = pty.openpty()
    env = machine.env | {"NO_COLOR": no_color}
    with subprocess.Popen([BASH, str(machine.script)], env=env, stdin=subprocess.DEVNULL, stdout=child) as process:
        os.close(child)
        shown = b""
        with suppress(OSError):  # what Linux says at the end of a terminal
            while chunk := os.read(parent, 65536):
                shown += chunk
        assert process.wait(timeout=30) == 0
    os.close(parent)
    assert (b"\x1b[32mok  \x1b[0m  Python " in shown) == (not no_color)
    assert (b"\x1b" in shown) == (not no_color)
    assert "\x1b" not in machine.check().out


# --- two ends of a port ---


def pair(machine: Machine, *, timeout: str = "15", second: dict[str, str] | None = None) -> list[Answer]:
    ports = [free_port(), free_port()]
    both = [machine.start("--peer", f"127.0.0.1:{there}", "--listen", str(here), "--timeout", timeout, **env)
            for here, there, env in ((ports[0], ports[1], {}), (ports[1], ports[0], second or {}))]  # fmt: skip
    answers = [finish(process) for process in both]
    for answer, here, there in zip(answers, ports, ports[::-1], strict=True):
        hint = f"run there now: bash scripts/check_env.sh --peer 127.0.0.1:{here} --listen {there}\n"
        assert answer.err == f"waiting {timeout} s for 127.0.0.1:{there}; {hint}"
        text = answer.out.replace(str(here), "HERE").replace(str(there), "THERE")
        answers[ports.index(here)] = answer._replace(rows=parse(text))
    return answers


def test_peer_in_both_directions(machine):
    start = time.monotonic()
    for answer in pair(machine):
        assert answer.code == 0
        assert answer.rows["outgoing"] == ("ok", f"127.0.0.1:THERE, {socket.gethostname()} answers", "a connection", "")
        assert answer.rows["incoming"] == ("ok", "port HERE, from 127.0.0.1", "a connection", "")
        assert list(answer.rows) == ["outgoing", "incoming"]
    assert time.monotonic() - start < 10


@pytest.mark.slow
def test_peer_without_python_on_one_side(machine):
    """Bash alone can connect, so the other side's incoming is proven; listening it cannot."""
    first, second = pair(machine, timeout="3", second={"PYTHON": "/no/python"})
    assert (first.code, first.rows["incoming"][:2]) == (1, ("ok", "port HERE, from 127.0.0.1"))
    assert first.rows["outgoing"][:2] == ("FAIL", "127.0.0.1:THERE: refused for 3 s")
    assert second.rows["outgoing"][:2] == ("ok", f"127.0.0.1:THERE, {socket.gethostname()} answers")
    assert second.rows["incoming"] == ("warn", "not checkable without Python", "a connection", "set PYTHON")
    assert second.code == 0


@pytest.mark.parametrize("python", [sys.executable, "/no/python"])
def test_peer_that_refuses(machine, python):
    port, here = free_port(), free_port()
    words = ("--peer", f"127.0.0.1:{port}", "--listen", str(here), "--timeout", "1")
    answer = machine.check(*words, "--json", PYTHON=python)
    assert answer.code == 1
    report = json.loads(answer.out)
    assert report["lines"] == [f"===== Host: {socket.gethostname()} ====="]
    outgoing, incoming = report["checks"]
    started = f"the command was not started there (check_env.sh --peer 127.0.0.1:{here} --listen {port})"
    assert outgoing == {
        "verdict": "FAIL", "name": "outgoing", "found": f"127.0.0.1:{port}: refused for 1 s", "wanted": "a connection",
        "fix": f"causes: {started}; a firewall there; a wrong address or interface",
    }  # fmt: skip
    if python == sys.executable:
        assert (incoming["verdict"], incoming["found"]) == ("FAIL", f"port {here}: nobody came for 1 s")
        assert incoming["fix"] == f"causes: {started}; a firewall here; a wrong address or interface"
    else:
        assert (incoming["verdict"], incoming["found"]) == ("warn", "not checkable without Python")


@pytest.mark.slow
def test_peer_that_is_another_program(machine):
    """What listens there is no check_env.sh: a connection proves nothing about the port of a run."""
    with closing(socket.create_server(("127.0.0.1", 0), backlog=64)) as server:
        port = server.getsockname()[1]
        answer = machine.check("--peer", f"127.0.0.1:{port}", "--listen", str(free_port()), "--timeout", "1")
    found = f"127.0.0.1:{port}: connected, but what listens there is not check_env.sh for 1 s"
    assert answer.rows["outgoing"][:2] == ("FAIL", found) and answer.code == 1


@pytest.mark.slow
def test_peer_that_drops_is_told_from_one_that_refuses(machine):
    """A full backlog drops what comes, as a firewall does."""
    with closing(socket.socket()) as server, closing(socket.socket()) as first, closing(socket.socket()) as second:
        server.bind(("127.0.0.1", 0))
        server.listen(0)
        port = server.getsockname()[1]
        for client in (first, second):
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        for python in (sys.executable, "/no/python"):
            words = ("--peer", f"127.0.0.1:{port}", "--listen", str(free_port()), "--timeout", "4")
            row = machine.check(*words, PYTHON=python).rows["outgoing"]
            assert row[:2] == ("FAIL", f"127.0.0.1:{port}: no answer (timed out) for 4 s")
            assert row[3].startswith("causes: ") and "firewall" in row[3]


def test_peer_port_in_use_and_peer_that_is_this_host(machine):
    with closing(socket.create_server(("0.0.0.0", 0))) as server:
        port = server.getsockname()[1]
        answer = machine.check("--peer", f"127.0.0.1:{port}", "--timeout", "3")
        fix = "end what has it (ss -ltnp), or take another"
        assert answer.rows == {"port": ("FAIL", f"{port}: Address already in use", "free", fix)}
        assert answer.code == 1
    port = free_port()
    answer = machine.check("--peer", f"127.0.0.1:{port}", "--timeout", "3")
    assert answer.rows["outgoing"][:2] == ("FAIL", "127.0.0.1 is this host") and answer.code == 1
    answer = machine.check("--peer", f"no.such.host.invalid:{port}", "--timeout", "3")
    assert answer.rows["outgoing"][0] == "FAIL" and "no.such.host.invalid: " in answer.rows["outgoing"][1]


# --- a real all-reduce ---


def test_allreduce_without_torch_or_python(machine):
    python = machine.stub("python", "echo \"$0: No module named 'torch' Error: no torch\" >&2; exit 1")
    answer = machine.check("--allreduce", PYTHON=str(python))
    assert answer.rows["all-reduce"][0] == "FAIL" and "exit 1: " in answer.rows["all-reduce"][1]
    assert answer.code == 1
    answer = machine.check("--allreduce", PYTHON="/no/python")
    assert answer.rows["all-reduce"][:2] == ("FAIL", "not measured (no Python)") and answer.code == 1


def test_allreduce_launches_what_the_environment_says(machine):
    """The words for torchrun: world and rank as hosts or as processes, and a rank's own share printed."""
    log = machine.folder / "words"
    body = f'printf "%s\\n" "$@" > {log}; echo measured 1.250 GB/s, 4 ranks, gloo, 16 MiB in 0.0201 s'
    python = str(machine.stub("python", body))
    for env in ({"NNODES": "2", "NODE_RANK": "1"}, {"WORLD_SIZE": "4", "RANK": "2"}):
        env |= {"GPUS_PER_HOST": "2", "MASTER_ADDR": "172.25.0.100", "MASTER_PORT": "29501"}
        answer = machine.check("--allreduce", PYTHON=python, **env)
        found = "1.250 GB/s, 4 ranks, gloo, 16 MiB in 0.0201 s"
        assert answer.rows["all-reduce"] == ("ok", found, RATE, "")
        words = " ".join(log.read_text().split("\n")[:14])
        assert words == (
            "-m torch.distributed.run --nnodes 2 --node_rank 1 --master_addr 172.25.0.100 --master_port 29501 "
            f"--nproc_per_node 2 --no_python {python}"
        )


def test_allreduce_ends_in_time(machine):
    python = machine.stub("python", "exec sleep 30")
    start = time.monotonic()
    row = machine.check("--allreduce", "--timeout", "1", PYTHON=str(python), GPUS_PER_HOST="2").rows["all-reduce"]
    assert row[:2] == ("FAIL", "not done in 1 s") and time.monotonic() - start < 5


@pytest.mark.slow
def test_allreduce_of_two_cpu_ranks(machine):
    answer = machine.check("--allreduce", "--timeout", "100", timeout=110, PYTHONPATH=None)
    verdict, found, wanted, _ = answer.rows["all-reduce"]
    assert (answer.code, verdict, wanted) == (0, "ok", RATE), found
    rate, ranks, seconds = re.fullmatch(r"([0-9.]+) GB/s, (\d+) ranks, gloo, 16 MiB in ([0-9.]+) s", found).groups()
    assert ranks == "2"
    assert float(rate) == pytest.approx(2 * (2 - 1) / 2 * 2**24 / float(seconds) / 1e9, rel=0.05)
    assert answer.out.splitlines()[0] == f"===== Host: {socket.gethostname()} ====="


@pytest.mark.slow
def test_allreduce_of_two_hosts_and_of_one_that_is_alone(machine):
    """Two of these scripts on loopback, as on two hosts; then one whose other never comes."""
    env = {"NNODES": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "PYTHONPATH": None}
    both = [machine.start("--allreduce", "--timeout", "100", **env, NODE_RANK=rank) for rank in "01"]
    for process in both:
        answer = finish(process, 110)
        assert answer.rows["all-reduce"][0] == "ok" and ", 2 ranks, gloo, " in answer.rows["all-reduce"][1], answer.out
    start = time.monotonic()
    answer = machine.check("--allreduce", "--timeout", "6", **env, NODE_RANK="0")
    assert answer.rows["all-reduce"][:2] == ("FAIL", "not done in 6 s") and answer.code == 1
    assert time.monotonic() - start < 20


# --- other hosts over ssh ---


SSH = """
printf '%s\\n' "$@" > {here}/ssh_words
while [ "$1" != -- ]; do shift; done
shift 2
cd {folder}; unset MASTER_ADDR CHECK_ENV_ROOT
export PATH={bin}:$REAL_PATH HOME={folder}/home PYTHON='{python}' PYTHONPATH={site}
export HF_HUB_OFFLINE=1 CHECK_ENV_ROOT={folder}/root
exec bash -c "$*"
"""


@pytest.fixture
def node2(machine) -> Machine:
    """Another machine, reached by a stand-in for ssh that joins its words for a shell as the real one does."""
    other = Machine(machine.folder / "node2")
    (other.folder / "requirements.txt").unlink()
    other.root(proc__sys__kernel__hostname="node2")
    machine.env["REAL_PATH"] = os.environ["PATH"]
    answer_as(machine, other)
    return other


def answer_as(machine: Machine, other: Machine, *, python: str = sys.executable, noise: str = "") -> None:
    words = {"here": machine.folder, "folder": other.folder, "bin": other.bin, "python": python, "site": other.site}
    machine.stub("ssh", noise + SSH.format(**words))


def test_equal_hosts(machine, node2):
    """Two tables and a comparison; the words of ssh; the pins of this host's file are those wanted there."""
    node2.gpus(*CARDS)
    node2.torch(cuda=None, count=0)
    env = machine.root() | {"SSH_OPTIONS": "-p 2222 -o A=*", "MASTER_PORT": "29777"}
    answer = machine.check("--host", "me@node2", **env)
    assert answer.out.split("\n\n")[0].startswith("===== Host: node1 =====\nGPU Count: 0\n")
    theirs = answer.out.split("\n\n")[1]
    assert theirs.splitlines()[:2] == ["===== Host: node2 =====", "GPU Count: 2"]
    rows = parse(theirs)
    assert rows["torch"][:3] == ("ok", "2.13.0+cpu", "2.13.0") and rows["port"][1] == "29777 is free"
    assert rows["torch's CUDA"][0] == "FAIL" and answer.code == 1  # theirs counts
    comparison = answer.out.split("\n\n")[2]
    assert comparison.splitlines()[0] == "===== These hosts and node1 ====="
    rows = parse(comparison)
    found = f"there 1 x {CARDS[0]}, 1 x {CARDS[1]}, here none (no nvidia-smi)"
    assert rows["me@node2: GPUs"] == ("ok", found, "may differ", "")
    version = ".".join(map(str, sys.version_info[:3]))
    equal = {"Python": version, "torch": "2.13.0+cpu", "NCCL": "none", "torch's CUDA": "none"} | {
        name: PINS[name] for name in ("deepspeed", "transformers", "datasets")}  # fmt: skip
    assert {name: row[:3] for name, row in rows.items() if "GPU" not in name} == {
        f"me@node2: {name}": ("ok", f"{value} on both", "equal") for name, value in equal.items()}  # fmt: skip
    words = (machine.folder / "ssh_words").read_text().splitlines()
    assert words[:6] == ["-o", "BatchMode=yes", "-o", "ConnectTimeout=10", "-o", "ServerAliveInterval=10"]
    assert words[6:13] == ["-p", "2222", "-o", "A=*", "--", "me@node2", "env"]
    assert words[-4:] == ["bash", "-s", "--", "--json"] and f"CHECK_ENV_PYTHON={sys.executable}" in words


def test_no_word_of_the_environment_is_run_on_another_host(machine, node2):
    """ssh joins its words for a shell there: what that shell would expand is not sent."""
    env = {"MASTER_ADDR": "$(touch x)", "MASTER_PORT": "1;touch y"}
    answer = machine.check("--host", "node2", **machine.root(), **env)
    words = (machine.folder / "ssh_words").read_text().splitlines()
    assert not [word for word in words if "touch" in word]
    assert [word.split("=")[0] for word in words if word.startswith("CHECK")] == ["CHECK_ENV_PINS", "CHECK_ENV_PYTHON"]
    assert "===== Host: node2 =====" in answer.out
    assert not [path for path in machine.folder.rglob("*") if path.name in ("x", "y")]


def test_unequal_hosts(machine, node2):
    node2.package("transformers", "5.22.0")
    node2.torch(version="2.12.1+cu128", cuda="12.8")
    answer = machine.check("--host", "node2", **machine.root())
    rows = parse(answer.out.split("\n\n")[2])
    assert {name: row for name, row in rows.items() if row[0] == "FAIL"} == {
        f"node2: {name}": ("FAIL", f"there {there}, here {here}", "equal", "install the same on both")
        for name, there, here in (("torch", "2.12.1+cu128", "2.13.0+cpu"), ("transformers", "5.22.0", "5.23.0"),
                                  ("NCCL", "2.27.5", "none"), ("torch's CUDA", "12.8", "none"))
    }  # fmt: skip
    assert rows["node2: deepspeed"][0] == "ok" and answer.code == 1


def test_hosts_as_json(machine, node2):
    """One object for several hosts; what a login script prints there, and quotes in what is found, do no harm."""
    answer_as(machine, node2, noise="echo 'Welcome, \"friend\" {'; echo warning >&2\n")
    node2.gpus('A "quoted" \\\\ card')
    node2.torch(cuda="12.8", count=1)
    answer = machine.check("--host", "node2", "me@node2", "--json", **machine.root())
    report = json.loads(answer.out)
    assert list(report) == ["host", "lines", "checks", "hosts", "comparison"] and report["host"] == "node1"
    assert [host["host"] for host in report["hosts"]] == ["node2", "me@node2"]
    for host in report["hosts"]:
        assert len(host["lines"]) == 5 and host["lines"][0] == "===== Host: node2 ====="
        assert host["checks"][0] == {
            "verdict": "ok", "name": "GPUs", "found": '1 x A "quoted" \\\\ card', "wanted": "any", "fix": ""
        }  # fmt: skip
    assert {row["name"] for row in report["comparison"] if row["verdict"] == "FAIL"} == {
        f"{host}: {name}" for host in ("node2", "me@node2") for name in ("NCCL", "torch's CUDA")}  # fmt: skip


def test_a_host_without_python(machine, node2):
    answer_as(machine, node2, python="/no/python")
    answer = machine.check("--host", "node2", **machine.root())
    rows = parse(answer.out.split("\n\n")[2])
    version = ".".join(map(str, sys.version_info[:3]))
    assert rows.pop("node2: GPUs")[0] == "ok"
    assert rows == {"node2: Python": ("FAIL", f"there none, here {version}", "equal", "install the same on both")}
    assert answer.code == 1


@pytest.mark.parametrize(
    ("reply", "found", "fix"),
    [
        ("echo 'ssh: Could not resolve hostname node2: Name or service not known' >&2; exit 255",
         "exit 255: ssh: Could not resolve hostname node2: Name or service not known", "mend the name"),
        ("echo 'ssh: connect to host node2 port 22: Connection refused' >&2; exit 255",
         "exit 255: ssh: connect to host node2 port 22: Connection refused", "start sshd there"),
        ("echo 'Host key verification failed.' >&2; exit 255",
         "exit 255: Host key verification failed.", "log in once"),
        ("echo 'me@node2: Permission denied (publickey).' >&2; exit 255",
         "exit 255: me@node2: Permission denied (publickey).", "ssh-copy-id node2"),
        ("echo 'sh: bash: not found' >&2; exit 127", "exit 127: sh: bash: not found", "try: ssh node2 bash -s"),
        ("exit 0", "exit 0:", "try: ssh node2 bash -s"),
        ("exec sleep 30", "no answer in 1 s", "host down, a firewall that drops it, or a wrong address"),
    ],
)  # fmt: skip
def test_a_host_that_does_not_answer(machine, reply, found, fix):
    machine.stub("ssh", reply)
    start = time.monotonic()
    answer = machine.check("--host", "node2", "--timeout", "1", **machine.root())
    assert time.monotonic() - start < 6
    assert answer.code == 1
    row = answer.rows["node2: ssh"]
    assert row[:3] == ("FAIL", found, "a shell") and row[3].startswith(fix)
    assert [name for name in answer.rows if name.startswith("node2")] == ["node2: ssh"]


def test_a_host_that_does_not_answer_in_json(machine):
    machine.stub("ssh", "exit 255")
    report = json.loads(machine.check("--host", "node2", "--json", **machine.root()).out)
    assert report["hosts"] == [] and [row["name"] for row in report["comparison"]] == ["node2: ssh"]


@pytest.fixture
def sshd(tmp_path: Path):
    """A function that starts a real sshd on loopback with an environment for its logins; returns SSH_OPTIONS."""
    if not SSHD or not shutil.which("ssh-keygen"):
        pytest.skip("no sshd here: apt-get install openssh-server")
    folder, running = tmp_path / "sshd", []
    folder.mkdir()
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(exist_ok=True)  # where sshd wants to lock itself in
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    (folder / "authorized").write_text((folder / "user.pub").read_text())

    def start(**env: str) -> tuple[int, str]:
        port = free_port()
        words = " ".join(f'"{key}={value}"' for key, value in env.items())
        config = f"Port {port}\nListenAddress 127.0.0.1\nHostKey {folder}/host\n"
        config += f"AuthorizedKeysFile {folder}/authorized\nPidFile none\nStrictModes no\nPasswordAuthentication no\n"
        config += f"UsePAM no\nSetEnv {words}\n"
        (folder / "config").write_text(config)
        key = " ".join((folder / "host.pub").read_text().split()[:2])
        (folder / "known").write_text(f"[127.0.0.1]:{port} {key}\n")
        log = (folder / "log").open("w")
        running.append(subprocess.Popen([SSHD, "-D", "-e", "-f", folder / "config"], stderr=log))
        for _ in range(50):
            with suppress(ConnectionRefusedError), closing(socket.create_connection(("127.0.0.1", port), 1)):
                known = f"-o UserKnownHostsFile={folder}/known"
                return port, f"-F none -p {port} -i {folder}/user -o IdentitiesOnly=yes {known}"
            time.sleep(0.1)
        pytest.fail((folder / "log").read_text())

    yield start
    for process in running:
        process.terminate()
        process.wait(timeout=10)


@pytest.mark.drill
def test_over_a_real_ssh(machine, sshd):
    """The same machine by ssh: equal; then with other versions; then without Python; then with the door shut."""
    user = getpass.getuser()
    other = Machine(machine.folder / "node2")
    other.torch(version="2.11.0")
    me = f"{user}@127.0.0.1"

    def ask(options: str) -> Answer:
        return machine.check("--host", me, SSH_OPTIONS=options, timeout=100)

    real = {"PYTHONPATH": machine.env["PYTHONPATH"], "PYTHON": sys.executable, "HF_HUB_OFFLINE": "1"}
    answer = ask(sshd(**real)[1])
    assert answer.code == 0, answer.out
    assert answer.rows[f"{me}: torch"][:2] == ("ok", "2.13.0+cpu on both")
    assert answer.out.count(f"===== Host: {socket.gethostname()} =====") == 2

    answer = ask(sshd(**real | {"PYTHONPATH": str(other.site)})[1])
    assert answer.rows[f"{me}: torch"][:2] == ("FAIL", "there 2.11.0, here 2.13.0+cpu") and answer.code == 1

    port, options = sshd(**real | {"PYTHON": "/no/python"})
    answer = ask(options)
    assert answer.rows[f"{me}: Python"][1].startswith("there none, here ") and answer.code == 1
    assert f"{me}: torch" not in answer.rows

    nobody = f"-o UserKnownHostsFile={machine.folder}/none -o GlobalKnownHostsFile={machine.folder}/none"
    answer = ask(f"{nobody} {options}")  # the first of two options counts
    assert answer.rows[f"{me}: ssh"][1] == "exit 255: Host key verification failed." and answer.code == 1
    answer = ask(options.replace("/user ", "/host "))  # a key that is not authorized there
    assert "Permission denied (publickey" in answer.rows[f"{me}: ssh"][1] and answer.code == 1
    answer = ask(options.replace(str(port), str(free_port())))
    assert answer.rows[f"{me}: ssh"][1].endswith("Connection refused") and answer.code == 1
    answer = machine.check("--host", "no.such.host.invalid", SSH_OPTIONS=options)
    assert "Could not resolve hostname no.such.host.invalid" in answer.rows["no.such.host.invalid: ssh"][1]


@pytest.mark.drill
def test_this_machine_with_its_real_packages():
    """In the repository, with the packages installed: their versions are those of requirements.txt."""
    result = subprocess.run([BASH, SCRIPT], capture_output=True, text=True, timeout=100, cwd="/")
    rows = parse(result.stdout)
    for line in (ROOT / "requirements.txt").read_text().splitlines():
        name, _, version = line.partition("==")
        if name in PINS:
            assert rows[name][0] == "ok" and rows[name][1].split("+")[0] == rows[name][2] == version
