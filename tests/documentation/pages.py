"""The pages of README and site, and their code blocks as the tests run them.

A page runs from top to bottom: its blocks share one namespace, and a block must print the `text`
block right after it. Blocks that mention Keras have a namespace of their own and run in a process
of each Keras backend; a Keras block that imports a framework runs on that backend only.
"""

from __future__ import annotations

import contextlib
import io
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).parents[2]
PAGES = {p.relative_to(ROOT).as_posix(): p for p in sorted((ROOT / "docs").rglob("*.md"))}
PAGES["README.md"] = ROOT / "README.md"
LANGUAGES = {"python", "console", "text", "math"}
_FENCE = re.compile(r"^( *)```(\S*)(.*)\n((?:.*\n)*?)\1``` *$", re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page.

    line: the page's line at which the code begins; output: the text block right after it, if any.
    """

    page: Path
    line: int
    heading: str
    language: str
    code: str
    output: str

    @property
    def keras(self) -> bool:
        """True if it runs in the processes of the Keras backends."""
        return re.search(r"\bkeras\b", self.code) is not None

    @property
    def backend(self) -> str | None:
        """The Keras backend that a block of Keras needs; None for any."""
        found = re.search(r"^ *(?:import|from) (tensorflow|jax|torch)\b", self.code, re.MULTILINE)
        return found[1] if found else None


def read_blocks(page: Path) -> list[Block]:
    """Every fenced block of a page, in its order."""
    text = page.read_text()
    found, matches = [], [*_FENCE.finditer(text), None]
    for match, following in pairwise(matches):
        output = ""
        if (
            following
            and following[2] == "text"
            and not text[match.end() : following.start()].strip()
        ):
            output = _dedent(following)
        headings = re.findall(r"^#+ (.*)$", text[: match.start()], re.MULTILINE)
        line = text.count("\n", 0, match.start(4)) + 1
        heading = headings[-1] if headings else ""
        found.append(Block(page, line, heading, match[2], _dedent(match), output))
    return found


def python_blocks(page: Path, *, keras: bool) -> list[Block]:
    """Blocks that run, with Keras or without."""
    return [b for b in read_blocks(page) if b.language == "python" and b.keras == keras]


def missing_package(blocks: Iterable[Block]) -> str | None:
    """A top-level package that blocks import and that is not installed."""
    for block in blocks:
        for name in re.findall(r"^ *(?:import|from) (\w+)", block.code, re.MULTILINE):
            if name != "page" and find_spec(name) is None:
                return name
    return None


def run(blocks: Iterable[Block]) -> dict[str, Any]:
    """Run blocks in one namespace, which is returned; compare their output."""
    module = ModuleType("page")
    sys.modules["page"] = module  # where dataclasses and pickle look for what a page defines
    names = module.__dict__
    for block in blocks:
        # Empty lines in front, so that a traceback names the line of the page.
        code = compile("\n" * (block.line - 1) + block.code, str(block.page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(code, names)
        assert printed.getvalue().rstrip() == block.output.rstrip(), f"{block.page}:{block.line}"
    return names


def _dedent(match: re.Match[str]) -> str:
    indent = len(match[1])
    return "".join(f"{line[indent:]}\n" for line in match[4].splitlines())
