"""What goes wrong around a run: a full disk, a read-only one, a damaged cache, two runs at once, a clock set back, a
rank that stalls, numbers that explode. Each ends in a message or does no harm; what was saved before stays good. Kills
are in drills/test_fault_drill.py; a token cache that is damaged between two runs is in test_data.py."""

import json
import os
import re
import signal
import socket
import subprocess
import time
from pathlib import Path

import psutil
import pytest
import torch
from conftest import BASE, ROOT, TINY, ZERO, command, load_script, run
from test_checkpoint import SHORT, TWO_RANKS, assert_same, last_step, manifest, start, steps, unfinished, wait_for
from test_checkpoint import base as base  # the fixture

KEPT = "The checkpoints before it are as they were: free some space, and the same command continues from there"


class Disk:
    """A tmpfs: a disk that can be small, full and read-only."""

    def __init__(self, path: Path):
        self.path = path

    def mount(self, options: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.path], capture_output=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted here: {done.stderr.decode().strip()}")

    def fill(self) -> None:
        """By another program, to the last byte."""
        with (self.path / "filler").open("wb", buffering=0) as file:
            while True:
                try:
                    file.write(bytes(4096))
                except OSError:
                    return

    def grow(self) -> None:
        (self.path / "filler").unlink(missing_ok=True)
        self.mount("remount,size=40m")


