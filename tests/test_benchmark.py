"""Do benchmark.py, rivals.py, quality.py and profile_step.py measure what they say? Arithmetic, the rivals' models, one
tiny run of each; what a timing is, decides no test."""

import argparse
import json
import math
import re
import shlex
import sys
from pathlib import Path

import pytest
import torch
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "scripts"))  # as for `python scripts/benchmark.py`
import benchmark
import profile_step
import quality
import rivals

TINY = ["--n_layer", "2", "--n_head", "4", "--d_model", "64", "--block_size", "32"]
SHAPE = {"n_layer": 2, "n_head": 4, "d_model": 64, "block_size": 32, "batch_size": 8, "dropout": 0.1}
VOCABULARY = 500  # padded to 512


def options(**changes: object) -> argparse.Namespace:
    return argparse.Namespace(**SHAPE | {"precision": "fp32"} | changes)


def bench_args(*words: str) -> argparse.Namespace:
    return benchmark.build_parser().parse_args([*TINY, *words])


def model(block: type, **changes: object) -> rivals.RivalGPT:
    torch.manual_seed(0)
    return rivals.RivalGPT(options(**changes), VOCABULARY, block)


@pytest.fixture(scope="module")
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (8, 33), generator=torch.Generator().manual_seed(0))


BLOCKS = pytest.mark.parametrize("block", [rivals.NanoBlock, rivals.OriginalBlock])


# The rivals' models
@BLOCKS
def test_a_later_token_changes_no_earlier_logit(block: type, tokens: torch.Tensor):
    network = model(block).eval()
    changed = tokens[:, :-1].clone()
    changed[:, 20:] = (changed[:, 20:] + 1) % VOCABULARY
    before, after = network(tokens[:, :-1]), network(changed)
    assert torch.equal(before[:, :20], after[:, :20])
    assert not torch.allclose(before[:, 20:], after[:, 20:])


def test_parameter_counts():
    embeddings = (512 + 32) * 64
    matrices = 12 * 64 * 64
    nano = embeddings + 2 * (matrices + 2 * 64) + 64  # two norms a block and a last one, no biases
    original = embeddings + 2 * (matrices + (3 + 1 + 4 + 1) * 64 + 2 * 2 * 64) + 2 * 64
    assert sum(weight.numel() for weight in model(rivals.NanoBlock).parameters()) == nano
    assert sum(weight.numel() for weight in model(rivals.OriginalBlock).parameters()) == original


def test_nanogpt_at_the_shape_of_the_bars():
    network = rivals.RivalGPT(options(n_layer=6, n_head=6, d_model=384, block_size=256), 8192, rivals.NanoBlock)
    assert sum(weight.numel() for weight in network.parameters()) == 13_865_856


@BLOCKS
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_first_loss_is_that_of_a_uniform_guess(block: type, precision: str, tokens: torch.Tensor):
    loss = model(block, precision=precision)(tokens[:, :-1], tokens[:, 1:])
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(math.log(512), abs=0.05)


def test_nanogpt_has_dropout_on_attention_weights_and_its_residual_matrices_start_smaller(tokens: torch.Tensor):
    network = model(rivals.NanoBlock, dropout=0.5)
    block, x = network.blocks[0], torch.randn(1, 8, 64)
    block.dropout.p = 0.0  # what is random now, is random in the attention
    assert not torch.equal(block.attention(x), block.attention(x))
    assert torch.equal(block.eval().attention(x), block.attention(x))
    assert block.down.weight.std().item() == pytest.approx(0.02 / math.sqrt(4), rel=0.05)
    assert block.up.weight.std().item() == pytest.approx(0.02, rel=0.05)


def test_ignored_targets_do_not_count(tokens: torch.Tensor):
    network = model(rivals.NanoBlock, dropout=0.0)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[4:] = -100
    assert network(inputs, targets).item() == pytest.approx(network(inputs[:4], targets[:4]).item(), abs=1e-6)


