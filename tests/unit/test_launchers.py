"""The shell scripts: sound, and what they would run, refuse and answer, without running it."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import compile_ops
import pytest
from conftest import ROOT, ZERO2, free_port
from hub_server import HANG, HubServer, wikitext_repo

SHELL = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
GPU_LINE = "GPU {}: NVIDIA H100 80GB HBM3 (UUID: GPU-00000000-0000-0000-0000-00000000000{})"


@pytest.fixture
def machine(tmp_path: Path):
    """A function that runs a shell script as on a machine with so many GPUs."""

    def on_machine(script: str, *words: str, gpus: int = 0, **env: str) -> subprocess.CompletedProcess:
        lines = "\n".join(GPU_LINE.format(number, number) for number in range(gpus))
        fake = tmp_path / "nvidia-smi"
        fake.write_text(f"#!/bin/sh\necho '{lines}'\n" if gpus else "#!/bin/sh\necho 'No devices were found'\nexit 6\n")
        fake.chmod(0o755)
        kept = {key: os.environ[key] for key in ("HOME", "LANG", "TMPDIR") if key in os.environ}
        variables = kept | {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "PYTHON": sys.executable} | env
        words = ["bash", str(ROOT / "scripts" / script), *words]
        return subprocess.run(words, cwd=ROOT, env=variables, capture_output=True, text=True, timeout=60)

    return on_machine


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_shell_is_sound(script):
    words = script.read_text().splitlines()
    assert words[0] == "#!/usr/bin/env bash"
    assert len(words) <= {"check_env.sh": 250, "run_multihost.sh": 90}.get(script.name, 100)
    assert "set -euo pipefail" in words
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0


@pytest.mark.parametrize(
    ("env", "gpus", "launch"),
    [
        ({}, 0, "deepspeed --quiet --num_gpus 2 --master_port 29500"),
        ({}, 8, "deepspeed --quiet --master_port 29500"),
        ({"NUM_GPUS": "4"}, 0, "deepspeed --quiet --num_gpus 4 --master_port 29500"),
        ({"NUM_GPUS": "1"}, 8, "deepspeed --quiet --num_gpus 1 --master_port 29500"),
        ({"MASTER_PORT": "29501"}, 2, "deepspeed --quiet --master_port 29501"),
        ({"CUDA_VISIBLE_DEVICES": "0,2"}, 4, "deepspeed --quiet --include localhost:0\\,2 --master_port 29500"),
        (
            {"CUDA_VISIBLE_DEVICES": "3", "NUM_GPUS": "1"},
            4,
            "deepspeed --quiet --include localhost:3 --master_port 29500",
        ),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0, "deepspeed --quiet --num_gpus 2 --master_port 29500"),
    ],  # fmt: skip
    ids=str,
)
def test_run_local_takes_the_devices_asked_for(machine, env, gpus, launch):
    result = machine("run_local.sh", "--dry_run", ZERO2, "--dataset", "my texts", gpus=gpus, **env)
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == f"+ {launch} {ZERO2} --dataset my\\ texts\n"


def test_run_local_runs_base_in_one_process(machine):
    result = machine("run_local.sh", "--dry_run", "GPTLike-Base.py", "--epochs", "1", gpus=8)
    assert (result.returncode, result.stdout) == (0, "+ python GPTLike-Base.py --epochs 1\n")


@pytest.mark.parametrize(
    ("words", "gpus", "env", "message"),
    [
        ([], 0, {}, "no such script: (none given); there are: DeepSpeed-GPTLike-Multihosts.py"),
        (["train.py"], 0, {}, "no such script: train.py; there are: DeepSpeed-GPTLike-Multihosts.py"),
        (["README.md"], 0, {}, "no such script: README.md"),
        ([ZERO2], 4, {"CUDA_VISIBLE_DEVICES": "0,2", "NUM_GPUS": "1"}, "NUM_GPUS=1, but CUDA_VISIBLE_DEVICES=0,2"),
        ([ZERO2], 4, {"CUDA_VISIBLE_DEVICES": "GPU-3f2a"}, "CUDA_VISIBLE_DEVICES='GPU-3f2a': deepspeed takes"),
        ([ZERO2], 4, {"CUDA_VISIBLE_DEVICES": ""}, "CUDA_VISIBLE_DEVICES='': deepspeed takes GPU numbers"),
        ([ZERO2], 0, {"NUM_GPUS": "two"}, "NUM_GPUS=two is not a number of ranks"),
        ([ZERO2], 0, {"NUM_GPUS": "0"}, "NUM_GPUS=0 is not a number of ranks"),
        (["GPTLike-Base.py"], 0, {"NUM_GPUS": "2"}, "GPTLike-Base.py trains in one process, NUM_GPUS=2"),
    ],
)
def test_run_local_refuses(machine, words, gpus, env, message):
    for dry_run in ([], ["--dry_run"]):
        result = machine("run_local.sh", *dry_run, *words, gpus=gpus, **env)
        assert (result.returncode, result.stdout) == (2, "")
        assert result.stderr.startswith(f"run_local.sh: {message}")
        assert result.stderr.count("\n") == 1


def test_run_local_says_that_there_is_no_gpu(machine):
    result = machine("run_local.sh", ZERO2, CUDA_VISIBLE_DEVICES="0,1")
    assert result.returncode == 1
    assert result.stderr == (
        "run_local.sh: CUDA_VISIBLE_DEVICES=0,1, but nvidia-smi lists no GPU: unset it to run on CPU ranks\n"
    )


def test_test_sh_refuses_an_unknown_flag(machine):
    result = machine("test.sh", "--fats")
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == (
        "test.sh: unknown flag --fats: write --fast, --all or --, and after it what pytest is to get\n"
    )


def test_setup_removes_the_lock_of_a_killed_process_only(tmp_path, capsys):
    """PyTorch would wait for it without end."""
    lock = tmp_path / "lock"
    with lock.open("w"):
        compile_ops.heed_lock(lock)
        assert lock.exists() and "waiting for another process that compiles" in capsys.readouterr().out
    os.utime(lock, (0, 0))
    compile_ops.heed_lock(lock)
    assert not lock.exists() and f"removed {lock}: its process was killed" in capsys.readouterr().out


def test_setup_waits_for_a_lock_that_another_host_may_hold(tmp_path, capsys, monkeypatch):
    lock = tmp_path / "lock"
    lock.touch()
    monkeypatch.setattr(compile_ops.time, "sleep", lambda seconds: lock.unlink())  # there it is done
    compile_ops.heed_lock(lock)
    assert f"another host may hold {lock}: waiting 300 s." in capsys.readouterr().out


def test_setup_refuses_an_unknown_file_and_an_old_python(machine, tmp_path):
    result = machine("setup.sh", "packages.txt")
    assert (result.returncode, result.stderr) == (2, "setup.sh: no such requirements file: packages.txt\n")
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("")
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.8.18 || exit 1\n')
    old.chmod(0o755)
    for python, message in ((old, "Python 3.8.18 is too old"), ("python4", "no python4: install Python 3.11")):
        words = ["bash", str(tmp_path / "scripts" / "setup.sh")]
        result = subprocess.run(words, env=os.environ | {"PYTHON": str(python)}, capture_output=True, text=True)
        assert result.returncode == 1 and result.stderr.startswith(f"setup.sh: {message}")
    assert not (tmp_path / ".venv").exists()


def commands(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("+ ")]


def test_quickstart_prints_its_commands(machine):
    """With a Hub that does not answer: the sample, and that is said."""
    endpoint = f"http://127.0.0.1:{free_port()}"
    result = machine("quickstart.sh", "--dry_run", "--epochs", "1", HF_ENDPOINT=endpoint)
    assert (result.returncode, result.stderr) == (0, "")
    assert f"NOT WikiText-2, since {endpoint} does not answer" in result.stdout
    assert "no NVIDIA GPU, so two CPU ranks" in result.stdout
    setup, check, training, plot, export, text = commands(result.stdout)
    assert (setup, check) == ("+ bash scripts/setup.sh requirements.txt", "+ bash scripts/check_env.sh")
    launch = "+ deepspeed --quiet --num_gpus 2 --master_port 29500 DeepSpeed-GPTLike-ZeRO-2.py"
    assert training.startswith(f"{launch} --output_dir runs/quickstart --overwrite --dataset sample ")
    assert training.endswith(" --epochs 1")
    assert plot == "+ python scripts/tools/compare_runs.py runs/quickstart --output runs/quickstart"
    assert export == "+ python scripts/tools/export_hf.py runs/quickstart runs/quickstart/gpt2"
    assert (
        text == "+ python scripts/tools/generate.py runs/quickstart/gpt2 --prompt If\\ the --temperature 0.5 --top_k 20"
    )


def test_quickstart_asks_the_hub_for_wikitext(machine):
    repo = wikitext_repo({split: ["A line ."] for split in ("train", "validation", "test")})
    with HubServer(datasets={"Salesforce/wikitext": repo}) as hub:
        result = machine("quickstart.sh", "--dry_run", HF_ENDPOINT=hub.url)
    assert f"data: WikiText-2 from {hub.url}\n" in result.stdout
    assert "--dataset" not in commands(result.stdout)[2]


@pytest.mark.drill
def test_quickstart_does_not_wait_for_a_silent_hub(machine):
    with HubServer(fail={".": HANG}) as hub:
        result = machine("quickstart.sh", "--dry_run", HF_ENDPOINT=hub.url)  # which has 60 s
    assert f"NOT WikiText-2, since {hub.url} does not answer" in result.stdout


def test_quickstart_takes_the_whole_machine(machine):
    """All GPUs with the scripts' own sizes; and no probe of the Hub where --dataset is given or a cache is in use."""
    for words, env in ((["--dataset", "sample"], {}), ([], {"HF_HUB_OFFLINE": "1"})):
        result = machine("quickstart.sh", "--dry_run", *words, gpus=8, HF_ENDPOINT="http://127.0.0.1:1", **env)
        training = commands(result.stdout)[2]
        assert training.startswith("+ deepspeed --quiet --master_port 29500 DeepSpeed-GPTLike-ZeRO-2.py ")
        assert "--n_layer" not in training and "NOT WikiText-2" not in result.stdout
        assert training.count("--dataset") == len(words) // 2


