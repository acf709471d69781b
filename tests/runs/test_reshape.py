"""A run goes on with other ranks, or at another stage, as if nothing had happened."""

import shlex
import shutil

import pytest
from conftest import ZERO2, ZERO3, losses, run_line, run_script, train

pytestmark = pytest.mark.drill
# Losses that a wrong momentum, variance or schedule would move by far more than 1e-5.
FLAGS = "--dropout 0 --lr 1e-2 --warmup_steps 1 --max_steps 8 --save_interval 5".split()
TOOL = "scripts/tools/reshape_checkpoint.py"


@pytest.mark.parametrize(
    ("script", "ranks", "words"),
    [
        (ZERO2, 2, ("--world_size", "1")),
        (ZERO3, 1, ("--world_size", "2")),
        (ZERO2, 2, ("--world_size", "1", "--stage", "3")),
    ],
)
def test_the_next_losses_are_those_of_the_old_run(script, ranks, words, tmp_path):
    old, new = tmp_path / "old", tmp_path / "new"
    train(script, old, *FLAGS, "--batch_size", "4", ranks=ranks)
    shutil.rmtree(old / "checkpoints" / "step8")
    result = run_script(TOOL, old, *words, "--output", new)
    assert result.returncode == 0, result.stderr
    assert "are equal bit for bit. Continue with" in result.stdout
    again = run_line(shlex.split(result.stdout.splitlines()[-1]))
    assert again.returncode == 0 and "resumed from step 5" in again.stdout, again.stderr
    pairs = [(losses(old)[step], losses(new)[step]) for step in (6, 7, 8)]
    assert max(abs(a - b) for a, b in pairs) < 1e-5


def test_what_cannot_be_reshaped_is_refused(tmp_path):
    train(ZERO2, tmp_path / "run", *FLAGS, "--batch_size", "4", ranks=1)
    (tmp_path / "there").mkdir()
    for words, message in (
        (("--world_size", "3"), "4 sequences a step do not divide among 3 ranks: take one of [1, 2, 4]"),
        (("--world_size", "1"), "has stage 2 and 1 ranks already"),
        (("--world_size", "2", "--step", "7"), "has no checkpoint of a ZeRO script of step 7; there are: [5, 8]"),
        (("--world_size", "2", "--output", str(tmp_path / "there")), "exists: choose another --output"),
    ):
        result = run_script(TOOL, tmp_path / "run", *words)
        assert result.returncode == 1 and message in result.stderr, result.stderr
