"""What one training script changes in another, short enough to be read: the differences that docs/walkthrough.md has.

Run:
    python scripts/show_diffs.py DeepSpeed-GPTLike-ZeRO-2.py DeepSpeed-GPTLike-ZeRO-3.py
    python scripts/show_diffs.py GPTLike-Base.py:PlainRun.update DeepSpeed-GPTLike-ZeRO-1.py:EngineRun.update
    python scripts/show_diffs.py --write docs/walkthrough.md

The first compares whole scripts, but for docstring, imports and blank lines. A region (see scripts/sync_regions.py) is
one line, and so is a function or class that goes without a successor of that name. The second compares two definitions.
The third brings a page up to date: each ```diff block that follows a command of this script.
Exit 0: printed or written; 1: a file cannot be read, or has no such definition; 2: wrong usage.
"""

import argparse
import ast
import difflib
import re
import shlex
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
REGION = re.compile(r"# region (\S+) \(owner: \S+\)\n.*?# endregion \1\n", re.DOTALL)
QUOTED = re.compile(r"(^```bash\npython scripts/show_diffs\.py ([^\n]+)\n```\n+```diff\n)(.*?)(^```$)", re.M | re.S)


def definitions(tree: ast.Module | ast.ClassDef) -> dict[str, ast.stmt]:
    kinds = (ast.FunctionDef, ast.ClassDef)
    return {statement.name: statement for statement in tree.body if isinstance(statement, kinds)}


def without_regions(source: str) -> str:
    return REGION.sub(r"# region \1: ...\n", source)


def outline(source: str, *, successor: str | None) -> list[str]:
    """The lines of a script that it is compared by. Of what its successor no longer has, the first line."""
    tree, lines = ast.parse(source), source.splitlines()
    kept = definitions(tree if successor is None else ast.parse(successor))
    for statement in tree.body:
        first, last = statement.lineno - 1, statement.end_lineno
        is_docstring = statement is tree.body[0] and ast.get_docstring(tree) is not None
        if is_docstring or isinstance(statement, ast.Import | ast.ImportFrom):
            lines[first:last] = [""] * (last - first)
        elif getattr(statement, "name", None) in definitions(tree).keys() - kept.keys():
            lines[first:last] = [f"{lines[first]} ..."] + [""] * (last - first - 1)
    return [line for line in lines if line.strip()]


def definition(source: str, name: str) -> list[str]:
    """The lines of a function, class, or Class.method. KeyError where there is none."""
    found: ast.Module | ast.stmt = ast.parse(source)
    for part in name.split("."):
        found = definitions(found)[part]
    return [line for line in source.splitlines()[found.lineno - 1 : found.end_lineno] if line.strip()]


def read(place: str) -> tuple[str, str]:
    """The source of SCRIPT or SCRIPT:NAME, and NAME. ValueError where it is no Python."""
    script, _, name = place.partition(":")
    source = (ROOT / script).read_text(encoding="utf-8")
    try:
        ast.parse(source)
        if name:
            definition(source, name)
    except SyntaxError as error:
        raise ValueError(f"{script} is not Python: {error}") from error
    except (KeyError, AttributeError) as error:
        raise ValueError(f"{script} has no {name}") from error
    return source, name


def difference(old: str, new: str) -> str:
    """Lines that go begin with -, lines that come with +; a blank line stands for what is equal in between."""
    (before, name), (after, other) = read(old), read(new)
    if name or other:
        pair = definition(before, name), definition(after, other)
    else:
        before, after = without_regions(before), without_regions(after)
        pair = outline(before, successor=after), outline(after, successor=None)
    lines = list(difflib.unified_diff(*pair, n=0, lineterm=""))[3:]
    return "".join("\n" if line.startswith("@@") else f"{line}\n" for line in lines)


def renewed(page: str) -> str:
    """A page whose quoted differences are those of the scripts as they are."""
    return QUOTED.sub(lambda match: f"{match[1]}{difference(*shlex.split(match[2]))}{match[4]}", page)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("scripts", nargs="*", metavar="SCRIPT[:NAME]", help="old and new, or a definition in each")
    parser.add_argument("--write", type=Path, metavar="PAGE", help="bring the differences quoted there up to date")
    return parser


def main() -> None:
    parser = build_parser()
    args = parser.parse_args()
    if len(args.scripts) != (0 if args.write else 2):
        parser.error("write OLD and NEW, or --write PAGE")
    if not args.write and len({":" in place for place in args.scripts}) == 2:
        parser.error("write NAME after both scripts or after none")
    try:
        if args.write:
            page = args.write.read_text(encoding="utf-8")
            args.write.write_text(renewed(page), encoding="utf-8")
        else:
            print(difference(*args.scripts), end="")
    except (OSError, ValueError) as error:
        sys.exit(f"show_diffs.py: error: {error}")


if __name__ == "__main__":
    main()
