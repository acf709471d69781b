"""Each mutant fits the text that it breaks, and docs/testing.md names it."""

import pytest
from conftest import ROOT
from mutants import MUTANTS

ROWS = [(file, name, text) for (file, _), changes in MUTANTS.items() for name, (text, _) in changes.items()]


def test_the_page_counts_them():
    assert f"Of these {len(ROWS)} it caught " in (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(("file", "name", "text"), ROWS, ids=[name for _, name, _ in ROWS])
def test_it_stands_there_once(file, name, text):
    assert (ROOT / file).read_text(encoding="utf-8").count(text) == 1
    assert name in (ROOT / "docs" / "testing.md").read_text(encoding="utf-8")
