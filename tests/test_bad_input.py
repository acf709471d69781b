"""Wrong input to every script and tool: one message, the right exit code, no traceback, no hang, nothing overwritten.

A row of the table is a command, its exit code and what it says. All run in one working folder that holds a user's own
files and an earlier run; every name and byte in it has to be there afterwards. Below the table, inputs that Hypothesis
makes up: JSON files, flags, damaged caches and manifests.
"""

import argparse
import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import safetensors.torch
import torch
from conftest import BASE, BIN, ROOT, SCRIPTS, ZERO, load_script, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ZERO1, ZERO2, ZERO3, OFFLOAD, MULTIHOSTS = (ZERO[name] for name in ("zero1", "zero2", "zero3", "zero_offload",
                                                                    "multihosts"))  # fmt: skip
TINY = "--dataset texts --tokenizer bpe:300 --n_layer 1 --n_head 2 --d_model 32 --block_size 16 --max_steps 2".split()
GOOD = json.loads((ROOT / "configs" / "zero2.json").read_text())
SLOWEST = 40  # seconds for one command on a busy machine
WEIRD = ["a run", "-x", "two\nlines", "$(touch x)", "`touch x`", "it's \"quoted\"", "prüfung 価値", "a$b$c"]


class Row(NamedTuple):
    script: str
    words: list[str]
    code: int  # 2: wrong usage; 1: a wrong file, config, data or environment
    message: str
    env: dict[str, str] = {}

    def name(self) -> str:
        words = " ".join(word if len(word) < 40 else f"{word[:20]}..." for word in self.words)
        return f"{self.script} {words} {' '.join(f'{k}={v[:20]}' for k, v in self.env.items())}".encode(
            "ascii", "backslashreplace").decode().strip()  # fmt: skip


def changed(**changes: object) -> dict:
    return copy.deepcopy(GOOD) | changes


def zero(**changes: object) -> dict:
    return changed(zero_optimization=GOOD["zero_optimization"] | changes)


def optimizer(**params: object) -> dict:
    return changed(optimizer={"type": "AdamW", "params": GOOD["optimizer"]["params"] | params})


# name of the file in json/: what is in it, what is said of it
JSON: dict[str, tuple[object, str]] = {
    "empty": (b"", "holds no settings"),
    "binary": (bytes(range(256)), "is not JSON"),
    "half": (json.dumps(GOOD).encode()[:100], "is not JSON"),
    "list": ([GOOD], "holds no settings"),
    "word": ("zero2", "holds no settings"),
    "null": (None, "holds no settings"),
    "deep": (b"[" * 100_000, "is not JSON"),
    "deep_key": (b'{"optimizer":' * 50_000, "is not JSON"),
    "twice": (b'{"bf16": {"enabled": true}, ' + json.dumps(GOOD).encode()[1:], "bf16"),
    "unknown": (changed(gradient_cliping=1), "unknown key gradient_cliping: did you mean gradient_clipping?"),
    "unknown_below": (zero(reduce_bucket=1), "unknown key zero_optimization.reduce_bucket: did you mean "),
    "unknown_adam": (optimizer(learning_rate=1), "unknown key optimizer.params.learning_rate"),
    "null_section": (changed(zero_optimization=None), "zero_optimization is not an object"),
    "null_optimizer": (changed(optimizer=None), "optimizer is not an object"),
    "null_bf16": (changed(bf16=None), "bf16 is not an object"),
    "null_rate": (optimizer(lr=None), "optimizer.params.lr is None, not a positive number"),
    "null_batch": (changed(train_micro_batch_size_per_gpu=None), "train_micro_batch_size_per_gpu is None, not"),
    "true_batch": (changed(gradient_accumulation_steps=True), "gradient_accumulation_steps is True, not"),
    "rate_nan": (optimizer(lr=float("nan")), "is not JSON"),
    "rate_1e999": (json.dumps(GOOD).replace("0.0006", "1e999").encode(), "is not JSON"),
    "betas_word": (optimizer(betas="many"), "json/betas_word.json:\n  optimizer"),
    "betas_one": (optimizer(betas=[0.9]), "json/betas_one.json:\n  optimizer"),
    "betas_two": (optimizer(betas=[0.9, 2]), "json/betas_two.json:\n  optimizer"),
    "eps_word": (optimizer(eps="1e-8"), "json/eps_word.json:\n  optimizer"),
    "decay_word": (optimizer(weight_decay="0.1"), "json/decay_word.json:\n  optimizer"),
    "decay_below_0": (optimizer(weight_decay=-1), "json/decay_below_0.json:\n  optimizer"),
    "sgd": (changed(optimizer={"type": "SGD", "params": {"lr": 0.1}}), "json/sgd.json:\n  optimizer.type is SGD"),
    "sgd_slip": (changed(optimizer={"type": "SGD", "params": {"lr": 1, "momentun": 1}}), "'momentun'"),
    "clipping_word": (changed(gradient_clipping="1"), "gradient_clipping is '1', not a positive number"),
    "enabled_word": (changed(bf16={"enabled": "false"}), "bf16.enabled is 'false'"),
    "stage_word": (zero(stage="2"), "stage"),
    "stage_none": (changed(zero_optimization={}), "GPTLike-Base.py, which takes no JSON"),
    "stage_list": (zero(stage=[2]), "GPTLike-Base.py, which takes no JSON"),
    "stage_1": (zero(stage=1), "this JSON is for DeepSpeed-GPTLike-ZeRO-1.py"),
    "offload_list": (zero(offload_optimizer=["cpu"]), "zero_optimization.offload_optimizer is not an object"),
    "offload_word": (zero(offload_param="cpu"), "zero_optimization.offload_param is not an object"),
    "both": (changed(fp16={"enabled": True}), "bf16 and fp16 are both enabled"),
    "batch": (changed(train_batch_size=7), "train_batch_size 7 is not micro batch 8 x accumulation 1 x 1 ranks = 8"),
    "batch_huge": (changed(train_micro_batch_size_per_gpu=2**40), "_per_gpu is 1099511627776, not a positive number"),
    "optimizer_module": (changed(optimizer={"type": "lr_scheduler"}), "optimizer.type is lr_scheduler"),
    "optimizer_list": (changed(optimizer={"type": ["AdamW"]}), "optimizer.type is ['AdamW']"),
    "scheduler_word": (changed(scheduler="cosine"), "scheduler is not an object"),
    "scheduler_type": (changed(scheduler={"type": "Cosine", "params": {}}), "scheduler.type is Cosine"),
    "scheduler_slip": (changed(scheduler={"type": "WarmupLR", "params": {"warmup": 1}}), "'warmup'"),
    "elastic": (changed(elasticity={"enabled": True}), "'elasticity'"),
    "aio_word": (changed(aio="fast"), "json/aio_word.json:\n  "),
}  # fmt: skip

