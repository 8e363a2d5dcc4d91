"""Options are declared once: every list of options is read from the declarations."""

from __future__ import annotations

import copy
import inspect
import pickle
import re

import pytest
import torch
from torch import nn

import batchnorm
from batchnorm.core import config
from batchnorm.core.declaration import Option, check_arguments, list_arguments, refuse_options
from batchnorm.core.errors import ArgumentValueError
from batchnorm.kernels import extension
from batchnorm.torch import BatchNorm, batch_norm, convert_batchnorm, options, revert_batchnorm
from batchnorm.torch.call import Settings
from batchnorm.torch.options import OPTIONS, LayerOption, describe_agreed
from batchnorm.torch.ways import last_call

ARGUMENTS = list_arguments(OPTIONS)
needs_kernels = pytest.mark.skipif(
    extension.missing_reason() is not None, reason=f"no kernels: {extension.missing_reason()}"
)


def check_colour(given):
    if given["colour"] not in (None, "red", "blue"):
        raise ArgumentValueError(f"colour must be None, 'red' or 'blue'; got {given['colour']!r}.")
    return given["colour"] and (given["colour"], given["shade"])


MADE_UP = LayerOption(
    "colour",
    None,
    check_colour,
    parts={"shade": 1},
    agreed=lambda pair: f"colour={pair[0]}",
    split=lambda pair: {"colour": pair[0], "shade": pair[1]},
)


@pytest.fixture
def made_up():
    """One more option, declared as any other and mentioned nowhere else."""
    OPTIONS.append(MADE_UP)
    yield MADE_UP
    OPTIONS.remove(MADE_UP)


@pytest.mark.usefixtures("made_up")
class TestMadeUpOption:
    def test_configure_checks_and_keeps_it(self):
        layer = BatchNorm(3)
        assert layer.colour is None
        layer.configure(colour="red", shade=2)
        assert layer.colour == ("red", 2)
        layer.configure(fused=False)
        assert layer.colour == ("red", 2)
        layer.configure(colour="blue")
        assert layer.colour == ("blue", 2)
        layer.configure(colour=None)
        assert layer.colour is None
        layer.configure(shade=3)
        assert layer.colour is None
        with pytest.raises(ValueError, match="BatchNorm: colour must be"):
            layer.configure(colour="green")

    def test_repr_shows_it(self):
        layer = BatchNorm(3)
        assert "colour" not in repr(layer)
        layer.configure(colour="red")
        assert "colour=('red', 1)" in repr(layer)

    @pytest.mark.parametrize(
        "duplicate", [copy.deepcopy, lambda layer: pickle.loads(pickle.dumps(layer))]
    )
    def test_copies_keep_it(self, duplicate):
        layer = BatchNorm(3)
        layer.configure(colour="blue")
        assert duplicate(layer).colour == ("blue", 1)

    def test_conversion_takes_it(self):
        model = convert_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), colour="red")
        assert model[0].colour == ("red", 1)
        with pytest.raises(ValueError, match="colour must be"):
            convert_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), colour="green")
        with pytest.raises(TypeError, match=r"options must be among .*colour, shade; got color"):
            convert_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), color="red")

    def test_reversion_refuses_it_and_leaves_none_behind(self):
        model = convert_batchnorm(nn.Sequential(nn.BatchNorm1d(3)), colour="red")
        with pytest.raises(ValueError, match=r"has colour=\('red', 1\)"):
            revert_batchnorm(model)
        model[0].colour = None
        revert_batchnorm(model)
        assert "colour" not in model[0].__dict__

    @needs_kernels
    def test_a_last_call_is_not_repeated_after_a_change(self):
        layer, x = BatchNorm(3), torch.randn(4, 3)
        for _ in range(3):
            layer(x)
        assert batchnorm.explain(layer, x).way == "last call"
        layer.colour = ("red", 1)
        assert batchnorm.explain(layer, x).way == "kernels"

    def test_ranks_agree_on_it(self):
        class Painted(config.Options):
            colour = ("red", 1)

        assert describe_agreed(Painted()) == ["colour=red"]

    def test_constructor_and_documentation_are_found_wanting(self):
        assert missing_arguments() == {"BatchNorm": {"colour", "shade"}}
        assert undocumented("colour") == ["BatchNorm", "convert_batchnorm"]


def missing_arguments():
    """Declared arguments that a public signature lacks, or has with another default."""
    found = inspect.signature(BatchNorm.__init__).parameters
    declared = list_arguments(OPTIONS)
    wrong = {
        name
        for name, default in declared.items()
        if name not in found or found[name].default != default
    }
    return {"BatchNorm": wrong} if wrong else {}


def undocumented(name):
    """Public docstrings that do not mention an argument, although they should."""
    listed = [BatchNorm, *([convert_batchnorm] if name in options.convertible() else [])]
    return [a.__name__ for a in listed if not re.search(rf"\b{name}\b", str(a.__doc__))]


def test_the_constructor_takes_every_option():
    assert missing_arguments() == {}


def test_the_function_takes_every_option():
    found = inspect.signature(batch_norm).parameters
    for name, default in ARGUMENTS.items():
        assert name in found
        if name != "renorm":  # in functions, renorm is the statistics
            assert found[name].default == default


@pytest.mark.parametrize("name", ARGUMENTS)
def test_documentation_names_every_option(name):
    assert undocumented(name) == []
    assert re.search(rf"^        {name}: ", str(batch_norm.__doc__), re.MULTILINE)


def test_configure_has_the_signature_of_the_declarations():
    found = inspect.signature(BatchNorm.configure).parameters
    assert [name for name in found if name != "self"] == [*ARGUMENTS]
    assert all(repr(a.default) == "unchanged" for name, a in found.items() if name != "self")


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_a_new_layer_keeps_the_declared_value(option):
    assert getattr(BatchNorm(3), option.name) == option.kept
    assert option.check(ARGUMENTS) == option.kept


@pytest.mark.parametrize("option", OPTIONS, ids=lambda option: option.name)
def test_options_of_the_core_are_its_fields(option):
    fields = config.Options.__dataclass_fields__
    assert (option.core in fields) == (option.core is not None)


def test_the_record_of_a_call_has_what_is_no_field_of_the_core():
    rest = {option.name for option in OPTIONS if option.core is None} - {"synchronized"}
    assert rest | {"owner", "options", "synchronizer", "pending"} == set(Settings._fields)


def test_unknown_options_name_the_known_ones():
    with pytest.raises(TypeError, match="options must be among axis, virtual_batch_size"):
        BatchNorm(3).configure(colour="red")
    with pytest.raises(TypeError, match="got shade"):
        check_arguments(OPTIONS, {"shade": 1})


def test_what_kernels_do_not_compute_goes_to_array_code(monkeypatch):
    unserved = Option("activation", None, lambda given: None, core="activation", kernels=False)
    monkeypatch.setattr(options, "UNSERVED", [unserved])
    assert refuse_options(options.UNSERVED, config.Options()) is None
    assert (
        refuse_options(options.UNSERVED, config.Options(activation="relu"))
        == "none computes activation"
    )
    layer = BatchNorm(3, activation="relu")
    found = batchnorm.explain(layer, torch.randn(4, 3))
    assert found.way == "array code"
    assert found.refused[-1].reason == "none computes activation"


def test_last_calls_read_the_declarations():
    layer = BatchNorm(3)
    read = last_call.make_reader()(vars(layer))
    assert len(read) == len(options.STATE) + len(OPTIONS)
