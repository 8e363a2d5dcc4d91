"""Options are declared once: whatever lists them reads the declarations."""

from __future__ import annotations

import copy
import inspect
import pickle
import re
import textwrap
from collections.abc import Callable, Iterator
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import batchnorm
from batchnorm.core import config
from batchnorm.core.declaration import Option, list_arguments, refuse_options
from batchnorm.core.errors import ArgumentValueError
from batchnorm.jax import BatchNorm, batch_norm, batch_norm_inference, layers, update_running
from batchnorm.jax.call import Settings, check_settings, make_settings, options_of_calls
from batchnorm.jax.options import OPTIONS, LayerOption
from batchnorm.tools import fold
from batchnorm.tools.frameworks.nnx import stacked

ARGUMENTS = list_arguments(OPTIONS)
OF_CALLS = [option.name for option in options_of_calls()]
EACH = pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
# Arguments of the constructor that are no options: how a layer starts, and one without effect.
STARTS = {"self", "rngs", "use_running_average", "use_fast_variance"}
X = jnp.asarray(np.random.default_rng(0).normal(size=(8, 3)), jnp.float32)


def check_colour(given: Any) -> Any:
    if given["colour"] not in (None, "red", "blue"):
        raise ArgumentValueError(f"colour must be None, 'red' or 'blue'; got {given['colour']!r}.")
    return given["colour"] and (given["colour"], given["shade"])


# Options that the layer does not have: one of its own, one that the core computes in every mode,
# and one that the core computes in training.
COLOUR = LayerOption("colour", None, check_colour, parts={"shade": 1})
RELU = LayerOption(
    "after",
    None,
    lambda given: config.check_activation(given["after"]),
    core="activation",
    kernels=False,
    folds=False,
)
UNBIASED = LayerOption(
    "unbiased",
    False,
    lambda given: config.check_flag("unbiased", given["unbiased"]),
    kept=False,
    core="unbiased",
    training=True,
)


@pytest.fixture
def made_up() -> Iterator[None]:
    """More options, declared as any other and mentioned nowhere else."""
    OPTIONS.extend([COLOUR, RELU, UNBIASED])
    yield
    for option in (COLOUR, RELU, UNBIASED):
        OPTIONS.remove(option)


def make(**attributes: Any) -> Any:
    layer = BatchNorm(3, momentum=0.5, rngs=nnx.Rngs(0))
    for name, value in attributes.items():
        setattr(layer, name, value)
    return layer


def with_arguments(extra: str) -> Any:
    """The layer with arguments added to the signature of its constructor, and nothing else."""
    source = textwrap.dedent(inspect.getsource(BatchNorm.__init__))
    scope = dict(vars(layers))
    exec(source.replace("rngs: Any = None,", f"rngs: Any = None, {extra},"), scope)
    return type("Painted", (BatchNorm,), {"__init__": scope["__init__"]})


@pytest.mark.usefixtures("made_up")
class TestMadeUpOptions:
    def test_a_new_layer_has_the_value_that_is_kept(self) -> None:
        layer = make()
        assert layer.colour is layer.after is None
        assert layer.unbiased is False
        assert "after=None" in repr(layer)

    def test_the_constructor_takes_them_once_its_signature_does(self) -> None:
        painted = with_arguments("colour=None, shade=1")
        assert painted(3).colour is None
        assert painted(3, colour="red", shade=2).colour == ("red", 2)
        with pytest.raises(ValueError, match="Painted: colour must be"):
            painted(3, colour="green")

    def test_values_are_static(self) -> None:
        one, other = make(), make(colour=("red", 1))
        assert nnx.graphdef(one) != nnx.graphdef(other)
        assert jax.tree.structure(one) != jax.tree.structure(other)
        hash(nnx.graphdef(other))
        assert len(jax.tree.leaves(one)) == len(jax.tree.leaves(other)) == 5

    @pytest.mark.parametrize(
        "duplicate",
        [
            copy.deepcopy,
            nnx.clone,
            lambda layer: pickle.loads(pickle.dumps(layer)),
            lambda layer: nnx.merge(*nnx.split(layer)),
            lambda layer: jax.jit(lambda layer: layer)(layer),
        ],
    )
    def test_copies_keep_them(self, duplicate: Callable[[Any], Any]) -> None:
        assert duplicate(make(colour=("blue", 1))).colour == ("blue", 1)

    def test_calls_compute_them(self) -> None:
        plain, layer = make(fused=False), make(after="relu")
        np.testing.assert_array_equal(layer(X), jnp.maximum(plain(X), 0))
        y = layer(X, use_running_average=True)
        np.testing.assert_array_equal(y, jnp.maximum(plain(X, use_running_average=True), 0))

    def test_functions_take_them_once_their_signatures_do(self) -> None:
        given = {"after": "relu", "epsilon": 0.5, "x": X}
        found = check_settings("batch_norm", given, training=True)
        assert found.options == config.Options(0.5, 0.99, activation="relu")
        with pytest.raises(ValueError, match="activation must be"):
            check_settings("batch_norm", {"after": "tanh"}, training=True)

    def test_those_of_training_leave_evaluation_alone(self) -> None:
        layer = make(unbiased=True, fused=False)
        layer(X)
        np.testing.assert_allclose(layer.var[...], 0.5 + 0.5 * jnp.var(X, 0, ddof=1), rtol=1e-5)
        read = layer.__getattribute__
        assert make_settings("a", read, training=True).options.unbiased
        assert not make_settings("a", read, training=False).options.unbiased

    @pytest.mark.parametrize("training", [True, False])
    def test_kernels_refuse_them(self, training: bool) -> None:
        layer = make(after="relu").train(training)
        layer.fused = True
        with pytest.raises(ValueError, match=r"BatchNorm: fused=True .* none computes after"):
            layer(X)
        layer.fused = None
        if training:
            found = batchnorm.explain(layer, X)
            assert (found.way, found.refused[0].reason) == ("array code", "none computes after")

    def test_fold_refuses_them(self) -> None:
        linear = nnx.Linear(4, 3, rngs=nnx.Rngs(0))
        report = fold(nnx.Sequential(linear, make(after="relu")), jnp.ones((2, 4)))[1]
        assert "it has after='relu', which no linear map can take over" in str(report)
        assert "it has" not in str(fold(nnx.Sequential(linear, make()), jnp.ones((2, 4)))[1])

    def test_signatures_and_documentation_are_found_wanting(self) -> None:
        assert wrong_arguments(BatchNorm.__init__) == {"colour", "shade", "after", "unbiased"}
        assert wrong_arguments(batch_norm) == {"after", "unbiased"}
        assert wrong_arguments(batch_norm_inference) == {"after"}
        assert undocumented(BatchNorm) == {"colour", "shade", "after", "unbiased"}


