"""Models, state dicts and trees of every framework but Keras, merged (S22)."""

from __future__ import annotations

import copy
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import equinox as eqx
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from files import linen_variables, nnx_model, torch_model
from flax import nnx

from batchnorm.core.running import LONG_RUNNING
from batchnorm.jax import BatchNorm as OursNnx
from batchnorm.tools import merge, transfer
from batchnorm.tools.models import put_state, take_state
from batchnorm.torch import BatchNorm
from batchnorm.torch.explicit import BatchNorm as Explicit

COUNTS = (5, 15)


class NnxNet(nnx.Module):
    def __init__(self, seed: int) -> None:
        rngs = nnx.Rngs(seed)
        self.map = nnx.Linear(2, 3, rngs=rngs)
        self.norm = OursNnx(3, renorm=True, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)
        self.theirs = nnx.BatchNorm(3, rngs=rngs)


def torch_net(seed: int = 0) -> torch.nn.Module:
    torch.manual_seed(seed)
    return torch.nn.Sequential(
        torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3), BatchNorm(3, renorm=True)
    )


def equinox_net(seed: int = 0) -> Any:
    def make() -> Any:
        return [
            eqx.nn.Linear(2, 3, key=jax.random.key(seed)),
            eqx.nn.BatchNorm(3, axis_name="n", mode="batch"),
        ]

    return eqx.nn.make_with_state(make)()


def haiku_net(seed: int = 0) -> Any:
    def net(x: Any) -> Any:
        return hk.BatchNorm(True, True, 0.9)(hk.Linear(3)(x), is_training=True)

    return hk.transform_with_state(net).init(jax.random.key(seed), jnp.ones((2, 2)))


def linen_tree(seed: int = 0) -> Any:
    tree = jax.tree.map(np.float64, linen_variables())
    tree["params"]["map"] = {"kernel": np.random.default_rng(seed).normal(size=(2, 3))}
    return tree


# Each makes a model with random weights, by a seed, which `fill` gives random states.
MODELS: dict[str, Callable[[int], Any]] = {
    "torch": torch_net,
    "torch's state dict": lambda seed: torch_net(seed).state_dict(),
    "torch, in a checkpoint": lambda seed: {"epoch": 3, "model": torch_net(seed).state_dict()},
    "nnx": NnxNet,
    "nnx's state": lambda seed: nnx.state(NnxNet(seed)),
    "nnx's pure dict": lambda seed: nnx.to_pure_dict(nnx.state(NnxNet(seed))),
    "linen": linen_tree,
    "haiku": haiku_net,
    "equinox": equinox_net,
}


def fill(model: Any, seed: int) -> Any:
    """The model with random values in its batch norms; a new one if it is a tree."""
    rng = np.random.default_rng(seed)
    source = transfer(model).states
    for state in source:
        for array in (state.mean, state.var, state.gamma, state.beta):
            assert array is not None
            array[:] = rng.uniform(0.5, 2.0, array.shape)
        for array in () if state.renorm is None else vars(state.renorm).values():
            array[:] = rng.uniform(0.5, 2.0, array.shape)
    return transfer(source, model).target


def two(name: str) -> list[Any]:
    return [fill(MODELS[name](seed), seed + 1) for seed in range(2)]


def arrays_of(model: Any) -> list[np.ndarray]:
    """All numbers of a model or tree, but for keys of random numbers."""
    if isinstance(model, torch.nn.Module):
        model = model.state_dict()
    elif isinstance(model, nnx.Module):
        model = nnx.state(model)
    leaves = jax.tree.leaves(eqx.filter(model, lambda leaf: hasattr(leaf, "dtype")))
    return [np.array(leaf) for leaf in leaves if not str(leaf.dtype).startswith("key")]


@pytest.mark.parametrize("name", MODELS)
def test_every_kind_of_model_merges_into_a_new_one_of_its_kind(name: str) -> None:
    models = two(name)
    before = [arrays_of(model) for model in models]
    merged = merge(models, COUNTS)
    assert type(merged) is type(models[0])
    # torch's own names keep unbiased variances, which counts convert.
    wanted = merge([transfer(model).states for model in models], COUNTS)
    found = transfer(merged).states
    assert [s.name for s in found] == [s.name for s in wanted]
    for ours, theirs in zip(found, wanted, strict=True):
        assert (ours.kind, ours.eps, ours.stored) == (theirs.kind, theirs.eps, theirs.stored)
        for role in ("mean", "var", "gamma", "beta"):
            np.testing.assert_array_equal(getattr(ours, role), getattr(theirs, role))
        if theirs.renorm is not None:
            for role, array in vars(theirs.renorm).items():
                np.testing.assert_array_equal(getattr(ours.renorm, role), array)
    for model, old in zip(models, before, strict=True):
        for array, kept in zip(arrays_of(model), old, strict=True):
            np.testing.assert_array_equal(array, kept)


