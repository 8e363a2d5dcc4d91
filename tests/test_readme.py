"""The README's example runs, and its commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


@pytest.mark.parametrize(("number", "shape"), [(0, (8, 64, 100)), (1, (8, 100, 64))])
def test_example_runs(number: int, shape: tuple[int, ...]) -> None:
    example = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)[number]
    names: dict[str, object] = {}
    exec(example, names)
    assert names["y"].shape == shape  # type: ignore[attr-defined]


def test_commands_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = set(re.findall(r"make ([a-z]+)", README))
    assert {"demo", "test"} <= commands
    assert all(f"\n{command}:" in makefile for command in commands)


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert (ROOT / target).exists(), target
