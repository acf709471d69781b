"""Break one thing at a time in a copy of the project, and see that the quick tests catch it.

Each mutant of tests/mutants.py replaces one piece of text in one file and names the tests that must fail; without it
they must pass. A mutant that survives is a test that is missing.

Run: python scripts/dev/mutate.py [NAME...]     exit 0: all caught; 1: one survived; 2: broken tests
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.extend(str(Path(__file__).resolve().parents[2] / folder) for folder in ("scripts/tools", "tests"))
from common import ROOT, table
from mutants import MUTANTS

LEFT_OUT = {".git", ".venv", ".pytest_cache", ".ruff_cache", "__pycache__"}


def copy_of(file: str, text: str, instead: str, folder: Path) -> Path:
    """A copy of the project with the one change."""
    copy = folder / "project"
    left_out = {ROOT: LEFT_OUT | {"runs"}}  # tests/runs is needed
    shutil.copytree(ROOT, copy, ignore=lambda place, names: left_out.get(Path(place), LEFT_OUT) & {*names})
    (copy / ".venv").symlink_to(ROOT / ".venv")
    before = (copy / file).read_text(encoding="utf-8")
    (copy / file).write_text(before.replace(text, instead), encoding="utf-8")
    return copy


def caught_by(tests: str, copy: Path) -> str:
    """The first test that fails, or "" where none does. Raises ValueError where pytest cannot run them."""
    words = [sys.executable, "-m", "pytest", "-x", "-q", "--no-header", f"tests/{tests}"]
    done = subprocess.run(words, cwd=copy, capture_output=True, text=True)
    if done.returncode > 1:
        raise ValueError(f"pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    failed = [line.split(" ")[1] for line in done.stdout.splitlines() if line.startswith("FAILED ")]
    return [*failed, "an error"][0] if done.returncode else ""


def check(mutants: list[tuple[str, ...]]) -> list[tuple[str, str, str]]:
    """Each mutant's name, file, and what has caught it. Raises ValueError where tests fail without a mutant."""
    for tests in {mutant[1] for mutant in mutants}:
        if found := caught_by(tests, ROOT):
            raise ValueError(f"{found} fails without any mutant")
    rows = []
    for file, tests, name, text, instead in mutants:
        with tempfile.TemporaryDirectory(prefix="mutant.") as folder:
            found = caught_by(tests, copy_of(file, text, instead, Path(folder)))
        rows.append((name, file, found or "SURVIVED"))
        print(*rows[-1], sep=", ", file=sys.stderr)
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("names", metavar="NAME", nargs="*", help="mutants whose names hold this; left out: all")
    words, start = parser.parse_args().names or [""], time.perf_counter()
    every = [(*place, name, *change) for place, changes in MUTANTS.items() for name, change in changes.items()]
    try:
        rows = check([mutant for mutant in every if any(word in mutant[2] for word in words)])
    except ValueError as error:
        parser.exit(2, f"{error}\n")
    print(table(("mutant", "in", "caught by"), rows))
    caught = sum(found != "SURVIVED" for _, _, found in rows)
    print(f"{caught} of {len(rows)} caught, {time.perf_counter() - start:.0f} s")
    return 0 if 0 < caught == len(rows) else 1


if __name__ == "__main__":
    sys.exit(main())
