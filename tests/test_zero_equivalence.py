"""Every stage trains the same model: losses step by step beside GPTLike-Base.py, on real English text."""

import pytest
from conftest import ZERO

pytestmark = pytest.mark.slow
EXACT = {"precision": "fp32", "dropout": 0}
STAGES = [config for config in ZERO if config != "zero3_offload"]


def largest_difference(run, other) -> float:
    losses, others = run.metrics("loss"), other.metrics("loss")
    assert len(losses) == len(others) == 20
    assert losses[-1] < losses[0] - 0.1  # it has learned something: a frozen model would agree with itself too
    return max(abs(a - b) for a, b in zip(losses, others, strict=True))


@pytest.mark.parametrize("config", ZERO)
def test_two_ranks_train_as_base_does(train, config):
    base = train(None, batch_size=8, **EXACT)
    assert largest_difference(train(config, ranks=2, batch_size=4, **EXACT), base) < 1e-5


@pytest.mark.parametrize("config", ["zero2", *(pytest.param(c, marks=pytest.mark.drill) for c in ("zero1", "zero3"))])
@pytest.mark.parametrize(
    "shape",
    [
        {"ranks": 1, "batch_size": 8},
        {"ranks": 1, "batch_size": 2, "gradient_accumulation_steps": 4},
        {"ranks": 2, "batch_size": 1, "gradient_accumulation_steps": 4},
        pytest.param({"ranks": 4, "batch_size": 2}, marks=pytest.mark.drill, id="4-2"),
    ],
    ids=lambda shape: "-".join(map(str, shape.values())),
)
def test_ranks_and_accumulation_do_not_matter(train, config, shape):
    assert largest_difference(train(config, **shape, **EXACT), train(None, batch_size=8, **EXACT)) < 1e-5


def test_base_accumulates_the_same(train):
    accumulated = train(None, batch_size=2, gradient_accumulation_steps=4, **EXACT)
    assert largest_difference(accumulated, train(None, batch_size=8, **EXACT)) < 1e-5


@pytest.mark.parametrize("config", STAGES)
def test_bf16_agrees_within_its_digits(train, config):
    """bf16 keeps 8 bits: two ranks round their halves of a gradient apart, 0.02 of a loss near 6.5 is 3 in 1,000."""
    base = train(None, batch_size=8, precision="bf16", dropout=0)
    assert largest_difference(train(config, ranks=2, batch_size=4, precision="bf16", dropout=0), base) < 0.02


def test_activation_checkpointing_changes_no_loss(train):
    for config in (None, "zero3"):
        ranks = {"ranks": 2, "batch_size": 4} if config else {"batch_size": 8}
        with_it = train(config, activation_checkpointing=True, **ranks, **EXACT)
        assert largest_difference(with_it, train(config, **ranks, **EXACT)) < 1e-5


@pytest.mark.drill
@pytest.mark.parametrize("config", ["zero2", "zero3"])
def test_compiling_changes_no_loss(train, config):
    """On two ranks, with dropout, which draws the same numbers; kernels that torch.compile fuses round elsewhere."""
    flags = {"ranks": 2, "batch_size": 4, "precision": "fp32", "dropout": 0.1}
    assert largest_difference(train(config, compile=True, **flags), train(config, **flags)) < 1e-5
