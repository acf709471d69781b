"""scripts/dev/gpu_check.py: without a GPU its rehearsal runs the parts; what it says of made-up runs is right."""

import json

import pytest
from conftest import ROOT, load_script

pytestmark = pytest.mark.drill
dev = str(ROOT / "scripts" / "dev")


@pytest.fixture(scope="module")
def gpu():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(dev)
        yield load_script("scripts/dev/gpu_check.py")


def verdicts(page) -> list[list[str]]:
    lines = [line for line in page.read_text().splitlines() if line.startswith("| ")][1:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


@pytest.mark.parametrize("part", ["profile", "offload"])
def test_rehearsal(part, gpu, tmp_path):
    page = tmp_path / "page.md"
    assert gpu.main(["--device", "cpu", "--parts", part, "--output", str(page)]) == 0
    assert "measures nothing about GPUs" in page.read_text()
    for name, what, found, _, verdict in verdicts(page):
        assert (name, verdict) == (part, "ok")
        wanted = "matmul" if part == "profile" else "Base: out of memory; Offload: loss 6."
        assert wanted in found, what


def test_what_does_not_fit_is_named_and_not_started(gpu, tmp_path, capsys):
    page = tmp_path / "page.md"
    assert gpu.main(["--device", "cpu", "--minutes", "0.1", "--output", str(page)]) == 0
    rows = verdicts(page)
    assert {row[0] for row in rows} == set(gpu.PARTS) and {row[-1] for row in rows} == {"skipped"}
    assert "it takes about 30 s, and of --minutes" in rows[0][2] and "skipped start" in capsys.readouterr().out


def test_dry_run_prints_commands(gpu, tmp_path, capsys):
    page = tmp_path / "page.md"
    assert gpu.main(["--device", "cpu", "--dry_run", "--parts", "start", "--output", str(page)]) == 0
    said = capsys.readouterr().out
    assert said.count("start: ") == 6 and said.count("--nproc_per_node 2") == 5 and not page.exists()


def made_up_run(gpu, folder, losses, *, allocated=0, rate=460_000):
    steps = {step: {"loss": loss, "tokens_per_second": rate} for step, loss in enumerate(losses, start=1)}
    for fields in steps.values():
        fields["peak_memory_gib"] = 1.0
    ledger = {"parameters on cuda": {"held": 2**30, "formula": 2**30}}
    (folder / "held.json").write_text(json.dumps({"allocated": allocated, "ledger": ledger}))
    args = {"compile": False, "zero_stage": 0, "world_size": 1, "precision": "bf16", "device_name": "NVIDIA H200"}
    args |= {"n_params": 124_000_000, "n_layer": 12, "block_size": 1024, "d_model": 768}
    (folder / "args.json").write_text(json.dumps(args))
    return gpu.Run(0, "precision bf16", steps, folder)


def test_wrong_runs_fail(gpu, tmp_path):
    good = made_up_run(gpu, tmp_path, [6.0, 5.0, 4.0], allocated=2**30 + 2**26)
    assert gpu.trains(good) == "loss 6.000 to 4.000, peak 1.00 GiB" and gpu.agrees(good, good) == "0.0e+00"
    assert gpu.holds(good) == "ledger 1.000 GiB, allocator 1.062 GiB" and "MFU 39.9%" in gpu.fast(good, good)
    bad = made_up_run(gpu, tmp_path, [6.0, 6.5, 7.0], allocated=2**31, rate=350_000)
    for judge, runs in ((gpu.trains, [bad]), (gpu.agrees, [bad, good]), (gpu.holds, [bad]), (gpu.fast, [bad, bad])):
        with pytest.raises(gpu.ToolError):
            judge(*runs)
