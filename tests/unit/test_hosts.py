"""Multihosts: what may not differ between hosts is compared, and what may differ is not."""

import shutil

import pytest
from conftest import MULTIHOSTS, ROOT, load_script, script_args

script = load_script(MULTIHOSTS)
JSON = ROOT / "configs" / "multihosts.json"


def facts(*words):
    return script.fingerprint(script_args(script, "--ds_config", str(JSON), *words))


def compare(mine, theirs, monkeypatch):
    monkeypatch.setattr(script, "gather", lambda value: [value, ("node1", theirs)])
    monkeypatch.setattr(script.socket, "gethostname", lambda: "node0")
    script.compare_hosts(mine)


def test_paths_and_devices_may_differ(tmp_path, monkeypatch):
    shutil.copy(JSON, tmp_path / "other.json")
    words = {
        "--ds_config": tmp_path / "other.json",
        "--output_dir": "elsewhere",
        "--dataset": "/data",
        "--local_rank": 1,
    }
    compare(facts(), facts(*[str(word) for pair in words.items() for word in pair]), monkeypatch)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--lr", "1e-3"], "--lr is 0.001 on host node1, but None on host node0"),
        (["--seed", "7"], "--seed is 7 on host node1, but 42 on host node0"),
        (["--ds_config", str(ROOT / "configs" / "zero1.json")], "JSON is .* on host node1, but .* on host node0"),
    ],
)
def test_flags_and_json_may_not(words, message, monkeypatch):
    with pytest.raises(script.UserError, match=message):
        compare(facts(), facts(*words), monkeypatch)


@pytest.mark.parametrize("name", ["script", "torch", "deepspeed", "transformers", "Python"])
def test_script_and_versions_may_not(name, monkeypatch):
    mine = facts()
    with pytest.raises(script.UserError) as error:
        compare(mine, mine | {name: "9.9.9"}, monkeypatch)
    assert str(error.value) == f"{name} is 9.9.9 on host node1, but {mine[name]} on host node0"
