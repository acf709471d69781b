"""The scripts as their readers start them, and what a run leaves behind."""

import json
import os
import shutil

import pytest
import safetensors.torch
from conftest import (
    BASE,
    MULTIHOSTS,
    OFFLOAD,
    ROOT,
    TINY,
    ZERO1,
    ZERO2,
    ZERO3,
    command,
    losses,
    read_json,
    require_nvme,
    run,
    run_script,
    train,
)

pytestmark = pytest.mark.slow
STEPS = ["--max_steps", "3", "--warmup_steps", "0"]
CONFIG_OF = {ZERO1: "zero1", ZERO2: "zero2", ZERO3: "zero3", OFFLOAD: "zero_offload", MULTIHOSTS: "multihosts"}


@pytest.mark.parametrize("script", [BASE, *CONFIG_OF])
def test_alone_in_an_empty_folder(script, tmp_path):
    """One script and its JSON, plain python, from a folder whose name has spaces."""
    folder = tmp_path / "a folder"
    (folder / "configs").mkdir(parents=True)
    shutil.copy(ROOT / script, folder)
    if script != BASE:
        shutil.copy(ROOT / "configs" / f"{CONFIG_OF[script]}.json", folder / "configs")
    if script in (BASE, ZERO3):  # as a reader types it
        words = command(script, *TINY, *STEPS, launcher="python")
        words[1] = script
        result = run(words, cwd=folder)
    else:
        result = run_script(folder / script, *TINY, *STEPS, cwd=folder)
    assert result.returncode == 0, result.stderr
    output = folder / "runs" / script.removesuffix(".py")
    stage = {BASE: 0, ZERO1: 1, ZERO3: 3}.get(script, 2)
    first = f"{script}: ZeRO stage {stage}, world size 1, precision fp32"
    said = result.stdout.splitlines()
    lines = [line for line in said if "this run takes" not in line and "built successfully" not in line]
    assert lines[0].endswith(first)
    assert (output / script).read_bytes() == (ROOT / script).read_bytes()
    assert read_json(output / "args.json")["max_steps"] == 3
    assert list(losses(output)) == [1, 2, 3] and 6.0 < losses(output)[1] < 6.5
    summary = read_json(output / "summary.json")
    assert summary["steps"] == 3 and summary["best"]["step"] == 3
    ledger = summary["ledger"]
    for kind, unit in (("parameters", 4), ("optimizer_states", 12)):
        row = ledger[f"{kind} on cpu"]
        assert row["formula"] == unit * read_json(output / "args.json")["n_params"]
        assert abs(row["held"] / row["formula"] - 1) < 0.02


def test_base_keeps_fp32_beside_bf16(tmp_path):
    train(BASE, tmp_path / "run", "--precision", "bf16", *STEPS)
    ledger, n_params = [read_json(tmp_path / "run" / name) for name in ("summary.json", "args.json")]
    for kind, unit in (("parameters", 2), ("optimizer_states", 12)):
        row = ledger["ledger"][f"{kind} on cpu"]
        assert row["formula"] == unit * n_params["n_params"] and abs(row["held"] / row["formula"] - 1) < 0.02


def test_two_ranks_under_the_deepspeed_launcher(tmp_path):
    line = command(ZERO2, *TINY, *STEPS, "--output_dir", tmp_path / "run", ranks=2, launcher="deepspeed")
    result = run(line)
    assert result.returncode == 0, result.stderr
    said = result.stdout
    assert "world size 2" in said and said.count("  a rank on ") == 2
    weights = safetensors.torch.load_file(tmp_path / "run" / "model" / "model.safetensors")
    config = read_json(tmp_path / "run" / "model" / "config.json")
    assert config == {"n_layer": 2, "n_head": 4, "d_model": 64, "block_size": 32, "vocab_size": 512}
    assert weights["token_embedding.weight"].shape == (512, 64) and "head.weight" not in weights
    again = run_script(ZERO2, *TINY, *STEPS, "--output_dir", tmp_path / "run", ranks=2)
    assert again.returncode == 0 and "finished: see" in again.stdout


