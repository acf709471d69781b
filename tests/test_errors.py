"""What the user did wrong: one message that names the thing, exit 1, no traceback, no hang, nothing overwritten."""

import argparse
import datetime
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
import unittest.mock

import pytest
import torch
from conftest import BASE, BIN, ROOT, SCRIPTS, TINY, ZERO, command, free_port, load_script, run


@pytest.fixture
def stopped(capsys, monkeypatch, tmp_path):
    """A function that runs GPTLike-Base.py in this process and returns the message it stopped with."""

    def stopped(**flags: object) -> str:
        flags = TINY | {"max_steps": 1, "precision": "fp32", "output_dir": tmp_path / "run"} | flags
        monkeypatch.setattr("sys.argv", command(BASE, launcher="python", **flags)[1:])
        module = load_script(BASE)
        with pytest.raises(SystemExit) as stop:
            module.stop_on_user_error(module.main)
        message = stop.value.code
        assert isinstance(message, str) and message.startswith(f"{BASE}: error: ")  # Python prints it and exits with 1
        assert not (tmp_path / "run" / "model").exists()
        return message

    return stopped


def write(folder, **files):
    for name, content in files.items():
        (folder / name.replace("__", ".")).write_bytes(content)
    return folder


def test_data_folders(stopped, tmp_path):
    assert "no such folder; else write wikitext2 or sample" in stopped(dataset=tmp_path / "nowhere")
    write(tmp_path, valid__txt=b"some text\n", notes__md=b"x")
    assert "has no train* that ends in .txt, .raw, .tokens or .parquet, but ['notes.md'" in stopped(dataset=tmp_path)
    write(tmp_path, train__txt=b"")
    assert "train.txt is empty" in stopped(dataset=tmp_path)
    write(tmp_path, train__txt=b"caf\xe9 au lait\n" * 50)
    message = stopped(dataset=tmp_path)
    assert "cannot read" in message and "train.txt" in message and "can't decode byte 0xe9 in position 3" in message
    write(tmp_path, train__txt=b"text\n" * 50, train__raw=b"text\n" * 50)
    assert "has train in several formats, keep one: train.raw, train.txt" in stopped(dataset=tmp_path)
    (tmp_path / "train.txt").unlink(), (tmp_path / "train.raw").unlink()
    write(tmp_path, train__parquet=b"PAR1 not really")
    assert "cannot read" in (message := stopped(dataset=tmp_path)) and "train.parquet" in message


def test_a_parquet_without_a_text_column(stopped, tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"words": ["x"]}), tmp_path / "train.parquet")
    write(tmp_path, valid__txt=b"some text\n")
    assert "train.parquet" in (message := stopped(dataset=tmp_path)) and "text" in message


def test_tokenizers(stopped, tmp_path):
    assert "is not a tokenizer.json" in stopped(tokenizer=tmp_path / "nowhere")
    write(tmp_path, tokenizer__json=b'{"model": "none"}')
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert f"--tokenizer {path}: {tmp_path / 'tokenizer.json'} is not a tokenizer.json" in stopped(tokenizer=path)


def test_block_size_longer_than_a_split(stopped, tmp_path):
    write(tmp_path, train__txt=b"a few words of text\n" * 100, valid__txt=b"short\n")
    assert "--block_size 9999 does not fit train: " in stopped(dataset=tmp_path, block_size=9999)
    assert "--block_size 500 does not fit validation: " in stopped(
        dataset=tmp_path, block_size=500, tokenizer="bpe:257"
    )


