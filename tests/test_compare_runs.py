"""scripts/compare_runs.py: every number of the table and the pictures; scripts/run_all_stages.sh, which ends in it."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from conftest import BASE, BIN, ROOT, SCRIPTS, load_script

LIGHT, DARK = "#ffffff", "#0d1117"  # the backgrounds of GitHub's pages
# What protanopes, deuteranopes and tritanopes see of linear RGB: Machado, Oliveira and Fernandes, 2009, severity 1.
BLINDNESS = {
    "none": numpy.eye(3),
    "red": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "green": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "blue": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
}
TO_XYZ = numpy.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])


@pytest.fixture
def compare():
    return load_script("compare_runs.py")


def run_tool(*words: object) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "scripts" / "compare_runs.py", *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def write_run(folder: Path, lines: list[dict], **files: dict | None) -> Path:
    """A run's folder; checkpoint= becomes the manifest of its newest step."""
    folder.mkdir(parents=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name, value in files.items():
        path = folder / "checkpoints" / "step9" / "run.json" if name == "checkpoint" else folder / f"{name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    return folder


SETTINGS = {"world size": 2, "batch_size": 4, "gradient_accumulation_steps": 1, "block_size": 128}  # 1,024 a step
LEDGER = {
    "parameters on cuda": {"held": 2 * 2**20, "formula": 2 * 2**20},
    "gradients_and_buckets on cuda": {"held": 5 * 2**20, "formula": 2**20},
    "optimizer_states on cpu": {"held": 6 * 2**20, "formula": 6 * 2**20},
}


@pytest.fixture
def finished(tmp_path: Path) -> Path:
    """At 512, 1,024 and 2,048 tokens a second, so 20 + 10 + 5 seconds for ten steps each."""
    steps = [{"step": step, "loss": 8 - step / 10, "tokens_per_second": rate, "peak_memory_gib": 1 + step / 50}
             for step, rate in ((10, 512), (20, 1024), (30, 2048))]  # fmt: skip
    validations = [
        {"step": 15, "validation_loss": 6.25, "validation_perplexity": 518.0, "validation_bits_per_byte": 2.5},
        {"step": 30, "validation_loss": 6.5, "validation_perplexity": 665.1, "validation_bits_per_byte": 2.6},
    ]
    args = {"max_steps": 30, "zero_stage": 2, "precision": "bf16"}
    summary = {"steps": 30, "parameters": 1234567, "tokens_per_second": 1024.4, "ledger": LEDGER}
    return write_run(tmp_path / "finished", [*steps, *validations], args=args, summary=summary,
                     checkpoint={"settings": SETTINGS, "validation_loss": None})  # fmt: skip


@pytest.fixture
def unfinished(tmp_path: Path) -> Path:
    """Killed while it wrote a line, before any validation or checkpoint; without args.json."""
    folder = write_run(tmp_path / "un|finished", [{"step": 10, "loss": 7.5}])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 20, "lo')
    return folder


def cells(markdown: str) -> list[list[str]]:
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    return [[cell.strip() for cell in row.strip("| \n").split(" | ")] for row in rows]


def drawn(compare, name: str, folders: list[Path]):
    """The axes of a picture."""
    figure, axes = compare.pyplot.subplots()
    compare.PICTURES[name](axes, compare.read_runs(folders))
    compare.pyplot.close(figure)
    return axes


def test_the_table_shows_every_number(compare, finished, unfinished, tmp_path, monkeypatch, capsys):
    output = tmp_path / "comparison"
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(finished), str(unfinished), "--output", str(output)])
    compare.main()
    text = (output / "compare.md").read_text()
    heading, line, first, second = cells(text)
    assert heading == [
        "run", "ZeRO stage", "ranks", "precision", "parameters", "steps", "tokens", "seconds", "train loss",
        "validation loss", "best", "perplexity per token", "bits per byte", "tokens/s", "peak memory GiB",
    ]
    assert set(line) == {"---"}
    assert first == [
        "finished", "2", "2", "bf16", "1,234,567", "30", "30,720", "35.0", "5.0000", "6.5000", "6.2500", "665.1",
        "2.600", "1,024", "1.60",
    ]
    assert second == ["un\\|finished", "-", "-", "-", "-", "10 of ?, unfinished", "-", "-", "7.5000", *"------"]
    assert capsys.readouterr().out.startswith(text.split("\n\n")[0])
    pictures = re.findall(r"^!\[.+\]\((.+)\)$", text, re.MULTILINE)
    assert pictures == list(compare.PICTURES) == sorted(compare.PICTURES, key=pictures.index)
    assert {path.name for path in output.iterdir()} == {"compare.md", *pictures}


