"""Options are declared once: whatever lists them reads the declarations."""

from __future__ import annotations

import dataclasses
import inspect
import re
from collections.abc import Iterator
from typing import Any

import keras
import numpy as np
import pytest

from batchnorm.core import config
from batchnorm.core.declaration import list_arguments
from batchnorm.core.errors import ArgumentValueError
from batchnorm.keras import BatchNormalization, MaskedBatchNormalization, SyncBatchNormalization
from batchnorm.keras.call import Call
from batchnorm.keras.options import BACKENDS, OPTIONS, LayerOption, Saved, refuse_options
from batchnorm.tools.frameworks.keras import states

LAYERS = (BatchNormalization, SyncBatchNormalization, MaskedBatchNormalization)
ARGUMENTS = list_arguments(OPTIONS)


def check_colour(given: Any) -> Any:
    if given["colour"] not in (None, "red", "blue"):
        raise ArgumentValueError(f"colour must be None, 'red' or 'blue'; got {given['colour']!r}.")
    return given["colour"]


MADE_UP = LayerOption(
    "colour",
    None,
    check_colour,
    parts={"shade": 1},
    as_given=True,
    unserved=dict.fromkeys(BACKENDS, "none paints"),
)


@pytest.fixture
def made_up() -> Iterator[LayerOption]:
    """One more option, declared as any other and mentioned nowhere else."""
    OPTIONS.append(MADE_UP)
    yield MADE_UP
    OPTIONS.pop()


def declare(**changes: Any) -> None:
    OPTIONS[-1] = dataclasses.replace(MADE_UP, **changes)


@pytest.mark.usefixtures("made_up")
class TestMadeUpOption:
    @pytest.mark.parametrize("cls", LAYERS)
    def test_constructors_check_and_keep_it(self, cls: Any) -> None:
        layer = cls()
        assert (layer.colour, layer.shade) == (None, 1)
        layer = cls(colour="red", shade=2)
        assert (layer.colour, layer.shade) == ("red", 2)
        with pytest.raises(ValueError, match=f"{cls.__name__}: colour must be"):
            cls(colour="green")

    @pytest.mark.parametrize("cls", LAYERS)
    def test_configs_hold_it_where_it_is_set(self, cls: Any) -> None:
        assert not cls().get_config().keys() & {"colour", "shade"}
        found = cls(colour="red", shade=[2, 3]).get_config()
        assert (found["colour"], found["shade"]) == ("red", [2, 3])
        assert type(found["shade"]) is list
        again = cls.from_config(found)
        assert (again.colour, list(again.shade)) == ("red", [2, 3])

    def test_models_are_saved_with_it(self, tmp_path: Any) -> None:
        model = keras.Sequential([keras.Input((3,)), MaskedBatchNormalization(colour="blue")])
        model.save(tmp_path / "model.keras")
        assert keras.models.load_model(tmp_path / "model.keras").layers[0].colour == "blue"

    def test_configs_may_always_hold_it(self) -> None:
        declare(saved=Saved.ALWAYS, serialize=str)
        assert BatchNormalization().get_config()["shade"] == "1"
        assert "colour" not in MaskedBatchNormalization().get_config()

    def test_configs_may_lose_it_with_a_warning(self) -> None:
        declare(saved=Saved.NEVER, loss="fades")
        BatchNormalization().get_config()
        with pytest.warns(UserWarning, match=r"^BatchNormalization: colour fades\.$"):
            assert "colour" not in BatchNormalization(colour="red").get_config()

    def test_packed_statistics_may_exclude_it(self) -> None:
        declare(packed=False)
        with pytest.raises(ValueError, match="MaskedBatchNormalization: colour does not go with"):
            MaskedBatchNormalization(colour="red")

    def test_calls_and_the_core_need_a_field_for_it(self) -> None:
        declare(in_call=True)
        with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
            BatchNormalization()(np.ones((4, 3), "float32"))
        declare(core="colour")
        with pytest.raises(TypeError, match="unexpected keyword argument 'colour'"):
            BatchNormalization()

    def test_kernels_refuse_it(self) -> None:
        class Painted(Call):
            colour: Any = None

        class Red(Painted):
            colour = "red"

        given: Any = {"owner": "", "axes": (1,), "options": config.Options(), "training": True}
        assert refuse_options(Painted(**given)) is None
        assert refuse_options(Red(**given)) == "none paints"

    def test_layers_that_tools_change_compute_by_it(self) -> None:
        declare(core="eps", check=lambda given: float(given["shade"]))
        layer: Any = BatchNormalization(shade=0.25)
        layer.build((None, 3))
        assert layer._options.eps == 0.25
        layer.shade = 0.5
        states.put_state(layer, dataclasses.replace(states.take_state(layer), decay=0.75))
        assert (layer._options.eps, layer._options.decay) == (0.5, 0.75)

    def test_constructors_and_documentation_are_found_wanting(self) -> None:
        assert missing_arguments() == {"colour", "shade"}
        assert undocumented("colour") == ["BatchNormalization", "MaskedBatchNormalization"]


