"""A run that is stopped anywhere and started again is the run that was not: what is saved, what is trusted, what is
refused. That a finished run says so is in test_outputs.py, steps named by path are in test_errors.py."""

import argparse
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import BASE, BIN, ROOT, TINY, ZERO, command, load_script, run

RATES = {"tokens_per_second", "peak_memory_gib", "mfu"}
STAGES = ["zero1", "zero2", "zero3", "zero_offload", "zero3_offload"]
TWO_RANKS = {"ranks": 2, "batch_size": 4, "save_interval": 10}
STOPPED = "stopped by a signal: step "
SHORT = TINY | {"precision": "fp32", "batch_size": 4, "log_interval": 1, "max_steps": 8}


def figures(folder: Path) -> list[dict]:
    """All that metrics.jsonl holds but rates and memory."""
    records = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{name: value for name, value in record.items() if name not in RATES} for record in records]


def weights(folder: Path) -> bytes:
    return (folder / "model" / "model.safetensors").read_bytes()


def steps(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").glob("step*"))


def manifest(folder: Path, step: int) -> dict:
    return json.loads((folder / "checkpoints" / f"step{step}" / "run.json").read_text())


def unfinished(folder: Path, copy: Path) -> Path:
    """A copy of a finished run as it was after its last save."""
    shutil.copytree(folder, copy)
    shutil.rmtree(copy / "model")
    (copy / "summary.json").unlink()
    return copy


def assert_same(folder: Path, other: Path) -> None:
    assert figures(folder) == figures(other)
    assert weights(folder) == weights(other)


@pytest.fixture
def base(monkeypatch, capsys):
    """A function that runs GPTLike-Base.py in this process and returns its exit code or message, and what it printed.
    With stop=K a signal comes in step K."""
    module, handlers = load_script(BASE), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    update, threads = module.PlainRun.update, torch.get_num_threads()
    torch.set_num_threads(1)  # two crawl where others use the cores, too
    monkeypatch.setattr(module, "end_alone", sys.exit)

    def base(folder: Path, *, stop: int = 0, number: int = signal.SIGTERM, **flags: object) -> tuple[object, str]:
        def update_and_stop(run) -> None:
            update(run)
            if run.step + 1 == stop:
                signal.raise_signal(number)

        monkeypatch.setattr(module.PlainRun, "update", update_and_stop)
        monkeypatch.setattr("sys.argv", command(BASE, launcher="python", output_dir=folder, **SHORT | flags)[1:])
        code = 0
        try:
            module.stop_on_user_error(module.main)
        except SystemExit as end:
            code = end.code
        return code, capsys.readouterr().out

    yield base
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def text_folder(path: Path, words: str = "one two three four five six seven eight nine ten") -> Path:
    """A data set so small that a few steps are an epoch."""
    path.mkdir()
    (path / "train.txt").write_text("".join(f"{words} {line}\n" for line in range(25)))
    (path / "valid.txt").write_text(f"{words}\n" * 9)
    return path


# Stopped and resumed: the same to the last bit.
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stopped_at_any_step(base, tmp_path, precision):
    """Over the ends of epochs, with dropout on and validations between: a signal in step K saves K + 1 and ends."""
    flags = {"dataset": text_folder(tmp_path / "text"), "tokenizer": "bpe:260", "precision": precision}
    flags |= {"eval_interval": 3, "save_interval": 2, "block_size": 16, "batch_size": 16}
    assert base(tmp_path / "whole", **flags)[0] == 0
    whole = tmp_path / "whole"
    for stop in range(1, 8):
        folder = tmp_path / f"stopped{stop}"
        code, printed = base(folder, stop=stop, **flags)
        assert code == 143 and f"stopped by a signal: step {stop + 1} is saved, the same command continues" in printed
        assert manifest(folder, stop + 1)["step"] == stop + 1 and not (folder / "summary.json").exists()
        code, printed = base(folder, **flags)
        assert code == 0 and f"resumed from {folder}/checkpoints/step{stop + 1} at step {stop + 1}" in printed
        assert_same(folder, whole)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("config", "precision", "damage", "reason"),
    [
        ("zero2", "fp32", "delete", "No such file or directory"),
        ("zero3", "fp32", "unsealed", "run.json"),
        pytest.param("zero1", "fp32", "truncate", "_optim_states.pt has 999 bytes", marks=pytest.mark.drill),
        pytest.param("zero_offload", "fp32", "half", "Expecting ", marks=pytest.mark.drill),
        pytest.param("zero3_offload", "fp32", "foreign", "it has no files of rank 0", marks=pytest.mark.drill),
        pytest.param("zero2", "bf16", "truncate", "_optim_states.pt has 999 bytes", marks=pytest.mark.drill),
        pytest.param("zero3_offload", "bf16", "unsealed", "run.json", marks=pytest.mark.drill),
    ],
)
def test_two_ranks_resume_exactly(train, tmp_path, config, precision, damage, reason):
    """The last step of a run is damaged on rank 1: named and passed over, and from the one before, in the midst of an
    epoch and with dropout, the run ends with the same bytes."""
    whole = train(config, precision=precision, **TWO_RANKS)
    folder = unfinished(whole.folder, tmp_path / "run")
    last = folder / "checkpoints" / "step20"
    spoil(last, damage)
    flags = TINY | TWO_RANKS | {"max_steps": 20, "log_interval": 1, "precision": precision, "output_dir": folder}
    done = run(command(ZERO[config], ds_config=ROOT / "configs" / f"{config}.json", **flags))
    assert done.returncode == 0, done.stderr
    assert f"{last} on host {socket.gethostname()} is not a whole checkpoint: " in done.stdout
    assert reason in done.stdout and ": passed over\n" in done.stdout
    assert f"resumed from {folder}/checkpoints/step10 at step 10" in done.stdout
    assert_same(folder, whole.folder)
    assert steps(folder) == ["step10", "step20"] and (folder / "checkpoints" / "latest").read_text() == "step20"


