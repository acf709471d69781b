"""scripts/lint_config.py: it agrees with the scripts on sound and broken JSONs, and what it calls dead DeepSpeed reads
nowhere."""

import argparse
import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, SCRIPTS, TINY, ZERO, command, load_script, run

LINT = load_script("lint_config.py")
SOUND = json.loads((ROOT / "configs" / "zero2.json").read_text(encoding="utf-8"))
STAGE_3 = json.loads((ROOT / "configs" / "zero3.json").read_text(encoding="utf-8"))
OFFLOAD = json.loads((ROOT / "configs" / "zero_offload.json").read_text(encoding="utf-8"))
CPU = {"device": "cpu"}


def changed(base: dict = SOUND, *, without: str = "", **changes: object) -> dict:
    return {key: value for key, value in (base | changes).items() if key != without}


def zero(base: dict = SOUND, **changes: object) -> dict:
    return changed(base, zero_optimization=base["zero_optimization"] | changes)


def params(**changes: object) -> dict:
    return changed(optimizer=SOUND["optimizer"] | {"params": SOUND["optimizer"]["params"] | changes})


def tutorial(micro_batch: int, accumulation: int, stage: dict, **more: object) -> dict:
    """The settings of a JSON that the tutorial's author published with a script."""
    scale = {
        "loss_scale": 0,
        "loss_scale_window": 1000,
        "initial_scale_power": 16,
        "hysteresis": 2,
        "min_loss_scale": 1,
    }
    adam = {"lr": 0.0003, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    warmup = {"warmup_min_lr": 0, "warmup_max_lr": 0.0003, "warmup_num_steps": 100}
    return {
        "train_micro_batch_size_per_gpu": micro_batch,
        "gradient_accumulation_steps": accumulation,
        **more,
        "zero_optimization": stage,
        "fp16": {"enabled": True} | scale,
        "optimizer": {"type": "AdamW", "params": adam},
        "scheduler": {"type": "WarmupLR", "params": warmup},
    }


BUCKETS = {
    "allgather_partitions": True,
    "allgather_bucket_size": 2e8,
    "reduce_scatter": True,
    "reduce_bucket_size": 2e8,
}
EAGER = BUCKETS | {"overlap_comm": True, "contiguous_gradients": True}
PINNED = {"device": "cpu", "pin_memory": True}
TUTORIAL = {
    "ZeRO-1": tutorial(16, 2, {"stage": 1} | BUCKETS | {"allgather_bucket_size": 5e8, "reduce_bucket_size": 5e8}),
    "ZeRO-2": tutorial(16, 2, {"stage": 2} | EAGER),
    "ZeRO-3": tutorial(16, 2, {"stage": 3} | EAGER | {"prefetch_bucket_size": 2e8, "sub_group_size": 1e9}),
    "ZeRO-Offload": tutorial(
        16,
        2,
        {"stage": 3, "offload_param": PINNED, "offload_optimizer": PINNED}
        | {"allgather_partitions": True, "reduce_scatter": True},
    ),
    "Multihosts": tutorial(4, 4, {"stage": 2} | EAGER, train_batch_size=32),
}
BF16, FP32 = {"precision": "bf16"}, {"precision": "fp32"}
CASES: dict[str, tuple[object, dict, int]] = {  # what the file holds, flags, ranks
    **{f"tutorial {name}": (config, {}, 2) for name, config in TUTORIAL.items()},
    **{f"tutorial {name} in bf16": (config, BF16, 2) for name, config in TUTORIAL.items()},
    "tutorial Multihosts on one rank": (TUTORIAL["Multihosts"], BF16, 1),
    "tutorial Multihosts, other batch": (TUTORIAL["Multihosts"], BF16 | {"batch_size": 2}, 1),
    "empty": ("", {}, 1),
    "empty object": ("{}", {}, 1),
    "a list": ("[1]", {}, 1),
    "not JSON": ('{"optimizer": {', {}, 1),
    "a key twice": ('{"gradient_clipping": 1, "gradient_clipping": 2}', {}, 1),
    "not UTF-8": (b"\xff\xfe{}", {}, 1),
    "comments": ("// legal\n" + json.dumps(SOUND), {}, 1),
    "unknown key": (changed(gradient_cliping=1.0), {}, 1),
    "unknown key in a section": (zero(reduce_buket_size=1), {}, 1),
    "unknown key two sections down": (zero(OFFLOAD, offload_optimizer={"devise": "cpu"} | CPU), {}, 1),
    "unknown optimizer parameter": (params(learning_rate=1), {}, 1),
    "unknown key like nothing": (changed(xyzzy={"a": 1}), {}, 1),
    "a number for a section": (changed(zero_optimization=2), {}, 1),
    "null for a section": (zero(offload_param=None), {}, 1),
    "a list for parameters": (changed(optimizer={"type": "AdamW", "params": [1]}), {}, 1),
    "a word for a micro batch": (changed(train_micro_batch_size_per_gpu="8"), {}, 1),
    "zero micro batch": (changed(train_micro_batch_size_per_gpu=0), {}, 1),
    "no batch at all": (changed(without="train_micro_batch_size_per_gpu"), {}, 2),
    "train_batch_size alone": (
        changed(without="train_micro_batch_size_per_gpu", train_batch_size=32, gradient_accumulation_steps=2),
        {},
        4,
    ),
    "train_batch_size that does not divide": (
        changed(without="train_micro_batch_size_per_gpu", train_batch_size=33),
        {},
        2,
    ),
    "train_batch_size right": (changed(train_batch_size=16), {}, 2),
    "train_batch_size wrong": (changed(train_batch_size=32), {}, 2),
    "train_batch_size and a flag": (changed(train_batch_size=32), {"batch_size": 3}, 2),
    "transformers' auto": (changed(train_micro_batch_size_per_gpu="auto", train_batch_size="auto"), {}, 2),
    "auto bucket": (zero(reduce_bucket_size="auto"), {}, 2),
    "both precisions": (changed(fp16={"enabled": True}), {}, 1),
    "both precisions and a flag": (changed(fp16={"enabled": True}), BF16, 1),
    "fp16 on a CPU": (changed(bf16={"enabled": False}, fp16={"enabled": True}), {}, 1),
    "a word for enabled": (changed(bf16={"enabled": "true"}), {}, 1),
    "no precision": (changed(without="bf16"), {}, 1),
    "no optimizer": (changed(without="optimizer"), {}, 1),
    "unknown optimizer": (changed(optimizer={"type": "AdamX"}), {}, 1),
    "no learning rate": (changed(optimizer={"type": "AdamW"}), {}, 1),
    "negative learning rate": (params(lr=-1), {}, 1),
    "betas above 1": (params(betas=[1.9, 0.95]), {}, 1),
    "Adam": (changed(optimizer={"type": "Adam", "params": {"lr": 1e-3, "weight_decay": 0.1}}), {}, 1),
    "an optimizer that ZeRO has not tested": (changed(optimizer={"type": "SGD", "params": {"lr": 1e-3}}), {}, 1),
    "the same, allowed": (
        changed(optimizer={"type": "SGD", "params": {"lr": 1e-3}}, zero_allow_untested_optimizer=True),
        {},
        1,
    ),
    "unknown scheduler": (changed(scheduler={"type": "Warmup"}), {}, 1),
    "scheduler without its length": (changed(scheduler={"type": "WarmupDecayLR", "params": {}}), {}, 1),
    "cosine scheduler": (
        changed(scheduler={"type": "WarmupCosineLR", "params": {"total_num_steps": 100, "warmup_num_steps": 10}}),
        {},
        1,
    ),
    "flags": (SOUND, FP32 | {"batch_size": 2, "gradient_accumulation_steps": 4, "lr": 1e-4, "weight_decay": 0.0}, 2),
    "stage 0": (zero(stage=0), {}, 1),
    "no stage": (changed(zero_optimization={}), {}, 1),
    "stage 4": (zero(stage=4), {}, 1),
    "a word for a stage": (zero(stage="two"), {}, 1),
    "stage 1": (zero(stage=1), {}, 1),
    "stage 3": (zero(stage=3), {}, 1),
    "negative bucket": (zero(reduce_bucket_size=-5), {}, 1),
    "huge bucket": (zero(reduce_bucket_size=5e8, overlap_comm=True), {}, 1),
    "stage 3 keys at stage 2": (zero(stage3_prefetch_bucket_size=1, sub_group_size=1), {}, 1),
    "parameters offloaded at stage 2": (zero(offload_param=CPU), {}, 1),
    "NVMe at stage 2": (zero(offload_optimizer={"device": "nvme", "nvme_path": "/"}), {}, 1),
    "NVMe without a folder": (zero(STAGE_3, offload_param={"device": "nvme", "nvme_path": "/none"}), {}, 1),
    "NVMe": (zero(STAGE_3, offload_param={"device": "nvme", "nvme_path": "/"}), {}, 1),
    "unknown device": (zero(STAGE_3, offload_param={"device": "disk"}), {}, 1),
    "part of an offload at stage 2": (zero(OFFLOAD, offload_optimizer=CPU | {"ratio": 0.5}), {}, 1),
    "deprecated offload": (zero(cpu_offload=True), {}, 1),
    "what DeepSpeed has removed": (changed(elasticity={"enabled": True}), {}, 1),
}


def verdicts(path: Path, ranks: int = 1, **options: object) -> tuple[str, list]:
    host = {"script": None, "world_size": ranks, "device": "cpu", "parameters": None, "vocab_size": 50257}
    flags = load_script(SCRIPTS[1]).build_parser().parse_args([])
    own = {name: options.pop(name) for name in list(options) if name in host}
    return LINT.lint(str(path), argparse.Namespace(**vars(flags) | options), argparse.Namespace(**host | own))


def write(tmp_path: Path, content: object) -> Path:
    path = tmp_path / "ds.json"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return path


def script_says(script: str, path: Path, ranks: int, flags: dict, monkeypatch: pytest.MonkeyPatch) -> str:
    """The script's own message, without white space at line ends; empty where it takes the file."""
    module = load_script(script)
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 0)  # as in a run; without a group DeepSpeed assumes one rank
    monkeypatch.setattr("deepspeed.comm.get_world_size", lambda: ranks)
    try:
        module.load_ds_config(argparse.Namespace(ds_config=str(path), **flags), torch.device("cpu"))
    except module.UserError as error:
        return " ".join(str(error).split())
    return ""


