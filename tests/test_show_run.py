"""scripts/show_run.py: what it says of runs that train, are finished, were cut off, or lack half their fields."""

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import ROOT, load_script, run

SHOW = load_script("show_run.py")
ARGS = {"max_steps": 100, "zero_stage": 2, "precision": "bf16", "batch_size": 4, "gradient_accumulation_steps": 2,
        "block_size": 32}  # fmt: skip
LEDGER = {"parameters on cpu": {"held": 335360, "formula": 335361}}
LINES = [
    {"step": 10, "loss": 8.0, "lr": 1e-4, "tokens_per_second": 500.0, "peak_memory_gib": 1.25},
    {"step": 10, "validation_loss": 6.5},
    {"step": 20, "loss": 7.0, "lr": 1e-4, "tokens_per_second": 1024.0, "peak_memory_gib": 1.5},
    {"step": 20, "validation_loss": 6.75},
]
HOLDER = """
import fcntl, os, sys, time
fcntl.lockf(os.open(sys.argv[1], os.O_CREAT | os.O_RDWR), fcntl.LOCK_EX | fcntl.LOCK_NB)
print("locked", flush=True)
time.sleep(120)
"""


def write_run(folder: Path, *, tail: str = "", checkpoints: dict | None = None, **files: object) -> Path:
    folder.mkdir(parents=True)
    lines = files.pop("lines", LINES)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + tail, encoding="utf-8")
    for name, value in files.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    for step, facts in (checkpoints or {}).items():
        place = folder / "checkpoints" / f"step{step}"
        place.mkdir(parents=True)
        (place / "run.json").write_text(json.dumps(facts), encoding="utf-8")
        (place.parent / "latest").write_text(place.name, encoding="utf-8")
    return folder


def shown(folder: Path) -> dict[str, str]:
    return SHOW.rows(SHOW.read_run(folder), SHOW.BARS)


@pytest.fixture
def training(tmp_path: Path) -> Iterator[Path]:
    """A run whose lock is held by a process that a launcher told of two ranks."""
    facts = {"step": 10, "validation_loss": 6.5, "ledger": LEDGER}
    newest = {"step": 20, "validation_loss": 6.75, "ledger": LEDGER}
    folder = write_run(tmp_path / "run", args=ARGS, tail='{"step": 30, "lo', checkpoints={10: facts, 20: newest})
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, folder / ".lock"], stdout=subprocess.PIPE,
                              env=os.environ | {"WORLD_SIZE": "2"})  # fmt: skip
    holder.stdout.readline()
    yield folder
    holder.kill()
    holder.wait()
    holder.stdout.close()


def test_a_run_that_trains(training):
    rows = shown(training)
    state, process = rows.pop("state").split(", process ")
    assert (state, int(process) > 0) == ("training", True)
    assert rows == {
        "setting": "ZeRO stage 2, precision bf16, world size 2",
        "step": "20 of 100, 20%",
        "loss": "7.0000  █▁",
        "validation loss": "6.7500 last, 6.5000 best at step 10",
        "tokens/s": "1,024",
        "time left": "0:00:40",  # 80 steps of 4 x 2 x 32 x 2 ranks = 512 tokens
        "peak memory": "1.50 GiB",
        "parameters on cpu": "335,360 bytes, 335,361 by the formula",
        "checkpoints": "step 10 (best), step 20 (latest)",
    }


def test_asking_does_not_take_the_lock(tmp_path):
    folder = write_run(tmp_path / "run", args=ARGS)
    (folder / ".lock").touch()
    assert SHOW.lock_holder(folder / ".lock") is None  # free, and still so:
    holder = subprocess.run([sys.executable, "-c", HOLDER.replace("120", "0"), folder / ".lock"], capture_output=True)
    assert holder.stdout == b"locked\n"
    assert shown(folder)["state"] == "stopped"


