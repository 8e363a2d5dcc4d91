"""Finding the batch norms of torch and nnx models, and reading and writing one."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from batchnorm.jax import BatchNorm as OursNnx
from batchnorm.tools.models import find_layers, put_state, take_state
from batchnorm.torch import BatchNorm, BatchNorm2d
from batchnorm.torch.explicit import BatchNorm as Explicit


class FrozenBatchNorm2d(torch.nn.Module):
    """As torchvision's: four buffers."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.eps = 1e-6
        for name, value in {
            "weight": 2.0,
            "bias": 1.0,
            "running_mean": 3.0,
            "running_var": 4.0,
        }.items():
            self.register_buffer(name, torch.full((channels,), value))


class Tree(nnx.Module):
    """Attributes whose alphabetical order is not that of definition; one layer twice."""

    def __init__(self, ours: bool = False) -> None:
        make: Any = OursNnx if ours else nnx.BatchNorm
        self.stem = make(3, rngs=nnx.Rngs(0))
        self.blocks = nnx.List([make(4, rngs=nnx.Rngs(1)), nnx.Linear(2, 2, rngs=nnx.Rngs(2))])
        self.again = self.stem
        self.head = make(5, momentum=0.9, epsilon=1e-3, use_bias=False, rngs=nnx.Rngs(3))


def randomize(layer: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
        if tensor.is_floating_point():
            value = torch.rand(tensor.shape, generator=generator)
            tensor.data.copy_(value + 0.5 if "var" in name or "stddev" in name else value)
    return layer


def test_torch_model_lists_theirs_ours_and_subclasses_once_each() -> None:
    class Activated(torch.nn.BatchNorm2d):
        pass

    shared = torch.nn.BatchNorm1d(2)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 1), Activated(4), shared, BatchNorm2d(5), torch.nn.InstanceNorm2d(3)
    )
    model.add_module("again", shared)
    model.add_module("frozen", FrozenBatchNorm2d(6))
    model.add_module("sync", torch.nn.SyncBatchNorm(7))
    found = find_layers(model)
    assert [f.name for f in found] == ["1", "2", "3", "frozen", "sync"]
    assert [f.state.channels for f in found] == [4, 2, 5, 6, 7]
    assert found[1].layer is shared
    assert {f.framework for f in found} == {"torch"}
    assert found[2].state.kind == "batchnorm.torch.BatchNorm2d"


@pytest.mark.parametrize("ours", [False, True])
def test_nnx_model_lists_layers_in_order_of_definition(ours: bool) -> None:
    found = find_layers(Tree(ours))
    assert [f.name for f in found] == ["stem", "blocks.0", "head"]
    assert [f.state.decay for f in found] == [0.99, 0.99, 0.9]
    assert found[2].state.eps == 1e-3
    assert found[2].state.beta is None


def test_layer_by_itself_has_an_empty_name() -> None:
    assert [f.name for f in find_layers(torch.nn.BatchNorm1d(2))] == [""]
    assert [f.name for f in find_layers(OursNnx(2, rngs=nnx.Rngs(0)))] == [""]


def test_torch_state_in_the_specifications_terms() -> None:
    layer = randomize(torch.nn.BatchNorm1d(3, eps=1e-3, momentum=0.2))
    state = take_state(layer, "bn")
    assert (state.variance, state.eps, state.decay, state.cumulative) == (
        "unbiased",
        1e-3,
        0.8,
        False,
    )
    assert (state.steps, state.shape, state.stored) == (0, None, "float32")
    np.testing.assert_array_equal(state.gamma, layer.weight.detach().numpy())
    np.testing.assert_array_equal(state.var, layer.running_var.numpy())
    layer.weight.data.fill_(9.0)
    assert state.gamma is not None
    assert state.gamma.max() < 9.0, "the state must be a copy"


