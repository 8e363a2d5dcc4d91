"""The options of a batch normalization: checked once, in one convention."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError

ACTIVATIONS = ("relu", "leaky_relu")
NEGATIVE_SLOPE = 0.01
PADDED_OUTPUTS = ("normalize", "zero")
SINGLE_VALUES = ("raise", "beta", "running")
RESCALES = (None, "any", "all")  # rules for a mask at a coarser resolution
_CLIPPING_KEYS = ("rmin", "rmax", "dmax")

Adjustment = Callable[[tuple[int, ...]], tuple[Any, Any]]


@dataclass(frozen=True)
class Renorm:
    """Batch renormalization (S11): the decay of its own averages and the clipping of r and d.

    The limits may be scalar arrays: traced code takes them as data.
    """

    decay: float = 0.99
    rmin: Any = 0.0
    rmax: Any = math.inf
    dmax: Any = math.inf


@dataclass(frozen=True)
class Options:
    """The options of a call in the core's terms, already validated.

    Attributes:
        eps: added to the variance, at least 0.
        decay: weight of the old running value, a number or a scalar array; None for the
            cumulative average (S9).
        unbiased: store the unbiased variance (S10).
        virtual_batch_size: samples of one ghost batch (S12).
        renorm: batch renormalization, or None (S11).
        activation: None, "relu" or "leaky_relu" (S18).
        correction: the normalizer's variance divides by `count - correction`.
        padded_output: padded rows of y: "normalize", as real ones; "zero", exactly 0 (S4).
        debias: weigh the batch so that the running average forgets its start at once (S23).
    """

    eps: float = 1e-5
    decay: Any = 0.9
    unbiased: bool = False
    virtual_batch_size: int | None = None
    renorm: Renorm | None = None
    activation: str | None = None
    correction: int = 0
    padded_output: str = PADDED_OUTPUTS[0]
    debias: bool = False

    @property
    def zero_padding(self) -> bool:
        """True if padded rows of y are 0 (S4)."""
        return self.padded_output == "zero"


def check_number(name: str, value: Any, low: float, high: float = math.inf) -> float:
    """`value` as a float in [low, high]."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise ArgumentTypeError(
            f"{name} must be a real number; got {value!r} of type {type(value).__name__}."
        )
    number = float(value)
    if not low <= number <= high or number == math.inf:
        rule = f"at least {low:g}" if math.isinf(high) else f"between {low:g} and {high:g}"
        raise ArgumentValueError(f"{name} must be finite and {rule}; got {value!r}.")
    return number


def check_flag(name: str, value: Any) -> bool:
    """`value` if it is a bool."""
    if not isinstance(value, bool):
        raise ArgumentTypeError(
            f"{name} must be True or False; got {value!r} of type {type(value).__name__}."
        )
    return value


def check_fused(value: Any) -> bool | None:
    """`value` if it is a bool or None."""
    if value is not None and not isinstance(value, bool):
        raise ArgumentTypeError(
            f"fused must be None (the fastest path), True (demand a kernel) or False "
            f"(plain array code); got {value!r}."
        )
    return value


def check_virtual_batch_size(value: Any) -> int | None:
    """`value` if it is a positive int or None."""
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ArgumentTypeError(
            f"virtual_batch_size must be a positive int or None; got {value!r} of type "
            f"{type(value).__name__}."
        )
    if value <= 0:
        raise ArgumentValueError(
            f"virtual_batch_size must be positive; got {value}. Use None for no ghost batches."
        )
    return int(value)


