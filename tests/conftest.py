"""Test set-up that every folder shares."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

from hypothesis import settings

# Folders here are named like the frameworks: `import jax` must not find one where there is no JAX.
with suppress(ValueError):
    sys.path.remove(str(Path(__file__).parent))

# The conformance table's helpers, and those of pages, are plain modules, shared by the tests of
# every front end.
for folder in ("conformance", "documentation"):
    sys.path.insert(0, str(Path(__file__).parent / folder))

# Compilation and a loaded machine make single examples slow; the count bounds the time.
settings.register_profile("default", deadline=None)
settings.load_profile("default")
