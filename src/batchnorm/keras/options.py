"""The options of the layers, each declared once.

Constructors, attributes, configs, the record of a call, the checks before kernels are demanded,
tools that change a layer, and the tests of signatures and documentation read these declarations.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from functools import partial
from typing import Any

import keras

from batchnorm.core import config, declaration
from batchnorm.core.declaration import Option, check_arguments, list_arguments
from batchnorm.core.errors import ArgumentValueError
from batchnorm.core.layout import check_axis
from batchnorm.keras.call import Call

BACKENDS = ("tensorflow", "jax", "torch")


class Saved(Enum):
    """The configs that hold an option."""

    ALWAYS = "every one, as those of Keras's own layer"
    WHEN_SET = "those of layers with another value than the default"
    NEVER = "none"


def as_plain(value: Any) -> Any:
    """An attribute as the user gave it; Keras keeps lists and dicts in classes of its own."""
    if isinstance(value, Mapping):
        return dict(value)
    return list(value) if isinstance(value, list) else value


@dataclass(frozen=True)
class LayerOption(Option):
    """One option of the layers, which keep an attribute for each of its arguments.

    Attributes:
        as_given: attributes are the arguments as they came; if not, there is one, the value.
        in_call: the value is a field of the record of a call, of the same name.
        saved: the configs that hold it.
        serialize: from an attribute to what a config holds.
        loss: for a warning where it is set and the config leaves it out; empty for no warning.
        unserved: backends without a kernel for any value but `kept`, and the reason.
        packed: MaskedBatchNormalization takes it.
    """

    as_given: bool = False
    in_call: bool = False
    saved: Saved = Saved.WHEN_SET
    serialize: Callable[[Any], Any] = as_plain
    loss: str = ""
    unserved: Mapping[str, str] = field(default_factory=dict)
    packed: bool = True

    @property
    def arguments(self) -> tuple[str, ...]:
        """The names of its arguments."""
        return (self.name, *self.parts)

    def is_set(self, layer: Any) -> bool:
        """True where a layer has another value than the default."""
        return bool(getattr(layer, self.name) != self.default)


def _check_size(given: Mapping[str, Any]) -> int | None:
    size = config.check_virtual_batch_size(given["virtual_batch_size"])
    check_ghost_axes(size, check_axis(given["axis"]), given["axis"])
    return size


def _check_renorm(given: Mapping[str, Any]) -> config.Renorm | None:
    decay = config.check_number("renorm_momentum", given["renorm_momentum"], 0.0, 1.0)
    return config.check_renorm(given["renorm"], given["renorm_clipping"], decay)


def _check_fused(given: Mapping[str, Any]) -> bool | None:
    fused = config.check_fused(given["fused"])
    if fused and given["synchronized"]:
        raise ArgumentValueError(
            "fused=True cannot be combined with synchronized=True; use fused=None for "
            "the fastest path there is."
        )
    return fused


def _check_participants(name: str, backend: str, given: Mapping[str, Any]) -> Any:
    value = given[name]
    if value is None:
        return None
    if keras.backend.backend() != backend:
        raise ArgumentValueError(
            f"{name} is for the {backend} backend; got {name}={value!r} on "
            f"{keras.backend.backend()}. Leave it out."
        )
    if not given["synchronized"]:
        raise ArgumentValueError(
            f"{name} chooses whom to synchronize with and needs synchronized=True; got False."
        )
    return value


def _declare_number(name: str, default: float, core: str, high: float) -> LayerOption:
    def check(given: Mapping[str, Any]) -> float:
        return config.check_number(name, given[name], 0.0, high)

    return LayerOption(name, default, check, kept=default, core=core, saved=Saved.ALWAYS)


def _declare_parameter(name: str) -> LayerOption:
    """A parameter to learn, or not."""
    return LayerOption(
        name, True, lambda given: given[name], kept=True, saved=Saved.ALWAYS, converts=False
    )


def _declare_object(name: str, default: Any, module: Any) -> LayerOption:
    """An object of Keras's, or its name."""

    def check(given: Mapping[str, Any]) -> Any:
        return module.get(given[name])

    return LayerOption(
        name, default, check, saved=Saved.ALWAYS, serialize=module.serialize, converts=False
    )


def _declare_participants(name: str, backend: str) -> LayerOption:
    """Those whom layers of one backend synchronize with."""
    check = partial(_check_participants, name, backend)
    return LayerOption(name, None, check, in_call=True, saved=Saved.NEVER)