# In the working folder, but not texts: path, content
FILES: dict[str, bytes] = {
    "notes.txt": b"mine\n",
    "settings.json": b'{"mine": true}\n',
    "metrics.jsonl.old": b"mine\n",
    "hostfile": b"node0 slots=1\nnode1 slots=1\n",
    "model/weights.bin": bytes(1000),
    "checkpoints/mine/data": b"mine",
    "texts/train.txt": "Ein Satz über naïve Cafés, the tower is 1,063 feet tall .\n".encode() * 60,
    "texts/valid.txt": b"The first of them is held out .\n" * 20,
    "data/no_train/valid.txt": b"text\n",
    "data/no_valid/train.txt": b"text\n" * 99,
    "data/empty/train.txt": b"",
    "data/spaces/train.txt": b" \n\t\n",
    "data/latin1/train.txt": b"caf\xe9\n" * 99,
    "data/formats/train.txt": b"text\n" * 99,
    "data/formats/train.raw": b"text\n" * 99,
    "data/folder/train.txt/inside": b"text\n",
    "data/not_parquet/train.parquet": b"PAR1 and no more",
    "data/short/train.txt": b"a b c d e f g\n" * 99,
    "data/short/valid.txt": b"a\n",
    "tokenizers/empty.json": b"",
    "tokenizers/list.json": b"[]",
    "tokenizers/other.json": b'{"mine": true}',
    "tokenizers/no_type.json": b'{"model": {"vocab": {}}}',
    "tokenizers/deep.json": b"[" * 100_000,
    "tokenizers/binary.json": bytes(range(256)),
    "script.py": b"print('never run')\n",
    "$(touch x).py": b"print('never run')\n",
    "-script.py": b"print('never run')\n",
}
STEP2 = "run/checkpoints/step2"

FLAGS = [  # of training scripts: words, message
    ("--n_layers 4", "unrecognized arguments: --n_layers 4"),
    ("--n_la 4", "unrecognized arguments: --n_la 4"),
    ("--over", "unrecognized arguments: --over"),
    ("extra", "unrecognized arguments: extra"),
    ("--n_layer", "argument --n_layer: expected one argument"),
    ("--n_layer 0", "--n_layer 0: must be above 0"),
    ("--batch_size -8", "--batch_size -8: must be above 0"),
    ("--block_size 99999999999", "--block_size 99999999999: must be below 2**31"),
    ("--lr nan", "--lr nan: must be above 0"),
    ("--dropout nan", "--dropout nan: must be at least 0"),
    ("--weight_decay inf", "--weight_decay inf: must be below 2**31"),
    ("--peak_tflops=-inf", "--peak_tflops -inf: must be above 0"),
    ("--epochs 1e3", "argument --epochs: invalid int value: '1e3'"),
    ("--seed", "argument --seed: expected one argument"),
    ("--lr ten", "argument --lr: invalid float value: 'ten'"),
    ("--precision FP32", "argument --precision: invalid choice: 'FP32'"),
    ("--overwrite=yes", "argument --overwrite: ignored explicit argument 'yes'"),
    ("--tokenizer bpe:10", "--tokenizer bpe:10: write bpe:SIZE"),
    ("--tokenizer bpe:x", "--tokenizer bpe:x: write bpe:SIZE"),
    ("--tokenizer bpe:-300", "--tokenizer bpe:-300: write bpe:SIZE"),
    (f"--tokenizer bpe:{'9' * 5000}", "write bpe:SIZE"),
    ("--n_head 5", "--d_model 32 is not a multiple of --n_head 5"),
    (f"--overwrite --output_dir run --resume {STEP2}", "--overwrite deletes"),
]  # fmt: skip
EMPTY = [  # a value that is an empty word
    (["--n_head", ""], "argument --n_head: invalid int value: ''"),
    (["--output_dir", ""], "--output_dir is empty"),
    (["--dataset", ""], "--dataset is empty"),
    (["--tokenizer", ""], "--tokenizer is empty"),
    (["--resume", ""], "--resume is empty"),
]
DATA = [
    ("--dataset nowhere", "--dataset nowhere: no such folder"),
    ("--dataset notes.txt", "--dataset notes.txt: no such folder"),
    (f"--dataset {'n' * 300}", "no such folder"),
    ("--dataset data/no_train", "data/no_train has no train* that ends in .txt"),
    ("--dataset data/no_valid", "data/no_valid has no val* that ends in .txt"),
    ("--dataset data/empty", "data/empty/train.txt is empty"),
    ("--dataset data/spaces", "data/spaces/train.txt is empty"),
    ("--dataset data/latin1", "cannot read data/latin1/train.txt: 'utf-8' codec can't decode byte 0xe9"),
    ("--dataset data/formats", "data/formats has train in several formats, keep one: train.raw, train.txt"),
    ("--dataset data/folder", "cannot read data/folder/train.txt: "),
    ("--dataset data/loop", "cannot read data/loop/train.txt: "),
    ("--dataset data/not_parquet", "cannot read data/not_parquet/train.parquet: "),
    ("--dataset data/no_text", "cannot read data/no_text/train.parquet: "),
    ("--dataset data/half_parquet", "cannot read data/half_parquet/train.parquet: "),
    ("--dataset data/null_text", "cannot read data/null_text/train.parquet: "),
    ("--dataset data/number_text", "cannot read data/number_text/train.parquet: "),
    ("--dataset data/no_rows", "--block_size 16 does not fit train: 0 tokens"),
    ("--dataset data/short", "--block_size 16 does not fit validation: "),
    ("--block_size 2000000000", "--block_size 2000000000 does not fit train: "),
    ("--tokenizer nowhere", "--tokenizer nowhere: nowhere is not a tokenizer.json"),
    ("--tokenizer data", "--tokenizer data: data/tokenizer.json is not a tokenizer.json"),
    (f"--tokenizer {'n' * 300}", "is not a tokenizer.json"),
    ("--tokenizer tokenizers/empty.json", "tokenizers/empty.json is not a tokenizer.json"),
    ("--tokenizer tokenizers/list.json", "tokenizers/list.json is not a tokenizer.json"),
    ("--tokenizer tokenizers/other.json", "tokenizers/other.json is not a tokenizer.json"),
    ("--tokenizer tokenizers/no_type.json", "--tokenizer tokenizers/no_type.json"),
    ("--tokenizer tokenizers/deep.json", "tokenizers/deep.json is not a tokenizer.json"),
    ("--tokenizer tokenizers/binary.json", "tokenizers/binary.json is not a tokenizer.json"),
    ("--tokenizer tokenizers/strict.json", "--tokenizer tokenizers/strict.json"),
    ("--tokenizer tokenizers/gap.json", "--tokenizer tokenizers/gap.json"),
]  # fmt: skip
OUTPUT = [  # of GPTLike-Base.py, which has made run/
    ("--output_dir notes.txt", "cannot write to --output_dir notes.txt: "),
    ("--output_dir notes.txt/run", "cannot write to --output_dir notes.txt/run: "),
    (f"--output_dir {'n' * 300}", "cannot write to --output_dir nnn"),
    ("--output_dir run --n_layer 2", f"{STEP2} has n_layer 1, this run 2: take the former"),
    ("--output_dir run --seed 1 --max_steps 9", f"{STEP2} has seed 42, this run 1: take the former"),
    ("--output_dir run --tokenizer bpe:290", f"{STEP2} has data and tokenizer "),
    ("--output_dir run --resume never", "run holds a run: add --overwrite, or choose another --output_dir"),
    ("--output_dir run --resume nowhere", "--resume nowhere: nowhere is not one checkpoint that is whole"),
    ("--resume nowhere", "--resume nowhere: nowhere is not one checkpoint that is whole"),
    ("--resume notes.txt", "--resume notes.txt: notes.txt is not one checkpoint that is whole on every rank"),
    ("--resume run", "--resume run: run is not one checkpoint that is whole on every rank"),
    ("--resume /", "--resume /: "),
    ("--resume run/checkpoints/**2", "--resume run/checkpoints/**2: "),
    (f"--resume {'n' * 300}", "is not one checkpoint that is whole on every rank"),
    ("--resume run/checkpoints/latest", "run/checkpoints/latest is not one checkpoint that is whole on every rank"),
    ("--resume broken/size/checkpoints/step2", "state.pt has 9 bytes instead of "),
    ("--resume broken/text/checkpoints/step2 --max_steps 3", "broken/text/checkpoints/step2"),
    ("--resume broken/zip/checkpoints/step2 --max_steps 3", "broken/zip/checkpoints/step2"),
    ("--resume broken/missing/checkpoints/step2 --max_steps 3", "broken/missing/checkpoints/step2"),
    ("--resume broken/other/checkpoints/step2 --max_steps 3", "broken/other/checkpoints/step2"),
    ("--resume broken/deep/checkpoints/step2", "broken/deep/checkpoints/step2 on host "),
    ("--resume broken/bare/checkpoints/step2 --max_steps 3", "broken/bare/checkpoints/step2 on host "),
    ("--resume broken/word/checkpoints/step2 --max_steps 3", "broken/word/checkpoints/step2 on host "),
    ("--output_dir broken/metrics --max_steps 3", "broken/metrics/metrics.jsonl"),
    ("--precision fp16", "fp16 does not run on a CPU: use --precision bf16 or fp32"),
    ("--d_model 2000000000", "not enough memory"),
]  # fmt: skip


