"""Decisions about calls of one kind, and the threads that serve them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from batchnorm.kernels import extension
from batchnorm.torch.kernels import decision


@pytest.mark.skipif(sys.platform != "linux", reason="the library's name is Linux's")
def test_threads_are_torch_s_own_where_it_uses_gnu_openmp() -> None:
    libraries = list((Path(torch.__file__).parent / "lib").glob("libtorch_*.so"))
    teams = {team for team in map(extension.find_team, libraries) if team}
    assert decision._TEAM in (teams or {0})


def test_a_library_that_is_not_there_lends_no_threads(tmp_path: Path) -> None:
    assert extension.find_team(tmp_path / "no.so") == 0
