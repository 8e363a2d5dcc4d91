"""Docstrings end in doctests; the site shows them as a section of examples."""

from __future__ import annotations

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^>>> (?:.+\n?)+", re.MULTILINE)


class Doctests(griffe.Extension):
    """Puts each doctest that stands alone under a heading of its own, indented."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring before it is parsed."""
        if obj.docstring is not None:
            obj.docstring.value = _DOCTEST.sub(_as_section, obj.docstring.value)


def _as_section(match: re.Match[str]) -> str:
    return "Examples:\n" + "".join(f"    {line}\n" for line in match[0].splitlines())