def check_size(value: Any) -> int:
    """`value` if it is a number of positions."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise ArgumentTypeError(
            f"size must be an int; got {value!r} of type {type(value).__name__}."
        )
    if value < 0:
        raise ArgumentValueError(f"size must be at least 0; got {value}.")
    return int(value)


def check_activation(value: Any) -> str | None:
    """`value` if it names an activation of S18."""
    if value is None:
        return None
    if isinstance(value, str) and value in ACTIVATIONS:
        return value
    names = ", ".join(repr(name) for name in ACTIVATIONS)
    raise ArgumentValueError(f"activation must be None, {names}; got {value!r}.")


def check_padded_output(value: Any) -> str:
    """`value` if it names what padded rows of y hold (S4)."""
    if isinstance(value, str) and value in PADDED_OUTPUTS:
        return value
    names = " or ".join(f'"{name}"' for name in PADDED_OUTPUTS)
    raise ArgumentValueError(f"padded_output must be {names}; got {value!r}.")


def check_single_value(value: Any) -> str:
    """`value` if it names what becomes of a single value per channel (S7)."""
    if isinstance(value, str) and value in SINGLE_VALUES:
        return value
    names = ", ".join(f'"{name}"' for name in SINGLE_VALUES)
    raise ArgumentValueError(f"single_value must be one of {names}; got {value!r}.")


def check_block(rescale: Any, padded_output: Any) -> None:
    """Check the options of `padding_mask` that all front ends have."""
    if rescale not in RESCALES:
        raise ArgumentValueError(f'rescale must be None, "any" or "all"; got {rescale!r}.')
    if padded_output is not None and padded_output not in PADDED_OUTPUTS:
        names = " or ".join(f'"{name}"' for name in PADDED_OUTPUTS)
        raise ArgumentValueError(f"padded_output must be None, {names}; got {padded_output!r}.")


def check_adjustment(value: Any, virtual_batch_size: int | None) -> Adjustment | None:
    """`value` if it is callable and no ghost batches are asked for (S13)."""
    if value is None:
        return None
    if not callable(value):
        raise ArgumentTypeError(
            f"adjustment must be a function of x's shape that returns (scale, bias), "
            f"or None; got {value!r}."
        )
    if virtual_batch_size is not None:
        raise ArgumentValueError(
            f"adjustment cannot be combined with virtual_batch_size="
            f"{virtual_batch_size}; drop one of the two."
        )
    return value  # type: ignore[no-any-return]


def call_adjustment(adjustment: Adjustment | None, shape: tuple[int, ...]) -> tuple[Any, Any]:
    """Scale and bias for an input of this shape, each None where there is none (S13)."""
    if adjustment is None:
        return None, None
    found = adjustment(shape)
    if not isinstance(found, (tuple, list)) or len(found) != 2:
        raise ArgumentTypeError(
            f"adjustment must return a pair (scale, bias); got {type(found).__name__}. "
            "Either of the two may be None."
        )
    return found[0], found[1]


def check_renorm(renorm: Any, clipping: Mapping[str, Any] | None, decay: float) -> Renorm | None:
    """The renormalization asked for, or None; `clipping` may hold rmin, rmax and dmax."""
    if not check_flag("renorm", renorm):
        if clipping is not None:
            raise ArgumentValueError(
                f"renorm_clipping needs renorm=True; got renorm=False and "
                f"renorm_clipping={clipping!r}."
            )
        return None
    if clipping is None:
        return Renorm(decay)
    if not isinstance(clipping, Mapping):
        raise ArgumentTypeError(
            f"renorm_clipping must be a dict with keys among {_CLIPPING_KEYS}; got {clipping!r}."
        )
    return _clipped_renorm(clipping, decay)


def _clipped_renorm(clipping: Mapping[str, Any], decay: float) -> Renorm:
    unknown = sorted(str(key) for key in clipping if key not in _CLIPPING_KEYS)
    if unknown:
        raise ArgumentValueError(
            f"renorm_clipping takes the keys {_CLIPPING_KEYS}; got {', '.join(unknown)}."
        )
    limits = {
        key: check_number(f"renorm_clipping[{key!r}]", value, 0.0)
        for key, value in clipping.items()
        if value is not None
    }
    return _ordered(Renorm(decay, **limits), "renorm_clipping needs")


def change_clipping(renorm: Renorm | None, limits: Mapping[str, Any]) -> Renorm:
    """The renormalization with other limits; those that are None stay as they are (S11)."""
    if renorm is None:
        raise ArgumentValueError("the layer has renorm=False, and no limits to set. Switch it on.")
    checked = {
        name: math.inf if value == math.inf and name != "rmin" else check_number(name, value, 0.0)
        for name, value in limits.items()
        if value is not None
    }
    return _ordered(replace(renorm, **checked), "limits of renormalization need")


def _ordered(renorm: Renorm, rule: str) -> Renorm:
    if renorm.rmax < renorm.rmin:
        raise ArgumentValueError(
            f"{rule} rmax >= rmin; got rmax={renorm.rmax:g} and rmin={renorm.rmin:g}."
        )
    return renorm