def training_rows() -> list[Row]:
    rows = [Row(BASE, words.split(), 2, message) for words, message in FLAGS]
    rows += [Row(script, words.split(), 2, message) for script in SCRIPTS[1:]
             for words, message in FLAGS[:8:3]]  # fmt: skip
    rows += [Row(BASE, words, 2, message) for words, message in EMPTY]
    rows += [Row(BASE, words.split(), 1, message) for words, message in DATA + OUTPUT]
    rows += [Row(BASE, ["--output_dir", "run"], 0, "this run is finished: 2 steps, see run/summary.json")]
    for words, message in (
        ("--rendezvous_timeout 0", "--rendezvous_timeout 0: must be above 0"),
        ("--stall_timeout nan", "argument --stall_timeout: invalid int value: 'nan'"),
        ("--ds_config", "argument --ds_config: expected one argument"),
        ("--deepspeed_config x.json", "unrecognized arguments: --deepspeed_config x.json"),
    ):
        rows.append(Row(ZERO2, words.split(), 2, message))
    rows.append(Row(ZERO3, ["--ds_config", ""], 2, "--ds_config is empty"))
    rows += [Row(ZERO2, ["--ds_config", f"json/{name}.json"], 1, message) for name, (_, message) in JSON.items()]
    for script, words, message in (
        (ZERO2, "--ds_config nowhere.json", "--ds_config nowhere.json: no such file"),
        (ZERO2, "--ds_config json", "--ds_config json is not JSON: "),
        (ZERO2, f"--ds_config {'n' * 300}", "is not JSON: "),
        (ZERO1, "--ds_config configs/zero2.json", "this JSON is for DeepSpeed-GPTLike-ZeRO-2.py"),
        (ZERO3, "--ds_config configs/zero1.json", "this JSON is for DeepSpeed-GPTLike-ZeRO-1.py"),
        (ZERO3, "--ds_config configs/zero3_offload.json", "this JSON is for DeepSpeed-GPTLike-ZeRO-Offload.py"),
        (MULTIHOSTS, "--ds_config configs/zero3.json", "this JSON is for DeepSpeed-GPTLike-ZeRO-3.py"),
        (OFFLOAD, "--ds_config configs/zero3.json", "nothing is offloaded: run DeepSpeed-GPTLike-ZeRO-3.py"),
        (OFFLOAD, "--ds_config configs/zero_infinity.json", "offload_param.nvme_path nvme is no folder"),
        (OFFLOAD, "--ds_config json/path_number.json", "nvme_path 5 is no folder"),
        (OFFLOAD, "--ds_config json/offload_list.json", "zero_optimization.offload_optimizer is not an object"),
        (ZERO1, "--precision fp16", "fp16 does not run on a CPU"),
        (ZERO2, "--dataset data/latin1", "cannot read data/latin1/train.txt"),
        (ZERO3, "--tokenizer tokenizers/other.json", "tokenizers/other.json is not a tokenizer.json"),
        (OFFLOAD, "--output_dir notes.txt", "cannot write to --output_dir notes.txt: "),
    ):
        rows.append(Row(script, words.split(), 1, message))
    return rows


