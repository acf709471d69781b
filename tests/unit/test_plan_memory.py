"""The planner: counts and formulas against model, paper and DeepSpeed; activations against what is allocated."""

import argparse
import gc
import json
import math
import subprocess
import sys
from itertools import accumulate
from types import SimpleNamespace

import pytest
import torch
from conftest import BASE, ROOT, load_script
from torch.profiler import ProfilerActivity, profile, record_function

PLANNER = ROOT / "scripts" / "tools" / "plan_memory.py"
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
CONFIGS = ("zero1", "zero2", "zero3", "zero_offload", "zero3_offload", "zero_infinity")


def planner():
    return load_script("scripts/tools/plan_memory.py")


def parse(*words: str) -> argparse.Namespace:
    args = planner().build_parser().parse_args(words)
    planner().check_args(planner().build_parser(), args)
    return args


def found(*words: str) -> dict:
    return planner().facts(parse(*words))


def plan_of(config: str | None, *words: str):
    if config is None:
        precision = parse(*words).precision or "bf16"
        return planner().Plan("", None, 0, "gpu", "gpu", parse(*words).batch_size or 8, 1, precision, {})
    return planner().read_plan(ROOT / "configs" / f"{config}.json", parse(*words))


def run_planner(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, PLANNER, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=ROOT)


# What is counted
@pytest.mark.parametrize(
    ("shape", "vocab_size"),
    [((2, 4, 64, 32), 1024), ((6, 12, 768, 256), 50257), ((12, 12, 768, 1024), 50257), ((3, 5, 40, 7), 300),
     ((48, 25, 1600, 1024), 50257), ((1, 1, 8, 1), 64)],
    ids=str,
)  # fmt: skip
def test_parameters_are_those_of_the_model(shape, vocab_size):
    names = ("n_layer", "n_head", "d_model", "block_size")
    args = SimpleNamespace(**dict(zip(names, shape, strict=True)), dropout=0.1, activation_checkpointing=False, seed=0)
    with torch.device("meta"):
        model = load_script(BASE).GPTLike(args, vocab_size)
    words = [word for name, size in zip(names, shape, strict=True) for word in (f"--{name}", str(size))]
    words += ["--vocab_size", str(vocab_size), "--ds_config", str(ROOT / "configs" / "zero1.json")]
    assert found(*words)["model"]["parameters"] == sum(p.numel() for p in model.parameters())


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
        sizes = [sum(planner().formula(parameters, ranks, stage).values()) / 1e9 for stage in (1, 2, 3)]
        for size, printed in zip(sizes, row, strict=True):
            decimals = len(str(printed).partition(".")[2])
            assert abs(size - printed) < 10**-decimals, (ranks, size, printed)  # rounded in places, cut off in others
    assert sum(planner().formula(parameters, 64, 0).values()) == 16 * parameters


@pytest.mark.parametrize("config", ["zero2", "zero3", "zero_offload", "zero3_offload"])
def test_deepspeeds_estimate_is_deepspeeds(config):
    from deepspeed.runtime.zero import stage3, stage_1_and_2

    model = planner().Model(6, 12, 768, 256, 50304)
    machine = planner().Machine(ranks=16, ranks_per_host=8, gpus=(24.0,), hosts=(), reserve=2.0)
    size = {"num_gpus_per_node": 8, "num_nodes": 2, "cpu_offload": "offload" in config}
    if config in ("zero2", "zero_offload"):
        host, gpu = stage_1_and_2.estimate_zero2_model_states_mem_needs(model.parameters, **size)
    else:
        size |= {"cpu_offload_params": "offload" in config}
        host, gpu, _ = stage3.estimate_zero3_model_states_mem_needs(model.parameters, 50304 * 768, **size)
    assert planner().deepspeed_estimate(model, plan_of(config), machine) == (gpu, host)
    assert gpu > 0 and host > 0


