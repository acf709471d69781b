"""Break one thing at a time in a copy of the project, and see that the quick tests catch it.

Each mutant replaces one piece of text in one file and names the tests that must fail. A mutant that survives is a test
that is missing.

Run: python scripts/dev/mutate.py [NAME...]     exit 0: all caught; 1: one survived; 2: a mutant does not fit the text
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts" / "tools"))
from common import table  # noqa: E402

BASE, ZERO1, ZERO3 = "GPTLike-Base.py", "DeepSpeed-GPTLike-ZeRO-1.py", "DeepSpeed-GPTLike-ZeRO-3.py"
MULTIHOSTS = "DeepSpeed-GPTLike-Multihosts.py"
LEFT_OUT = {".git", ".venv", ".pytest_cache", ".ruff_cache", "__pycache__"}


class Mutant(NamedTuple):
    name: str
    file: str
    text: str
    instead: str
    tests: str  # in tests/, or "regions" for the check of the shared regions


MUTANTS = (
    Mutant("attention sees later tokens", BASE, "is_causal=True", "is_causal=False", "unit/test_model.py"),
    Mutant(
        "targets are not shifted",
        BASE,
        "blocks[:, :-1], blocks[:, 1:]",
        "blocks[:, 1:], blocks[:, 1:]",
        "unit/test_data.py",
    ),
    Mutant(
        "head is not tied",
        BASE,
        "        self.head.weight = self.token_embedding.weight",
        "        pass",
        "unit/test_model.py",
    ),
    Mutant("residual layers start as all others", BASE, 'getattr(module, "std", 0.02)', "0.02", "unit/test_model.py"),
    Mutant("decay on norms", BASE, ' and "norm" not in name', "", "unit/test_model.py"),
    Mutant("decay on biases", BASE, '{"params": rest, "weight_decay": 0.0}', '{"params": rest}', "unit/test_model.py"),
    Mutant("cosine goes down to nothing", BASE, "0.55 + 0.45 *", "0.5 + 0.5 *", "unit/test_model.py"),
    Mutant(
        "data order by rank",
        BASE,
        "(step * args.world_size + args.rank) * per_rank",
        "(step + args.rank) * per_rank",
        "unit/test_data.py",
    ),
    Mutant("each epoch in the same order", BASE, "seed * 1_000_003 + epoch", "seed", "unit/test_data.py"),
    Mutant("byte-order mark is a token", BASE, "utf-8-sig", "utf-8", "unit/test_data.py"),
    Mutant("rows without line break run together", BASE, 'text + " \\n" for', "text for", "unit/test_data.py"),
    Mutant("dropout in validation", BASE, "    model.eval()\n", "", "unit/test_metrics.py"),
    Mutant("padding counts as tokens", BASE, "value=-100", "value=0", "unit/test_metrics.py"),
    Mutant(
        "perplexity per word by tokens", BASE, "nats / len(text.split())", "nats / len(stream)", "unit/test_metrics.py"
    ),
    Mutant(
        "ledger forgets to divide by N",
        BASE,
        "args.zero_stage >= stage",
        "args.zero_stage > stage",
        "unit/test_metrics.py",
    ),
    Mutant(
        "ledger counts a tensor twice",
        BASE,
        "                counted.add(memory.data_ptr())\n",
        "",
        "unit/test_metrics.py",
    ),
    Mutant("NaN goes on", BASE, "not math.isfinite(mean + grad_norm)", "False", "unit/test_metrics.py"),
    Mutant("MFU in fp32", BASE, ' and args.precision != "fp32"', "", "unit/test_metrics.py"),
    Mutant(
        "flags of batch are ignored",
        ZERO1,
        "    config |= {name: value for name, value in batch_flags",
        "    _ = {name: value for name, value in batch_flags",
        "unit/test_configs.py",
    ),
    Mutant("--precision is ignored", ZERO1, "    if args.precision:\n", "    if False:\n", "unit/test_configs.py"),
    Mutant(
        '"auto" stays',
        ZERO1,
        "        replace_auto(config, ADAMW | AUTO",
        "        dict(ADAMW | AUTO",
        "unit/test_configs.py",
    ),
    Mutant("unknown key passes", ZERO1, "config.keys() - TOP_LEVEL_KEYS", "()", "unit/test_bad_input.py"),
    Mutant(
        "JSON of another stage passes", ZERO1, "    if right != ZERO_STAGE:", "    if False:", "unit/test_bad_input.py"
    ),
    Mutant(
        "mark before the others' shards",
        ZERO1,
        "    gather(None)  # from here on the shards of all ranks are there\n",
        "",
        "unit/test_checkpoints.py",
    ),
    Mutant(
        "newest step though a rank lacks it",
        ZERO1,
        "if all(name in theirs for _, theirs, _ in found)",
        "",
        "unit/test_checkpoints.py",
    ),
    Mutant("each host's own latest tag", ZERO1, "tag=tag)", "tag=None)", "unit/test_checkpoints.py"),
    Mutant(
        "resumes with other settings",
        ZERO1,
        '        check_settings(mark["settings"], now)',
        "        pass",
        "unit/test_checkpoints.py",
    ),
    Mutant("deletes all but one step", ZERO1, "[:-2]:", "[:-1]:", "unit/test_checkpoints.py"),
    Mutant(
        "zero.Init left out",
        ZERO3,
        "with deepspeed.zero.Init(config_dict_or_path=ds_config):",
        "if True:",
        "unit/test_checkpoints.py",
    ),
    Mutant(
        "one byte of a region",
        MULTIHOSTS,
        "# a multiple of 64: faster matmuls",
        "# a multiple of 64: fast matmuls",
        "regions",
    ),
    Mutant(
        "accumulated losses are not divided",
        BASE,
        "model(inputs, targets) / args.gradient_accumulation_steps",
        "model(inputs, targets)",
        "runs/test_scripts.py::test_accumulation_of_base",
    ),
)


def copy_of(mutant: Mutant, folder: Path) -> Path:
    """A copy of the project with the one change. Raises ValueError where the text does not stand there exactly once."""
    copy = folder / "project"
    left_out = {ROOT: LEFT_OUT | {"runs"}}  # tests/runs is needed
    shutil.copytree(ROOT, copy, ignore=lambda place, names: left_out.get(Path(place), LEFT_OUT) & {*names})
    (copy / ".venv").symlink_to(ROOT / ".venv")
    path = copy / mutant.file
    text = path.read_text(encoding="utf-8")
    if text.count(mutant.text) != 1:
        raise ValueError(f"{mutant.name}: {mutant.file} has {mutant.text!r} {text.count(mutant.text)} times")
    path.write_text(text.replace(mutant.text, mutant.instead), encoding="utf-8")
    return copy


def caught_by(mutant: Mutant) -> str:
    """The first test that fails, or "" where the mutant survives."""
    with tempfile.TemporaryDirectory(prefix="mutant.") as name:
        copy = copy_of(mutant, Path(name))
        if mutant.tests == "regions":
            done = subprocess.run([sys.executable, "scripts/dev/sync_regions.py"], cwd=copy, capture_output=True)
            return "scripts/dev/sync_regions.py" if done.returncode else ""
        words = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", f"tests/{mutant.tests}"]
        done = subprocess.run(words, cwd=copy, capture_output=True, text=True)
    if done.returncode > 1:
        raise ValueError(f"{mutant.name}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    return failed[0].split(" ")[1] if failed else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("names", metavar="NAME", nargs="*", help="mutants whose names hold this; left out: all")
    wanted = parser.parse_args().names
    rows, start = [], time.perf_counter()
    for mutant in MUTANTS:
        if wanted and not any(name in mutant.name for name in wanted):
            continue
        try:
            found = caught_by(mutant)
        except ValueError as error:
            print(error, file=sys.stderr)
            return 2
        rows.append((mutant.name, mutant.file, found or "SURVIVED"))
        print(f"{'caught' if found else 'SURVIVED':9}{mutant.name}", file=sys.stderr, flush=True)
    print(table(("mutant", "in", "caught by"), rows))
    survived = sum(row[2] == "SURVIVED" for row in rows)
    print(f"{len(rows) - survived} of {len(rows)} caught, {time.perf_counter() - start:.0f} s")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