# Arguments that a function does not take, and the reason.
LACKING: dict[Any, dict[str, str]] = {
    BatchNorm.__init__: {},
    batch_norm: {
        "momentum": "update_running moves statistics",
        "renorm_momentum": "update_running moves statistics",
        "debias": "update_running moves statistics, and debiases where they have steps",
    },
    batch_norm_inference: {"fused": "array code always"},
}
# Defaults that differ, and the reason.
OTHERWISE = {(batch_norm, "renorm"): "the statistics themselves"}


def declared(function: Any) -> dict[str, Any]:
    """The arguments that a public signature must have, with their defaults."""
    options = OPTIONS if function is BatchNorm.__init__ else options_of_calls()
    inference = function is batch_norm_inference
    every = list_arguments(option for option in options if not (inference and option.training))
    return {name: a for name, a in every.items() if name not in LACKING[function]}


def wrong_arguments(function: Any) -> set[str]:
    """Declared arguments that a public signature lacks, or has with another default."""
    found = inspect.signature(function).parameters
    return {
        name
        for name, default in declared(function).items()
        if name not in found
        or not ((function, name) in OTHERWISE or found[name].default == default)
    }


def undocumented(function: Any) -> set[str]:
    """Declared arguments that a public docstring does not list."""
    names = declared(BatchNorm.__init__ if function is BatchNorm else function)
    text = str(function.__doc__)
    return {name for name in names if not re.search(rf"^ +{name}: ", text, re.MULTILINE)}


@pytest.mark.parametrize("function", LACKING, ids=lambda function: function.__qualname__)
def test_signatures_agree_with_the_declarations(function: Any) -> None:
    assert wrong_arguments(function) == set()
    found = set(inspect.signature(function).parameters)
    assert not found & LACKING[function].keys()
    if function is BatchNorm.__init__:
        assert found == ARGUMENTS.keys() | STARTS


def test_update_running_has_the_declared_defaults() -> None:
    found = inspect.signature(update_running).parameters
    for name in ("momentum", "epsilon", "renorm_momentum"):
        assert found[name].default == ARGUMENTS[name]


@pytest.mark.parametrize("function", [BatchNorm, batch_norm, batch_norm_inference])
def test_documentation_names_every_option(function: Any) -> None:
    assert undocumented(function) == set()


@EACH
def test_a_new_layer_keeps_the_declared_value(option: Option) -> None:
    value = getattr(BatchNorm(), option.name)
    if option.name == "momentum":
        assert float(value[...]) == np.float32(option.kept)
    else:
        assert value == option.kept
        hash(value)  # static attributes must be
    assert option.check(ARGUMENTS) == option.kept


@EACH
def test_options_of_the_core_are_its_fields(option: Option) -> None:
    fields = config.Options.__dataclass_fields__
    assert (option.core in fields) == (option.core is not None)


def test_the_record_of_a_call_has_what_is_no_field_of_the_core() -> None:
    rest = {option.name for option in options_of_calls() if option.core is None}
    assert rest | {"owner", "options"} == set(Settings._fields)


def test_options_of_states_are_those_that_the_core_names_otherwise() -> None:
    found = {o.name: o.core for o in OPTIONS if o.core is not None and o.core != o.name}
    assert found == stacked.OPTIONS


def test_what_kernels_do_not_compute_is_a_reason() -> None:
    assert refuse_options(OPTIONS, config.Options()) is None
    assert refuse_options([RELU], config.Options()) is None
    assert refuse_options([RELU], config.Options(activation="relu")) == "none computes after"


def test_metadata_of_any_mapping_is_hashable() -> None:
    layer = BatchNorm(3, scale_metadata=MappingProxyType({"origin": "here"}))
    assert layer.scale_metadata == (("origin", "here"),)  # type: ignore[attr-defined]
    assert BatchNorm(axis_name="b", axis_index_groups=[[0], [1]]).axis_index_groups == (  # type: ignore[attr-defined]
        (0,),
        (1,),
    )
