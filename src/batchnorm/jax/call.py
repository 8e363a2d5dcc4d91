"""The record of a call, made once at the edge; every question about a call is asked of it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from batchnorm.core.config import Options
from batchnorm.core.declaration import check_arguments, list_arguments
from batchnorm.core.errors import ArgumentValueError
from batchnorm.core.layout import Layout, make_layout
from batchnorm.core.merge import Merge
from batchnorm.core.running import Running
from batchnorm.jax.checks import (
    check_channels,
    check_input,
    check_mask,
    split_axes,
    working_type,
)
from batchnorm.jax.operands import Operands
from batchnorm.jax.options import OPTIONS, LayerOption
from batchnorm.jax.synchronize import Groups, make_merge


class Arrays(NamedTuple):
    """The arrays of a call; scale, bias and running statistics have a value per channel.

    Running statistics serve empty channels (S6) and renormalization in training, and are what
    an update starts from. The adjustment's scale `s` and bias `t` broadcast against x, and apply
    in training alone (S13).
    """

    x: Any
    mask: Any = None
    scale: Any = None
    bias: Any = None
    running: Running | None = None
    s: Any = None
    t: Any = None


class Settings(NamedTuple):
    """Everything else that a layer, or a call of a function, sets; already validated.

    Attributes:
        owner: the layer's class or the function, for explanations, and for errors that are found
            when a program is lowered.
        axis: channel axis or axes.
        options: as in Options.
        fused: None, True or False.
        axis_name: named axis, or axes, whose devices share statistics in training (S14).
        axis_index_groups: groups of indices along it.
    """

    owner: str
    axis: int | tuple[int, ...]
    options: Options
    fused: bool | None = None
    axis_name: Any = None
    axis_index_groups: Groups = None


class Call(NamedTuple):
    """A call whose arguments are checked.

    Attributes:
        arrays, settings: its arguments.
        training: x is normalized by its own statistics; else by the running ones.
        update: move the running statistics, if there are any.
        layout: of the operands' x, with the ghost batches that apply.
        operands: the arrays, per-channel ones in the working type. An x of channel axes alone
            has got an axis of one row in front.
        merge: of statistics over a named axis, or None (S14).
    """

    arrays: Arrays
    settings: Settings
    training: bool
    update: bool
    layout: Layout
    operands: Operands
    merge: Merge | None

    @property
    def owner(self) -> str:
        """The layer or function, for explanations and late errors."""
        return self.settings.owner

    @property
    def options(self) -> Options:
        """The options of the core."""
        return self.settings.options

    @property
    def demanded(self) -> bool:
        """True if nothing but a kernel will do."""
        return self.settings.fused is True

    @property
    def adjusted(self) -> bool:
        """True if an adjustment applies (S13)."""
        given = self.arrays.s is not None or self.arrays.t is not None
        return self.training and given

    @property
    def working_type(self) -> Any:
        """The type of statistics and arithmetic (S16)."""
        return working_type(self.operands.x)

    def returned(self, y: Array) -> Array:
        """y in x's own type and shape."""
        x = self.arrays.x
        y = y.astype(x.dtype)
        return y if y.ndim == x.ndim else jnp.squeeze(y, 0)


def options_of_calls() -> list[LayerOption]:
    """The options that a call depends on; others are of a layer's state alone."""
    return [
        option for option in OPTIONS if option.core is not None or option.name in Settings._fields
    ]


def make_settings(owner: str, read: Callable[[str], Any], *, training: bool) -> Settings:
    """Settings out of checked values, which `read` gives by the option's name."""
    core, rest = {}, {}
    for option in options_of_calls():
        value = read(option.name) if training or not option.training else option.kept
        if option.core is not None:
            core[option.core] = value
        else:
            rest[option.name] = value
    return Settings(owner, options=Options(**core), **rest)


def check_settings(owner: str, given: Mapping[str, Any], *, training: bool) -> Settings:
    """Settings out of a function's arguments; those that are no options are left out."""
    options = options_of_calls()
    named = {name: given[name] for name in list_arguments(options) if name in given}
    checked = check_arguments(options, named)
    return make_settings(owner, checked.__getitem__, training=training)


def make_call(arrays: Arrays, settings: Settings, training: bool, update: bool) -> Call:
    """The record of a call, if its arguments fit.

    Raises:
        TypeError: an array of a type that does not do.
        ValueError: shapes that do not fit.
        NameError: no transformation around this call binds `axis_name`.
    """
    x = check_input(arrays.x)
    size = settings.options.virtual_batch_size if training else None
    layout = make_layout(tuple(x.shape), settings.axis, size, least_rows=0)
    _check_groups(x, layout)
    arrays = arrays._replace(x=x)
    layout, operands = _make_operands(arrays, layout)
    merge = make_merge(settings.axis_name, settings.axis_index_groups) if training else None
    return Call(arrays, settings, training, update, layout, operands, merge)


def _make_operands(arrays: Arrays, layout: Layout) -> tuple[Layout, Operands]:
    x, mask = arrays.x, check_mask(arrays.mask)
    work = working_type(x)
    if mask is not None:
        fitted = layout.mask_shape(tuple(mask.shape))
    if len(layout.channel_axes) == x.ndim:
        layout = Layout((1, *x.shape), tuple(a + 1 for a in layout.channel_axes))
        x = jnp.expand_dims(x, 0)
        mask = None if mask is None else mask.reshape((1, *fitted))

    def channels(name: str, value: Any) -> Array | None:
        return check_channels(name, value, layout, work)

    kept = arrays.running or Running(None, None)
    return layout, Operands(
        x,
        mask,
        gamma=channels("scale", arrays.scale),
        beta=channels("bias", arrays.bias),
        mean=channels("running_mean", kept.mean),
        var=channels("running_var", kept.var),
        renorm_mean=channels("renorm_mean", kept.renorm_mean),
        renorm_stddev=channels("renorm_stddev", kept.renorm_stddev),
    )


def _check_groups(x: Array, layout: Layout) -> None:
    """Raise where jax could not split an explicitly sharded axis 0 into (v, groups) (S12)."""
    names = (*split_axes(x), None)[0]
    if layout.groups is None or names is None:
        return
    mesh = jax.typeof(x).sharding.mesh
    parts = math.prod(mesh.shape[name] for name in np.atleast_1d(names).tolist())
    size = layout.working[0]
    if size % parts != 0:
        raise ArgumentValueError(
            f"virtual_batch_size must be a multiple of the {parts} parts in which axis 0 "
            f"of x is sharded explicitly over {names!r}; got {size}. Call this inside "
            "jax.sharding.auto_axes, or inside jax.shard_map for groups that are local."
        )
