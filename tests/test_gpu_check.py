"""scripts/gpu_check.sh: on a machine without a GPU its rehearsal runs every part; what it would say of a GPU is tested
on runs that are made up, good and bad ones."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path

import psutil
import pytest
import torch
from conftest import ROOT, SCRIPTS, load_script, require_nvme, run

GPU_CHECK = ["bash", str(ROOT / "scripts" / "gpu_check.sh")]
GIB = 2**30
gpu = load_script("gpu_check.py")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--parts", "speeed"], "argument --parts: invalid choice: 'speeed'"),
        (["--parts"], "argument --parts: expected at least one argument"),
        (["--peak_tflops", "0"], "argument --peak_tflops: 0 is not a number above 0"),
        (["--peak_tflops", "nan"], "argument --peak_tflops: nan is not a number above 0"),
        (["--peak_tflops", "inf"], "argument --peak_tflops: inf is not a number above 0"),
        (["--peak_tflops", "fast"], "argument --peak_tflops: fast is not a number above 0"),
        (["--output", "nowhere/gpu.md"], "--output nowhere/gpu.md: no folder nowhere"),
        (["--output", "docs"], "--output docs is a folder: name a file"),
        (["--dry"], "unrecognized arguments: --dry"),
        (["GPTLike-Base.py"], "unrecognized arguments: GPTLike-Base.py"),
    ],
)
def test_wrong_usage(words, message, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["gpu_check.py", *words])
    with pytest.raises(SystemExit) as end:
        gpu.main()
    assert end.value.code == 2 and f"gpu_check.sh: error: {message}" in capsys.readouterr().err


def test_the_shell_passes_words_and_exit_code_on():
    done = run([*GPU_CHECK, "--parts", "two words"])
    assert done.returncode == 2 and "invalid choice: 'two words'" in done.stderr and "Traceback" not in done.stderr


def test_without_a_gpu():
    done = run(GPU_CHECK, CUDA_VISIBLE_DEVICES="-1")
    assert done.returncode == 1 and done.stdout == "" and done.stderr.count("\n") == 1
    assert done.stderr.startswith("gpu_check.sh: error: no NVIDIA GPU: torch.cuda.is_available() is False (torch 2.")
    assert "--dry_run rehearses the check on the CPU" in done.stderr


def test_parameters_are_those_of_the_model():
    base = load_script("GPTLike-Base.py")
    for shape in (gpu.SIZES["124M"], gpu.rehearsal_plan().shape):
        with torch.device("meta"):
            model = base.GPTLike(Namespace(**shape.flags(), dropout=0, activation_checkpointing=False), 50257)
        assert sum(weight.numel() for weight in model.parameters()) == shape.parameters(50257)
    assert {name: round(shape.parameters(50257) / 1e6) for name, shape in gpu.SIZES.items()} == {
        "1.5B": 1558, "774M": 774, "355M": 355, "124M": 124,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("memory", "host", "offloaded", "sequences"),
    [
        (141e9, 128e9, "1.5B", (32, 16)),  # H200
        (80e9, 128e9, "1.5B", (32, 8)),  # H100, A100
        (80e9, 40e9, "774M", (32, 8)),
        (24e9, 128e9, "1.5B", (32, 0)),  # 3090, 4090
        (24e9, 20e9, "355M", (32, 0)),
        (8e9, 128e9, "774M", (4, 0)),
        (4e9, 8e9, None, (0, 0)),
    ],
)
def test_sizes_follow_the_memory(memory, host, offloaded, sequences):
    """The model of the part offload, and the micro batches at 124M and 1.5B."""
    assert gpu.offload_size(int(memory), int(host)) == (gpu.SIZES[offloaded] if offloaded else None)
    assert tuple(gpu.micro_batch(gpu.SIZES[size], 50257, int(memory)) for size in ("124M", "1.5B")) == sequences


@pytest.mark.parametrize("size", ["1.5B", "774M", "355M"])
def test_the_limit_lies_between_what_offload_and_base_need(size):
    """Base steps on 14 bytes per parameter and more, ZeRO-Offload holds 4 at most on the GPU, and activations."""
    parameters = gpu.SIZES[size].parameters(50257)
    assert 4 * parameters + 1.5 * GIB < gpu.offload_limit(parameters) < 14 * parameters


def test_the_plan_for_gpus():
    plan = gpu.gpu_plan(2, int(80e9), int(200e9))
    assert not plan.rehearsal and plan.limit == gpu.offload_limit(1_557_686_400)
    items = gpu.Check(plan, None, None).items()
    assert [item.part for item in items] == sorted((item.part for item in items), key=gpu.PARTS.index)
    assert [[item.part for item in items].count(part) for part in gpu.PARTS] == [6, 8, 6, 1, 1, 6]
    bars = {item.what: item.wanted for item in items if item.part == "speed"}
    assert bars["GPTLike-Base.py, 124M, eager"] == "MFU 30%" and bars["GPTLike-Base.py, 124M, compiled"] == "MFU 45%"
    assert set(list(bars.values())[2:]) == {"it runs"} and "GPTLike-Base.py, 1.5B, compiled" in bars
    assert gpu.gpu_plan(1, int(4e9), int(8e9)).limit == 0


def test_batches_and_names():
    assert [gpu.global_batch(ranks) for ranks in (1, 2, 3, 4, 8)] == [4, 4, 6, 4, 8]
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    assert gpu.reason("a\nGPTLike-Base.py: error: no\nlast\n") == "GPTLike-Base.py: error: no"
    assert gpu.reason("Traceback\nRuntimeError: no\n\n") == "RuntimeError: no"
    assert gpu.reason("one\ntwo\n") == "two" and gpu.reason("") == "it printed nothing"


def test_commands():
    words = gpu.command("GPTLike-Base.py", ranks=1, limit=5, flags={"compile": True, "dropout": 0, "overwrite": False})
    assert words[:2] == [sys.executable, str(ROOT / "scripts" / "gpu_check.py")]
    assert words[2:] == ["--probe", "5", str(ROOT / "GPTLike-Base.py"), "--compile", "--dropout", "0"]
    words = gpu.command("DeepSpeed-GPTLike-ZeRO-2.py", ranks=4, limit=0, flags={})
    assert words[1:5] == ["-m", "torch.distributed.run", "--nproc_per_node", "4"]


def test_environments(monkeypatch):
    monkeypatch.delenv("DS_ACCELERATOR", raising=False)  # set by a script that another test has imported
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    on_gpu, on_cpu = (gpu.environment(device, 4, Path("tokens")) for device in ("cuda", "cpu"))
    assert "RANK" not in on_gpu and on_gpu["CUDA_VISIBLE_DEVICES"] == "1" and "DS_ACCELERATOR" not in on_gpu
    assert on_gpu["OMP_NUM_THREADS"] == "4" and on_gpu["NVIDIA_TF32_OVERRIDE"] == "0"
    assert on_cpu["CUDA_VISIBLE_DEVICES"] == "" and on_cpu["DS_ACCELERATOR"] == "cpu"


def test_the_tokenizer_gives_the_text_back():
    base = load_script("GPTLike-Base.py")
    text = base.read_texts("sample")["validation"][:2000]
    tokenizer = base.build_tokenizer(gpu.make_tokenizer(512, 600), "")
    ids = tokenizer.encode(text).ids
    assert tokenizer.get_vocab_size() == 600 and max(ids) < 512 and tokenizer.decode(ids) == text


def made_up(**changes: object) -> gpu.Run:
    """A run of 1,000,000 parameters on one GPU, as it has to be."""
    losses = changes.get("losses", [11.0, 10.0, 9.0])
    states = changes.get("states", 12_000_000)
    more = {f"{kind} on nvme": {"held": GIB, "formula": 0} for kind in changes.get("on_nvme", ())}
    ledger = {"parameters on cuda": {"held": 2_000_000, "formula": 2_000_000},
              "optimizer_states on cuda": {"held": states, "formula": 12_000_000},
              "gradients_and_buckets on cuda": {"held": 2_500_000, "formula": 2_000_000}}  # fmt: skip
    lines = [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]
    lines += [{"step": 10, "mfu": mfu} for mfu in changes.get("mfu", [0.01, 0.31, 0.33, 0.32])]
    summary = {"ledger": ledger | more, "tokens_per_second": 400_000.0, "peak_memory_gib": 1.5}
    screen = f"world size 1, hosts 1, device {changes.get('device', 'H100')}, precision bf16\n"
    return gpu.Run(screen, lines, summary, changes.get("allocated", 16_500_000 + 2**26))


@pytest.fixture
def check(monkeypatch):
    """A check of a GPU whose runs are made up: `check(script=..., device=...)` answers with those given."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "H100")

    def build(*, on_cpu: gpu.Run | None = None, **changes: object) -> gpu.Check:
        def train(script: str, *, device: str, **flags: object) -> gpu.Run:
            assert json.dumps(flags)  # they are the key under which a run is known
            return on_cpu if device == "cpu" else made_up(**changes)

        check = gpu.Check(gpu.gpu_plan(1, int(80e9), int(200e9)), Namespace(folder="."), None)
        check.launcher.train = train
        return check

    return build


