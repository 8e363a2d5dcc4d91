"""Versions, addresses and names that stand in several files agree."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROJECT = (ROOT / "pyproject.toml").read_text()
VERSION = re.search(r'^version = "(.*)"', PROJECT, re.MULTILINE)[1]  # type: ignore[index]
REPOSITORY = re.search(r'^Repository = "(.*)"', PROJECT, re.MULTILINE)[1]  # type: ignore[index]
WITH_ADDRESS = (
    *("CITATION.cff", "SECURITY.md", "README.md", "docs/installing.md"),
    ".github/ISSUE_TEMPLATE/config.yml",
)


def test_changes_and_citation_are_of_this_version() -> None:
    assert f"\n## {VERSION} (" in (ROOT / "CHANGELOG.md").read_text()
    assert f"\nversion: {VERSION}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("name", WITH_ADDRESS)
def test_the_repository_has_one_address(name: str) -> None:
    text = (ROOT / name).read_text()
    assert REPOSITORY in text
    owners = set(re.findall(r"github\.com/([\w-]+)/batchnorm\b", text))
    assert owners == {REPOSITORY.split("/")[-2]}


def test_the_site_is_where_the_package_says() -> None:
    site = re.search(r'^Documentation = "(.*)"', PROJECT, re.MULTILINE)[1]  # type: ignore[index]
    assert f"site_url: {site}\n" in (ROOT / "mkdocs.yml").read_text()
    assert f"url: {site}\n" in (ROOT / "CITATION.cff").read_text()


def test_workflows_call_commands_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    workflows = {p.stem: p.read_text() for p in (ROOT / ".github/workflows").glob("*.yml")}
    assert workflows.keys() >= {"tests", "nightly", "versions", "wheels", "site"}
    called = set()
    for text in workflows.values():
        called |= set(re.findall(r"run: make ([a-z-]+)", text))
        for listed in re.findall(r"command: \[(.*)\]", text):
            called |= set(listed.split(", "))
    assert {"lint", "docs", "dist", "test", "test-all"} <= called
    missing = {name for name in called if not re.search(rf"^{name}:", makefile, re.MULTILINE)}
    assert missing <= {"test-versions"}


def test_the_fault_template_asks_for_what_the_command_line_prints() -> None:
    template = (ROOT / ".github/ISSUE_TEMPLATE/fault.yml").read_text()
    assert {"info", "verify"} <= set(re.findall(r"`batchnorm ([a-z]+)`", template))
