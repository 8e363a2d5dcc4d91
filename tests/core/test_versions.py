"""The bounds of frameworks: those of pyproject.toml, and the error below them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from batchnorm.core.versions import BOUNDS, SETTING, check_version


def test_bounds_are_those_of_pyproject() -> None:
    text = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    for package, bound in BOUNDS.items():
        assert re.findall(rf'"{package}>=([\d.]+)"', text) == [bound]


@pytest.mark.parametrize("installed", ["2.11.0", "2.9.1+cpu", "1.13.1", "unknown"])
def test_older_version_is_refused_with_the_command_that_helps(
    installed: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(SETTING, raising=False)
    with pytest.raises(ImportError) as caught:
        check_version("batchnorm.torch", "torch", installed)
    said = str(caught.value)
    assert said.startswith(f"batchnorm.torch needs torch {BOUNDS['torch']} or newer")
    assert installed in said
    assert f"pip install 'torch>={BOUNDS['torch']}'" in said
    assert "\n" not in said


@pytest.mark.parametrize(
    ("package", "installed"),
    [
        ("torch", "2.12"),
        ("torch", "2.12.0+cpu"),
        ("torch", "2.12.0a0+gitabc"),
        ("torch", "3.0"),
        ("flax", "0.12.8"),
        ("flax", "0.13"),
        ("keras", "3.14.0"),
    ],
)
def test_bound_and_newer_pass(package: str, installed: str) -> None:
    check_version("batchnorm", package, installed)


def test_setting_turns_the_error_into_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SETTING, "1")
    with pytest.warns(UserWarning, match="needs flax 0.12.8 or newer, but 0.12.7 is installed"):
        check_version("batchnorm.jax", "flax", "0.12.7")
