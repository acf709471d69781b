"""The README's first command from its set-up to a sample of text, and the drill that kills ranks at random moments."""

import re
import shutil
import subprocess
import sys

import pytest
from conftest import BASE, ROOT, ZERO2, free_port, run

pytestmark = [pytest.mark.drill, pytest.mark.timeout(700)]


def test_quickstart_from_end_to_end(tmp_path):
    """In a copy of the project, whose .venv/bin/python is this one: else it would install and compile for minutes."""
    for folder in ("scripts", "configs"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    for file in (BASE, ZERO2, "requirements.txt"):
        shutil.copy(ROOT / file, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    python.chmod(0o755)
    stamp = subprocess.run(["cksum", "requirements.txt", "requirements.txt"], cwd=tmp_path, capture_output=True).stdout
    (tmp_path / ".venv" / "installed-requirements.txt").write_bytes(stamp)
    flags = ["--dataset", "sample", "--tokenizer", "bpe:512", "--max_steps", "3"]
    done = run(["bash", "scripts/quickstart.sh", *flags], cwd=tmp_path, timeout=600, MASTER_PORT=str(free_port()))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert re.search(r"logits differ by \S+ at most; its validation loss is (\d\.\d{3})\d+, the run's \1", done.stdout)
    assert "\nIf the" in done.stdout  # a sample of text
    assert re.search(r"== done in \d+ s: runs/quickstart/loss.png, runs/quickstart/model", done.stdout)
    made = tmp_path / "runs" / "quickstart"
    for name in ("loss.png", "gpt2/model.safetensors", "model/model.safetensors"):
        assert (made / name).stat().st_size > 1000


def test_a_killed_run_ends_as_the_undisturbed_one():
    words = "scripts/dev/drill.py --kills 1 --scripts Base --steps 40 --seed 1".split()
    done = run([sys.executable, *words], timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    heads, row = done.stdout.splitlines()[1:]
    assert heads.startswith("script  kills  starting") and row.split()[:2] == ["Base", "1"] and row.endswith("equal")