TOOLS = [  # that run in this process
    Row("compare_runs.py", [], 2, "the following arguments are required: RUN"),
    Row("compare_runs.py", ["run", "--colour", "red"], 2, "unrecognized arguments: --colour red"),
    Row("compare_runs.py", ["run", "--out", "there"], 2, "unrecognized arguments: --out there"),
    Row("compare_runs.py", ["-x"], 2, "the following arguments are required: RUN"),
    Row("compare_runs.py", ["nowhere"], 1, "nowhere has no metrics.jsonl: give the --output_dir of a training run"),
    Row("compare_runs.py", [""], 1, " has no metrics.jsonl: give the --output_dir of a training run"),
    Row("compare_runs.py", ["$(touch x)"], 1, "$(touch x) has no metrics.jsonl"),
    Row("compare_runs.py", ["run", "notes.txt"], 1, "notes.txt"),
    Row("compare_runs.py", ["n" * 300], 1, "File name too long"),
    Row("compare_runs.py", ["runs/binary"], 1, "runs/binary/metrics.jsonl"),
    Row("compare_runs.py", ["runs/no_step"], 1, "runs/no_step/metrics.jsonl, line 2 is no JSON object with a step: "),
    Row("compare_runs.py", ["runs/step_inf"], 1, "runs/step_inf/metrics.jsonl, line 1 is no JSON object with a step: "),
    Row("compare_runs.py", ["runs/step_word"], 1, "runs/step_word/metrics.jsonl, line 1 is no JSON object with a step"),
    Row("compare_runs.py", ["runs/deep"], 1, "runs/deep/metrics.jsonl, line 1 is no JSON object with a step: "),
    Row("compare_runs.py", ["runs/loss_word"], 1, "runs/loss_word/metrics.jsonl, line 1: loss is no number: 'low'"),
    Row("compare_runs.py", ["runs/loss_null"], 1, "runs/loss_null/metrics.jsonl, line 1: loss is no number: None"),
    Row("compare_runs.py", ["runs/args_list"], 1, "runs/args_list/args.json is no JSON object"),
    Row("compare_runs.py", ["runs/args_deep"], 1, "runs/args_deep/args.json is not JSON: "),
    Row("compare_runs.py", ["runs/summary_half"], 1, "runs/summary_half/summary.json is not JSON: "),
    Row("compare_runs.py", ["runs/summary_word"], 1, "runs/summary_word/summary.json: parameters is no number: 'many'"),
    Row("compare_runs.py", ["run", "--output", "notes.txt"], 1, "notes.txt"),
    Row("compare_runs.py", ["run", "--output", "notes.txt/there"], 1, "notes.txt/there"),
    Row("export_hf.py", [], 2, "the following arguments are required: MODEL_OR_RUN_DIR, OUT_DIR"),
    Row("export_hf.py", ["run", "OUT", "--push"], 2, "unrecognized arguments: --push"),
    Row("export_hf.py", ["nowhere", "OUT"], 1, "nowhere lacks config.json, model.safetensors, tokenizer.json: "),
    Row("export_hf.py", ["half", "OUT"], 1, "half lacks config.json, model.safetensors, tokenizer.json: "),
    Row("export_hf.py", ["notes.txt", "OUT"], 1, "notes.txt lacks config.json"),
    Row("export_hf.py", ["; touch x", "OUT"], 1, "; touch x lacks config.json"),
    Row("export_hf.py", ["n" * 300, "OUT"], 1, "File name too long"),
    Row("export_hf.py", ["run", "notes.txt"], 1, "notes.txt is a file: choose another OUT_DIR"),
    Row("export_hf.py", ["run", "notes.txt/there"], 1, "notes.txt"),
    Row("export_hf.py", ["run", "texts"], 1, "texts holds other files than an export: choose another OUT_DIR"),
    Row("export_hf.py", ["run", "run"], 1, "run holds other files than an export: choose another OUT_DIR"),
    Row("export_hf.py", ["run", "run/model"], 1, "run/model is the model itself: choose another OUT_DIR"),
    Row("generate.py", [], 2, "the following arguments are required: EXPORTED_DIR"),
    Row("generate.py", ["gpt2", "--prompt", ""], 2, "--prompt is empty: write at least a word"),
    Row("generate.py", ["gpt2", "--pro", "of"], 2, "unrecognized arguments: --pro of"),
    Row("generate.py", ["gpt2", "--prompt", "of", "--temperature", "nan"], 2, "--temperature nan: must be at least 0"),
    Row("generate.py", ["gpt2", "--prompt", "of", "--temperature", "inf"], 2, "--temperature inf: must be below 2**31"),
    Row("generate.py", ["gpt2", "--prompt", "of", "--top_k", "-1"], 2, "--top_k -1: must be at least 0"),
    Row("generate.py", ["gpt2", "--prompt", "of", "--seed", str(2**31)], 2, "--seed 2147483648: must be below 2**31"),
    Row("generate.py", ["gpt2", "--prompt", "of", "--max_new_tokens", "0"], 2, "--max_new_tokens 0: must be "),
    Row("generate.py", ["gpt2", "--prompt", "caf\udce9"], 2, "--prompt is not UTF-8"),
    Row("generate.py", ["gpt2", "--prompt", "of", "--max_new_tokens", "99"], 1, "--max_new_tokens 99: of the "),
    Row("generate.py", ["nowhere", "--prompt", "of"], 1, "nowhere is no exported model: run scripts/export_hf.py"),
    Row("generate.py", ["run", "--prompt", "of"], 1, "run is no exported model: run scripts/export_hf.py"),
    Row("generate.py", ["notes.txt", "--prompt", "of"], 1, "notes.txt is no exported model"),
    Row("generate.py", ["$(touch x)", "--prompt", "$(touch x)"], 1, "$(touch x) is no exported model: run"),
    Row("generate.py", ["n" * 300, "--prompt", "of"], 1, "File name too long"),
    Row("parity.py", ["--precision", "fp16"], 2, "argument --precision: invalid choice: 'fp16'"),
    Row("parity.py", ["--prec", "fp32"], 2, "unrecognized arguments: --prec fp32"),
    Row("parity.py", ["run"], 2, "unrecognized arguments: run"),
    Row("sync_regions.py", ["--writ"], 2, "unrecognized arguments: --writ"),
    Row("sync_regions.py", ["--root", "nowhere"], 2, "none of the scripts is in nowhere"),
    Row("sync_regions.py", ["--root", "notes.txt"], 2, "none of the scripts is in notes.txt"),
    Row("sync_regions.py", ["--root", "n" * 300, "--write"], 2, "none of the scripts is in nnn"),
    Row("sync_regions.py", ["--write", "--list"], 2, "argument --list: not allowed with argument --write"),
    Row("sync_regions.py", ["--from", "train.py", "model"], 2, "no script train.py"),
    Row("sync_regions.py", ["--from", BASE, "$(touch x)"], 2, f"no region $(touch x) in {BASE}"),
    Row("sync_regions.py", ["--root", "regions", "--write"], 2, f"{BASE}:1: region model is not closed"),
    Row("compile_ops.py", ["--fast"], 2, "unrecognized arguments: --fast"),
    Row("compile_ops.py", [], 1, "does not build: ", {"TORCH_EXTENSIONS_DIR": "notes.txt"}),
]  # fmt: skip
EXPORTS = {  # of export_hf.py and generate.py, with a damaged file of a model/ or of an exported model
    "config_list": ("config.json", b"[]"),
    "config_half": ("config.json", b'{"n_layer": 1'),
    "config_binary": ("config.json", bytes(range(256))),
    "config_deep": ("config.json", b"[" * 100_000),
    "config_empty": ("config.json", b"{}"),
    "weights_half": ("model.safetensors", 1000),
    "weights_empty": ("model.safetensors", b""),
    "weights_text": ("model.safetensors", b"no weights at all, but some text\n" * 9),
    "tokenizer_half": ("tokenizer.json", 1000),
    "tokenizer_no_type": ("tokenizer.json", b'{"model": {"vocab": {}}}'),
    "tokenizer_deep": ("tokenizer.json", b"[" * 100_000),
}
SHAPES = {"n_layer": ["one", 0, -1, 2, 10**12, None, [1], 1.5, True], "n_head": [0, 3, 10**12], "d_model": [64, "x"],
          "block_size": [0, 8], "vocab_size": [-1, 10**12, 280], "padded_vocab_size": [64, 10**12]}  # fmt: skip


def tool_rows() -> list[Row]:
    rows = list(TOOLS)
    for name, (file, _) in EXPORTS.items():
        rows.append(Row("export_hf.py", [f"models/{name}", "OUT"], 1, f"cannot read models/{name}/{file}: "))
        rows.append(Row("generate.py", [f"exports/{name}", "--prompt", "of"], 1, f"cannot read exports/{name}: "))
    for name, values in SHAPES.items():
        for number in range(len(values)):
            folder = f"models/{name}_{number}"
            rows.append(Row("export_hf.py", [folder, "OUT"], 1, f"cannot read {folder}/config.json: {name} is "))
    return rows


def shell(script: str, words: str, code: int, message: str, **env: str) -> Row:
    return Row(script, words.split(), code, f"{script}: {message}" if message else "", env)


SHELL = [  # each in a process of its own
    shell("run_local.sh", "", 2, "no such script: (none given)"),
    shell("run_local.sh", "--fast", 2, "no such script: --fast"),
    shell("run_local.sh", "notes.txt", 2, "no such script: notes.txt"),
    shell("run_local.sh", "texts", 2, "no such script: texts"),
    shell("run_local.sh", "-script.py", 2, "no such script: -script.py"),
    Row("run_local.sh", ["$(touch x)"], 2, "run_local.sh: no such script: $(touch x)"),
    Row("run_local.sh", ["two\nlines.py"], 2, "run_local.sh: no such script: two\nlines.py"),
    shell("run_local.sh", "script.py", 2, "NUM_GPUS=-1 is not a number of ranks", NUM_GPUS="-1"),
    shell("run_local.sh", "script.py", 2, "NUM_GPUS=1000000 is not a number of ranks", NUM_GPUS="1000000"),
    shell("run_local.sh", "script.py", 2, "MASTER_PORT=http is no port", MASTER_PORT="http"),
    shell("run_local.sh", "script.py", 2, "MASTER_PORT=70000 is no port", MASTER_PORT="70000"),
    shell("run_local.sh", "script.py", 2, "CUDA_VISIBLE_DEVICES='$(touch x)': deepspeed takes GPU numbers",
          CUDA_VISIBLE_DEVICES="$(touch x)"),
    shell("quickstart.sh", "--output_dir run", 2, "--output_dir does not go here"),
    shell("quickstart.sh", "--resume=run", 2, "--resume does not go here"),
    Row("quickstart.sh", ["--dry_run", "--dataset", "sample"], 2, "run_local.sh: NUM_GPUS=$(touch x) is not a number",
        {"NUM_GPUS": "$(touch x)"}),
    shell("test.sh", "--fats", 2, "unknown flag --fats: write --fast, --all or --"),
    shell("test.sh", "--fast --all", 2, "--fast and --all: one at a time"),
    shell("setup.sh", "--help", 2, "no such requirements file: --help"),
    shell("setup.sh", "requirements-none.txt", 2, "no such requirements file: requirements-none.txt"),
    shell("setup.sh", "requirements.txt extra", 2, "one requirements file at a time, not extra"),
    Row("setup.sh", ["$(touch x)"], 2, "setup.sh: no such requirements file: $(touch x)"),
    shell("run_slurm.sh", "", 2, "no such script in "),
    shell("run_slurm.sh", "nowhere.py", 2, "no such script in "),
    shell("run_slurm.sh", "script.py", 2, "MASTER_PORT=0 is no port", MASTER_PORT="0"),
    shell("run_slurm.sh", "script.py", 2, "GPUS_PER_HOST=two is no number of ranks", GPUS_PER_HOST="two"),
    shell("run_slurm.sh", "script.py", 1, "this is no Slurm job: sbatch scripts/run_slurm.sh script.py"),
    shell("run_slurm.sh", "script.py", 1, "scontrol cannot tell the nodes", SLURM_JOB_NODELIST="node[1-2]"),
    shell("run_slurm.sh", "script.py", 1, "SLURM_SUBMIT_DIR=nowhere is no folder", SLURM_SUBMIT_DIR="nowhere"),
    shell("run_multihost.sh", "", 2, "no such script: (none given)"),
    shell("run_multihost.sh", "--fast script.py", 2, "unknown flag --fast"),
    shell("run_multihost.sh", "--hostfile", 2, "--hostfile needs a value"),
    shell("run_multihost.sh", "script.py", 2, "NODE_RANK= is no number from 0 to 1"),
    shell("run_multihost.sh", "script.py", 2, "MASTER_ADDR=$(touch x) is no address", NODE_RANK="0",
          MASTER_ADDR="$(touch x)"),
    shell("run_multihost.sh", "script.py", 2, "MASTER_PORT=abc is no number from 1 to 65535", MASTER_PORT="abc"),
    shell("run_multihost.sh", "--launcher deepspeed script.py", 1, "no hostfile configs/hostfile: copy "),
    shell("run_multihost.sh", "--launcher deepspeed --hostfile notes.txt script.py", 1, "notes.txt line 1: mine is "),
    shell("run_multihost.sh", "--launcher deepspeed --hostfile texts script.py", 1, "cannot read the hostfile texts"),
    shell("check_env.sh", "--fast", 2, "unknown word --fast"),
    shell("check_env.sh", "--peer", 2, "--peer : write HOST:PORT"),
    shell("check_env.sh", "--peer host:99999", 2, "--peer host:99999: write HOST:PORT"),
    shell("check_env.sh", "--timeout -1", 2, "--timeout -1: write seconds"),
    Row("check_env.sh", ["--host", "$(touch x)"], 2, "check_env.sh: --host $(touch x): write USER@HOST or HOST"),
    shell("rehearse_multihost.sh", "--drill flood", 2, "no drill flood: write all or one of plain"),
    shell("rehearse_multihost.sh", "--output", 2, "--output needs a value"),
]  # fmt: skip
PROCESSES = [  # what only a process of its own shows; a training script imports DeepSpeed for seconds
    Row(ZERO2, ["--ds_config", "json/deep.json"], 1, "--ds_config json/deep.json is not JSON"),
    Row(ZERO1, ["--resume", STEP2], 1, f"{STEP2} has ZeRO stage 0, this run 1"),
    Row(ZERO3, ["--d_model", "2000000000"], 1, "not enough memory"),
    Row(OFFLOAD, ["--d_model", "2000000000"], 1, "not enough memory"),
    Row(MULTIHOSTS, ["--output_dir", "broken/zero", "--max_steps", "3"], 1, "broken/zero/checkpoints/step2"),
    Row(ZERO3, ["--dataset", "caf\udce9"], 1, "no such folder; else write wikitext2 or sample"),
    Row(BASE, ["--dataset", "$(touch x)"], 1, "--dataset $(touch x): no such folder"),
    Row("compile_ops.py", [], 1, "does not build: ", {"CXX": "/nowhere/c++", "TORCH_EXTENSIONS_DIR": "OUT"}),
    shell("check_env.sh", "--listen 70000", 2, "--listen 70000: write a port"),
]  # fmt: skip


@pytest.fixture(scope="module")
def pristine(tmp_path_factory) -> Path:
    """The working folder as it is before each command."""
    import pyarrow
    from pyarrow import parquet

    folder = tmp_path_factory.mktemp("pristine")
    for name, content in FILES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    shutil.copytree(ROOT / "configs", folder / "configs")
    (folder / "json").mkdir()
    path_number = zero(stage=3, offload_param={"device": "nvme", "nvme_path": 5})
    for name, (content, _) in {**JSON, "path_number": (path_number, "")}.items():
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        (folder / "json" / f"{name}.json").write_bytes(data)
    columns = {"no_text": {"words": ["x"]}, "null_text": {"text": ["x", None]}, "number_text": {"text": [1]},
               "no_rows": {"text": pyarrow.array([], pyarrow.string())}, "half_parquet": {"text": ["x"]}}  # fmt: skip
    for name, table in columns.items():
        (folder / "data" / name).mkdir()
        parquet.write_table(pyarrow.table(table), file := folder / "data" / name / "train.parquet")
        (folder / "data" / name / "valid.txt").write_text("text\n")
        if name == "half_parquet":
            file.write_bytes(file.read_bytes()[:-20])
    (folder / "data" / "loop").mkdir()
    (folder / "data" / "loop" / "train.txt").symlink_to("train.txt")
    for name, vocabulary in (("strict", {"a": 0}), ("gap", {"a": 0, "<unk>": 999})):  # one word only; an id too high
        model = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "<unk>"}
        (folder / "tokenizers" / f"{name}.json").write_text(json.dumps({"version": "1.0", "model": model}))

    flags = [*TINY, "--output_dir", "run"]
    done = run([sys.executable, str(ROOT / BASE), *flags], cwd=folder)
    assert done.returncode == 0, done.stderr
    shutil.copytree(folder / "run", folder / "half", ignore=shutil.ignore_patterns("model", "summary.json"))
    break_checkpoints(folder)
    break_runs(folder / "runs")
    break_models(folder)
    return folder