def as_said(checks: list) -> str:
    return " ".join(": ".join(filter(None, check[2:])) for check in checks if check.verdict == "FAIL")


@pytest.mark.parametrize("case", CASES)
def test_the_script_and_the_linter_agree(tmp_path, monkeypatch, case):
    content, flags, ranks = CASES[case]
    path = write(tmp_path, content)
    script, checks = verdicts(path, ranks, **flags)
    said = script_says(script, path, ranks, flags, monkeypatch)
    assert said.removeprefix(f"--ds_config {path}: ") == as_said(checks).removeprefix(f"--ds_config {path}: ")
    assert {check.verdict for check in checks} <= {"ok", "warn", "FAIL"}


@pytest.mark.parametrize("script", list(dict.fromkeys(ZERO.values())))
@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.json")), ids=lambda path: path.stem)
def test_they_agree_on_every_config_and_script(monkeypatch, tmp_path, path, script):
    (tmp_path / "nvme").mkdir()
    monkeypatch.chdir(tmp_path)
    name, checks = verdicts(path, 2, script=script)
    said = script_says(script, path, 2, {}, monkeypatch)
    assert (name, said.removeprefix(f"--ds_config {path}: ")) == (script, as_said(checks))
    fitting = verdicts(path, 2)[0]
    multihosts = script == ZERO["multihosts"] and fitting == ZERO["zero2"]
    assert ("FAIL" in {check.verdict for check in checks}) == (script != fitting and not multihosts)
    assert "warn" not in {check.verdict for check in checks}  # the collection's own files give no cause