def test_folders_that_cannot_be_written(stopped, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("kept")
    assert f"cannot write to --output_dir {tmp_path}/file/run" in stopped(output_dir=tmp_path / "file" / "run")
    monkeypatch.setenv("GPTLIKE_CACHE", str(tmp_path / "file"))
    message = stopped(tokenizer="bpe:777")
    assert "cannot write the token cache" in message and "set GPTLIKE_CACHE" in message
    assert (tmp_path / "file").read_text() == "kept"


def test_resume(stopped, tmp_path, monkeypatch):
    output = tmp_path / "run"
    message = stopped(resume=tmp_path / "nowhere")
    assert f"{tmp_path / 'nowhere'} is not one checkpoint that is whole on every rank. Whole steps" in message
    step = output / "checkpoints" / "step5"
    step.mkdir(parents=True)
    (step.parent / "latest").write_text("step5")
    (step / "state.pt").write_bytes(b"12345")
    facts = {"step": 5, "settings": {"n_layer": 4}, "files": {"state.pt": 5}, "ledger": {}, "hosts": ["a"]}
    facts |= {"best": None, "validation_loss": None, "seconds": 0.5, "saving": 0.1}
    (step / "run.json").write_text(json.dumps(facts))
    message = stopped()
    assert "step5 has ZeRO stage None, this run 0" in message and "--overwrite or another --output_dir" in message
    for broken, reason in (
        ('{"step": 5', "Expecting ',' delimiter"),
        (json.dumps(facts | {"files": {"state.pt": 6}}), "state.pt has 5 bytes instead of 6"),
        (json.dumps(facts | {"files": {"other.pt": 6}}), "No such file or directory"),
        (json.dumps(facts | {"step": 6}), "it has no files of rank 0 at this step"),
        (json.dumps([]), "list indices"),
    ):
        (step / "run.json").write_text(broken)
        message = stopped(resume=step)
        assert f"{step} on host {socket.gethostname()} is not a whole checkpoint: " in message and reason in message
    before = (output / "args.json").read_text()
    assert "holds a run: add --overwrite, or choose another --output_dir" in stopped(resume="never")
    assert (output / "args.json").read_text() == before and step.exists()


def test_fp16_on_a_cpu(stopped):
    assert "fp16 does not run on a CPU: use --precision bf16 or fp32" in stopped(precision="fp16")


def test_more_ranks_than_gpus(monkeypatch):
    module = load_script(ZERO["zero2"])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setenv("DS_ACCELERATOR", "cuda")
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(module.UserError, match="2 ranks here but 1 GPUs: start one rank per GPU"):
        module.start_distributed(argparse.Namespace(local_rank=0, verbose=False))


def host(number: int, port: int, *words: object, **env: str) -> subprocess.Popen:
    """One of two hosts, as the deepspeed launcher would start its one rank there."""
    script = ZERO["multihosts"]
    flags = [str(word) for name, value in TINY.items() for word in (f"--{name}", value)]
    own = {"RANK": str(number), "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    own |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}"}
    command = [sys.executable, str(ROOT / script), *flags, "--max_steps", "1", *map(str, words)]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | own | env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [0, 1])
def test_a_rank_that_does_not_come_is_named(number, tmp_path):
    start, port = time.monotonic(), free_port()
    launch = host(number, port, "--rendezvous_timeout", 3, "--output_dir", tmp_path / "run")
    printed = launch.communicate(timeout=60)[0]
    message = f"2 ranks did not meet at 127.0.0.1:{port} in 3 s, rank{1 - number} missing: "
    assert launch.returncode == 1 and printed.count(message) == 1 and "Traceback" not in printed
    causes = ["the command was not started on every host", "a firewall", "MASTER_ADDR", "GLOO_SOCKET_IFNAME", "127.*"]
    places = [printed.index(cause, printed.index("Usual causes")) for cause in causes]
    assert places == sorted(places) and time.monotonic() - start < 40


@pytest.mark.parametrize(("stuck", "known"), [("connect", ", rank0 missing: no answer"), ("wait", "")])
def test_a_meeting_that_hangs_ends_in_time(monkeypatch, stuck, known):
    """PyTorch's store tries to reach rank 0 again when the time is over, and gloo has a time of its own."""
    module, said, ended = load_script(ZERO["zero1"]), [], threading.Event()
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)

    def hang(*_) -> None:
        assert ended.wait(30)
        raise RuntimeError("at last")

    store = unittest.mock.Mock(wait=hang)
    monkeypatch.setattr(module, "connect", hang if stuck == "connect" else lambda seconds: store)
    monkeypatch.setattr(module, "end_alone", lambda message: (said.append(message), ended.set()))
    with pytest.raises(module.UserError):
        module.join_ranks("gloo", argparse.Namespace(rendezvous_timeout=-4))  # 5 s of grace
    assert said == [f"2 ranks did not meet at 10.0.0.1:29500 in -4 s{known}. {module.NO_MEETING}"]