# In the order of configs.
OPTIONS: list[LayerOption] = [
    _declare_number("momentum", 0.99, "decay", 1.0),
    _declare_number("epsilon", 1e-3, "eps", float("inf")),
    _declare_parameter("center"),
    _declare_parameter("scale"),
    LayerOption(
        "axis",
        -1,
        lambda given: check_axis(given["axis"]),  # against x's rank when the layer is built
        kept=(-1,),
        as_given=True,
        saved=Saved.ALWAYS,
        converts=False,
    ),
    _declare_object("beta_initializer", "zeros", keras.initializers),
    _declare_object("gamma_initializer", "ones", keras.initializers),
    _declare_object("moving_mean_initializer", "zeros", keras.initializers),
    _declare_object("moving_variance_initializer", "ones", keras.initializers),
    _declare_object("beta_regularizer", None, keras.regularizers),
    _declare_object("gamma_regularizer", None, keras.regularizers),
    _declare_object("beta_constraint", None, keras.constraints),
    _declare_object("gamma_constraint", None, keras.constraints),
    LayerOption(
        "adjustment",
        None,
        lambda given: config.check_adjustment(given["adjustment"], given["virtual_batch_size"]),
        in_call=True,
        saved=Saved.NEVER,
        loss="is a function and left out of the config; give it again after loading",
        unserved=dict.fromkeys(BACKENDS, "none takes an adjustment"),
    ),
    LayerOption(
        "synchronized",
        False,
        lambda given: config.check_flag("synchronized", given["synchronized"]),
        kept=False,
        in_call=True,
        saved=Saved.ALWAYS,
        unserved={"tensorflow": "there is none for synchronized statistics with TensorFlow"},
    ),
    LayerOption(
        "renorm",
        False,
        _check_renorm,
        parts={"renorm_clipping": None, "renorm_momentum": 0.99},
        as_given=True,
        core="renorm",
        packed=False,
    ),
    LayerOption("virtual_batch_size", None, _check_size, core="virtual_batch_size", packed=False),
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
    ),
    LayerOption("fused", None, _check_fused, in_call=True, saved=Saved.NEVER),
    _declare_participants("axis_name", "jax"),
    _declare_participants("process_group", "torch"),
]


def take_arguments(named: Mapping[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """The options among the arguments that a constructor names, and out of its other ones."""
    known = list_arguments(OPTIONS)
    found = {name: named[name] for name in known if name in named}
    return found | {name: others.pop(name) for name in known if name in others}


def make_attributes(given: Mapping[str, Any]) -> dict[str, Any]:
    """A layer's attributes for these arguments, all of them checked.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range, or options that exclude each other.
    """
    every = list_arguments(OPTIONS) | dict(given)
    found = check_arguments(OPTIONS, given)
    for option in OPTIONS:
        if option.as_given:
            found |= {name: every[name] for name in option.arguments}
    return found


def make_core(layer: Any) -> config.Options:
    """The core's Options that a layer's attributes say."""
    given = {name: getattr(layer, name) for name in list_arguments(OPTIONS)}
    return config.Options(
        **{option.core: option.check(given) for option in OPTIONS if option.core is not None}
    )


def make_config(layer: Any) -> dict[str, Any]:
    """The options that a layer's config holds."""
    found: dict[str, Any] = {}
    for option in OPTIONS:
        wanted = {Saved.ALWAYS: True, Saved.NEVER: False, Saved.WHEN_SET: option.is_set(layer)}
        if wanted[option.saved]:
            found |= {name: option.serialize(getattr(layer, name)) for name in option.arguments}
    return found


def list_losses(layer: Any) -> list[str]:
    """The warnings about options that are set and left out of the config."""
    return [f"{o.name} {o.loss}." for o in OPTIONS if o.loss and o.is_set(layer)]


def list_call_options(layer: Any) -> dict[str, Any]:
    """The options in the record of a layer's call beside the core's."""
    return {option.name: getattr(layer, option.name) for option in OPTIONS if option.in_call}


def refuse_options(call: Call) -> str | None:
    """The option that no kernel of the active backend computes, as a reason, or None."""
    backend = keras.backend.backend()
    for option in OPTIONS:
        if backend in option.unserved:
            record: Any = call if option.core is None else call.options
            if getattr(record, option.core or option.name) != option.kept:
                return option.unserved[backend]
    return declaration.refuse_options(OPTIONS, call.options)


def check_ghost_axes(size: int | None, axes: tuple[int, ...], axis: Any) -> None:
    """Raise if ghost batches would split a channel axis; `axes` may be negative still."""
    if size is not None and 0 in axes:
        raise ArgumentValueError(
            f"virtual_batch_size splits axis 0, which must not be a channel axis; got "
            f"axis={axis!r}."
        )