@pytest.mark.parametrize("flag", ["--output_dir", "--output_dir=runs/mine", "--resume"])
def test_quickstart_never_deletes_another_run(machine, flag):
    result = machine("quickstart.sh", flag, "runs/mine")
    assert (result.returncode, result.stdout) == (2, "")
    given = flag.split("=")[0]
    message = "does not go here: the quick start begins afresh in runs/quickstart each time"
    assert result.stderr == f"quickstart.sh: {given} {message}\n"


FIRST = "172.25.0.100"
IP = """case "$*" in
*"address show to 172.25.0.100"|*"address show to 127.0.0.1") echo "2: eno1 inet 172.25.0.100/24" ;;
*"address show"*) ;;
*"route get 203."*) echo "RTNETLINK answers: Network is unreachable"; exit 2 ;;
*) echo "${*##* } dev eno1 src 172.25.0.100 uid 0" ;;
esac
"""


@pytest.fixture
def hosts(machine, tmp_path):
    """run_multihost.sh or run_slurm.sh on a host that has 172.25.0.100 on eno1, with torchrun as a stand-in."""
    show = (
        'printf "<%s>" "$@"; echo; env | grep -E "^(NCCL|GLOO|MALLOC)_" | sort; cat "$DS_ENV_FILE" 2>/dev/null; exit 7'
    )
    fakes = {"ip": IP, "torchrun": show, "deepspeed": show, "scontrol": 'printf "gpu1\\ngpu2\\n"'}
    fakes["srun"] = 'SLURM_NODEID=1 SLURM_GPUS_ON_NODE=4 "${@:5}"'
    for name, body in fakes.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    shutil.copytree(ROOT / "scripts", tmp_path / "site" / "scripts")
    shutil.copy(ROOT / "configs" / "hostfile.example", tmp_path / "site" / "hosts")
    (tmp_path / "site" / "train.py").touch()

    def start(*words: str, script: str = "run_multihost.sh", gpus: int = 0, **env: str) -> subprocess.CompletedProcess:
        machine("run_local.sh", "none", gpus=gpus)  # makes the stand-in of nvidia-smi
        variables = {"PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "HOME": str(tmp_path)}
        variables |= {"MASTER_ADDR": FIRST, "NODE_RANK": "0"} | env
        words = ["bash", f"scripts/{script}", *words]
        return subprocess.run(words, cwd=tmp_path / "site", env=variables, capture_output=True, text=True, timeout=60)

    return start


STATIC = "torchrun --nnodes=2 --nproc_per_node=1 --node_rank=0 --master_addr=172.25.0.100 --master_port=29500"
DEEPSPEED = "deepspeed --hostfile hosts --master_addr 172.25.0.100 --master_port 29500"
ELASTIC = "torchrun --nnodes={} --nproc_per_node=1 --rdzv_backend=c10d --rdzv_endpoint=172.25.0.{}:29500 "
ELASTIC += "--rdzv_id=gptlike --rdzv_conf=is_host={},join_timeout=300,read_timeout=300 --local_addr=172.25.0.100"


@pytest.mark.parametrize(
    ("flags", "gpus", "env", "command"),
    [
        ("", 0, {}, f"{STATIC} --rdzv_conf=timeout=300"),
        ("", 4, {"RDZV_TIMEOUT": "9"}, f"{STATIC.replace('node=1', 'node=4')} --rdzv_conf=timeout=9"),
        ("", 4, {"CUDA_VISIBLE_DEVICES": "0,2"}, f"{STATIC.replace('node=1', 'node=2')} --rdzv_conf=timeout=300"),
        ("", 4, {"GPUS_PER_HOST": "1"}, f"{STATIC} --rdzv_conf=timeout=300"),
        ("--elastic --max-restarts 3", 0, {}, f"{ELASTIC.format(2, 100, 1)} --max-restarts 3"),
        (
            "--elastic",
            0,
            {"MASTER_ADDR": "172.25.0.200", "NODE_RANK": "", "NNODES": "1:4"},
            ELASTIC.format("1:4", 200, 0),
        ),
        ("--launcher deepspeed --hostfile hosts", 0, {"NODE_RANK": ""}, DEEPSPEED),
        (
            "--launcher=deepspeed --hostfile=hosts --venv_script /v",
            0,
            {"MASTER_ADDR": ""},
            f"{DEEPSPEED} --venv_script /v",
        ),
        ("--launcher deepspeed --no_ssh --hostfile hosts", 0, {}, f"{DEEPSPEED} --no_ssh --node_rank 0"),
    ],
)
def test_run_multihost_commands(hosts, flags, gpus, env, command):
    result = hosts("--dry_run", *flags.split(), "train.py", "--lr", "a b", gpus=gpus, **env)
    assert (result.returncode, result.stderr) == (0, "")
    last = result.stdout.splitlines()[-1]
    assert shlex.split(last) == ["+", *command.split(), "train.py", "--lr", "a b"]
    assert "chose GLOO_SOCKET_IFNAME=eno1: it leads to " in result.stdout


@pytest.mark.parametrize("flags", ["", "--launcher deepspeed --hostfile hosts"])
def test_run_multihost_hands_on_what_was_chosen(hosts, flags):
    words = ["$(touch hacked)", "a b", "", "*"]
    result = hosts(*flags.split(), "train.py", *words, GLOO_SOCKET_IFNAME="eno9", HF_HOME="/hf", HF_TOKEN="secret")
    assert (result.returncode, result.stderr) == (7, "")
    assert "<train.py><$(touch hacked)><a b><><*>\n" in result.stdout and "secret" not in result.stdout
    assert "kept GLOO_SOCKET_IFNAME=eno9, since it was set" in result.stdout
    lines = ["GLOO_SOCKET_IFNAME=eno9", "MALLOC_MMAP_MAX_=0", "MALLOC_TRIM_THRESHOLD_=1000000000000"]
    assert {*lines, "NCCL_SOCKET_IFNAME==eno1"} <= set(result.stdout.splitlines())
    assert ("HF_HOME=/hf" in result.stdout) is bool(flags)  # what pdsh would not hand on


@pytest.mark.parametrize(("gpus", "allocator"), [(0, True), (2, False)])
def test_run_local_keeps_freed_memory_on_cpus(hosts, gpus, allocator):
    result = hosts("train.py", "a b", script="run_local.sh", gpus=gpus)
    assert result.returncode == 7 and result.stdout.splitlines()[1].endswith("<train.py><a b>"), result.stderr
    lines = {"MALLOC_MMAP_MAX_=0", "MALLOC_TRIM_THRESHOLD_=1000000000000"}
    assert (lines <= set(result.stdout.splitlines())) is allocator


@pytest.mark.parametrize(
    ("words", "env", "code", "message"),
    [
        ("", {}, 2, "no such script: (none given)"),
        ("other.py", {}, 2, "no such script: other.py"),
        ("--launcher ssh train.py", {}, 2, "launch by torchrun [--elastic] or deepspeed [--no_ssh]"),
        ("--elastic --launcher deepspeed train.py", {}, 2, "launch by torchrun [--elastic]"),
        ("--elastic train.py", {"NODE_RANK": "PATH[$(touch hacked)]"}, 2, "NODE_RANK=PATH[$(touch hacked)]: write"),
        ("train.py", {"MASTER_ADDR": ""}, 2, "MASTER_ADDR=: write the first host's address"),
        ("train.py", {"MASTER_ADDR": "-oProxy=x"}, 2, "MASTER_ADDR=-oProxy=x: write"),
        ("train.py", {"MASTER_ADDR": "no-such-host.invalid"}, 1, "MASTER_ADDR=no-such-host.invalid does not resolve"),
        ("train.py", {"MASTER_ADDR": "172.25.0.200"}, 1, "MASTER_ADDR=172.25.0.200 is not this host, but NODE_RANK=0"),
        (
            "train.py",
            {"MASTER_ADDR": "203.0.113.9", "NODE_RANK": "1"},
            1,
            "no route to MASTER_ADDR=203.0.113.9: RTNETL",
        ),
        ("train.py", {"NODE_RANK": ""}, 2, "NODE_RANK=: write 0 on the first host"),
        ("train.py", {"NODE_RANK": "2"}, 2, "NODE_RANK=2, NNODES=2"),
        ("train.py", {"NODE_RANK": "a[$(touch hacked)]"}, 2, "NODE_RANK=a[$(touch hacked)]: write"),
        ("train.py", {"NNODES": "1:2"}, 2, "NNODES=1:2: write the number of hosts"),
        ("train.py", {"GPUS_PER_HOST": "all"}, 2, "GPUS_PER_HOST=all: write a number"),
        ("train.py", {"MASTER_PORT": "http"}, 2, "MASTER_PORT=http: write a number"),
        ("--launcher deepspeed train.py", {}, 1, "no hostfile configs/hostfile: copy configs/hostfile.example"),
        (
            "--launcher deepspeed --hostfile hosts train.py",
            {"CUDA_VISIBLE_DEVICES": "0,2"},
            2,
            "deepspeed takes each host's first GPUs",
        ),
    ],
)
def test_run_multihost_refuses(hosts, words, env, code, message):
    result = hosts(*words.split(), **env)
    assert result.returncode == code and result.stderr.startswith(f"run_multihost.sh: {message}")
    assert result.stderr.count("\n") == 1 and "<" not in result.stdout


def test_run_slurm_starts_one_torchrun_on_each_node(hosts):
    slurm = {"SLURM_JOB_NODELIST": "gpu[1-2]", "script": "run_slurm.sh"}
    result = hosts("train.py", "a b", **slurm)
    lines = result.stdout.splitlines()
    assert lines[0].startswith("+ srun --nodes=2 --ntasks=2 --ntasks-per-node=1 --kill-on-bad-exit=1 bash -c ")
    rest = "<--node_rank=1><--nnodes=2><--master_addr=gpu1><--master_port=29500><train.py><a b>"
    assert result.returncode == 7 and lines[1] == f"<--nproc_per_node=4>{rest}" and "MALLOC_MMAP_MAX_=0" in lines
    for words, env, code, message in (
        (["other.py"], {}, 2, "no such script in "),
        (["train.py"], {"SLURM_JOB_NODELIST": ""}, 1, "this is no Slurm job: sbatch scripts/run_slurm.sh train.py"),
        (["train.py"], {"MASTER_PORT": "0"}, 2, "MASTER_PORT=0 is no port"),
    ):
        result = hosts(*words, **(slurm | env))
        assert result.returncode == code and result.stderr.startswith(f"run_slurm.sh: {message}")