def spoil(step: Path, damage: str) -> None:
    """In one of the ways in which a step is not whole."""
    file = next(path for path in sorted(step.iterdir()) if "rank_1" in path.name and "optim" in path.name
                or path.name == "state.pt")  # fmt: skip
    if damage == "truncate":
        os.truncate(file, 999)
    elif damage == "delete":
        file.unlink()
    elif damage == "unsealed":
        (step / "run.json").unlink()
    elif damage == "half":
        (step / "run.json").write_text((step / "run.json").read_text()[:60])
    else:  # another step's files under this name
        shutil.rmtree(step)
        shutil.copytree(next(path for path in step.parent.glob("step*")), step)


# Signals.
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_plain_python_with_128_and_its_number(base, tmp_path, number, code):
    assert base(tmp_path, stop=3, number=number)[0] == code
    assert steps(tmp_path) == ["step4"]


def test_a_repeated_signal_is_the_first_for_a_second(monkeypatch):
    """Launchers repeat theirs. One that comes later ends the process at once."""
    module, handlers = load_script(BASE), {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    now, ended = [100.0], []
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(module.os, "_exit", ended.append)
    try:
        caught = module.catch_signals()
        for moment, number in ((100.0, signal.SIGTERM), (100.9, signal.SIGINT), (101.1, signal.SIGINT)):
            assert ended == []
            now[0] = moment
            signal.raise_signal(number)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
    assert ended == [130] and caught[0] == (signal.SIGTERM, 100.0)


@pytest.mark.slow
def test_a_second_signal_ends_at_once(tmp_path, monkeypatch):
    """In the midst of a step of minutes. What was said before it is in the file already."""
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    flags = SHORT | {"gradient_accumulation_steps": 100_000, "max_steps": 2, "output_dir": tmp_path / "run"}
    with start(command(BASE, launcher="python", **flags), tmp_path / "screen") as process:
        wait_for(lambda: "model: " in (tmp_path / "screen").read_text(), process)
        time.sleep(1)
        process.send_signal(signal.SIGINT)
        time.sleep(1.5)
        assert process.poll() is None  # it would save at the step's end
        process.send_signal(signal.SIGINT)
        assert process.wait(2) == 130
    assert steps(tmp_path / "run") == []


def start(words: list[str], screen: Path, **env: str) -> subprocess.Popen:
    """A command in a session of its own, as a terminal would start it."""
    own = {"HF_HUB_OFFLINE": "1", "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    with screen.open("w") as file:
        return subprocess.Popen(
            words, cwd=ROOT, env=os.environ | own | env, stdout=file, stderr=subprocess.STDOUT, start_new_session=True
        )


def wait_for(condition, process: subprocess.Popen, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end or process.poll() is not None:
            os.killpg(process.pid, signal.SIGKILL)
            pytest.fail(f"waited in vain; exit code {process.poll()}")
        time.sleep(0.02)


def last_step(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


@pytest.mark.drill
def test_launchers_that_are_stopped_save_and_continue(train, tmp_path):
    """Four signals, each after a fifth of the run, to the launcher alone or, as Ctrl-C, to all: every time the step is
    saved, and in the end the weights are those of the run that nobody stopped."""
    flags = TINY | {"ranks": 2, "batch_size": 4, "precision": "fp32", "save_interval": 0, "eval_interval": 0}
    flags |= {"max_steps": 500, "log_interval": 1}
    whole, folder, saved = train("zero2", **{k: v for k, v in flags.items() if k not in TINY}), tmp_path / "run", 0
    flags |= {"ds_config": ROOT / "configs" / "zero2.json", "output_dir": folder}
    ways = [("torchrun", signal.SIGTERM), ("deepspeed", signal.SIGINT),
            ("deepspeed", signal.SIGTERM), ("torchrun", signal.SIGINT)]  # fmt: skip
    for launcher, number in ways:
        screen = tmp_path / f"{launcher}{number}"
        goal = last_step(folder) + 80
        with start(command(ZERO["zero2"], launcher=launcher, **flags), screen) as process:
            wait_for(lambda: last_step(folder) >= goal, process)  # noqa: B023
            (os.killpg if number == signal.SIGINT else os.kill)(process.pid, number)
            code, end = process.wait(40), time.monotonic() + 20
        while STOPPED not in (printed := screen.read_text()) and time.monotonic() < end:
            time.sleep(0.1)  # deepspeed's runner ends before its ranks
        assert code != 0 and printed.count(STOPPED) == 1, printed[-3000:]
        assert saved == 0 or f"at step {saved}\n" in printed
        saved = int(printed.split(STOPPED)[1].split()[0])
        assert goal <= saved <= last_step(folder) and manifest(folder, saved)["step"] == saved
    done = run(command(ZERO["zero2"], **flags))
    assert done.returncode == 0 and f"at step {saved}\n" in done.stdout, done.stderr
    assert_same(folder, whole.folder)


# What counts as a checkpoint.
@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("truncate", "state.pt has 999 bytes instead of "),
        ("delete", "No such file or directory: "),
        ("unsealed", "No such file or directory: "),
        ("half", "Expecting "),
        ("foreign", "it has no files of rank 0 at this step"),
    ],
)
def test_a_damaged_step_is_named_and_passed_over(base, tmp_path, damage, reason):
    assert base(tmp_path / "whole", save_interval=4)[0] == 0
    folder = unfinished(tmp_path / "whole", tmp_path / "run")
    spoil(folder / "checkpoints" / "step8", damage)
    code, printed = base(folder, save_interval=4)
    assert code == 0 and f"checkpoints/step8 on host {socket.gethostname()} is not a whole checkpoint: " in printed
    assert reason in printed and f"resumed from {folder}/checkpoints/step4 at step 4" in printed
    assert_same(folder, tmp_path / "whole")


def test_a_run_killed_before_the_manifest_has_not_saved(base, tmp_path, monkeypatch):
    """run.json comes last: whatever ends the process before it leaves a step that does not count."""
    module = load_script(BASE)
    write = module.write
    assert base(tmp_path / "whole", save_interval=3)[0] == 0

    def write_or_die(path: Path, value: object) -> None:
        if path.name == "run.json" and path.parent.name == "step6":
            assert (path.parent / "state.pt").stat().st_size > 1e6  # all the rest is there
            sys.exit("killed")
        write(path, value)

    monkeypatch.setattr(module, "write", write_or_die)
    assert base(tmp_path / "run", save_interval=3)[0] == "killed"
    monkeypatch.setattr(module, "write", write)
    assert steps(tmp_path / "run") == ["step3", "step6"]
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == "step3"
    code, printed = base(tmp_path / "run", save_interval=3)
    assert code == 0 and "step6 on host" in printed and "checkpoints/step3 at step 3" in printed
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_files_are_put_in_place_by_rename(tmp_path, monkeypatch):
    module, moves = load_script(BASE), []
    replace = os.replace
    monkeypatch.setattr(module.os, "replace", lambda old, new: (moves.append((old, new)), replace(old, new)))
    seal(module, tmp_path, 5, None)
    assert [(old.parent == new.parent, old.name[0], new.name) for old, new in moves] == [
        (True, ".", "run.json"), (True, ".", "latest")]  # fmt: skip
    assert (tmp_path / "latest").read_text() == "step5"
    assert json.loads((tmp_path / "step5" / "run.json").read_text())["files"] == {"part": 3}


def seal(module, root: Path, step: int, loss: float | None) -> list[str]:
    """Seal a step made of one file; the folders that are left."""
    folder = root / f"step{step}"
    folder.mkdir(exist_ok=True)
    (folder / "part").write_text("abc")
    facts = {"step": step, "best": None, "seconds": 0.0, "saving": 0.0, "validation_loss": loss}
    facts |= {"settings": {}, "ledger": {}, "hosts": ["a"]}
    module.seal(folder, facts, argparse.Namespace(has=lambda folder: (folder / "part").exists()))
    return sorted(path.name for path in root.iterdir() if path.is_dir())


def test_two_steps_are_kept_and_the_best(tmp_path):
    module = load_script(BASE)
    assert seal(module, tmp_path, 1, 3.0) == ["step1"]
    assert seal(module, tmp_path, 2, 1.0) == ["step1", "step2"]
    assert seal(module, tmp_path, 3, None) == ["step2", "step3"]
    assert seal(module, tmp_path, 4, 2.0) == ["step2", "step3", "step4"]
    (tmp_path / "step4" / "part").unlink()  # a damaged one is no longer one of the last two
    assert seal(module, tmp_path, 5, 4.0) == ["step2", "step3", "step5"]
    assert seal(module, tmp_path, 6, 0.5) == ["step5", "step6"]
    assert seal(module, tmp_path, 10, None) == ["step10", "step6"]  # by number, not by name
    shutil.copytree(tmp_path / "step10", tmp_path / "step10.mine")
    assert seal(module, tmp_path, 11, None) == ["step10", "step10.mine", "step11", "step6"]  # a copy is not ours


@pytest.mark.slow
@pytest.mark.parametrize("config", STAGES)
def test_the_manifest_lists_every_rank_s_files(train, config):
    done = train(config, precision="fp32", **TWO_RANKS)
    for step in (10, 20):
        folder, facts = done.folder / "checkpoints" / f"step{step}", manifest(done.folder, step)
        found = {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*") if path.is_file()}
        assert facts["files"] == {name: size for name, size in found.items() if name != "run.json"}
        assert sum("optim_states.pt" in name for name in facts["files"]) == 2
        stage = 2 if config == "zero_offload" else int(config[4])
        assert (facts["settings"]["world size"], facts["settings"]["ZeRO stage"]) == (2, stage)


def test_too_little_free_space_is_seen_before_a_byte_is_written(base, tmp_path, monkeypatch):
    usage, left = shutil.disk_usage, iter([10**9, 10**9, 12_345])
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(path)._replace(free=next(left)))
    code, _ = base(tmp_path, save_interval=2)
    assert code.startswith(f"{BASE}: error: cannot save {tmp_path}/checkpoints/step6: it needs about 2,682,880 bytes")
    assert " and 12,345 are free. The checkpoints before it are as they were: free some space, and the same" in code
    assert manifest(tmp_path, 2)["files"].keys() == {"state.pt"} and manifest(tmp_path, 4)["step"] == 4
    monkeypatch.undo()


# What is carried on, and what is refused.
def test_best_loss_and_seconds_are_carried_on(base, tmp_path):
    flags = {"eval_interval": 2, "save_interval": 0, "max_steps": 9}
    assert base(tmp_path / "whole", **flags)[0] == 0
    assert base(tmp_path / "run", stop=4, **flags)[0] == 143
    found = {line["step"]: line["validation_loss"] for line in figures(tmp_path / "run") if "validation_loss" in line}
    before = manifest(tmp_path / "run", 5)
    assert before["best"] == min(found.values()) == found[4] and before["seconds"] > before["saving"] > 0
    assert base(tmp_path / "run", **flags)[0] == 0
    whole, summary = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "run"))
    assert summary["best_validation_loss"] == whole["best_validation_loss"]
    assert summary["seconds"] > before["seconds"] and summary["saving_seconds"] > before["saving"]
    assert summary["saving_seconds"] < summary["seconds"] < before["seconds"] + 60
    assert manifest(tmp_path / "run", 8)["best"] == manifest(tmp_path / "whole", 8)["best"]