def judged(check: gpu.Check, part: str, number: int = 0) -> tuple[str, str]:
    item = [item for item in check.items() if item.part == part][number]
    row = gpu.judge(item)
    return row.verdict, row.found


def test_part_scripts(check):
    assert judged(check(), "scripts") == ("ok", "loss 11.000 to 9.000, peak 1.50 GiB")
    assert judged(check(losses=[9.0, 8.0, 9.0]), "scripts")[0] == "FAIL"
    assert judged(check(losses=[9.0, 8.0, float("nan")]), "scripts")[0] == "FAIL"
    assert judged(check(device="CPU"), "scripts") == ("FAIL", "it did not run in bf16 on H100")


def test_part_parity(check):
    cpu = made_up(losses=[11.0, 10.01, 9.0])
    assert judged(check(on_cpu=cpu), "parity") == ("ok", "1.0e-02")
    assert judged(check(on_cpu=made_up(losses=[11.0, 10.03, 9.0])), "parity") == ("FAIL", "3.0e-02")
    assert judged(check(on_cpu=cpu, losses=[11.0, float("nan"), 9.0]), "parity")[0] == "FAIL"
    assert judged(check(on_cpu=cpu), "parity", 6) == ("FAIL", "1.0e-02")  # Base in fp32
    assert judged(check(on_cpu=made_up(losses=[11.0, 10.0009, 9.0])), "parity", 7)[0] == "ok"
    assert judged(check(on_cpu=made_up(losses=[11.0, 10.0])), "parity") == ("FAIL", "3 steps, on the CPU 2")


