"""The linter refuses what the scripts refuse, and warns of what does nothing."""

import re

import lint_config
import pytest
from conftest import ROOT
from test_bad_input import AUTO, config


def verdicts(text, tmp_path, monkeypatch, capsys, *words):
    path = tmp_path / "ds.json"
    path.write_text(text)
    monkeypatch.setattr("sys.argv", ["lint_config.py", str(path), *words])
    code = lint_config.main()
    return code, capsys.readouterr().out


def offload(stage, **sections):
    return config(zero_optimization={"stage": stage, **sections})


ZERO = {"stage": 1, "stage3_prefetch_bucket_size": 5, "reduce_bucket_size": 500_000_000}


@pytest.mark.parametrize(
    ("text", "words", "code", "message"),
    [
        (config(), (), 0, "for DeepSpeed-GPTLike-ZeRO-1.py, stage 1, precision bf16"),
        (config(), ("--world_size", "4"), 0, "8 x 1 x 4 ranks = 32 sequences"),
        (config(zero_optimization=ZERO), (), 0, "warn .*stage3_prefetch_bucket_size does nothing at stage 1"),
        (
            config(zero_optimization=ZERO),
            (),
            0,
            "warn .*reduce_bucket_size of 500,000,000 elements is larger than the model",
        ),
        (config(zero_optimization=ZERO), ("--parameters", "7e9"), 0, "stage3_prefetch"),
        (
            config(zero_optimization={"stage": 3, "allgather_bucket_size": 5}),
            (),
            0,
            "allgather_bucket_size does nothing at stage 3",
        ),
        (config(fp16={"loss_scale": "auto"}), (), 0, 'warn .*fp16.loss_scale stays "auto"'),
        (AUTO, (), 0, "this run takes gradient_clipping 1.0 instead of auto"),
        (config(zero_optimisation={}), (), 1, "FAIL .*unknown key zero_optimisation; close: .'zero_optimization'"),
        (config(train_batch_size=7), (), 1, "FAIL .*train_batch_size is not equal"),
        (config(train_batch_size=32), ("--world_size", "4"), 0, "8 x 1 x 4 ranks = 32 sequences"),
        (config(train_batch_size=8), ("--world_size", "4"), 1, "FAIL .*train_batch_size is not equal"),
        ("{", (), 1, "FAIL .*is not what this run can take"),
        (offload(2, offload_param={"device": "cpu"}), (), 1, "FAIL .*all else needs stage 3"),
        (offload(2, offload_optimizer={"device": "nvme", "nvme_path": "/tmp"}), (), 1, "FAIL .*all else needs stage 3"),
        (offload(3, offload_param={"device": "nvme", "nvme_path": "/no"}), (), 1, "FAIL .*nvme_path /no is no folder"),
        (offload(3, offload_optimizer={"device": "nvme"}), (), 1, "FAIL .*nvme_path None is no folder"),
        (offload(2, offload_optimizer=None), (), 0, "for DeepSpeed-GPTLike-ZeRO-2.py, stage 2"),
        (offload(2, offload_optimizer={"device": "cpu"}, offload_param=None), (), 0, "ZeRO-Offload.py, stage 2"),
        (offload(2, zero_quantized_weights=True), (), 0, "warn .*zero_quantized_weights does nothing at stage 2"),
        (offload(3, offload_optimizer={"device": "cpu"}), (), 0, "for DeepSpeed-GPTLike-ZeRO-Offload.py, stage 3"),
    ],
)
def test_rows(text, words, code, message, tmp_path, monkeypatch, capsys):
    found, out = verdicts(text, tmp_path, monkeypatch, capsys, *words)
    assert found == code and re.search(message, out)


def test_our_own_are_clean(monkeypatch, capsys):
    paths = [str(path) for path in (ROOT / "configs").glob("*.json") if path.name != "zero_infinity.json"]
    monkeypatch.setattr("sys.argv", ["lint_config.py", *paths])
    assert lint_config.main() == 0
    assert "warn" not in capsys.readouterr().out