def test_a_run_stopped_in_its_last_step_has_a_whole_summary(base, tmp_path):
    """Nothing is left to train: the second start only finishes."""
    assert base(tmp_path / "whole")[0] == 0
    code, printed = base(tmp_path / "run", stop=7)
    assert code == 143 and "step 8 is saved" in printed
    assert base(tmp_path / "run")[0] == 0
    assert_same(tmp_path / "run", tmp_path / "whole")
    whole, summary = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("whole", "run"))
    assert whole.keys() == summary.keys() and summary["steps"] == 8
    assert summary["ledger"] == whole["ledger"]


def test_a_run_killed_while_it_finishes_repeats_no_line(base, tmp_path, monkeypatch):
    """After the last evaluation is logged and before summary.json is there."""
    module = load_script(BASE)
    assert base(tmp_path / "whole")[0] == 0
    with monkeypatch.context() as patch:
        patch.setattr(module, "check_model", lambda *_: sys.exit("killed"))
        assert base(tmp_path / "run")[0] == "killed"
    assert base(tmp_path / "run")[0] == 0
    assert_same(tmp_path / "run", tmp_path / "whole")


def test_other_settings_are_refused_with_both_values(base, tmp_path):
    """And what the folder holds stays as it is, its args.json too: it says how the run was made."""
    folder = tmp_path / "run"
    assert base(folder, save_interval=4, stop=4)[0] == 143
    kept = contents(folder)
    text, settled = text_folder(tmp_path / "text"), manifest(folder, 5)["settings"]
    for flags, name, had, wanted in (
        ({"n_layer": 3}, "n_layer", 2, 3),
        ({"d_model": 128}, "d_model", 64, 128),
        ({"seed": 43}, "seed", 42, 43),
        ({"precision": "bf16"}, "precision", "fp32", "bf16"),
        ({"batch_size": 8}, "batch_size", 4, 8),
        ({"tokenizer": "bpe:512"}, "data and tokenizer", settled["data and tokenizer"], None),
        ({"dataset": text}, "data and tokenizer", settled["data and tokenizer"], None),
    ):
        code, _ = base(folder, save_interval=4, **flags)
        assert f"checkpoints/step5 has {name} {had}, this run {wanted or ''}" in code
        assert code.endswith(": take the former, or start afresh with --overwrite or another --output_dir")
        assert wanted or code.count(had) == 1  # the other digest is another
        assert contents(folder) == kept, flags


