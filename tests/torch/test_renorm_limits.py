"""Limits of renormalization that move (S11)."""

from __future__ import annotations

import copy
import math
import pickle

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from batchnorm.core.config import Renorm
from batchnorm.torch import BatchNorm

pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")


def test_a_schedule_compiles_once():
    torch.manual_seed(0)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    layer = BatchNorm(3, renorm=True)
    eager = copy.deepcopy(layer)
    compiled = torch.compile(layer, fullgraph=True, backend=counter)
    for step in range(5):
        x = torch.randn(8, 3) * (1 + step) + step
        for each in (layer, eager):
            each.set_renorm_clipping(rmax=1 + step / 10, rmin=1 / (1 + step), dmax=step / 5)
        torch.testing.assert_close(compiled(x), eager(x), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(layer.state_dict(), eager.state_dict())
    assert counter.frame_count == 1


@pytest.mark.parametrize("fused", [None, False])
def test_they_are_those_of_the_constructor(fused):
    torch.manual_seed(0)
    limits, x = {"rmin": 0.9, "rmax": 1.1, "dmax": 0.2}, torch.randn(16, 3) * 3
    given = BatchNorm(3, renorm=True, renorm_clipping=limits, fused=fused)
    told = BatchNorm(3, renorm=True, fused=fused)
    told.set_renorm_clipping(**limits)
    assert told.renorm == given.renorm
    assert torch.equal(told(x), given(x))


def test_nothing_else_changes():
    layer = BatchNorm(3, renorm=True, activation="relu")
    layer(torch.randn(8, 3))
    before = {name: (a, a.clone()) for name, a in layer.named_buffers()}
    layer.set_renorm_clipping(rmax=2.0)
    layer.set_renorm_clipping(dmax=3.0)
    assert layer.renorm == Renorm(0.99, 0.0, 2.0, 3.0)
    layer.set_renorm_clipping(rmax=math.inf)
    assert layer.renorm == Renorm(0.99, 0.0, math.inf, 3.0)
    for name, a in layer.named_buffers():
        kept, values = before[name]
        assert a is kept
        assert name == "renorm_limits" or torch.equal(a, values)
    assert "renorm_limits" not in layer.state_dict()


def test_copies_casts_and_late_initialization_keep_them():
    layer = BatchNorm(3, renorm=True)
    layer.set_renorm_clipping(rmax=2.0)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), layer.half()):
        assert other.renorm.rmax == 2.0
        assert other.renorm_limits.tolist() == [0.0, 2.0, math.inf]
        assert other.renorm_limits.dtype is torch.float32
    late = BatchNorm(3, renorm=True, renorm_clipping={"rmax": 2.0}, device="meta")
    assert late.to_empty(device="cpu").renorm_limits.tolist() == [0.0, 2.0, math.inf]
    layer.configure(renorm=False)
    assert "renorm_limits" not in dict(layer.named_buffers())


@pytest.mark.parametrize(
    ("limits", "kind", "message"),
    [
        ({"rmax": -1.0}, ValueError, "rmax must be finite and at least 0"),
        ({"dmax": math.nan}, ValueError, "dmax must be"),
        ({"rmin": math.inf}, ValueError, "rmin must be"),
        ({"rmax": "3"}, TypeError, "rmax must be a real number"),
        ({"rmin": 2.0, "rmax": 1.0}, ValueError, "need rmax >= rmin; got rmax=1 and rmin=2"),
    ],
)
def test_bad_limits_change_nothing(limits, kind, message):
    layer = BatchNorm(3, renorm=True)
    with pytest.raises(kind, match=f"^BatchNorm: .*{message}"):
        layer.set_renorm_clipping(**limits)
    assert layer.renorm == Renorm(0.99)


def test_a_layer_without_renormalization_has_none():
    with pytest.raises(ValueError, match=r"BatchNorm: .*renorm=False"):
        BatchNorm(3).set_renorm_clipping(rmax=2.0)


def test_a_layer_that_was_pickled_without_them_gets_them():
    layer = BatchNorm(3, renorm=True, renorm_clipping={"rmax": 2.0})
    state = layer.__getstate__()
    state["_buffers"] = {n: a for n, a in state["_buffers"].items() if n != "renorm_limits"}
    for name in ("debias", "single_value"):
        del state[name]
    old = BatchNorm.__new__(BatchNorm)
    old.__setstate__(state)
    assert old.renorm_limits.tolist() == [0.0, 2.0, math.inf]
    assert (old.debias, old.single_value) == (False, "raise")
    assert old(torch.randn(8, 3)).shape == (8, 3)
