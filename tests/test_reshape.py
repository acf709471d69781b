"""scripts/reshape_checkpoint.py: a run goes on with other ranks, or at another stage, as if nothing had happened."""

import fcntl
import hashlib
import json
import re
import shlex
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from conftest import BIN, ROOT, ZERO, free_port, load_script, run

TOOL = ROOT / "scripts" / "reshape_checkpoint.py"
SHAPE = {"n_layer": 2, "n_head": 4, "d_model": 64, "block_size": 32, "seed": 42, "precision": "fp32"}
# Losses that a wrong momentum, variance or schedule would move by far more than 1e-5.
TRAINED = {"precision": "fp32", "dropout": 0, "lr": 1e-2, "warmup_steps": 1, "max_steps": 8, "save_interval": 5}


def reshape(*words: object) -> subprocess.CompletedProcess:
    return run([sys.executable, str(TOOL), *map(str, words)])


def digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="session")
def tool():
    return load_script("reshape_checkpoint.py")


@pytest.fixture(scope="session")
def script():
    return load_script(ZERO["zero2"])


def write_checkpoint(folder: Path, step: int, *, stage: int = 2, ranks: int = 2, **settings: object) -> Path:
    """A checkpoint in all but the content of its files, and the run's JSONs beside it."""
    checkpoint = folder / "checkpoints" / f"step{step}"
    checkpoint.mkdir(parents=True)
    names = [f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)]
    for name in [*names, "mp_rank_00_model_states.pt"]:
        (checkpoint / name).write_bytes(b"8 bytes.")
    facts = {"ZeRO stage": stage, "world size": ranks, "data and tokenizer": "c3dda16b8e71"}
    facts |= SHAPE | {"batch_size": 4, "gradient_accumulation_steps": 1} | settings
    manifest = {"step": step, "best": None, "seconds": 1.0, "saving": 0.1, "validation_loss": None, "settings": facts}
    manifest |= {"ledger": {}, "hosts": ["a", "a"]}
    manifest["files"] = {path.name: 8 for path in checkpoint.iterdir()}
    (checkpoint / "run.json").write_text(json.dumps(manifest))
    zero = {"stage": stage}
    (folder / "ds_config.json").write_text(json.dumps({"optimizer": {"type": "AdamW"}, "zero_optimization": zero}))
    (folder / "args.json").write_text(json.dumps(SHAPE | {"max_steps": 10, "dataset": "sample", "compile": True}))
    return checkpoint


# pure parts


@pytest.mark.parametrize(
    ("global_batch", "ranks", "micro", "wanted", "expected"),
    [(16, 1, 8, None, (8, 2)), (16, 4, 8, None, (4, 1)), (24, 2, 8, None, (6, 2)), (8, 8, 4, None, (1, 1)),
     (64, 2, 4, None, (4, 8)), (64, 2, 4, 16, (16, 2)), (14, 1, 4, None, (2, 7))],
)  # fmt: skip
def test_the_global_batch_is_kept_and_no_micro_batch_is_larger_unless_asked(
    tool, global_batch, ranks, micro, wanted, expected
):
    assert tool.divide(global_batch, ranks, micro, wanted) == expected


def test_a_batch_that_does_not_divide_is_refused_with_the_numbers_that_would(tool):
    with pytest.raises(ValueError, match=r"batch of 12 .* among 5 ranks: --world_size may be one of 1 2 3 4 6 12$"):
        tool.divide(12, 5, 4, None)
    with pytest.raises(ValueError, match=r"--batch_size 4 does not divide the 6 sequences .* one of 1 2 3 6$"):
        tool.divide(12, 2, 4, 4)


def test_the_newest_whole_checkpoint_is_taken_and_a_broken_one_is_named(tool, script, tmp_path, capsys):
    first, second, third = (write_checkpoint(tmp_path, step) for step in (5, 10, 15))
    (third / "mp_rank_00_model_states.pt").write_bytes(b"cut")
    folder, facts = tool.find_checkpoint(tmp_path, None, script)
    assert (folder, facts["step"]) == (second, 10)
    assert "step15" in (said := capsys.readouterr().err) and "has 3 bytes instead of 8: passed over" in said
    assert tool.find_checkpoint(tmp_path, 5, script)[0] == first
    (second / "run.json").unlink()
    with pytest.raises(ValueError, match=r"no whole checkpoint of step 10; whole are: 5\. .*step10 .*No such file"):
        tool.find_checkpoint(tmp_path, 10, script)
    with pytest.raises(ValueError, match="no whole checkpoint of step 7; whole are: 5"):
        tool.find_checkpoint(tmp_path, 7, script)