def test_state_of_unusual_torch_layers() -> None:
    assert take_state(torch.nn.BatchNorm1d(3, momentum=None)).cumulative
    plain = take_state(torch.nn.BatchNorm1d(3, affine=False, track_running_stats=False))
    assert (plain.mean, plain.gamma, plain.channels) == (None, None, 0)
    half = take_state(torch.nn.BatchNorm1d(3).bfloat16())
    assert half.stored == "bfloat16"
    assert half.mean is not None
    assert half.mean.dtype == np.float32
    assert take_state(BatchNorm(2, renorm=True)).variance == "biased"
    assert take_state(BatchNorm((2, 3), axis=(1, 2))).shape == (2, 3)
    assert take_state(FrozenBatchNorm2d(2)).eps == 1e-6
    explicit = Explicit(patience=0.75)
    explicit.initialise_layer(input_shape=(4,))
    assert (take_state(explicit).decay, take_state(explicit).eps) == (0.75, 1e-6)


@pytest.mark.parametrize(
    "make",
    [
        lambda: torch.nn.BatchNorm1d(3),
        lambda: BatchNorm(3, renorm=True),
        lambda: BatchNorm((1, 3), axis=(1, 2), bias=False),
        lambda: torch.nn.BatchNorm1d(3, dtype=torch.float64, momentum=None),
        lambda: FrozenBatchNorm2d(3),
    ],
)
def test_torch_state_written_into_a_fresh_layer_is_the_same_to_the_bit(make: Any) -> None:
    source, target = randomize(make()), make()
    put_state(target, take_state(source))
    expected = source.state_dict()
    assert expected.keys() == target.state_dict().keys()
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, expected[name]), name


def test_nnx_state_written_into_a_fresh_layer_is_the_same_to_the_bit() -> None:
    source = OursNnx(3, renorm=True, momentum=0.7, rngs=nnx.Rngs(0))
    source(jnp.asarray(np.random.default_rng(0).normal(2, 3, (16, 3)), jnp.float32))
    target = OursNnx(3, renorm=True, rngs=nnx.Rngs(1))
    put_state(target, take_state(source))
    for (path, a), (_, b) in zip(
        nnx.to_flat_state(nnx.state(source)), nnx.to_flat_state(nnx.state(target)), strict=True
    ):
        np.testing.assert_array_equal(a[...], b[...], err_msg=str(path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gamma": np.ones(2, np.float32)}, "2 values of gamma, 3 of others"),
        ({"mean": np.zeros(4, np.float32), "shape": (4,)}, "layer has 3 channels"),
        ({"var": None}, "var must be there on both sides"),
        ({"beta": np.full(3, 1e39)}, "beta overflows"),
    ],
)
def test_state_that_does_not_fit_changes_nothing(change: dict[str, Any], message: str) -> None:
    layer = torch.nn.BatchNorm1d(3)
    state = replace(take_state(randomize(torch.nn.BatchNorm1d(3)), "bn"), **change)
    with pytest.raises(ValueError, match=message):
        put_state(layer, state)
    for name, tensor in torch.nn.BatchNorm1d(3).state_dict().items():
        assert torch.equal(layer.state_dict()[name], tensor)


def test_gamma_that_a_layer_cannot_hold_is_refused_unless_it_is_one() -> None:
    without = torch.nn.BatchNorm1d(3, affine=False)
    put_state(without, take_state(torch.nn.BatchNorm1d(3)))
    with pytest.raises(ValueError, match="the layer has no gamma"):
        put_state(without, take_state(randomize(torch.nn.BatchNorm1d(3))))


def test_layers_without_weights_and_other_objects_are_refused() -> None:
    with pytest.raises(ValueError, match="run one batch"):
        find_layers(torch.nn.Sequential(torch.nn.LazyBatchNorm1d()))
    with pytest.raises(ValueError, match="not initialized"):
        find_layers(OursNnx())
    with pytest.raises(TypeError, match="find_layers: model must be"):
        find_layers({"a": 1})
    with pytest.raises(TypeError, match="put_state: layer must be a batch norm"):
        put_state(torch.nn.Linear(2, 2), take_state(torch.nn.BatchNorm1d(2)))


def test_no_framework_is_imported_that_the_model_does_not_use() -> None:
    code = (
        "import torch, sys\nfrom batchnorm.tools.models import find_layers\n"
        "assert len(find_layers(torch.nn.BatchNorm1d(2))) == 1\n"
        "print(*[m for m in ('jax', 'flax', 'keras', 'tensorflow') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []
