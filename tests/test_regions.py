"""Tests of scripts/sync_regions.py, and of the real scripts: what they share, their sizes and differences."""

import ast
import difflib
import importlib.util
import io
import os
import re
import stat
import subprocess
import sys
import tokenize
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOL = ROOT / "scripts" / "sync_regions.py"


def load_tool():
    """The tool as a module; scripts/ is no package."""
    spec = importlib.util.spec_from_file_location("sync_regions", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


sync = load_tool()
BASE, ZERO1, ZERO2, ZERO3, OFFLOAD, MULTI = sync.SCRIPTS


def region(name, body, owner=BASE):
    """The bytes of a well-formed region."""
    return f"# region {name} (owner: {owner})\n{body}# endregion {name}\n".encode()


MODEL = region("model", "class Model:\n    size = 1\n")
EDITED = region("model", "class Model:\n    size = 22\n    depth = 3\n")
DATA = region("data", "def batches():\n    return []\n", owner=ZERO1)


@pytest.fixture
def tree(tmp_path, capsys):
    """A temporary folder with `put`, `get` and `run`; run gives (exit status, stdout, stderr)."""

    def put(**files):
        for key, data in files.items():
            (tmp_path / globals()[key]).write_bytes(data)

    def get(script):
        return (tmp_path / script).read_bytes()

    def run(*args):
        try:
            code = sync.main([*args, "--root", str(tmp_path)])
        except SystemExit as stop:  # argparse leaves this way
            code = stop.code
        return code, *capsys.readouterr()

    return SimpleNamespace(put=put, get=get, run=run, path=tmp_path)


# The tool on small trees


def test_scripts_stand_in_teaching_order():
    assert sync.SCRIPTS == (
        "GPTLike-Base.py",
        "DeepSpeed-GPTLike-ZeRO-1.py",
        "DeepSpeed-GPTLike-ZeRO-2.py",
        "DeepSpeed-GPTLike-ZeRO-3.py",
        "DeepSpeed-GPTLike-ZeRO-Offload.py",
        "DeepSpeed-GPTLike-Multihosts.py",
    )


def test_clean_tree(tree):
    tree.put(BASE=b"import a\n" + MODEL, ZERO1=MODEL + b"x = 1\n" + DATA, MULTI=DATA + b"\n\n" + MODEL)
    assert tree.run() == (0, "3 scripts, 2 regions, all copies equal their owner\n", "")


def test_plain_comments_are_no_markers(tree):
    tree.put(BASE=b"# regions differ\n# region-wise sums\nx = 1  # region foo\n#regional\n# the end\n")
    assert tree.run() == (0, "1 scripts, 0 regions, all copies equal their owner\n", "")


def test_stale_copy_is_shown_as_diff_from_owner(tree):
    tree.put(BASE=b"\n" + MODEL, ZERO1=b"\n\n" + EDITED, ZERO2=MODEL)
    code, out, err = tree.run()
    assert (code, err) == (1, "")
    assert out == (
        f"--- {BASE}:2\n"
        f"+++ {ZERO1}:3\n"
        "@@ -1,4 +1,5 @@\n"
        " # region model (owner: GPTLike-Base.py)\n"
        " class Model:\n"
        "-    size = 1\n"
        "+    size = 22\n"
        "+    depth = 3\n"
        " # endregion model\n"
        "1 stale: run with --write (owner to copies) or --from FILE REGION (FILE to all)\n"
    )
    assert tree.get(ZERO1) == b"\n\n" + EDITED


def test_each_stale_copy_has_its_diff(tree):
    tree.put(BASE=MODEL, ZERO1=EDITED + DATA, ZERO3=EDITED, MULTI=DATA.replace(b"[]", b"()"))
    code, out, _ = tree.run()
    assert code == 1
    assert re.findall(r"^(?:---|\+\+\+) (.*)$", out, re.MULTILINE) == [
        *(f"{BASE}:1", f"{ZERO1}:1"),
        *(f"{BASE}:1", f"{ZERO3}:1"),
        *(f"{ZERO1}:6", f"{MULTI}:1"),
    ]
    assert out.splitlines()[-1].startswith("3 stale: ")


def test_difference_in_newlines_alone_is_stale_and_visible(tree):
    tree.put(BASE=MODEL, ZERO1=MODEL.replace(b"\n", b"\r\n"))
    code, out, _ = tree.run()
    assert code == 1
    assert "\n-class Model:\n" in out and "\n+class Model:\\r\n" in out


def test_bytes_that_are_not_utf8_are_compared_and_shown(tree):
    tree.put(BASE=MODEL.replace(b"1", b"'\xff'"), ZERO1=MODEL)
    code, out, _ = tree.run()
    assert code == 1 and "-    size = '\\xff'\n" in out
    assert tree.run("--write")[0] == 0
    assert tree.get(ZERO1) == MODEL.replace(b"1", b"'\xff'")


def test_write_repairs_and_touches_nothing_else(tree):
    base = MODEL + region("loss", "a\nb\n") + b"print()\n"
    stale = (
        b"\xef\xbb\xbf# head\r\n\x0c" + b"\n" + EDITED + b"mid\r\n" + region("loss", "") + b"tail, no newline"
    )
    tree.put(BASE=base, ZERO1=stale, ZERO2=MODEL)
    untouched = (tree.path / ZERO2).stat()
    assert tree.run("--write") == (0, f"{ZERO1}: model from {BASE}\n{ZERO1}: loss from {BASE}\n", "")
    assert tree.get(BASE) == base
    assert tree.get(ZERO1) == (
        b"\xef\xbb\xbf# head\r\n\x0c\n" + MODEL + b"mid\r\n" + region("loss", "a\nb\n") + b"tail, no newline"
    )
    after = (tree.path / ZERO2).stat()
    assert (after.st_ino, after.st_mtime_ns) == (untouched.st_ino, untouched.st_mtime_ns)
    assert tree.run() == (0, "3 scripts, 2 regions, all copies equal their owner\n", "")
    assert tree.run("--write") == (0, "nothing to change\n", "")


def test_write_keeps_carriage_returns(tree):
    owner, copy = MODEL.replace(b"\n", b"\r\n"), EDITED.replace(b"\n", b"\r\n")
    tree.put(BASE=owner, ZERO1=b"a\r\n" + copy + b"b\r\n")
    assert tree.run("--write")[0] == 0
    assert tree.get(ZERO1) == b"a\r\n" + owner + b"b\r\n"


@pytest.mark.parametrize("mode", [0o755, 0o640])
def test_write_keeps_file_mode(tree, mode):
    tree.put(BASE=MODEL, ZERO1=EDITED)
    (tree.path / ZERO1).chmod(mode)
    assert tree.run("--write")[0] == 0
    assert stat.S_IMODE((tree.path / ZERO1).stat().st_mode) == mode
    assert tree.get(ZERO1) == MODEL


def test_failed_write_leaves_old_file_and_no_litter(tree, monkeypatch):
    def fail(*_):
        raise OSError("disk on fire")

    tree.put(BASE=MODEL, ZERO1=EDITED)
    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk on fire"):
        sync.main(["--write", "--root", str(tree.path)])
    assert tree.get(ZERO1) == EDITED
    assert {path.name for path in tree.path.iterdir()} == {BASE, ZERO1}


def test_from_promotes_a_copy_to_owner_and_all_others(tree):
    stale_data = DATA.replace(b"[]", b"()")
    tree.put(BASE=b"x\n" + MODEL, ZERO1=DATA + MODEL, ZERO2=EDITED + stale_data, MULTI=MODEL + b"y\n")
    code, out, err = tree.run("--from", ZERO2, "model")
    assert (code, err) == (0, "")
    assert out == "".join(f"{script}: model from {ZERO2}\n" for script in (BASE, ZERO1, MULTI))
    assert tree.get(BASE) == b"x\n" + EDITED
    assert tree.get(ZERO1) == DATA + EDITED
    assert tree.get(ZERO2) == EDITED + stale_data  # the other region is not this command's business
    assert tree.get(MULTI) == EDITED + b"y\n"
    assert tree.run("--from", ZERO2, "model") == (0, "nothing to change\n", "")


def test_list(tree):
    tree.put(BASE=region("alone", "") + MODEL, ZERO1=MODEL + DATA, ZERO3=MODEL, MULTI=EDITED + DATA)
    code, out, err = tree.run("--list")
    assert (code, err) == (0, "")
    assert [re.split(r"\s{2,}", line.strip()) for line in out.splitlines()] == [
        ["REGION", "OWNER", "LINES", "COPIES"],
        ["alone", BASE, "2", "-"],
        ["model", BASE, "4", f"{ZERO1}, {ZERO3}, {MULTI}"],
        ["data", ZERO1, "4", MULTI],
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--from", "other.py", "model"), "no script other.py"),
        (("--from", MULTI, "model"), f"no script {MULTI}"),
        (("--from", ZERO1, "nonsense"), f"no region nonsense in {ZERO1}"),
        (("--from", ZERO1, "alone"), f"no region alone in {ZERO1}"),
        (("--from", ZERO1), "argument --from: expected 2 arguments"),
        (("--write", "--list"), "argument --list: not allowed with argument --write"),
        (("--write", "--from", ZERO1, "model"), "argument --from: not allowed with argument --write"),
        (("--nonsense",), "unrecognized arguments: --nonsense"),
    ],
)
def test_bad_usage(tree, args, message):
    tree.put(BASE=MODEL + region("alone", ""), ZERO1=EDITED)
    code, out, err = tree.run(*args)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1] == f"{err.split()[1]}: error: {message}"
    assert tree.get(BASE) == MODEL + region("alone", "") and tree.get(ZERO1) == EDITED


