"""The site's changes to docstrings: doctests and call arguments become their own sections."""

from __future__ import annotations

import re
from typing import Any

import griffe

_DOCTEST = re.compile(r"^>>> (?:.+\n?)+", re.MULTILINE)
_CALL = re.compile(r"^Call arguments:\n((?: {4}.*\n?)+)", re.MULTILINE)


class Sections(griffe.Extension):
    """Rewrites what Google's style has no section for."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Change the docstring before it is parsed."""
        if obj.docstring is not None:
            text = _DOCTEST.sub(_examples, obj.docstring.value)
            obj.docstring.value = _CALL.sub(_call_arguments, text)


def _examples(match: re.Match[str]) -> str:
    return "Examples:\n" + "".join(f"    {line}\n" for line in match[0].splitlines())


def _call_arguments(match: re.Match[str]) -> str:
    items = re.sub(r"^ {4}(\w+): ", r"- **`\1`** – ", match[1], flags=re.MULTILINE)
    return f"**Call arguments:**\n\n{items}"
