"""TensorFlow as the core's `xp`, with shapes that a graph learns when it runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import tensorflow as tf

from batchnorm.core.errors import ArgumentValueError
from batchnorm.core.layout import Layout
from batchnorm.core.merge import GatherMerge, Merge, Parts
from batchnorm.core.namespace import Namespace
from batchnorm.keras.backends.tensorflow.sums import sum_axes
from batchnorm.keras.call import Call
from batchnorm.keras.masks import find_axes


class _TensorFlowNamespace:
    """The functions that `batchnorm.core.namespace.Namespace` lists."""

    abs = staticmethod(tf.abs)
    sqrt = staticmethod(tf.sqrt)
    square = staticmethod(tf.square)
    log = staticmethod(tf.math.log)
    expm1 = staticmethod(tf.math.expm1)
    isfinite = staticmethod(tf.math.is_finite)
    zeros_like = staticmethod(tf.zeros_like)
    ones_like = staticmethod(tf.ones_like)
    cast = staticmethod(tf.cast)
    stop_gradient = staticmethod(tf.stop_gradient)

    @staticmethod
    def where(condition: tf.Tensor, a: Any, b: Any) -> tf.Tensor:
        # In a graph a lone Python number would be float32.
        dtype = (a if tf.is_tensor(a) else b).dtype
        return tf.where(condition, tf.convert_to_tensor(a, dtype), tf.convert_to_tensor(b, dtype))

    @staticmethod
    def sum(a: tf.Tensor, *, axis: Sequence[int], keepdims: bool) -> tf.Tensor:
        if keepdims:
            return sum_axes(a, axis)
        return tf.squeeze(sum_axes(a, axis), axis=list(axis))

    @staticmethod
    def max(a: tf.Tensor, *, axis: int) -> tf.Tensor:
        return tf.reduce_max(a, axis=axis)

    @staticmethod
    def reshape(a: tf.Tensor, shape: Sequence[Any]) -> tf.Tensor:
        return tf.reshape(a, [-1 if n is None else n for n in shape])

    @staticmethod
    def materialize(a: tf.Tensor) -> tf.Tensor:
        return a

    @staticmethod
    def broadcast_like(a: tf.Tensor, x: tf.Tensor) -> tf.Tensor:
        return a  # operators broadcast, and sum in their gradients


XP = cast(Namespace, _TensorFlowNamespace)


def make_merge() -> Merge | None:
    """The merge with the statistics of other replicas (S14); None where there is one replica."""
    context = tf.distribute.get_replica_context()
    if context is None or context.num_replicas_in_sync == 1:
        return None
    replica, replicas = context.replica_id_in_sync_group, context.num_replicas_in_sync

    def gather(own: Parts) -> Parts:
        # Each replica puts its five arrays into zeros, at its own place, and all are added: one
        # collective operation, which is differentiable.
        stacked = tf.stack(list(own))
        here = tf.reshape(tf.range(replicas) == replica, [replicas] + [1] * stacked.shape.rank)
        placed = tf.where(here, stacked, tf.zeros_like(stacked))
        if 0 not in placed.shape:  # the collective crashes on arrays without elements
            placed = context.all_reduce(tf.distribute.ReduceOp.SUM, placed)
        return Parts(*tf.unstack(placed, axis=1))

    return GatherMerge(gather, XP)


@dataclass(frozen=True)
class DynamicLayout(Layout):
    """A layout some of whose sizes are tensors; `shape` has None there."""

    sizes: list[Any] = field(default_factory=list)
    samples: int | None = None  # of one ghost batch

    @classmethod
    def of(
        cls, x: tf.Tensor, axes: tuple[int, ...], virtual_batch_size: int | None
    ) -> DynamicLayout:
        """The layout of x."""
        sizes = sizes_of(x)
        groups = None if virtual_batch_size is None else sizes[0] // virtual_batch_size
        return cls(tuple(x.shape.as_list()), axes, groups, sizes, virtual_batch_size)

    def split(self, a: Any, xp: Namespace) -> Any:
        """As Layout's, for sizes that may be tensors."""
        if a is None or self.groups is None:
            return a
        return xp.reshape(a, self._split(tuple(sizes_of(a))))

    def merge(self, a: Any, xp: Namespace) -> Any:
        """As Layout's, for sizes that may be tensors."""
        return a if self.groups is None else xp.reshape(a, self.sizes)

    def mask(self, mask: Any, xp: Namespace) -> Any:
        """A mask of x's rank, on the working view."""
        return self.split(mask, xp)

    def _split(self, shape: Any) -> Any:
        if self.groups is None:
            return shape
        if isinstance(shape[0], int) and shape[0] == 1 and self.shape[0] != 1:
            return (1, 1, *shape[1:])
        return (self.samples, self.groups, *shape[1:])


def sizes_of(a: tf.Tensor) -> list[Any]:
    """Sizes of a tensor of known rank, each an int where it is known."""
    known = a.shape.as_list()
    if None not in known:
        return known
    dynamic = tf.shape(a)
    return [dynamic[i] if n is None else n for i, n in enumerate(known)]


def fit_mask(mask: tf.Tensor, x: tf.Tensor, axes: tuple[int, ...]) -> tf.Tensor:
    """A mask of x's rank (S1)."""
    if mask.shape.rank is None:
        raise ArgumentValueError("mask must have a known rank; got an unknown one.")
    shape, found = x.shape.as_list(), mask.shape.as_list()
    rows = [a for a in range(len(shape)) if a not in axes]
    along = rows if len(found) <= len(rows) else range(len(shape))
    for i, a in zip(range(len(found)), along, strict=False):  # unknown sizes are the other's
        if found[i] is None:
            found[i] = -1 if shape[a] is None else shape[a]
        if shape[a] is None:
            shape[a] = found[i]
    places = find_axes(tuple(found), Layout(tuple(shape), axes))
    if len(found) == len(shape):
        return mask
    sizes = dict(zip(places, sizes_of(mask), strict=True))
    return tf.reshape(mask, [sizes.get(a, 1) for a in range(len(shape))])


def needs_mask(layout: DynamicLayout) -> bool:
    """True where rows can only be counted when the graph runs."""
    working = layout.working
    return any(not isinstance(working[a], int) for a in layout.reduced)


def fill_mask(mask: Any, x: tf.Tensor, axes: tuple[int, ...]) -> tf.Tensor:
    """A boolean mask with x's size along every row axis; all true if there is none."""
    sizes = sizes_of(x)
    if mask is None:
        rows = [1 if a in axes else n for a, n in enumerate(sizes)]
        return tf.ones(rows, tf.bool)
    own = sizes_of(mask)
    return tf.broadcast_to(mask, [own[a] if a in axes else n for a, n in enumerate(sizes)])


def check_divisible(x: tf.Tensor, call: Call) -> tf.Tensor:
    """x, if ghost batches fill the batch (S12); else an error, now or when the graph runs."""
    size = call.options.virtual_batch_size
    if size is None:
        return x
    remedy = "Drop the last batch (drop_remainder=True) or choose a divisor."
    rule = f"virtual_batch_size={size} must divide the batch size in training; got a batch of"
    samples = x.shape[0]
    if samples is not None:
        if samples % size:
            raise ArgumentValueError(f"{rule} {samples}. {remedy}")
        return x
    samples = tf.shape(x)[0]
    fine = tf.equal(samples % size, 0)
    # Nothing names the errors of a graph that runs.
    check = tf.debugging.Assert(fine, [f"{call.owner}: {rule}", samples, remedy])
    with tf.control_dependencies([check]):
        return tf.identity(x)
