"""scripts/tools/export_hf.py and generate.py on runs: model/ of Base, and a step of ZeRO-3 on two ranks."""

import json
import re
import subprocess
from pathlib import Path

import pytest
from conftest import BASE, ZERO3, losses, run_script

pytestmark = pytest.mark.drill
EXPORT = "scripts/tools/export_hf.py"
TINY = """--dataset sample --tokenizer bpe:300 --n_layer 1 --n_head 2 --d_model 32 --block_size 32 --max_steps 3
    --eval_interval 2 --save_interval 2""".split()
EXPORTED = re.compile(
    r"exported (\S+) to (\S+); reloaded, its logits differ by (\S+) at most; "
    r"its validation loss is (\d\.\d{6}), the run's (\d\.\d{6})\n"
)


def run(script: str, *words: object, ranks: int = 1) -> subprocess.CompletedProcess:
    """The run's end, which has to be a good one."""
    done = run_script(script, *words, ranks=ranks)
    assert done.returncode == 0, done.stdout + done.stderr
    return done


def export(source: Path, target: Path, *flags: str) -> tuple[subprocess.CompletedProcess, list[float]]:
    """Also the largest difference of logits, the export's loss and the run's."""
    done = run(EXPORT, source, target, *flags)
    match = EXPORTED.fullmatch(done.stdout)
    assert match and match[2] == str(target), done.stdout
    return done, [float(number) for number in match.groups()[2:]]


def test_base_is_exported_and_continues_a_prompt(tmp_path):
    run(BASE, *TINY, "--precision", "fp32", "--output_dir", tmp_path / "run")
    _, (difference, found, wanted) = export(tmp_path / "run", tmp_path / "gpt2")
    best = json.loads((tmp_path / "run" / "summary.json").read_text())["best"]["validation_loss"]
    assert difference < 1e-4 and abs(found - best) < 1e-4 and abs(wanted - best) < 1e-6
    text = run("scripts/tools/generate.py", tmp_path / "gpt2", "--prompt", "The first", "--max_new_tokens", 9).stdout
    assert text.startswith("The first") and len(text.strip()) > len("The first")


def test_a_step_of_zero_3_is_put_together_from_its_shards(tmp_path):
    run(ZERO3, *TINY, "--output_dir", tmp_path / "run", ranks=2)
    losses_of_run = losses(tmp_path / "run", "validation_loss")
    step = tmp_path / "run" / "checkpoints" / "step2"
    done, (difference, found, wanted) = export(step, tmp_path / "gpt2", "--dtype", "fp32")
    assert "warning: DeepSpeed unpickles " in done.stderr and "can run any code" in done.stderr
    assert difference < 1e-4 and abs(found - losses_of_run[2]) < 1e-3 and abs(wanted - losses_of_run[2]) < 1e-6
    parameters = json.loads((tmp_path / "run" / "args.json").read_text())["n_params"]
    assert (tmp_path / "gpt2" / "model.safetensors").stat().st_size > 4 * parameters  # fp32, of a run in bf16

    next(step.glob("*_rank_1_*optim_states.pt")).unlink()
    done = run_script(EXPORT, step, tmp_path / "other")
    assert done.returncode == 1 and not (tmp_path / "other").exists()
    assert f"export_hf.py: error: cannot read {step}: " in done.stderr
    assert done.stderr.endswith("Are all ranks' files on this host?\n")