@pytest.mark.parametrize("rival", ["nanogpt", "original"])
def test_rivals_learn(rival: str, tokens: torch.Tensor):
    words = [rival, *TINY, "--precision", "fp32", "--dropout", "0", "--lr", "1e-2", "--warmup_steps", "0"]
    args = rivals.build_parser().parse_args([*words, "--max_steps", "30"])
    corpus = argparse.Namespace(vocab_size=VOCABULARY, streams={"train": tokens.flatten().int()})
    runner = {"nanogpt": rivals.NanoRun, "original": rivals.OriginalRun}[rival](args, corpus)
    losses = []
    for _ in range(30):
        losses.append(runner.forward_backward(iter([(tokens[:, :-1], tokens[:, 1:])])).item())
        runner.update()
    assert losses[0] == pytest.approx(math.log(512), abs=0.05)
    assert losses[-1] < 3.0


def test_random_crops_are_shifted_by_one_and_from_the_stream():
    args = rivals.build_parser().parse_args(["nanogpt", *TINY, "--random_crops", "--batch_size", "5"])
    corpus = argparse.Namespace(vocab_size=VOCABULARY, streams={"train": torch.arange(VOCABULARY)})
    inputs, targets = rivals.NanoRun(args, corpus).crops()
    assert inputs.shape == targets.shape == (5, 32)
    assert torch.equal(inputs + 1, targets)
    assert len(set(inputs[:, 0].tolist())) > 1


# Arithmetic
def test_the_first_steps_and_other_lines_do_not_count():
    rates = [{"tokens_per_second": rate} for rate in (1, 2, 3, 10, 30, 20)]
    assert benchmark.steady([*rates, {"validation_loss": 1.0}]) == 20


def test_operations_of_a_token_and_of_the_matmuls():
    args = bench_args()
    assert benchmark.flops_per_token(1000, args) == 6 * 1000 + 12 * 2 * 64 * 32
    sizes = benchmark.gemms(500, args)
    weights = 2 * 12 * 64 * 64 + 512 * 64
    assert sum(2 * rows * inputs * outputs * count for rows, inputs, outputs, count in sizes) == 2 * 256 * weights
    assert sizes[-1] == (256, 64, 512, 1)


def test_the_ceiling_is_a_rate_of_operations(monkeypatch: pytest.MonkeyPatch):
    clock = iter(range(10_000))
    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: next(clock) * 1e-3)  # each matmul takes a millisecond
    args = bench_args()
    operations = sum(6 * rows * inputs * outputs * count for rows, inputs, outputs, count in benchmark.gemms(500, args))
    launches = 4 * 2 + 1
    assert benchmark.ceiling_gflops(500, "fp32", args) == pytest.approx(operations / (launches * 1e-3) / 1e9)


def launched(rate: float) -> dict:
    return {"tokens_per_second": rate, "first_step_s": rate / 100, "peak_memory_gib": 0.5, "parameters": 1000}


def test_medians_ratios_and_shares():
    args = bench_args("--contestants", "base", "nanogpt", "original", "--rounds", "3")
    jobs = benchmark.make_jobs(args)
    runs = {"base": [launched(rate) for rate in (100, 300, 400)], "nanogpt": [launched(150)] * 3, "original": []}
    rows = benchmark.summarize(runs, {"bf16": [1.0, 3.0, 2.0], "fp32": [0.5]}, jobs, args)
    assert list(rows) == ["base", "nanogpt"]
    assert rows["base"]["tokens_per_second"] == 300
    assert rows["base"]["rounds"] == [100, 300, 400]
    assert rows["base"]["ratios"] == {"nanogpt": 2.0}
    assert rows["base"]["ceiling_share"] == pytest.approx(300 * (6000 + 12 * 2 * 64 * 32) / 2e9)