def test_no_scripts_at_all(tree):
    (tree.path / "other.py").write_bytes(MODEL)
    code, out, err = tree.run()
    assert (code, out) == (2, "")
    assert err.endswith(f"error: none of the scripts is in {tree.path}\n")


LOOSE = sync.SYNTAX
MALFORMED = {
    "unterminated": (
        {"BASE": b"a\n" + MODEL + b"# region loss (owner: GPTLike-Base.py)\nb\n"},
        [f"{BASE}:6: region loss is not closed"],
    ),
    "unterminated owner hides no copy": (
        {"BASE": b"# region model (owner: GPTLike-Base.py)\nb\n", "ZERO1": MODEL},
        [f"{BASE}:1: region model is not closed"],
    ),
    "endregion without region": (
        {"BASE": MODEL + b"# endregion loss\n"},
        [f"{BASE}:5: endregion loss without region loss"],
    ),
    "endregion of another name": (
        {"BASE": b"# region model (owner: GPTLike-Base.py)\n# endregion loss\n"},
        [f"{BASE}:1: region model is not closed", f"{BASE}:2: endregion loss without region loss"],
    ),
    "endregion twice": (
        {"BASE": MODEL + b"# endregion model\n"},
        [f"{BASE}:5: endregion model without region model"],
    ),
    "nested": (
        {"BASE": region("outer", "a\n" + region("inner", "b\n").decode())},
        [f"{BASE}:3: region inner is nested in region outer"],
    ),
    "overlapping": (
        {"BASE": region("outer", "# region inner (owner: GPTLike-Base.py)\n") + b"# endregion inner\n"},
        [f"{BASE}:2: region inner is nested in region outer"],
    ),
    "duplicate": (
        {"BASE": b"\n" + MODEL + MODEL},
        [f"{BASE}:6: duplicate region model, first at line 2"],
    ),
    "owner file missing": (
        {"BASE": b"", "ZERO2": MODEL.replace(b"Base", b"Bass"), "ZERO3": MODEL.replace(b"Base", b"Bass")},
        [f"{script}:1: owner GPTLike-Bass.py is not among the scripts" for script in (ZERO2, ZERO3)],
    ),
    "owner script not there yet": (
        {"ZERO1": MODEL},
        [f"{ZERO1}:1: owner {BASE} is not among the scripts"],
    ),
    "owner lacks region": (
        {"BASE": b"x = 1\n", "ZERO1": b"\n" + MODEL},
        [f"{ZERO1}:2: owner {BASE} has no region model"],
    ),
    "differing owners": (
        {"BASE": b"\n" + MODEL, "ZERO1": region("model", "", owner=ZERO1)},
        [f"{ZERO1}:1: owner {ZERO1} differs from {BASE} at {BASE}:2"],
    ),
    "owner not first in teaching order": (
        {"ZERO1": region("model", "", owner=MULTI), "MULTI": region("model", "", owner=MULTI)},
        [
            f"{script}:1: owner {MULTI} is not the first script with it, {ZERO1} is"
            for script in (ZERO1, MULTI)
        ],
    ),
    "name with capital": (
        {"BASE": region("Model", "")},
        [f"{BASE}:1: region name 'Model' does not match [a-z][a-z0-9-]*"],
    ),
    "name with underscore": (
        {"BASE": region("my_model", "")},
        [f"{BASE}:1: region name 'my_model' does not match [a-z][a-z0-9-]*"],
    ),
    "several, in order of place": (
        {
            "MULTI": b"# region\n",
            "BASE": region("Model", "") + b"\n#region foo\n",
            "ZERO1": DATA + DATA + b"# endregion a\n",
        },
        [
            f"{BASE}:1: region name 'Model' does not match [a-z][a-z0-9-]*",
            f"{BASE}:4: {LOOSE}",
            f"{ZERO1}:5: duplicate region data, first at line 1",
            f"{ZERO1}:9: endregion a without region a",
            f"{MULTI}:1: {LOOSE}",
        ],
    ),
}
SLIPS = [
    b"#region foo",
    b"# region foo",
    b"# region",
    b"# region: foo",
    b"# Region foo (owner: GPTLike-Base.py)",
    b"## region foo (owner: GPTLike-Base.py)",
    b" # region foo (owner: GPTLike-Base.py)",
    b"\t# region foo (owner: GPTLike-Base.py)",
    b"#  region foo (owner: GPTLike-Base.py)",
    b"# region  foo (owner: GPTLike-Base.py)",
    b"# region foo (owner:GPTLike-Base.py)",
    b"# region foo (Owner: GPTLike-Base.py)",
    b"# region foo (owner: GPTLike-Base.py) ",
    b"# region foo (owner: GPTLike-Base.py): the loss",
    b"# region foo bar (owner: GPTLike-Base.py)",
    b"# region foo (owner: )",
    b"# region (owner: GPTLike-Base.py)",
    b"# region of interest, in prose",
]
for slip in SLIPS:
    # The slip alone is reported: where its name can be told, its endregion is no second problem.
    close = b"# endregion foo\n" if sync.MARKER.match(slip.decode())[2] == "foo" else b""
    MALFORMED[f"slip {slip.decode()!r}"] = ({"BASE": b"\n" + slip + b"\n" + close}, [f"{BASE}:2: {LOOSE}"])
