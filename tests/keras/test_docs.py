"""The Keras blocks of README and site, on this process's backend."""

from __future__ import annotations

import re
from pathlib import Path

import keras
import pytest
from pages import PAGES, python_blocks, run

import batchnorm.keras

BACKEND = keras.config.backend()
BLOCKS = {
    name: [b for b in python_blocks(page, keras=True) if b.backend in (None, BACKEND)]
    for name, page in PAGES.items()
}


@pytest.mark.parametrize("name", [name for name, blocks in BLOCKS.items() if blocks])
def test_code_runs_and_prints_what_the_page_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run(BLOCKS[name])


def test_api_page_lists_every_public_name() -> None:
    page = PAGES["docs/api/keras.md"].read_text()
    listed = set(re.findall(r"^::: [\w.]+\.(\w+)$", page, re.MULTILINE))
    assert set(batchnorm.keras.__all__) - {"Conversion"} <= listed  # it is on torch's page
