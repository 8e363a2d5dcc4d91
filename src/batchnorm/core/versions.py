"""The oldest versions of the frameworks that the library was tested with, and their check."""

from __future__ import annotations

import os
import re
import warnings

__all__ = ["BOUNDS", "SETTING", "check_version"]

# Of pyproject.toml; a test compares them.
BOUNDS = {"torch": "2.12", "jax": "0.10", "flax": "0.12.8", "keras": "3.14"}
SETTING = "BATCHNORM_UNTESTED_VERSIONS"


def check_version(owner: str, package: str, installed: str) -> None:
    """Refuse a version below the package's bound; with BATCHNORM_UNTESTED_VERSIONS=1, warn of it.

    A pre-release counts as the release.

    Args:
        owner: the module that is imported, as "batchnorm.torch".
        package: one of BOUNDS.
        installed: its `__version__`.

    Raises:
        ImportError: the version is older than the bound.
    """
    bound = BOUNDS[package]
    if _read(installed) >= _read(bound):
        return
    said = (
        f"{owner} needs {package} {bound} or newer, but {installed} is installed, on which tests "
        f"fail; upgrade it with: pip install '{package}>={bound}'"
    )
    if os.environ.get(SETTING) != "1":
        raise ImportError(f"{said} (or set {SETTING}=1, which turns this error into a warning)")
    warnings.warn(said, stacklevel=3)


def _read(version: str) -> tuple[int, ...]:
    """The numbers of a release; ends with zeros, so that "3.14.0" is not newer than "3.14"."""
    found = re.match(r"\d+(?:\.\d+)*", version)
    numbers = tuple(map(int, found[0].split("."))) if found else ()
    return (*numbers, 0, 0, 0)[:3]