@pytest.mark.parametrize(
    ("name", "train", "validation"),
    [("loss.png", [10, 20, 30], [15, 30]), ("loss_by_tokens.png", [10240, 20480, 30720], [15360, 30720]),
     ("loss_by_time.png", [20, 30, 35], [25, 35])],
)  # fmt: skip
def test_losses_stand_at_their_steps_tokens_and_seconds(compare, finished, name, train, validation):
    line, marks, hollow = drawn(compare, name, [finished]).lines
    assert [list(line.get_xdata()), list(line.get_ydata())] == [train, [7, 6, 5]] == [
        list(marks.get_xdata()), list(marks.get_ydata())]  # fmt: skip
    assert [list(hollow.get_xdata()), list(hollow.get_ydata())] == [validation, [6.25, 6.5]]


def test_runs_on_one_line_are_told_apart_by_marks_at_different_steps(compare, tmp_path):
    lines = [{"step": step, "loss": 9 - step / 10} for step in range(1, 61)]
    folders = [write_run(tmp_path / f"run {number}", lines) for number in range(6)]
    marks = drawn(compare, "loss.png", folders).lines[1::2]
    shown = [set(mark.get_xdata()[mark.get_markevery()[0] :: mark.get_markevery()[1]]) for mark in marks]
    assert len({mark.get_marker() for mark in marks}) == len({mark.get_color() for mark in marks}) == 6
    assert all(len(places) >= 8 for places in shown)
    assert not any(one & other for one, other in itertools.combinations(shown, 2))


def test_bars_of_the_ledger_are_its_bytes(compare, finished):
    axes = drawn(compare, "ledger.png", [finished])
    bars = [(bar.get_x(), bar.get_width(), bar.get_hatch(), bar.get_facecolor()[3]) for bar in axes.patches]
    assert bars == [(0, 2, None, 1), (2, 5, None, 1), (7, 6, "///", 0),  # held: the optimizer in host memory
                    (0, 2, None, 0), (2, 1, None, 0), (3, 6, None, 0)]  # fmt: skip
    assert [text.get_text() for text in axes.get_yticklabels()] == ["finished\nstage 2, 2 ranks"]


def test_without_a_gpu_all_is_host_memory_and_nothing_is_hatched(compare, tmp_path):
    ledger = {place.replace("cuda", "cpu"): sizes for place, sizes in LEDGER.items()}
    run = write_run(tmp_path / "cpu", [{"step": 9}], checkpoint={"ledger": ledger})  # not finished: of the checkpoint
    assert [bar.get_hatch() for bar in drawn(compare, "ledger.png", [run]).patches] == [None] * 6


def test_throughput_shows_the_median_and_how_much_it_varies(compare, finished, unfinished):
    axes = drawn(compare, "throughput.png", [unfinished, finished])
    assert [bar.get_width() for bar in axes.patches] == [1024.4]
    assert axes.lines[0].get_xdata() == pytest.approx(numpy.percentile([512, 1024, 2048], (10, 90)))
    assert [text.get_text() for text in axes.get_yticklabels()] == ["finished\n1,024"]