def contents(folder: Path) -> dict[str, bytes]:
    """Of all files but hidden ones; and each start may have its own run_id."""
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("[!.]*") if path.is_file()}
    return files | {"args.json": json.loads(files["args.json"]) | {"run_id": ""}}


def test_a_finished_run_keeps_its_args(base, tmp_path):
    assert base(tmp_path)[0] == 0
    code, printed = base(tmp_path, lr=0.5)
    assert code == 0 and "this run is finished: 8 steps, see " in printed
    assert json.loads((tmp_path / "args.json").read_text())["lr"] == 6e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("made_by", "config", "ranks", "name", "had", "wanted"),
    [
        ("zero2", "zero1", 2, "ZeRO stage", 2, 1),
        ("zero2", "zero2", 1, "world size", 2, 1),
        ("one rank", "zero2", 2, "world size", 1, 2),
        ("base", "zero1", 1, "ZeRO stage", 0, 1),
        ("zero2", None, 1, "ZeRO stage", 2, 0),
    ],
)
def test_other_stages_and_world_sizes_are_refused(train, base, tmp_path, made_by, config, ranks, name, had, wanted):
    folder, flags = tmp_path / "run", TINY | {"precision": "fp32", "batch_size": 4, "max_steps": 30}
    if made_by == "base":
        assert base(tmp_path / "made")[0] == 0  # in this process, which goes on holding that folder's lock
        shutil.copytree(tmp_path / "made", folder)
    else:
        shutil.copytree(train("zero2", precision="fp32", **TWO_RANKS).folder, folder)
    if made_by == "one rank":
        make_one_rank(folder)
    lines = (folder / "metrics.jsonl").read_text()
    words = {"launcher": "python"} if ranks == 1 else {"ranks": ranks}
    done = run(command(ZERO[config] if config else BASE, output_dir=folder, **words, **flags))
    printed = done.stdout + done.stderr
    assert done.returncode == 1, printed
    way = "" if made_by == "base" or config is None else ", move it with scripts/reshape_checkpoint.py"
    message = f" has {name} {had}, this run {wanted}: take the former{way}, or start afresh with"
    assert printed.count(message) == 1, printed
    assert (folder / "metrics.jsonl").read_text() == lines


