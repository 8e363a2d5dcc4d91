"""The reason why an installation has no compiled extension, and the command that brings it."""

from __future__ import annotations

import json
import shlex
from importlib.metadata import PackageNotFoundError, distribution
from typing import Any
from urllib.parse import unquote, urlsplit

__all__ = ["describe_absence", "describe_remedy"]

_BUILD = "without_kernels"  # the build tag of pyproject.toml's wheel without kernels
_AGAIN = "python -m pip install --force-reinstall --no-deps --no-cache-dir"


def describe_absence(error: ImportError) -> str:
    """The reason, from the import's error and the installed wheel's own record."""
    if _BUILD in _record("WHEEL"):
        return "the compiled extension is missing: BATCHNORM_WITHOUT_KERNELS=1 left it out"
    return f"the compiled extension is missing ({error})"


def describe_remedy() -> str:
    """The remedy: the command that installs from where this installation came from."""
    unset = "unset BATCHNORM_WITHOUT_KERNELS, " if _BUILD in _record("WHEEL") else ""
    command = f"{_AGAIN} {_source(json.loads(_record('direct_url.json') or '{}'))}"
    return f"Install a C++17 compiler, {unset}and run `{command}`."


def _record(name: str) -> str:
    try:
        return distribution("batchnorm").read_text(name) or ""
    except PackageNotFoundError:  # a source tree that was never installed
        return ""


def _source(came_from: dict[str, Any]) -> str:
    """The argument that pip was given; see https://packaging.python.org/specifications/direct-url."""
    url = came_from.get("url", "")
    if "vcs_info" in came_from:
        return shlex.quote(f"git+{url}@{came_from['vcs_info']['commit_id']}")
    if not url or url.endswith(".whl"):
        return "batchnorm"
    path = urlsplit(url)
    place = shlex.quote(unquote(path.path) if path.scheme == "file" else url)
    return f"--editable {place}" if came_from.get("dir_info", {}).get("editable") else place
