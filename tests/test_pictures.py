"""The start page's picture: its script measures, and draws its measurements."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

from pages import ROOT

FOLDER = ROOT / "docs" / "pictures"
_spec = importlib.util.spec_from_file_location("padding_picture", FOLDER / "padding.py")
assert _spec is not None
assert _spec.loader is not None
padding = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(padding)


def test_measures_and_draws(tmp_path: Path) -> None:
    record = padding.measure(most_extra=(0, 96), seeds=1, epochs=1, limit=128)
    assert record["levels"][0]["padding"] < record["levels"][1]["padding"]
    for level in record["levels"]:
        theirs, ours = (level["norms"][name]["var_error"][0] for name in padding.NAMES)
        assert ours < theirs
    for narrow in (False, True):
        padding.draw(record, tmp_path / "picture.svg", dark=True, narrow=narrow)
        text = (tmp_path / "picture.svg").read_text()
        assert text.rstrip().endswith("</svg>")
        width, height = map(float, re.findall(r'viewBox="0 0 (\S+) (\S+)"', text)[0])
        assert (height > width) == narrow


def test_committed_record_is_of_the_script_as_it_is() -> None:
    record = json.loads((FOLDER / "padding.json").read_text())
    assert [level["most_extra"] for level in record["levels"]] == list(padding.MOST_EXTRA)
    assert (record["seeds"], record["epochs"]) == (padding.SEEDS, padding.EPOCHS)