def test_part_ledger(check):
    verdict, found = judged(check(), "ledger")
    assert verdict == "ok" and found == "ledger 0.015 GiB, held 0.078 GiB"
    assert judged(check(allocated=16_400_000), "ledger")[0] == "FAIL"  # less than the tensors that are there
    assert judged(check(allocated=16_500_000 + 2**27 + 340_000), "ledger")[0] == "FAIL"
    verdict, found = judged(check(states=11_700_000), "ledger")
    assert verdict == "FAIL" and found.endswith("optimizer_states 11,700,000 bytes, by the formula 12,000,000")


def test_part_speed(check, monkeypatch):
    assert judged(check(), "speed") == ("ok", "400,000 tokens/s, 32 sequences per rank, peak 1.50 GiB, MFU 32.0%")
    assert judged(check(mfu=[0.9, 0.29, 0.29, 0.29]), "speed")[0] == "FAIL"
    assert judged(check(), "speed", 1)[0] == "FAIL"  # compiled: 45 %
    assert judged(check(mfu=[0.01, 0.45, 0.45]), "speed", 1)[0] == "ok"
    assert judged(check(), "speed", 3)[0] == "ok"  # at 1.5B there is no bar
    verdict, found = judged(check(mfu=[]), "speed")
    assert verdict == "skipped" and found.endswith("MFU needs the card's peak: --peak_tflops")
    small = check()
    small.plan = small.plan._replace(memory=int(24e9))
    assert judged(small, "speed", 2) == ("skipped", "model states take 26.1 GiB, the card has 22.4 GiB")
    monkeypatch.setattr(gpu.shutil, "disk_usage", lambda folder: Namespace(free=GIB))
    assert judged(check(), "speed") == ("skipped", "a checkpoint takes 2 GiB, and the disk has 1 GiB free")


