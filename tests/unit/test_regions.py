"""Shared regions are the same, byte for byte; the check finds each way to break that, and --write mends it."""

import shutil
import subprocess
import sys

import pytest
from conftest import BASE, ROOT, ZERO3


def sync(root, *flags):
    words = [sys.executable, ROOT / "scripts" / "dev" / "sync_regions.py", "--root", root, *flags]
    return subprocess.run(words, capture_output=True, text=True)


@pytest.fixture
def copies(tmp_path):
    for path in ROOT.glob("*GPTLike*.py"):
        shutil.copy(path, tmp_path)
    return tmp_path


def test_the_scripts_agree():
    assert sync(ROOT).returncode == 0


def test_one_wrong_byte_is_found_and_mended(copies):
    path = copies / ZERO3
    path.write_text(path.read_text().replace("is_causal=True", "is_causal=False"))
    result = sync(copies)
    assert result.returncode == 1 and "-        heads = F.scaled_dot" in result.stdout
    assert sync(copies, "--write").returncode == 0
    assert path.read_text() == (ROOT / ZERO3).read_text()


@pytest.mark.parametrize(
    ("script", "old", "new"),
    [
        (BASE, "# endregion\n", ""),
        (BASE, "# region model (owner", "#region model (owner"),
        (BASE, "# region data (owner: GPTLike-Base.py)", "# region data (owner: Nobody.py)"),
        (ZERO3, "# region data (owner: GPTLike-Base.py)\n", ""),  # its code now stands in the region before
    ],
)
def test_broken_markers(copies, script, old, new):
    path = copies / script
    path.write_text(path.read_text().replace(old, new))
    assert sync(copies, "--write").returncode == 2
