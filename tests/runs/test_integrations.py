"""examples/: the GPT under transformers' Trainer, Accelerate and Lightning, beside our own script on the same JSON.

And TensorBoard's files of a run, which are the live view of it.
"""

import json
import re
from pathlib import Path

import pytest
from conftest import ROOT, ZERO2, run_script

pytestmark = pytest.mark.drill
EXAMPLES = [f"examples/with_{name}.py" for name in ("trainer", "accelerate", "lightning")]
STEPS = 8
TINY = f"""--dataset sample --tokenizer bpe:300 --n_layer 1 --n_head 2 --d_model 32 --block_size 32 --dropout 0
    --max_steps {STEPS} --ds_config ds.json""".split()


@pytest.fixture(scope="module")
def ours(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of ZeRO-2 in fp32, with the monitors of configs/monitoring/."""
    folder = tmp_path_factory.mktemp("ours")
    config = json.loads((ROOT / "configs" / "monitoring" / "zero2_monitors.json").read_text())
    (folder / "ds.json").write_text(json.dumps(config | {"bf16": {"enabled": False}}))
    done = run_script(ZERO2, *TINY, "--log_interval", 1, "--output_dir", "run", ranks=2, cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def our_series(folder: Path, field: str) -> list[float]:
    lines = map(json.loads, (folder / "run" / "metrics.jsonl").read_text().splitlines())
    return [line[field] for line in lines if field in line]


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_has_the_losses_of_our_script(ours, tmp_path, example):
    """Same weights, same samples, same learning rate; it prints four digits."""
    config = json.loads((ROOT / "configs" / "zero2.json").read_text())
    (tmp_path / "ds.json").write_text(json.dumps(config | {"bf16": {"enabled": False}}))
    done = run_script(example, *TINY, ranks=2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    found = re.findall(r"^step=(\d+) loss=(\d+\.\d{4})$", done.stdout, re.MULTILINE)
    assert [int(step) for step, _ in found] == list(range(1, STEPS + 1)), done.stdout
    losses = our_series(ours, "loss")
    assert [float(loss) for _, loss in found] == pytest.approx(losses, abs=1.5e-4)
    assert losses[0] - losses[-1] > 1e-3  # it learns: any two runs that stand still would agree


def test_tensorboard_and_csv_show_the_run(ours):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(ours / "runs" / "monitors" / "tensorboard"))
    events.Reload()
    points = {event.step: event.value for event in events.Scalars("Train/Samples/lr")}
    assert list(points) == [step * 8 * 2 for step in range(1, STEPS + 1)]  # samples seen: micro batch times ranks
    # A line of metrics.jsonl has the rate that its step was made with, DeepSpeed's event the one of the step after.
    assert list(points.values())[:-1] == pytest.approx(our_series(ours, "lr")[1:], rel=1e-6)
    assert (ours / "runs" / "monitors" / "csv" / "Train_Samples_lr.csv").is_file()


def test_bad_input_is_one_message():
    cases = {
        "--ds_config none.json": (1, "error: --ds_config none.json holds no settings: "),
        "--n_head 5": (2, "error: --d_model 768 is not a multiple of --n_head 5"),
        "--max 3": (2, "error: unrecognized arguments: --max 3"),
    }
    for words, (code, message) in cases.items():
        done = run_script(EXAMPLES[1], *words.split())
        assert done.returncode == code and message in done.stderr.splitlines()[-1], done.stderr
