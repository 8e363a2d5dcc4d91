"""Masks for layers deep inside a model to which no layer before them hands one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, WeakSet

import keras

from batchnorm.core.config import check_block
from batchnorm.core.errors import (
    ArgumentRuntimeError,
    ArgumentTypeError,
    ArgumentValueError,
    names_errors,
    naming,
)
from batchnorm.keras.blocks import OpenBlocks
from batchnorm.keras.functional import BACKEND
from batchnorm.keras.masks import to_boolean
from batchnorm.keras.private import in_symbolic_scope
from batchnorm.keras.resolution import at_resolution

__all__ = ["padding_mask"]

_OWNER = "padding_mask"


@dataclass(eq=False)
class Block:
    """One `with` block.

    Attributes:
        mask: boolean, or None, which switches outer blocks off.
        rescale: the rule for layers of coarser resolution.
        padded_output: of all layers inside; None for each layer's own.
        trace: the backend's trace that the block was opened in; None for eager code.
        outer: the block around it, or None.
        active: False from its end on, for tasks that outlive it.
        asked: a layer has looked for a mask in it.
    """

    mask: Any
    rescale: str | None
    padded_output: str | None
    trace: Any
    outer: Block | None
    active: bool = True
    asked: bool = False


class Found(NamedTuple):
    """A layer's mask, and the value of padded rows that a block says, or None."""

    mask: Any
    padded_output: str | None = None


_current: ContextVar[Block | None] = ContextVar("batchnorm_keras_padding_mask", default=None)


class _Usage(OpenBlocks):
    """The blocks, and the layers that no block reached."""

    def __init__(self) -> None:
        super().__init__()
        # Layers of compiled functions, or of threads, that no block reached: without a mask, and
        # with one of their own.
        self.missed: WeakSet[Any] = WeakSet()
        self.masked: WeakSet[Any] = WeakSet()
        # Layers that took something, with the traces; True beside it for the value of padded rows.
        self.taken: WeakKeyDictionary[Any, tuple[Any, bool]] = WeakKeyDictionary()

    def miss(self, layer: Any, masked: bool) -> None:
        with self._lock:
            (self.masked if masked else self.missed).add(layer)

    def find_missed(self, block: Block) -> Any:
        """A layer that would have taken something from a block, but ran without it; or None."""
        with self._lock:
            unmasked, masked = list(self.missed), list(self.masked)
        every = unmasked if block.mask is not None or block.padded_output is not None else []
        every += masked if block.padded_output is not None else []
        return next(iter(every), None)


_usage = _Usage()


@contextmanager
def padding_mask(
    mask: Any, *, rescale: str | None = None, padded_output: str | None = None
) -> Iterator[None]:
    """Give `mask` to every layer of this library that runs inside the `with` block without one.

    Args:
        mask: non-zero at real positions: `(N,)` for whole samples, or `(N, *spatial)` at the
            resolution of the model's input. None switches an outer `padding_mask` off.
        rescale: the rule, at a layer of coarser resolution, for a block of positions that is
            partly padding: "any" (real if one is), "all" (real if all are), or None, which raises;
            in compiled code None takes no layer of another resolution.
        padded_output: "normalize" or "zero": the value of padded rows (S4) for all layers inside,
            whichever mask they have; None leaves it to the block around, or else to each layer.

    A mask that a layer is given, as an argument or by the layer before it, wins. At a coarser
    layer each size must divide the mask's, whose positions then merge in blocks. After pooling or
    flattening the spatial axes away, whatever is left of a sample is one block. Everything else
    raises. `Remask` follows the windows of convolutions.

    A compiled function (`fit`, `evaluate`, `predict`, `tf.function`, `jax.jit`) takes the mask as
    an input: open the block inside it, in the `call` of a model that gets the mask. A block that
    is opened outside of it raises. The setting belongs to the thread (or asyncio task) that made
    it, ends with the block even on an exception, and nests. Where a layer is recomputed in the
    backward pass (`keras.RematScope`), open the block inside the recomputed layer.

    TensorFlow cannot tell a block of functions that were compiled before it was opened. The block
    raises at its end if no layer has run in it; where others have, their masks are lost unseen.

    Raises:
        TypeError: a symbolic mask.
        ValueError: a scalar mask, or an unknown rule or value; from a layer: sizes that do not
            fit, or a block of real and padded positions without a rule for it.
        RuntimeError: from a layer that is compiled in a block opened outside, or recomputed after
            its block; at the end of a block around code that was compiled earlier.

    Source: S1, S4, S5.

    >>> from batchnorm.keras import BatchNormalization
    >>> layer = BatchNormalization(momentum=0.0)
    >>> with padding_mask(keras.ops.array([[True, True, False]])):
    ...     y = layer(keras.ops.array([[[1.0], [3.0], [99.0]]]), training=True)
    >>> float(keras.ops.convert_to_numpy(layer.moving_mean)[0])
    2.0
    """
    block = _make_block(mask, rescale, padded_output)
    token = _current.set(block)
    _usage.count(1)
    try:
        with BACKEND.mark_block(block.trace):
            yield
    finally:
        block.active = False
        _usage.count(-1)
        _current.reset(token)
    _check_use(block)


