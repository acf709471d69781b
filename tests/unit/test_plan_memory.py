"""The planner: counts and formulas against model and paper, peaks against what is allocated, verdicts and errors."""

import sys
from types import SimpleNamespace

import memory_peaks
import plan_memory
import pytest
import torch
from conftest import BASE, ROOT, ZERO2, load_script, patiently, run

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def parse(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["plan_memory.py", *map(str, words)])
    return plan_memory.parse_args()


def show(monkeypatch, capsys, *words):
    """The table's rows by their first cell, as dicts; later tables add to earlier ones."""
    monkeypatch.setattr(sys, "argv", ["plan_memory.py", *map(str, words)])
    plan_memory.main()
    rows, heads = {}, []
    for line in capsys.readouterr().out.splitlines():
        cells = [cell.strip() for cell in line.split("  ") if cell.strip()]
        heads = cells if cells[:1] == ["stage"] else heads
        rows.setdefault(cells[0] if cells else "", {}).update(zip(heads, cells, strict=False))
    return rows


@pytest.mark.parametrize(
    "shape", [(2, 4, 64, 32, 1024), (6, 12, 768, 256, 50304), (3, 5, 40, 7, 320), (4, 25, 1600, 1024, 50304)], ids=str
)
def test_parameters_are_those_of_the_model(shape):
    model = plan_memory.Model(*shape)
    args = SimpleNamespace(**model._asdict(), dropout=0.1, activation_checkpointing=False, seed=0)
    with torch.device("meta"):
        real = load_script(BASE).GPTLike(args, model.vocab_size)
    assert model.parameters == sum(parameter.numel() for parameter in real.parameters())


PAPER = {  # arXiv:1910.02054, table 1: GB of model states a device at stages 1, 2, 3, by degree of data parallelism
    7.5e9: {1: (120, 120, 120), 4: (52.5, 41.3, 30), 16: (35.6, 21.6, 7.5), 64: (31.4, 16.6, 1.88),
            256: (30.4, 15.4, 0.47), 1024: (30.1, 15.1, 0.12)},
    128e9: {1: (2048, 2048, 2048), 4: (896, 704, 512), 16: (608, 368, 128), 64: (536, 284, 32),
            256: (518, 263, 8), 1024: (513, 257, 2)},
    1e12: {1: (16000, 16000, 16000), 4: (7000, 5500, 4000), 16: (4750, 2875, 1000), 64: (4187, 2218, 250),
           256: (4046, 2054, 62.5), 1024: (4011, 2013, 15.6)},
}  # fmt: skip


@pytest.mark.parametrize("parameters", PAPER, ids="{:.1e}".format)
def test_model_states_are_those_of_the_paper(parameters):
    for ranks, row in PAPER[parameters].items():
        sizes = [sum(plan_memory.formula(parameters, ranks, stage).values()) / 1e9 for stage in (1, 2, 3)]
        for size, printed in zip(sizes, row, strict=True):
            decimals = len(str(printed).partition(".")[2])
            assert abs(size - printed) < 10**-decimals, (ranks, size, printed)  # rounded in places, cut off in others
    assert sum(plan_memory.formula(parameters, 64, 0).values()) == 16 * parameters


@pytest.mark.parametrize(("precision", "checkpointing"), [("bf16", False), ("fp32", False), ("fp32", True)])
@pytest.mark.parametrize(
    "shape", [(6, 4, 256, 64, 64), (2, 4, 64, 128, 8192), (1, 8, 512, 32, 8192)], ids=["activations", "logits", "head"]
)
def test_peaks_are_what_the_model_allocates(shape, precision, checkpointing, monkeypatch, tmp_path):
    args = parse(monkeypatch, "--precision", precision, "--batch_size", 8, "--dropout", 0)
    model, plan = plan_memory.Model(*shape), plan_memory.read_plan(None, args)
    made = SimpleNamespace(seed=0, **model._asdict(), dropout=0.0, activation_checkpointing=checkpointing)
    real = load_script(BASE).GPTLike(made, model.vocab_size).to(DTYPES[precision])
    tokens, peaks = torch.zeros((8, model.block_size), dtype=torch.long), memory_peaks.Peaks(tmp_path / "peaks.json")
    before = memory_peaks.live_bytes() - plan.width * model.parameters  # what other tests left
    peaks.begin("forward")
    loss = real(tokens, tokens)
    peaks.begin("backward")
    loss.backward()
    peaks.begin("end")
    planned = plan_memory.moments(model, plan, 1, checkpointing)
    states = 12 * model.parameters  # no optimizer here
    sizes = {part: (peaks.sizes[part] - before, planned[part] - states) for part in ("forward", "backward")}
    if not checkpointing:
        assert sizes["forward"][0] == pytest.approx(sizes["forward"][1], rel=0.03)
    assert max(size[0] for size in sizes.values()) == pytest.approx(max(size[1] for size in sizes.values()), rel=0.1)