# Beside measurements
def peak_bytes(prof: profile, start: str, end: str | None = None, *, before: int | None = None) -> int:
    """The most bytes that were allocated at once between two marks, of all since the profiler began; or where the bytes
    before the first mark are known, on top of those. (The profiler does not see what gloo's threads free, so that on
    several ranks its own sum grows from step to step.)"""
    events = prof.profiler.kineto_results.events()
    began = min(event.start_ns() for event in events if event.name() == start)
    ended = min((event.start_ns() for event in events if event.name() == end), default=math.inf)
    memory = sorted((event.start_ns(), event.nbytes()) for event in events if event.name() == "[memory]")
    held = sum(size for when, size in memory if when < began) if before is None else before
    return max(accumulate((size for when, size in memory if began <= when < ended), initial=held))


@pytest.mark.parametrize(("precision", "dropout"), [("bf16", 0.0), ("fp32", 0.0)])  # its masks are larger on a CPU
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("shape", "batch_size"),
    [((6, 4, 256, 64, 64), 16), ((2, 4, 64, 128, 8192), 16), ((2, 8, 512, 64, 1024), 4), ((1, 8, 512, 32, 8192), 8)],
    ids=["activations", "logits", "mixed", "head"],
)
def test_activations_and_logits_are_what_the_model_allocates(shape, batch_size, checkpointing, precision, dropout):
    model = planner().Model(*shape)
    args = SimpleNamespace(seed=0, **model._asdict(), dropout=dropout, activation_checkpointing=checkpointing)
    tokens = torch.zeros((batch_size, model.block_size), dtype=torch.long)
    gc.collect()  # what an earlier test left must not be freed in this one's account
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        args.seed = 0
        real = load_script(BASE).GPTLike(args, model.vocab_size).to(DTYPES[precision])
        with record_function("forward"):
            loss = real(tokens, tokens)
        with record_function("backward"):
            loss.backward()
    plan = plan_of(None, "--batch_size", str(batch_size), "--precision", precision)
    planned = planner().moments(model, plan, 1, dropout=dropout, checkpointing=checkpointing)
    states = planner().formula(model.parameters, 1, 0, precision)["optimizer_states"]
    planned = {part: size - states for part, size in planned.items() if part != "step"}
    if not checkpointing:
        assert peak_bytes(prof, "forward", "backward") == pytest.approx(planned["forward"], rel=0.03)
    assert 0.95 * max(planned.values()) < peak_bytes(prof, "forward") < 1.1 * max(planned.values())


# Verdicts
def test_unlike_gpus_are_judged_one_by_one_and_the_smallest_decides():
    words = "--parameters 1.5B --block_size 1024 --batch_size 16 --ranks 4 --ranks_per_host 3 --gpus".split()
    both, small, large = found(*words, "48,24"), found(*words, "24"), found(*words, "48")
    assert [row["verdicts"] for row in both["stages"][:2]] == [
        {"48": "checkpointing", "24": "no: GPU"},
        {"48": "fits", "24": "checkpointing"},
    ]
    assert both["smallest"] == small["smallest"] == large["smallest"] == "ZeRO-1"
    assert [row["largest"] for row in both["stages"]] == [row["largest"] for row in small["stages"]]
    assert both["stages"][1]["largest"] < large["stages"][1]["largest"]


@pytest.mark.parametrize("config", CONFIGS)
def test_the_largest_model_fits_and_a_larger_one_does_not(config):
    machine = planner().Machine(ranks=16, ranks_per_host=8, gpus=(24.0,), hosts=(512.0,), reserve=2.0)
    plan, model = plan_of(config), planner().Model(6, 12, 768, 256, 50304)
    largest = planner().largest_model(model, plan, machine, dropout=0.1)
    verdicts = []
    for factor in (0.99, 1.06):
        shape = planner().shape_of(round(largest * factor), 256, 50304)
        verdicts.append(planner().verdict(shape, plan, machine, 24.0, dropout=0.1))
    assert verdicts[0] in ("fits", "checkpointing") and verdicts[1].startswith("no: ")
    assert largest > 1e9


