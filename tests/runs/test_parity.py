"""Every script trains the same model: losses step by step beside GPTLike-Base.py, on real English text."""

import os
import tempfile

import pytest
from conftest import load_script, run_line

pytestmark = pytest.mark.slow
parity = load_script("scripts/dev/parity.py")


@pytest.fixture(autouse=True)
def quick_starts(monkeypatch):
    def call(line, *, stdout, **_) -> int:
        done = run_line(line)
        stdout.write(done.stdout + done.stderr)
        return done.returncode

    if os.environ["DS_ACCELERATOR"] == "cpu":  # else parity.py hides the GPUs from the runs that it starts
        monkeypatch.setattr(parity.subprocess, "call", call)


def rows(said: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in said.splitlines()[1:-1]}


@pytest.mark.parametrize(
    ("words", "scripts"),
    [
        (["--steps", "8"], ["ZeRO-1", "ZeRO-2", "ZeRO-3"]),
        pytest.param(["--steps", "8", "--precision", "bf16"], ["ZeRO-1", "ZeRO-3"], marks=pytest.mark.drill),
        pytest.param(["--steps", "8"], ["Offload", "ZeRO-3-Offload", "Multihosts"], marks=pytest.mark.drill),
        pytest.param(
            ["--steps", "8", "--ranks", "4", "--accumulation", "4"], ["ZeRO-2", "ZeRO-3"], marks=pytest.mark.drill
        ),
    ],
    ids=["stages", "bf16", "offload and hosts", "four ranks with four micro batches"],
)
def test_losses_are_those_of_base(words, scripts, capsys):
    assert parity.main([*words, "--scripts", *scripts]) == 0
    found = rows(capsys.readouterr().out)
    assert list(found) == ["Base", *scripts]
    least = 0.02 if "bf16" in words else 1e-5
    for _, _, train_loss, validation_loss, first, last in found.values():
        assert float(train_loss) < least and float(validation_loss) < least
        assert float(last) < float(first) - 0.1  # a frozen model would agree with itself, too


@pytest.mark.drill
def test_says_so_where_losses_are_apart(capsys, tmp_path, monkeypatch):
    """fp32 sums round apart: no run is within 1e-12."""
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert parity.main(["--steps", "4", "--scripts", "ZeRO-2", "--tolerance", "1e-12"]) == 1
    assert f"from Base's, more than 1e-12: see {tmp_path}" in capsys.readouterr().out
    assert len(list(tmp_path.glob("parity-*/*.log"))) == 2
