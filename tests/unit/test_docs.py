"""Commands in README and docs parse with the real parsers, paths exist, and both READMEs hold the same commands."""

import contextlib
import functools
import io
import re
import runpy
import shlex
import sys
from unittest import mock

import pytest
from conftest import ROOT, load_script

PAGES = [ROOT / "README.md", ROOT / "README.zh-CN.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(?:bash|sh|shell)\n(.*?)^```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`((?:python|torchrun|deepspeed|bash) [^`]+)`")
OF_DEEPSPEED = {"--venv_script", "--include"}  # run_multihost.sh hands them on
PATH = re.compile(r"(?<![\w/.-])((?:scripts|configs|docs|examples|tests)/[\w./-]*\w)")


def commands(page) -> list[list[str]]:
    """The words of each command in a page's blocks, and in a README's sentences, without comments and redirections."""
    text, found = page.read_text(encoding="utf-8"), []
    sentences = INLINE.findall(text) if page.name.startswith("README") else []
    for block in BLOCK.findall(text) + sentences:
        for line in block.replace("\\\n", " ").splitlines():
            for part in re.split(r"\s(?:&&|\||;|&)(?:\s|$)", line.split(" #")[0]):
                if part.strip() and not part.lstrip().startswith("#"):
                    found.append(shlex.split(part.split(">")[0]))
    return found


def own_words(words: list[str]) -> list[tuple[str, list[str]]]:
    """The files of ours that the words run, a shell script and what it starts, each with its own arguments."""
    found = []
    for number, word in enumerate(words):
        if word.endswith((".py", ".sh")) and (ROOT / word.removeprefix("./")).is_file():
            found.append((word.removeprefix("./"), words[number + 1 :]))
    if len(found) > 1 and found[0][0].endswith(".sh"):
        shell, arguments = found[0]
        return [(shell, arguments[: arguments.index(found[1][0])]), found[1]]
    return found[:1]


@functools.cache
def help_of(tool: str) -> str:
    said = io.StringIO()
    with (
        contextlib.redirect_stdout(said),
        pytest.raises(SystemExit),
        mock.patch("sys.argv", [tool, "--help"]),
        mock.patch("sys.path", [str((ROOT / tool).parent), *sys.path]),
    ):
        runpy.run_path(str(ROOT / tool), run_name="__main__")
    return said.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page):
    for words in commands(page):
        for name, arguments in own_words(words) if words[0] not in ("diff", "cat", "pytest") else []:
            if "GPTLike" in name:
                load_script(name).parse_args(arguments)
                continue
            known = help_of(name) if name.endswith(".py") else (ROOT / name).read_text(encoding="utf-8")
            for flag in (word.split("=")[0] for word in arguments if word.startswith("--") and word != "--"):
                assert re.search(rf"{re.escape(flag)}\b", known) or flag in OF_DEEPSPEED, f"{name} has no {flag}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_lines_of_diffs_are_in_the_scripts(page):
    text = page.read_text(encoding="utf-8")
    scripts = [{*path.read_text(encoding="utf-8").splitlines()} for path in ROOT.glob("*GPTLike*.py")]
    differ = set.union(*scripts) - set.intersection(*scripts)
    for block in re.findall(r"^```diff\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        missing = [line for line in block.splitlines() if re.sub(r"^(\+|-|[<>] )", "", line) not in differ]
        assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    missing = {path for path in PATH.findall(page.read_text(encoding="utf-8")) if not (ROOT / path).exists()}
    assert not {path for path in missing if path != "configs/hostfile"}


def facts(page) -> tuple:
    """Commands, pages linked to, levels of headings, and the figures of the prose."""
    text = page.read_text(encoding="utf-8")
    links = sorted(link.split("#")[0].replace(".zh-CN", "") for link in re.findall(r"\]\(([^)]+)\)", text))
    prose = re.sub(r"```.*?```|\]\([^)]+\)", "", text, flags=re.DOTALL)
    figures = sorted(re.findall(r"(?<![\w.])\d[\d,.]*\d(?:e-\d+)?|(?<![\w.])\d\b", prose))
    return commands(page), links, re.findall(r"^#+ ", text, re.MULTILINE), figures


def test_both_readmes_hold_the_same():
    for english, chinese in zip(*map(facts, PAGES[:2]), strict=True):
        assert english == chinese
