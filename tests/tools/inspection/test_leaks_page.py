"""The leaks of a model as a page and as data, whatever its layers are called."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from html_checker import Checker

from batchnorm.tools.inspection.leaks import Leak, Leaks, Movement
from batchnorm.tools.inspection.page.leaks import make_section
from batchnorm.tools.inspection.page.profiles import describe, draw_profile, fit_reach
from batchnorm.tools.inspection.report import Report
from batchnorm.tools.inspection.thresholds import Thresholds

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\u202e[red]\ud800"


def make_leak(name: str, **fields: object) -> Leak:
    leak = Leak(name, "Conv1d", ("evaluation",), (0.5,), 0.2, None, "", "It reads.", "Mask it.")
    return replace(leak, **fields)  # type: ignore[arg-type]


def make_layer(name: str, leaks: bool = False, reach: int = 0) -> Movement:
    profile = np.where(np.arange(40) < reach, 0.1, 0.0)
    moved = 0.1 if reach else 0.0
    modes = ("evaluation",) if leaks else ()
    return Movement(name, "Conv1d", 0, False, modes, moved, moved, profile)


def make_leaks(*leaks: Leak, layers: tuple[Movement, ...] = ()) -> Leaks:
    return Leaks("Net", leaks, (), layers, 0.5, (40,), (72,), ("evaluation",), 1e-4)


LEAKS = {
    "none": make_leaks(layers=(make_layer("a"), make_layer("b"))),
    "nothing": make_leaks(),
    "one": make_leaks(make_leak("b"), layers=(make_layer("a"), make_layer("b", True, 3))),
    "root": make_leaks(make_leak("", between=("a", ""))),
    "not compared": make_leaks(
        layers=(Movement("a", "Lambda", 0, False, (), None, None, np.zeros(0)),)
    ),
    "not finite": make_leaks(
        make_leak("b", amounts=(float("inf"),), relative=float("inf")),
        layers=(
            replace(make_layer("b", True), relative=np.inf, profile=np.array([np.inf, np.nan])),
        ),
    ),
    "pooled": make_leaks(layers=(replace(make_layer("a"), profile=np.zeros(0)),)),
    "many": make_leaks(
        *(make_leak(f"l{i}") for i in range(30)),
        layers=tuple(make_layer(f"l{i}", True, i) for i in range(250)),
    ),
    "hostile": replace(
        make_leaks(
            make_leak(HOSTILE, kind=HOSTILE, between=(HOSTILE, HOSTILE)),
            layers=(replace(make_layer(HOSTILE, True, 2), kind=HOSTILE),),
        ),
        source=HOSTILE,
    ),
}


@pytest.mark.parametrize("name", LEAKS)
def test_page_is_well_formed_and_loads_nothing(name: str, tmp_path: Path) -> None:
    LEAKS[name].save_html(tmp_path / "leaks.html")
    page = (tmp_path / "leaks.html").read_text(encoding="utf-8")
    found = Checker(page)
    assert found.open == []
    assert not set(found.elements) & {"script", "img", "iframe", "link", "object", "base"}
    assert found.links == {""}
    assert not re.search(r"https?:|@import|url\(|\x1b|\u202e", page)
    assert "nan" not in "".join(re.findall(r'(?:d|x|y|height)="([^"]*)"', page))


@pytest.mark.parametrize("name", LEAKS)
def test_section_of_the_report_is_the_same(name: str) -> None:
    page = Report("Net", (), Thresholds(), leaks=LEAKS[name]).to_html()
    assert Checker(page).open == []
    assert str(make_section(LEAKS[name])) in page


@pytest.mark.parametrize("name", LEAKS)
def test_json_is_strict(name: str) -> None:
    leaks = LEAKS[name]
    found = json.loads(leaks.to_json(), parse_constant=pytest.fail)
    assert found["ok"] == leaks.ok
    assert [leak["name"] for leak in found["leaks"]] == [leak.name for leak in leaks.leaks]
    assert len(found["layers"]) == len(leaks.layers)
    assert "\x1b" not in str(leaks)


def test_layers_have_a_picture_each() -> None:
    page = LEAKS["one"].to_html()
    assert page.count('class="profile"') == 3  # and the axis
    assert page.count('class="moved"') == 1
    assert "3 positions from the end move" in page


def test_picture_has_the_end_on_the_right() -> None:
    profile = np.where(np.arange(40) < 2, 0.1, 0.0)
    reach = fit_reach([profile], 1e-4)
    assert reach.positions == 16
    drawn = draw_profile(profile, reach, "")
    [path] = re.findall(r'class="moved" d="([^"]*)"', drawn)
    starts = [float(x) for x in re.findall(r"M([\d.]+) ", path)]
    assert starts == [225.0, 210.0]
    assert describe(profile, reach).startswith("2 positions from the end move, by up to 0.1")
    assert describe(np.zeros(40), reach) == "no real position moves"


def test_pictures_show_as_far_as_a_leak_reaches() -> None:
    far = np.where(np.arange(1000) < 400, 0.1, 0.0)
    assert fit_reach([far, np.zeros(0)], 1e-4).positions == 500
    assert fit_reach([np.full(9, 0.1)], 1e-4).positions == 9
    assert fit_reach([], 1e-4).positions == 1


def test_text_says_a_remedy_once() -> None:
    text = str(make_leaks(make_leak("a"), make_leak("b"), make_leak("c", remedy="Other.")))
    assert text.count("Mask it.") == 1
    assert text.splitlines()[0].endswith("3 layers leak, first a (Conv1d)")
    assert "a (Conv1d) moves by 0.5 in evaluation. It reads." in text
