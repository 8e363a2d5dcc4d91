"""Worlds of processes, shared by all tests of this folder: starting them takes seconds."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))

from processes import World
from torch_world import join, make_world


@pytest.fixture(scope="session")
def worlds() -> Iterator[dict[int, World]]:
    """Worlds by size, each made when it is first asked for."""
    made = _Worlds()
    yield made
    for world in made.values():
        world.close()


class _Worlds(dict):
    def __missing__(self, size: int) -> World:
        self[size] = world = make_world(size)
        world.values(join)
        return world
