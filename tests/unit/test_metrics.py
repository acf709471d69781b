"""What a run reports: losses over every token, bytes beside the formula, lines that readers parse."""

import json
import math

import pytest
import torch
from conftest import BASE, load_script, script_args

script = load_script(BASE)


@pytest.fixture(scope="module")
def corpus():
    return script.load_corpus(
        script_args(script, "--dataset", "sample", "--tokenizer", "bpe:300", "--block_size", "16")
    )


def test_evaluate_counts_every_token_once(corpus):
    args = script_args(
        script, *"--n_layer 1 --n_head 2 --d_model 32 --block_size 16 --batch_size 7 --dropout 0.5".split()
    )
    torch.manual_seed(0)
    net = script.GPTLike(args, corpus.vocab_size)
    found = script.evaluate(net, corpus, args)
    assert net.training  # and dropout was off: the figures below are without
    stream = corpus.streams["validation"].long()
    net.eval()
    with torch.no_grad():
        starts = range(0, len(stream) - 1, 16)
        parts = [stream[i : i + 17] for i in starts]
        nats = sum(net(p[None, :-1], p[None, 1:]).item() * (len(p) - 1) for p in parts)
    text = corpus.tokenizer.decode(stream)
    assert found["validation_loss"] == pytest.approx(nats / (len(stream) - 1), rel=1e-5)
    assert found["validation_perplexity"] == pytest.approx(math.exp(nats / (len(stream) - 1)), rel=1e-4)
    assert found["validation_word_perplexity"] == pytest.approx(math.exp(nats / len(text.split())), rel=1e-4)
    assert found["validation_bits_per_byte"] == pytest.approx(nats / math.log(2) / len(text.encode()), rel=1e-5)


@pytest.mark.parametrize(
    ("stage", "ranks", "precision", "formulas"),
    [
        (0, 1, "bf16", (2000, 12000, 2000)),
        (1, 4, "bf16", (2000, 3000, 2000)),
        (2, 4, "bf16", (2000, 3000, 500)),
        (3, 4, "bf16", (500, 3000, 500)),
        (3, 2, "fp32", (2000, 6000, 2000)),
    ],
)
def test_ledger(stage, ranks, precision, formulas):
    args = script_args(script, "--precision", precision)
    args.zero_stage, args.world_size, args.n_params = stage, ranks, 1000
    weight, moment, bucket = torch.zeros(1000, requires_grad=True), torch.zeros(500, 2), torch.zeros(10)
    kinds = {"parameters": [weight, weight], "optimizer_states": [moment]}
    before = script.show_ledger(kinds, args)["gradients_and_buckets on cpu"]["held"]
    weight.sum().backward()  # whose gradient is no Python object yet, and so found by its weight only
    ledger = script.show_ledger(kinds, args)
    assert [row["formula"] for row in ledger.values()] == list(formulas)
    assert ledger["parameters on cpu"]["held"] == 4000  # counted once
    assert ledger["optimizer_states on cpu"]["held"] == 4000
    assert ledger["gradients_and_buckets on cpu"]["held"] - before == 4000 and before >= bucket.nbytes


def test_lines(tmp_path, capsys):
    args = script_args(script, "--output_dir", str(tmp_path))
    fields = {"step": 50, "loss": 6.12341, "lr": 3e-4, "tokens_per_second": 18240.3, "peak_memory_gib": 2.311}
    script.record(fields, args)
    line = "step=50 loss=6.1234 lr=3.00e-04 tokens_per_second=18240 peak_memory_gib=2.31\n"
    assert capsys.readouterr().out == line
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == fields


@pytest.mark.parametrize(("loss", "norm"), [(math.nan, 1.0), (math.inf, 1.0), (3.0, math.nan)])
def test_nan_stops(loss, norm):
    args = script_args(script)
    with pytest.raises(script.UserError, match="take a lower --lr"):
        script.average_and_check(torch.tensor(loss), norm, [], args)
    args.precision = "fp16"  # which skips such steps by itself
    script.average_and_check(torch.tensor(loss), norm, [], args)


def test_average_and_check_gives_mean_and_signal():
    args = script_args(script)
    assert script.average_and_check(torch.tensor(3.0), 1.0, [], args) == (3.0, False)
    assert script.average_and_check(torch.tensor(3.0), 1.0, [15], args) == (3.0, True)