@pytest.mark.parametrize(("script", "ranks"), [(ZERO3, 2), pytest.param(ZERO2, 4, marks=pytest.mark.drill)])
def test_ledger_beside_the_formula(script, ranks, tmp_path):
    train(script, tmp_path / "run", *STEPS, "--batch_size", "1", ranks=ranks)
    summary = read_json(tmp_path / "run" / "summary.json")
    n_params = read_json(tmp_path / "run" / "args.json")["n_params"]
    share = {"parameters": ranks if script == ZERO3 else 1, "optimizer_states": ranks}
    for kind, unit in (("parameters", 4), ("optimizer_states", 12)):
        row = summary["ledger"][f"{kind} on cpu"]
        assert row["formula"] == unit * n_params // share[kind]
        assert abs(row["held"] / row["formula"] - 1) < 0.02


@pytest.mark.drill
def test_the_tutorials_own_json(tmp_path):
    """As its author published it for stage 3: fp16, a fixed total batch, no micro batch; on a CPU with --precision."""
    config = {
        "train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 3e-4}},
        "fp16": {"enabled": True},
        "zero_optimization": {"stage": 3, "overlap_comm": True, "contiguous_gradients": True},
    }
    (tmp_path / "ds_config.json").write_text(json.dumps(config))
    tiny = [word for word in TINY if word != "--batch_size"]
    del tiny[TINY.index("--batch_size")]  # its number: the JSON has one
    flags = [*tiny, *STEPS, "--ds_config", tmp_path / "ds_config.json", "--output_dir", tmp_path / "run"]
    result = run_script(ZERO3, *flags, ranks=2)
    assert result.returncode == 0, result.stderr
    assert "this run takes fp16 {'enabled': False" in result.stdout
    assert read_json(tmp_path / "run" / "args.json")["batch_size"] == 4


@pytest.mark.drill
def test_compile_and_accumulation(tmp_path):
    train(ZERO3, tmp_path / "plain", *STEPS, "--dropout", "0", "--n_layer", "1", ranks=2)
    words = ("--compile", "--gradient_accumulation_steps", "4", "--batch_size", "1", "--dropout", "0", "--n_layer", "1")
    train(ZERO3, tmp_path / "other", *STEPS, *words, ranks=2)
    pairs = zip(losses(tmp_path / "plain").values(), losses(tmp_path / "other").values(), strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-5


@pytest.mark.drill
def test_accumulation_of_base(tmp_path):
    train(BASE, tmp_path / "plain", *STEPS, "--dropout", "0")
    words = ("--gradient_accumulation_steps", "4", "--batch_size", "1", "--dropout", "0")
    train(BASE, tmp_path / "other", *STEPS, *words)
    pairs = zip(losses(tmp_path / "plain").values(), losses(tmp_path / "other").values(), strict=True)
    assert max(abs(a - b) for a, b in pairs) < 1e-5


@pytest.mark.drill
def test_another_version_of_torch(tmp_path):
    """The image of a GPU host may bring another torch: OTHER_TORCH names the Python of an environment that has it."""
    python = os.environ.get("OTHER_TORCH")
    if not python:
        pytest.skip("OTHER_TORCH=/path/to/python of an environment with another torch, such as 2.11.0, is not set")
    for script in (BASE, ZERO1, ZERO2, ZERO3, MULTIHOSTS):
        result = run([python, str(ROOT / script), *TINY, *STEPS, "--output_dir", str(tmp_path / script)])
        assert result.returncode == 0, result.stderr


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_parameters_and_states_on_nvme(tmp_path):
    """DeepSpeed would go on from zeroed moments, so a run is not resumed."""
    require_nvme()
    (tmp_path / "nvme").mkdir()
    words = command(OFFLOAD, *TINY, *STEPS, "--ds_config", ROOT / "configs" / "zero_infinity.json", ranks=2)
    result = run([*words, "--output_dir", str(tmp_path / "run")], cwd=tmp_path, timeout=800)
    assert result.returncode == 0, result.stderr
    assert len(losses(tmp_path / "run")) == 3 and "DeepSpeed cannot resume such a run" in result.stdout
    longer = run([*words, "--output_dir", str(tmp_path / "run"), "--max_steps", "5"], cwd=tmp_path)
    assert longer.returncode == 1 and "stopped at step 3: add --overwrite, or" in longer.stderr
