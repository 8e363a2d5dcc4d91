"""The options of a layer, each declared once.

Constructor, `configure`, repr, conversion, agreement of ranks, the memory of last calls, kernels'
refusals and the tests of documentation read these declarations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from inspect import Parameter, Signature
from operator import itemgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from batchnorm.core import config
from batchnorm.core.declaration import Option, list_arguments
from batchnorm.torch.private import find_transformation
from batchnorm.torch.ranks.groups import check_group

# Attributes that torch's own layer has, on which a call depends, and the one that `freeze` sets.
STATE = ("training", "frozen", "eps", "momentum", "num_features", "track_running_stats")


def _check_renorm(given: Mapping[str, Any]) -> config.Renorm | None:
    momentum = config.check_number("renorm_momentum", given["renorm_momentum"], 0.0, 1.0)
    return config.check_renorm(given["renorm"], given["renorm_clipping"], 1.0 - momentum)


def _split_renorm(kept: config.Renorm) -> dict[str, Any]:
    every = {"rmin": kept.rmin, "rmax": kept.rmax, "dmax": kept.dmax}
    limits = {name: value for name, value in every.items() if math.isfinite(value)}
    return {"renorm": True, "renorm_clipping": limits, "renorm_momentum": 1.0 - kept.decay}


def _check_synchronized(given: Mapping[str, Any]) -> bool:
    synchronized = config.check_flag("synchronized", given["synchronized"])
    check_group(synchronized, given["process_group"])
    return synchronized


def _agree_renorm(kept: config.Renorm) -> str:
    # In compiled code the limits are data, which no text can hold.
    if isinstance(kept.rmin, Tensor):
        return f"renorm={kept.decay}"
    return f"renorm={kept.decay}/{kept.rmin}/{kept.rmax}/{kept.dmax}"


def _check_adjustment(given: Mapping[str, Any]) -> config.Adjustment | None:
    return config.check_adjustment(given["adjustment"], given["virtual_batch_size"])


@dataclass(frozen=True)
class LayerOption(Option):
    """One option of the layer.

    Attributes:
        agreed: function from the value, a field of the core's Options, to the text that ranks
            compare before they merge; None if they may differ in it.
        shown: in the layer's repr, where it differs from `kept`.
        training_only: it changes nothing in evaluation.
        split: function from a value but `kept` to the arguments that make it, if they are several.
        original: torch's own layer may replace this one whatever the value is; if not, only where
            it is `kept`.
    """

    agreed: Callable[[Any], str] | None = None
    shown: bool = True
    training_only: bool = False
    split: Callable[[Any], dict[str, Any]] | None = None
    original: bool = False


class Origin(NamedTuple):
    """Properties of the class that layers of a class are converted from, and go back to.

    Attributes:
        options: names of those that come from the original's children.
        children: names of the modules that the layer calls on y, in this order.
        synchronized: the class of the original over all ranks.
    """

    options: tuple[str, ...] = ()
    children: tuple[str, ...] = ()
    synchronized: type[nn.Module] = nn.SyncBatchNorm


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
        training_only=True,
    ),
    LayerOption(
        "renorm",
        False,
        _check_renorm,
        parts={"renorm_clipping": None, "renorm_momentum": 0.01},
        core="renorm",
        agreed=_agree_renorm,
        training_only=True,
        split=_split_renorm,
    ),
    LayerOption("adjustment", None, _check_adjustment, training_only=True),
    LayerOption(
        "activation",
        None,
        lambda given: config.check_activation(given["activation"]),
        core="activation",
        agreed=lambda name: f"activation={name}",
    ),
    LayerOption(
        "padded_output",
        "normalize",
        lambda given: config.check_padded_output(given["padded_output"]),
        kept="normalize",
        core="padded_output",
    ),
    LayerOption(
        "debias",
        False,
        lambda given: config.check_flag("debias", given["debias"]),
        kept=False,
        core="debias",
        agreed=lambda debias: f"debias={debias}",
        training_only=True,
    ),
    LayerOption(
        "single_value",
        "raise",
        lambda given: config.check_single_value(given["single_value"]),
        kept="raise",
        training_only=True,
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


def change_arguments(layer: Any, told: Mapping[str, Any]) -> dict[str, Any]:
    """All arguments of options: the layer's present ones, but those that it is told."""
    found = list_arguments(OPTIONS)
    for option in OPTIONS:
        if option.parts and option.name in told and told[option.name] == option.default:
            continue  # switched off with its parts
        value = getattr(layer, option.name)
        if value != option.kept:
            found |= {option.name: value} if option.split is None else option.split(value)
    return {**found, "process_group": layer.process_group, **told}


class _Unchanged:
    """The default of arguments that change nothing where they are left out."""

    def __repr__(self) -> str:
        return "unchanged"


def make_signature() -> Signature:
    """The signature of a method that takes every option as a keyword, and changes those only."""
    kind, default = Parameter.KEYWORD_ONLY, _Unchanged()
    return Signature(
        [
            Parameter("self", Parameter.POSITIONAL_OR_KEYWORD),
            *(Parameter(name, kind, default=default) for name in list_arguments(OPTIONS)),
        ]
    )


def find_obstacle(layer: Any, *, training: bool = True, original: bool = False) -> str | None:
    """The property of a layer that another lacks, as a phrase; or None.

    `training`: the other would train; if not, it only evaluates. `original`: it is of the class
    that the layer was converted from; if not, torch's own.
    """
    if training and layer.frozen:
        return "is frozen (call unfreeze() first)"
    for name in () if original else layer.origin.children:
        if type(child := getattr(layer, name)) is not nn.Identity:
            return f"calls a {type(child).__name__} on its output"
    for option in OPTIONS:
        value = getattr(layer, option.name)
        if original and option.name in layer.origin.options:
            continue
        matters = not option.original and (training or not option.training_only)
        if matters and value != option.kept:
            return f"has {option.name}={value!r}"
    return None


def make_reader() -> Callable[[Any], tuple[Any, ...]]:
    """A function that reads from a layer all that its calls depend on but tensors."""
    return itemgetter(*STATE, *(option.name for option in OPTIONS))


def make_core(eps: float, decay: float | None, values: tuple[Any, ...]) -> config.Options:
    """The core's Options; `values`: of the options named in CORE."""
    return config.Options(eps, decay, True, **dict(zip(_FIELDS, values, strict=True)))


cached_core = lru_cache(maxsize=1024)(make_core)


def find_options(layer: Any, padded_output: str) -> config.Options:
    """The core's Options of a layer's call; `padded_output`: its own, or that of a block."""
    decay = None if layer.num_batches_tracked is not None else 1.0
    if layer.momentum is not None:
        decay = 1.0 - layer.momentum
    values = [getattr(layer, name) for name in CORE]
    values[_PADDED_OUTPUT] = padded_output
    if not torch.compiler.is_compiling() and (
        layer.renorm is None or find_transformation() is None
    ):
        return cached_core(layer.eps, decay, tuple(values))
    values[_RENORM] = layer.traced_renorm()
    return make_core(layer.eps, decay, tuple(values))


_PADDED_OUTPUT, _RENORM = CORE.index("padded_output"), CORE.index("renorm")


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
