"""Run the code of docs/guests.md, whose packages only the zoo's environment has."""

from __future__ import annotations

import os
import sys
import tempfile
import warnings
from pathlib import Path

from torchvision_operators import declare

sys.path.insert(0, str(Path(__file__).parents[1] / "documentation"))
from pages import PAGES, python_blocks, run

if __name__ == "__main__":
    declare()
    warnings.simplefilter("ignore")
    os.chdir(tempfile.mkdtemp())
    run(python_blocks(PAGES["docs/guests.md"], keras=False))
    print("docs/guests.md: every block runs and prints what the page says")
