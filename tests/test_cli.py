"""One grammar for all six scripts: the same flags, and one message for each wrong one."""

import argparse
import os

import pytest
import torch
from conftest import BASE, SCRIPTS, load_script, run

FLAGS = """version n_layer n_head d_model block_size dropout activation_checkpointing compile epochs max_steps
    batch_size gradient_accumulation_steps lr weight_decay warmup_steps precision seed dataset tokenizer output_dir
    resume overwrite log_interval eval_interval save_interval peak_tflops memory_report local_rank""".split()
DEFAULTS = {"n_layer": 6, "n_head": 12, "d_model": 768, "block_size": 256, "dropout": 0.1, "epochs": 3, "seed": 42,
            "dataset": "wikitext2", "tokenizer": "auto", "resume": "auto", "overwrite": False}  # fmt: skip


def flags_of(script: str) -> dict[str, object]:
    actions = load_script(script).build_parser()._actions
    return {
        option.removeprefix("--"): a.default for a in actions for option in a.option_strings if option[2:] == a.dest
    }


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_flag_set_is_frozen(script):
    flags = flags_of(script)
    assert list(flags) == ["help"] * ("help" in flags) + FLAGS
    assert {name: flags[name] for name in DEFAULTS} == DEFAULTS
    assert flags["output_dir"] == f"runs/{script.removesuffix('.py')}"


def test_base_starts_from_the_numbers_of_zero1_json():
    import json

    from conftest import ROOT

    base, config = load_script(BASE), json.loads((ROOT / "configs" / "zero1.json").read_text())
    optimizer = config["optimizer"]["params"]
    assert {
        "batch_size": config["train_micro_batch_size_per_gpu"],
        "gradient_accumulation_steps": config["gradient_accumulation_steps"],
        "lr": optimizer["lr"],
        "weight_decay": optimizer["weight_decay"],
        "precision": "bf16" if config["bf16"]["enabled"] else "fp32",
    } == base.DEFAULTS
    assert (list(base.BETAS), base.EPS) == (optimizer["betas"], optimizer["eps"])
    assert config["gradient_clipping"] == base.GRADIENT_CLIPPING


WRONG = {
    "--d_model 100 --n_head 12": "--d_model 100 is not a multiple of --n_head 12",
    "--d_model 0": "--d_model 0: must be above 0",
    "--n_layer -1": "--n_layer -1: must be above 0",
    "--n_layer 1.5": "argument --n_layer: invalid int value: '1.5'",
    "--n_head two": "argument --n_head: invalid int value: 'two'",
    "--block_size 0": "--block_size 0: must be above 0",
    "--batch_size 0": "--batch_size 0: must be above 0",
    "--gradient_accumulation_steps 0": "--gradient_accumulation_steps 0: must be above 0",
    "--max_steps 0": "--max_steps 0: must be above 0",
    "--epochs 0": "--epochs 0: must be above 0",
    "--log_interval 0": "--log_interval 0: must be above 0",
    "--seed -1": "--seed -1: must be at least 0",
    "--seed 99999999999": "--seed 99999999999: must be below 2**31",
    "--lr nan": "--lr nan: must be above 0",
    "--lr inf": "--lr inf: must be below 2**31",
    "--lr 0": "--lr 0.0: must be above 0",
    "--weight_decay -0.1": "--weight_decay -0.1: must be at least 0",
    "--dropout 1": "--dropout 1.0 must be below 1",
    "--dropout -0.5": "--dropout -0.5: must be at least 0",
    "--precision int8": "argument --precision: invalid choice: 'int8' (choose from",
    "--tokenizer bpe:12": "--tokenizer bpe:12: write bpe:SIZE",
    "--tokenizer bpe:": "--tokenizer bpe:: write bpe:SIZE",
    "--n_layers 4": "unrecognized arguments: --n_layers 4",
}


@pytest.mark.parametrize("words", WRONG)
@pytest.mark.parametrize("script", [BASE, SCRIPTS[2]])
def test_a_wrong_flag_is_usage_and_one_message(script, words, capsys, monkeypatch):
    module = load_script(script)
    monkeypatch.setattr("sys.argv", [script, *words.split()])
    with pytest.raises(SystemExit) as stop:
        module.main()
    message = capsys.readouterr().err
    assert stop.value.code == 2
    assert message.startswith("usage: ") and message.count("error: ") == 1 and WRONG[words] in message


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_other_ranks(script, capsys, monkeypatch):
    module = load_script(script)
    monkeypatch.setattr("sys.argv", [script, "--help"])
    with pytest.raises(SystemExit) as stop:
        module.main()
    assert stop.value.code == 0 and "micro batch: sequences per rank per forward" in capsys.readouterr().out
    if script != BASE:
        monkeypatch.setenv("LOCAL_RANK", "1")
        for words in (["--d_model", "0"], ["--n_layers", "4"]):
            monkeypatch.setattr("sys.argv", [script, *words])
            with pytest.raises(SystemExit) as stop:
                module.main()
            assert stop.value.code == 2 and capsys.readouterr().err == ""  # the host's first rank has said it


def test_local_rank_has_both_spellings_and_the_environment_wins(monkeypatch):
    module = load_script(SCRIPTS[1])
    for word in ("--local_rank=3", "--local-rank=3"):
        assert module.build_parser().parse_args([word]).local_rank == 3
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert module.local_rank() == 1


@pytest.mark.parametrize(("omp", "threads"), [(None, [4]), ("", [4]), ("1", [4]), ("3", [])])
def test_a_rank_takes_its_share_of_the_cores_left_to_it(omp, threads, monkeypatch):
    """By the process's affinity: a container or Slurm may leave it a few of the machine's."""
    module, taken = load_script("DeepSpeed-GPTLike-ZeRO-1.py"), []
    here = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    here |= {"RANK": "0", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "DS_ACCELERATOR": "cpu"}
    monkeypatch.setattr(os, "environ", here | ({} if omp is None else {"OMP_NUM_THREADS": omp}))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8, 17)))
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    for name in ("join_ranks", "prepare_cpu"):
        monkeypatch.setattr(module, name, lambda *_: None)
    assert module.start_distributed(argparse.Namespace(local_rank=0, verbose=False)).type == "cpu"
    assert taken == threads


def test_without_deepspeed_a_script_names_it(tmp_path):
    import sys

    from conftest import ROOT

    (tmp_path / "deepspeed.py").write_text("raise ModuleNotFoundError(\"No module named 'deepspeed'\")")
    done = run([sys.executable, str(ROOT / SCRIPTS[1])], PYTHONPATH=str(tmp_path))
    assert done.returncode == 1 and "No module named 'deepspeed'" in done.stderr
