"""Wrong flags end in usage and exit code 2; a wrong file, JSON or folder in one message that names it."""

import json
import re
import runpy

import pytest
from conftest import BASE, MULTIHOSTS, OFFLOAD, ROOT, ZERO1, ZERO2, ZERO3, load_script, script_args

FLAGS = [
    ("--n_layer 0", "--n_layer: 0 is not from 1"),
    ("--d_model x", "--d_model: invalid number value: 'x'"),
    ("--d_model 100 --n_head 12", "--d_model 100 is not a multiple of --n_head 12"),
    ("--dropout 1", "--dropout: 1 is not from 0 to below 1"),
    ("--dropout nan", "--dropout: nan is not"),
    ("--lr 0", "--lr: 0 is not from"),
    ("--lr inf", "--lr: inf is not"),
    ("--weight_decay -1", "--weight_decay: -1 is not"),
    ("--batch_size -4", "--batch_size: -4 is not"),
    ("--max_steps 1.5", "--max_steps: invalid number value: '1.5'"),
    ("--seed -1", "--seed: -1 is not"),
    ("--log_interval 0", "--log_interval: 0 is not"),
    ("--timeout 0", "--timeout: 0 is not"),
    ("--precision int8", "--precision: invalid choice: 'int8'"),
    ("--resume yes", "--resume: invalid choice: 'yes'"),
    ("--n_layers 2", "unrecognized arguments: --n_layers 2"),
    ("--epochs 99999999999", "--epochs: 99999999999 is not from 1 to below 2000000000"),
]


@pytest.mark.parametrize(("words", "message"), FLAGS)
def test_flags(words, message, capsys):
    script = load_script(BASE)
    with pytest.raises(SystemExit) as stop:
        script.parse_args(words.split())
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def config(**changes: object) -> str:
    return json.dumps(json.loads((ROOT / "configs" / "zero1.json").read_text()) | changes)


