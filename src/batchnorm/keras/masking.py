"""Masks for layers deep inside a model to which no layer before them hands one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary, WeakSet

import keras
from keras.src.backend import in_symbolic_scope

from batchnorm.core.errors import (
    ArgumentRuntimeError,
    ArgumentTypeError,
    ArgumentValueError,
    names_errors,
    naming,
)
from batchnorm.keras.functional import BACKEND
from batchnorm.keras.masks import to_boolean
from batchnorm.keras.resolution import RULES, at_resolution

__all__ = ["padding_mask"]

_OWNER = "padding_mask"


@dataclass(eq=False)
class Block:
    """One `with` block.

    Attributes:
        mask: boolean, or None, which switches outer blocks off.
        rescale: the rule for layers of coarser resolution.
        trace: the backend's trace that the block was opened in; None for eager code.
        outer: the block around it, or None.
        active: False from its end on, for tasks that outlive it.
        asked: a layer has looked for a mask in it.
    """

    mask: Any
    rescale: str | None
    trace: Any
    outer: Block | None
    active: bool = True
    asked: bool = False


_current: ContextVar[Block | None] = ContextVar("batchnorm_keras_padding_mask", default=None)


class _Usage:
    """The blocks in all threads; a compiler guards on the attribute `in_use`."""

    def __init__(self) -> None:
        self.in_use = False
        # Layers of compiled functions, or of threads, that no block reached.
        self.missed: WeakSet[Any] = WeakSet()
        self.taken: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()  # layers, and their traces
        self._open = 0
        self._lock = threading.Lock()

    def count(self, change: int) -> None:
        with self._lock:
            self._open += change
            self.in_use = self._open > 0


_usage = _Usage()


@contextmanager
def padding_mask(mask: Any, *, rescale: str | None = None) -> Iterator[None]:
    """Give `mask` to every layer of this library that runs inside the `with` block without one.

    Args:
        mask: non-zero at real positions: `(N,)` for whole samples, or `(N, *spatial)` at the
            resolution of the model's input. None switches an outer `padding_mask` off.
        rescale: the rule, at a layer of coarser resolution, for a block of positions that is
            partly padding: "any" (real if one is), "all" (real if all are), or None, which raises;
            in compiled code None takes no layer of another resolution.

    A mask that a layer is given, as an argument or by the layer before it, wins. At a layer whose
    rows differ from the mask's, each size must divide, or be divided by, the mask's: blocks then
    merge or repeat. After pooling or flattening the spatial axes away, whatever is left of a
    sample is one block. Everything else raises. `Remask` follows the windows of a convolution.

    A compiled function (`fit`, `evaluate`, `predict`, `tf.function`, `jax.jit`) takes the mask as
    an input: open the block inside it, in the `call` of a model that gets the mask. A block that
    is opened outside of it raises. The setting belongs to the thread (or asyncio task) that made
    it, ends with the block even on an exception, and nests. Where a layer is recomputed in the
    backward pass (`keras.RematScope`), open the block inside the recomputed layer.

    TensorFlow cannot tell a block of functions that were compiled before it was opened. The block
    raises at its end if no layer has run in it; where others have, their masks are lost unseen.

    Raises:
        TypeError: a symbolic mask.
        ValueError: a scalar mask, or an unknown rule; from a layer: sizes that do not fit, or a
            block of real and padded positions without a rule for it.
        RuntimeError: from a layer that is compiled in a block opened outside, or recomputed after
            its block; at the end of a block around code that was compiled earlier.

    Source: S1, S5.

    >>> from batchnorm.keras import BatchNormalization
    >>> layer = BatchNormalization(momentum=0.0)
    >>> with padding_mask(keras.ops.array([[True, True, False]])):
    ...     y = layer(keras.ops.array([[[1.0], [3.0], [99.0]]]), training=True)
    >>> float(keras.ops.convert_to_numpy(layer.moving_mean)[0])
    2.0
    """
    block = _make_block(mask, rescale)
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


def find_mask(layer: Any, x: Any, axes: tuple[int, ...]) -> Any:
    """The mask that a block gives a layer which has none, or None."""
    if not _usage.in_use and not _usage.taken and BACKEND.RETRACES:
        return None
    block = _current.get()
    if block is None or not block.active:
        _note_absence(layer)
        return None
    outer: Block | None = block
    while outer is not None:
        outer.asked, outer = True, outer.outer
    if block.mask is None or in_symbolic_scope():  # where Keras asks for shapes only
        return None
    if not BACKEND.follows(block.trace):
        raise ArgumentRuntimeError(
            "padding_mask was opened outside of the compiled function that runs this layer, "
            "which would keep the mask for all later calls. Give the model the mask as an input, "
            "and open padding_mask inside, in its call."
        )
    _usage.taken[layer] = BACKEND.find_trace()
    return at_resolution(block.mask, block.rescale, x, axes)


def _note_absence(layer: Any) -> None:
    """Remember a layer that runs outside of blocks; raise if its first pass was inside of one."""
    if in_symbolic_scope():
        return
    if BACKEND.repeats(_usage.taken.get(layer, False)):
        raise ArgumentRuntimeError(
            "this layer took the mask of a padding_mask block that has ended, and runs again "
            "without one, perhaps recomputed in the backward pass (keras.RematScope). Open "
            "padding_mask inside the layer that is recomputed, or pass mask=; if no mask is "
            "meant, say padding_mask(None)."
        )
    _usage.taken.pop(layer, None)
    if not BACKEND.RETRACES and (_usage.in_use or BACKEND.find_trace() is not None):
        _usage.missed.add(layer)


@names_errors(_OWNER)
def _make_block(mask: Any, rescale: Any) -> Block:
    """The checked arguments of `padding_mask`."""
    if rescale not in RULES:
        raise ArgumentValueError(f'rescale must be None, "any" or "all"; got {rescale!r}.')
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
    return Block(mask, rescale, BACKEND.find_trace(), outer)


def _check_use(block: Block) -> None:
    """Raise if a block may have stood around functions that were compiled without it."""
    missed = next(iter(_usage.missed), None)
    if block.asked or block.mask is None or missed is None:
        return
    with naming(_OWNER):
        raise ArgumentRuntimeError(
            "no layer took the mask. Functions that were compiled before the block was opened "
            "(fit, evaluate, predict, tf.function), and other threads, do not see it; one of them "
            f"has run layer {missed.name!r}. Give the model the mask as an input, and open "
            "padding_mask inside, in its call."
        )