def test_one_run_an_empty_one_and_many(compare, finished, tmp_path):
    empty = write_run(tmp_path / "empty", [], args={"max_steps": 50, "precision": "fp32", "zero_stage": 3})
    nan = [write_run(tmp_path / f"{n}{'x' * 200}$y$", [{"step": 1, "loss": 9.0}, {"step": 2, "loss": float("nan")}])
           for n in range(9)]  # fmt: skip
    for folders, steps in (([finished], "30"), ([empty], "0 of 50, unfinished"), (nan, "2 of ?, unfinished")):
        runs = compare.read_runs(folders)
        assert cells(compare.table(runs))[2][5] == steps
        for name in compare.PICTURES:
            compare.draw(name, runs, tmp_path)
            pixels = compare.pyplot.imread(tmp_path / name)
            assert pixels.shape == (825, 1350, 4)
            assert pixels[0, 0, 3] == 0 and pixels[..., 3].max() == 1  # transparent, and something is drawn
    assert len({line.get_linestyle() for line in drawn(compare, "loss.png", nan).lines[::2]}) == 2  # 7 colours, 9 runs


def test_a_picture_without_data_says_so(compare, unfinished):
    for name in ("loss_by_tokens.png", "loss_by_time.png", "ledger.png", "throughput.png"):
        assert not drawn(compare, name, [unfinished]).has_data()
    shown = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compare.Axes, "text", lambda self, x, y, words, **_: shown.append(words))
        compare.draw("ledger.png", compare.read_runs([unfinished]), unfinished)
    assert shown == ["recorded by none of the runs"]


def test_runs_of_one_name_are_told_apart(compare, tmp_path):
    folders = [write_run(tmp_path / host / "zero2", [{"step": 1, "loss": 9.0}]) for host in ("a", "b")]
    assert [run.name for run in compare.read_runs(folders)] == [str(f) for f in folders]


# Colours.
def linear(color: str) -> numpy.ndarray:
    values = numpy.array([int(color[start : start + 2], 16) / 255 for start in (1, 3, 5)])
    return numpy.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def contrast(one: str, other: str) -> float:
    """WCAG 2: 1 to 21."""
    low, high = sorted(linear(color) @ TO_XYZ[1] for color in (one, other))
    return (high + 0.05) / (low + 0.05)


def lab(color: numpy.ndarray) -> numpy.ndarray:
    ratio = numpy.clip(color, 0, 1) @ TO_XYZ.T / (0.9505, 1, 1.089)
    x, y, z = numpy.where(ratio > 216 / 24389, numpy.cbrt(ratio), (24389 / 27 * ratio + 16) / 116)
    return numpy.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def smallest_difference(colors: tuple[str, ...], sees: object) -> float:
    """Between two of the colours, in CIELAB."""
    places = [lab(numpy.asarray(sees) @ linear(color)) for color in colors]
    return min(float(numpy.linalg.norm(one - other)) for one, other in itertools.combinations(places, 2))


@pytest.mark.parametrize("background", [LIGHT, DARK])
def test_contrast_is_enough_on_light_and_dark(compare, background):
    """3 is what WCAG 2.2 asks of graphics and of large text."""
    assert all(contrast(color, background) >= 3 for color in compare.PALETTE)
    assert contrast(compare.GREY, background) >= 4.3
    assert contrast("#ffffff", "#000000") == pytest.approx(21)


@pytest.mark.parametrize("eyes", BLINDNESS)
def test_colours_differ_for_all_eyes(compare, eyes):
    """By more than Okabe and Ito's seven, which have 26, 21, 18 and 16; their lightness would not fit both pages."""
    assert smallest_difference(compare.PALETTE, BLINDNESS[eyes]) > 27
    assert smallest_difference(("#ff0000", "#8b7300"), BLINDNESS["red"]) < 20  # a check that can fail