AUTO = config(
    train_batch_size="auto",
    train_micro_batch_size_per_gpu="auto",
    gradient_accumulation_steps="auto",
    gradient_clipping="auto",
    optimizer={"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    bf16={"enabled": "auto"},
    fp16={"enabled": "auto"},
    zero_optimization={"stage": 1, "reduce_bucket_size": "auto"},
)
REFUSED = [
    (ZERO1, "{ nonsense", "Bad key name"),
    (ZERO1, "[1]", "is not what this run can take: AttributeError"),
    (ZERO1, "", "stage 0: for GPTLike-Base.py, as flags"),
    (
        ZERO1,
        config(zero_optimisation={}),
        r"unknown key zero_optimisation; close: .'zero_optimization'",
    ),
    (
        ZERO1,
        config(zero_optimization={"stage": 1, "reduce_bucket": 5}),
        "reduce_bucket.*Extra inputs are not permitted",
    ),
    (ZERO1, config(zero_optimization={"stage": "one"}), "stage\\n  Input should be 0, 1, 2, 3"),
    (ZERO1, config(zero_optimization=3), "must be a mapping, not int"),
    (ZERO1, config(optimizer=5), "is not what this run can take: AttributeError"),
    (ZERO1, config(bf16={"enabled": "maybe"}), "enabled\\n  Input should be a valid boolean"),
    (ZERO1, config(train_batch_size=7), "train_batch_size is not equal to micro_batch_per_gpu .* 7 != 8"),
    (ZERO1, config(train_micro_batch_size_per_gpu=0), "Train batch size: 0 has to be greater than 0"),
    (ZERO1, config(zero_optimization={"stage": 2}), "is for DeepSpeed-GPTLike-ZeRO-2.py"),
    (ZERO2, config(zero_optimization={"stage": 3}), "is for DeepSpeed-GPTLike-ZeRO-3.py"),
    (ZERO3, config(zero_optimization={"stage": 1}), "is for DeepSpeed-GPTLike-ZeRO-1.py"),
    (MULTIHOSTS, config(zero_optimization={"stage": 1}), "is for DeepSpeed-GPTLike-ZeRO-1.py"),
    (OFFLOAD, config(), "is for DeepSpeed-GPTLike-ZeRO-1.py"),
    (
        ZERO2,
        config(zero_optimization={"stage": 2, "offload_optimizer": {"device": "cpu"}}),
        "is for DeepSpeed-GPTLike-ZeRO-Offload.py",
    ),
]


@pytest.mark.parametrize(("name", "text", "message"), REFUSED)
def test_json(name, text, message, tmp_path):
    script = load_script(name)
    path = tmp_path / "ds.json"
    path.write_text(text)
    args = script_args(script)
    args.ds_config = str(path)
    with pytest.raises(script.UserError) as error:
        script.load_ds_config(args)
    assert str(path) in str(error.value)
    assert re.search(message, str(error.value), re.DOTALL)


def test_missing_json():
    script = load_script(ZERO1)
    args = script_args(script)
    args.ds_config = "nowhere.json"
    with pytest.raises(script.UserError, match="nowhere.json.*No such file"):
        script.load_ds_config(args)


DATA = [
    ({}, "", "no folder with files of one kind: ...*folder   --dataset DIR"),
    ({"train.csv": "x"}, "", "no folder with files of one kind: ...*folder   --dataset DIR"),
    ({"train.txt": "a b\n" * 99}, "", "KeyError..validation.*with DIR/train.txt and DIR/valid.txt"),
    (
        {"train.txt": "a b\n" * 99, "valid.jsonl": '{"text": "x"}'},
        "",
        "no folder with files of one kind: .'json', 'text'.",
    ),
    ({"train.txt": "a b\n" * 99, "valid.txt": "a\n"}, "", "a split of 2 tokens is too short for --block_size 256"),
    ({"train.txt": "a b\n" * 99, "valid.txt": b"\xff\xfe\x00"}, "", "UnicodeDecodeError"),
    ({"train.txt": "", "valid.txt": ""}, "", "cannot take --dataset"),
    ({"train.jsonl": '{"body": "x"}', "valid.jsonl": '{"body": "x"}'}, "", "cannot take --dataset .*text"),
    ({"train.jsonl": "{", "valid.jsonl": "{"}, "", "cannot take --dataset"),
    ({"train.parquet": "no", "valid.parquet": "no"}, "", "cannot take --dataset"),
    ({"train.txt": "a b\n" * 99, "valid.txt": "a b\n" * 99}, "--tokenizer bpe:many", "invalid literal.*many"),
    ({"train.txt": "a b\n" * 99, "valid.txt": "a b\n" * 99}, "--tokenizer .", "cannot take --dataset .* --tokenizer"),
]


@pytest.mark.parametrize(("files", "flags", "message"), DATA)
def test_data(files, flags, message, tmp_path):
    script = load_script(BASE)
    for name, content in files.items():
        (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    words = f"--dataset {tmp_path} --tokenizer bpe:300 {flags}".split()
    with pytest.raises(script.UserError) as error:
        script.load_corpus(script_args(script, *words))
    assert re.search(message, str(error.value), re.DOTALL)
    assert str(tmp_path) in str(error.value)


TOOLS = [
    ("tools/compare_runs.py", "nowhere", 1, "error: nowhere holds no run: .*No such file"),
    ("tools/export_hf.py", "nowhere out", 1, "error: cannot read .*nowhere/model/config.json: .*No such file"),
    (
        "tools/generate.py",
        "nowhere --prompt a",
        1,
        "error: nowhere is no exported model: run scripts/tools/export_hf.py",
    ),
    ("tools/generate.py", "nowhere --prompt a --temperature -1", 2, "--temperature -1.0: must be at least 0"),
    ("tools/lint_config.py", "nowhere.json", 1, "FAIL nowhere.json: .*No such file"),
    ("tools/plan_memory.py", "--ds_config nowhere.json", 1, "error: nowhere.json: .*No such file"),
    ("tools/plan_memory.py", "--ranks 0", 2, "--ranks 0 must be above 0"),
    ("tools/reshape_checkpoint.py", "nowhere --world_size 2", 1, "error: .*No such file.*nowhere"),
    ("tools/reshape_checkpoint.py", "nowhere --world_size 0", 2, "--world_size must be at least 1"),
    (
        "tools/network_check.py",
        "--nnodes=2",
        2,
        "start it by torchrun, or give --nnodes, --node_rank and --master_addr",
    ),
    ("tools/network_check.py", "--mib 0", 2, "--timeout and --mib run from 1"),
    ("dev/parity.py", "--ranks 3", 2, "--ranks: invalid choice: 3"),
    ("dev/drill.py", "--scripts Multihosts", 2, "--scripts: invalid choice: 'Multihosts'"),
    ("dev/benchmark.py", "--batch_size 3", 2, "--batch_size 3 is not a multiple of --ranks 2"),
    ("dev/gpu_check.py", "--parts speeds", 2, "--parts: invalid choice: 'speeds'"),
    ("dev/mutate.py", "no-such-mutant", 1, "0 of 0 caught"),
]


@pytest.mark.parametrize(("tool", "words", "code", "message"), TOOLS)
def test_tools(tool, words, code, message, tmp_path, monkeypatch, capsys):
    path = ROOT / "scripts" / tool
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.syspath_prepend(path.parent)
    monkeypatch.setattr("sys.argv", [str(path), *words.split()])
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(path), run_name="__main__")
    out, err = capsys.readouterr()
    said = f"{out}{err}{end.value.code}"
    assert end.value.code == code or (code == 1 and isinstance(end.value.code, str))  # a text: exit code 1
    assert re.search(message, said, re.DOTALL), said
