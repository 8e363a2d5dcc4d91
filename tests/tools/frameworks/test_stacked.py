"""Layers of flax nnx that `vmap` and `scan` have stacked in one module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx, serialization

import batchnorm.jax
from batchnorm.tools import fold, inspect, recalibrate, transfer
from batchnorm.tools.models import find_layers, put_state, take_state
from batchnorm.tools.observe import observe

pytestmark = pytest.mark.sample(2)

LAYERS, CHANNELS = 3, 4
NORMS = [nnx.BatchNorm, batchnorm.jax.BatchNorm]
NAMES = ["blocks.norm[0]", "blocks.norm[1]", "blocks.norm[2]", "last"]
# float32 arithmetic of two networks that add in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


class Block(nnx.Module):
    def __init__(self, rngs: nnx.Rngs, norm: Any) -> None:
        self.linear = nnx.Linear(CHANNELS, CHANNELS, rngs=rngs)
        self.norm = norm(CHANNELS, rngs=rngs)

    def __call__(self, x: Any, mask: Any = None) -> Any:
        return nnx.relu(self.norm(self.linear(x), mask=mask))


def make_blocks(norm: Any, count: int = LAYERS, seed: int = 0) -> Block:
    @nnx.split_rngs(splits=count)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> Block:
        return Block(rngs, norm)

    return make(nnx.Rngs(seed))


class Scanned(nnx.Module):
    """Blocks one after the other."""

    def __init__(self, norm: Any) -> None:
        self.blocks = make_blocks(norm)
        self.last = norm(CHANNELS, rngs=nnx.Rngs(9))

    def __call__(self, x: Any, mask: Any = None) -> Any:
        @nnx.scan(in_axes=(nnx.Carry, 0, None), out_axes=nnx.Carry)
        def run(x: Any, block: Block, mask: Any) -> Any:
            return block(x, mask)

        return self.last(run(x, self.blocks, mask), mask=mask)


class Ensemble(Scanned):
    """Blocks side by side."""

    def __call__(self, x: Any, mask: Any = None) -> Any:
        run = nnx.vmap(lambda block, x: block(x, mask), in_axes=(0, None))
        return self.last(run(self.blocks, x).mean(0), mask=mask)


class Listed(nnx.Module):
    """The same layers, each a module."""

    def __init__(self, model: Scanned) -> None:
        graph, state = nnx.split(model.blocks)
        parts = [jax.tree.map(lambda a, i=i: a[i], state) for i in range(LAYERS)]
        self.blocks = nnx.List([nnx.clone(nnx.merge(graph, part)) for part in parts])
        self.last = nnx.clone(model.last)
        self.scanned = not isinstance(model, Ensemble)

    def __call__(self, x: Any, mask: Any = None) -> Any:
        if self.scanned:
            for block in self.blocks:
                x = block(x, mask)
            return self.last(x, mask=mask)
        return self.last(sum(b(x, mask) for b in self.blocks) / LAYERS, mask=mask)


def inputs(seed: int, rows: int = 16) -> Any:
    return jax.random.normal(jax.random.key(seed), (rows, CHANNELS)) + 0.5


def flat(model: Any) -> list[Any]:
    return [np.asarray(a) for a in jax.tree.leaves(nnx.state(model, nnx.BatchStat))]


@pytest.mark.parametrize("norm", NORMS)
def test_every_slice_is_a_layer(norm: Any) -> None:
    model = Scanned(norm)
    model.blocks.norm.mean[...] = jnp.arange(12.0).reshape(LAYERS, CHANNELS)
    found = find_layers(model)
    assert [layer.name for layer in found] == NAMES
    assert [layer.state.channels for layer in found] == [CHANNELS] * 4
    assert {layer.state.decay for layer in found} == {0.99}
    assert [layer.state.shape for layer in found] == [None] * 4
    np.testing.assert_array_equal(found[1].state.mean, [4.0, 5.0, 6.0, 7.0])
    again = take_state(found[1].layer, "x")
    np.testing.assert_array_equal(again.mean, found[1].state.mean)
    assert again.name == "x"


@pytest.mark.parametrize("norm", NORMS)
def test_nested_stacks_have_several_indices(norm: Any) -> None:
    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def make(rngs: nnx.Rngs) -> Any:
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def inner(rngs: nnx.Rngs) -> Any:
            return norm(CHANNELS, rngs=rngs)

        return inner(rngs)

    layers = find_layers(make(nnx.Rngs(0)))
    assert [layer.name for layer in layers] == [f"[{i},{j}]" for i in range(2) for j in range(3)]


@pytest.mark.sample(9)
@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("network", [Scanned, Ensemble])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_recalibration_is_that_of_the_same_layers_in_a_list(
    norm: Any, network: Any, masked: bool, compiled: bool
) -> None:
    model = network(norm)
    listed = Listed(model)
    mask = (jnp.arange(16) < 11)[:, None] if masked else None
    run = nnx.jit(lambda m, x: m(x, mask)) if compiled else lambda m, x: m(x, mask)
    for seeds in ((1, 2), (3,)):  # the second time all is compiled
        batches = [inputs(seed) for seed in seeds]
        done = recalibrate(model, batches, call=run)
        recalibrate(listed, batches, call=lambda m, x: m(x, mask))
        assert [layer.name for layer in done.changed] == NAMES
        rows = (11 if masked else 16) * len(batches)
        assert {(layer.rows, layer.uses) for layer in done.changed} == {(rows, len(batches))}
        for i, block in enumerate(listed.blocks):
            for name in ("mean", "var"):
                found = getattr(model.blocks.norm, name)[...][i]
                np.testing.assert_allclose(found, getattr(block.norm, name)[...], **CLOSE)
        np.testing.assert_allclose(model.last.var[...], listed.last.var[...], **CLOSE)
    assert model.blocks.norm.mean[...].shape == (LAYERS, CHANNELS)
    assert not hasattr(model.blocks.norm, "_watched_number")
    assert model(inputs(4)).shape == (16, CHANNELS)


def test_first_slice_against_numpy() -> None:
    model = Scanned(batchnorm.jax.BatchNorm)
    x = inputs(1)
    recalibrate(model, [x])
    linear = model.blocks.linear
    rows = np.asarray(x, np.float64) @ linear.kernel[...][0] + linear.bias[...][0]
    np.testing.assert_allclose(model.blocks.norm.mean[...][0], rows.mean(0), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(model.blocks.norm.var[...][0], rows.var(0), rtol=1e-5)


def test_frozen_stack_is_left_alone_while_others_change() -> None:
    model = Scanned(batchnorm.jax.BatchNorm)
    model.blocks.norm.freeze()
    before = np.asarray(model.blocks.norm.mean[...])
    done = recalibrate(model, [inputs(1)])
    assert [layer.name for layer in done.changed] == ["last"]
    assert [layer.name for layer in done.kept] == NAMES[:3]
    np.testing.assert_array_equal(model.blocks.norm.mean[...], before)


def test_interrupted_recalibration_changes_nothing() -> None:
    model = Scanned(batchnorm.jax.BatchNorm)
    before = flat(model)

    def batches() -> Any:
        yield inputs(1)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, batches())
    for a, b in zip(before, flat(model), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("norm", NORMS)
def test_inspection_tells_slices_apart(norm: Any) -> None:
    model = Scanned(norm)
    recalibrate(model, [inputs(1, 400)])
    assert inspect(model, [inputs(1, 400)]).ok
    model.blocks.norm.var[...] = model.blocks.norm.var[...].at[1, 2].set(-1.0)
    report = inspect(model)
    assert [layer.name for layer in report.errors] == ["blocks.norm[1]"]
    assert report.errors[0].findings[0].channels == (2,)
    model = Scanned(norm)
    recalibrate(model, [inputs(1, 400)])
    model.blocks.norm.mean[...] = model.blocks.norm.mean[...].at[2].add(9.0)
    report = inspect(model, [inputs(1, 400)])
    assert [layer.name for layer in report.layers if layer.findings] == ["blocks.norm[2]"]
    assert all(layer.observed.real.count[0] == 400 for layer in report.layers)


@pytest.mark.parametrize("norm", NORMS)
def test_one_slice_is_written_alone(norm: Any) -> None:
    model = Scanned(norm)
    second = find_layers(model)[1]
    put_state(second.layer, replace(second.state, mean=np.full(CHANNELS, 7.0, np.float32)))
    expected = np.zeros((LAYERS, CHANNELS))
    expected[1] = 7.0
    np.testing.assert_array_equal(model.blocks.norm.mean[...], expected)
    with pytest.raises(ValueError, match="stacked layers have one epsilon together; got 1e-05 and"):
        put_state(second.layer, replace(second.state, eps=0.1))
    slower = replace(second.state, decay=0.5)
    if norm is nnx.BatchNorm:
        with pytest.raises(ValueError, match="stacked layers have one momentum together"):
            put_state(second.layer, slower)
    else:
        put_state(second.layer, slower)
        assert [f.state.decay for f in find_layers(model)] == [0.99, 0.5, 0.99, 0.99]


@pytest.mark.parametrize("norm", NORMS)
def test_module_that_is_several_layers_is_no_layer(norm: Any) -> None:
    blocks = make_blocks(norm)
    with pytest.raises(ValueError, match=r"is several, stacked as 3; find_layers\(model\)"):
        take_state(blocks.norm, "norm")
    with pytest.raises(ValueError, match="is several, stacked as 3"):
        put_state(blocks.norm, find_layers(blocks)[0].state)
    with (
        pytest.raises(ValueError, match=r"is several, stacked as 3; run it under nnx\.scan"),
        observe(find_layers(blocks), lambda seen: None),
    ):
        blocks.norm(inputs(1))


def test_arrays_that_are_stacked_otherwise_are_refused() -> None:
    layer = make_blocks(nnx.BatchNorm).norm
    layer.mean = nnx.BatchStat(layer.mean[...].T)
    with pytest.raises(ValueError, match=r"must all have the same leading axes.*mean \(4, 3\), v"):
        find_layers(layer)
    layer.mean = nnx.BatchStat(jnp.zeros(CHANNELS))
    with pytest.raises(ValueError, match=r"leading axes before num_features=4; got mean \(4,\)"):
        inspect(layer)


def torch_layers(eps: float = 1e-3) -> torch.nn.Sequential:
    layers = [torch.nn.BatchNorm1d(CHANNELS, eps=eps, momentum=0.25) for _ in range(4)]
    for i, layer in enumerate(layers):
        layer.running_mean.fill_(i + 1.0)
        layer.weight.data.fill_(-i)
    return torch.nn.Sequential(*layers)


@pytest.mark.parametrize("norm", NORMS)
def test_transfer_fills_and_reads_slices(norm: Any) -> None:
    model = Scanned(norm)
    done = transfer(torch_layers(), model, count=16)
    assert [target for _, target in done.pairs] == NAMES
    np.testing.assert_array_equal(model.blocks.norm.mean[...][:, 0], [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(model.blocks.norm.scale[...][:, 1], [0.0, -1.0, -2.0])
    assert (model.blocks.norm.epsilon, find_layers(model)[2].state.decay) == (1e-3, 0.75)
    back = torch_layers(eps=1e-5)
    transfer(model, back, count=16)
    assert [layer.running_mean[0].item() for layer in back] == [1.0, 2.0, 3.0, 4.0]
    assert {layer.eps for layer in back} == {1e-3}
    other = Scanned(norm)
    transfer(model, other)
    np.testing.assert_array_equal(other.blocks.norm.mean[...], model.blocks.norm.mean[...])


@pytest.mark.parametrize("norm", NORMS)
def test_transfer_of_what_slices_cannot_have_changes_nothing(norm: Any) -> None:
    source, model = torch_layers(), Scanned(norm)
    source[1].eps = 0.5
    before = flat(model)
    with pytest.raises(ValueError, match=r"one epsilon together; got 0\.001 and 0\.5"):
        transfer(source, model)
    for a, b in zip(before, flat(model), strict=True):
        np.testing.assert_array_equal(a, b)
    assert model.blocks.norm.epsilon == 1e-5


@pytest.mark.parametrize("norm", NORMS)
def test_file_of_stacked_layers_is_transferred(norm: Any, tmp_path: Path) -> None:
    model = Scanned(norm)
    transfer(torch_layers(), model)
    path = tmp_path / "x.msgpack"
    path.write_bytes(serialization.msgpack_serialize(nnx.to_pure_dict(nnx.state(model))))
    other = Scanned(norm)
    done = transfer(path, other)
    assert [target for _, target in done.pairs] == NAMES
    np.testing.assert_array_equal(other.blocks.norm.mean[...], model.blocks.norm.mean[...])
    np.testing.assert_array_equal(other.blocks.norm.scale[...], model.blocks.norm.scale[...])
    decays = {found.state.decay for found in find_layers(other)}
    assert decays == ({0.75} if norm is not nnx.BatchNorm else {0.99})


def test_pure_dict_of_stacked_layers_takes_a_file_of_them(tmp_path: Path) -> None:
    model = Scanned(batchnorm.jax.BatchNorm)
    transfer(torch_layers(), model)
    path = tmp_path / "x.msgpack"
    path.write_bytes(serialization.msgpack_serialize(nnx.to_pure_dict(nnx.state(model))))
    target = nnx.to_pure_dict(nnx.state(Scanned(batchnorm.jax.BatchNorm)))
    new = transfer(path, target).target
    np.testing.assert_array_equal(new["blocks"]["norm"]["momentum"], [0.75] * 3)
    np.testing.assert_array_equal(
        new["blocks"]["norm"]["mean"], np.asarray(model.blocks.norm.mean[...])
    )


@pytest.mark.parametrize("norm", NORMS)
def test_fold_keeps_stacked_layers_and_says_why(norm: Any) -> None:
    model = Scanned(norm)
    _, report = fold(model, inputs(1), pairs=[("blocks.linear", "blocks.norm")])
    reasons = {layer.name: layer.reason for layer in report.kept}
    assert list(reasons) == NAMES
    assert "those of several layers, stacked" in reasons["blocks.norm[1]"]
    assert "no pair names it" in reasons["last"]
