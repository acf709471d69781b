"""The JSONs carry the recipe of GPTLike-Base.py, work in transformers' Trainer, and take flags and "auto"."""

import json

import pytest
from conftest import BASE, MULTIHOSTS, OFFLOAD, ROOT, ZERO1, ZERO2, ZERO3, load_script, script_args
from test_bad_input import AUTO, config

SCRIPT_OF = {
    "zero1": ZERO1,
    "zero2": ZERO2,
    "zero3": ZERO3,
    "zero_offload": OFFLOAD,
    "zero3_offload": OFFLOAD,
    "zero_infinity": OFFLOAD,
    "multihosts": MULTIHOSTS,
}


def load(name, path, *words):
    script = load_script(name)
    args = script_args(script, *words)
    args.ds_config = str(path)
    return script.load_ds_config(args), args


@pytest.mark.parametrize("name", SCRIPT_OF)
def test_recipe(name):
    base = load_script(BASE)
    found, args = load(SCRIPT_OF[name], ROOT / "configs" / f"{name}.json")
    assert {flag: getattr(args, flag) for flag in base.DEFAULTS} == base.DEFAULTS
    params = found["optimizer"]["params"]
    assert (tuple(params["betas"]), params["eps"]) == (base.BETAS, 1e-8)
    assert found["gradient_clipping"] == base.GRADIENT_CLIPPING
    zero = found["zero_optimization"]
    assert zero["overlap_comm"] if zero["stage"] < 3 else zero["stage3_prefetch_bucket_size"] >= 7_100_000


@pytest.mark.parametrize("name", SCRIPT_OF)
def test_trainer_takes_it_unchanged(name, tmp_path):
    from transformers import TrainingArguments

    path = ROOT / "configs" / f"{name}.json"
    words = {"per_device_train_batch_size": 8, "learning_rate": 6e-4, "weight_decay": 0.1, "max_grad_norm": 1.0}
    words |= {"adam_beta1": 0.9, "adam_beta2": 0.95, "bf16": True, "use_cpu": True}
    args = TrainingArguments(output_dir=str(tmp_path), deepspeed=str(path), **words)
    args.hf_deepspeed_config.trainer_config_process(args)
    assert args.hf_deepspeed_config.mismatches == []


def test_auto_is_the_scripts_own_numbers(tmp_path, capsys):
    (tmp_path / "auto.json").write_text(AUTO)
    found, args = load(ZERO1, tmp_path / "auto.json")
    own = load_script(BASE).DEFAULTS
    assert {flag: getattr(args, flag) for flag in own} == own
    assert "auto" not in json.dumps(found)
    assert found["zero_optimization"]["reduce_bucket_size"] == 5_000_000 and not found["fp16"]["enabled"]
    assert "this run takes gradient_clipping 1.0 instead of auto" in capsys.readouterr().out


def test_scheduler_auto(tmp_path):
    params = dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto")
    (tmp_path / "s.json").write_text(config(scheduler={"type": "WarmupDecayLR", "params": params}))
    found, args = load(ZERO1, tmp_path / "s.json", "--lr", "1e-3", "--warmup_steps", "7")
    numbers = {"total_num_steps": 99, "warmup_max_lr": args.lr}
    load_script(ZERO1).replace_auto(found, numbers)  # as main() does once it knows
    expected = {"warmup_min_lr": 0.0, "warmup_max_lr": 1e-3, "warmup_num_steps": 7, "total_num_steps": 99}
    assert found["scheduler"]["params"] == expected


def test_flags_win_and_say_so(tmp_path, capsys):
    (tmp_path / "ds.json").write_text(config(train_batch_size=8))
    words = "--batch_size 2 --gradient_accumulation_steps 3 --lr 1e-3 --weight_decay 0 --precision fp32".split()
    found, args = load(ZERO1, tmp_path / "ds.json", *words)
    assert found["train_micro_batch_size_per_gpu"] == 2 and found["gradient_accumulation_steps"] == 3
    assert found["optimizer"]["params"]["lr"] == 1e-3 and found["optimizer"]["params"]["weight_decay"] == 0
    assert not found["bf16"]["enabled"] and args.precision == "fp32" and "train_batch_size" not in found
    said = capsys.readouterr().out
    assert "this run takes train_micro_batch_size_per_gpu 2 instead of 8" in said and "'lr': 0.001" in said


def test_json_numbers_hold_where_no_flag_is(tmp_path):
    text = config(optimizer={"type": "Adam", "params": {"lr": 1e-4}}, train_micro_batch_size_per_gpu=3, bf16={})
    (tmp_path / "ds.json").write_text(text)
    _, args = load(ZERO1, tmp_path / "ds.json")
    assert (args.batch_size, args.lr, args.weight_decay, args.precision) == (3, 1e-4, 0.0, "fp32")


def test_total_batch_alone_gives_the_micro_batch(tmp_path):
    (tmp_path / "ds.json").write_text(
        '{"train_batch_size": 32, "zero_optimization": {"stage": 1}} // comments are legal'
    )
    found, args = load(ZERO1, tmp_path / "ds.json")
    assert args.batch_size == 32 and found["optimizer"]["type"] == "AdamW"
