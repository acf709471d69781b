"""The data: every character kept, targets shifted by one, one order on any number of ranks, a cache that heals."""

import argparse
import json
import re
import time
from pathlib import Path

import pytest
import torch
from conftest import BASE, TINY, command, load_script, run
from hub_server import HANG, HubServer, wikitext_repo

TEXT = "= Köpenick =\r\n\r\nA tab\there, a blank line above, an emoji 🐧 and trailing spaces   \n" * 40


@pytest.fixture
def base():
    return load_script(BASE)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("GPTLIKE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def folder_of(path: Path, **files: str | bytes) -> Path:
    path.mkdir(exist_ok=True)
    for name, content in files.items():
        data = content if isinstance(content, bytes) else content.encode()
        (path / name.replace("__", ".")).write_bytes(data)
    return path


def args_for(dataset: object, tokenizer: str = "bpe:300", block_size: int = 8) -> argparse.Namespace:
    return argparse.Namespace(dataset=str(dataset), tokenizer=tokenizer, block_size=block_size)


def decode(corpus, split: str) -> str:
    import tokenizers

    return tokenizers.Tokenizer.from_str(corpus.tokenizer).decode(corpus.streams[split].tolist())


def test_decoding_the_stream_gives_every_character_back(base, tmp_path, cache):
    folder = folder_of(
        tmp_path / "data", train__txt=TEXT, valid__txt="Ein Satz.\n\n" + TEXT[:500], test__txt="x y\n" * 9
    )
    corpus = base.load_corpus(args_for(folder))
    assert decode(corpus, "train") == TEXT
    assert decode(corpus, "validation") == "Ein Satz.\n\n" + TEXT[:500]
    assert decode(corpus, "test") == "x y\n" * 9
    assert corpus.sizes["test"] == {"bytes": 36, "words": 18}


def test_the_sample_is_python_s_own_prose_split_by_topic(base, cache):
    texts = base.read_texts("sample")
    assert len(texts["train"]) + len(texts["validation"]) > 300_000
    assert len(texts["validation"]) < 0.2 * len(texts["train"])
    paragraphs = {p for p in texts["train"].split("\n\n") if len(p) > 200}
    assert not paragraphs & set(texts["validation"].split("\n\n"))  # topics quote each other: nothing held out leaks
    corpus = base.load_corpus(args_for("sample", "bpe:512"))
    assert decode(corpus, "train") == texts["train"]


@pytest.mark.parametrize("names", [("wiki.train.raw", "wiki.valid.raw"), ("train.tokens", "val.tokens"),
                                   ("train-1.txt", "validation.txt")])  # fmt: skip
def test_names_of_the_official_zip_and_others(base, tmp_path, names):
    for name, text in zip(names, (TEXT, "held out\n"), strict=True):
        (tmp_path / name).write_bytes(text.encode())
    assert base.read_texts(str(tmp_path)) == {"train": TEXT, "validation": "held out\n"}


def test_parquet_gives_the_same_text_as_the_official_file(base, tmp_path):
    import pyarrow
    from pyarrow import parquet

    rows = ["", " = Title = \n", "", " A sentence . \n"]
    for name in ("train", "valid"):
        parquet.write_table(pyarrow.table({"text": rows}), tmp_path / f"{name}.parquet")
    assert base.read_texts(str(tmp_path))["train"] == " \n = Title = \n \n A sentence . \n"


def test_inputs_and_targets_lose_no_token(base):
    stream = torch.arange(100, 123, dtype=torch.int32)  # 22 targets, blocks of 5
    whole = base.TokenizedDataset(stream, 5)
    inputs, targets = whole[torch.arange(len(whole))]
    assert inputs.tolist() == [list(range(100 + 5 * i, 105 + 5 * i)) for i in range(4)]
    assert targets.equal(inputs + 1)
    inputs, targets = (padded := base.TokenizedDataset(stream, 5, pad=True))[torch.arange(len(padded))]
    assert targets[targets != -100].tolist() == list(range(101, 123))
    assert targets[-1].tolist() == [121, 122, -100, -100, -100] and inputs.min() >= 0


def test_samples_depend_on_seed_and_step_alone(base):
    def indices(step, global_batch=8, seed=1):
        return base.step_indices(step, 20, global_batch=global_batch, seed=seed).tolist()

    two_epochs = [i for step in range(5) for i in indices(step)]
    assert sorted(two_epochs[:20]) == sorted(two_epochs[20:]) == list(range(20))  # each block once an epoch
    assert two_epochs[:20] != two_epochs[20:] and indices(0) != indices(0, seed=2)
    assert indices(0, 16) == indices(0) + indices(1)  # another global batch reads on in the same order
    assert len(indices(0, 50)) == 50  # more than two epochs in one step


def test_ranks_take_disjoint_slices_of_one_global_batch(base, monkeypatch):
    data = base.TokenizedDataset(torch.arange(401, dtype=torch.int32), 4)

    def blocks(ranks, micro, accumulation):
        args = argparse.Namespace(batch_size=micro, gradient_accumulation_steps=accumulation, seed=3)
        monkeypatch.setattr(base, "world_size", lambda: ranks)
        seen = []
        for rank in range(ranks):
            monkeypatch.setattr(base, "rank", lambda rank=rank: rank)
            batches = list(base.micro_batches(data, 7, args, torch.device("cpu")))
            assert [tuple(inputs.shape) for inputs, _ in batches] == [(micro, 4)] * accumulation
            seen += [row[0].item() for inputs, _ in batches for row in inputs]
        return seen

    one = blocks(1, 8, 1)
    assert len(set(one)) == 8
    assert one == blocks(2, 4, 1) == blocks(2, 1, 4) == blocks(4, 2, 1) == blocks(1, 2, 4)


def test_cache_is_keyed_by_content_and_rebuilt_when_damaged(base, tmp_path, cache, capsys):
    folder = folder_of(tmp_path / "data", train__txt=TEXT, valid__txt=TEXT[:400])
    args = args_for(folder)
    base.load_corpus(args)
    base.load_corpus(args)
    (file,) = cache.iterdir()
    assert capsys.readouterr().out.count("tokenizing") == 1
    sound = file.read_bytes()
    for damaged in (sound[:100], sound[:-10] + bytes(10), b"", b"\xff" * 200):
        file.write_bytes(damaged)
        assert decode(base.load_corpus(args), "train") == TEXT
        assert base.read_tokens(file) and "tokenizing" in capsys.readouterr().out
    folder_of(folder, train__txt=TEXT + "one more")
    base.load_corpus(args)
    base.load_corpus(args_for(folder, "bpe:301"))
    assert len(list(cache.iterdir())) == 3  # other text, other tokenizer: other files, and no temporary ones left


HUB_ROWS = {"train": ["", "= Robert Boulter =", "", *(f"Sentence number {i} of an article ." for i in range(200))],
            "validation": ["", "= Held out =", *(f"Held out sentence {i} ." for i in range(40))],
            "test": ["", "= Test =", *(f"Test sentence {i} ." for i in range(40))]}  # fmt: skip


def byte_tokenizer() -> bytes:
    return load_script(BASE).build_tokenizer("bpe:300", "a b\n").to_str().encode()


TINY_HUB = {key: value for key, value in TINY.items() if key not in ("dataset", "tokenizer")} | {"batch_size": 1,
            "max_steps": 2, "precision": "fp32", "launcher": "python"}  # fmt: skip


def test_the_default_command_trains_on_wikitext2_from_the_hub(tmp_path):
    """No --dataset, no --tokenizer: load_dataset and gpt2's tokenizer, over the Hub's protocol, served here."""
    repos = {"Salesforce/wikitext": wikitext_repo(HUB_ROWS)}
    words = command(BASE, output_dir=tmp_path / "run", **TINY_HUB)
    tokenizer = {"openai-community/gpt2": {"tokenizer.json": byte_tokenizer()}}
    with HubServer(datasets=repos, models=tokenizer) as hub:
        env = hub.env(tmp_path / "hf")
        done = run(words, HF_HUB_OFFLINE="", **without(env, "HF_HUB_OFFLINE"))
        assert done.returncode == 0, done.stderr
        assert hub.asked("train-00000-of-00001.parquet") and hub.asked("openai-community/gpt2/resolve")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["validation_loss"] > 0 and summary["test_loss"] > 0
    # The server is gone: the cached copy trains on, without a variable that says so.
    again = run([*words, "--overwrite"], HF_HUB_OFFLINE="", **without(env, "HF_HUB_OFFLINE"))
    assert again.returncode == 0, again.stderr
    losses = [line for line in done.stdout.splitlines() if "validation_loss" in line]
    assert losses and losses == [line for line in again.stdout.splitlines() if "validation_loss" in line]


def without(env: dict[str, str], name: str) -> dict[str, str]:
    return {key: value for key, value in env.items() if key not in (name, "PATH")}


@pytest.mark.parametrize("failure", ["refused", "hangs", "fails"])
def test_an_unreachable_hub_ends_in_15_seconds_with_one_message(tmp_path, failure):
    with HubServer(datasets={}, models={}, fail={".": HANG if failure == "hangs" else 500}) as hub:
        env = without(hub.env(tmp_path / "hf"), "HF_HUB_OFFLINE")
        if failure == "refused":
            env["HF_ENDPOINT"] = "http://127.0.0.1:9"
        start = time.monotonic()
        done = run(command(BASE, output_dir=tmp_path / "run", **TINY_HUB), HF_HUB_OFFLINE="", **env)
        seconds = time.monotonic() - start
    reason = {"refused": "Connection refused", "hangs": "no answer in 6 s|timed out", "fails": "HTTP Error 500"}[
        failure
    ]
    assert done.returncode == 1 and seconds < 15
    assert f"cannot get data set Salesforce/wikitext from {env['HF_ENDPOINT']}" in done.stderr and re.search(
        reason, done.stderr
    )
    for way_out in ("HF_ENDPOINT=", "HF_HUB_OFFLINE=1", "--dataset DIR", "--dataset sample"):
        assert done.stderr.count(way_out) == 1
    assert "Traceback" not in done.stderr and not (tmp_path / "run").exists()
