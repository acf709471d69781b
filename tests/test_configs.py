"""configs/: native DeepSpeed JSON, one recipe in all, taken by DeepSpeed's own reader and by transformers' Trainer; and
what the scripts say of a JSON that is wrong."""

import argparse
import json

import pytest
import torch
from conftest import BIN, ROOT, ZERO, free_port, load_script, require_nvme, run

CONFIGS = sorted((ROOT / "configs").glob("*.json"))
BATCH = {"train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"}
GOOD = json.loads((ROOT / "configs" / "zero2.json").read_text())


def test_one_file_per_script_and_variant():
    names = ["multihosts", "zero1", "zero2", "zero3", "zero3_offload", "zero_infinity", "zero_offload"]
    assert [path.stem for path in CONFIGS] == names
    for config, script in ZERO.items():
        default = load_script(script).DEFAULT_DS_CONFIG
        assert default == f"configs/{config}.json" or config == "zero3_offload"


def test_equal_outside_zero_optimization_and_batch():
    recipes = []
    for path in CONFIGS:
        config = json.loads(path.read_text())
        recipes.append({key: value for key, value in config.items() if key not in BATCH | {"zero_optimization"}})
        order = ["train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "optimizer", "gradient_clipping"]
        assert list(config) == [*order, "bf16", "zero_optimization"], path
        assert "auto" not in path.read_text()
    assert all(recipe == recipes[0] for recipe in recipes)


def load(tmp_path, content: object, script: str = ZERO["zero2"], **flags: object) -> tuple[dict, argparse.Namespace]:
    path = tmp_path / "ds.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    module = load_script(script)
    args = argparse.Namespace(ds_config=str(path), **flags)
    return module.load_ds_config(args, torch.device("cpu")), args


def changed(**changes: object) -> dict:
    return json.loads(json.dumps(GOOD)) | changes


def zero(**changes: object) -> dict:
    return changed(zero_optimization=GOOD["zero_optimization"] | changes)


CPU = {"device": "cpu"}
BROKEN = {
    "empty file": ("", "holds no settings"),
    "empty object": ("{}", "holds no settings"),
    "a list": ("[1, 2]", "holds no settings"),
    "a number for a section": (changed(zero_optimization=2), "zero_optimization is not an object"),
    "a list for parameters": (changed(optimizer={"type": "AdamW", "params": [1]}), "optimizer.params is not an object"),
    "a word for an optimizer": (changed(optimizer="AdamW"), "optimizer is not an object"),
    "a word for a micro batch": (
        changed(train_micro_batch_size_per_gpu="8"),
        "train_micro_batch_size_per_gpu is '8', not",
    ),
    "negative learning rate": (
        changed(optimizer={"type": "Adam", "params": {"lr": -1}}),
        "optimizer.params.lr is -1, not",
    ),
    "an unknown optimizer": (changed(optimizer={"type": "AdamX", "params": {}}), "AdamX"),
    "both precisions": (changed(fp16={"enabled": True}), "bf16 and fp16"),
    "not JSON": ('{"optimizer": {"type": "AdamW"', "is not JSON"),
    "unknown key": (changed(gradient_cliping=1.0), "unknown key gradient_cliping: did you mean gradient_clipping?"),
    "unknown stage key": (
        zero(reduce_buket_size=1),
        "zero_optimization.reduce_buket_size: did you mean reduce_bucket_size",
    ),
    "unknown optimizer parameter": (
        changed(optimizer={"type": "AdamW", "params": {"learning_rate": 1}}),
        "unknown key optimizer.params.learning_rate",
    ),
    "unknown offload key": (
        zero(offload_optimizer={"devise": "cpu"}),
        "offload_optimizer.devise: did you mean device?",
    ),
    "stage 0": (zero(stage=0), "this JSON is for GPTLike-Base.py"),
    "stage 1": (zero(stage=1), "this JSON is for DeepSpeed-GPTLike-ZeRO-1.py"),
    "stage 3": (zero(stage=3), "this JSON is for DeepSpeed-GPTLike-ZeRO-3.py"),
    "offload": (zero(offload_optimizer=CPU), "this JSON is for DeepSpeed-GPTLike-ZeRO-Offload.py"),
    "no optimizer": ({k: v for k, v in GOOD.items() if k != "optimizer"}, "optimizer.type is None: write"),
    "batch arithmetic": (changed(train_batch_size=32), "train_batch_size 32 is not micro batch 8 x accumulation 1 x 1"),
    "fp16 on a CPU": (changed(bf16={"enabled": False}, fp16={"enabled": True}), "fp16 does not run on a CPU"),
    "a word for a number": (zero(reduce_bucket_size="many"), "reduce_bucket_size"),
    "negative bucket": (zero(reduce_bucket_size=-5), "reduce_bucket_size"),
    "zero micro batch": (changed(train_micro_batch_size_per_gpu=0), "train_micro_batch_size_per_gpu is 0, not"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_json_is_one_message(tmp_path, case):
    content, message = BROKEN[case]
    module = load_script(ZERO["zero2"])
    with pytest.raises(module.UserError) as error:
        load(tmp_path, content)
    assert message in str(error.value) and "ds.json" in str(error.value)


def test_all_problems_come_at_once(tmp_path):
    module = load_script(ZERO["zero2"])
    with pytest.raises(module.UserError) as error:
        load(tmp_path, zero(stage=3) | {"optimiser": {}, "sheduler": {}})
    assert all(word in str(error.value) for word in ("optimiser", "did you mean scheduler?", "ZeRO-3.py"))


def test_a_missing_json_and_one_for_another_script(tmp_path):
    module = load_script(ZERO["zero_offload"])
    for path, message in (
        (tmp_path / "none.json", "no such file; the collection's own are in configs/"),
        (ROOT / "configs" / "zero2.json", "nothing is offloaded: run DeepSpeed-GPTLike-ZeRO-2.py"),
        (ROOT / "configs" / "zero_infinity.json", "nvme_path nvme is no folder"),
    ):
        with pytest.raises(module.UserError, match=message):
            module.load_ds_config(argparse.Namespace(ds_config=str(path)), torch.device("cpu"))
    wrong = zero(offload_param=CPU)
    with pytest.raises(module.UserError, match="stage 2 offloads the optimizer"):
        load(tmp_path, wrong, ZERO["zero_offload"])


def test_bf16_on_a_gpu_without_it(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    module = load_script(ZERO["zero2"])
    path = ROOT / "configs" / "zero2.json"
    with pytest.raises(module.UserError, match="Tesla T4 has no bf16: use --precision fp16 or fp32"):
        module.load_ds_config(argparse.Namespace(ds_config=str(path)), torch.device("cuda", 0))


def test_given_flags_win_and_say_what_they_replace(tmp_path, capsys):
    config, args = load(tmp_path, GOOD, batch_size=2, lr=1e-4, weight_decay=0.1, precision="fp32")
    assert config["train_micro_batch_size_per_gpu"] == args.batch_size == 2
    assert config["optimizer"]["params"]["lr"] == 1e-4 and config["bf16"]["enabled"] is False
    assert (args.gradient_accumulation_steps, args.weight_decay, args.zero_stage) == (1, 0.1, 2)
    lines = capsys.readouterr().out.splitlines()
    path = tmp_path / "ds.json"
    assert [line for line in lines if "replaces" in line] == [
        f"--batch_size 2 replaces 8 of {path}",
        f"--lr 0.0001 replaces 0.0006 of {path}",
        f"--precision fp32 replaces bf16 of {path}",
    ]


def test_the_tutorials_own_json_works(tmp_path):
    """train_batch_size alone or with a micro batch, no accumulation, fp16 (which a CPU refuses)."""
    tutorial = {
        "train_batch_size": 32,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "Adam", "params": {"lr": 3e-4}},
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 2, "overlap_comm": True, "contiguous_gradients": True},
    }
    config, args = load(tmp_path, "// a comment, as DeepSpeed allows\n" + json.dumps(tutorial), precision="bf16")
    assert (args.batch_size, args.precision, config["bf16"]["enabled"]) == (32, "bf16", True)


def test_a_scheduler_in_the_json_is_obeyed(tmp_path):
    scheduler = {"type": "WarmupLR", "params": {"warmup_min_lr": 0, "warmup_max_lr": 1e-3, "warmup_num_steps": 4,
                                                "warmup_type": "linear"}}  # fmt: skip
    path = tmp_path / "ds.json"
    path.write_text(json.dumps(changed(scheduler=scheduler)))
    from conftest import TINY, command

    flags = TINY | {"max_steps": 6, "log_interval": 1, "precision": "fp32", "batch_size": 1}
    done = run(command(ZERO["zero2"], launcher="python", ds_config=path, output_dir=tmp_path / "run", **flags))
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rates = [record["lr"] for record in map(json.loads, lines) if "lr" in record]
    assert rates[-1] == pytest.approx(1e-3) and rates[0] < 5e-4


TRAINER = """
import sys, torch, transformers
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments
config, out = sys.argv[1:]
arguments = TrainingArguments(out, deepspeed=config, max_steps=3, per_device_train_batch_size=8, learning_rate=6e-4,
    weight_decay=0.1, adam_beta2=0.95, max_grad_norm=1.0, bf16=True, use_cpu=True, report_to=[], logging_steps=1,
    save_strategy="no", gradient_accumulation_steps=1, disable_tqdm=True)
model = GPT2LMHeadModel(GPT2Config(vocab_size=128, n_positions=16, n_embd=32, n_layer=1, n_head=2))
data = [{"input_ids": torch.arange(16) + i % 9, "labels": torch.arange(16) + i % 9} for i in range(64)]
result = Trainer(model, arguments, train_dataset=data).train()
print("STEPS", result.global_step, "LOSS", round(result.training_loss, 3))
"""


OFTEN = ("zero2", "zero3")  # the others only in scripts/test.sh --all


@pytest.mark.slow
@pytest.mark.timeout(900)  # DeepSpeed's NVMe op takes minutes to compile where libaio is there
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[] if path.stem in OFTEN else pytest.mark.drill, id=path.stem) for path in CONFIGS],
)
def test_transformers_trainer_takes_the_file_as_it_is(tmp_path, path):
    if path.stem == "zero_infinity":
        require_nvme()
        (tmp_path / "nvme").mkdir()
    (tmp_path / "trainer.py").write_text(TRAINER)
    launch = [str(BIN / "torchrun"), "--nproc_per_node", "1", "--master_port", str(free_port())]
    done = run([*launch, "trainer.py", str(path), str(tmp_path / "out")], cwd=tmp_path, timeout=800)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "STEPS 3 LOSS" in done.stdout