def test_sound_and_broken_cases_are_both_many(tmp_path):
    stopped = 0
    for content, flags, ranks in CASES.values():
        stopped += bool(as_said(verdicts(write(tmp_path, content), ranks, **flags)[1]))
    assert (len(CASES), stopped) == (71, 46)


WARNINGS: dict[str, tuple[dict, dict, int, dict[str, str]]] = {  # JSON, options, ranks, key and found of each warn
    "nothing": (SOUND, {}, 2, {}),
    "the tutorial's ZeRO-1": (
        TUTORIAL["ZeRO-1"],
        BF16,
        2,
        {
            "data_types.grad_accum_dtype": "2 micro batches are summed in bf16",
            "scheduler": "WarmupLR, wins over --lr, --warmup_steps and the cosine decay",
            "zero_optimization.reduce_bucket_size": "500,000,000 elements, 0.93 GiB",
            "zero_optimization.allgather_partitions": "does nothing here",
        }
        | {f"fp16.{key}": "does nothing here" for key in TUTORIAL["ZeRO-1"]["fp16"] if key != "enabled"},
    ),
    "a batch for two ranks": (changed(train_batch_size=16), {}, 2, {"train_batch_size": "16, right for 2 ranks only"}),
    "numbers left out": (
        changed(without="train_micro_batch_size_per_gpu", optimizer={"type": "AdamW"}),
        {},
        2,
        {"train_micro_batch_size_per_gpu": "1 by default", "optimizer.params.lr": "0.001 by default"},
    ),
    "Adam with weight decay": (
        changed(optimizer={"type": "Adam", "params": {"lr": 1e-3, "weight_decay": 0.1}}),
        {},
        1,
        {"optimizer.type": "Adam, which DeepSpeed runs as AdamW"},
    ),
    "Adam without": (changed(optimizer={"type": "Adam", "params": {"lr": 1e-3}}), {}, 1, {}),
    "sums in fp32": (changed(gradient_accumulation_steps=2, data_types={"grad_accum_dtype": "fp32"}), {}, 1, {}),
    "sums in fp32 at stage 1": (
        zero(changed(gradient_accumulation_steps=2, data_types={"grad_accum_dtype": "fp32"}), stage=1),
        {},
        1,
        {
            "zero_optimization.reduce_bucket_size": "does nothing here",
            "data_types.grad_accum_dtype": "fp32, for which stage 1 takes BF16_Optimizer: the script cannot read its "
            "states and ends at step 2",
        },
    ),
    "a scheduler that multiplies the rate": (
        changed(scheduler={"type": "WarmupLR", "params": {"warmup_num_steps": 10}}),
        {},
        1,
        {"scheduler": "WarmupLR, wins over --warmup_steps and the cosine decay"},
    ),
    "keys of stage 3": (
        zero(stage3_max_live_parameters=1, sub_group_size=1, offload_param={"device": "none"}),
        {},
        1,
        dict.fromkeys(
            [f"zero_optimization.{key}" for key in ("stage3_max_live_parameters", "sub_group_size", "offload_param")],
            "does nothing here",
        ),
    ),
    "keys of stages 1 and 2": (
        zero(STAGE_3, allgather_bucket_size=1000, round_robin_gradients=True),
        {},
        1,
        dict.fromkeys(
            [f"zero_optimization.{key}" for key in ("allgather_bucket_size", "round_robin_gradients")],
            "does nothing here",
        ),
    ),
    "NVMe keys beside a CPU": (
        zero(OFFLOAD, offload_optimizer=CPU | {"nvme_path": "/", "fast_init": True, "cpuadam_cores_perc": 0.5}),
        {},
        1,
        dict.fromkeys(
            [f"zero_optimization.offload_optimizer.{key}" for key in ("nvme_path", "fast_init", "cpuadam_cores_perc")],
            "does nothing here",
        ),
    ),
    "sections for nobody": (
        changed(aio={"queue_depth": 8}, activation_checkpointing={"profile": True}, autotuning={"enabled": False}),
        {},
        1,
        dict.fromkeys(("aio", "activation_checkpointing", "autotuning"), "does nothing here"),
    ),
    "unknown keys where nobody looks": (
        changed(flops_profiler={"enable": True}, checkpoint={"xyzzy": 1}),
        {},
        1,
        {"flops_profiler.enable": "unknown key", "checkpoint.xyzzy": "unknown key"},
    ),
    "deprecated": (zero(cpu_offload=False), {}, 1, {"zero_optimization.cpu_offload": "deprecated"}),
    "buckets beside a small model": (
        zero(STAGE_3, reduce_bucket_size=200_000),
        {"n_layer": 2, "n_head": 4, "d_model": 64, "block_size": 32, "vocab_size": 1024},
        1,
        {
            "zero_optimization.reduce_bucket_size": "200,000 elements, 0.00 GiB",
            "zero_optimization.stage3_prefetch_bucket_size": "5,000,000 elements, 0.01 GiB",
        },
    ),
    "a threshold above every parameter": (
        zero(STAGE_3, stage3_param_persistence_threshold=40_000_000),
        {},
        1,
        {"zero_optimization.stage3_param_persistence_threshold": "40,000,000 elements, 0.07 GiB"},
    ),
    "parameters given": (
        zero(reduce_bucket_size=5_000_001, overlap_comm=True),
        {"parameters": 5e6},
        1,
        {"zero_optimization.reduce_bucket_size": "5,000,001 elements, 0.02 GiB"},
    ),
    "DeepSpeed's own bucket": (
        changed(zero_optimization={"stage": 2}),
        FP32,
        1,
        {
            "zero_optimization.reduce_bucket_size": "500,000,000 elements, 1.86 GiB, DeepSpeed's default",
            "bf16.check_grad_overflow": "does nothing here",
        },
    ),
    "a bucket that is not allocated": (zero(reduce_bucket_size=5e8, contiguous_gradients=False), {}, 1, {}),
    "NVMe buffers too small": (
        zero(STAGE_3, offload_param={"device": "nvme", "nvme_path": "/", "buffer_size": 19_000_000, "buffer_count": 4}),
        {},
        2,
        {"zero_optimization.offload_param.buffer_size": "19,000,000 elements, 0.14 GiB"},
    ),
    "NVMe buffers that fit four ranks": (
        zero(STAGE_3, offload_param={"device": "nvme", "nvme_path": "/", "buffer_size": 19_000_000}),
        {},
        4,
        {},
    ),
    "transformers' auto": (
        zero(reduce_bucket_size="auto"),
        {"parameters": 1e9},
        1,
        {"-": "auto"},
    ),
    "bf16 on a GPU that is not here": (SOUND, {"device": "cuda"}, 1, {"bf16": "no GPU here to ask"}),
}