def find_mask(layer: Any, x: Any, axes: tuple[int, ...], mask: Any) -> Found:
    """A layer's own mask, or the one of a block for a layer that has none."""
    if not _usage.in_use and not _usage.taken and BACKEND.RETRACES:
        return Found(mask)
    block = _current.get()
    if block is None or not block.active:
        _note_absence(layer, mask is not None)
        return Found(mask)
    outer: Block | None = block
    while outer is not None:
        outer.asked, outer = True, outer.outer
    wanted = block.mask is not None and mask is None
    if in_symbolic_scope() or not (wanted or block.padded_output):  # Keras asks for shapes only
        return Found(mask)
    if not BACKEND.follows(block.trace):
        raise ArgumentRuntimeError(
            "padding_mask was opened outside of the compiled function that runs this layer, "
            "which would keep the mask for all later calls. Give the model the mask as an input, "
            "and open padding_mask inside, in its call."
        )
    _usage.taken[layer] = (BACKEND.find_trace(), block.padded_output is not None)
    if wanted:
        mask = at_resolution(block.mask, block.rescale, x, axes)
    return Found(mask, block.padded_output)


def _note_absence(layer: Any, masked: bool) -> None:
    """Remember a layer that runs outside of blocks; raise if its first pass was inside of one."""
    if in_symbolic_scope():
        return
    trace, by_output = _usage.taken.get(layer, (False, False))
    if (by_output or not masked) and BACKEND.repeats(trace):
        raise ArgumentRuntimeError(
            "this layer took the mask or padded_output of a padding_mask block that has ended, "
            "and runs again without one, perhaps recomputed in the backward pass "
            "(keras.RematScope). Open padding_mask inside the layer that is recomputed, or leave "
            "it out and pass mask=. If the second call is meant, open padding_mask(None) for it, "
            "with the padded_output that it should have."
        )
    _usage.taken.pop(layer, None)
    if not BACKEND.RETRACES and (_usage.in_use or BACKEND.find_trace() is not None):
        _usage.miss(layer, masked)


@names_errors(_OWNER)
def _make_block(mask: Any, rescale: Any, padded_output: Any) -> Block:
    """The checked arguments of `padding_mask`."""
    check_block(rescale, padded_output)
    if isinstance(mask, keras.KerasTensor):
        raise ArgumentTypeError(
            "mask must have values; got an input of a functional model. There pass mask= to the "
            "layers, or put a Remask before them."
        )
    if mask is not None:
        mask = keras.ops.convert_to_tensor(to_boolean(mask))
        if len(mask.shape) == 0:
            raise ArgumentValueError("mask must have at least the batch axis; got a scalar.")
    outer = _current.get()
    if outer is not None and not outer.active:
        outer = None
    if padded_output is None and outer is not None:
        padded_output = outer.padded_output
    return Block(mask, rescale, padded_output, BACKEND.find_trace(), outer)


def _check_use(block: Block) -> None:
    """Raise if a block may have stood around functions that were compiled without it."""
    missed = None if block.asked else _usage.find_missed(block)
    if missed is not None:
        with naming(_OWNER):
            raise ArgumentRuntimeError(
                "no layer has run in the block. Functions that were compiled before it was opened "
                "(fit, evaluate, predict, tf.function), and other threads, do not see it; one of "
                f"them has run layer {missed.name!r}. Give the model the mask as an input, and "
                "open padding_mask inside, in its call."
            )
