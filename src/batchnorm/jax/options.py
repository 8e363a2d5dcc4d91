"""The options of the layer, each declared once.

The layer's constructor and attributes, the record of a call, the functions' checks, kernels'
refusals, folding and the tests of signatures and documentation read these declarations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from batchnorm.core import config
from batchnorm.core.declaration import Option
from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError
from batchnorm.core.layout import check_axis
from batchnorm.jax.checks import FLOATING, read_values
from batchnorm.jax.synchronize import Groups

_NOTHING: Mapping[str, Any] = MappingProxyType({})


@dataclass(frozen=True)
class LayerOption(Option):
    """One option of the layer.

    Attributes:
        training: it matters in training alone; in evaluation a call has `kept`.
        folds: a layer in evaluation is an affine map with any value; if not, only one with `kept`
            can be folded.
    """

    training: bool = False
    folds: bool = True


def _option(name: str, default: Any, check: Callable[[Any], Any], **rest: Any) -> LayerOption:
    """An option whose value is made from its own argument alone."""
    rest.setdefault("kept", default)
    return LayerOption(name, default, lambda given: check(given[name]), **rest)


def _as_given(value: Any) -> Any:
    return value


def _check_axis(axis: Any) -> int | tuple[int, ...]:
    axes = check_axis(axis)
    return axis if isinstance(axis, int) else axes


def _check_features(given: Mapping[str, Any]) -> int | tuple[int, ...] | None:
    return check_features(given["num_features"], given["features_in"], check_axis(given["axis"]))


def _check_renorm(given: Mapping[str, Any]) -> config.Renorm | None:
    decay = config.check_number("renorm_momentum", given["renorm_momentum"], 0.0, 1.0)
    clipping: Any = given["renorm_clipping"]
    traced: dict[str, Any] = {}
    if isinstance(clipping, Mapping):
        known, traced = split_limits(clipping)
        clipping = {**dict.fromkeys(clipping), **known}
    renorm = config.check_renorm(given["renorm"], clipping, decay)
    return renorm if renorm is None else replace(renorm, **traced)


def split_limits(limits: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Array]]:
    """Limits of renormalization whose values are known now, and scalar arrays that are traced."""
    known, traced = {}, {}
    for name, value in limits.items():
        if not isinstance(value, Array):
            known[name] = value
            continue
        if value.shape or not jnp.issubdtype(value.dtype, jnp.floating):
            raise ArgumentTypeError(
                f"limits of renormalization must be numbers or floating scalars; got {name} of "
                f"type {value.dtype} and shape {tuple(value.shape)}."
            )
        values = read_values(value)
        if values is None:
            traced[name] = value
        else:
            known[name] = float(values)
    return known, traced


def check_update(value: Any) -> bool:
    """`update_statistics` if it is a bool (S20)."""
    if isinstance(value, jax.core.Tracer):
        raise ArgumentTypeError(
            "update_statistics must be True or False when a program is traced; got a traced value. "
            "Make it static (static_argnames), or choose between two calls with jax.lax.cond."
        )
    return config.check_flag("update_statistics", value)


def check_features(
    num_features: Any, features_in: Any, axes: Sequence[int]
) -> int | tuple[int, ...] | None:
    """The size of each channel axis, or None where an input will tell."""
    if num_features is not None and features_in is not None:
        raise ArgumentValueError(
            f"features_in is an alias of num_features; got {num_features!r} and "
            f"{features_in!r}. Give one of them."
        )
    value = features_in if num_features is None else num_features
    if value is None:
        return None
    sizes = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in sizes):
        raise ArgumentTypeError(
            f"num_features must be an int of at least 0, or a tuple of them with several "
            f"axes; got {value!r}."
        )
    if len(sizes) != len(axes):
        raise ArgumentValueError(
            f"num_features must have one size for each channel axis; got {value!r} for "
            f"axis {tuple(axes) if len(axes) > 1 else axes[0]}."
        )
    return sizes if len(sizes) > 1 else sizes[0]


def check_dtype(name: str, value: Any) -> Any:
    """`value` as a floating dtype, or None."""
    if value is None:
        return None
    dtype = jnp.dtype(value)
    if dtype.name not in FLOATING:
        raise ArgumentTypeError(
            f"{name} must be float16, bfloat16, float32 or float64; got {value!r}."
        )
    return dtype


def freeze_groups(groups: Groups) -> tuple[tuple[int, ...], ...] | None:
    """Groups as a hashable value."""
    return None if groups is None else tuple(tuple(int(i) for i in group) for group in groups)


def freeze_metadata(metadata: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    """Metadata as a hashable value."""
    return tuple(metadata.items())


# The layer keeps all values but momentum's as static attributes, which must be hashable.
OPTIONS: list[LayerOption] = [
    _option("axis", -1, _check_axis, converts=False),
    LayerOption("num_features", None, _check_features, parts={"features_in": None}, converts=False),
    _option(
        "momentum",
        0.99,
        lambda value: config.check_number("momentum", value, 0.0, 1.0),
        core="decay",
        training=True,
    ),
    _option(
        "epsilon",
        1e-5,
        lambda value: config.check_number("epsilon", value, 0.0),
        core="eps",
    ),
    _option("dtype", None, lambda value: check_dtype("dtype", value)),
    _option(
        "param_dtype",
        jnp.float32,
        lambda value: check_dtype("param_dtype", value),
        kept=jnp.dtype("float32"),
        converts=False,
    ),
    _option("use_bias", True, lambda value: config.check_flag("use_bias", value), converts=False),
    _option("use_scale", True, lambda value: config.check_flag("use_scale", value), converts=False),
    _option("bias_init", jax.nn.initializers.zeros, _as_given, converts=False),
    _option("scale_init", jax.nn.initializers.ones, _as_given, converts=False),
    _option("bias_metadata", _NOTHING, freeze_metadata, kept=(), converts=False),
    _option("scale_metadata", _NOTHING, freeze_metadata, kept=(), converts=False),
    _option("axis_name", None, _as_given, training=True),
    _option("axis_index_groups", None, freeze_groups, training=True),
    _option(
        "virtual_batch_size",
        None,
        config.check_virtual_batch_size,
        core="virtual_batch_size",
        training=True,
    ),
    LayerOption(
        "renorm",
        False,
        _check_renorm,
        parts={"renorm_clipping": None, "renorm_momentum": 0.99},
        core="renorm",
        training=True,
    ),
    _option(
        "debias",
        False,
        lambda value: config.check_flag("debias", value),
        core="debias",
        training=True,
    ),
    _option(
        "padded_output",
        "normalize",
        config.check_padded_output,
        core="padded_output",
        folds=False,  # a linear map knows no padding
    ),
    _option("fused", None, config.check_fused),
    _option("promote_dtype", None, _as_given),
]
