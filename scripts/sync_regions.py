"""Keep the code that the training scripts share the same, byte for byte.

No script imports another. What they share verbatim stands in marked regions, owned by the script in which a
reader who follows the teaching order first meets it; owner and copies carry the same bytes, markers included:

    # region model (owner: GPTLike-Base.py)
    ...
    # endregion model

    python scripts/sync_regions.py                      check; exit 0: all equal, 1: stale, 2: malformed
    python scripts/sync_regions.py --write              bring stale copies up to date with their owner
    python scripts/sync_regions.py --from FILE REGION   promote an edit made in FILE to owner and copies
    python scripts/sync_regions.py --list               print a table of the regions
"""

import argparse
import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from difflib import unified_diff
from pathlib import Path
from typing import NamedTuple

SCRIPTS = (  # in teaching order
    "GPTLike-Base.py",
    "DeepSpeed-GPTLike-ZeRO-1.py",
    "DeepSpeed-GPTLike-ZeRO-2.py",
    "DeepSpeed-GPTLike-ZeRO-3.py",
    "DeepSpeed-GPTLike-ZeRO-Offload.py",
    "DeepSpeed-GPTLike-Multihosts.py",
)
# Far looser than the syntax: a marker with a slip in it must be reported, not taken for a plain comment.
MARKER = re.compile(r"\s*#+\s*(end[ _-]?)?region(?![\w-])\s*(\S*)(?: \(owner: (\S+)\))?", re.IGNORECASE)
NAME = re.compile(r"[a-z][a-z0-9-]*")
SYNTAX = "bad marker, want a line '# region NAME (owner: FILE)' or '# endregion NAME', not indented"


class Region(NamedTuple):
    script: str
    line: int  # of its first marker, from 1
    name: str
    owner: str
    text: bytes  # markers included


Groups = dict[str, list[Region]]  # by name, each in teaching order: an owner comes before its copies
Problem = tuple[Region, str]
Edit = tuple[Region, Region]  # (source, target): the target is to become equal to the source


def scan(script: str, data: bytes) -> tuple[dict[str, Region], list[Problem]]:
    """The regions of one script by name, and the problems with its markers."""
    lines = data.splitlines(keepends=True)
    regions: dict[str, Region] = {}
    opened: dict[str, Region] = {}
    problems: list[Problem] = []
    for number, raw in enumerate(lines, start=1):
        line = raw.decode("utf-8", "backslashreplace")
        if not (match := MARKER.match(line)):
            continue
        closing, name, owner = match.groups()
        here = Region(script, number, name, owner, b"")
        wanted = f"# endregion {name}" if closing else f"# region {name} (owner: {owner})"
        sound = line in (f"{wanted}\n", f"{wanted}\r\n")
        if not sound:
            problems.append((here, SYNTAX))
        if closing and name in opened:
            first = opened.pop(name)
            regions[name] = first._replace(text=b"".join(lines[first.line - 1 : number]))
        elif closing:
            # Where the opening marker has been reported, its endregion is no second problem.
            if all(name != other.name for other, _ in problems):
                problems.append((here, f"endregion {name} without region {name}"))
        elif sound:
            if not NAME.fullmatch(name):
                problems.append((here, f"region name {name!r} does not match {NAME.pattern}"))
            if opened:
                problems.append((here, f"region {name} is nested in region {list(opened)[-1]}"))
            if earlier := regions.get(name) or opened.get(name):
                problems.append((here, f"duplicate region {name}, first at line {earlier.line}"))
            opened[name] = here
    problems += [(region, f"region {name} is not closed") for name, region in opened.items()]
    return regions, problems


def check_owner(group: list[Region], scripts: dict[str, bytes]) -> Iterator[Problem]:
    """The problems with the owner that the markers of one region name."""
    first = group[0]
    for region in group:
        if region.owner != first.owner:
            yield region, f"owner {region.owner} differs from {first.owner} at {first.script}:{first.line}"
        elif region.owner not in scripts:
            yield region, f"owner {region.owner} is not among the scripts"
        elif all(region.owner != other.script for other in group):
            yield region, f"owner {region.owner} has no region {region.name}"
        elif region.owner != first.script:
            yield region, f"owner {region.owner} is not the first script with it, {first.script} is"


