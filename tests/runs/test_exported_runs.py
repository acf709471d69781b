"""scripts/tools/export_hf.py and generate.py on runs: model/ of Base, and a step of ZeRO-3 on two ranks."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.drill
ROOT = Path(__file__).resolve().parents[2]
TOOLS = ROOT / "scripts" / "tools"
TINY = """--dataset sample --tokenizer bpe:300 --n_layer 1 --n_head 2 --d_model 32 --block_size 32 --max_steps 3
    --eval_interval 2 --save_interval 2""".split()
EXPORTED = re.compile(
    r"exported (\S+) to (\S+); reloaded, its logits differ by (\S+) at most; "
    r"its validation loss is (\d\.\d{6}), the run's (\d\.\d{6})\n"
)


def run(*words: object) -> subprocess.CompletedProcess:
    """The command's end, which has to be a good one."""
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")}
    command = [sys.executable, *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, cwd=ROOT, env=env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def export(source: Path, target: Path, *flags: str) -> tuple[subprocess.CompletedProcess, list[float]]:
    """Also the largest difference of logits, the export's loss and the run's."""
    done = run(TOOLS / "export_hf.py", source, target, *flags)
    match = EXPORTED.fullmatch(done.stdout)
    assert match and match[2] == str(target), done.stdout
    return done, [float(number) for number in match.groups()[2:]]


def test_base_is_exported_and_continues_a_prompt(tmp_path):
    run(ROOT / "GPTLike-Base.py", *TINY, "--precision", "fp32", "--output_dir", tmp_path / "run")
    _, (difference, found, wanted) = export(tmp_path / "run", tmp_path / "gpt2")
    best = json.loads((tmp_path / "run" / "summary.json").read_text())["best"]["validation_loss"]
    assert difference < 1e-4 and abs(found - best) < 1e-4 and abs(wanted - best) < 1e-6
    text = run(TOOLS / "generate.py", tmp_path / "gpt2", "--prompt", "The first", "--max_new_tokens", 9).stdout
    assert text.startswith("The first") and len(text.strip()) > len("The first")


def test_a_step_of_zero_3_is_put_together_from_its_shards(tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", 2, "--master_port", port]
    run(*launch, ROOT / "DeepSpeed-GPTLike-ZeRO-3.py", *TINY, "--output_dir", tmp_path / "run")
    losses = {}
    for line in map(json.loads, (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()):
        losses |= {line["step"]: line["validation_loss"]} if "validation_loss" in line else {}
    step = tmp_path / "run" / "checkpoints" / "step2"
    done, (difference, found, wanted) = export(step, tmp_path / "gpt2", "--dtype", "fp32")
    assert "can run any code: only for runs of your own" in done.stderr
    assert difference < 1e-4 and abs(found - losses[2]) < 1e-3 and abs(wanted - losses[2]) < 1e-6
    parameters = json.loads((tmp_path / "run" / "args.json").read_text())["n_params"]
    assert (tmp_path / "gpt2" / "model.safetensors").stat().st_size > 4 * parameters  # fp32, of a run in bf16

    next(step.glob("*_rank_1_*optim_states.pt")).unlink()
    command = [sys.executable, TOOLS / "export_hf.py", step, tmp_path / "other"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert done.returncode == 1 and not (tmp_path / "other").exists()
    assert f"export_hf.py: error: cannot read {step}: " in done.stderr
    assert done.stderr.endswith("Are all ranks' files on this host?\n")
