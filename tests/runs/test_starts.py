"""Starts that go wrong end in one message; odd but sound environments train."""

import json
import os
import re
import subprocess
from pathlib import Path

import pytest
from conftest import (
    BASE,
    MULTIHOSTS,
    OFFLOAD,
    ROOT,
    TINY,
    ZERO1,
    ZERO3,
    command,
    environment,
    free_port,
    losses,
    run_script,
)
from torch.utils import cpp_extension

pytestmark = pytest.mark.slow
STEPS = ["--max_steps", "2"]


@pytest.mark.parametrize(
    ("script", "variables", "message"),
    [
        (BASE, {"WORLD_SIZE": "2", "RANK": "0"}, "it trains in one process: run DeepSpeed-GPTLike-ZeRO-1.py"),
        (ZERO1, {"RANK": "first"}, r"cannot join the other ranks, RANK=first .*invalid literal"),
        (ZERO1, {"RANK": "0", "WORLD_SIZE": "1"}, "the other ranks, .*MASTER_ADDR=.MASTER_ADDR.*MASTER_ADDR"),
        (
            ZERO1,
            {"CUDA_VISIBLE_DEVICES": "-1", "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "no.such.host"},
            "cannot join the other ranks",
        ),
    ],
)
def test_wrong_environment(script, variables, message, tmp_path):
    place = {"MASTER_PORT": str(free_port())} | variables
    result = run_script(script, *TINY, *STEPS, "--timeout", "5", "--output_dir", tmp_path, **place)
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr

    assert re.search(message, result.stderr, re.DOTALL)


@pytest.mark.drill
def test_a_missing_host_is_waited_for_and_the_causes_are_named(tmp_path):
    place = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    result = run_script(ZERO1, *TINY, *STEPS, "--timeout", "8", "--output_dir", tmp_path, **place)
    assert result.returncode == 1 and "cannot join the other ranks" in result.stderr
    assert "RANK=0 WORLD_SIZE=2 MASTER_ADDR=127.0.0.1 MASTER_PORT=" in result.stderr
    assert "Were all hosts started?" in result.stderr and "network_check.py" in result.stderr


@pytest.mark.drill
def test_hosts_that_read_other_data(tmp_path):
    """Two ranks, as of two hosts: the paths are not the same, which is legal, but neither are the texts."""
    place = {"WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    ranks = []
    for rank in ("0", "1"):
        (tmp_path / rank).mkdir()
        for split in ("train", "valid"):
            (tmp_path / rank / f"{split}.txt").write_text(f"The text of host {rank} .\n" * 200)
        flags = [*TINY, *STEPS, "--tokenizer", "bpe:270", "--dataset", tmp_path / rank]
        line = command(MULTIHOSTS, *flags, "--output_dir", tmp_path / rank / "run", launcher="python")
        pipe = subprocess.PIPE
        ranks.append(subprocess.Popen(line, env=environment(RANK=rank, **place), stdout=pipe, stderr=pipe, text=True))
    for rank in ranks:
        _, said = rank.communicate(timeout=120)
        assert rank.returncode == 1 and re.search("error: data is [0-9a-f]{64} on host ", said), said


@pytest.mark.drill
@pytest.mark.parametrize(
    ("script", "changes", "message"),
    [
        (ZERO1, {"optimizer": {"type": "Lamb", "params": {"lr": 1e-3}}}, "here, with its optimizer {'type': 'Lamb'"),
        (
            OFFLOAD,
            {"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}},
            "stage 2 offloads the optimizer to the CPU, all else needs stage 3",
        ),
    ],
)
def test_what_deepspeed_cannot_run_here(script, changes, message, tmp_path):
    config = json.loads((ROOT / "configs" / "zero1.json").read_text())
    (tmp_path / "ds.json").write_text(json.dumps(config | changes))
    flags = [*TINY, *STEPS, "--ds_config", tmp_path / "ds.json", "--output_dir", tmp_path / "run"]
    result = run_script(script, *flags)
    assert result.returncode == 1 and f"ds.json{':' if script == OFFLOAD else ''} {message}" in result.stderr
    assert "Traceback" not in result.stderr


def test_odd_environments_train(tmp_path):
    """HOME unset, LC_ALL=C, GPUs hidden: it trains and writes what it should."""
    line = command(ZERO3, *TINY, *STEPS, "--output_dir", tmp_path / "run", launcher="python")
    odd = {name: value for name, value in environment(LC_ALL="C", CUDA_VISIBLE_DEVICES="").items() if name != "HOME"}
    result = subprocess.run(line, env=odd, capture_output=True, text=True, timeout=240)
    assert result.returncode == 0, result.stderr
    assert list(losses(tmp_path / "run")) == [1, 2] and "Traceback" not in result.stderr


def test_the_lock_of_a_killed_run_is_removed_and_that_of_a_living_one_is_not(tmp_path):
    """PyTorch waits without end for the lock of a C++ op. Here two locks of ops that no run loads, in another home."""
    ops = Path(cpp_extension._get_build_directory("deepspeed_shm_comm", verbose=False)).parent
    folder = tmp_path / ".cache" / "torch_extensions" / "test"
    for name in ("killed", "living"):
        (folder / name).mkdir(parents=True)
        (folder / name / "lock").touch()
        os.utime(folder / name / "lock", (0, 0))  # they lie there for long
    with (folder / "living" / "lock").open():
        home = {"HOME": str(tmp_path), "TORCH_EXTENSIONS_DIR": str(ops)}
        done = run_script(ZERO1, *TINY, *STEPS, "--output_dir", tmp_path / "run", **home)
    assert done.returncode == 0 and not (folder / "killed" / "lock").exists() and (folder / "living" / "lock").exists()


@pytest.mark.drill
def test_a_reader_that_leaves_ends_the_run_in_one_message(tmp_path):
    line = command(BASE, *TINY, "--max_steps", "5000", "--output_dir", tmp_path / "run")
    shell = ["bash", "-c", 'set -o pipefail; "$@" | head -n 3', "bash", *line]
    result = subprocess.run(shell, env=environment(), capture_output=True, text=True, timeout=240)
    assert result.returncode == 1 and "Broken pipe" in result.stderr and "Traceback" not in result.stderr