def test_jobs_share_the_global_batch_and_the_cores():
    by_name = {job.name: job for job in benchmark.make_jobs(bench_args())}
    assert list(by_name) == benchmark.DEFAULT
    assert {name for name, job in by_name.items() if job.ranks == 1} == {"base", "base-compile", "nanogpt", "original"}
    assert all(job.ranks * job.micro_batch == 8 for job in by_name.values())
    assert [name for name, job in by_name.items() if job.precision == "fp32"] == ["original"]
    cores = len(benchmark.os.sched_getaffinity(0))
    assert [benchmark.threads_per_rank(ranks) for ranks in (1, 2 * cores)] == [cores, 1]
    assert benchmark.environment(2, Path("x"))["OMP_NUM_THREADS"] == str(max(1, cores // 2))


def test_every_command_line_is_one_that_its_script_takes(tmp_path: Path):
    args = bench_args("--contestants", *benchmark.CONTESTANTS, "base-compile", "zero2-compile", "nanogpt-compile")
    for job in benchmark.make_jobs(args):
        words = benchmark.command(job, ["--dataset", "sample", "--tokenizer", "bpe:512"], tmp_path, args)
        if job.contestant.script == "scripts/rivals.py":
            flags = words[words.index(str(ROOT / "scripts/rivals.py")) + 1 :]
            assert rivals.build_parser().parse_args(flags).rival == job.contestant.flags[0]
        else:
            assert (ROOT / job.contestant.script).is_file()
        assert ("--compile" in words) == job.name.endswith("-compile")
        assert words[words.index("--batch_size") + 1] == str(job.micro_batch)


def test_scaling_is_weak_and_strong_and_predicted():
    args = bench_args("--scaling", "1", "2", "4", "--contestants", "zero2")
    jobs = benchmark.make_jobs(args)
    assert [job.name for job in jobs] == ["zero2-1x8", "zero2-1x2", "zero2-2x4", "zero2-2x2", "zero2-4x2"]
    rates = dict(zip((job.name for job in jobs), (1000, 600, 900, 700, 800), strict=True))
    runs = {name: [launched(rate)] for name, rate in rates.items()}
    rows = benchmark.summarize(runs, {"bf16": [1.0], "fp32": [1.0]}, jobs, args)
    benchmark.add_scaling(rows, jobs, {2: [1e9], 4: [1.0]}, 500, args)
    assert "strong" not in rows["zero2-1x8"] and "predicted" not in rows["zero2-1x8"]
    assert rows["zero2-2x4"]["strong"] == 0.9 and "weak" not in rows["zero2-2x4"]
    assert rows["zero2-2x2"]["weak"] == pytest.approx(7 / 6) and "strong" not in rows["zero2-2x2"]
    assert (rows["zero2-4x2"]["strong"], rows["zero2-4x2"]["weak"]) == (0.8, pytest.approx(4 / 3))
    assert rows["zero2-2x4"]["predicted"] == pytest.approx(1000)  # an endless link leaves the arithmetic alone
    assert 900 < rows["zero2-4x2"]["predicted"] < 1000


# Whole runs
@pytest.mark.drill
def test_a_round_writes_all_files(tmp_path: Path):
    words = [sys.executable, "scripts/benchmark.py", *TINY, "--contestants", "base", "zero2", "ddp", "trainer2"]
    done = run([*words, "--vocabulary", "512", "--rounds", "1", "--steps", "5", "--output", str(tmp_path)])
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads((tmp_path / "benchmark.json").read_text())["vocabularies"]["512"]
    rows = found["contestants"]
    assert list(rows) == ["base", "zero2", "ddp", "trainer2"]
    assert [row["ranks"] for row in rows.values()] == [1, 2, 2, 2]
    assert rows["base"]["parameters"] == rows["zero2"]["parameters"] == rows["ddp"]["parameters"] == 134_912
    assert rows["trainer2"]["parameters"] == 134_912
    assert set(rows["zero2"]["ratios"]) == {"ddp", "trainer2"}
    for row in rows.values():
        assert 0 < row["ceiling_share"] < 1 and row["tokens_per_second"] > 0
        assert 0.1 < row["peak_memory_gib"] < 8 and 0.5 < row["first_step_s"] < 120
    assert all(values[0] > 0 for values in found["ceilings_gflops"].values())
    assert (tmp_path / "benchmark.md").read_text() in done.stdout
    assert (tmp_path / "benchmark.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.drill
def test_quality_is_measured_alike_and_a_finished_run_is_not_run_again(tmp_path: Path):
    words = [sys.executable, "scripts/quality.py", *TINY, "--dataset", "sample", "--tokenizer", "bpe:512"]
    words += ["--tokens", "2000", "--evaluations", "2", "--output", str(tmp_path / "out")]
    done = run(words)
    assert done.returncode == 0, done.stdout + done.stderr
    curves = json.loads((tmp_path / "out" / "quality.json").read_text())
    assert list(curves) == ["base-seed42", "nanogpt-pretrain-seed42", "nanogpt-char-seed42"]
    for points in curves.values():
        assert [point["tokens"] for point in points] == [1024, 2048]
        assert all(5.5 < point["loss"] < 6.4 for point in points)  # ln 512 is 6.24
        assert all(math.exp(point["loss"]) == pytest.approx(point["perplexity"]) for point in points)
    assert len({points[0]["loss"] for points in curves.values()}) == 3
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("out/*/metrics.jsonl")}
    again = run(words)
    assert again.returncode == 0, again.stdout + again.stderr
    assert done.stdout.endswith(again.stdout)  # the first also prepared the tokens
    assert {path: path.stat().st_mtime_ns for path in before} == before
    other = run([*words, "--tokens", "4000"])
    assert other.returncode == 1 and "holds a run with other settings" in other.stderr


# quality.py's arithmetic
def curve(name: str, seed: int, *losses: float) -> tuple[quality.Run, list[quality.Point]]:
    points = [quality.Point(1000 * k, loss, math.exp(loss), 2.0, 1.0) for k, loss in enumerate(losses, start=1)]
    return quality.Run(name, seed, (), Path(f"{name}-{seed}")), points


def test_the_best_step_is_marked_and_the_verdict_is_about_means():
    curves = dict([curve("base", 1, 5.0, 3.0, 4.0), curve("base", 2, 5.0, 3.2, 4.2)]
                  + [curve("nanogpt-char", seed, 5.0, 3.5, 3.6) for seed in (1, 2)]
                  + [curve("nanogpt-pretrain", seed, 5.0, 4.0, 6.0) for seed in (1, 2)])  # fmt: skip
    lines = quality.table(curves).splitlines()
    assert lines[2] == "| base | 1 | 4.0000 | 3.0000 | 2,000 | 20.09 | 2.0 | 1.0000 |"
    assert quality.verdict(curves).splitlines() == [
        "at the end: base 4.1000, nanogpt-char 3.6000: +0.5000 nats",
        "at the best step: base 3.1000, nanogpt-char 3.5000: -0.4000 nats",
    ]


def test_all_recipes_get_the_same_tokens_and_their_own_settings(tmp_path: Path):
    words = ["--dataset", "sample", "--tokens", "1000001", "--seeds", "1", "2", "--also", "hot=--lr 1e-3"]
    args = quality.build_parser().parse_args([*words, "--output", str(tmp_path)])
    runs = quality.make_runs(args)
    assert [(each.name, each.seed) for each in runs[::4]] == [("base", 1), ("base", 2)]
    for each in runs:
        assert each.words[each.words.index("--max_steps") + 1] == "489"  # of 2,048 tokens
        assert each.words[-2:] == ("--seed", str(each.seed))
    pretrain = rivals.build_parser().parse_args(runs[1].words[1:])
    char = rivals.build_parser().parse_args(runs[2].words[1:])
    names = ("lr", "dropout", "beta2", "weight_decay", "warmup_steps", "random_crops")
    assert [getattr(pretrain, name) for name in names] == [6e-4, 0.0, 0.95, 0.1, 10, True]
    assert [getattr(char, name) for name in names] == [1e-3, 0.2, 0.99, 0.1, 10, True]
    assert runs[3].words[:3] == (str(ROOT / "GPTLike-Base.py"), "--lr", "1e-3")


# profile_step.py
@pytest.mark.parametrize(("name", "kind"), [
    ("aten::addmm", "matmul"), ("aten::mm", "matmul"), ("mkldnn::_linear_pointwise", "matmul"),
    ("aten::_scaled_dot_product_flash_attention_for_cpu_backward", "attention"), ("aten::native_dropout", "dropout"),
    ("aten::_log_softmax_backward_data", "cross-entropy"), ("aten::gelu_backward", "GELU"),
    ("aten::native_layer_norm", "layer norm"), ("aten::_fused_adamw_", "optimizer"),
    ("gloo:all_reduce", "communication"), ("aten::copy_", "casts and copies"),
    ("aten::mul_", "arithmetic"), ("aten::mummy", "other operations"),
])  # fmt: skip
def test_kinds_of_operations(name: str, kind: str):
    assert profile_step.kind_of(name) == kind


def test_times_by_kind_add_up_to_the_step():
    events = [("aten::mm", 30.0), ("aten::copy_", 5.0), ("aten::addmm", 20.0), ("aten::gelu", 15.0)]
    found = profile_step.by_kind(events, 100.0)
    assert found == {"matmul": 50.0, "outside of operations": 30.0, "GELU": 15.0, "casts and copies": 5.0}
    lines = profile_step.report(events, 100.0, "x").splitlines()
    assert lines[0] == "x: 100.0 ms a step" and lines[4] == "| matmul | 50.0 | 50.0% |"
    assert lines[11] == "| `aten::mm` | 30.0 | 30.0% |"


@pytest.mark.slow
@pytest.mark.parametrize("script", [["GPTLike-Base.py", "--overwrite"], ["scripts/rivals.py", "nanogpt"]])
def test_a_script_under_the_profiler(tmp_path: Path, script: list[str]):
    words = [sys.executable, "scripts/profile_step.py", *script, *TINY, "--dataset", "sample"]
    words += ["--tokenizer", "bpe:512", "--output_dir", str(tmp_path), "--max_steps"]
    done = run([*words, "8"])
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "profile.md").read_text()
    assert text in done.stdout
    for row in ("| matmul |", "| attention |", "| optimizer |"):
        assert row in text
    few = run([*words, "6"])
    assert few.returncode == 1 and "at least 7 are needed" in few.stderr and "Traceback" not in few.stderr


@pytest.mark.parametrize("words", [[], ["scripts/benchmark.py"], ["scripts/rivals.py", "trainer"]])
def test_the_profiler_wants_a_script(words: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    monkeypatch.setattr(sys, "argv", ["profile_step.py", *words])
    with pytest.raises(SystemExit) as stop:
        profile_step.main()
    said = capsys.readouterr().err
    assert stop.value.code == 2 and "SCRIPT is one of DeepSpeed-GPTLike-Multihosts.py" in said
    assert "scripts/rivals.py with ddp, nanogpt or original" in said


# docs/benchmarks.md
def documented() -> list[list[str]]:
    text = (ROOT / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    return [shlex.split(line) for block in blocks for line in block.replace("\\\n", " ").splitlines()]


def test_benchmarks_of_the_docs_are_taken():
    """The values of their flags; the flags of every command test_docs.py looks at."""
    tool, parser = "scripts/benchmark.py", benchmark.build_parser()
    found = [words[words.index(tool) + 1 :] for words in documented() if tool in words]
    assert len(found) == 7
    for words in found:
        benchmark.check_args(parser, parser.parse_args(words))


# Bad input: exit code, words of the message, no traceback
@pytest.mark.parametrize(("words", "code", "message"), [
    ("benchmark.py --contestants nobody", 2, "no contestant nobody"),
    ("benchmark.py --contestants trainer2-compile", 2, "no contestant trainer2-compile"),
    ("benchmark.py --contestants base base", 2, "base base: one is named twice"),
    ("benchmark.py --steps 3", 2, "--steps 3: must be more than the 3 that do not count"),
    ("benchmark.py --rounds 0", 2, "--rounds 0: must be at least 1"),
    ("benchmark.py --vocabulary 100", 2, "--vocabulary 100: must be at least 256"),
    ("benchmark.py --ranks 3", 2, "--batch_size 8 is not a multiple of 3 ranks"),
    ("benchmark.py --scaling 1 0", 2, "--batch_size 8 is not a multiple of 0 ranks"),
    ("benchmark.py --scaling 1 2", 2, "--scaling is for the ZeRO scripts"),
    ("benchmark.py --dropout nan", 2, "--dropout nan must be at least 0 and below 1"),
    ("benchmark.py --d_model 100", 2, "--d_model 100 is not a multiple of --n_head 6"),
    ("benchmark.py --round 1", 2, "unrecognized arguments: --round 1"),
    ("benchmark.py --dataset nowhere --contestants base", 1, "--dataset nowhere: no such folder"),
    ("benchmark.py --dataset sample --contestants base --vocabulary 40000", 1, "and not --vocabulary 40,000"),
    ("benchmark.py --contestants base --output /dev/null/x", 1, "/dev/null"),
    ("rivals.py", 2, "the following arguments are required: rival"),
    ("rivals.py original", 2, "original trains in fp32"),
    ("rivals.py nanogpt --precision fp16", 2, "--precision fp16 does not run on a CPU"),
    ("rivals.py ddp", 2, "ddp wants ranks: torchrun"),
    ("rivals.py nanogpt --dataset nowhere", 1, "--dataset nowhere: no such folder"),
    ("rivals.py nanogpt --n_head 5", 2, "--d_model 768 is not a multiple of --n_head 5"),
    ("quality.py", 2, "the following arguments are required: --dataset"),
    ("quality.py --dataset sample --tokens 0", 2, "--tokens 0: must be at least 1"),
    ("quality.py --dataset sample --seeds 1 1", 2, "--seeds 1 1: must be different"),
    ("quality.py --dataset sample --also base=--lr", 2, "write NAME=FLAGS"),
    ("quality.py --dataset sample --also x", 2, "write NAME=FLAGS"),
    ("quality.py --dataset nowhere", 1, "--dataset nowhere: no such folder"),
    ("quality.py --dataset sample --tokenizer nothing", 1, "--tokenizer nothing"),
])  # fmt: skip
def test_bad_input(
    words: str, code: int, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    script, *flags = words.split()
    if "--output" not in words and script != "rivals.py":
        flags += ["--output", str(tmp_path / "out")]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTLIKE_CACHE", str(tmp_path / "tokens"))  # benchmark.py sets it: put back after the test
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as stop:
        {"benchmark.py": benchmark, "rivals.py": rivals, "quality.py": quality}[script].main()
    said = capsys.readouterr()
    if code == 2:
        assert stop.value.code == 2 and f"{script}: error: " in said.err and message in said.err
    else:  # Python prints the text and exits with 1
        assert stop.value.code.startswith(f"{script}: error: ") and message in stop.value.code
    assert said.out == "" and not (tmp_path / "out").exists()


def test_a_contestant_that_fails_is_shown(tmp_path: Path):
    script = tmp_path / "fails.py"
    script.write_text("raise SystemExit('out of luck')\n")
    with pytest.raises(ValueError, match="ended with exit code 1:\nout of luck"):
        benchmark.launch([sys.executable, str(script)], tmp_path / "out", {})
