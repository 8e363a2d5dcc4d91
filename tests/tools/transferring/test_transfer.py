"""Carrying batch norms between torch, nnx, linen, Haiku, Equinox, explicit layers and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import equinox as eqx
import flax.linen as nn
import haiku as hk
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from files import CHANNELS, WRITERS, linen_variables, nnx_model, random_states, torch_model
from flax import nnx

from batchnorm.core.running import LONG_RUNNING
from batchnorm.jax import BatchNorm as OursNnx
from batchnorm.tools import transfer
from batchnorm.tools.checkpoints import read_checkpoint
from batchnorm.tools.models import take_state
from batchnorm.torch import BatchNorm
from batchnorm.torch.explicit import BatchNorm as Explicit
from batchnorm.verification.tolerances import FLOAT32, HALF_ULP

PARAMETERS = ("gamma", "beta")
COUNT = 48


def check_states(states: list[Any], *, scale: float = 1.0, ulps: int = 0) -> None:
    """Compare with `random_states`, to the bit except for the variance."""
    assert [s.channels for s in states] == list(CHANNELS)
    for state, wanted in zip(states, random_states().values(), strict=True):
        for name in (*PARAMETERS, "mean"):
            np.testing.assert_array_equal(getattr(state, name), wanted[name], err_msg=name)
        tolerance = 2 * ulps * HALF_ULP["float32"]
        np.testing.assert_allclose(state.var, wanted["var"] * np.float64(scale), rtol=tolerance)


def empty_torch() -> torch.nn.Module:
    return torch.nn.Sequential(BatchNorm(CHANNELS[0]), torch.nn.BatchNorm2d(CHANNELS[1]))


def empty_nnx() -> nnx.Module:
    return nnx.List(
        [OursNnx(CHANNELS[0], rngs=nnx.Rngs(0)), nnx.BatchNorm(CHANNELS[1], rngs=nnx.Rngs(0))]
    )


def empty_linen() -> Any:
    return jax.tree.map(jnp.zeros_like, linen_variables())


def empty_haiku() -> Any:
    def net(x: Any) -> Any:
        for channels in CHANNELS:
            x = hk.BatchNorm(True, True, 0.9)(x[:, :1] + jnp.zeros(channels), is_training=True)
        return x

    return hk.transform_with_state(net).init(jax.random.key(0), jnp.ones((2, 3)))


def empty_equinox(mode: str = "batch") -> Any:
    def make() -> Any:
        return [eqx.nn.BatchNorm(c, axis_name="n", mode=mode) for c in CHANNELS]

    return eqx.nn.make_with_state(make)()


TARGETS = {
    "torch": empty_torch,
    "nnx": empty_nnx,
    "linen": empty_linen,
    "haiku": empty_haiku,
    "equinox": empty_equinox,
    "equinox ema": lambda: empty_equinox("ema"),
}


@pytest.mark.parametrize("name", TARGETS)
def test_model_reaches_every_library_and_comes_back(name: str) -> None:
    done = transfer(torch_model(), TARGETS[name](), count=COUNT)
    biased = name != "torch"
    check_states(done.states, scale=(COUNT - 1) / COUNT if biased else 1.0, ulps=1)
    back = torch_model()
    for parameter in [*back.parameters(), *back.buffers()]:
        parameter.data.zero_()
    transfer(done.target, back, count=COUNT)
    check_states(transfer(back).states, ulps=2)


@pytest.mark.parametrize("name", TARGETS)
def test_without_a_count_the_variance_is_carried_to_the_bit_and_a_note_says_so(name: str) -> None:
    done = transfer(torch_model(), TARGETS[name]())
    check_states(done.states)
    noted = any("count= converts it" in note for note in done.notes)
    assert noted == (name != "torch")


def wanted_output(x: np.ndarray, state: dict[str, np.ndarray], eps: float) -> np.ndarray:
    s = {name: np.float64(a) for name, a in state.items()}
    return (x - s["mean"]) / np.sqrt(s["var"] + eps) * s["gamma"] + s["beta"]


def test_transferred_layers_compute_the_same_in_evaluation() -> None:
    eps, state = 0.03, random_states()["bn1"]
    source = torch_model().bn1
    source.eps = eps
    x = np.random.default_rng(1).normal(1, 2, (6, CHANNELS[0])).astype(np.float32)
    wanted = wanted_output(x, state, eps)
    ours = transfer(source, OursNnx(4, use_running_average=True, rngs=nnx.Rngs(0))).target
    theirs = transfer(source, nnx.BatchNorm(4, use_running_average=True, rngs=nnx.Rngs(0))).target
    model, kept = transfer(
        source, eqx.nn.make_with_state(eqx.nn.BatchNorm)(4, axis_name="n", mode="batch")
    ).target
    in_equinox = jax.vmap(lambda a: model(a, kept, inference=True)[0], axis_name="n")
    explicit = Explicit()
    explicit.initialise_layer(input_shape=(4,))
    transfer(source, explicit)
    for y in (ours(x), theirs(x), in_equinox(x), explicit.forward(torch.from_numpy(x))):
        np.testing.assert_allclose(np.asarray(y), wanted, rtol=FLOAT32, atol=FLOAT32)


def test_haiku_uses_what_was_transferred_and_moves_it_as_settled() -> None:
    state = random_states()["bn1"]
    net = hk.transform_with_state(
        lambda x, training: hk.BatchNorm(True, True, 0.9, eps=1e-5)(x, is_training=training)
    )
    x = np.random.default_rng(1).normal(1, 2, (6, CHANNELS[0])).astype(np.float32)
    empty = net.init(jax.random.key(0), x, True)
    params, kept = transfer(torch_model().bn1, empty).target
    y, _ = net.apply(params, kept, None, x, False)
    wanted = wanted_output(x, state, 1e-5)
    np.testing.assert_allclose(y, wanted, rtol=FLOAT32, atol=FLOAT32)
    _, moved = net.apply(params, kept, None, x, True)
    mean = np.float64(0.9) * state["mean"] + 0.1 * x.mean(axis=0, dtype=np.float64)
    found = transfer((params, moved)).states[0].mean
    np.testing.assert_allclose(found, mean, rtol=FLOAT32)


def test_momentum_and_eps_are_converted() -> None:
    empty = OursNnx(3, rngs=nnx.Rngs(0))
    target = transfer(torch.nn.BatchNorm1d(3, eps=0.25, momentum=0.1), empty).target
    assert target is empty
    assert (target.epsilon, float(target.momentum[...])) == (0.25, np.float32(0.9))
    back = transfer(target, torch.nn.BatchNorm1d(3)).target
    assert (back.eps, back.momentum) == (0.25, 0.1)


def test_cumulative_average_is_kept_by_torch_and_noted_elsewhere() -> None:
    source = torch.nn.BatchNorm1d(3, momentum=None)
    source.num_batches_tracked.fill_(5)
    target = transfer(source, BatchNorm(3)).target
    assert target.momentum is None
    assert target.num_batches_tracked == 5
    done = transfer(source, nnx.BatchNorm(3, momentum=0.8, rngs=nnx.Rngs(0)))
    assert done.target.momentum == 0.8
    assert any("averages all batches" in note for note in done.notes)


def test_the_counter_of_steps_is_carried() -> None:
    source = BatchNorm(3, debias=True)
    source.num_batches_tracked.fill_(5)
    ours = OursNnx(3, debias=True, rngs=nnx.Rngs(0))
    transfer(source, ours, count=COUNT)
    assert int(ours.steps[...]) == 5
    assert transfer(ours, BatchNorm(3, debias=True), count=COUNT).target.num_batches_tracked == 5


def test_statistics_without_a_counter_have_run_for_long() -> None:
    flaxs = nnx.BatchNorm(3, rngs=nnx.Rngs(0))
    ours, theirs = OursNnx(3, debias=True, rngs=nnx.Rngs(0)), BatchNorm(3, debias=True)
    for target in (ours, theirs):
        transfer(flaxs, target, count=COUNT)
    assert int(ours.steps[...]) == theirs.num_batches_tracked == LONG_RUNNING
    ours(jnp.ones((8, 3)))
    assert take_state(ours).counted is take_state(theirs).counted is None
    whole = nnx.state(OursNnx(3, debias=True, rngs=nnx.Rngs(0)))
    assert int(transfer(flaxs, whole, count=COUNT).target["steps"][...]) == LONG_RUNNING
    again = transfer(ours, OursNnx(3, debias=True, rngs=nnx.Rngs(0)), count=COUNT).target
    assert int(again.steps[...]) == LONG_RUNNING


def test_stacked_layers_have_counters_of_their_own() -> None:
    keys = jax.random.split(jax.random.key(0), 2)
    layers = nnx.vmap(lambda key: OursNnx(3, debias=True, rngs=nnx.Rngs(key)))(keys)
    source = torch.nn.Sequential(BatchNorm(3), BatchNorm(3))
    source[1].num_batches_tracked.fill_(7)
    transfer(source, layers, count=COUNT)
    np.testing.assert_array_equal(layers.steps[...], [0, 7])


def test_renormalization_is_carried_derived_or_left_out() -> None:
    source = BatchNorm(3, renorm=True)
    source.renorm_mean.fill_(2.0)
    ours = OursNnx(3, renorm=True, rngs=nnx.Rngs(0))
    done = transfer(source, ours)
    assert float(ours.renorm_mean[0]) == 2.0
    assert not any("variance" in note for note in done.notes), "with renorm torch's is biased too"
    plain = transfer(source, nnx.BatchNorm(3, rngs=nnx.Rngs(0)))
    assert any("left out" in note for note in plain.notes)
    derived = transfer(torch.nn.BatchNorm1d(3, eps=3.0), BatchNorm(3, renorm=True))
    np.testing.assert_array_equal(derived.target.renorm_stddev, [2.0] * 3)  # √(1 + 3)
    assert any("derived" in note for note in derived.notes)


@pytest.mark.parametrize("name", ["pt", "msgpack", "keras"])
def test_checkpoint_of_every_format_goes_into_a_model(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"file.{name}"
    WRITERS[name](path)
    done = transfer(path, empty_torch(), eps=0.125)
    check_states(done.states)
    assert {s.eps for s in done.states} == {0.5 if name == "keras" else 0.125}
    assert any("does not say decay" in note for note in done.notes) == (name != "keras")


def test_matching_by_name_beats_order() -> None:
    model = nnx_model()
    layers = torch.nn.ModuleDict({"bn2": torch.nn.BatchNorm1d(5), "bn1": torch.nn.BatchNorm1d(4)})
    done = transfer(model, layers, count=COUNT)
    assert done.pairs == [("bn1", "bn1"), ("bn2", "bn2")]
    np.testing.assert_array_equal(layers["bn1"].running_mean, random_states()["bn1"]["mean"])


@pytest.mark.parametrize("as_function", [False, True])
def test_name_map_moves_what_it_names(as_function: bool) -> None:
    names: Any = {"bn2": "1", "bn1": None}
    target = empty_torch()
    done = transfer(torch_model(), target, names=names.get if as_function else names)
    assert done.pairs == [("bn2", "1")]
    assert target[0].running_mean.eq(0).all()
    assert any(note.endswith("since names leaves it out: bn1") for note in done.notes)


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        (
            lambda: torch.nn.BatchNorm1d(4),
            {},
            r"neither by name nor.*source, 2 batch norms: 'bn1' \(4\).*, 1 batch norm: '' \(4\)",
        ),
        (empty_torch, {"names": {"bn3": "0"}}, "no batch norm of the source"),
        (empty_torch, {"names": {"bn1": "7"}}, "no batch norm of the target"),
        (empty_torch, {"names": lambda name: "0"}, "two sources for '0'"),
        (empty_torch, {"names": {"bn1": "1"}}, "layer has 5 channels"),
        (empty_torch, {"count": 0}, "count must be a positive int"),
        (empty_torch, {"eps": -1.0}, "eps must lie in"),
        (lambda: torch.nn.Linear(2, 2), {}, "the target has no batch norm"),
    ],
)
def test_what_does_not_fit_is_an_error_that_names_it(
    target: Any, options: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        transfer(torch_model(), target(), **options)


def test_lists_of_names_are_cut() -> None:
    many = torch.nn.ModuleDict({f"{'x' * 500}{i}": torch.nn.BatchNorm1d(2) for i in range(300)})
    with pytest.raises(ValueError, match=r"source, 300 batch norms: .* and 295 more") as raised:
        transfer(many, torch_model())
    assert len(str(raised.value)) < 1000
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="is no batch norm of the target") as raised:
        transfer(many, many, names={f"{'x' * 500}1": "y" * 10_000})
    assert len(str(raised.value)) < 1200
    assert "\n" not in str(raised.value)
    assert all(len(note) < 1000 for note in transfer(many, many, eps=0.1).notes)


def test_nothing_is_written_unless_everything_fits() -> None:
    target = torch.nn.Sequential(
        torch.nn.BatchNorm2d(CHANNELS[0]), torch.nn.BatchNorm2d(CHANNELS[1], affine=False)
    )
    before = {name: a.clone() for name, a in target.state_dict().items()}
    with pytest.raises(ValueError, match=r"layer '1'.*has no gamma"):
        transfer(torch_model(), target)
    for name, tensor in target.state_dict().items():
        assert torch.equal(tensor, before[name]), name


def test_failure_while_writing_puts_back_what_was_written(monkeypatch: pytest.MonkeyPatch) -> None:
    from batchnorm.tools.frameworks.torch import states

    put, calls = states.put_state, []

    def interrupted(layer: Any, state: Any) -> None:
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        put(layer, state)

    monkeypatch.setattr(states, "put_state", interrupted)
    target = empty_torch()
    with pytest.raises(KeyboardInterrupt):
        transfer(torch_model(), target)
    assert target[0].running_mean.eq(0).all()


def test_rounding_to_a_narrower_type_is_noted() -> None:
    source = torch.nn.BatchNorm1d(3, dtype=torch.float64)
    source.running_mean.fill_(0.1)
    done = transfer(source, torch.nn.BatchNorm1d(3))
    assert any("rounded" in note for note in done.notes)
    assert not any("rounded" in n for n in transfer(source, torch.nn.BatchNorm1d(3).double()).notes)


def test_trees_are_copied_and_their_sources_stay_usable() -> None:
    pair = empty_equinox()
    transfer(torch_model(), pair)
    assert [s.mean.max() for s in transfer(pair).states] == [0.0, 0.0]
    variables = empty_linen()
    done = transfer(torch_model(), variables)
    assert float(variables["batch_stats"]["bn1"]["mean"].max()) == 0.0
    assert any("set it in the target's module" in note for note in done.notes)

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x: Any) -> Any:
            return nn.BatchNorm(use_running_average=True, name="bn1")(x)

    one = {collection: {"bn1": tree["bn1"]} for collection, tree in done.target.items()}
    x = np.ones((2, CHANNELS[0]), np.float32)
    wanted = wanted_output(x, random_states()["bn1"], 1e-5)
    np.testing.assert_allclose(Net().apply(one, x), wanted, rtol=FLOAT32, atol=FLOAT32)


def test_states_and_checkpoints_are_sources_but_no_targets(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    WRITERS["pt"](path)
    target = empty_torch()
    for source in (read_checkpoint(path), transfer(path).states):
        check_states(transfer(source, target).states)
    single = take_state(torch_model().bn1)
    assert transfer(single, torch.nn.BatchNorm1d(4)).pairs == [("", "")]
    with pytest.raises(TypeError, match="transfer: batch norms can be in models"):
        transfer(single, 3)


def test_what_looks_like_a_layer_in_a_file_or_a_tree_is_noted(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    arrays = torch.nn.BatchNorm1d(3).state_dict()
    torch.save({**arrays, "half.running_mean": torch.zeros(2)}, path)
    (note,) = [n for n in transfer(str(path)).notes if "half" in n]
    layer = torch.nn.BatchNorm1d(3)
    assert note in transfer(str(path), layer).notes
    tree = {"a": {k: np.zeros(3) for k in ("mean", "var")}, "b": {"mean": np.zeros(2)}}
    found = transfer({"params": {}, "batch_stats": tree})
    assert len(found.states) == 1
    assert any("b" in n for n in found.notes)


def test_keys_that_a_tree_joins_to_one_name_are_an_error() -> None:
    leaves = {"mean": np.zeros(3), "var": np.ones(3)}
    tree = {"batch_stats": {"a/b": leaves, "a": {"b": leaves}}, "params": {}}
    with pytest.raises(ValueError, match=r"transfer: a tree's keys.*'batch_stats/a/b/mean'"):
        transfer(tree)


def test_bounds_of_reading_are_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(torch.nn.BatchNorm1d(1000).state_dict(), path)
    with pytest.raises(ValueError, match="limit="):
        transfer(str(path), limit=100)


def test_state_dict_of_torch_is_a_source_and_a_target_of_its_own() -> None:
    check_states(transfer(torch_model().state_dict()).states)
    check_states(transfer({"epoch": 3, "state_dict": torch_model().state_dict()}).states)
    model = empty_torch()
    empty = model.state_dict()
    done = transfer(torch_model(), empty)
    check_states(done.states)
    assert int(done.target["0.num_batches_tracked"]) == 7
    assert done.target._metadata == empty._metadata
    assert model[0].running_mean.eq(0).all()
    model.load_state_dict(done.target)
    check_states(transfer(model).states)


def test_state_of_nnx_keeps_its_variables_and_random_numbers() -> None:
    target = nnx.List([*empty_nnx(), nnx.Dropout(0.5, rngs=nnx.Rngs(1))])
    state = nnx.state(target)
    done = transfer(torch_model(), state, count=COUNT)
    assert isinstance(done.target, nnx.State)
    nnx.update(target, done.target)
    check_states(transfer(target).states, scale=(COUNT - 1) / COUNT, ulps=1)
    for (path, old), (_, new) in zip(
        nnx.to_flat_state(state), nnx.to_flat_state(done.target), strict=True
    ):
        assert type(new) is type(old), path


def test_arrays_of_numpy_in_a_tree_stay_float64() -> None:
    tree = jax.tree.map(lambda a: np.zeros(a.shape), linen_variables())
    done = transfer(torch_model(), tree)
    assert {a.dtype for a in jax.tree.leaves(done.target)} == {np.dtype(np.float64)}
    assert not any("rounded" in note for note in done.notes)
