"""Every character of a split reaches the stream in order; the samples of a step depend on seed and step alone."""

import gzip
import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
import torch
from conftest import BASE, load_script, script_args

script = load_script(BASE)
TEXT = "  one  two\n\nthr\u00e9e \u2028 four\x00\tfive\n" * 30


def corpus(folder, *words):
    args = script_args(script, "--dataset", str(folder), "--tokenizer", "bpe:300", "--block_size", "8", *words)
    return script.load_corpus(args)


def text_of(corpus, split="train"):
    return corpus.tokenizer.decode(corpus.streams[split])


def write_jsonl(path: Path, rows: list[str]) -> None:
    lines = [json.dumps({"meta": {"n": i}, "text": row}) for i, row in enumerate(rows)]
    data = "\n".join(lines).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)


def write_parquet(path: Path, rows: list[str]) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"other": rows, "text": rows}), path)


FOLDERS = {
    "txt": {"train.txt": TEXT, "valid.txt": TEXT},
    "official names": {"wiki.train.raw": TEXT, "wiki.valid.raw": TEXT, "wiki.test.raw": TEXT, "README.md": "no data"},
    "tokens": {"wiki.train.tokens": TEXT, "wiki.valid.tokens": TEXT},
    "gz": {"train.txt.gz": TEXT, "validation.txt.gz": TEXT},
    "byte-order mark": {"train.txt": "\ufeff" + TEXT, "valid.txt": TEXT},
    "no last line break": {"train.txt": TEXT[:-1], "valid.txt": TEXT},
    "folders of files": {"train/b.txt": TEXT[60:], "train/a.txt": TEXT[:60], "valid/a.txt": TEXT},
}


@pytest.mark.parametrize("name", FOLDERS)
def test_text_comes_through(name, tmp_path):
    for path, text in FOLDERS[name].items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        data = text.encode()
        (tmp_path / path).write_bytes(gzip.compress(data) if path.endswith(".gz") else data)
    expected = TEXT[:-1] + " \n" if name == "no last line break" else TEXT
    if name == "folders of files":
        expected = TEXT[:60] + ("" if TEXT[59] == "\n" else " \n") + TEXT[60:]
    assert text_of(corpus(tmp_path)) == expected


@pytest.mark.parametrize(
    ("ending", "write"), [("jsonl", write_jsonl), ("jsonl.gz", write_jsonl), ("parquet", write_parquet)]
)
def test_rows_come_through_each_with_a_line_break(ending, write, tmp_path):
    rows = ["", " = Title = \n", " a line\nand another \n", "no break"] * 20
    for split in ("train", "validation"):
        write(tmp_path / f"{split}.{ending}", rows)
    assert text_of(corpus(tmp_path)) == "".join([" \n", " = Title = \n", " a line\nand another \n", "no break \n"] * 20)


def test_sample_is_whole_and_split():
    from pydoc_data.topics import topics

    found = corpus("sample")
    articles = [topics[name] for name in sorted(topics)]
    ended = [text if text.endswith("\n") else text + " \n" for text in articles]
    assert text_of(found, "validation") == "".join(ended[::10])
    assert text_of(found) == "".join(text for i, text in enumerate(ended) if i % 10)


def test_crlf_becomes_lf(tmp_path):
    for name in ("train.txt", "valid.txt"):
        (tmp_path / name).write_bytes(TEXT.replace("\n", "\r\n").encode())
    assert text_of(corpus(tmp_path)) == TEXT


def test_targets_are_inputs_shifted_by_one_and_none_is_lost():
    stream = torch.arange(100, dtype=torch.int32)
    inputs, targets = script.inputs_and_targets(stream.unfold(0, 9, 8))
    assert torch.equal(inputs.flatten(), torch.arange(96)) and torch.equal(targets.flatten(), torch.arange(1, 97))


@pytest.mark.parametrize(("ranks", "micro", "accumulation"), [(1, 8, 1), (2, 4, 1), (4, 1, 2), (2, 1, 4)])
def test_samples_do_not_depend_on_ranks(ranks, micro, accumulation):
    data = torch.arange(8 * 11 + 1, dtype=torch.int32).unfold(0, 9, 8)  # 11 blocks: steps cross epochs
    args = script_args(script, "--batch_size", str(micro), "--gradient_accumulation_steps", str(accumulation))
    args.world_size, seen = ranks, []
    for step in range(5):
        for rank in range(ranks):
            args.rank = rank
            seen += [inputs[:, 0] // 8 for inputs, _ in script.micro_batches(data, step, args)]
    seen = torch.cat(seen).tolist()
    orders = [script.epoch_order(epoch, 11, args.seed).tolist() for epoch in range(4)]
    assert seen == sum(orders, [])[:40]
    assert sorted(orders[0]) == list(range(11)) and orders[0] != orders[1]