@pytest.mark.parametrize(
    ("code", "screen", "verdict", "found"),
    [
        (1, "GPTLike-Base.py: error: not enough memory for this model and batch (CUDA out of memory)", "ok", None),
        (0, "saved", "FAIL", "GPTLike-Base.py ended with exit code 0: saved"),
        (1, "RuntimeError: other", "FAIL", "GPTLike-Base.py ended with exit code 1: RuntimeError: other"),
    ],
)
def test_part_offload(check, monkeypatch, code, screen, verdict, found):
    monkeypatch.setattr(gpu.shutil, "disk_usage", lambda folder: Namespace(free=100 * GIB))
    one = check()
    one.launcher.folder = Path("nowhere")
    one.launcher.launch = lambda *_: (code, screen)
    usual = "not enough memory for Base's 1,557.7M parameters; Offload trains 1,557.7M, peak 1.50 GiB"
    assert judged(one, "offload") == (verdict, found or usual)


def test_part_nvme(check, monkeypatch, tmp_path):
    monkeypatch.setattr(gpu, "no_nvme", lambda *, on_gpu: None)

    def found(*on_nvme: str) -> tuple[str, str]:
        one = check(on_nvme=on_nvme)
        one.launcher.folder = tmp_path
        return judged(one, "nvme")

    assert found("parameters", "optimizer_states") == (
        "ok", "parameters on nvme 1.000 GiB, optimizer_states on nvme 1.000 GiB"
    )  # fmt: skip
    assert found("parameters") == ("FAIL", "parameters on nvme 1.000 GiB")
    assert found() == ("FAIL", "nothing on NVMe")
    config = json.loads((tmp_path / "nvme.json").read_text())["zero_optimization"]
    assert {config[name]["nvme_path"] for name in ("offload_optimizer", "offload_param")} == {str(tmp_path / "nvme")}


def test_part_nvme_says_why_it_is_skipped(check, monkeypatch):
    from torch.utils import cpp_extension

    monkeypatch.setattr(cpp_extension, "CUDA_HOME", None)
    verdict, found = judged(check(), "nvme")
    assert verdict == "skipped" and found.startswith("on a GPU DeepSpeed's NVMe op wants the CUDA toolkit")


def test_whatever_goes_wrong_stays_in_its_row():
    for error in (gpu.Failed("a"), OSError("a"), json.JSONDecodeError("a", "b", 0), KeyError("a"), IndexError("a")):
        row = gpu.judge(gpu.Item("ledger", "x", "y", lambda error=error: (_ for _ in ()).throw(error)))
        assert row.verdict == "FAIL" and "a" in row.found


def test_the_page(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda number: "NVIDIA H100")
    monkeypatch.setattr(gpu, "machine", lambda plan: ["GPUs: one."])
    rows = [gpu.Row("ok", "speed", "Base", "MFU 31.0%", "MFU 30%"), gpu.Row("FAIL", "nvme", "x", "a|b", "y")]
    text = gpu.page(rows, gpu.gpu_plan(1, int(80e9), int(200e9)), ["--parts", "speed", "nvme"])
    assert text.startswith("# GPU check: NVIDIA H100\n") and "rehears" not in text
    assert "bash scripts/gpu_check.sh --parts speed nvme\n" in text and "\n1 ok, 1 FAIL, 0 skipped.\n" in text
    assert "| speed | Base | MFU 31.0% | MFU 30% | ok |\n| nvme | x | a/b | y | FAIL |\n" in text
    text = gpu.page(rows, gpu.rehearsal_plan(), ["--dry_run"])
    assert text.startswith("# GPU check: a rehearsal on the CPU\n\n**This page measures nothing about GPUs.**")


@pytest.fixture
def launcher(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, "make_tokenizer", lambda *_: "{}")
    return gpu.Launcher(gpu.rehearsal_plan(), tmp_path)


def test_a_run_that_does_not_end_is_ended_with_its_children(launcher, tmp_path, monkeypatch):
    script = "import subprocess, time\nprint(subprocess.Popen(['sleep', '60'], start_new_session=True).pid, flush=True)"
    monkeypatch.setattr(gpu, "command", lambda *_, **__: [sys.executable, "-c", f"{script}\ntime.sleep(60)"])
    monkeypatch.setattr(gpu, "TIMEOUT", 1)
    with pytest.raises(gpu.Failed, match="still running after 1 s"):
        launcher.train("GPTLike-Base.py", device="cpu", ranks=1)
    child = int((tmp_path / "run0.log").read_text())
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_a_run_that_fails_is_not_repeated(launcher, monkeypatch, capsys):
    calls = []
    words = [sys.executable, "-c", "import sys; sys.exit('x.py: error: no')"]
    monkeypatch.setattr(gpu, "command", lambda *_, **__: calls.append(1) or words)
    for _ in range(2):
        with pytest.raises(gpu.Failed, match=r"^exit code 1: x\.py: error: no$"):
            launcher.train("GPTLike-Base.py", device="cpu", ranks=1)
    assert len(calls) == 1 and capsys.readouterr().err == "x.py: error: no\n\n"