WEIGHTS: dict[str, Callable[[Any], Any]] = {
    "torch": lambda model: model[0].weight.detach(),
    "torch's state dict": lambda state: state["0.weight"],
    "torch, in a checkpoint": lambda tree: tree["model"]["0.weight"],
    "nnx": lambda model: model.map.kernel[...],
    "nnx's state": lambda state: state["map"]["kernel"][...],
    "nnx's pure dict": lambda tree: tree["map"]["kernel"],
    "linen": lambda tree: tree["params"]["map"]["kernel"],
    "haiku": lambda pair: pair[0]["linear"]["w"],
    "equinox": lambda pair: pair[0][0].weight,
}


@pytest.mark.parametrize("name", MODELS)
def test_other_arrays_are_the_first_models_unless_everything_is_asked_for(name: str) -> None:
    models = two(name)
    first, second = (np.float64(WEIGHTS[name](model)) for model in models)
    assert np.abs(first - second).max() > 0.01
    merged = merge(models, COUNTS)
    np.testing.assert_array_equal(np.float64(WEIGHTS[name](merged)), first)
    whole = merge(models, COUNTS, everything=True)
    found = np.asarray(WEIGHTS[name](whole))
    np.testing.assert_allclose(found, (first + 3 * second) / 4, rtol=2e-7, atol=1e-8)
    assert type(WEIGHTS[name](whole)) is type(WEIGHTS[name](models[0]))
    for ours, theirs in zip(transfer(whole).states, transfer(merged).states, strict=True):
        np.testing.assert_array_equal(ours.var, theirs.var)


def test_merged_state_dict_loads_and_shares_no_memory() -> None:
    models = [torch_net(0), torch_net(1)]
    merged = merge([model.state_dict() for model in models], COUNTS)
    assert merged._metadata == models[0].state_dict()._metadata
    merged["0.weight"].fill_(7.0)
    assert not bool((models[0][0].weight == 7.0).any())
    torch_net(2).load_state_dict(merged)


def test_merged_nnx_state_updates_a_model() -> None:
    models = [fill(NnxNet(seed), seed) for seed in (1, 2)]
    target = NnxNet(3)
    nnx.update(target, merge([nnx.state(model) for model in models], everything=True))
    wanted = merge(models, everything=True)
    for (path, ours), (_, theirs) in zip(
        nnx.to_flat_state(nnx.state(target)), nnx.to_flat_state(nnx.state(wanted)), strict=True
    ):
        if not isinstance(ours, nnx.RngKey):
            np.testing.assert_array_equal(ours[...], theirs[...], err_msg=str(path))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32])
def test_counters_are_summed_as_integers_of_their_type(dtype: torch.dtype) -> None:
    states = [torch_net().state_dict() for _ in range(3)]
    for state, steps in zip(states, (3, 2**24 + 1, 4), strict=True):
        state["1.num_batches_tracked"] = torch.tensor(steps, dtype=dtype)
    found = merge(states)["1.num_batches_tracked"]
    assert found.dtype == dtype
    assert int(found) == 2**24 + 8
    if dtype == torch.int32:
        states[0]["1.num_batches_tracked"].fill_(2**31 - 1)
        with pytest.raises(ValueError, match=r"counter of steps overflows its type, int32"):
            merge(states)


def test_models_whose_counters_add_up() -> None:
    models = [torch_net(0), torch_net(1)]
    for model, steps in zip(models, (3, 4), strict=True):
        model[1].num_batches_tracked.fill_(steps)
    merged = merge(models)
    assert int(merged[1].num_batches_tracked) == 7
    assert int(models[0][1].num_batches_tracked) == 3


@pytest.mark.parametrize(("steps", "expected"), [(3, 7), (LONG_RUNNING, LONG_RUNNING)])
def test_counters_of_layers_that_debias_add_up(steps: int, expected: int) -> None:
    layers = [OursNnx(3, debias=True, renorm=True, rngs=nnx.Rngs(0)) for _ in range(2)]
    for layer, number in zip(layers, (steps, 4), strict=True):
        layer.steps[...] = jnp.asarray(number, jnp.int32)
        layer.set_renorm_clipping(rmax=3.0)
    for kind in (lambda layer: layer, nnx.state):
        found = merge([kind(layer) for layer in layers], everything=True)
        merged = found if isinstance(found, nnx.State) else nnx.state(found)
        assert int(merged["steps"][...]) == expected
        assert float(merged["renorm"]["rmax"][...]) == 3.0