for slip in (
    b"#endregion model",
    b"# end region model",
    b"    # endregion model",
    b"# endregion model (owner: x)",
):
    MALFORMED[f"slip {slip.decode()!r}"] = (
        {"BASE": MODEL.replace(b"# endregion model", slip)},
        [f"{BASE}:4: {LOOSE}"],
    )
MALFORMED["endregion without name"] = (
    {"BASE": MODEL.replace(b"# endregion model", b"# endregion")},
    [f"{BASE}:1: region model is not closed", f"{BASE}:4: {LOOSE}"],
)
MALFORMED["endregion without newline at the end of the file"] = (
    {"BASE": MODEL[:-1]},
    [f"{BASE}:4: {LOOSE}"],
)


@pytest.mark.parametrize("args", [(), ("--write",), ("--from", OFFLOAD, "kept"), ("--list",)], ids=" ".join)
@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_is_listed_and_nothing_written(tree, case, args):
    files, problems = MALFORMED[case]
    kept = {
        "OFFLOAD": region("kept", "new\n", owner=OFFLOAD),
        "MULTI": region("kept", "old\n", owner=OFFLOAD),
    }
    files = {key: files.get(key, b"") + kept.get(key, b"") for key in {**files, **kept}}
    tree.put(**files)
    assert tree.run(*args) == (2, "", "".join(f"{problem}\n" for problem in problems))
    assert {path.name: path.read_bytes() for path in tree.path.iterdir()} == {
        globals()[key]: data for key, data in files.items()
    }