@pytest.mark.parametrize("case", WARNINGS)
def test_what_it_warns_of(tmp_path, monkeypatch, case):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    content, options, ranks, expected = WARNINGS[case]
    _, checks = verdicts(write(tmp_path, content), ranks, **options)
    assert {check.key: check.found for check in checks if check.verdict != "ok"} == expected
    assert all(check.wanted for check in checks if check.verdict == "warn")


def test_who_wins_between_flag_and_json(tmp_path):
    flags = FP32 | {"batch_size": 2, "lr": 1e-4}
    _, checks = verdicts(write(tmp_path, SOUND), 3, **flags)
    rows = {check.key: (check.verdict, check.found, check.wanted) for check in checks}
    assert rows["train_micro_batch_size_per_gpu"][1] == "2 by --batch_size, not the JSON's 8"
    assert rows["gradient_accumulation_steps"][1] == "1 by the JSON"
    assert rows["optimizer.params.lr"][1] == "0.0001 by --lr, not the JSON's 0.0006"
    assert rows["optimizer.params.weight_decay"][1:] == ("0.1 by the JSON", "--weight_decay wins where it is given")
    assert rows["precision"][1] == "fp32 by --precision, not the JSON's bf16"
    assert rows["train_batch_size"] == ("ok", "6 sequences a step", "micro batch 2 x accumulation 1 x 3 ranks")


