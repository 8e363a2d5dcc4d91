"""The options of a layer, each declared once.

Constructor, `configure`, repr, conversion, agreement of ranks, the memory of last calls, kernels'
refusals and the tests of documentation read these declarations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from inspect import Parameter, Signature
from operator import attrgetter
from typing import Any

from batchnorm.core import config
from batchnorm.core.declaration import Option, list_arguments
from batchnorm.torch.ranks.groups import check_group

# Attributes that torch's own layer has, on which a call depends, and the one that `freeze` sets.
STATE = ("training", "frozen", "eps", "momentum", "num_features", "track_running_stats")


def _check_renorm(given: Mapping[str, Any]) -> config.Renorm | None:
    momentum = config.check_number("renorm_momentum", given["renorm_momentum"], 0.0, 1.0)
    return config.check_renorm(given["renorm"], given["renorm_clipping"], 1.0 - momentum)


def _check_synchronized(given: Mapping[str, Any]) -> bool:
    synchronized = config.check_flag("synchronized", given["synchronized"])
    check_group(synchronized, given["process_group"])
    return synchronized


def _check_adjustment(given: Mapping[str, Any]) -> config.Adjustment | None:
    return config.check_adjustment(given["adjustment"], given["virtual_batch_size"])


@dataclass(frozen=True)
class LayerOption(Option):
    """One option of the layer.

    Attributes:
        agreed: function from the value, a field of the core's Options, to the text that ranks
            compare before they merge; None if they may differ in it.
        shown: in the layer's repr, where it differs from `kept`.
        converts: conversion of whole models takes it.
        original: torch's own layer may replace this one whatever the value is; if not, only where
            it is `kept`.
    """

    agreed: Callable[[Any], str] | None = None
    shown: bool = True
    converts: bool = True
    original: bool = False


OPTIONS: list[LayerOption] = [
    LayerOption(
        "axis",
        1,
        lambda given: given["axis"],  # with num_features, and against x's rank
        kept=1,
        converts=False,
    ),
    LayerOption(
        "virtual_batch_size",
        None,
        lambda given: config.check_virtual_batch_size(given["virtual_batch_size"]),
        core="virtual_batch_size",
        agreed=lambda size: f"virtual_batch_size={size}",
    ),
    LayerOption(
        "renorm",
        False,
        _check_renorm,
        parts={"renorm_clipping": None, "renorm_momentum": 0.01},
        core="renorm",
        agreed=lambda r: f"renorm={r.decay}/{r.rmin}/{r.rmax}/{r.dmax}",
    ),
    LayerOption("adjustment", None, _check_adjustment),
    LayerOption(
        "activation",
        None,
        lambda given: config.check_activation(given["activation"]),
        core="activation",
        agreed=lambda name: f"activation={name}",
    ),
    LayerOption(
        "fused",
        None,
        lambda given: config.check_fused(given["fused"]),
        original=True,
    ),
    LayerOption(
        "synchronized",
        False,
        _check_synchronized,
        parts={"process_group": None},
        kept=False,
        original=True,
    ),
]


CORE = tuple(option.name for option in OPTIONS if option.core is not None)
_FIELDS = tuple(option.core for option in OPTIONS if option.core is not None)


def convertible() -> dict[str, Any]:
    """The arguments of options that a whole model can be converted with, and their defaults."""
    return list_arguments(option for option in OPTIONS if option.converts)


def make_signature() -> Signature:
    """The signature of a method that takes every option as a keyword."""
    options = list_arguments(OPTIONS).items()
    return Signature(
        [
            Parameter("self", Parameter.POSITIONAL_OR_KEYWORD),
            *(Parameter(name, Parameter.KEYWORD_ONLY, default=value) for name, value in options),
        ]
    )


def make_reader() -> Callable[[Any], tuple[Any, ...]]:
    """A function that reads from a layer all that its calls depend on but tensors."""
    return attrgetter(*STATE, *(option.name for option in OPTIONS))


def make_core(eps: float, decay: float | None, values: tuple[Any, ...]) -> config.Options:
    """The core's Options; `values`: of the options named in CORE."""
    return config.Options(eps, decay, True, **dict(zip(_FIELDS, values, strict=True)))


cached_core = lru_cache(maxsize=1024)(make_core)


def describe_agreed(options: config.Options) -> list[str]:
    """The options beside eps and decay that ranks must agree on, for people to read."""
    return [
        option.agreed(value)
        for option in OPTIONS
        if option.agreed is not None
        and (value := getattr(options, option.core or option.name)) != option.kept
    ]


# Asked at every call that is not the last one again.
UNSERVED = [option for option in OPTIONS if not option.kernels]