@pytest.mark.parametrize(
    ("name", "accumulation", "paper", "really"),
    [("zero1", 1, 2, 3), ("zero1", 4, 2, 3), ("zero2", 4, 2, 9), ("zero3", 1, 3, 2), ("zero3", 4, 3, 8)],
)
def test_what_is_sent(name, accumulation, paper, really, monkeypatch):
    args = parse(monkeypatch, "--gradient_accumulation_steps", accumulation)
    model = plan_memory.Model(6, 12, 768, 256, 50304)
    plan = plan_memory.read_plan(ROOT / "configs" / f"{name}.json", args)
    weights = 2 * model.parameters * 63 / 64
    assert plan_memory.sent(model, plan, 64) == (paper * weights, really * weights)
    assert plan_memory.sent(model, plan, 1) == (0, 0)


def test_the_smallest_gpu_and_the_host_decide(monkeypatch, capsys):
    shape = "--n_layer 32 --n_head 32 --d_model 4096 --block_size 1024 --batch_size 1 --ranks 4".split()
    rows = show(monkeypatch, capsys, *shape, "--gpus", 24, 80, "--link_gb_s", 2)
    small = [row["24 GiB"] for row in rows.values() if "24 GiB" in row and row["stage"] != "stage"]
    assert small == ["no: GPU"] * 4 + ["fits"] * 3
    assert rows["ZeRO-1, zero1.json"]["80 GiB"] == "fits"
    assert rows["ZeRO-3, zero3.json"]["formula"] == "24.79"  # 4 bytes of each of 6,654,402,560 parameters
    assert rows["ZeRO-3, zero3.json"]["sending, s"] == "14.435"  # gathers 3P less 711 million that stay
    rows = show(monkeypatch, capsys, *shape, "--gpus", 24, "--host_gib", 90)
    assert rows["ZeRO-2, zero_offload.json"]["24 GiB"] == "no: host"
    assert rows["ZeRO-2, zero2.json"]["24 GiB"] == "no: GPU, host"


def test_a_json_is_read_as_the_scripts_read_it(monkeypatch, tmp_path):
    text = '{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "offload_optimizer": null}} // a comment'
    (tmp_path / "ds.json").write_text(text)
    plan = plan_memory.read_plan(tmp_path / "ds.json", parse(monkeypatch))
    assert (plan.zero.reduce_bucket_size, plan.optimizer, plan.batch_size) == (5_000_000, "none", 8)


@pytest.mark.drill
@patiently
def test_a_measured_run_is_as_planned():
    words = f"--measure {ZERO2} --ranks 2 --n_layer 2 --n_head 4 --d_model 128 --block_size 64 --precision fp32"
    done = run([sys.executable, str(ROOT / "scripts" / "tools" / "plan_memory.py"), *words.split(), "--dropout", "0"])
    assert done.returncode == 0, done.stderr
    rows = {
        line.split("  ")[0]: [int(word) for word in line.split()[-2:]]
        for line in done.stdout.splitlines()
        if line[-1:].isdigit()
    }
    planned, measured = rows["forward"]
    assert measured == pytest.approx(planned, rel=0.15)
    formula, held = rows["optimizer_states on cpu"]
    assert held == pytest.approx(formula, abs=1) and rows["backward"][1] > rows["step"][1] > 0


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ("--n_layer 0", 2, "--n_layer 0 must be above 0"),
        ("--gpus 24 -1", 2, "--gpus -1.0 must be above 0"),
        ('{"train_micro_batch_size_per_gpu": "many"}', 1, "invalid literal for int() with base 10: 'many'"),
        ("--gpus x", 2, "argument --gpus: invalid float value: 'x'"),
        ("--dropout -1", 2, "--dropout -1.0 must be above 0"),
        ("--d_model 100", 2, "--d_model 100 is not a multiple of --n_head 12"),
        (f"--measure {ZERO2} --ds_config a.json b.json", 2, "--measure takes one --ds_config"),
        ("--measure train.py", 2, "argument --measure: invalid choice: 'train.py'"),
        ("--ds_config nowhere.json", 1, "nowhere.json: [Errno 2] No such file"),
        ('{"zero_optimization": {"stage": 4}}', 1, "stage\n  Input should be 0, 1, 2, 3"),
        ('{"zero_optimization": 2}', 1, "must be a mapping, not int"),
        ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', 1, "offloaded at stage 3 only"),
        ('{"optimizer": {"type": "Lamb"}}', 1, "optimizer.type is Lamb, and only Adam and AdamW are planned for"),
    ],
)
def test_wrong_input(words, code, message, monkeypatch, capsys, tmp_path):
    if words.startswith("{"):
        (tmp_path / "ds.json").write_text(words)
        words = f"--ds_config {tmp_path}/ds.json"
    monkeypatch.setattr(sys, "argv", ["plan_memory.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        plan_memory.main()
    out, err = capsys.readouterr()
    said = err if code == 2 else str(stop.value.code)
    assert out == "" and "plan_memory.py: error: " in said and message in said
    assert stop.value.code == 2 if code == 2 else isinstance(stop.value.code, str)  # a text: exit code 1