def break_checkpoints(folder: Path) -> None:
    step, facts = folder / "half" / "checkpoints" / "step2", json.loads((folder / STEP2 / "run.json").read_text())
    state = (step / "state.pt").read_bytes()
    for name, data, changes in (
        ("size", b"truncated", {}),
        ("text", b"no checkpoint at all, but some text\n" * 9, {}),
        ("zip", state[:200] + bytes(100) + state[300:], {}),
        ("missing", state, {}),
        ("other", state, {}),
        ("deep", state, {}),
        ("bare", state, {}),
        ("word", state, {"step": "2"}),
        ("metrics", state, {}),
        ("zero", b"DeepSpeed's, but not what torch.save writes\n" * 9, {}),
    ):
        shutil.copytree(folder / "half", folder / "broken" / name)
        broken = folder / "broken" / name / "checkpoints" / "step2"
        if name == "missing":  # state.pt lacks a part
            torch.save({"model": torch.load(step / "state.pt")["model"]}, broken / "state.pt")
        elif name == "other":  # state.pt of another model, under this one's settings
            whole = torch.load(step / "state.pt")
            whole["model"] = {key: value[:1] for key, value in whole["model"].items()}
            torch.save(whole, broken / "state.pt")
        else:
            (broken / "state.pt").write_bytes(data)
        size = {"state.pt": len(state) if name == "size" else (broken / "state.pt").stat().st_size}
        if name == "zero":
            changes["settings"] = facts["settings"] | {"ZeRO stage": 2}
            for file in ("zero_pp_rank_0_mp_rank_00_optim_states.pt", "mp_rank_00_model_states.pt"):
                (broken / file).write_bytes(data)
        text = json.dumps(facts | {"files": size} | changes)
        if name == "bare":
            text = json.dumps({"step": 2, "files": size})
        (broken / "run.json").write_text("[" * 100_000 if name == "deep" else text)
    (folder / "broken" / "metrics" / "metrics.jsonl").write_text('{"loss": 1}\nno JSON\n')


def break_runs(folder: Path) -> None:
    for name, lines, files in (
        ("binary", bytes(range(256)), {}),
        ("no_step", b'{"step": 1}\n{"loss": 9.0}\n', {}),
        ("step_inf", b'{"step": Infinity, "loss": 9.0}\n', {}),
        ("step_word", b'{"step": "1", "loss": 9.0}\n', {}),
        ("deep", b"[" * 100_000 + b"\n", {}),
        ("loss_word", b'{"step": 1, "loss": "low"}\n', {}),
        ("loss_null", b'{"step": 1, "loss": null}\n', {}),
        ("args_list", b'{"step": 1}\n', {"args.json": b"[]"}),
        ("args_deep", b'{"step": 1}\n', {"args.json": b"[" * 100_000}),
        ("summary_half", b'{"step": 1}\n', {"summary.json": b'{"steps": 1'}),
        ("summary_word", b'{"step": 1}\n', {"summary.json": b'{"parameters": "many"}'}),
        *((name, b'{"step": 1, "loss": 9.0}\n{"step": 2, "loss": 8.5}\n', {}) for name in WEIRD),
    ):
        (folder / name).mkdir(parents=True)
        for file, data in {"metrics.jsonl": lines, **files}.items():
            (folder / name / file).write_bytes(data)


def break_models(folder: Path) -> None:
    module = load_script("export_hf.py")
    module.export(folder / "run", folder / "gpt2")
    (folder / "regions").mkdir()
    (folder / "regions" / BASE).write_text(f"# region model (owner: {BASE})\n")
    for name, (file, content) in EXPORTS.items():
        for source, target in (("run/model", "models"), ("gpt2", "exports")):
            shutil.copytree(folder / source, folder / target / name)
            path = folder / target / name / file
            path.write_bytes(path.read_bytes()[:content] if isinstance(content, int) else content)
    shape = json.loads((folder / "run" / "model" / "config.json").read_text())
    for name, values in SHAPES.items():
        for number, value in enumerate(values):
            shutil.copytree(folder / "run" / "model", target := folder / "models" / f"{name}_{number}")
            (target / "config.json").write_text(json.dumps(shape | {name: value}))


def snapshot(folder: Path) -> dict[str, bytes | str]:
    """Every name below the folder, with a file's bytes or a link's target."""
    paths = [path for path in folder.rglob("*") if not path.name.startswith(".")]  # .lock and the like
    return {str(path.relative_to(folder)): str(path.readlink()) if path.is_symlink() else
            path.read_bytes() if path.is_file() else "folder" for path in paths}  # fmt: skip


@pytest.fixture(scope="module")
def workplace(pristine, tmp_path_factory):
    """A function that asserts that the working folder is as it was, and mends it if it is not; and the folder."""
    folder, before = tmp_path_factory.mktemp("work") / "folder", snapshot(pristine)
    shutil.copytree(pristine, folder, symlinks=True)

    def is_untouched() -> None:
        after = snapshot(folder)
        differing = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        if differing:
            shutil.rmtree(folder)
            shutil.copytree(pristine, folder, symlinks=True)
        assert differing == [], f"changed, new or gone: {differing[:8]}"

    return folder, is_untouched


@pytest.fixture
def here(workplace, tmp_path, monkeypatch, capfd):
    """A function that runs a row in this process, in the working folder; (exit code, what it printed)."""
    import transformers  # noqa: F401  its own warnings come now

    folder, is_untouched = workplace
    monkeypatch.chdir(folder)

    def stop_alone(message: str) -> None:
        sys.exit(f"error: rank 0: {message}")

    def here(row: Row) -> tuple[int, str]:
        module = load_script(row.script)
        words = [str(tmp_path / "out") if word == "OUT" else word for word in row.words]
        if row.script in SCRIPTS:
            words = [*TINY, "--output_dir", str(tmp_path / "out"), *words]
        monkeypatch.setattr("sys.argv", [row.script, *words])
        environment, handlers, threads = dict(os.environ), {}, torch.get_num_threads()
        for number in (signal.SIGINT, signal.SIGTERM):
            handlers[number] = signal.getsignal(number)
        os.environ.update(row.env)
        if hasattr(module, "end_alone"):  # it ends the process
            monkeypatch.setattr(module, "end_alone", stop_alone)
        capfd.readouterr()
        try:
            with warnings.catch_warnings():
                module.stop_on_user_error(module.main) if row.script in SCRIPTS else sys.exit(module.main())
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1 if stop.code else 0
            if isinstance(stop.code, str):
                print(stop.code, file=sys.stderr)  # as Python does
        finally:
            os.environ.clear()
            os.environ.update(environment)
            torch.set_num_threads(threads)
            for number, handler in handlers.items():
                signal.signal(number, handler)
            is_untouched()
        return code, "".join(capfd.readouterr())

    return here


def check(row: Row, start, out: Path) -> None:
    began = time.monotonic()
    code, printed = start(row)
    assert time.monotonic() - began < SLOWEST
    assert "Traceback" not in printed, printed
    assert code == row.code, printed
    assert printed.count(row.message) == 1, printed
    assert not (out / "model").exists() and not (out / "config.json").exists() and not Path("x").exists()