def test_layers_by_themselves_and_the_explicit_one() -> None:
    layers = [Explicit(), Explicit()]
    for layer, mean in zip(layers, (0.0, 4.0), strict=True):
        layer.initialise_layer(input_shape=(3,))
        layer.running_mean.fill_(mean)
    merged = merge(layers)
    assert isinstance(merged, Explicit)
    assert merged.running_mean.tolist() == [2.0] * 3
    assert merged.running_var.tolist() == [5.0] * 3
    assert layers[0].running_mean.tolist() == [0.0] * 3


def test_forms_may_differ_where_the_layers_are_the_same() -> None:
    model, other = torch_model(), torch_model()
    other.bn1.running_mean += 4.0
    wanted = merge([model, other], [2, 2])
    for form in (other.state_dict(), transfer(other).states):
        found = merge([model, form], [2, 2])
        assert torch.equal(found.bn1.running_var, wanted.bn1.running_var)
    converted = transfer(other, nnx_model(), count=2).target
    found = merge([model, converted], [2, 2])  # biased and unbiased, by equal names
    torch.testing.assert_close(found.bn1.running_var, wanted.bn1.running_var, rtol=1e-6, atol=0.0)
    with pytest.raises(ValueError, match="kind of variance must be the same"):
        merge([model, converted])


def test_stacked_layers_merge_slice_by_slice() -> None:
    @nnx.vmap(in_axes=0, out_axes=0)
    def make(keys: Any) -> nnx.BatchNorm:
        return nnx.BatchNorm(3, rngs=nnx.Rngs(keys))

    def stacked(mean: float) -> nnx.BatchNorm:
        layer = make(jax.random.split(jax.random.key(0), 2))
        layer.mean[...] = jnp.asarray([[mean] * 3, [0.0] * 3])
        return layer

    merged = merge([stacked(0.0), stacked(4.0)])
    assert merged.var[...].tolist() == [[5.0] * 3, [1.0] * 3]


def test_layers_without_statistics_average_gamma_and_beta() -> None:
    layers = [torch.nn.BatchNorm1d(2, track_running_stats=False) for _ in range(2)]
    layers[1].weight.data.fill_(3.0)
    assert merge(layers, [1, 3]).weight.tolist() == [2.5, 2.5]


def test_half_precision_statistics_are_rounded_once_and_overflow_is_an_error() -> None:
    layers = [torch.nn.BatchNorm1d(1).half() for _ in range(2)]
    layers[1].running_mean.fill_(4.0)
    merged = merge(layers)
    assert merged.running_var.dtype == torch.float16
    assert merged.running_var.tolist() == [5.0]
    layers[1].running_mean.fill_(6e4)
    with pytest.raises(ValueError, match="var overflows the layer's type"):
        merge(layers)


def test_shared_layers_and_tied_weights_are_merged_once() -> None:
    def net(mean: float) -> torch.nn.Module:
        norm, maps = torch.nn.BatchNorm1d(2), torch.nn.Linear(2, 2, bias=False)
        norm.running_mean.fill_(mean)
        maps.weight.data.fill_(mean)
        return torch.nn.Sequential(maps, norm, maps, norm)

    merged = merge([net(0.0), net(4.0)], everything=True)
    assert merged[1] is merged[3]
    assert merged[1].running_var.tolist() == [5.0, 5.0]
    assert merged[0].weight.unique().tolist() == [2.0]


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (lambda m: m.register_buffer("table", torch.arange(3)), {}, "model 1 has besides table"),
        (lambda m: m.__delattr__("conv"), {}, "model 1 lacks conv.weight, conv.bias"),
        (
            lambda m: setattr(m, "conv", torch.nn.Conv2d(3, 4, 5)),
            {},
            r"'conv.weight' must have the same shape in all models; model 1 has \(4, 3, 5, 5\)",
        ),
        (lambda m: m.conv.bias.data.fill_(torch.nan), {}, "'conv.bias' must be finite"),
        (lambda m: None, {"counts": {"bn1": [2, 2], "bn2": [2, 2]}}, "needs one count for each"),
    ],
)
def test_other_arrays_that_cannot_be_averaged_are_refused(
    change: Callable[[Any], Any], options: Any, message: str
) -> None:
    models = [torch_model(), torch_model()]
    change(models[1])
    with pytest.raises(ValueError, match=f"^merge: .*{message}"):
        merge(models, everything=True, **options)
    merge(models, **options)  # they do not matter otherwise


