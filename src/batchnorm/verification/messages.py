"""The messages of a front end's process, a line of JSON each."""

from __future__ import annotations

MARK = "\x1ebatchnorm-verify "  # before each; a framework may print, too
LONGEST = 500  # characters of an error