@pytest.mark.parametrize("parameters", [10**6, 124 * 10**6, 1500 * 10**6, 175 * 10**9, 10**12])
def test_a_usual_shape_has_about_the_parameters(parameters):
    shape = planner().shape_of(parameters, 1024, 50304)
    assert shape.parameters == parameters
    counted = shape._replace(given=0).parameters
    assert counted == pytest.approx(parameters, rel=0.05) or shape.d_model == 64  # the narrowest
    assert shape.d_model % shape.n_head == 0


def test_host_memory_can_be_what_lacks():
    words = "--parameters 7.5B --ranks 8 --gpus 80".split()
    few, none = found(*words, "--host_gib", "100")["stages"], found(*words)["stages"]
    lacks = [
        "no: GPU, host",
        "no: host",
        "no: host",
        "fits",
        "no: host",
        "no: host",
        "no: host",
    ]  # ZeRO-3 builds no whole
    assert [row["verdicts"]["80"] for row in few] == lacks
    assert [row["verdicts"]["80"] for row in none] == ["no: GPU"] + ["fits"] * 6
    whole = {row["stage"]: row["host"] for row in none}
    assert whole["ZeRO-3"] == 2 * 7.5e9  # rank 0 takes the whole weights to save them
    assert whole["ZeRO-2"] == 8 * 4 * 7.5e9  # every rank begins with the model in fp32


# Time
@pytest.mark.parametrize(
    ("config", "accumulation", "paper", "really"),
    [
        ("zero1", 1, 2, 3),
        ("zero1", 4, 2, 3),
        ("zero2", 1, 2, 3),
        ("zero2", 4, 2, 9),
        ("zero3", 1, 3, 2),
        ("zero3", 4, 3, 8),
    ],
)
def test_what_is_sent(config, accumulation, paper, really):
    model = planner().Model(6, 12, 768, 256, 50304)
    plan = plan_of(config, "--gradient_accumulation_steps", str(accumulation))
    weights = 2 * model.parameters * 63 / 64
    assert planner().sent(model, plan, 64) == (paper * weights, really * weights)
    assert planner().sent(model, plan, 1) == (0, 0)
    scattered = plan._replace(zero=plan.zero | {"use_multi_rank_bucket_allreduce": False})
    expected = {"zero1": 2, "zero2": accumulation + 1, "zero3": really}[config]
    assert planner().sent(model, scattered, 64)[1] == expected * weights


def test_stage_3_gathers_a_large_model_twice():
    model = planner().shape_of(10 * 10**9, 1024, 50304)
    paper, really = planner().sent(model, plan_of("zero3"), 64)
    kept = (0.5e9 + 1e7 + 12 * model.d_model**2) / 1e10  # reuse distance 1e9, there and back; prefetch bucket; a block
    assert (paper, really) == (3 * 2e10 * 63 / 64, pytest.approx((3 - kept) * 2e10 * 63 / 64))


def test_bounds_and_scaling_follow_from_rate_and_link():
    words = "--ranks 4 --link_gb_s 0.5 --rank_tokens_per_second 2048 --scaling 1,4 --precision fp32".split()
    facts = found(
        *words, "--ds_config", str(ROOT / "configs" / "zero3.json"), str(ROOT / "configs" / "zero_offload.json")
    )
    sent = 4 * facts["model"]["parameters"] * 3 / 4
    seconds = [3 * sent / 5e8, 2 * sent / 5e8]  # stages 2 and 3
    assert [row["stage"] for row in facts["communication"]] == ["ZeRO-2", "ZeRO-3"]
    assert [row["seconds"] for row in facts["communication"]] == pytest.approx(seconds)
    assert [row["compute_seconds"] for row in facts["communication"]] == [1.0, 1.0]  # 8 x 256 tokens
    bounds = [row["tokens_per_second_bound"] for row in facts["communication"]]
    assert bounds == pytest.approx([4 * 2048 / seconds[0], 4 * 2048])  # the link, computing
    one, four = facts["scaling"][:2]
    assert (one["weak"], one["strong"]) == (2048, 2048)
    assert four["weak"] == pytest.approx(4 * 2048 / (1 + seconds[0]))
    assert four["strong"] == pytest.approx(2048 / (1 / 4 + seconds[0]))