# Bad input.
BAD = {  # metrics.jsonl, other files, message
    "no_step": ('{"step": 1}\n{"loss": 9}\n', {}, 'metrics.jsonl, line 2 is no JSON object with a step: {"loss": 9}'),
    "negative": ('{"step": -1}\n', {}, 'metrics.jsonl, line 1 is no JSON object with a step: {"step": -1}'),
    "huge_step": (f'{{"step": {10**400}}}\n', {}, "metrics.jsonl, line 1 is no JSON object with a step: "),
    "huge_loss": (f'{{"step": 1, "loss": {10**400}}}\n', {}, "metrics.jsonl, line 1: loss is no number: 1000"),
    "word": ('{"step": 1, "loss": "low"}\n', {}, "metrics.jsonl, line 1: loss is no number: 'low'"),
    "boolean": ('{"step": 1, "loss": true}\n', {}, "metrics.jsonl, line 1: loss is no number: True"),
    "latin1": (b'{"step": 1, "caf\xe9": 2}\n', {}, "metrics.jsonl is not UTF-8: "),
    "args": ("", {"args": "[]"}, "args.json is no JSON object"),
    "half": ("", {"summary": '{"steps": 1'}, "summary.json is not JSON: "),
    "parameters": ("", {"summary": '{"parameters": 1.5}'}, "summary.json: parameters is no number: 1.5"),
    "ledger": ("", {"summary": '{"ledger": 3}'}, "summary.json: ledger is no object: 3"),
    "bytes": ("", {"summary": '{"ledger": {"parameters on cpu": {"held": "2"}}}'},
              "summary.json: ledger has no bytes for parameters on cpu: {'held': '2'}"),
    "settings": ("", {"checkpoint": '{"settings": []}'}, "run.json: settings is no object: []"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_files_are_named(compare, tmp_path, name, monkeypatch):
    metrics, files, message = BAD[name]
    folder = write_run(tmp_path / name, [], **dict.fromkeys(files, {}))
    (folder / "metrics.jsonl").write_bytes(metrics if isinstance(metrics, bytes) else metrics.encode())
    for file, text in files.items():
        next(folder.rglob("run.json" if file == "checkpoint" else f"{file}.json")).write_text(text)
    monkeypatch.setattr(sys, "argv", ["compare_runs.py", str(folder), "--output", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match=re.escape(message)) as stop:
        compare.main()
    assert str(stop.value).startswith("compare_runs.py: error: ") and "\n" not in str(stop.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("fields", [
    {"tokens_per_second": 0}, {"tokens_per_second": -5.0}, {"tokens_per_second": float("inf")},
    {"tokens_per_second": float("nan")}, {"loss": float("-inf")}, {"peak_memory_gib": 1e300}, {},
    {"loss": float("nan"), "validation_loss": 3.0}])  # fmt: skip
def test_odd_numbers_are_shown_as_they_are(compare, tmp_path, fields):
    settings = SETTINGS | {"batch_size": 0 if "loss" in fields else 4}
    folder = write_run(tmp_path / "odd", [{"step": 0}, {"step": 1} | fields], checkpoint={"settings": settings})
    runs = compare.read_runs([folder])
    assert len(cells(compare.table(runs))[2]) == len(compare.COLUMNS)
    for name in compare.PICTURES:
        compare.draw(name, runs, tmp_path)


def test_all_that_is_wrong_is_named(finished, tmp_path):
    broken = write_run(tmp_path / "broken", [{"step": 1, "loss": 9.0}])
    (broken / "metrics.jsonl").write_text('{"step": 1}\n{"loss": 9.0}\n')
    output = tmp_path / "comparison"
    result = run_tool(finished, tmp_path / "nothing", broken, "--output", output)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.splitlines() == [
        f"compare_runs.py: error: {tmp_path}/nothing has no metrics.jsonl: give the --output_dir of a training run",
        f'  {broken}/metrics.jsonl, line 2 is no JSON object with a step: {{"loss": 9.0}}',
    ]
    assert not output.exists()
    assert run_tool().returncode == 2


# scripts/run_all_stages.sh
def run_all(folder: Path, *words: str, gpus: int = 0, timeout: int = 60, **env: str) -> subprocess.CompletedProcess:
    """The script of this folder, as on a machine with so many GPUs."""
    fake = folder / "bin" / "nvidia-smi"
    fake.parent.mkdir(exist_ok=True)
    lines = "".join(f"echo 'GPU {number}: NVIDIA H100'\n" for number in range(gpus))
    fake.write_text(f"#!/bin/sh\n{lines}exit {0 if gpus else 6}\n")
    fake.chmod(0o755)
    kept = {key: value for key, value in os.environ.items() if key not in ("NUM_GPUS", "CUDA_VISIBLE_DEVICES")}
    variables = kept | {"PATH": f"{fake.parent}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}"} | env
    root = folder if (folder / "scripts").is_dir() else ROOT
    command = ["bash", str(root / "scripts" / "run_all_stages.sh"), *words]
    return subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True, timeout=timeout)


@pytest.mark.parametrize(
    ("env", "gpus", "launch", "ranks"),
    [({}, 0, "deepspeed --quiet --num_gpus 2", 2), ({}, 4, "deepspeed --quiet", 4),
     ({"NUM_GPUS": "3"}, 0, "deepspeed --quiet --num_gpus 3", 3),
     ({"CUDA_VISIBLE_DEVICES": "1,3"}, 4, "deepspeed --quiet --include localhost:1\\,3", 2)],
    ids=str,
)  # fmt: skip
def test_all_stages_train_on_the_same_steps(tmp_path, env, gpus, launch, ranks):
    result = run_all(tmp_path, "--dry_run", "--batch_size", "3", "--dataset", "my texts", gpus=gpus, **env)
    assert (result.returncode, result.stderr) == (0, "")
    *trainings, compare = [line for line in result.stdout.splitlines() if line.startswith("+ ")]
    for script, line in zip(SCRIPTS, trainings, strict=True):
        start, batch = ("python", 3 * ranks) if script == BASE else (f"{launch} --master_port 29500", 3)
        folder = f"runs/all-stages/{script.removesuffix('.py')}"
        assert line.startswith(f"+ {start} {script} --output_dir {folder} --dataset sample --dropout 0 ")
        assert line.endswith(f" --batch_size {batch} --dataset my\\ texts")
        assert ("--n_layer 4" in line) == (gpus == 0)
    folders = " ".join(f"runs/all-stages/{script.removesuffix('.py')}" for script in SCRIPTS)
    assert compare == f"+ python scripts/compare_runs.py {folders} --output runs/all-stages"


@pytest.mark.parametrize(
    ("words", "env", "message"),
    [(["--output_dir", "here"], {}, "--output_dir does not go here: each script has its own"),
     (["--ds_config=x.json"], {}, "--ds_config does not go here: each script has its own"),
     (["--resume", "never"], {}, "--resume does not go here: each script has its own"),
     (["--batch_size"], {}, "--batch_size '' is no number of sequences"),
     (["--batch_size=$(touch x)"], {}, "--batch_size '$(touch x)' is no number of sequences"),
     ([], {"NUM_GPUS": "two"}, "NUM_GPUS=two is not a number of ranks")],
    ids=str,
)  # fmt: skip
def test_run_all_stages_refuses(tmp_path, words, env, message):
    result = run_all(tmp_path, *words, **env)
    assert (result.returncode, result.stdout, result.stderr) == (2, "", f"run_all_stages.sh: {message}\n")
    assert not (tmp_path / "x").exists()


@pytest.mark.drill
@pytest.mark.timeout(900)
def test_all_stages_train_and_agree(tmp_path):
    """The real thing, in a copy of the repository: six runs with the same losses."""
    for name in ("scripts", "configs"):
        shutil.copytree(ROOT / name, tmp_path / name)
    for script in SCRIPTS:
        shutil.copy(ROOT / script, tmp_path)
    flags = ["--tokenizer", "bpe:1024", "--n_layer", "2", "--d_model", "64", "--block_size", "32"]
    flags += ["--precision", "fp32", "--max_steps", "10", "--log_interval", "2", "--eval_interval", "5"]
    first = run_all(tmp_path, *flags, timeout=400, HF_HUB_OFFLINE="1")
    assert first.returncode == 0, first.stdout + first.stderr
    folder = tmp_path / "runs" / "all-stages"
    rows = cells((folder / "compare.md").read_text())[2:]
    assert [row[0] for row in rows] == [script.removesuffix(".py") for script in SCRIPTS]
    assert {row[5] for row in rows} == {"10"} and {row[6] for row in rows} == {f"{10 * 8 * 32:,}"}
    losses = [float(row[8]) for row in rows]
    assert max(losses) - min(losses) < 2e-4
