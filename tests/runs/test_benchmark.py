"""scripts/dev/benchmark.py runs the scripts and their rivals, and prints what it measured."""

import tempfile

import pytest
from conftest import ROOT, load_script, run

pytestmark = pytest.mark.drill
benchmark = load_script("scripts/dev/benchmark.py")
TINY = """--vocab 300 --n_layer 1 --n_head 2 --d_model 32 --block_size 32 --batch_size 4 --rounds 1
    --precision fp32""".split()


def test_contestants_in_one_table(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = ["nanogpt", "zero3", "trainer3"]
    benchmark.main([*TINY, "--contestants", *names, "--steps", "5"])
    imports, *table = capsys.readouterr().out.split("vocabulary 300; ")[1].splitlines()
    assert imports.startswith("two at once, import deepspeed, datasets, transformers: ")
    assert [line.split()[0] for line in table] == ["contestant", *names]
    assert "x trainer3" in table[2]
    assert all(int(line.split()[3]) > 0 for line in table[1:])  # tokens per second
    assert not list(tmp_path.glob("benchmark-*"))


def test_a_contestant_that_fails_is_named_with_its_log(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    with pytest.raises(SystemExit) as end:
        benchmark.main([*TINY, "--contestants", "base", "--n_head", "3"])
    assert "base ended, or hung, before step 12: see " in str(end.value.code)
    log = next(tmp_path.glob("benchmark-*/300/base.log"))
    assert "--d_model 32 is not a multiple of --n_head 3" in log.read_text()


def test_rivals_wrong_usage():
    rival = ["python", str(ROOT / "scripts/dev/rivals.py")]
    alone = run([*rival, "ddp", "--precision", "fp32"])
    assert alone.returncode == 2 and "ddp wants ranks: torchrun" in alone.stderr
    half = run([*rival, "original", "--precision", "bf16"])
    assert half.returncode == 2 and "original does not train in bf16" in half.stderr