# As a command
def test_the_tables(capsys, monkeypatch):
    words = "--parameters 7.5B --ranks 64 --gpus 80 --link_gb_s 25 --rank_tokens_per_second 3000 --scaling 64".split()
    monkeypatch.setattr(sys, "argv", ["plan_memory.py", *words])
    planner().main()
    lines = capsys.readouterr().out.splitlines()
    rows = {
        line.split(" | ")[0].removeprefix("| "): line.strip("| ").split(" | ") for line in lines if line.startswith("|")
    }
    assert lines[0].startswith("7,500,000,000 parameters; about this shape: 33 layers, ")
    assert sum(line.startswith("| stage |") for line in lines) == 3
    assert rows["ZeRO-3, optimizer and parameters on CPU"][1:3] == ["1.75", "0.80 / 23.57"]
    assert [line for line in lines if line.startswith("The first")] == ["The first that fits 80 GiB: ZeRO-1"]
    assert "A step of 64 ranks, each sending at 25 GB/s:" in lines
    assert "Scaling, if nothing is sent while a rank computes:" in lines


def test_json_is_what_the_tables_show():
    done = run_planner("--json", "--ranks", "8", "--ds_config", "configs/zero2.json")
    assert (done.returncode, done.stderr) == (0, "")
    facts = json.loads(done.stdout)
    (row,) = facts["stages"]
    assert (row["stage"], row["ds_config"], facts["smallest"]) == ("ZeRO-2", "configs/zero2.json", "ZeRO-2")
    assert row["formula"] == pytest.approx((2 + 14 / 8) * facts["model"]["parameters"])
    assert facts["communication"] == facts["scaling"] == []


def test_it_starts_without_torch():
    code = (
        f"import runpy, sys; sys.argv = ['p', '--ds_config', 'configs/zero1.json']; runpy.run_path({str(PLANNER)!r}, "
    )
    code += "run_name='__main__'); assert not {'torch', 'deepspeed'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.returncode, done.stderr) == (0, "")


USAGE = [
    ("--parameters 12X", "argument --parameters: 12X: write parameters as 124M, 7.5B, 1T or 7.5e9"),
    ("--parameters -5M", "argument --parameters: expected one argument"),
    ("--parameters 1e99", "argument --parameters: 1e99: write parameters as"),
    ("--parameters 10", "argument --parameters: 10: write parameters as"),
    ("--parameters 124M --n_layer 3", "--parameters and --n_layer: give the one or the other"),
    ("--n_layer 0", "argument --n_layer: 0 is no number above 0 and below 2**31"),
    ("--n_layer 2.5", "argument --n_layer: 2.5 is no number"),
    ("--d_model 100", "--d_model 100 is not a multiple of --n_head 12"),
    ("--dropout 1", "--dropout 1.0 must be at least 0 and below 1"),
    ("--dropout nan", "--dropout nan must be at least 0 and below 1"),
    ("--ranks 0", "argument --ranks: 0 is no number"),
    ("--ranks 9999999999", "argument --ranks: 9999999999 is no number"),
    ("--ranks 2 --ranks_per_host 4", "--ranks_per_host 4 is more than --ranks 2"),
    ("--gpus 24,", "argument --gpus:  is no number"),
    ("--gpus 24;48", "argument --gpus: 24;48 is no number"),
    ("--gpus inf", "argument --gpus: inf is no number"),
    ("--host_gib 0", "argument --host_gib: 0 is no number"),
    ("--reserve_gib 24", "--reserve_gib 24.0 must be at least 0 and below the smallest of --gpus"),
    ("--reserve_gib -1", "--reserve_gib -1.0 must be at least 0"),
    ("--precision fp8", "argument --precision: invalid choice: 'fp8'"),
    ("--link_gb_s 0", "argument --link_gb_s: 0 is no number"),
    ("--rank_tokens_per_second 9", "--rank_tokens_per_second needs --link_gb_s"),
    ("--scaling 1,2 --link_gb_s 1", "--scaling needs --rank_tokens_per_second"),
    ("--scaling 1,x --link_gb_s 1 --rank_tokens_per_second 9", "argument --scaling: x is no number"),
    ("--rank 2", "unrecognized arguments: --rank 2"),
    ("--ds_config", "argument --ds_config: expected at least one argument"),
]


