"""The model states that a rank holds, in bf16 at two ranks, by kind: as the formulas of arXiv:1910.02054 say, and where
DeepSpeed holds something else, exactly what."""

import json

import pytest
from conftest import ROOT, ZERO, command, require_nvme, run

pytestmark = pytest.mark.slow
BUCKET = json.loads((ROOT / "configs" / "zero3.json").read_text())["zero_optimization"]["reduce_bucket_size"]
KINDS = ("parameters", "optimizer_states", "gradients_and_buckets", "activations")
PHASES = ("forward", "backward", "step")


def ledger_of(train, config) -> tuple[dict[str, int], int]:
    ranks = {"ranks": 2, "batch_size": 4} if config else {"batch_size": 8}
    summary = train(config, precision="bf16", dropout=0, **ranks).json("summary")
    return {kind: row["held"] for kind, row in summary["ledger"].items()}, summary["parameters"]


@pytest.mark.parametrize(
    ("config", "parameters", "states"),
    [(None, 2, 12), ("zero1", 2, 6), ("zero2", 2, 6), ("zero3", 1, 6), ("zero_offload", 2, 6), ("zero3_offload", 1, 6),
     ("multihosts", 2, 6)],
)  # fmt: skip
def test_parameters_and_optimizer_states_follow_the_formula(train, config, parameters, states):
    held, count = ledger_of(train, config)
    assert held["parameters on cpu"] == pytest.approx(parameters * count, rel=0.02)
    assert held["optimizer_states on cpu"] == pytest.approx(states * count, rel=0.02)


def test_gradients_as_deepspeed_holds_them(train):
    """By the formula 2P, 2P, 2P/N, 2P/N. DeepSpeed keeps no more than its own part at stage 1 either; at stage 3 the
    reduce bucket of the JSON stays allocated beside it, and the offloads add what the CPU's Adam works on."""
    base, count = ledger_of(train, None)
    assert base["gradients_and_buckets on cpu"] == pytest.approx(2 * count, rel=0.02)
    largest = 1024 * 64  # parameters of the largest weight, the token embedding
    for config, expected in (
        ("zero1", count),
        ("zero2", count),
        ("zero3", count + 2 * BUCKET),
        ("zero_offload", count + 2 * count + 2 * 2 * largest),  # fp32 copies of its gradients, two staging buffers
        ("zero3_offload", count + 2 * count + 2 * BUCKET),
    ):
        held, _ = ledger_of(train, config)
        assert held["gradients_and_buckets on cpu"] == pytest.approx(expected, rel=0.05), config


def test_the_formula_is_printed_beside_it(train):
    run = train("zero3", precision="bf16", dropout=0, ranks=2, batch_size=4)
    count = run.json("summary")["parameters"]
    assert f"P = {count:,} parameters, N = 2 ranks" in run.output
    for kind, formula in (("parameters", "2P/N"), ("optimizer_states", "12P/N"), ("gradients_and_buckets", "2P/N")):
        line = next(line for line in run.output.splitlines() if line.strip().startswith(f"{kind} on cpu"))
        assert line.endswith(f"{int(formula.split('P')[0]) * count // 2:,} = {formula}")


@pytest.mark.drill
@pytest.mark.timeout(900)  # the op may be compiled here
def test_nvme(tmp_path):
    """What is offloaded to NVMe is counted in its swap files. DeepSpeed leaves what is under 1 MiB in memory."""
    require_nvme()
    config = json.loads((ROOT / "configs" / "zero_infinity.json").read_text())
    for name in ("offload_optimizer", "offload_param"):
        config["zero_optimization"][name]["nvme_path"] = str(tmp_path)
    (tmp_path / "ds.json").write_text(json.dumps(config))
    flags = {"dataset": "sample", "tokenizer": "bpe:1024", "n_layer": 1, "n_head": 4, "d_model": 640}
    flags |= {"block_size": 32, "batch_size": 2, "max_steps": 3, "ds_config": tmp_path / "ds.json"}
    done = run(command(ZERO["zero_offload"], ranks=2, output_dir=tmp_path / "run", **flags), timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    ledger, count = summary["ledger"], summary["parameters"]
    on_disk = {place: row["held"] for place, row in ledger.items() if place.endswith("on nvme")}
    states = on_disk["optimizer_states on nvme"]
    assert states > 5.9 * count  # of 12P/N
    assert states + ledger["optimizer_states on cpu"]["held"] == pytest.approx(6 * count, rel=0.02)
    large = 640 * 640 * (3 + 4 + 4)  # elements of qkv and the feed-forward layers
    assert on_disk["parameters on nvme"] == 2 * large // 2  # 2 bytes each, on 2 ranks


def test_memory_report(train):
    """The same quantities phase by phase: Adam's states come with the first step, gradients live between backward and
    step, activations between forward and backward."""
    run = train(None, precision="bf16", dropout=0, batch_size=8, max_steps=3, memory_report=True)
    memory, count = run.json("memory"), run.json("summary")["parameters"]
    phases = memory["bytes"]
    assert [*phases] == ["step 1, init", *(f"step {n}, {name}" for n in (1, 2) for name in PHASES)]
    held = {name: {kind: phase.get(f"{kind} on cpu", 0) for kind in KINDS} for name, phase in phases.items()}
    assert held["step 1, init"]["optimizer_states"] == 4 * count  # the fp32 copy
    assert held["step 1, step"]["optimizer_states"] == pytest.approx(12 * count, rel=0.02)
    for n in (1, 2):
        assert held[f"step {n}, backward"]["gradients_and_buckets"] == pytest.approx(2 * count, rel=0.02)
        for name in ("forward", "step"):
            assert held[f"step {n}, {name}"]["gradients_and_buckets"] < 100  # scalars
        rows = 8 * 32 * 64 * 2  # bytes of one activation (batch, seq, d_model)
        head = 2 * rows + 1024 * 64 * 4  # the last norm's input, and LinearCrossEntropy's gradients
        assert held[f"step {n}, forward"]["activations"] == pytest.approx(2 * 16 * rows + head, rel=0.02)
        assert held[f"step {n}, backward"]["activations"] <= 4  # the loss
    total = sum(row["held"] for row in run.json("summary")["ledger"].values())
    assert memory["why"].startswith(f"ZeRO stage 0 on 1 ranks did not save memory: {total:,} bytes of model states")
    assert memory["why"] in run.output


def test_memory_report_names_what_eats_the_saving(train):
    run = train("zero3", precision="bf16", dropout=0, ranks=2, batch_size=4, max_steps=3, memory_report=True)
    why, count = run.json("memory")["why"], run.json("summary")["parameters"]
    assert why.startswith("ZeRO stage 3 on 2 ranks did not save memory: 11,341,464 bytes of model states")
    assert f"beside 16P = {16 * count:,} without ZeRO" in why
    assert "most above its formula: gradients_and_buckets on cpu, by 10,000,016" in why
