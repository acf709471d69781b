"""scripts/tools/compare_runs.py: the numbers of its table, and what it says of damaged runs."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import common
import pytest

TOOL = Path(__file__).resolve().parents[2] / "scripts" / "tools" / "compare_runs.py"
ARGS = {"max_steps": 30, "zero_stage": 2, "world_size": 2, "device_name": "CPU", "precision": "bf16"}
VALIDATION = {"validation_perplexity": 500.0, "validation_bits_per_byte": 2.0}
LINES = [
    {"step": 10, "loss": 7.0, "tokens_per_second": 100.0, "peak_memory_gib": 1.5},
    {"step": 20, "loss": 6.9, "tokens_per_second": 900.0, "peak_memory_gib": 1.75},
    {"step": 20, "validation_loss": 6.25, "validation_word_perplexity": 1234.5} | VALIDATION,
    {"step": 20, "loss": 6.5, "tokens_per_second": 2000.0, "peak_memory_gib": 1.75},  # again, after a resume
    {"step": 30, "loss": 6.0, "tokens_per_second": 3000.0, "peak_memory_gib": 1.25},
    {"step": 30, "validation_loss": 6.5, "validation_word_perplexity": 2000.0} | VALIDATION,
]
LEDGER = {
    "parameters on cpu": {"held": 4000, "formula": 4000},
    "gradients_and_buckets on cpu": {"held": 9000, "formula": 2000},
}
SUMMARY = {"steps": 30, "best": {"step": 20, "validation_loss": 6.25}, "ledger": LEDGER}


def compare(*words: object) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, TOOL, *map(str, words)], capture_output=True, text=True, timeout=120)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A finished run's folder."""
    folder = tmp_path / "finished"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in LINES))
    (folder / "args.json").write_text(json.dumps(ARGS))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    (folder / "DeepSpeed-GPTLike-ZeRO-2.py").touch()
    return folder


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def test_the_table_has_the_runs_numbers(run):
    done = compare(run)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    found = dict(zip(cells(lines[0]), cells(lines[1]), strict=True))
    assert found == {
        "run": "finished",
        "script": "ZeRO-2",
        "stage": "2",
        "ranks": "2",
        "steps": "30",
        "train loss": "6.0000",
        "best validation": "6.2500",
        "at step": "20",
        "per word": "1234.5",
        "tokens/s": "2,500",  # of 2,000, the later of step 20, and 3,000
        "MFU": "-",  # a CPU's peak is not known
        "peak GiB": "1.75",
    }
    assert cells(lines[5]) == ["finished", "parameters on cpu", "4,000", "4,000", "1.000"]
    assert cells(lines[6]) == ["finished", "gradients and buckets on cpu", "9,000", "2,000", "4.500"]


@pytest.mark.parametrize(
    ("card", "precision", "share"),
    [("NVIDIA H100 80GB HBM3", "bf16", 0.1734), ("NVIDIA H", "bf16", None), ("NVIDIA H200", "fp32", None)],
)
def test_mfu_by_the_cards_exact_name(card, precision, share):
    shape = {"n_params": 124_000_000, "n_layer": 12, "d_model": 768, "block_size": 1024, "world_size": 2}
    found = common.mfu(400_000, shape | {"device_name": card, "precision": precision})
    assert found == (pytest.approx(share, abs=1e-4) if share else None)


def test_a_run_that_was_cut_off_is_shown_as_far_as_it_went(run):
    (run / "summary.json").unlink()
    (run / "metrics.jsonl").write_text(json.dumps(LINES[0]) + '\n{"step": 20, "lo')  # killed while it wrote
    lines = compare(run).stdout.splitlines()
    unfinished = ["finished", "ZeRO-2", "2", "2", "10 of 30, unfinished", "7.0000", "-", "-", "-", "100", "-", "1.50"]
    assert [cells(line) for line in lines[1:]] == [unfinished]


def test_what_the_run_before_has_left_does_not_count(run):
    """After --overwrite, the old summary.json still lies there."""
    (run / "metrics.jsonl").write_text(json.dumps(LINES[0]) + "\n")
    lines = compare(run).stdout.splitlines()
    assert cells(lines[1])[4] == "10 of 30, unfinished" and len(lines) == 2


def test_of_several_folders_those_without_a_run_are_passed_over(run, tmp_path):
    (tmp_path / "comparison").mkdir()
    done = compare(run, tmp_path / "comparison")
    assert done.returncode == 0 and done.stderr == f"{tmp_path}/comparison holds no run: passed over\n"


def test_two_runs_of_one_name_are_told_apart_and_drawn(run, tmp_path):
    (run / "metrics.jsonl").write_text((run / "metrics.jsonl").read_text() + '{"step": 40, "loss": NaN}\n')
    named = shutil.copytree(run, tmp_path / "copy" / "finished")
    done = compare(run, named, "--output", tmp_path / "new" / "folder")
    assert (done.returncode, done.stderr) == (0, "")
    assert [cells(line)[0] for line in done.stdout.splitlines()[1:3]] == [str(run), str(named)]
    assert (tmp_path / "new" / "folder" / "loss.png").read_bytes().startswith(b"\x89PNG")


DAMAGE = {  # file, its content or None for missing, a part of the message
    "no metrics": ("metrics.jsonl", None, "FOLDER holds no run: [Errno 2] No such file"),
    "a damaged line": (
        "metrics.jsonl",
        '{"step": 1}\n{"step\n{"step": 3}\n',
        "metrics.jsonl, line 2 is not what a run",
    ),
    "a line without a step": ("metrics.jsonl", '{"loss": 1}\n', "metrics.jsonl, line 1 is not what a run writes"),
    "a word for a loss": ("metrics.jsonl", '{"step": 1, "loss": "low"}\n', "step 1 has loss 'low', no number"),
    "no args": ("args.json", None, "cannot read FOLDER/args.json: [Errno 2]"),
    "half of the args": ("args.json", '{"max_st', "cannot read FOLDER/args.json: Unterminated string"),
    "a summary that is a list": ("summary.json", "[]", "FOLDER/summary.json is no JSON object"),
    "a ledger without bytes": (
        "summary.json",
        '{"steps": 30, "ledger": {"parameters on cpu": {"held": 4}}}',
        "FOLDER/summary.json: the ledger is not what a run writes: KeyError('formula')",
    ),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_a_damaged_run_is_one_message(run, case):
    file, content, message = DAMAGE[case]
    (run / file).unlink()
    if content is not None:
        (run / file).write_text(content)
    done = compare(run)
    assert done.returncode == 1
    assert done.stderr.startswith("compare_runs.py: error: ") and len(done.stderr.splitlines()) == 1
    assert message.replace("FOLDER", str(run)) in done.stderr


def test_wrong_usage_is_exit_2(run):
    assert [compare().returncode, compare(run, "--out", "x").returncode] == [2, 2]
