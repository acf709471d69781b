"""Killed or stopped and started again, a run ends as if nothing had been; what cannot go on is refused."""

import contextlib
import math
import os
import re
import resource
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import (
    BASE,
    OFFLOAD,
    TINY,
    ZERO1,
    ZERO2,
    ZERO3,
    command,
    environment,
    losses,
    read_json,
    run_script,
    train,
    weights,
)

pytestmark = pytest.mark.slow
drill = pytest.mark.drill
FLAGS = ["--max_steps", "60", "--save_interval", "15", "--eval_interval", "25"]


def start(script, output, *words, ranks=2):
    """In the background, as a user starts it; with the threads of a rank, so that Base's sums are those of train()."""
    line = command(script, *TINY, *FLAGS, "--output_dir", output, *words, ranks=ranks)
    pipe, variables = subprocess.PIPE, environment(OMP_NUM_THREADS="1")
    return subprocess.Popen(line, env=variables, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come"
        time.sleep(0.01)


def has_checkpoint(output):
    return any(output.glob("checkpoints/step*/rank1.json")) or (output / "checkpoints" / "state.pt").exists()


def rank_pids(output):
    """Processes that train into this folder, by what /proc says; launchers left out."""
    found = []
    for entry in os.listdir("/proc"):
        if entry.isdecimal():
            try:
                words = Path(f"/proc/{entry}/cmdline").read_bytes().decode().split("\0")
            except OSError:
                continue
            if str(output) in words and "torch.distributed.run" not in words and "torchrun" not in words[1]:
                found.append(int(entry))
    return sorted(found)


def end(launcher, output):
    """Kill a launcher and its ranks, which torchrun starts in sessions of their own."""
    for pid in [launcher.pid, *rank_pids(output)]:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    launcher.communicate()


@pytest.mark.parametrize("script", [ZERO2, *(pytest.param(script, marks=drill) for script in (ZERO3, OFFLOAD))])
def test_killed_and_started_again(script, tmp_path):
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    train(script, calm, *FLAGS, ranks=2)
    process = start(script, killed)
    wait_until(lambda: has_checkpoint(killed))
    os.kill(rank_pids(killed)[-1], signal.SIGKILL)
    process.communicate(timeout=60)
    assert process.returncode != 0
    said = train(script, killed, *FLAGS, ranks=2)
    assert "resumed from step " in said
    if script == OFFLOAD:  # DeepSpeedCPUAdam takes its powers of beta anew
        pairs = zip(losses(calm).values(), losses(killed).values(), strict=True)
        assert max(abs(a - b) for a, b in pairs) < 1e-6
    else:
        assert losses(killed) == losses(calm) and losses(killed, "validation_loss") == losses(calm, "validation_loss")
        assert weights(killed) == weights(calm)


@drill
@pytest.mark.parametrize(("script", "number"), [(BASE, signal.SIGINT), (ZERO1, signal.SIGTERM)])
def test_stopped_by_a_signal(script, number, tmp_path):
    calm, stopped, ranks = tmp_path / "calm", tmp_path / "stopped", 1 if script == BASE else 2
    train(script, calm, *FLAGS, ranks=ranks)
    process = start(script, stopped, "--save_interval", "0")
    wait_until(lambda: (stopped / "metrics.jsonl").exists())
    for pid in rank_pids(stopped)[-1:]:  # of two ranks one alone; the other hears of it
        os.kill(pid, number)
    out, err = process.communicate(timeout=60)
    assert "stopped by a signal: step " in out, out + err
    if script == BASE:
        assert process.returncode == 128 + number
    else:
        assert f"exitcode  : {128 + number}" in err
    assert "resumed from step " in train(script, stopped, *FLAGS, ranks=ranks)
    assert weights(stopped) == weights(calm) and losses(stopped) == losses(calm)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of two ranks that other tests copy and spoil."""
    output = tmp_path_factory.mktemp("finished") / "run"
    train(ZERO2, output, *FLAGS, ranks=2)
    (output / "summary.json").unlink()  # as if killed after the last checkpoint
    return output


SPOILT = [  # what is done to a run of steps 45 and 60, flags, exit code, what is said
    ("rm step60/rank1.json", "", 0, "resumed from step 60"),  # one mark proves that all shards were written
    ("rm step60/rank0.json step60/rank1.json", "", 0, "resumed from step 45"),
    ("rm step60/*rank_1_mp_rank_00_optim*", "", 0, "resumed from step 45"),
    ("rm step*/*rank_1_mp_rank_00_optim*", "", 1, "no step in .* is whole on every rank. By rank: .*step45"),
    ("truncate -s 1000 step60/zero_pp_rank_0*", "", 1, "cannot load .*step60.*Without it the one before serves"),
    ("", "--seed 7", 1, "--output_dir holds a run with seed 42, now 7. Take the former, or add --overwrite"),
    ("", "--n_layer 1", 1, "n_layer 2, now 1"),
    ("", "--tokenizer bpe:400", 1, "data [0-9a-f]{64}, now "),
    ("", "--resume never", 1, "holds a run: add --overwrite"),
    ("", "--max_steps 62", 0, "resumed from step 60"),
]


QUICK = SPOILT[1:2]


@pytest.mark.parametrize(
    ("damage", "flags", "code", "message"), [row if row in QUICK else pytest.param(*row, marks=drill) for row in SPOILT]
)
def test_what_is_found_is_used_or_refused(damage, flags, code, message, finished, tmp_path):
    output = tmp_path / "run"
    shutil.copytree(finished, output)
    if damage:
        subprocess.run(["bash", "-c", damage], cwd=output / "checkpoints", check=True)
    result = run_script(ZERO2, *TINY, *FLAGS, "--output_dir", output, *flags.split(), ranks=2)
    said = result.stdout + result.stderr
    assert (result.returncode, re.search(message, said) is not None) == (code, True), said
    assert "UserError" not in said  # the message alone; torchrun adds a traceback of its own


@drill
def test_overwrite_begins_afresh(tmp_path):
    for number in (3, 2):
        train(BASE, tmp_path / "run", "--overwrite", "--max_steps", number)
        assert list(losses(tmp_path / "run")) == [*range(1, number + 1)]


@drill
def test_another_number_of_ranks_is_refused(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "run")
    result = run_script(ZERO2, *TINY, *FLAGS, "--output_dir", tmp_path / "run")
    assert result.returncode == 1 and "world_size 2, now 1" in result.stderr


@drill
def test_two_runs_into_one_folder(tmp_path):
    first = start(ZERO1, tmp_path / "run", "--max_steps", "100000", ranks=1)
    wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    second = run_script(ZERO1, *TINY, "--output_dir", tmp_path / "run")
    end(first, tmp_path / "run")
    assert second.returncode == 1 and "Wait for the run that holds it" in second.stderr


def test_full_disk(tmp_path):
    """A limit on the size of files stands in: one message says so, and the checkpoint before it serves."""
    words = ["--save_interval", "4", "--eval_interval", "0", "--output_dir", tmp_path / "run"]
    assert run_script(ZERO2, *TINY, *words, "--max_steps", "2").returncode == 0
    line = command(ZERO2, *TINY, *words, "--max_steps", "6", launcher="python")

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))

    result = subprocess.run(line, env=environment(), capture_output=True, text=True, preexec_fn=limit, timeout=120)
    assert result.returncode == 1, result.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    assert f"error: cannot save {checkpoints}/step4: " in result.stderr and "Traceback" not in result.stderr
    assert "The checkpoints before it are as they were" in result.stderr
    again = run_script(ZERO2, *TINY, *words, "--max_steps", "6")
    assert again.returncode == 0 and "resumed from step 2" in again.stdout, again.stderr


def test_nan_stops_before_anything_is_saved(tmp_path):
    words = ["--lr", "900", "--warmup_steps", "0", "--max_steps", "40", "--save_interval", "1", "--weight_decay", "900"]
    result = run_script(ZERO2, *TINY, *words, "--output_dir", tmp_path / "run")
    assert result.returncode == 1 and "take a lower --lr" in result.stderr and "Traceback" not in result.stderr
    finite = losses(tmp_path / "run")
    saved = [read_json(mark)["step"] for mark in (tmp_path / "run").glob("checkpoints/step*/rank0.json")]
    assert 0 < max(saved) == max(finite) < 40 and all(map(math.isfinite, finite.values()))


@drill
def test_a_stuck_rank_ends_the_others(tmp_path):
    """--timeout holds for the groups that DeepSpeed makes, too."""
    process = start(ZERO2, tmp_path / "run", "--max_steps", "100000", "--timeout", "10", "--save_interval", "0")
    wait_until(lambda: (tmp_path / "run" / "metrics.jsonl").exists())
    pids = rank_pids(tmp_path / "run")
    os.kill(pids[-1], signal.SIGSTOP)
    try:
        wait_until(lambda: rank_pids(tmp_path / "run") == pids[-1:], 60)
    finally:
        end(process, tmp_path / "run")