def test_the_model_is_counted_as_the_ledger_counts_it(tmp_path):
    """167,680 parameters is what the ledger of this shape prints."""
    shape = {"n_layer": 2, "n_head": 4, "d_model": 64, "block_size": 32, "vocab_size": 1024}
    _, checks = verdicts(write(tmp_path, SOUND), **shape)
    wanted = next(check.wanted for check in checks if check.key == "zero_optimization.reduce_bucket_size")
    assert wanted == "at most the model's 167,680: it is allocated whole"


def test_keys_called_dead_are_not_passed_on_by_deepspeed():
    """What the engine hands to the optimizer of each stage, read from its source: a new version may revive a key."""
    from deepspeed.runtime.engine import DeepSpeedEngine
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    source = inspect.getsource(DeepSpeedEngine._configure_zero_optimizer)
    stages_1_2, stage_3 = source.split("zero_stage == ZeroStageEnum.weights")
    plain = stages_1_2.partition("zero_stage <= ZeroStageEnum.gradients")[2]
    assert "reduce_bucket_size=" in plain and "reduce_bucket_size=" in stage_3
    assert not [key for key in LINT.STAGE_3_KEYS if f" {key}=" in plain]
    assert not [key for key in LINT.STAGE_1_2_KEYS if f" {key}=" in stage_3]
    assert all(f" {key}=" in plain for key in (*LINT.STAGE_1_2_KEYS, *LINT.REDUCTION_KEYS))
    assert "allgather_partitions" not in source
    known = {name.removeprefix("stage3_") for name in DeepSpeedZeroConfig.model_fields}
    assert {*LINT.STAGE_3_KEYS, *LINT.STAGE_1_2_KEYS, *LINT.REDUCTION_KEYS} <= known


