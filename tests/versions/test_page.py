"""The versions page agrees with results.json, and the table with pyproject.toml."""

from __future__ import annotations

import json
import re

import page
import pytest
from table import ENVIRONMENTS

from batchnorm.core.versions import BOUNDS


def test_page_shows_the_results() -> None:
    text = page.PAGE.read_text()
    assert page.make_page(text) == text


def test_every_environment_of_the_page_is_in_the_table() -> None:
    rows = json.loads(page.RESULTS.read_text())["rows"]
    tests = {e.name: e.tests for e in ENVIRONMENTS}
    assert {row["name"] for row in rows} <= set(tests)
    for row in rows:
        wanted = [name for name in tests[row["name"]] if not name.startswith("-")]
        assert sorted(row["parts"]) == sorted(wanted), row["name"]
        assert not [name for name, part in row["parts"].items() if part["failed"]], row["name"]


def test_a_page_without_its_comments_is_an_error() -> None:
    with pytest.raises(ValueError, match="two comments once"):
        page.make_page("no table here\n")


def test_bound_environments_pin_the_bounds() -> None:
    pinned = {
        tuple(re.split("==", requirement))
        for environment in ENVIRONMENTS
        if environment.role == "bound"
        for requirement in environment.requirements
    }
    for package, bound in BOUNDS.items():
        if package in {name for name, _ in pinned}:
            assert (package, bound) in {(n, v[: len(bound)]) for n, v in pinned}