@pytest.mark.parametrize(("passed", "left"), [(200, 100), (299.5, 1)])
def test_a_late_first_rank_leaves_the_others_the_rest_of_the_time(passed, left, monkeypatch):
    """Or the guard would speak first, which does not know who is missing."""
    module = load_script(ZERO["zero1"])
    for name, value in {"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}.items():
        monkeypatch.setenv(name, value)
    store = unittest.mock.Mock()
    store.wait.side_effect = RuntimeError("Socket Timeout")
    store.check = lambda keys: keys != ["rank2"]
    monkeypatch.setattr(module, "connect", lambda seconds: store)
    monkeypatch.setattr(module, "time", unittest.mock.Mock(monotonic=iter([1000.0, 1000.0 + passed]).__next__))
    with pytest.raises(module.UserError) as caught:
        module.join_ranks("gloo", argparse.Namespace(rendezvous_timeout=300))
    assert str(caught.value).startswith(
        "3 ranks did not meet at 10.0.0.1:29500 in 300 s, rank2 missing: Socket Timeout."
    )
    assert store.wait.call_args.args == (["rank0", "rank1", "rank2"], datetime.timedelta(seconds=left))


@pytest.mark.slow
def test_hosts_that_differ_are_named_with_both_values(tmp_path):
    (tmp_path / "data").mkdir()
    text = (ROOT / "README.md").read_text()
    for split in ("train", "valid"):
        (tmp_path / "data" / f"{split}.txt").write_text(text)
    for words, pattern in (
        (("--batch_size", 2), r"--batch_size is 2 on host \S+, but 8 on host \S+"),
        (("--dataset", tmp_path / "data"), r"data and tokenizer is \w{12} on host \S+, but \w{12} on host \S+"),
    ):
        port = free_port()
        launches = [host(n, port, "--output_dir", tmp_path / f"run{n}", *(words if n else ())) for n in (0, 1)]
        for launch in launches:
            printed = launch.communicate(timeout=90)[0]
            assert launch.returncode == 1 and len(re.findall(pattern, printed)) == 1, printed
        assert not (tmp_path / "run0" / "model").exists()


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_base_on_several_ranks(launcher, tmp_path):
    done = run(command(BASE, ranks=2, launcher=launcher, output_dir=tmp_path / "run", **TINY))
    message = f"{BASE}: error: started on 2 ranks, but it trains in one process: run DeepSpeed-GPTLike-ZeRO-1.py there"
    assert done.returncode == 1 and (done.stdout + done.stderr).count(message) == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("launcher", "flags", "message"),
    [
        ("torchrun", {"ds_config": "none.json"}, "--ds_config none.json: no such file"),
        ("deepspeed", {"ds_config": "configs/zero3.json"}, "this JSON is for DeepSpeed-GPTLike-ZeRO-3.py"),
        ("torchrun", {"dataset": "nowhere"}, "--dataset nowhere: no such folder"),
        ("torchrun", {"output_dir": "/dev/null/run"}, "cannot write to --output_dir /dev/null/run"),
        ("deepspeed", {"dataset": None, "tokenizer": None}, "cannot get data set Salesforce/wikitext"),
    ],
)
def test_two_ranks_say_it_once_and_end_together(tmp_path, launcher, flags, message):
    flags = TINY | {"output_dir": tmp_path / "run"} | flags
    done = run(command(ZERO["zero2"], ranks=2, launcher=launcher, **flags), HF_HOME=str(tmp_path / "hf"), timeout=90)
    printed = done.stdout + done.stderr
    assert done.returncode == 1 and printed.count(message) == 1
    assert f'File "{ROOT / ZERO["zero2"]}"' not in printed  # no traceback of ours
    assert not (tmp_path / "run" / "model").exists()


@pytest.mark.slow
def test_num_gpus_beside_cuda_visible_devices():
    """The tutorial's own command: deepspeed would silently take GPUs 0 and 1 instead of 0 and 2."""
    words = command(ZERO["zero1"], ranks=2, launcher="deepspeed", **TINY)
    done = run(words, CUDA_VISIBLE_DEVICES="0,2", timeout=90)
    message = "--num_gpus makes deepspeed ignore CUDA_VISIBLE_DEVICES=0,2: leave --num_gpus out, or unset the variable"
    assert done.returncode == 1 and (done.stdout + done.stderr).count(message) == 1


def test_every_script_stops_the_same_way():
    texts = {script: (ROOT / script).read_text() for script in SCRIPTS}
    for script, text in texts.items():
        assert text.endswith('if __name__ == "__main__":\n    stop_on_user_error(main)\n'), script
        assert "eval(" not in text.replace(".eval(", ""), script
        broad = ["except Exception as error:  # tokenizers raises nothing narrower"]
        assert re.findall("except Exception.*", text) == broad, script