@pytest.mark.drill
def test_rehearsal(tmp_path):
    """Every part but nvme, which may have to compile for minutes. The same launches and readings as on GPUs."""
    words = ["--dry_run", "--parts", "scripts", "parity", "ledger", "offload", "speed"]
    page = tmp_path / "page.md"
    done = run([*GPU_CHECK, *words, "--output", str(page)], timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = re.findall(r"^\| (\w+) \| (\S+?)(?:, (.*?))? \| (.*?) \| (.*?) \| (\w+) \|$", page.read_text(), re.MULTILINE)
    rows = rows[1:]  # the heading
    assert {row[5] for row in rows} == {"ok"} and len(rows) == done.stdout.count("\nok") + 1 == 23
    for part in ("scripts", "ledger"):
        assert [row[1] for row in rows if row[0] == part] == SCRIPTS
    apart = {(script, precision): float(found) for part, script, precision, found, *_ in rows if part == "parity"}
    assert apart[SCRIPTS[0], "fp32"] == 0 and 0 < apart[SCRIPTS[3], "fp32"] < 1e-5
    assert all(0 < apart[script, "bf16"] < 0.02 for script in SCRIPTS)
    (offload,) = (row[3] for row in rows if row[0] == "offload")
    assert re.fullmatch(r"not enough memory for Base's 51,\d{3}\.\dM parameters; Offload trains 0\.1M, peak .* GiB",
                        offload)  # fmt: skip
    assert all("MFU" in row[3] and row[4] == "it runs" for row in rows if row[0] == "speed")
    text = page.read_text()
    assert "**This page measures nothing about GPUs.**" in text and "No GPU used." in text
    assert not list((ROOT / "runs").glob("gpu-check-*"))  # nothing is left


def trains(process: psutil.Process) -> bool:
    try:
        return "--probe" in process.cmdline()
    except psutil.Error:  # it has just ended
        return False


@pytest.mark.slow
def test_ctrl_c_leaves_nothing_running(tmp_path):
    words = [*GPU_CHECK, "--dry_run", "--parts", "scripts", "--output", str(tmp_path / "page.md")]
    check = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    deadline, family = time.monotonic() + 60, []
    while not family and time.monotonic() < deadline:
        time.sleep(0.1)
        family = [child for child in psutil.Process(check.pid).children(recursive=True) if trains(child)]
    assert family
    check.send_signal(signal.SIGINT)
    _, errors = check.communicate(timeout=30)
    assert check.returncode == 130 and "Traceback" not in errors
    assert not any(member.is_running() for member in family) and not (tmp_path / "page.md").exists()


@pytest.mark.drill
@pytest.mark.timeout(900)  # the op may be compiled here
def test_rehearsal_of_nvme(tmp_path):
    require_nvme()
    done = run([*GPU_CHECK, "--dry_run", "--parts", "nvme", "--output", str(tmp_path / "page.md")], timeout=800)
    assert done.returncode == 0, done.stdout + done.stderr
    row = r"ok      nvme      DeepSpeed-GPTLike-ZeRO-Offload.py: .*parameters on nvme 0\.\d\d\d GiB"
    assert re.search(row, done.stdout) and "optimizer_states on nvme 0." in done.stdout


def test_the_docs_say_what_the_check_does():
    text = (ROOT / "docs" / "gpu.md").read_text(encoding="utf-8")
    assert "not measured" in text
    for figure in (*gpu.TOLERANCE.values(), *(f"{bar:.0%}".replace("%", " %") for bar in gpu.BARS.values())):
        assert str(figure) in text, figure
    assert all(f"| `{part}` |" in text for part in gpu.PARTS)
    runs = 1 + 6 + 2 + 2 + 1 + len(gpu.gpu_plan(1, int(80e9), int(200e9)).speed)  # CPU, bf16, fp32, offload, nvme
    assert f"{runs} runs" in text and f"{gpu.TIMEOUT // 60} minutes" in text
    assert f"{runs * gpu.TIMEOUT // 3600} hours" in text