def missing_arguments() -> set[str]:
    """Declared arguments that the constructor lacks, or has with another default."""
    found = inspect.signature(BatchNormalization.__init__).parameters
    return {n for n, value in list_arguments(OPTIONS).items() if default_of(found, n) != value}


def default_of(parameters: Any, name: str) -> Any:
    return parameters[name].default if name in parameters else "missing"


def undocumented(name: str) -> list[str]:
    """Public docstrings that should mention an argument, and do not."""
    packed = {name for option in OPTIONS if option.packed for name in option.arguments}
    listed = [BatchNormalization, *([MaskedBatchNormalization] if name in packed else [])]
    return [a.__name__ for a in listed if not re.search(rf"\b{name}\b", str(a.__doc__))]


def test_the_constructor_takes_every_option() -> None:
    assert missing_arguments() == set()


def test_constructors_name_options_and_what_every_layer_takes_only() -> None:
    for cls, others in (
        (BatchNormalization, {"self", "trainable", "name", "kwargs"}),
        (MaskedBatchNormalization, {"self", "kwargs"}),
    ):
        found = inspect.signature(cls.__init__).parameters
        assert found.keys() - ARGUMENTS.keys() == others
        for name in found.keys() & ARGUMENTS.keys():
            assert found[name].default == ARGUMENTS[name]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_documentation_names_every_option(name: str) -> None:
    assert undocumented(name) == []


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_a_new_layer_has_the_declared_default(option: LayerOption) -> None:
    layer = BatchNormalization()
    for name in option.arguments:
        if option.serialize is not keras.initializers.serialize:
            assert getattr(layer, name) == ARGUMENTS[name]
    if option.serialize is not keras.initializers.serialize:
        assert option.check(ARGUMENTS) == option.kept
        assert not option.is_set(layer)


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_configs_hold_what_the_declaration_says(option: LayerOption) -> None:
    assert (option.name in BatchNormalization().get_config()) == (option.saved is Saved.ALWAYS)


def test_the_record_of_a_call_has_what_is_no_field_of_the_core() -> None:
    rest = {option.name for option in OPTIONS if option.in_call}
    found = {field.name for field in dataclasses.fields(Call)}
    assert found == rest | {"owner", "axes", "options", "training", "update", "limits"}


def test_options_of_the_core_are_its_fields() -> None:
    found = {option.core for option in OPTIONS} - {None}
    assert found <= {field.name for field in dataclasses.fields(config.Options)}
    layer = BatchNormalization(momentum=0.5, epsilon=0.25, renorm=True, virtual_batch_size=2)
    expected = config.Options(0.25, 0.5, virtual_batch_size=2, renorm=config.Renorm(0.99))
    assert layer._options == expected
