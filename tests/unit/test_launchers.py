"""The shell scripts: clean for shellcheck, and what they would run, refuse and answer, without running it."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import BIN, ROOT, free_port
from hub_server import HANG, HubServer, wikitext_repo

SHELL = [*sorted((ROOT / "scripts").glob("*.sh")), ROOT / ".ci" / "run"]
ZERO2 = "DeepSpeed-GPTLike-ZeRO-2.py"
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
    assert len(words) <= {"check_env.sh": 920, "run_multihost.sh": 150}.get(script.name, 100)
    assert "set -euo pipefail" in words
    assert os.access(script, os.X_OK)
    assert subprocess.run(["bash", "-n", script], capture_output=True).returncode == 0
    shellcheck = shutil.which("shellcheck", path=f"{BIN}{os.pathsep}{os.environ['PATH']}")
    found = subprocess.run([shellcheck, script], capture_output=True, text=True)
    assert found.returncode == 0, found.stdout


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


def test_setup_refuses_an_unknown_file_and_a_missing_python(machine, tmp_path):
    result = machine("setup.sh", "packages.txt")
    assert (result.returncode, result.stderr) == (2, "setup.sh: no such requirements file: packages.txt\n")
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    (tmp_path / "requirements.txt").write_text("")
    old = tmp_path / "python3.8"
    old.write_text('#!/bin/sh\n[ "$1" = -V ] && echo Python 3.8.18 || exit 1\n')
    old.chmod(0o755)
    for python, message in (
        ("python4", "no python4: install Python 3.11 or newer, or set PYTHON"),
        (old, "Python 3.8.18 is too old, transformers 5 needs Python 3.11 or newer: set PYTHON=/path/to/python3.11"),
    ):
        result = subprocess.run(
            ["bash", tmp_path / "scripts" / "setup.sh"],
            env=os.environ | {"PYTHON": str(python)},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert (result.returncode, result.stderr) == (1, f"setup.sh: {message}\n")
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


@pytest.mark.slow
def test_quickstart_does_not_wait_for_a_silent_hub(machine):
    with HubServer(fail={".": HANG}) as hub:
        start = time.monotonic()
        result = machine("quickstart.sh", "--dry_run", HF_ENDPOINT=hub.url)
        assert time.monotonic() - start < 11
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


@pytest.mark.slow
def test_a_forgotten_lock_is_named(tmp_path):
    """Left by a compilation that was killed, it would let every later one wait for ever."""
    command = [sys.executable, ROOT / "scripts" / "compile_ops.py"]
    env = os.environ | {"TORCH_EXTENSIONS_DIR": str(tmp_path), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    (tmp_path / "cpu_adam").mkdir()
    (tmp_path / "cpu_adam" / "lock").touch()
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as process:
        line = next(line for line in process.stdout if "waiting" in line)
        process.kill()
    assert line.startswith("  waiting for another process that compiles. If there is none, delete ")
    assert Path(line.split("delete ")[1].strip()).exists()


@pytest.mark.drill
def test_quickstart_trains(tmp_path):
    """The whole command on the offline sample, at the size it has without a GPU; it takes minutes."""
    folder = ROOT / "runs" / "quickstart"
    done = subprocess.run(["bash", str(ROOT / "scripts" / "quickstart.sh"), "--dataset", "sample"],
                          capture_output=True, text=True, timeout=900, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert losses[-1] < losses[0] - 2
    for name in ("validation_perplexity=", "validation_word_perplexity=", "validation_bits_per_byte="):
        assert name in done.stdout
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (folder / "model" / "model.safetensors").stat().st_size > 1_000_000
    text = done.stdout.split("scripts/generate.py")[1].split("== done")[0]
    assert "If the" in text and len(text.split()) > 20