def test_command_line(tree):
    tree.put(BASE=MODEL, ZERO1=EDITED)
    command = [sys.executable, "-I", str(TOOL), "--root", str(tree.path)]
    assert subprocess.run(command, capture_output=True, check=False).returncode == 1
    assert subprocess.run([*command, "--write"], capture_output=True, check=False).returncode == 0
    assert tree.get(ZERO1) == MODEL


# The real scripts


def code_lines(path):
    """The lines of a script that hold code: no comments, no blank lines, no module docstring.

    Docstrings of functions and classes stay: they are part of what a reader compares.
    """
    source = path.read_text(encoding="utf-8")
    lines = source.split("\n")
    body = ast.parse(source).body
    if body and isinstance(body[0], ast.Expr) and isinstance(getattr(body[0].value, "value", None), str):
        for row in range(body[0].lineno, body[0].end_lineno + 1):
            lines[row - 1] = ""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    return [line.rstrip() for line in lines if line.strip()]


def differing(old, new):
    """How many lines differ; a changed line counts once, not as one removed and one added."""
    opcodes = difflib.SequenceMatcher(None, old, new, autojunk=False).get_opcodes()
    return sum(max(i2 - i1, j2 - j1) for tag, i1, i2, j1, j2 in opcodes if tag != "equal")


