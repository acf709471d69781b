"""Marks prove shards, all ranks load one step, ZeRO-3's model is never whole: seen with a stand-in for the engine."""

import contextlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ZERO1, ZERO3, load_script, script_args

script = load_script(ZERO1)


class Engine:
    """Records what it is asked; a step's shard is a file of this rank."""

    def __init__(self, calls: list, found: str | None = "path"):
        self.calls, self.found = calls, found

    def save_checkpoint(self, folder, tag, **_):
        self.calls.append(("shards", tag))
        Path(folder, tag).mkdir(parents=True)

    def load_checkpoint(self, folder, tag=None):
        self.calls.append(("load", tag))
        return self.found, {}


@pytest.fixture
def args(tmp_path):
    found = script_args(script, "--output_dir", str(tmp_path))
    found.first_of_disk = True
    found.world_size, found.zero_stage, found.data = 1, 1, "digest"
    return found


def lay(folder, step, shards=(), marks=(), settings=None):
    """A step's folder with the shards and marks of these ranks."""
    path = folder / "checkpoints" / f"step{step}"
    path.mkdir(parents=True)
    for rank in shards:
        (path / f"bf16_zero_pp_rank_{rank}_mp_rank_00_optim_states.pt").touch()
    for rank in marks:
        (path / f"rank{rank}.json").write_text(json.dumps({"step": step, "settings": settings}))


def test_marks_are_written_after_all_ranks_shards(args, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(script, "gather", lambda value: calls.append("wait") or [value])
    monkeypatch.setattr(script, "write_json", lambda path, value: calls.append(("mark", path.name)))
    script.save_checkpoint(Engine(calls), {"step": 7}, args)
    after = calls[calls.index(("shards", "step7")) :]
    assert after == [("shards", "step7"), "wait", ("mark", "rank0.json"), "wait"]


def test_the_two_newest_marked_steps_stay(args, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "gather", lambda value: [value])
    for step in (5, 10, 15):
        lay(tmp_path, step, [0], [0])
    lay(tmp_path, 17, [0])  # a killed run's: no mark, and so no reason to delete another
    script.save_checkpoint(Engine([]), {"step": 15}, args)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step10", "step15", "step17"]


@pytest.mark.parametrize(
    ("other", "step"),
    [(["step10", "step20"], 20), (["step10"], 10), (["step20", "step10", "step30"], 20)],
)
def test_the_newest_step_of_which_every_rank_has_its_shard(other, step, args, tmp_path, monkeypatch):
    for number in (10, 20):
        lay(tmp_path, number, [0], [0], vars(args))
    monkeypatch.setattr(script, "gather", lambda value: [value, ("other", other, {})])
    calls = []
    assert script.load_checkpoint(Engine(calls), args)["step"] == step
    assert calls == [("load", f"step{step}")]  # one tag for all ranks


def test_without_a_mark_no_step_counts(args, tmp_path, monkeypatch):
    lay(tmp_path, 10, [0])
    monkeypatch.setattr(script, "gather", lambda value: [value])
    assert script.load_checkpoint(Engine([]), args) == {"step": 0, "best": None, "ledger": {}}


def test_no_common_step_is_refused_with_what_each_rank_holds(args, tmp_path, monkeypatch):
    lay(tmp_path, 10, [0], [0], vars(args))
    monkeypatch.setattr(script, "gather", lambda value: [value, ("lost", [], {})])
    with pytest.raises(
        script.UserError, match=r"no step in .* is whole on every rank.*\['step10'\]\), \('lost', \[\]\)\]"
    ):
        script.load_checkpoint(Engine([]), args)


def test_other_settings_are_refused_with_both_values(args, tmp_path, monkeypatch):
    lay(tmp_path, 10, [0], [0], vars(args) | {"seed": 1})
    monkeypatch.setattr(script, "gather", lambda value: [value])
    with pytest.raises(script.UserError, match="with seed 1, now 42. Take"):
        script.load_checkpoint(Engine([]), args)


def test_what_the_engine_does_not_find_is_refused(args, tmp_path, monkeypatch):
    lay(tmp_path, 20, [0], [0], vars(args))
    monkeypatch.setattr(script, "gather", lambda value: [value])
    with pytest.raises(script.UserError, match="cannot load .*step20: .*DeepSpeed's warning"):
        script.load_checkpoint(Engine([], found=None), args)


def test_zero3_builds_its_model_inside_zero_init(monkeypatch):
    zero3, inside, seen = load_script(ZERO3), [], []

    @contextlib.contextmanager
    def init(config_dict_or_path):
        inside.append(config_dict_or_path)
        yield
        inside.clear()

    monkeypatch.setattr(zero3.deepspeed.zero, "Init", init)
    monkeypatch.setattr(zero3, "GPTLike", lambda args, vocab_size: seen.append(list(inside)))
    monkeypatch.setattr(zero3, "parameter_groups", lambda model: [])
    monkeypatch.setattr(zero3.deepspeed, "initialize", lambda **_: (SimpleNamespace(data_parallel_group=None),))
    monkeypatch.setattr(zero3.dist.distributed_c10d, "_set_pg_timeout", lambda *_: None)
    config = {"optimizer": {"type": "AdamW"}}
    zero3.build_engine(script_args(zero3), 512, config)
    assert seen == [[config]]