def test_what_cannot_be_reshaped_is_refused_by_name(tool, script, tmp_path):
    with pytest.raises(ValueError, match="has no whole checkpoint; whole are: none"):
        tool.find_checkpoint(tmp_path, None, script)
    write_checkpoint(tmp_path / "base", 5, stage=0, ranks=1)
    with pytest.raises(ValueError, match=r"base is a run of GPTLike-Base.py, whose checkpoints DeepSpeed cannot read"):
        tool.find_checkpoint(tmp_path / "base", None, script)
    checkpoint = write_checkpoint(tmp_path / "split", 5, ranks=4)  # on two disks, of which this is the first
    manifest = json.loads((checkpoint / "run.json").read_text())
    for rank in (2, 3):
        (checkpoint / (name := f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt")).unlink()
        del manifest["files"][name]
    (checkpoint / "run.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="step5 has no files of rank 2 3: copy them here from the other hosts"):
        tool.find_checkpoint(tmp_path / "split", None, script)


def test_settings_that_no_cpu_engine_can_hold(tool, tmp_path):
    write_checkpoint(tmp_path, 5)
    facts, name = {"ZeRO stage": 2, "precision": "fp32"}, tmp_path / "ds_config.json"
    with pytest.raises(ValueError, match=r"ds_config.json has stage 2, the checkpoint 3: another run was tried here"):
        tool.new_config(tmp_path, facts | {"ZeRO stage": 3}, 3)
    with pytest.raises(ValueError, match="fp16, which does not run on a CPU"):
        tool.new_config(tmp_path, facts | {"precision": "fp16"}, 2)
    name.write_text(json.dumps({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "nvme"}}}))
    with pytest.raises(ValueError, match="keeps its states on NVMe"):
        tool.new_config(tmp_path, facts, 2)
    name.write_text("{")
    with pytest.raises(ValueError, match="cannot read .*ds_config.json: .* RUN has to be the --output_dir of a ZeRO"):
        tool.new_config(tmp_path, facts, 2)


def test_the_new_json_has_the_new_stage_and_nothing_of_the_old_ranks(tool, tmp_path):
    write_checkpoint(tmp_path, 5)
    old = {"zero_optimization": {"stage": 2}, "train_batch_size": 8, "checkpoint": {"use_node_local_storage": True}}
    (tmp_path / "ds_config.json").write_text(json.dumps(old))
    facts = {"ZeRO stage": 2, "precision": "fp32"}
    assert tool.new_config(tmp_path, facts, 2) == {"zero_optimization": {"stage": 2}}
    wanted = json.loads((ROOT / "configs" / "zero3.json").read_text())["zero_optimization"]
    assert tool.new_config(tmp_path, facts, 3) == {"zero_optimization": wanted}


def test_the_command_names_what_is_no_default_and_the_checkpoint_beats_the_last_flags(tool, script, tmp_path):
    write_checkpoint(tmp_path, 5, batch_size=8, n_layer=3)
    options = Namespace(run=tmp_path, world_size=4, stage=None, step=None, batch_size=None)
    target = Path("new run")
    words = tool.continue_command(tool.make_plan(options, target, script), target, 4, script)
    assert words[:4] == ["torchrun", "--nproc_per_node", "4", words[3]] and words[3].endswith(ZERO["zero2"])
    assert shlex.join(words[4:]) == (
        "--ds_config 'new run/ds_config.json' --n_layer 3 --n_head 4 --d_model 64 --block_size 32 --dataset sample "
        "--compile --batch_size 4 --gradient_accumulation_steps 1 --max_steps 10 --output_dir 'new run'"
    )


def test_one_changed_bit_is_found(tool, tmp_path):
    common = {"step": 5, "groups": [{"lr": 1e-3, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.1}]}
    for side in ("old", "new"):
        (folder := tmp_path / side / "zero" / "final_norm.bias").mkdir(parents=True)
        for state in tool.STATES:
            torch.save({"param": torch.ones(8)} if side == "old" else torch.ones(8), folder / f"{state}.pt")
    sides = tmp_path / "old", tmp_path / "new"
    assert tool.compare(*sides, dict(common), dict(common)) == 3
    with pytest.raises(ValueError, match="step is 6 instead of 5"):
        tool.compare(*sides, dict(common), common | {"step": 6})
    other = [common["groups"][0] | {"weight_decay": 0.0}]
    with pytest.raises(ValueError, match="groups is .* 0.0.* instead of .* 0.1"):
        tool.compare(*sides, dict(common), common | {"groups": other})
    torch.save(torch.ones(8).index_fill(0, torch.tensor(3), 1 + 2**-23), folder / "exp_avg_sq.pt")
    with pytest.raises(ValueError, match=r"exp_avg_sq of final_norm.bias differs from the old one"):
        tool.compare(*sides, dict(common), dict(common))


# messages and exit codes


@pytest.mark.parametrize(
    ("words", "message"),
    [([], "the following arguments are required: RUN, --world_size"),
     (["runs", "--world_size", "0"], "--world_size 0 must be at least 1"),
     (["runs", "--world_size", "2", "--batch_size", "-4"], "--batch_size -4 must be at least 1"),
     (["runs", "--world_size", "2", "--stage", "4"], "argument --stage: invalid choice: 4"),
     (["runs", "--world_size", "two"], "argument --world_size: invalid int value: 'two'")],
)  # fmt: skip
def test_wrong_usage_ends_with_exit_code_2(words, message):
    result = reshape(*words)
    assert result.returncode == 2
    assert message in result.stderr.splitlines()[-1]


def test_bad_folders_end_with_exit_code_1_and_one_line(tmp_path):
    write_checkpoint(tmp_path / "run", 5)
    (tmp_path / "taken").mkdir()
    for source, target, message in [
        ("none", "new", f"{tmp_path}/none: no such folder"),
        ("run", "taken", f"{tmp_path}/taken exists: choose another --output"),
        ("run", "a/b", f"{tmp_path}/a: no such folder"),
    ]:
        result = reshape(tmp_path / source, "--world_size", 1, "--output", tmp_path / target)
        assert (result.returncode, result.stdout) == (1, "")
        assert re.fullmatch(rf"reshape_checkpoint.py: error: {re.escape(message)}\n", result.stderr)


def test_a_run_that_is_being_trained_is_left_alone(tmp_path):
    write_checkpoint(tmp_path / "run", 5)
    with (tmp_path / "run" / ".lock").open("w") as lock:
        fcntl.lockf(lock, fcntl.LOCK_EX)
        result = reshape(tmp_path / "run", "--world_size", 1)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr == (f"reshape_checkpoint.py: error: a training process is writing to {tmp_path}/run: stop it "
                             "first, it saves before it ends\n")  # fmt: skip


def test_help_warns_of_strangers_checkpoints():
    assert "Reshape no checkpoint of a stranger: DeepSpeed unpickles it" in reshape("--help").stdout


@pytest.mark.slow
def test_a_failure_names_its_cause_and_leaves_nothing(tmp_path):
    """Files that are whole by their size and no checkpoint by their content; and a shape that the run has already."""
    write_checkpoint(tmp_path / "run", 5)
    before = digests(tmp_path)
    for words, message in [
        (["--world_size", 1], r"DeepSpeed's ds_to_universal on \S+/checkpoints/step5 failed: .*"),
        (["--world_size", 2], r"\S+/run has stage 2, 2 ranks and a micro batch of 4 already"),
    ]:
        result = reshape(tmp_path / "run", *words)
        assert (result.returncode, result.stdout) == (1, "")
        assert re.fullmatch(f"reshape_checkpoint.py: error: {message}", result.stderr.splitlines()[-1])
        assert "Traceback" not in result.stderr
        assert digests(tmp_path) == before and [path.name for path in tmp_path.iterdir()] == ["run"]


# the same losses


SHORT = [("zero3", 2, 1, None, 6, 2), ("zero2", 2, 3, 3, 4, 1)]
LONG = [
    ("zero2", 2, 4, None, 3, 1),
    ("zero3", 2, 4, None, 3, 1),
    ("zero3", 2, 1, 2, 6, 2),
    ("zero1", 2, 1, None, 6, 2),
    ("zero_offload", 2, 1, None, 6, 2),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "ranks", "new_ranks", "stage", "micro", "accumulation"),
    [*SHORT, *(pytest.param(*case, marks=pytest.mark.drill) for case in LONG)],
)
def test_a_reshaped_run_has_the_losses_of_the_unreshaped_one(
    train, tmp_path, config, ranks, new_ranks, stage, micro, accumulation
):
    source = train(config, ranks=ranks, batch_size=12 // ranks, **TRAINED)
    before = digests(source.folder)
    words = ["--world_size", new_ranks, "--step", 5, "--output", tmp_path / "new"]
    result = reshape(source.folder, *words, *(["--stage", stage] if stage else []))
    assert result.returncode == 0, result.stderr
    assert digests(source.folder) == before
    first, command = result.stdout.splitlines()
    assert first == f"{tmp_path}/new: 84 tensors, weights and Adam's states, are equal bit for bit. Continue with"
    assert f"--batch_size {micro} --gradient_accumulation_steps {accumulation} --max_steps 8" in command
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]

    torchrun, *rest = shlex.split(command)
    continued = run([str(BIN / torchrun), "--master_port", str(free_port()), *rest])
    assert continued.returncode == 0, continued.stdout + continued.stderr
    assert "step5 at step 5" in continued.stdout and f"world size {new_ranks}, " in continued.stdout
    lines = [json.loads(line) for line in (tmp_path / "new" / "metrics.jsonl").read_text().splitlines()]
    for name, tolerance in (("loss", 1e-5), ("lr", 1e-12), ("validation_loss", 1e-5)):
        values = [line[name] for line in lines if name in line]
        assert values == pytest.approx(source.metrics(name), abs=tolerance, rel=0), name
