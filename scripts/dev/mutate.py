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

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tools"))
from common import ROOT, SCRIPTS, table

BASE, ZERO1, _, ZERO3, _, MULTIHOSTS = SCRIPTS
LEFT_OUT = {".git", ".venv", ".pytest_cache", ".ruff_cache", "__pycache__"}
MUTANTS = {  # file and the tests that must fail ("regions": the check of the shared regions): name: (text, instead)
    (BASE, "unit/test_model.py"): {
        "attention sees later tokens": ("is_causal=True", "is_causal=False"),
        "head is not tied": ("        self.head.weight = self.token_embedding.weight", "        pass"),
        "residual layers start as all others": ('getattr(module, "std", 0.02)', "0.02"),
        "decay on norms": (' and "norm" not in name', ""),
        "decay on biases": ('{"params": rest, "weight_decay": 0.0}', '{"params": rest}'),
        "cosine goes down to nothing": ("0.55 + 0.45 *", "0.5 + 0.5 *"),
    },
    (BASE, "unit/test_data.py"): {
        "targets are not shifted": ("blocks[:, :-1], blocks[:, 1:]", "blocks[:, 1:], blocks[:, 1:]"),
        "data order by rank": ("(step * args.world_size + args.rank) * per_rank", "(step + args.rank) * per_rank"),
        "each epoch in the same order": ("seed * 1_000_003 + epoch", "seed"),
        "byte-order mark is a token": ("utf-8-sig", "utf-8"),
        "rows without line break run together": ('text + " \\n" for', "text for"),
    },
    (BASE, "unit/test_metrics.py"): {
        "dropout in validation": ("    model.eval()\n", ""),
        "padding counts as tokens": ("value=-100", "value=0"),
        "perplexity per word by tokens": ("nats / len(text.split())", "nats / len(stream)"),
        "ledger forgets to divide by N": ("args.zero_stage >= stage", "args.zero_stage > stage"),
        "ledger counts a tensor twice": ("                counted.add(memory.data_ptr())\n", ""),
        "NaN goes on": ("not math.isfinite(mean + grad_norm)", "False"),
    },
    ("scripts/tools/common.py", "unit/test_compare_runs.py"): {
        "MFU in fp32": (' or args["precision"] == "fp32"', ""),
    },
    (ZERO1, "unit/test_configs.py"): {
        "flags of batch are ignored": ("args.batch_size or config.get(micro", "config.get(micro"),
        "--precision is ignored": ("            if args.precision or section", "            if section"),
        '"auto" stays': ("        replace_auto(config, ADAMW | AUTO", "        dict(ADAMW | AUTO"),
    },
    (ZERO1, "unit/test_bad_input.py"): {
        "unknown key passes": ("config.keys() - TOP_LEVEL_KEYS", "()"),
        "JSON of another stage passes": ("    if right != ZERO_STAGE:", "    if False:"),
    },
    (ZERO1, "unit/test_checkpoints.py"): {
        "mark before the others' shards": ("    gather(None)  # from here on the shards of all ranks are there\n", ""),
        "newest step though a rank lacks it": (".intersection(*(theirs for _, theirs, _ in found))", ""),
        "each host's own latest tag": ("tag=tag)", "tag=None)"),
        "resumes with other settings": ('        check_settings(mark["settings"], args)', "        pass"),
        "deletes all but one step": ("[:-2]:", "[:-1]:"),
    },
    (ZERO3, "unit/test_checkpoints.py"): {
        "zero.Init left out": ("with deepspeed.zero.Init(config_dict_or_path=ds_config):", "if True:"),
    },
    (MULTIHOSTS, "regions"): {
        "one byte of a region": ("# a multiple of 64: faster matmuls", "# a multiple of 64: fast matmuls"),
    },
    (BASE, "runs/test_scripts.py::test_accumulation_of_base"): {
        "accumulated losses are not divided": (" / args.gradient_accumulation_steps", ""),
    },
}


def copy_of(file: str, text: str, instead: str, folder: Path) -> Path:
    """A copy of the project with the one change. Raises ValueError where the text does not stand there exactly once."""
    copy = folder / "project"
    left_out = {ROOT: LEFT_OUT | {"runs"}}  # tests/runs is needed
    shutil.copytree(ROOT, copy, ignore=lambda place, names: left_out.get(Path(place), LEFT_OUT) & {*names})
    (copy / ".venv").symlink_to(ROOT / ".venv")
    before = (copy / file).read_text(encoding="utf-8")
    if before.count(text) != 1:
        raise ValueError(f"{file} has {text!r} {before.count(text)} times")
    (copy / file).write_text(before.replace(text, instead), encoding="utf-8")
    return copy


def caught_by(tests: str, copy: Path) -> str:
    """The first test that fails, or "" where the mutant survives."""
    if tests == "regions":
        done = subprocess.run([sys.executable, "scripts/dev/sync_regions.py"], cwd=copy, capture_output=True)
        return "scripts/dev/sync_regions.py" if done.returncode else ""
    words = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", f"tests/{tests}"]
    done = subprocess.run(words, cwd=copy, capture_output=True, text=True)
    if done.returncode > 1:
        raise ValueError(f"pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    failed = [line for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    return failed[0].split(" ")[1] if failed else ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("names", metavar="NAME", nargs="*", help="mutants whose names hold this; left out: all")
    wanted = parser.parse_args().names or [""]
    flat = [(*place, name, *change) for place, changes in MUTANTS.items() for name, change in changes.items()]
    rows, start = [], time.perf_counter()
    for file, tests, name, text, instead in flat:
        if not any(word in name for word in wanted):
            continue
        try:
            with tempfile.TemporaryDirectory(prefix="mutant.") as folder:
                found = caught_by(tests, copy_of(file, text, instead, Path(folder)))
        except ValueError as error:
            print(f"{name}: {error}", file=sys.stderr)
            return 2
        rows.append((name, file, found or "SURVIVED"))
        print(*rows[-1], sep=", ", file=sys.stderr)
    print(table(("mutant", "in", "caught by"), rows))
    survived = sum(caught == "SURVIVED" for _, _, caught in rows)
    print(f"{len(rows) - survived} of {len(rows)} caught, {time.perf_counter() - start:.0f} s")
    return 1 if survived else 0


if __name__ == "__main__":
    sys.exit(main())
