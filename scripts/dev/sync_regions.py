"""Keep the code that the six scripts share the same, byte for byte.

No script imports another. What they share stands in marked regions, owned by the script in which a reader who follows
the teaching order meets it first: from "# region model (owner: GPTLike-Base.py)" to the next one, or "# endregion".

    python scripts/dev/sync_regions.py           check; exit 0: all equal, 1: stale copies, 2: broken markers
    python scripts/dev/sync_regions.py --write   make stale copies equal to their owner
"""

import argparse
import difflib
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
REGION = re.compile(r"^# region (\S+) \(owner: (\S+)\)\n.*?(?=^# (?:end)?region\b)", re.MULTILINE | re.DOTALL)
MARKER = re.compile(r"^\s*#+\s*(end)?region\b.*$", re.MULTILINE | re.IGNORECASE)


def regions(path: Path) -> dict[str, re.Match]:
    """The regions of a script by name. Raises ValueError where a marker belongs to none."""
    text = path.read_text(encoding="utf-8")
    found = list(REGION.finditer(text))
    names = [match[1] for match in found]
    if len(MARKER.findall(text)) != len(found) + 1 or len(set(names)) != len(names):
        markers = [match[0] for match in MARKER.finditer(text)]
        raise ValueError(f"{path.name}: these are not regions of different names and one end: {markers}")
    return dict(zip(names, found, strict=True))


def stale_copies(scripts: dict[str, Path]) -> list[tuple[str, str, str, str]]:
    """(script, region, its text, the owner's) of each copy that differs. ValueError: a region, or its owner, lacks."""
    every = {name: regions(path) for name, path in scripts.items()}
    stale, names = [], set().union(*every.values())
    for script, found in every.items():
        own = {name for name, match in found.items() if match[2] == script}
        if found.keys() not in (own, names):  # --write would replace what lost its first line with the region before
            raise ValueError(f"{script} lacks regions: {sorted(names - found.keys())}")
        for name, match in found.items():
            owner = match[2]
            if name not in every.get(owner, {}) or every[owner][name][2] != owner:
                raise ValueError(f"{script}: region {name} names {owner} as its owner, which does not own it")
            if match[0] != every[owner][name][0]:
                stale.append((script, name, match[0], every[owner][name][0]))
    return stale


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="make stale copies equal to their owner")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder with the scripts")
    args = parser.parse_args()
    scripts = {path.name: path for path in sorted(args.root.glob("*GPTLike*.py"))}
    try:
        stale = stale_copies(scripts)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    for script, name, old, new in stale:
        diff = difflib.unified_diff(old.splitlines(True), new.splitlines(True), script, f"owner of {name}", n=1)
        print("".join(diff))
        if args.write:
            path = scripts[script]
            path.write_text(path.read_text(encoding="utf-8").replace(old, new), encoding="utf-8")
    print(f"{len(scripts)} scripts, {len(stale)} copies {'updated' if args.write else 'stale'}")
    return 1 if stale and not args.write else 0


if __name__ == "__main__":
    sys.exit(main())