def lint(*words: object) -> subprocess.CompletedProcess:
    return run([sys.executable, str(ROOT / "scripts" / "lint_config.py"), *map(str, words)], timeout=120)


def test_command_line(tmp_path):
    broken = write(tmp_path, changed(gradient_cliping=1.0))
    done = lint("configs/zero2.json", broken, "--world_size", 4, "--device", "cpu", "--batch_size", 2)
    assert (done.returncode, done.stderr) == (1, "")
    lines = done.stdout.splitlines()
    assert lines[0] == "configs/zero2.json: DeepSpeed-GPTLike-ZeRO-2.py, world size 4, cpu"
    assert lines[1].split(None, 3) == ["ok", "zero_optimization.stage", "2", "as the script's"]
    assert lines[-3:] == [
        f"{broken}: DeepSpeed-GPTLike-ZeRO-2.py, world size 4, cpu",
        "FAIL  gradient_cliping  unknown key gradient_cliping  did you mean gradient_clipping?",
        "",
    ]


def test_json_and_another_script():
    done = lint("configs/multihosts.json", "--script", ZERO["multihosts"], "--json", "--device", "cpu")
    assert (done.returncode, done.stderr) == (0, "")
    (report,) = json.loads(done.stdout)
    facts = {"file": "configs/multihosts.json", "script": ZERO["multihosts"], "world_size": 1, "device": "cpu"}
    assert {name: report[name] for name in facts} == facts
    assert report["checks"][0] == {
        "verdict": "ok", "key": "zero_optimization.stage", "found": "2", "wanted": "as the script's"
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        ([], 2, "the following arguments are required: FILE"),
        (["configs/zero2.json", "--script", "GPTLike-Base.py"], 2, "invalid choice: 'GPTLike-Base.py'"),
        (["configs/zero2.json", "--world_size", "0"], 2, "--world_size 0: must be at least 1"),
        (["configs/zero2.json", "--parameters", "nan"], 2, "--parameters nan: must be at least 1"),
        (
            ["configs/zero2.json", "--d_model", "100", "--n_head", "12"],
            2,
            "--d_model 100 is not a multiple of --n_head",
        ),
        (["configs/zero2.json", "--batch_size", "-1"], 2, "--batch_size -1: must be above 0"),
        (["configs/zero2.json", "--world", "2"], 2, "unrecognized arguments: --world"),
        (["none.json"], 1, "FAIL  -  --ds_config none.json: no such file; the collection's own are in configs/"),
        (["configs"], 1, "FAIL  -  --ds_config configs is not JSON: [Errno 21] Is a directory: 'configs'"),
    ],
)
def test_wrong_usage_and_missing_files(monkeypatch, capsys, words, code, message):
    monkeypatch.setattr(sys, "argv", ["lint_config.py", *words])
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as stop:
        LINT.main()
    assert stop.value.code == code
    assert message in (capsys.readouterr().err if code == 2 else capsys.readouterr().out)


@pytest.mark.slow
@pytest.mark.parametrize("train_batch_size", [16, 32])
def test_real_ranks_say_the_same(tmp_path, train_batch_size):
    """16 is right for two ranks and one micro batch of 8 each, 32 is not: DeepSpeed counts real ranks here."""
    path = write(tmp_path, changed(train_batch_size=train_batch_size))
    flags = TINY | {"max_steps": 1, "ds_config": path, "output_dir": tmp_path / "run"}
    done = run(command(ZERO["zero2"], ranks=2, **flags))
    said = as_said(verdicts(path, 2)[1])
    assert (done.returncode, bool(said)) == ((0, False) if train_batch_size == 16 else (1, True))
    assert said in done.stderr