@pytest.fixture
def disk(tmp_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to mount a tmpfs")
    (tmp_path / "disk").mkdir()
    yield Disk(tmp_path / "disk")
    subprocess.run(["umount", "-l", tmp_path / "disk"], capture_output=True)  # the lock in it is still open


def assert_continues(base, folder: Path, whole: Path, step: int, **flags: object) -> None:
    """With space again, the same command goes on from that step and ends as an undisturbed run."""
    code, printed = base(folder, **flags)
    assert code == 0 and f"resumed from {folder}/checkpoints/step{step} at step {step}" in printed
    assert base(whole, **flags)[0] == 0
    assert_same(folder, whole)


def test_a_disk_too_small_for_the_next_step(base, disk, tmp_path):
    disk.mount("size=6m")  # two checkpoints of 2 MB and no third
    code, _ = base(disk.path / "run", save_interval=2)
    assert f"cannot save {disk.path}/run/checkpoints/step6: it needs about 2,682,880 bytes and " in code
    assert KEPT in code
    assert manifest(disk.path / "run", 4)["step"] == 4
    assert (disk.path / "run" / "checkpoints" / "latest").read_text() == "step4"
    disk.grow()
    assert_continues(base, disk.path / "run", tmp_path / "whole", 4, save_interval=2)


def test_a_disk_that_fills_up_while_a_step_is_written(base, disk, tmp_path, monkeypatch):
    module, save = load_script(BASE), load_script(BASE).PlainRun.save
    disk.mount("size=8m")

    def fill_and_save(run, folder: Path) -> None:
        if run.step == 4:
            disk.fill()
        save(run, folder)

    with monkeypatch.context() as patch:
        patch.setattr(module.PlainRun, "save", fill_and_save)
        code, _ = base(disk.path / "run", save_interval=2)
    assert f"cannot save {disk.path}/run/checkpoints/step4: " in code and KEPT in code
    assert steps(disk.path / "run") == ["step2", "step4"] and manifest(disk.path / "run", 2)["step"] == 2
    disk.grow()
    assert_continues(base, disk.path / "run", tmp_path / "whole", 2, save_interval=2)


def test_a_disk_that_is_full_when_a_manifest_is_due(base, disk, tmp_path, monkeypatch):
    module, seal = load_script(BASE), load_script(BASE).seal
    disk.mount("size=8m")

    def fill_and_seal(folder: Path, facts: dict, run, *rest) -> None:
        if facts["step"] == 4:
            disk.fill()
        seal(folder, facts, run, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(module, "seal", fill_and_seal)
        code, _ = base(disk.path / "run", save_interval=2)
    assert f"cannot save {disk.path}/run/checkpoints/step4: " in code and "No space left on device" in code
    assert KEPT in code
    disk.grow()
    assert_continues(base, disk.path / "run", tmp_path / "whole", 2, save_interval=2)


def test_a_disk_that_is_full_when_a_line_is_logged(base, disk, tmp_path, monkeypatch):
    module, learning_rate = load_script(BASE), load_script(BASE).PlainRun.learning_rate
    disk.mount("size=8m")

    def fill_on_the_way(run) -> float:
        if run.step == 55:
            disk.fill()
        return learning_rate(run)

    with monkeypatch.context() as patch:
        patch.setattr(module.PlainRun, "learning_rate", fill_on_the_way)
        code, _ = base(disk.path / "run", save_interval=50, max_steps=120)
    assert f"cannot write {disk.path}/run/metrics.jsonl: " in code and "No space left on device" in code
    assert KEPT in code
    disk.grow()
    assert_continues(base, disk.path / "run", tmp_path / "whole", 50, save_interval=50, max_steps=120)


def test_a_disk_too_small_for_the_final_weights(base, disk, tmp_path, monkeypatch):
    module, evaluate = load_script(BASE), load_script(BASE).evaluate
    disk.mount("size=8m")

    def evaluate_and_fill(*args, **more) -> dict:
        found = evaluate(*args, **more)
        disk.fill()
        return found

    with monkeypatch.context() as patch:
        patch.setattr(module, "evaluate", evaluate_and_fill)
        code, _ = base(disk.path / "run")
    assert "No space left on device" in code and f"{disk.path}/run/model" in code
    assert not (disk.path / "run" / "summary.json").exists()
    disk.grow()
    assert_continues(base, disk.path / "run", tmp_path / "whole", 8)


@pytest.mark.slow
def test_two_ranks_on_a_full_disk(train, disk):
    """One message, no hang; the step before is whole, and with space again the same command goes on from it."""
    whole = train("zero2", precision="fp32", **TWO_RANKS)
    size = sum(manifest(whole.folder, 10)["files"].values())
    disk.mount(f"size={int(1.6 * size) >> 10}k")
    flags = TINY | TWO_RANKS | {"max_steps": 20, "log_interval": 1, "precision": "fp32"}
    words = command(ZERO["zero2"], output_dir=disk.path / "run", **flags)
    done = run(words)
    printed = done.stdout + done.stderr
    assert done.returncode == 1 and f'File "{ROOT / ZERO["zero2"]}"' not in printed, printed
    assert printed.count(f"cannot save {disk.path}/run/checkpoints/step20: it needs about ") == 1 and KEPT in printed
    assert manifest(disk.path / "run", 10)["step"] == 10
    disk.grow()
    done = run(words)
    assert done.returncode == 0 and "checkpoints/step10 at step 10" in done.stdout, done.stderr
    assert_same(disk.path / "run", whole.folder)


def test_a_read_only_folder(base, disk):
    disk.mount("size=20m")
    assert base(disk.path / "run", stop=3)[0] == 143
    subprocess.run(["umount", "-l", disk.path], check=True)  # the lock of the run in this process is still open there
    disk.mount("size=20m,ro")
    code, _ = base(disk.path / "run")
    assert code.startswith(f"{BASE}: error: cannot write to --output_dir {disk.path}/run: ")
    assert "Read-only file system" in code


@pytest.mark.slow
def test_a_token_cache_that_is_damaged_while_a_run_reads_it(tmp_path):
    """The run goes on as if nothing had happened: it keeps what it has checked."""
    flags = SHORT | {"max_steps": 600, "save_interval": 0, "eval_interval": 0}
    cache = {"GPTLIKE_CACHE": str(tmp_path / "cache"), "OMP_NUM_THREADS": "1"}
    words = command(BASE, launcher="python", output_dir=tmp_path / "whole", **flags)
    done = run(words, **cache)
    assert done.returncode == 0, done.stderr
    words = command(BASE, launcher="python", output_dir=tmp_path / "run", **flags)
    with start(words, tmp_path / "screen", **cache) as process:
        wait_for(lambda: last_step(tmp_path / "run") >= 50, process)
        (file,) = (tmp_path / "cache").iterdir()
        with file.open("r+b") as damaged:
            damaged.seek(file.stat().st_size // 4)
            damaged.write(bytes(file.stat().st_size // 4))
            damaged.truncate(file.stat().st_size // 2)
        assert process.wait(60) == 0, (tmp_path / "screen").read_text()
    assert last_step(tmp_path / "run") == 600
    assert_same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
def test_two_runs_into_one_folder(base, tmp_path):
    """The second refuses and touches nothing; when the first is killed, its lock goes with it."""
    folder, flags = tmp_path / "run", {"save_interval": 20, "eval_interval": 0}
    words = command(BASE, launcher="python", output_dir=folder, **SHORT | flags | {"max_steps": 20_000})
    with start(words, tmp_path / "screen", OMP_NUM_THREADS="1") as process:
        wait_for(lambda: last_step(folder) >= 30, process)
        for more in ({}, {"overwrite": True}, {"resume": "never"}):
            code, _ = base(folder, **flags | more)
            assert f"another run is writing to {folder}: wait for it, or choose another --output_dir" in code
        goal = last_step(folder) + 20
        wait_for(lambda: last_step(folder) >= goal, process)
        process.send_signal(signal.SIGSTOP)  # else it might save, and delete an older step, while we look
        newest = (folder / "checkpoints" / "latest").read_text()
        assert manifest(folder, int(newest.removeprefix("step")))["step"] > goal - 40
        assert json.loads((folder / "args.json").read_text())["max_steps"] == 20_000
        process.kill()
    assert process.returncode == -signal.SIGKILL
    reached = last_step(folder)
    code, printed = base(folder, **flags | {"max_steps": reached + 2})
    assert code == 0 and "resumed from " in printed


CLOCK = """import time
real, began = time.time, time.monotonic()
time.time = lambda: real() - (3600 if time.monotonic() - began > 4.5 else 0)
"""


@pytest.mark.slow
def test_a_clock_that_is_set_back(train, tmp_path):
    """By an hour in mid-run, when the checkpoint to go on from carries tomorrow's time."""
    whole = train("zero2", precision="fp32", **TWO_RANKS)
    folder = unfinished(whole.folder, tmp_path / "run")
    (folder / "checkpoints" / "step20" / "run.json").unlink()
    for path in folder.rglob("*"):
        os.utime(path, (time.time() + 86400,) * 2)
    (tmp_path / "sitecustomize.py").write_text(CLOCK)
    flags = TINY | TWO_RANKS | {"max_steps": 20, "log_interval": 1, "precision": "fp32", "output_dir": folder}
    done = run(command(ZERO["zero2"], **flags), PYTHONPATH=str(tmp_path))
    assert done.returncode == 0 and "checkpoints/step10 at step 10" in done.stdout, done.stderr
    assert_same(folder, whole.folder)
    assert 0 < json.loads((folder / "summary.json").read_text())["seconds"] < 120


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "stopped", "message"),
    [
        ("torchrun", 1, r"step \d+ takes more than 5 s: rank 1 on host \S+ answers no more\. The same"),
        pytest.param(  # there rank 0 serves what they share
            "deepspeed", 0, r"rank 0, or the host at MASTER_ADDR, answers no more", marks=pytest.mark.drill
        ),
    ],
)
def test_a_rank_that_stalls_is_named(tmp_path, launcher, stopped, message):
    """SIGSTOP, as when a disk or a debugger holds it: after --stall_timeout the others say who it is and end."""
    flags = TINY | {"max_steps": 20_000, "log_interval": 1, "batch_size": 1, "stall_timeout": 5, "save_interval": 0}
    words = command(ZERO["zero2"], ranks=2, launcher=launcher, output_dir=tmp_path / "run", eval_interval=0, **flags)
    message = rf"error: rank {1 - stopped} on host {re.escape(socket.gethostname())}: {message}"
    with start(words, screen := tmp_path / "screen") as process:
        wait_for(lambda: last_step(tmp_path / "run") >= 30, process)
        ranks = {rank: child for child in psutil.Process(process.pid).children(recursive=True)
                 if (rank := child.environ().get("RANK")) and ZERO["zero2"] in str(child.cmdline()[1:3])}  # fmt: skip
        try:
            ranks[str(stopped)].suspend()
            began = time.monotonic()
            wait_for(lambda: re.search(message, screen.read_text()), process, 20)
            assert time.monotonic() - began > 4
        finally:
            ranks[str(stopped)].resume()
        assert process.wait(60) != 0
    assert len(re.findall(message, screen.read_text())) == 1


def tensors(value) -> list[torch.Tensor]:
    """All in a nest of dicts and lists."""
    if isinstance(value, torch.Tensor):
        return [value]
    nested = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for inner in nested for tensor in tensors(inner)]


def assert_finite(folder: Path, least: int) -> None:
    """Every checkpoint on disk can be loaded and holds finite numbers only."""
    files = [path for path in folder.glob("checkpoints/step*/*") if path.suffix == ".pt"]
    assert len(files) >= least
    for path in files:
        found = [tensor for tensor in tensors(torch.load(path, weights_only=False)) if tensor.is_floating_point()]
        assert sum(tensor.numel() for tensor in found) > 10_000, path
        assert all(tensor.isfinite().all() for tensor in found), path


NOT_FINITE = r"step (\d+): the loss is \S+, the norm of the gradients \S+\. Nothing was saved since; "


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("lr", [1e9, 1e6])
def test_numbers_that_explode(base, tmp_path, precision, lr):
    flags = {"lr": lr, "save_interval": 1, "precision": precision, "max_steps": 200, "warmup_steps": 0}
    code, printed = base(tmp_path, **flags)
    found = re.search(NOT_FINITE, str(code))
    assert found and int(found[1]) == last_step(tmp_path) + 1
    assert "Try a lower --lr, more --warmup_steps, or --precision fp32" in code
    assert_finite(tmp_path, 1)
    assert not (tmp_path / "model").exists() and "nan" not in printed


@pytest.mark.slow
def test_numbers_that_explode_on_two_ranks(tmp_path):
    flags = TINY | {"lr": 1e9, "save_interval": 1, "log_interval": 10, "max_steps": 200, "output_dir": tmp_path / "run"}
    done = run(command(ZERO["zero2"], ranks=2, batch_size=4, **flags))
    printed = done.stdout + done.stderr
    assert done.returncode == 1 and len(re.findall(NOT_FINITE, printed)) == 1, printed
    assert_finite(tmp_path / "run", 2)


def test_final_weights_that_are_not_numbers(base, tmp_path, monkeypatch):
    """Should the weights go bad after the last save, no model is called saved."""
    module, save = load_script(BASE), load_script(BASE).PlainRun.save

    def save_and_spoil(run, folder: Path) -> None:
        save(run, folder)
        run.weights[0].data[0] = float("nan")

    with monkeypatch.context() as patch:
        patch.setattr(module.PlainRun, "save", save_and_spoil)
        code, printed = base(tmp_path)
    assert "has a validation loss of nan" in code and "saved " not in printed
    assert not (tmp_path / "summary.json").exists()
