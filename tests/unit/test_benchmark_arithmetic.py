"""scripts/dev/benchmark.py without a launch: its arithmetic, its data and what it refuses."""

import os

import pytest
from conftest import load_script, script_args

benchmark = load_script("scripts/dev/benchmark.py")


def test_first_steps_do_not_count():
    assert benchmark.steady([1.0, 2.0, 3.0, 10.0, 30.0, 20.0]) == 20.0
    assert str(benchmark.steady([1.0])) == "nan"


def test_the_table_divides_medians():
    args = benchmark.parse_args(["--precision", "fp32"])
    runs = {
        "base": [benchmark.Measured(5.0, rate, 1.0) for rate in (100.0, 300.0, 200.0)],
        "nanogpt": [benchmark.Measured(6.0, rate, 2.0) for rate in (50.0, 100.0, 900.0)],
    }
    lines = benchmark.speed_table(runs, 4.0, args).splitlines()
    assert lines[1].split() == [
        "base",
        "1",
        "fp32",
        "200",
        "2.00x",
        "nanogpt",
        "5.0",
        "1.25x",
        "1.0",
        "100",
        "to",
        "300",
    ]


@pytest.mark.parametrize("vocabulary", [300, 8192])
def test_the_data_have_that_vocabulary(vocabulary, tmp_path):
    base = load_script("GPTLike-Base.py")
    words = benchmark.write_data(tmp_path / "data", vocabulary, 8, 64)
    corpus = base.load_corpus(script_args(base, *words, "--block_size", "64"))
    assert corpus.vocab_size == vocabulary
    assert len(corpus.streams["train"]) == 9 * 64 and corpus.streams["train"].max() < vocabulary


def test_all_share_cores_and_allocator(tmp_path):
    args = benchmark.parse_args([])
    for name in benchmark.CONTESTANTS:
        ranks = benchmark.ranks_of(name, args)
        env, words = benchmark.environment(ranks), benchmark.command(name, ["--dataset", "d"], tmp_path, args)
        assert env["OMP_NUM_THREADS"] == str(max(1, len(os.sched_getaffinity(0)) // ranks))
        assert env["MALLOC_MMAP_MAX_"] == "0" and int(env["MALLOC_TRIM_THRESHOLD_"]) > 2**33
        assert words[words.index("--batch_size") + 1] == str(8 // ranks)
        assert words[words.index("--precision") + 1] == ("fp32" if name == "original" else "bf16")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--steps", "3"], "--steps 3: must be more than the 3 that do not count"),
        (["--steps", "0"], "--steps 0: must be more than the 3 that do not count"),
        (["--ranks", "3"], "--batch_size 8 is not a multiple of --ranks 3"),
        (["--contestants", "llama"], "invalid choice: 'llama'"),
    ],
)
def test_wrong_usage(words, message, capsys):
    with pytest.raises(SystemExit) as end:
        benchmark.main(words)
    assert end.value.code == 2 and message in capsys.readouterr().err
