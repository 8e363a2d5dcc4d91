"""The demo's main job in Keras."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from batchnorm.cli import app


@pytest.mark.exhaustive
def test_demo_runs_in_keras(tmp_path: Path) -> None:
    arguments = ["demo", "--framework", "keras", "--quick", "--out", str(tmp_path / "demo.png")]
    found = CliRunner().invoke(app, arguments)
    assert found.exit_code == 0, found.output
    assert "keras" in found.output
    assert (tmp_path / "demo.png").stat().st_size > 1000