def test_a_finished_run_and_one_that_was_given_more_steps(tmp_path):
    summary = {"steps": 100, "parameters": 167680, "tokens_per_second": 2000.4, "ledger": LEDGER}
    rows = shown(write_run(tmp_path / "run", args=ARGS, summary=summary))
    assert (rows["state"], rows["parameters"], rows["tokens/s"]) == ("finished", "167,680", "2,000")
    assert rows["parameters on cpu"] == "335,360 bytes, 335,361 by the formula" and "time left" not in rows
    longer = write_run(tmp_path / "longer", args=ARGS | {"max_steps": 200}, summary=summary)
    assert shown(longer)["state"] == "stopped"


CASES = {
    "no metrics yet": (
        {"args": ARGS, "lines": []},
        {"step": "0 of 100, 0%", "loss": "none yet", "checkpoints": "none"},
    ),
    "no args.json": ({}, {"step": "20", "loss": "7.0000  █▁"}),
    "no step": ({"lines": [{"loss": 3.0}]}, {"step": "0", "loss": "3.0000  ▁"}),
    "no numbers": (
        {"args": {"max_steps": "many"}, "lines": [{"step": 5, "loss": None, "peak_memory_gib": "1"}, {"step": True}]},
        {"step": "5", "loss": "none yet"},
    ),
    "losses that are no numbers": (
        {"lines": [{"step": 1, "loss": 4.0}, {"step": 2, "loss": float("nan")}, {"step": 3, "loss": float("inf")}]},
        {"step": "3", "loss": "4.0000  ▁"},
    ),
    "only half a line": ({"args": ARGS, "lines": [], "tail": '{"step'}, {"step": "0 of 100, 0%", "loss": "none yet"}),
    "a ledger that is none": ({"summary": {"ledger": {"a": 1, "b": {"held": 2}}}}, {"state": "finished"}),
    "a checkpoint without metrics": (
        {"args": ARGS, "lines": [], "checkpoints": {30: {"step": 30}}},
        {"step": "30 of 100, 30%", "checkpoints": "step 30 (latest)"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_missing_and_odd_fields(tmp_path, case):
    files, expected = CASES[case]
    rows = shown(write_run(tmp_path / "run", **files))
    assert {field: rows.get(field) for field in expected} == expected
    assert rows["state"] in ("stopped", "finished")


def test_a_checkpoint_that_is_half_written_does_not_count(tmp_path):
    folder = write_run(tmp_path / "run", args=ARGS, checkpoints={10: {"step": 10}})
    (folder / "checkpoints" / "step20").mkdir()  # without a manifest
    assert shown(folder)["checkpoints"] == "step 10 (latest)"


def test_sparkline():
    assert SHOW.sparkline([]) == ""
    assert SHOW.sparkline([2.0, 2.0]) == "▁▁"
    assert SHOW.sparkline([0.0, 7.0, 3.5]) == "▁█▅"
    many = SHOW.sparkline([float(value) for value in range(4000)])
    assert len(many) == SHOW.WIDTH and list(many) == sorted(many) and {*many} == {*SHOW.BARS}


def tool(*words: object, **environment: str) -> subprocess.CompletedProcess:
    return run([sys.executable, str(ROOT / "scripts" / "show_run.py"), *map(str, words)], timeout=60, **environment)


def test_plain_text_off_a_terminal(tmp_path):
    name = "a\x1b[31m[red]run"  # neither escapes nor rich's markup come through
    folders = [write_run(tmp_path / place, args=ARGS | {"precision": "[b]x"}) for place in (name, "second")]
    done = tool(*folders)
    assert (done.returncode, done.stderr) == (0, "")
    first, second = done.stdout.strip().split("\n\n")
    assert first.splitlines()[0] == str(tmp_path / "a?[31m[red]run")
    assert first.splitlines()[1:3] == ["state            stopped", "setting          ZeRO stage 2, precision [b]x"]
    assert second.splitlines()[1:] == first.splitlines()[1:] and "\x1b" not in done.stdout


def test_an_ascii_terminal(tmp_path):
    done = tool(write_run(tmp_path / "ä", args=ARGS), PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and "loss             7.0000  #_" in done.stdout.splitlines()


BROKEN = {
    "no folder": (None, "is no folder: give the --output_dir of a training run"),
    "empty folder": ({}, "holds no run, or one that has not begun: no args.json and no metrics"),
    "a line that is no JSON": ({"metrics.jsonl": b"{}\n{,}\n"}, "metrics.jsonl, line 2 is no JSON object: {,}"),
    "a line that is no object": ({"metrics.jsonl": b"3\n"}, "metrics.jsonl, line 1 is no JSON object: 3"),
    "not UTF-8": ({"metrics.jsonl": b"\xff\n"}, "metrics.jsonl is not UTF-8"),
    "args.json no JSON": ({"args.json": b"{"}, "args.json is not JSON"),
    "summary.json a list": ({"summary.json": b"[]"}, "summary.json is no JSON object"),
    "deep": ({"metrics.jsonl": b"[" * 100_000 + b"\n"}, "metrics.jsonl, line 1 is no JSON object: [[["),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_folder_without_a_readable_run(tmp_path, monkeypatch, capsys, case):
    files, message = BROKEN[case]
    if files is not None:
        (tmp_path / "run").mkdir()
    for name, content in (files or {}).items():
        (tmp_path / "run" / name).write_bytes(content)
    monkeypatch.setattr(sys, "argv", ["show_run.py", str(tmp_path / "run")])
    with pytest.raises(SystemExit) as stop:
        SHOW.main()
    assert str(stop.value.code).startswith(f"show_run.py: error: {tmp_path / 'run'}") and message in stop.value.code
    assert capsys.readouterr().out == ""


def test_wrong_usage():
    for words in ([], ["--fol", "x"], ["x", "--refresh"]):
        done = tool(*words)
        assert done.returncode == 2 and done.stderr.startswith("usage: show_run.py"), words


def on_a_terminal(*words: object) -> tuple[subprocess.Popen, int]:
    """The tool on a terminal of 100 columns, and the side of it that a user looks at."""
    ours, theirs = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    command = [sys.executable, ROOT / "scripts" / "show_run.py", *words]
    process = subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    return process, ours


def read_until(terminal: int, word: str, seconds: float = 30) -> str:
    """What the terminal shows up to a word, or all of it when the tool has ended."""
    text, end = b"", time.monotonic() + seconds
    while word.encode() not in text and time.monotonic() < end:
        try:
            text += os.read(terminal, 65536)
        except OSError:  # Linux's end of file on a terminal
            break
    return text.decode()


def test_follow_shows_new_steps_until_the_summary_is_there(training):
    process, terminal = on_a_terminal(training, "--follow")
    first = read_until(terminal, "╰")
    assert "training" in first and "20 of 100, 20%" in first and "0:00:40" in first
    with (training / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('ss": 6.0}\n')  # the end of the half-written line
    assert "30 of 100, 30%" in read_until(terminal, "30 of 100, 30%")
    (training / "summary.json").write_text('{"steps": 100}', encoding="utf-8")
    assert "finished" in read_until(terminal, "finished")
    read_until(terminal, "never")
    assert process.wait(timeout=10) == 0
    os.close(terminal)


def test_ctrl_c_ends_quietly(training):
    process, terminal = on_a_terminal(training, "--follow")
    read_until(terminal, "╰")
    process.send_signal(signal.SIGINT)
    rest = read_until(terminal, "never")
    assert process.wait(timeout=10) == 130
    assert "Traceback" not in rest and "\x1b[?25h" in rest  # the cursor is back
    os.close(terminal)


@pytest.mark.slow
def test_a_real_run(train, tmp_path):
    folder = shutil.copytree(
        train("zero2", precision="bf16", dropout=0, ranks=2, batch_size=4).folder, tmp_path / "run"
    )
    summary = json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    rows = shown(folder)
    assert rows["state"] == "finished" and rows["step"] == "20 of 20, 100%" and rows["parameters"] == "167,680"
    assert rows["setting"] == "ZeRO stage 2, precision bf16"
    held = summary["ledger"]["optimizer_states on cpu"]
    assert rows["optimizer states on cpu"] == f"{held['held']:,} bytes, {held['formula']:,} by the formula"
    loss = summary["validation_loss"]
    assert rows["validation loss"] == f"{loss:.4f} last, {loss:.4f} best at step 20"
    assert rows["checkpoints"] == "step 20 (latest)" and len(rows["loss"].split()[1]) == 20