@pytest.mark.parametrize(("words", "message"), USAGE, ids=[words for words, _ in USAGE])
def test_wrong_usage(words, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["plan_memory.py", *words.split()])
    with pytest.raises(SystemExit) as stop:
        planner().main()
    out, err = capsys.readouterr()
    assert (stop.value.code, out) == (2, "")
    assert f"plan_memory.py: error: {message}" in err


FILES = [
    (None, "no such file"),
    ("", "is no JSON object, or an empty one"),
    ("{}", "is no JSON object, or an empty one"),
    ("{", "is not JSON"),
    ("[1]", "is no JSON object"),
    ('"zero"', "is no JSON object"),
    (b"\xff\xfe{", "is not JSON"),
    ('{"zero_optimization": 2}', "zero_optimization is no object"),
    ('{"bf16": true}', "bf16 is no object"),
    ('{"zero_optimization": {"stage": 4}}', "zero_optimization.stage is 4: write 0, 1, 2 or 3"),
    ('{"zero_optimization": {"stage": "auto"}}', "zero_optimization.stage is 'auto': write 0, 1, 2 or 3"),
    ('{"zero_optimization": {"stage": true}}', "zero_optimization.stage is True: write 0, 1, 2 or 3"),
    ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": "auto"}}',
     "zero_optimization.reduce_bucket_size is 'auto', no number from 0 on"),
    ('{"zero_optimization": {"stage": 2, "reduce_bucket_size": -1}}',
     "zero_optimization.reduce_bucket_size is -1, no number from 0 on"),
    ('{"train_micro_batch_size_per_gpu": "auto"}', "train_micro_batch_size_per_gpu is 'auto', no number from 1 on"),
    ('{"gradient_accumulation_steps": 0}', "gradient_accumulation_steps is 0, no number from 1 on"),
    ('{"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}', "stage 2 cannot offload that"),
    ('{"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}', "stage 2 cannot offload that"),
    ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "tape"}}}', "offload device is none, cpu or nvme"),
    ('{"zero_optimization": {"stage": 3, "offload_param": "cpu"}}', "zero_optimization.offload_param is no object"),
    ('{"zero_optimization": {"stage": 3, "offload_param": {"device": "nvme", "buffer_size": "big"}}}',
     "zero_optimization.offload_param.buffer_size is 'big', no number from 0 on"),
    ('{"optimizer": {"type": "Lamb"}}', "optimizer.type is Lamb, and only Adam and AdamW are planned for"),
]  # fmt: skip


@pytest.mark.parametrize(("content", "message"), FILES, ids=[message for _, message in FILES])
def test_wrong_files(content, message, tmp_path, monkeypatch, capsys):
    path = tmp_path / "ds.json"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    monkeypatch.setattr(sys, "argv", ["plan_memory.py", "--ds_config", str(path)])
    with pytest.raises(SystemExit) as stop:
        planner().main()
    assert capsys.readouterr().out == ""
    assert str(stop.value.code).startswith(f"plan_memory.py: error: {path}") and message in stop.value.code
    assert "\n" not in stop.value.code.replace("\n    at", "")


def test_a_folder_in_place_of_a_json(tmp_path):
    done = run_planner("--ds_config", tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr.startswith(f"plan_memory.py: error: {tmp_path} is not JSON") and len(done.stderr.splitlines()) == 1
    )
