"""The options of a layer, each declared once.

Constructor, `configure`, repr, conversion, agreement of ranks, the memory of last calls, kernels'
refusals and the tests of documentation read these declarations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
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


OPTIONS: list[Option] = [
    Option(
        "axis",
        1,
        lambda given: given["axis"],  # with num_features, and against x's rank
        kept=1,
        converts=False,
    ),
    Option(
        "virtual_batch_size",
        None,
        lambda given: config.check_virtual_batch_size(given["virtual_batch_size"]),
        core=True,
        agreed=lambda size: f"virtual_batch_size={size}",
    ),
    Option(
        "renorm",
        False,
        _check_renorm,
        parts={"renorm_clipping": None, "renorm_momentum": 0.01},
        core=True,
        agreed=lambda r: f"renorm={r.decay}/{r.rmin}/{r.rmax}/{r.dmax}",
    ),
    Option("adjustment", None, _check_adjustment),
    Option(
        "activation",
        None,
        lambda given: config.check_activation(given["activation"]),
        core=True,
        agreed=lambda name: f"activation={name}",
    ),
    Option(
        "fused",
        None,
        lambda given: config.check_fused(given["fused"]),
        original=True,
    ),
    Option(
        "synchronized",
        False,
        _check_synchronized,
        parts={"process_group": None},
        kept=False,
        original=True,
    ),
]


CORE = tuple(option.name for option in OPTIONS if option.core)


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
    return config.Options(eps, decay, True, **dict(zip(CORE, values, strict=True)))


cached_core = lru_cache(maxsize=1024)(make_core)


def describe_agreed(options: config.Options) -> list[str]:
    """The options beside eps and decay that ranks must agree on, for people to read."""
    return [
        option.agreed(value)
        for option in OPTIONS
        if option.agreed is not None and (value := getattr(options, option.name)) != option.kept
    ]


UNSERVED = [option for option in OPTIONS if option.core and not option.kernels]


def refuse_options(options: config.Options) -> str | None:
    """The option of the core that no kernel computes, as a reason, or None."""
    for option in UNSERVED:
        if getattr(options, option.name) != option.kept:
            return f"none computes {option.name}"
    return None
