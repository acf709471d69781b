"""The README's pictures show the data that lie beside them, and can be drawn again."""

import html
import json
import re
import sys

from conftest import ROOT

sys.path.insert(0, str(ROOT / "scripts" / "dev"))
import pictures


def shown(path):
    """The data in an SVG's metadata."""
    return json.loads(html.unescape(re.search("<dc:description>(.*?)</dc:description>", path.read_text(), re.S)[1]))


def test_they_are_drawn_again_with_the_same_data(tmp_path):
    pictures.draw_all(tmp_path)
    names = sorted(path.name for path in pictures.FOLDER.glob("*.svg"))
    assert names == sorted(path.name for path in tmp_path.glob("*.svg")) and len(names) == 4
    for name in names:
        assert shown(pictures.FOLDER / name) == shown(tmp_path / name)


def test_what_they_say():
    """16P, 10P, 9P, 8P, and Offload 3P on the GPU with 6P on the host; the six curves lie on each other."""
    totals = {name: sum(kinds.values()) for name, kinds in shown(pictures.FOLDER / "stages-light.svg").items()}
    assert totals == {"Base": 16, "ZeRO-1": 10, "ZeRO-2": 9, "ZeRO-3": 8, "Offload, GPU": 3, "Offload, host": 6}
    curves = shown(pictures.FOLDER / "losses-dark.svg")
    base = curves.pop("Base")
    assert len(curves) == 5 and len(base) == 100 and base["100"] < base["1"] - 1
    assert max(abs(curve[step] - base[step]) for curve in curves.values() for step in base) < 1e-5
