"""README.zh-CN.md says what README.md says: equal blocks, tables, figures, code spans and links, place by place."""

import re
from itertools import zip_longest
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
ENGLISH, CHINESE = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "README.zh-CN.md"))
LINES = {"English | [简体中文](README.zh-CN.md)": ENGLISH, "[English](README.md) | 简体中文": CHINESE}
FIGURE = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}|([0-9]+(?:[.,][0-9]+)*(?:e[+-]?[0-9]+)?)(?:\s*(million|万|亿))?")
UNITS = {"million": 10**6, "万": 10**4, "亿": 10**8}
SPAN = re.compile(r"`([^`]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def parse(text: str) -> list[tuple[str, str]]:
    """(kind, text) of all headings, fenced blocks, tables and stretches of prose between them, in order."""
    parts: list[tuple[str, str]] = []
    fenced = False
    for line in text.splitlines(keepends=True):
        if line.startswith("```"):
            kind, new, fenced = "block", not fenced, not fenced
        elif fenced:
            kind, new = "block", False
        elif line in (f"{language}\n" for language in LINES):
            continue
        else:
            kind = "heading" if re.match("#+ ", line) else "table" if line.startswith("|") else "prose"
            new = kind == "heading" or not parts or parts[-1][0] != kind
        if new:
            parts.append((kind, line))
        else:
            parts[-1] = (kind, parts[-1][1] + line)
    return [(kind, part) for kind, part in parts if part.strip()]


def anchors(text: str) -> list[str]:
    """GitHub's: lower case, punctuation dropped, a hyphen for each space."""
    headings = [part.lstrip("#").strip().lower() for kind, part in parse(text) if kind == "heading"]
    return [re.sub(r"[^\w\- ]", "", heading).replace(" ", "-") for heading in headings]


def figures(text: str) -> list[str]:
    """All numbers and dates, link targets left out; 5 million, 500 万 and 5,000,000 are one figure."""
    found = []
    for match in FIGURE.finditer(LINK.sub("]", text)):
        scaled = match[2] and f"{round(float(match[1].replace(',', '')) * UNITS[match[2]]):,}"
        found.append(scaled or match[0].strip())
    return sorted(found)


def links(text: str, known: list[str]) -> list[str]:
    """Link targets; one to a heading of the same page becomes the heading's number."""
    found = LINK.findall(text)
    places = {f"#{anchor}": f"heading {number}" for number, anchor in enumerate(known)}
    return sorted(places.get(target, f"no heading {target}" if target[0] == "#" else target) for target in found)


def facts(kind: str, part: str, known: list[str]) -> list[object]:
    """What two languages have in common."""
    if kind == "block":
        return [part]
    if kind == "table":
        rows = [line.strip().strip("|").split("|") for line in part.splitlines()]
        return [[facts("cell", cell, known) for cell in row] for row in rows]
    shape: object = len(re.split(r"\n\s*\n", part.strip())), len(re.findall(r"^- ", part, re.MULTILINE))
    shape = part[: part.index(" ")] if kind == "heading" else None if kind == "cell" else shape
    spans = sorted(" ".join(span.split()) for span in SPAN.findall(part))
    rule = re.fullmatch(r":?-+:?", part.strip()) and part.strip()
    return [shape, rule, spans, figures(part), links(part, known)]


def differences(english: str, chinese: str) -> list[str]:
    found, heading = [], ""
    names = anchors(english), anchors(chinese)
    for ours, theirs in zip_longest(parse(english), parse(chinese), fillvalue=("nothing", "")):
        heading = ours[1].strip() if ours[0] == "heading" else heading
        if ours[0] != theirs[0]:
            return [*found, f"{heading}: {ours[0]} in English, {theirs[0]} in Chinese:\n{ours[1]}\n{theirs[1]}"]
        pair = facts(*ours, names[0]), facts(*theirs, names[1])
        if pair[0] != pair[1]:
            rows = [f"{a}\n{b}" for a, b in zip_longest(*pair) if a != b]
            found.append(f"{heading}: not the same {ours[0]}:\n" + "\n".join(rows))
    return found


def test_both_say_the_same():
    found = differences(ENGLISH, CHINESE)
    assert not found, "\n\n".join(found)


def test_both_begin_with_the_language_line():
    for line, text in LINES.items():
        assert text.splitlines()[1:4] == ["", line, ""]
        assert text.count(line) == 1
    assert len(set(anchors(CHINESE))) == len(anchors(CHINESE))


def test_links_of_both_lead_somewhere():
    for text in LINES.values():
        for target in LINK.findall(text):
            if not target.startswith(("https://", "#")):
                assert (ROOT / target.partition("#")[0]).is_file(), target
        assert all(target[1:] in anchors(text) for target in LINK.findall(text) if target[0] == "#")


def test_the_chinese_is_chinese():
    """No paragraph was left in English, and Chinese words are followed by Chinese punctuation."""
    for kind, part in parse(CHINESE):
        if kind == "prose":
            for paragraph in re.split(r"\n\s*\n", part.strip()):
                assert re.search(r"[\u4e00-\u9fff]", paragraph), paragraph
    assert not re.search(r"[\u4e00-\u9fff] *[,;:?!](?= |$)", "".join(p for k, p in parse(CHINESE) if k != "block"))
    assert "—" not in CHINESE


def change(kind: str, pattern: str, new: str, number: int = 0) -> str:
    """README.zh-CN.md with one replacement in its part of this kind and number, among those that the pattern fits."""
    part = [part for found, part in parse(CHINESE) if found == kind and re.search(pattern, part)][number]
    return CHINESE.replace(part, re.sub(pattern, new, part, count=1), 1)


@pytest.mark.parametrize(
    ("kind", "pattern", "new"),
    [("block", r"```bash\n", "```sh\n"), ("block", r"[0-9](?=[0-9])", "x"), ("block", r" +", "\t"),
     ("block", r"(?s).+", ""), ("table", r"(?m)^\|[^|]*`.*\n", ""), ("table", r"[0-9]\.[0-9]", "7.77"),
     ("table", r"[0-9]{3},[0-9]{3}", "111,111"), ("table", r"`--\w+`", "`--none`"), ("table", r"`[^`]+`", "none"),
     ("table", r"(?m)\|[^|\n]*\|$", "|"), ("table", r"--:", "---"), ("prose", r"[0-9]{4}-[0-9]{2}-", "1999-12-"),
     ("prose", r"[0-9]\.[0-9]+\.[0-9]", "9.9.9"), ("prose", r",[0-9]{3},", ",111,"), ("prose", r"[0-9] 万", "1 万"),
     ("prose", r"[0-9]e-[0-9]+", "3e-01"), ("prose", r"`--\w+`", "`--none`"), ("prose", r"(?m)^- .*\n", ""),
     ("prose", r"\]\(#[^)]+", "](#none"), ("prose", r"\]\(#1-", "](#2-"), ("prose", r"\]\(docs", "](doc"),
     ("prose", r"(?<=\S)\n\n(?=\S)", "\n"), ("heading", r"^## ", "### "), ("heading", r"(?s).+", ""),
     ("heading", r"1\.", "2.")],
)  # fmt: skip
@pytest.mark.parametrize("number", [0, -1])
def test_a_difference_would_be_found(kind, pattern, new, number):
    changed = change(kind, pattern, new, number)
    assert changed != CHINESE and differences(ENGLISH, changed)


def test_a_missed_update_would_be_found():
    """A digit of README.md that changes there alone shows, wherever it stands; here one in fifty is tried."""
    for match in list(re.finditer("[0-9]", ENGLISH))[::50]:
        changed = f"{ENGLISH[: match.start()]}{(int(match[0]) + 1) % 10}{ENGLISH[match.end() :]}"
        assert differences(changed, CHINESE), ENGLISH[match.start() - 40 : match.end() + 40]
