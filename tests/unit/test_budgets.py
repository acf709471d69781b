"""A lesson script is read in one sitting: it may not grow. Its loop stands flat in main(), with the calls in it."""

import difflib
import io
import re
import tokenize

import pytest
from conftest import BASE, MULTIHOSTS, OFFLOAD, ROOT, ZERO1, ZERO2, ZERO3

LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
BUDGETS = {  # physical lines, tokens without comments and layout
    BASE: (520, 4_800),
    ZERO1: (680, 6_000),
    ZERO2: (680, 6_000),
    ZERO3: (680, 6_000),
    OFFLOAD: (730, 6_500),
    MULTIHOSTS: (730, 6_500),
}


def code_lines(text: str) -> list[str]:
    """Lines that hold more than white space, a comment or a docstring."""
    text = re.sub(r'^\s*""".*?"""\n', "", text, flags=re.MULTILINE | re.DOTALL)
    return [line for line in text.splitlines() if line.strip() and not line.strip().startswith("#")]


def tokens_of(text: str) -> list[str]:
    """Without comments and layout. An f-string is one token, as before Python 3.12."""
    found, depth = [], 0
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        kind = tokenize.tok_name[token.type]
        if kind == "FSTRING_START" or (depth == 0 and token.type not in LAYOUT):
            found.append(token.string if depth == 0 else "")
        depth += (kind == "FSTRING_START") - (kind == "FSTRING_END")
    return [token for token in found if token]


@pytest.mark.parametrize("name", BUDGETS)
def test_lines_and_tokens(name):
    text = (ROOT / name).read_text()
    tokens, (most_lines, most_tokens) = tokens_of(text), BUDGETS[name]
    assert text.count("\n") <= most_lines and len(tokens) <= most_tokens
    assert not re.search(r"fmt: (skip|off)", text) and ";" not in tokens


@pytest.mark.parametrize(
    ("before", "after", "most"),
    [(BASE, ZERO1, 300), (ZERO1, ZERO2, 15), (ZERO2, ZERO3, 40), (ZERO3, OFFLOAD, 70), (ZERO2, MULTIHOSTS, 90)],
)
def test_neighbours_differ_by_the_lesson(before, after, most):
    lines = [code_lines((ROOT / name).read_text()) for name in (before, after)]
    changed = [line for line in difflib.unified_diff(*lines, n=0) if line[0] in "+-" and line[:3] not in ("+++", "---")]
    assert len(changed) <= most


@pytest.mark.parametrize("name", BUDGETS)
def test_the_loop_stands_in_main_with_its_calls(name):
    text = (ROOT / name).read_text()
    main = text[text.index("\ndef main()") :]
    loop = main[main.index("    for step in tqdm(") : main.index('    log(f"finished: ')]
    calls = ["model(inputs, targets)", ".backward()", "clip_grad_norm_(", "optimizer.step()"]
    if name != BASE:
        calls = ["engine(inputs, targets)", "engine.backward(", "engine.step()"]
    assert all(call in loop for call in calls)
    assert loop.count("\n") <= 60


@pytest.mark.parametrize(
    ("patterns", "most", "most_of_one"),
    [
        ("scripts/*.sh scripts/tools/*.py scripts/dev/*.py", 4000, 300),
        ("tests/*.py tests/*/*.py", 5500, 5500),
        ("docs/*.md", 1500, 1500),
        ("README.md README.zh-CN.md", 500, 250),
    ],
)
def test_what_stands_around_the_scripts(patterns, most, most_of_one):
    paths = [path for pattern in patterns.split() for path in ROOT.glob(pattern)]
    counts = [path.read_text(encoding="utf-8").count("\n") for path in paths]
    assert sum(counts) <= most and max(counts) <= most_of_one
