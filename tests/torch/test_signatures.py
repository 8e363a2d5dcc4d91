"""Arguments are torch's, name by name and position by position."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import nn

import batchnorm.torch as bt

PAIRS = {
    "BatchNorm": (bt.BatchNorm, nn.BatchNorm1d),
    "BatchNorm1d": (bt.BatchNorm1d, nn.BatchNorm1d),
    "BatchNorm2d": (bt.BatchNorm2d, nn.BatchNorm2d),
    "BatchNorm3d": (bt.BatchNorm3d, nn.BatchNorm3d),
}
every_class = pytest.mark.parametrize(("ours", "theirs"), PAIRS.values(), ids=PAIRS)


def methods(cls: type) -> list[str]:
    """Public and special methods of a class and its ancestors below nn.Module."""
    found = {
        name
        for base in cls.__mro__[: cls.__mro__.index(nn.Module)]
        for name, value in vars(base).items()
        if inspect.isfunction(value) and (not name.startswith("_") or name.endswith("__"))
    }
    return sorted(found)


SHARED = [
    (f"{name}.{method}", getattr(ours, method), getattr(theirs, method))
    for name, (ours, theirs) in PAIRS.items()
    for method in methods(theirs)
]
CALLS = [*SHARED, ("batch_norm", bt.batch_norm, nn.functional.batch_norm)]


@pytest.mark.parametrize(("ours", "theirs"), [c[1:] for c in CALLS], ids=[c[0] for c in CALLS])
def test_arguments_are_torchs(ours, theirs):
    found = inspect.signature(ours).parameters
    expected = inspect.signature(theirs).parameters
    for place, (name, argument) in enumerate(expected.items()):
        assert name in found
        same = found[name]
        assert same.kind is argument.kind
        assert same.default == argument.default
        if argument.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD:
            assert list(found)[place] == name
    for name in found.keys() - expected.keys():  # what torch lacks may be left out
        assert found[name].default is not inspect.Parameter.empty


def test_methods_that_are_compared():
    names = {name.partition(".")[2] for name, *_ in SHARED}
    assert {"__init__", "forward", "reset_parameters", "reset_running_stats"} <= names


@every_class
def test_device_and_dtype_by_position(ours, theirs):
    given = (3, 1e-3, 0.2, True, True, "cpu", torch.float64)
    layers = [ours(*given), theirs(*given)]
    for layer in layers:
        assert (layer.eps, layer.momentum) == (1e-3, 0.2)
    states = [{name: (a.dtype, a.device) for name, a in b.state_dict().items()} for b in layers]
    assert states[0] == states[1]
    assert ours(*given[:5], "meta").weight.is_meta


@every_class
def test_input_by_name(ours, theirs):
    ranks = {nn.BatchNorm1d: 3, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}
    x = torch.randn(6, 3, 5, 5, 5)[(..., *(0,) * (5 - ranks[theirs]))]
    torch.testing.assert_close(ours(3)(input=x), theirs(3)(input=x), rtol=1e-5, atol=1e-5)


def test_function_by_names_and_by_positions():
    x, mean, var = torch.randn(6, 3), torch.randn(3), torch.rand(3) + 0.5
    given = {
        "input": x,
        "running_mean": mean,
        "running_var": var,
        "weight": torch.randn(3),
        "bias": torch.randn(3),
        "training": False,
        "momentum": 0.3,
        "eps": 1e-2,
    }
    expected = nn.functional.batch_norm(**given)
    for found in (bt.batch_norm(**given), bt.batch_norm(*given.values())):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
