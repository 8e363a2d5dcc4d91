"""Exchanging the batch norms of a whole nnx model."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from inspect import signature
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax import Array

from batchnorm.core.conversion import Conversion, check_choice, check_report, describe_left
from batchnorm.core.declaration import check_arguments, check_known, list_arguments
from batchnorm.core.errors import ArgumentTypeError, names_errors
from batchnorm.core.running import LONG_RUNNING, derive_renorm
from batchnorm.jax.checks import wide_type
from batchnorm.jax.layers import BatchNorm
from batchnorm.jax.namespace import XP
from batchnorm.jax.options import OPTIONS
from batchnorm.jax.state import RENORM
from batchnorm.jax.variables import Momentum, hold_renorm

__all__ = ["convert_batchnorm"]

_FLAX_PROMOTES = signature(nnx.BatchNorm.__init__).parameters["promote_dtype"].default


@names_errors("convert_batchnorm")
def convert_batchnorm(
    module: nnx.Module,
    *,
    only: str | Sequence[str] | None = None,
    skip: str | Sequence[str] | None = None,
    report: list[Conversion] | None = None,
    **options: Any,
) -> nnx.Module:
    """Make every flax batch norm inside `module` one of this library's, in place.

    Args:
        module: any nnx module, or a single batch norm; outside of transformations.
        only: pattern for names, as of `fnmatch`, or several: other layers keep their class. A
            name is the path in the module, like `blocks.0.norm`.
        skip: patterns for names of layers to leave alone; they win over `only`.
        report: a list that gets one `Conversion` for each batch norm that is not yet this
            library's.
        **options: options of `BatchNorm` for all of them: momentum, epsilon, dtype, axis_name,
            axis_index_groups, virtual_batch_size, renorm, renorm_clipping, renorm_momentum,
            debias, padded_output, fused, promote_dtype.

    Layers stay the very same objects, wherever they are held: in lists, dicts, `nnx.Sequential`,
    several places. So do their variables, so that optimizers go on working; statistics of half
    precision become float32 (S16). Modules whose arrays `nnx.vmap` or `nnx.scan` has stacked along
    leading axes get a momentum with the same axes, and what options add too. With debias,
    statistics of 0 and 1 in every channel have seen no step, others countless ones: flax has no
    counter (S23). The evaluation flag is kept. flax's own `promote_dtype` gives way to S16: y has
    the input's type, or `dtype`. What else is made from the module's structure, such as a graph
    definition or a compiled step with `nnx.split` states, must be made anew: `momentum` is a
    variable.

    Returns:
        `module`.

    Raises:
        TypeError: not a module, or an unknown option.
        ValueError: a bad option. The module is unchanged then.

    Warns:
        UserWarning: layers that were left alone, with the reasons.

    >>> model = nnx.Sequential(nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    >>> type(convert_batchnorm(model).layers[0]).__module__
    'batchnorm.jax.layers'
    """
    _check_call(module, options)
    choice = check_choice(only, skip)
    report = check_report(report)
    left: list[Conversion] = []
    found: list[tuple[Any, Conversion]] = []
    for path, layer in nnx.iter_modules(module):
        if not isinstance(layer, nnx.BatchNorm):
            continue
        name = ".".join(map(str, path))
        refused = choice.refuse(name)
        reason = refused or _reason_to_leave(layer)
        found.append((layer, Conversion(name, type(layer), None if reason else BatchNorm, reason)))
        if reason and not refused:
            left.append(found[-1][1])
    chosen = [layer for layer, one in found if not one.reason]
    made = [_attributes_for(layer, options) for layer in chosen]
    for layer, attributes in zip(chosen, made, strict=True):
        _become_ours(layer, attributes)
    report.extend(one for _, one in found)
    if left:
        warnings.warn(f"convert_batchnorm: left alone: {describe_left(left)}.", stacklevel=3)
    return module


def _stack_of(layer: Any) -> tuple[int, ...]:
    """The leading axes of stacked layers; () for a layer by itself."""
    return tuple(layer.mean[...].shape[:-1])


def _reason_to_leave(layer: Any) -> str:
    """The reason why a layer cannot be exchanged, or an empty string."""
    if type(layer) is not nnx.BatchNorm:
        return "a subclass may compute something else"
    if layer.use_running_average is None:
        return "it demands use_running_average at each call, which ours does not; set it first"
    variables = (layer.mean, layer.var, layer.scale, layer.bias)
    shapes = {v[...].shape for v in variables if v is not None}
    if len(shapes) > 1 or next(iter(shapes))[-1:] != (layer.num_features,):
        return "its arrays are stacked along other than leading axes; stack with axis 0"
    return ""


def _attributes_for(layer: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The attributes that make a layer ours, all of them checked."""
    held = {name: getattr(layer, name) for name in list_arguments(OPTIONS) if hasattr(layer, name)}
    if held["promote_dtype"] is _FLAX_PROMOTES:
        held["promote_dtype"] = None
    for name in ("bias_metadata", "scale_metadata"):
        held.pop(name, None)
    return check_arguments(OPTIONS, held | options)


def _become_ours(layer: Any, attributes: dict[str, Any]) -> None:
    """Change the class of a layer; its variables and holders stay."""
    stack, evaluating = _stack_of(layer), layer.use_running_average
    for name in ("momentum", "use_running_average", "use_fast_variance"):
        delattr(layer, name)
    object.__setattr__(layer, "__class__", BatchNorm)
    momentum = attributes.pop("momentum")
    layer.momentum = Momentum(jnp.full(stack, momentum, jnp.float32))
    attributes["renorm"] = hold_renorm(attributes["renorm"], stack, wide_type(layer.param_dtype))
    for name, value in attributes.items():
        setattr(layer, name, value)
    layer.training, layer.frozen, layer.initialized = not evaluating, False, True
    for variable in (layer.mean, layer.var):
        if variable[...].dtype in (jnp.float16, jnp.bfloat16):
            variable.set_value(variable[...].astype(jnp.float32))
    if layer.renorm is not None:
        mean, stddev = derive_renorm(layer.mean[...], layer.var[...], eps=layer.epsilon, xp=XP)
        for name, value in zip(RENORM, (stddev, mean, stddev), strict=True):
            # A copy: a donated buffer must belong to one variable only.
            setattr(layer, name, nnx.BatchStat(jnp.array(value, copy=True)))
    if layer.debias:
        layer.steps = nnx.BatchStat(_count_steps(layer.mean[...], layer.var[...]))


def _count_steps(mean: Array, var: Array) -> Array:
    """Steps of statistics that nobody has counted: none before the first (S23)."""
    new = jnp.all((mean == 0) & (var == 1), axis=-1)
    return jnp.where(new, 0, LONG_RUNNING).astype(jnp.int32)


def _check_call(module: Any, options: dict[str, Any]) -> None:
    if not isinstance(module, nnx.Module):
        raise ArgumentTypeError(f"module must be a flax.nnx.Module; got {type(module).__name__}.")
    check_known((option for option in OPTIONS if option.converts), options)
    check_arguments(OPTIONS, options)
