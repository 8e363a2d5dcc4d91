"""JAX and Keras over several processes agree with one process, and so with torch (S14).

All are compared with the float64 core on the whole batch, within S3, so any two of them differ by
at most twice S3.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from typing import NamedTuple

import numpy as np
import pytest

import jax_world
import keras_world
import torch_world
from batchnorm.verification import tolerances
from batchnorm.verification.comparison import Path, check
from cases import CASES, Case, Data, Result
from processes import World, results
from splitting import Split, even_split, random_split

# Every option, type and kind of hard data; each case is compiled anew in every process.
NAMES = [
    "image_last-samples",
    "two_axes-half",
    "1d_signal-channelwise",
    "1d_signal-empty",
    "renorm_clipped-half-train",
    "adjusted-none-train",
    "train-offset1e6-half",
    "nan_padding-plain-train",
    "bfloat16-half-train",
    "float64-half-train",
    "zero-inner_last-all",
]
CHOSEN = [next(case for case in CASES if case.name == name) for name in NAMES]
UNMASKED = [case for case in CASES if case.name in ("2d-unmasked", "1d_signal-unmasked")]
SIZES = (1, 2, 3, 4)


class Kind(NamedTuple):
    """A front end's processes: how to make them, and the function that runs first in each."""

    make: Callable[[int], World]
    join: Callable[[], None]


KINDS = {
    "jax": Kind(jax_world.make_world, jax_world.join),
    "tensorflow": Kind(keras_world.make_tensorflow_world, keras_world.join_tensorflow),
    "torch": Kind(keras_world.make_torch_world, torch_world.join),
}


class Worlds:
    """Makes a world when it is first asked for, and keeps the latest: frameworks take memory."""

    def __init__(self) -> None:
        self._key: tuple[str, int] | None = None
        self._world: World | None = None

    def get(self, kind: str, size: int) -> World:
        if self._key != (kind, size):
            self.close()
            self._world = KINDS[kind].make(size)
            self._key = kind, size
            # Imports take long where the machine is busy.
            results(self._world.run(KINDS[kind].join, within=PATIENCE))
        assert self._world is not None
        return self._world

    def close(self) -> None:
        if self._world is not None:
            self._world.close()
        self._key = self._world = None


@pytest.fixture(scope="module")
def latest() -> Iterator[Worlds]:
    made = Worlds()
    yield made
    made.close()


def show(value: object) -> str:
    return value.name if isinstance(value, Case) else str(value)


def usual(row: tuple[object, ...], wanted: bool) -> object:
    """A row of parameters, which `make test` runs if `wanted`: one size, since sizes are alike."""
    return pytest.param(*row, marks=() if wanted else (pytest.mark.exhaustive,))


# Every case merged over a named axis in one size of world, with global arrays in another: a step
# is compiled anew in every process, which takes a second.
IN_JAX = [
    (size, way, case)
    for size in SIZES
    for i, case in enumerate(CHOSEN + UNMASKED)
    for way, turn in (("shard_map", 0), ("jit", 2))
    if (i + turn) % len(SIZES) == size - 1
]


@pytest.mark.parametrize(
    ("size", "way", "case"), [usual(row, row[0] == 3) for row in IN_JAX], ids=show
)
def test_jax(latest: Worlds, size: int, way: str, case: Case) -> None:
    # Arrays of one size have a mask where the split is uneven: for once, one that is even.
    split = even_split(case, size) if case in UNMASKED else random(case, size)
    run = partial(in_jax, latest.get("jax", size), way, split)
    check(Path(run, False, tolerances.FLOAT32), case)


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    ("size", "case"),
    [usual(row, row[0] == 3) for row in product(SIZES, CHOSEN + UNMASKED)],
    ids=show,
)
def test_keras_on_tensorflow(latest: Worlds, size: int, case: Case) -> None:
    run = partial(in_keras, latest.get("tensorflow", size), random(case, size))
    check(Path(run, False, tolerances.PLAIN_FLOAT32), case)


# The same merging runs in tests/sync/test_equivalence.py in every size of world.
@pytest.mark.parametrize(
    ("size", "case"),
    [usual(row, row[0] == 2) for row in product([2, 4], CHOSEN + UNMASKED)],
    ids=show,
)
def test_keras_on_torch(latest: Worlds, size: int, case: Case) -> None:
    run = partial(in_keras, latest.get("torch", size), random(case, size))
    check(Path(run, False, tolerances.FLOAT32), case)


PATIENCE = 500.0  # seconds


def random(case: Case, size: int) -> Split:
    return random_split(case, size, np.random.default_rng([zlib.crc32(case.name.encode()), size]))


def in_jax(world: World, way: str, split: Split, case: Case, data: Data) -> Result:
    parts = split.cut_evenly(data, jax_world.devices_of(world.size))
    given = [(*part, way) for part in parts]
    found = results(world.run(jax_world.run, given, within=PATIENCE))
    return split.join([split.trim(result, rank) for rank, result in enumerate(found)])


def in_keras(world: World, split: Split, case: Case, data: Data) -> Result:
    return split.join(results(world.run(keras_world.run, split.cut(data), within=PATIENCE)))