def survey(scripts: dict[str, bytes]) -> tuple[Groups, list[Problem]]:
    """All regions, and all problems in order of their place."""
    groups: Groups = {}
    problems: list[Problem] = []
    for script, data in scripts.items():
        regions, found = scan(script, data)
        problems += found
        for name, region in regions.items():
            groups.setdefault(name, []).append(region)
    # Where a marker has been reported, "owner has no region" might only say the same again.
    for name in groups.keys() - {region.name for region, _ in problems}:
        problems += check_owner(groups[name], scripts)
    return groups, sorted(problems, key=lambda problem: (SCRIPTS.index(problem[0].script), problem[0].line))


def diff(*pair: Region) -> str:
    """A unified diff from owner to copy; carriage returns, which may be all that differs, show as \\r."""
    texts = (region.text.decode("utf-8", "backslashreplace").replace("\r", "\\r") for region in pair)
    names = (f"{region.script}:{region.line}" for region in pair)
    return "\n".join(unified_diff(*(text.split("\n")[:-1] for text in texts), *names, lineterm=""))


def table(groups: Groups) -> str:
    """A heading and a row per region; its lines include the markers."""
    rows = [("REGION", "OWNER", "LINES", "COPIES")]
    for name, (owner, *copies) in groups.items():
        names = ", ".join(copy.script for copy in copies) or "-"
        rows.append((name, owner.script, str(owner.text.count(b"\n")), names))
    return "\n".join("{:20}  {:33}  {:>5}  {}".format(*row) for row in rows)


def apply(edits: list[Edit], path: Path, data: bytes) -> None:
    """Nothing; path, which held data, is replaced in one step and keeps its mode."""
    for source, target in edits:
        # One place only: a second one would repeat the markers, and nothing is written where regions repeat.
        data = data.replace(target.text, source.text)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.write_bytes(data)
        shutil.copymode(path, temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def build_parser() -> argparse.ArgumentParser:
    """The parser of the command line."""
    root = Path(__file__).resolve().parent.parent
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--root", type=Path, default=root, metavar="DIR", help="default: %(default)s")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--write", action="store_true", help="bring stale copies up to date")
    action.add_argument("--from", nargs=2, dest="source", metavar=("FILE", "REGION"), help="promote an edit")
    action.add_argument("--list", action="store_true", help="print a table of the regions")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """The exit status: 0 all equal or written, 1 stale copies, 2 malformed regions."""
    parser = build_parser()
    args = parser.parse_args(argv)
    scripts = {name: (args.root / name).read_bytes() for name in SCRIPTS if os.path.isfile(args.root / name)}
    if not scripts:
        parser.error(f"none of the scripts is in {args.root}")
    groups, problems = survey(scripts)
    if problems:
        print(*(f"{at.script}:{at.line}: {text}" for at, text in problems), sep="\n", file=sys.stderr)
        return 2
    if args.list:
        print(table(groups))
        return 0
    sources = [group[0] for group in groups.values()]
    if args.source:
        file, name = args.source
        sources = [region for region in groups.get(name, []) if region.script == file]
        if not sources:
            parser.error(f"no region {name} in {file}" if file in scripts else f"no script {file}")
    edits = [(source, to) for source in sources for to in groups[source.name] if to.text != source.text]
    if args.write or args.source:
        for script in dict.fromkeys(to.script for _, to in edits):
            apply([edit for edit in edits if edit[1].script == script], args.root / script, scripts[script])
        changes = [f"{to.script}: {to.name} from {source.script}" for source, to in edits]
        print(*changes or ["nothing to change"], sep="\n")
    elif edits:
        print(*(diff(owner, copy) for owner, copy in edits), sep="\n")
        print(f"{len(edits)} stale: run with --write (owner to copies) or --from FILE REGION (FILE to all)")
        return 1
    else:
        print(f"{len(scripts)} scripts, {len(groups)} regions, all copies equal their owner")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