def test_integers_that_differ_are_refused_and_equal_ones_kept() -> None:
    models = [torch_model(), torch_model()]
    for model in models:
        model.register_buffer("table", torch.arange(3))
    assert merge(models, everything=True).table.tolist() == [0, 1, 2]
    models[1].table += 1
    with pytest.raises(ValueError, match="'table' holds int64, which cannot be averaged"):
        merge(models, everything=True)


def test_model_that_is_refused_or_fails_to_be_written_leaves_all_as_they_were() -> None:
    models = [torch_net(0), torch_net(1)]
    before = [copy.deepcopy(model.state_dict()) for model in models]
    models[1][1].running_var[0] = -1.0
    before[1]["1.running_var"][0] = -1.0
    with pytest.raises(ValueError, match=r"model 1, layer '1' \(torch.nn.BatchNorm1d\): var must"):
        merge(models)
    for model, old in zip(models, before, strict=True):
        for name, tensor in model.state_dict().items():
            assert torch.equal(tensor, old[name]), name


def test_what_is_no_model_or_has_no_batch_norm_is_refused() -> None:
    with pytest.raises(TypeError, match=r"^merge: batch norms can be in models.*got int"):
        merge([torch_net(), 5])
    with pytest.raises(ValueError, match="every model must have a batch norm; model 0 has none"):
        merge([torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)])
    with pytest.raises(ValueError, match="every model must have a batch norm; model 1 has none"):
        merge([torch_net().state_dict(), {}])


def test_state_is_written_into_the_layer_that_it_came_from() -> None:
    layers = [torch.nn.BatchNorm1d(2), torch.nn.BatchNorm1d(2)]
    layers[1].running_mean.fill_(2.0)
    state = merge([take_state(layer) for layer in layers])
    put_state(layers[0], state)
    assert layers[0].running_var.tolist() == [2.0, 2.0]


def test_model_that_cannot_be_copied_is_refused_with_the_remedy() -> None:
    models = [torch_net(0), torch_net(1)]
    for model in models:
        model.table = model[0].weight * 2.0  # a part of a graph
    with pytest.raises(ValueError, match=r"Sequential cannot be copied: .*Use its state_dict\(\)"):
        merge(models)
    merge([model.state_dict() for model in models])


def test_half_a_batch_norm_in_a_state_dict_is_a_warning() -> None:
    states = [torch_net(seed).state_dict() for seed in range(2)]
    states[1]["half.running_mean"] = torch.zeros(3)
    with pytest.warns(
        UserWarning, match="merge: model 1: 'half' cannot be read.*lacks its"
    ) as seen:
        merge(states)
    assert seen[0].filename == __file__


def test_state_dicts_of_torch_import_no_other_framework() -> None:
    code = (
        "import sys, torch; from batchnorm.tools import merge\n"
        "state = torch.nn.BatchNorm1d(3).state_dict()\n"
        "merge([state, state], everything=True); print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {"jax", "flax", "keras", "tensorflow"} & set(done.stdout.split())


def test_haiku_models_with_other_numbers_of_updates_merge_as_settled() -> None:
    pairs = [haiku_net(0), haiku_net(1)]
    for name, tree in pairs[1][1].items():
        pairs[1][1][name] = tree | {"counter": tree["counter"] + 5}
    merged = merge(pairs, everything=True)
    counters = {int(tree["counter"]) for tree in merged[1].values()}
    assert counters == {int(t["counter"]) for t in fill(haiku_net(0), 0)[1].values()}
    assert min(counters) > 5


@pytest.mark.parametrize("counts", [[1, 1], [0.5, 0.5], [1.5, 20]])
def test_weights_in_the_place_of_rows_are_refused(counts: list[float]) -> None:
    layers = [torch.nn.BatchNorm1d(2) for _ in range(2)]
    with pytest.raises(ValueError, match="counts must be numbers of rows, at least 2"):
        merge(layers, counts=counts)


def test_sums_of_counters_stay_numbers_of_64_bits() -> None:
    layers = [torch.nn.BatchNorm1d(2) for _ in range(3)]
    for layer in layers:
        layer.num_batches_tracked.fill_(2**61)
    merged = layers
    for _ in range(3):
        merged = [merge(merged, counts=[4] * len(merged))] * 3
    assert merged[0].num_batches_tracked == 2**62