def test_code_lines(tmp_path):
    path = tmp_path / "script.py"
    path.write_text(
        '#!/usr/bin/env python3\n# head\n"""Module\n\n# docstring."""\n\nimport os  # why\n\n\n'
        'def f():\n    """Docstring of f."""\n    # reason\n    return "# no comment", os\n'
    )
    assert code_lines(path) == [
        "import os",
        "def f():",
        '    """Docstring of f."""',
        '    return "# no comment", os',
    ]


def test_differing():
    assert differing(["a", "b", "c"], ["a", "b", "c"]) == 0
    assert differing(["a", "b", "c"], ["a", "B", "c"]) == 1
    assert differing(["a", "b", "c"], ["a", "B", "B", "c", "d"]) == 3


PRESENT = [script for script in sync.SCRIPTS if (ROOT / script).is_file()]
GROUPS, PROBLEMS = sync.survey({script: (ROOT / script).read_bytes() for script in PRESENT})
REGIONS = [
    pytest.param(GROUPS[name], found, id=f"{found.script}-{name}")
    for name in GROUPS
    for found in GROUPS[name]
]
# Neighbours are kept close, so that a diff of two scripts shows the lesson and nothing besides.
BUDGETS = [(ZERO1, ZERO2, 25), (ZERO2, ZERO3, 70), (ZERO3, OFFLOAD, 60), (ZERO2, MULTI, 90)]
# What tells the scripts apart stays in plain sight, outside of regions.
OWN_NAMES = {"docstring", "imports", "constants", "build_engine", "build-engine", "main"}
OWN_CODE = (b"def main(", b"def build_engine(", b"import deepspeed")


def test_all_scripts_exist():
    assert tuple(PRESENT) == sync.SCRIPTS


def test_regions_of_scripts_are_well_formed():
    assert [f"{at.script}:{at.line}: {text}" for at, text in PROBLEMS] == []


@pytest.mark.parametrize(("group", "found"), REGIONS)
def test_region_equals_its_owner(group, found):
    owner = next((other for other in group if other.script == found.owner), None)
    assert owner is not None, f"{found.owner} has no region {found.name}"
    assert found.text == owner.text


@pytest.mark.parametrize(("group", "found"), REGIONS)
def test_region_holds_nothing_of_a_script_of_its_own(group, found):
    assert found.name not in OWN_NAMES
    assert [line for line in found.text.splitlines() if line.startswith(OWN_CODE)] == []


@pytest.mark.parametrize("script", PRESENT)
def test_length(script):
    """Lines of code, not blank lines and comments. A ratchet: what a script outgrows is first sought in a library."""
    assert len(code_lines(ROOT / script)) <= (904 if script == BASE else 1240)


@pytest.mark.parametrize(
    ("old", "new", "budget"), [row for row in BUDGETS if row[0] in PRESENT and row[1] in PRESENT]
)
def test_difference_between_neighbours(old, new, budget):
    assert differing(code_lines(ROOT / old), code_lines(ROOT / new)) <= budget