def make_one_rank(folder: Path) -> None:
    """The checkpoints that one rank would have written there."""
    for manifest in folder.glob("checkpoints/step*/run.json"):
        facts = json.loads(manifest.read_text())
        for name in [name for name in facts["files"] if "rank_1" in name]:
            (manifest.parent / name).unlink()
            del facts["files"][name]
        facts["settings"]["world size"] = 1
        manifest.write_text(json.dumps(facts))


# The final weights.
@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("config", STAGES)
def test_model_gives_the_printed_loss_by_itself(train, config, precision):
    """Every stage's model/, loaded without DeepSpeed: the mean cross-entropy over all validation tokens."""
    module, done = load_script(BASE), train(config, precision=precision, **TWO_RANKS)
    args = argparse.Namespace(**done.json("args"))
    found = safetensors.torch.load_file(done.folder / "model" / "model.safetensors")
    corpus = module.load_corpus(args)
    model = module.GPTLike(args, corpus.vocab_size).to(found["final_norm.weight"].dtype).eval()
    model.load_state_dict(found | {"head.weight": found["token_embedding.weight"]})
    data = module.TokenizedDataset(corpus.streams["validation"], args.block_size, pad=True)
    inputs, targets = data[torch.arange(len(data))]
    with torch.no_grad():
        logits = model(inputs).float()
    loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten()).item()
    assert loss == pytest.approx(done.json("summary")["validation_loss"], abs=1e-4)
    assert found["final_norm.weight"].dtype == {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]


def test_a_bad_write_of_the_final_weights_is_found(base, tmp_path, monkeypatch):
    save_file = safetensors.torch.save_file

    def spoil_and_save(weights, path, *rest) -> None:
        spoilt = {"final_norm.bias": weights["final_norm.bias"] + 0.5} if Path(path).name == "model.safetensors" else {}
        save_file(weights | spoilt, path, *rest)

    monkeypatch.setattr(safetensors.torch, "save_file", spoil_and_save)
    code, printed = base(tmp_path)
    loss = figures(tmp_path)[-1]["validation_loss"]
    assert f"read back, {tmp_path}/model has a validation loss of " in code and code.endswith(f"not the run's {loss}")
    assert not (tmp_path / "summary.json").exists() and "saved " not in printed
    monkeypatch.undo()
