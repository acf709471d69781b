"""scripts/drill.sh: ranks that are killed at random moments cost nothing but the steps since the last save. The drill
checks what it finds itself; here its table is read, and that it would find what is wrong."""

import json
import random
import re

import pytest
from conftest import ROOT, load_script, run

DRILL = ["bash", str(ROOT / "scripts" / "drill.sh")]
ROW = r"\| `(\S+)` \| (\d) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \| (\d+\.\d) s \| (yes|no: .*) \|"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--kills", "0"], "argument --kills: 0 is not a number above 0"),
        (["--kills", "many"], "argument --kills: many is not a number above 0"),
        (["--scripts", "ZeRO-4"], "argument --scripts: invalid choice: 'ZeRO-4'"),
        (["--output", "nowhere/faults.md"], "--output nowhere/faults.md: no folder nowhere"),
    ],
)
def test_wrong_usage(words, message):
    done = run([*DRILL, *words])
    assert done.returncode == 2 and message in done.stderr


@pytest.fixture
def one(tmp_path):
    """A drill that has killed once, at step 17 when step 10 was whole, and its life after that."""
    module = load_script("drill.py")
    drill = module.Drill("ZeRO-2", 1, random.Random(0), tmp_path)
    drill.kills.append(module.Kill("training", 10, 17, 1.0))
    for name in ("run", "undisturbed"):
        (tmp_path / name / "model").mkdir(parents=True)
        (tmp_path / name / "model" / "model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "tokens_per_second": 1}\n')
    drill.screen.write_text("resumed from run/checkpoints/step10 at step 10\nstep=11 loss=1.0\n")
    return drill


def test_lost_steps_are_counted_and_an_old_checkpoint_is_found(one):
    module = load_script("drill.py")
    one.came_back()
    assert one.lost == 7
    one.screen.write_text("resumed from run/checkpoints/step9 at step 9\n")
    with pytest.raises(module.Failed, match="went on from step 9 although step 10 was whole"):
        one.came_back()
    one.screen.write_text("step=1 loss=1.0\n")  # from the beginning
    with pytest.raises(module.Failed, match="went on from step 0 although step 10 was whole"):
        one.came_back()
    one.screen.write_text("still starting\n")
    one.came_back()


def test_other_weights_and_metrics_are_found(one, tmp_path):
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.5, "tokens_per_second": 2}\n')
    assert one.difference() is None
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 0.6, "tokens_per_second": 1}\n')
    assert one.difference() == "the metrics are not those of the undisturbed run"
    (tmp_path / "run" / "model" / "model.safetensors").write_bytes(b"weighty")
    assert one.difference() == "the final weights are not those of the undisturbed run"


def test_what_is_whole_and_what_is_not(one, tmp_path):
    for step, files in ((5, {"part": 3}), (10, {"part": 4}), (15, None)):
        folder = tmp_path / "run" / "checkpoints" / f"step{step}"
        folder.mkdir(parents=True)
        (folder / "part").write_text("abc")
        if files:
            (folder / "run.json").write_text(json.dumps({"step": step, "files": files}))
    assert one.whole_step() == 5
    assert [folder.name for folder in one.unsealed(0)] == ["step15"] and one.unsealed(2**40) == []


def test_a_failure_is_in_the_table_and_the_exit_code(monkeypatch, capsys, tmp_path):
    module = load_script("drill.py")

    def fail(drill) -> str:
        drill.screen.write_text("what it said last")
        raise module.Failed("12 steps were lost, with a checkpoint every 10")

    monkeypatch.setattr(module.Drill, "run", fail)
    page = tmp_path / "faults.md"
    monkeypatch.setattr("sys.argv", ["drill.py", "--kills", "2", "--scripts", "Base", "--output", str(page)])
    with pytest.raises(SystemExit) as end:
        module.main()
    printed = capsys.readouterr().out
    assert end.value.code == 1 and "what it said last" in printed
    assert "FAIL Base: after 0 kills: 12 steps were lost" in printed
    row = "| `GPTLike-Base.py` | 1 | 0 | | | | | | no: 12 steps were lost, with a checkpoint every 10 |"
    assert row in printed and row in page.read_text()
    assert f"bash scripts/drill.sh --kills 2 --scripts Base --output {page}\n" in page.read_text()


@pytest.mark.drill
@pytest.mark.timeout(400)
def test_five_kills(tmp_path):
    page = tmp_path / "faults.md"
    done = run([*DRILL, "--kills", "5", "--scripts", "ZeRO-2", "ZeRO-3", "--output", str(page)], timeout=390)
    rows = re.findall(ROW, done.stdout)
    assert done.returncode == 0 and len(rows) == 2, done.stdout + done.stderr
    for script, ranks, kills, *moments, lost, _, equal in rows:
        assert script in ("DeepSpeed-GPTLike-ZeRO-2.py", "DeepSpeed-GPTLike-ZeRO-3.py")
        assert (int(ranks), int(kills), sum(map(int, moments)), equal) == (2, 5, 5, "yes")
        assert 0 < int(lost) <= 10 and done.stdout.count("of 5: rank") == 10
    assert sum(int(row[5]) for row in rows) > 0  # while saving
    assert re.findall(ROW, page.read_text()) == rows
