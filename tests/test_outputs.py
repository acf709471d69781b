"""What a run shows and leaves behind, and that it can be continued."""

import json
import math
import re

import pytest
from conftest import BASE, SCRIPTS, TINY, ZERO, command, load_script, run
from safetensors import safe_open

LINE = re.compile(
    r"step=(\d+) loss=(\d+\.\d{4}) lr=(\d\.\d\de-\d\d) tokens_per_second=(\d+) peak_memory_gib=(\d+\.\d\d)"
    r"( mfu=\d\.\d{3})?"
)
pytestmark = pytest.mark.slow


@pytest.mark.parametrize("config", [None, *ZERO])
def test_a_run_leaves_what_the_readme_lists(train, config):
    ranks = {"ranks": 2, "batch_size": 4} if config else {"batch_size": 8}
    done = train(config, precision="fp32", dropout=0, **ranks)
    first, second, third = (line for line in done.output.splitlines() if re.search(r"sha256=|world size|vocab", line))
    assert re.search(r"^\S+\.py sha256=[0-9a-f]{16} ZeRO stage \d$", first)
    assert second == f"world size {2 if config else 1}, hosts 1, device CPU, precision fp32"
    assert re.fullmatch(r"sample: tokens train \d.*, validation .*, vocabulary 1,024; model: .* parameters", third)
    lines = [match.groups() for line in done.output.splitlines() if (match := LINE.fullmatch(line))]
    assert [int(step) for step, *_ in lines] == list(range(1, 21))
    assert [f"{loss:.4f}" for loss in done.metrics("loss")] == [loss for _, loss, *_ in lines]

    summary, model = done.json("summary"), done.folder / "model"
    final = done.metrics("validation_loss")[-1]
    assert summary["steps"] == 20 and summary["validation_loss"] == final == summary["best_validation_loss"]
    assert summary["validation_perplexity"] == pytest.approx(math.exp(final))
    assert summary["tokens_per_second"] > 0 and summary["peak_memory_gib"] > 0
    assert done.json("args")["n_layer"] == 2 and (config is None) == (done.json("ds_config") == {})
    if config:
        assert done.json("ds_config")["train_micro_batch_size_per_gpu"] == 4  # the effective JSON, not the file's
    with safe_open(model / "model.safetensors", "pt") as weights:
        assert sum(weights.get_tensor(name).numel() for name in weights.keys()) == summary["parameters"]  # noqa: SIM118
    assert json.loads((model / "config.json").read_text())["vocab_size"] == 1024
    assert (model / "tokenizer.json").stat().st_size > 0
    assert (done.folder / "checkpoints" / "latest").read_text() == "step20"


def test_perplexities_follow_from_the_loss(train):
    summary = train(None, precision="fp32", dropout=0, batch_size=8).json("summary")
    module = load_script(BASE)
    text = module.read_texts("sample")["validation"]
    corpus = module.read_tokens(next(path for path in token_files() if path))
    targets = len(corpus.streams["validation"]) - 1
    nats = summary["validation_loss"] * targets
    assert summary["validation_word_perplexity"] == pytest.approx(math.exp(nats / len(text.split())), rel=1e-6)
    assert summary["validation_bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-6)


def token_files():
    import os
    from pathlib import Path

    module = load_script(BASE)
    for path in Path(os.environ["GPTLIKE_CACHE"]).glob("*.safetensors"):
        if module.read_tokens(path).vocab_size == 1024:
            yield path


OFTEN = [*((script, "python") for script in SCRIPTS), (ZERO["zero2"], "deepspeed"), (ZERO["zero3"], "torchrun")]


@pytest.mark.parametrize(
    ("script", "launcher"),
    [
        pytest.param(script, launcher, marks=[] if (script, launcher) in OFTEN else pytest.mark.drill)
        for script in SCRIPTS
        for launcher in ("python", "deepspeed", "torchrun")
    ],
)
def test_every_launcher(tmp_path, script, launcher):
    """Base: one process under each launcher; the others: two ranks, or plain python alone."""
    ranks = 1 if script == BASE or launcher == "python" else 2
    flags = TINY | {"max_steps": 2, "batch_size": 1, "precision": "fp32", "log_interval": 1, "output_dir": tmp_path}
    result = run(command(script, ranks=ranks, launcher=launcher, **flags))
    assert result.returncode == 0, result.stdout + result.stderr
    assert f"world size {ranks}, " in result.stdout
    assert result.stdout.count("step=2 loss=") == 1
