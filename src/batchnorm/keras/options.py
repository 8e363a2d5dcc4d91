"""What the Keras layers demand of their options."""

from __future__ import annotations

from typing import Any, NamedTuple

import keras

from batchnorm.core import config
from batchnorm.core.errors import ArgumentValueError
from batchnorm.core.layout import check_axis


class Checked(NamedTuple):
    """A layer's options in the core's terms."""

    options: config.Options
    adjustment: config.Adjustment | None
    fused: bool | None


def check_options(
    *,
    axis: Any,
    momentum: Any,
    epsilon: Any,
    renorm: Any,
    renorm_clipping: Any,
    renorm_momentum: Any,
    fused: Any,
    virtual_batch_size: Any,
    adjustment: Any,
    synchronized: Any,
    axis_name: Any,
    process_group: Any,
) -> Checked:
    """Every option, checked before any weight exists.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range, or options that exclude each other.
    """
    axes = check_axis(axis)
    size = config.check_virtual_batch_size(virtual_batch_size)
    check_ghost_axes(size, axes, axis)
    options = config.Options(
        eps=config.check_number("epsilon", epsilon, 0.0),
        decay=config.check_number("momentum", momentum, 0.0, 1.0),
        virtual_batch_size=size,
        renorm=config.check_renorm(
            renorm,
            renorm_clipping,
            config.check_number("renorm_momentum", renorm_momentum, 0.0, 1.0),
        ),
    )
    config.check_flag("synchronized", synchronized)
    if fused and synchronized:
        raise ArgumentValueError(
            "fused=True cannot be combined with synchronized=True; use fused=None for "
            "the fastest path there is."
        )
    _check_participants(synchronized, axis_name, process_group)
    return Checked(
        options,
        config.check_adjustment(adjustment, size),
        config.check_fused(fused),
    )


def check_ghost_axes(size: int | None, axes: tuple[int, ...], axis: Any) -> None:
    """Raise if ghost batches would split a channel axis; `axes` may be negative still."""
    if size is not None and 0 in axes:
        raise ArgumentValueError(
            f"virtual_batch_size splits axis 0, which must not be a channel axis; got "
            f"axis={axis!r}."
        )


def _check_participants(synchronized: bool, axis_name: Any, process_group: Any) -> None:
    named = {"axis_name": (axis_name, "jax"), "process_group": (process_group, "torch")}
    for name, (value, backend) in named.items():
        if value is None:
            continue
        if keras.backend.backend() != backend:
            raise ArgumentValueError(
                f"{name} is for the {backend} backend; got {name}={value!r} on "
                f"{keras.backend.backend()}. Leave it out."
            )
        if not synchronized:
            raise ArgumentValueError(
                f"{name} chooses whom to synchronize with and needs synchronized=True; got False."
            )
