"""configs/monitoring/ and docs/monitoring.md: what DeepSpeed's monitors and profilers write of a run of our script."""

import argparse
import csv
import json
import re

import pytest
import torch
from conftest import ROOT, TINY, ZERO, Run, command, load_script, run

FOLDER = ROOT / "configs" / "monitoring"
RECIPE = json.loads((ROOT / "configs" / "zero2.json").read_text())
ADDED = {
    "zero2_monitors": ["wall_clock_breakdown", "tensorboard", "csv_monitor", "wandb"],
    "zero2_profile": ["wall_clock_breakdown", "flops_profiler"],
    "zero2_comms": ["log_level", "comms_logger"],
}
STEPS, RANKS, BATCH, PROFILED = 8, 2, 8, 5
TIMES = [f"elapsed_time_ms_{what}" for what in ("forward", "backward", "backward_inner", "backward_allreduce", "step")]


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def test_a_monitoring_json_is_zero2_json_and_some_keys():
    assert sorted(path.stem for path in FOLDER.glob("*")) == sorted(ADDED)
    for name, keys in ADDED.items():
        config = read(name)
        assert {key: value for key, value in config.items() if key not in keys} == RECIPE
        assert list(config) == [*RECIPE, *keys]


@pytest.mark.parametrize("name", ADDED)
def test_our_script_takes_a_monitoring_json(name):
    args = argparse.Namespace(ds_config=str(FOLDER / f"{name}.json"))
    config = load_script(ZERO["zero2"]).load_ds_config(args, torch.device("cpu"))
    assert all(config[key] == value for key, value in read(name).items() if key in ADDED[name])


def test_comms_logger_is_on_wherever_its_key_is():
    """DeepSpeed asks only whether the key is there, so docs/monitoring.md says to take it out."""
    from deepspeed.comm.config import DeepSpeedCommsConfig

    assert DeepSpeedCommsConfig({"comms_logger": {"enabled": False}}).comms_logger_enabled is True
    assert DeepSpeedCommsConfig({}).comms_logger_enabled is False


@pytest.fixture(scope="module")
def watched(tmp_path_factory) -> Run:
    """A run on two ranks with the keys of all three files, in a folder of its own: their paths are relative."""
    folder = tmp_path_factory.mktemp("watched")
    (folder / "ds.json").write_text(json.dumps(read("zero2_monitors") | read("zero2_profile") | read("zero2_comms")))
    flags = TINY | {"max_steps": STEPS, "log_interval": 1, "ds_config": "ds.json", "output_dir": "run"}
    done = run(command(ZERO["zero2"], ranks=RANKS, **flags), cwd=folder)
    assert done.returncode == 0, done.stdout + done.stderr
    return Run(done.stdout, folder / "run")


def scalars(watched: Run) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard's own reader finds: the (step, value) pairs of each tag."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(watched.folder.parent / "runs" / "monitors" / "tensorboard"))
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


@pytest.mark.slow
def test_tensorboard_holds_learning_rates_and_times_by_samples(watched):
    found = scalars(watched)
    samples = [step * BATCH * RANKS for step in range(1, STEPS + 1)]
    assert sorted(found) == sorted(f"Train/Samples/{name}" for name in ["lr", *TIMES])
    assert all([step for step, _ in points] == samples for points in found.values())
    # A line of metrics.jsonl has the rate that its step was made with, DeepSpeed's event the one of the step after.
    rates = [value for _, value in found["Train/Samples/lr"]]
    assert rates[:-1] == pytest.approx(watched.metrics("lr")[1:], rel=1e-6)
    forward, backward, step = (
        [value for _, value in found[f"Train/Samples/elapsed_time_ms_{what}"]]
        for what in ("forward", "backward", "step")
    )
    assert all(0 < value < 60_000 for value in forward + backward + step)


@pytest.mark.slow
def test_csv_holds_what_tensorboard_holds(watched):
    folder = watched.folder.parent / "runs" / "monitors" / "csv"
    found = scalars(watched)
    assert {path.stem for path in folder.iterdir()} == {tag.replace("/", "_") for tag in found}
    for tag, points in found.items():
        with (folder / f"{tag.replace('/', '_')}.csv").open(encoding="utf-8") as file:
            header, *rows = csv.reader(file)
        assert header == ["step", tag.split("/")[-1]]
        assert [int(step) for step, _ in rows] == [step for step, _ in points]
        assert [float(value) for _, value in rows] == pytest.approx([value for _, value in points], rel=1e-6)


@pytest.mark.slow
def test_wall_clock_breakdown_prints_each_step(watched):
    assert len(re.findall(r"\| fwd: [\d.]+ \| bwd: [\d.]+ \|", watched.output)) == STEPS
    assert len(re.findall(r"\| fwd_microstep: [\d.]+ \| bwd_microstep: [\d.]+ \|", watched.output)) == STEPS


@pytest.mark.slow
def test_the_flops_profiler_counts_the_head_three_times(watched):
    """Its MACs are all matrix products of a forward pass, and the head's two of the backward pass, made with it."""
    layers, width, length = (TINY[name] for name in ("n_layer", "d_model", "block_size"))
    vocabulary = int(TINY["tokenizer"].removeprefix("bpe:"))
    macs = BATCH * length * (3 * vocabulary * width + layers * (12 * width**2 + 2 * length * width))
    assert f"Profile Summary at step {PROFILED + 1}:" in watched.output
    assert re.search(rf"^fwd MACs per GPU: +{macs / 1e6:.2f} MMACs *$", watched.output, re.MULTILINE), watched.output
    parameters = watched.json("summary")["parameters"]
    assert re.search(rf"^params per GPU: +{parameters / 1e3:.2f} K *$", watched.output, re.MULTILINE)
    assert re.search(r"fwd latency - \{'GPTLike': '[\d.]+ Gs'\}", watched.output)  # since 1970: no time of a step


COMM = re.compile(r"comm op: (\w+) \| time \(ms\): ([\d.]+) \| msg size: ([\d.]+) *(\w+)")


@pytest.mark.slow
def test_comms_logger_tells_what_a_step_sends(watched):
    """All gradients in one all_reduce, and this rank's half of the weights in two all_gathers, one a group."""
    parameters = watched.json("summary")["parameters"]
    sent = [(operation, float(size) * {"B": 1, "KB": 1024}.get(unit, 0))
            for operation, _, size, unit in COMM.findall(watched.output)]  # fmt: skip
    gradients = [size for operation, size in sent if operation == "all_reduce" and size > 100]
    weights = [size for operation, size in sent if operation == "all_gather_into_tensor"]
    assert (len(gradients), len(weights)) == (STEPS, 2 * STEPS)
    assert gradients == pytest.approx([2 * parameters] * STEPS, rel=0.001)
    assert sum(weights) == pytest.approx(STEPS * 2 * parameters / RANKS, rel=0.001)


@pytest.mark.slow
def test_comms_logger_adds_its_times_up(watched):
    """So that docs/monitoring.md warns of them. The day this fails, DeepSpeed has mended it."""
    times = {}
    for operation, time, *_ in COMM.findall(watched.output):
        times.setdefault(operation, []).append(float(time))
    assert all(series == sorted(series) and len(series) >= 2 * STEPS for series in
               (times["all_reduce"], times["all_gather_into_tensor"]))  # fmt: skip