def ids(rows: list[Row]) -> dict:
    return {"argvalues": rows, "ids": [row.name()[:110] for row in rows]}


@pytest.mark.timeout(60)
@pytest.mark.parametrize("row", **ids(training_rows()))
def test_training_scripts(row, here, tmp_path):
    check(row, here, tmp_path / "out")


@pytest.mark.timeout(60)
@pytest.mark.parametrize("row", **ids(tool_rows()))
def test_tools(row, here, tmp_path):
    check(row, here, tmp_path / "out")


@pytest.fixture
def elsewhere(workplace, tmp_path):
    """A function that runs a row as a process of its own."""
    folder, is_untouched = workplace

    def elsewhere(row: Row) -> tuple[int, str]:
        out = str(tmp_path / "out")
        start = ["bash"] if row.script.endswith(".sh") else [sys.executable]
        path = ROOT / row.script if row.script in SCRIPTS else ROOT / "scripts" / row.script
        given = [*TINY, "--output_dir", out] if row.script in SCRIPTS else []
        words = [*start, str(path), *given, *(out if word == "OUT" else word for word in row.words)]
        hidden = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "CUDA_VISIBLE_DEVICES", "NUM_GPUS", "MASTER_ADDR", "MASTER_PORT",
                  "NODE_RANK", "NNODES", "GPUS_PER_HOST", "SLURM_JOB_NODELIST", "SLURM_SUBMIT_DIR")  # fmt: skip
        env = {key: value for key, value in os.environ.items() if key not in hidden} | {"HF_HUB_OFFLINE": "1"}
        env |= {"PATH": f"{BIN}{os.pathsep}{env['PATH']}"} | {
            key: out if value == "OUT" else value for key, value in row.env.items()}  # fmt: skip
        done = subprocess.run(words, cwd=folder, env=env, capture_output=True, timeout=SLOWEST)
        is_untouched()
        return done.returncode, (done.stdout + done.stderr).decode(errors="replace")

    return elsewhere


@pytest.mark.parametrize("row", **ids(SHELL))
def test_shell(row, elsewhere, tmp_path):
    check(row, elsewhere, tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize("row", **ids(PROCESSES))
def test_processes(row, elsewhere, tmp_path):
    check(row, elsewhere, tmp_path / "out")


@pytest.mark.parametrize("name", WEIRD)
def test_hostile_names_stay_names(name, here, tmp_path):
    """A run's folder may have any name; and a name that is no run is never more than a word of the message."""
    words = ["--output", str(tmp_path / "there"), "--"]
    code, printed = here(Row("compare_runs.py", [*words, f"runs/{name}"], 0, ""))
    assert code == 0 and "Traceback" not in printed
    assert (tmp_path / "there" / "compare.md").read_text().count("\n") == 13  # the table, and a link to each picture
    assert (tmp_path / "there" / "loss.png").stat().st_size > 1000
    code, printed = here(Row(BASE, [f"--dataset={name}"], 1, ""))
    assert code == 1 and f"--dataset {name}: no such folder" in printed and "Traceback" not in printed


def test_run_local_hands_hostile_names_on(elsewhere):
    code, printed = elsewhere(Row("run_local.sh", ["--dry_run", "$(touch x).py", "`touch x`", "a b"], 0, ""))
    assert code == 0 and printed.endswith(" \\$\\(touch\\ x\\).py \\`touch\\ x\\` a\\ b\n")


def test_setup_leaves_a_folder_that_is_no_environment(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")
    shutil.copy(ROOT / "requirements.txt", tmp_path)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "thesis.txt").write_text("years of work")
    done = run(["bash", str(tmp_path / "scripts" / "setup.sh")], PYTHON=sys.executable, timeout=60)
    message = f"setup.sh: {tmp_path}/.venv is no virtual environment: move it out of the way\n"
    assert (done.returncode, done.stderr) == (1, message)
    assert (tmp_path / ".venv" / "thesis.txt").read_text() == "years of work"


@pytest.mark.slow
def test_overwrite_deletes_runs_only(tmp_path):
    """In a folder that holds no run, --overwrite has nothing to delete; in one that does, the user's own files stay."""
    mine = {"settings.json": "{}", "model/mine.bin": "1", "checkpoints/mine/data": "2", "data.jsonl": "3\n"}
    data = {name: FILES[name].decode() for name in ("texts/train.txt", "texts/valid.txt")}
    for name, text in {**mine, **data}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    words = [sys.executable, str(ROOT / BASE), *TINY, "--output_dir", ".", "--overwrite"]
    assert run(words, cwd=tmp_path).returncode == 0
    assert {name: (tmp_path / name).read_text() for name in mine if (tmp_path / name).exists()} == mine
    shutil.rmtree(tmp_path / "model"), shutil.rmtree(tmp_path / "checkpoints")
    assert run(words, cwd=tmp_path).returncode == 0
    assert (tmp_path / "settings.json").read_text() == "{}" and (tmp_path / "data.jsonl").read_text() == "3\n"


# --- what Hypothesis makes up ---

CHEAP = settings(max_examples=250, deadline=None, derandomize=True, database=None, print_blob=False,
                 suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture])  # fmt: skip
NOTABLE = st.sampled_from(["auto", "cpu", "nvme", "AdamW", 0, 1, 2, 3, -1, 2**70, 1e-300, "\ud800"])
LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8), NOTABLE)
KEYS = st.one_of(st.text(max_size=8), st.sampled_from(["enabled", "stage", "device", "params", "type", "lr", "betas"]))
VALUES = st.recursive(LEAVES, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
                      max_leaves=6)  # fmt: skip


def paths_in(value: object, path: tuple = ()) -> list[tuple]:
    inner = [place for key, child in value.items() for place in paths_in(child, (*path, key))] if isinstance(
        value, dict) else []  # fmt: skip
    return ([path] if path else []) + inner


@st.composite
def damaged(draw, values: list[dict], more_keys: list[str]) -> dict:
    """A copy with one to three of its keys dropped, renamed or set to something else, or with a key added."""
    value = copy.deepcopy(draw(st.sampled_from(values)))
    for _ in range(draw(st.integers(1, 3))):
        *parents, key = draw(st.sampled_from(paths_in(value) or [("x",)]))
        section = value
        for parent in parents:
            section = section[parent]
        action = draw(st.sampled_from(["set", "drop", "rename", "add"]))
        if action == "add":
            value[draw(st.sampled_from(more_keys))] = draw(VALUES)
        elif action == "set":
            section[key] = draw(VALUES)
        elif (old := section.pop(key, None)) is not None and action == "rename":
            section[draw(st.one_of(KEYS, st.just(key + "s"), st.just(key[:-1])))] = old
    return value


CONFIGS = [json.loads(path.read_text()) for path in sorted((ROOT / "configs").glob("*.json"))]
FILE_TEXTS = st.one_of(
    damaged(CONFIGS, load_script(ZERO1).JSON_KEYS).map(lambda value: json.dumps(value).encode()),
    VALUES.map(lambda value: json.dumps(value).encode()),
    st.binary(max_size=60),
    st.text(alphabet="{}[]:,\"'#/\n a1-.eE\\", max_size=40).map(str.encode),
    st.tuples(st.integers(0, 400), st.binary(min_size=1, max_size=3)).map(
        lambda cut: json.dumps(GOOD).encode()[: cut[0]] + cut[1] + json.dumps(GOOD).encode()[cut[0] :]
    ),
)


@pytest.mark.parametrize("script", list(dict.fromkeys(ZERO.values())))
def test_any_file_is_settings_or_a_message(script, tmp_path, monkeypatch):
    module, path = load_script(script), tmp_path / "ds.json"
    monkeypatch.chdir(tmp_path)

    @CHEAP
    @given(FILE_TEXTS)
    def try_one(data: bytes) -> None:
        path.write_bytes(data)
        try:
            config = module.load_ds_config(argparse.Namespace(ds_config="ds.json"), torch.device("cpu"))
        except module.UserError as error:
            assert "--ds_config ds.json" in str(error)
        else:
            assert config["zero_optimization"]["stage"] in (1, 2, 3) and isinstance(config, dict)

    try_one()


FLAG = st.sampled_from("""n_layer n_head d_model block_size dropout epochs max_steps batch_size lr precision seed
    tokenizer output_dir resume overwrite eval_interval peak_tflops compile local_rank help ds_config""".split())
VALUE = st.sampled_from(["0", "1", "-1", "64", "0.5", "1e9", "nan", "inf", "-inf", "9" * 5000, "bpe:300", "bpe:",
                         "bpe:٣٠٠", "bpe:²", "auto", "never", "fp32", "", " ", "=", "-", "--", "%s"])  # fmt: skip
PAIR = st.tuples(FLAG, VALUE).map("--{0[0]}={0[1]}".format)
WORD = st.one_of(FLAG.map("--{}".format), VALUE, PAIR, st.text(max_size=6))
WORDS = st.lists(WORD, max_size=6)


@pytest.mark.parametrize("script", SCRIPTS)
def test_any_words_are_flags_or_usage(script, monkeypatch, capsys):
    module = load_script(script)

    class Accepted(Exception):
        pass

    def accept(args: argparse.Namespace) -> None:
        assert args.n_layer > 0 and args.d_model % args.n_head == 0 and 0 <= args.dropout < 1 and args.output_dir
        raise Accepted

    monkeypatch.setattr(module, "load_corpus" if script == BASE else "start_distributed", accept)

    @CHEAP
    @given(WORDS)
    def try_one(words: list[str]) -> None:
        monkeypatch.setattr("sys.argv", [script, *words])
        try:
            module.main()
        except SystemExit as stop:
            printed = capsys.readouterr()
            assert stop.code == 0 and "usage: " in printed.out or stop.code == 2 and printed.err.count("error: ") >= 1
        except (Accepted, module.UserError):
            pass

    try_one()


@pytest.fixture(scope="module")
def cached(tmp_path_factory) -> tuple[argparse.Namespace, Path, bytes]:
    """Flags, the file in the token cache that they lead to, and what is in it."""
    folder = tmp_path_factory.mktemp("texts")
    (folder / "train.txt").write_bytes(FILES["texts/train.txt"])
    (folder / "valid.txt").write_bytes(FILES["texts/valid.txt"])
    args = argparse.Namespace(dataset=str(folder), tokenizer="bpe:280", block_size=8)
    path = load_script(BASE).prepare_tokens(args)
    return args, path, path.read_bytes()


@st.composite
def damages(draw) -> tuple[int, int, bytes]:
    """Where, how many bytes, and what comes in their place: mostly in the header, which is JSON."""
    start = draw(st.one_of(st.integers(0, 12), st.integers(0, 400), st.integers(0, 20_000)))
    return start, draw(st.sampled_from([0, 1, 2, 10**9])), draw(st.one_of(st.binary(max_size=3), st.sampled_from(
        [b"0", b"9", b"I64", b"F32", b"}", b'"', b"\xff"])))  # fmt: skip


def same(one, other) -> bool:
    streams = one.streams.keys() == other.streams.keys() and all(
        one.streams[split].equal(other.streams[split]) for split in one.streams)  # fmt: skip
    return streams and one[1:] == other[1:]


def test_a_damaged_cache_is_noticed_and_mended(cached):
    module, (args, path, sound) = load_script(BASE), cached
    path.write_bytes(sound)
    right = module.read_tokens(path)  # mapped into memory: what is written to another file leaves it as it is

    @CHEAP
    @given(damages())
    def try_one(damage: tuple[int, int, bytes]) -> None:
        start, count, data = damage
        path.unlink()
        path.write_bytes(sound[:start] + data + sound[start + count :])
        found = module.read_tokens(path)
        assert found is None or same(found, right)
        assert module.prepare_tokens(args) == path and same(module.read_tokens(path), right)

    try_one()


def test_a_cache_with_other_facts_is_no_corpus(cached, tmp_path):
    module, (_, path, sound) = load_script(BASE), cached
    path.write_bytes(sound)
    right, file = module.read_tokens(path), tmp_path / "tokens"
    with safetensors.safe_open(path, "pt") as opened:
        facts = opened.metadata()
    corpus = json.loads(facts["corpus"])

    @CHEAP
    @given(damaged([{**facts, "corpus": corpus}], ["corpus", "checksum", "more"]), st.booleans(),
           st.sampled_from([torch.int64, torch.bfloat16, torch.float32]))  # fmt: skip
    def try_one(changed_facts: dict, flat: bool, dtype: torch.dtype) -> None:
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in changed_facts.items()}
        texts = {key.encode(errors="replace").decode(): value.encode(errors="replace").decode()
                 for key, value in texts.items()}  # fmt: skip
        streams = {split: stream.to(dtype) if flat else stream[None] for split, stream in right.streams.items()}
        safetensors.torch.save_file(streams, file, texts or None)
        assert module.read_tokens(file) is None
        safetensors.torch.save_file(right.streams, file, texts or None)
        assert (found := module.read_tokens(file)) is None or same(found, right)

    try_one()


@pytest.mark.parametrize("script", [BASE, ZERO2])
def test_any_manifest_is_a_checkpoint_or_a_problem(script, tmp_path):
    module, folder = load_script(script), tmp_path / "step5"
    folder.mkdir()
    (folder / "state.pt").write_bytes(b"12345")
    facts = {"step": 5, "best": None, "seconds": 1.5, "saving": 0.5, "validation_loss": 2.5, "ledger": {},
             "hosts": ["a"], "files": {"state.pt": 5}, "settings": {"n_layer": 4, "seed": 1}}  # fmt: skip
    states = SimpleNamespace(has=lambda folder: True)

    (folder / "run.json").write_text(json.dumps(facts))
    assert module.whole_steps(tmp_path, "step*", states, facts["settings"]) == ({5: facts}, [])

    @CHEAP
    @given(st.one_of(damaged([facts], [*facts, "more"]).map(lambda value: json.dumps(value).encode()),
                     VALUES.map(lambda value: json.dumps(value).encode()), st.binary(max_size=40),
                     st.just(b"[" * 100_000)))  # fmt: skip
    def try_one(data: bytes) -> None:
        (folder / "run.json").write_bytes(data)
        known, problems = module.whole_steps(tmp_path, "step*", states, facts["settings"])
        assert len(known) + len(problems) == 1
        for step, found in known.items():  # all that resuming reads
            assert type(step) is int and step == 5 and type(found["settings"]) is type(found["ledger"]) is dict
            assert all(type(found[name]) is float for name in ("seconds", "saving"))
            assert all(isinstance(found[name], float | None) for name in ("best", "validation_loss"))

    try_one()
