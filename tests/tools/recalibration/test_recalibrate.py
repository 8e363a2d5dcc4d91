"""Population statistics: exact, and all or nothing."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import nn

import batchnorm.jax
from batchnorm.tools import recalibrate
from batchnorm.torch import BatchNorm1d, BatchNorm2d, padding_mask

pytestmark = pytest.mark.sample(2)

# Moments are summed in float64 and rounded once to the float32 in which layers store them.
STORED = {"rtol": 2.0**-23, "atol": 1e-7}


def batches_of(*sizes: int, features: int = 3, offset: float = 5.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, features, generator=generator) * (i + 1) + offset * i
            for i, n in enumerate(sizes)]  # fmt: skip


def snapshot(model: nn.Module) -> list[Any]:
    state = [(name, a, a.clone()) for name, a in model.state_dict(keep_vars=True).items()]
    return [state, [(module, module.training) for module in model.modules()]]


def assert_unchanged(model: nn.Module, before: list[Any]) -> None:
    state, modes = before
    now = model.state_dict(keep_vars=True)
    assert [name for name, *_ in state] == list(now)
    for name, tensor, value in state:
        assert now[name] is tensor
        assert torch.equal(tensor, value), name
    assert all(module.training is mode for module, mode in modes)


@pytest.mark.parametrize("layer", [nn.BatchNorm1d, BatchNorm1d])
def test_batches_of_unequal_sizes_count_by_rows(layer: Any) -> None:
    model = layer(3)
    batches = batches_of(2, 50, 7)
    report = recalibrate(model, batches)
    everything = torch.cat(batches).double()
    torch.testing.assert_close(model.running_mean, everything.mean(0).float(), **STORED)
    torch.testing.assert_close(model.running_var, everything.var(0).float(), **STORED)
    assert model.num_batches_tracked == 3
    assert report.batches == 3
    assert (report.changed[0].rows, report.changed[0].uses) == (59, 3)
    assert report.kept == ()
    assert "59 rows in 3 calls" in str(report)


def test_layers_behind_see_what_training_would_show_them() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.Dropout(0.5), nn.Linear(3, 2), nn.BatchNorm1d(2))
    with torch.no_grad():  # far from these data
        model[0].running_mean.fill_(-7.0)
    batches = batches_of(4, 9)
    recalibrate(model, batches)
    normalized = [
        (x - x.mean(0)) / torch.sqrt(x.var(0, correction=0) + model[0].eps)
        for x in (batch.double() for batch in batches)
    ]
    rows = torch.cat(normalized) @ model[2].weight.double().T + model[2].bias.double()
    # Forward passes are float32.
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(model[3].running_mean, rows.mean(0).float(), **close)
    torch.testing.assert_close(model[3].running_var, rows.var(0).float(), **close)


def test_evaluation_afterwards_is_normalized() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    model.append(nn.BatchNorm2d(4)).eval()
    x = torch.randn(16, 3, 9, 9) * 3 + 2
    recalibrate(model, [x])
    y = model(x).detach().double()
    # torch's layers evaluate by the unbiased variance, which both layers feel once.
    count = y[:, 0].numel()
    assert y.mean((0, 2, 3)).abs().max() < 2 / count
    torch.testing.assert_close(
        y.var((0, 2, 3)), torch.ones(4, dtype=torch.float64), rtol=0, atol=4 / count
    )


def test_masks_by_argument_and_by_context() -> None:
    x, mask = torch.randn(4, 3, 5) + 2, torch.arange(5) < torch.tensor([[1], [2], [5], [0]])
    rows = x.movedim(1, -1)[mask].double()
    by_argument, by_context = BatchNorm1d(3), BatchNorm1d(3)
    recalibrate(by_argument, [(x, mask)], call=lambda layer, batch: layer(*batch))
    recalibrate(by_argument, [{"input": x, "mask": mask}])

    def inside(layer: Any, batch: Any) -> None:
        with padding_mask(batch[1]):
            layer(batch[0])

    recalibrate(by_context, [(x, mask)], call=inside)
    for layer in (by_argument, by_context):
        torch.testing.assert_close(layer.running_mean, rows.mean(0).float(), **STORED)
        torch.testing.assert_close(layer.running_var, rows.var(0).float(), **STORED)


def test_layer_used_twice_gets_the_rows_of_both_uses() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(3)

        def forward(self, x: Any, y: Any) -> Any:
            return self.norm(x), self.norm(y)

    model = Twice()
    x, y = batches_of(4, 10)
    recalibrate(model, [(x, y)], call=lambda model, batch: model(*batch))
    everything = torch.cat([x, y]).double()
    torch.testing.assert_close(model.norm.running_mean, everything.mean(0).float(), **STORED)
    torch.testing.assert_close(model.norm.running_var, everything.var(0).float(), **STORED)
    assert model.norm.num_batches_tracked == 2


def test_cumulative_average_goes_on_from_the_population() -> None:
    layer = nn.BatchNorm1d(3, momentum=None)
    batches = batches_of(8, 8, 8)
    recalibrate(layer, batches[:2])
    before = layer.running_mean.clone()
    layer(batches[2])
    torch.testing.assert_close(layer.running_mean, (2 * before + batches[2].mean(0)) / 3)


def test_what_is_left_alone_and_why() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used = nn.BatchNorm1d(3)
            self.frozen = BatchNorm1d(3).freeze()
            self.stateless = nn.BatchNorm1d(3, track_running_stats=False)
            self.idle = nn.BatchNorm1d(3)

        def forward(self, x: Any) -> Any:
            return self.stateless(self.frozen(self.used(x)))

    model = Model()
    before = copy.deepcopy(model.state_dict())
    report = recalibrate(model, batches_of(6, offset=1.0))
    assert [layer.name for layer in report.changed] == ["used"]
    reasons = {layer.name: layer.reason for layer in report.kept}
    assert list(reasons) == ["frozen", "stateless", "idle"]
    assert "unfreeze" in reasons["frozen"]
    assert "no running statistics" in reasons["stateless"]
    assert "no batch" in reasons["idle"]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) is not name.startswith(
            ("used.running", "used.num")
        ), name


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("convert", [False, True])
def test_interrupted_half_way_the_model_is_unchanged(error: Any, convert: bool) -> None:
    norm = BatchNorm2d if convert else nn.BatchNorm2d
    model = nn.Sequential(nn.Conv2d(3, 4, 3), norm(4), nn.Dropout(), nn.Conv2d(4, 2, 1), norm(2))
    model[1].eval()
    model(torch.randn(2, 3, 5, 5))
    before = snapshot(model)

    def batches() -> Iterator[Any]:
        yield torch.randn(2, 3, 5, 5)
        yield torch.full((2, 3, 5, 5), torch.inf)
        raise error

    with pytest.raises(error):
        recalibrate(model, batches())
    assert_unchanged(model, before)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_statistics_that_overflow_a_half_type_change_no_layer() -> None:
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2), nn.BatchNorm1d(2)).half()
    with torch.no_grad():
        model[1].weight.fill_(3e3)
    before = snapshot(model)
    with pytest.raises(ValueError, match=r"layer '2'.*overflows"):
        recalibrate(model, [torch.randn(64, 2).half()])
    assert_unchanged(model, before)


def test_a_batch_that_is_not_finite_in_a_channel_does_not_count_there() -> None:
    layer = BatchNorm1d(3)
    good, bad = batches_of(6, 8)
    bad[2, 1] = torch.nan
    report = recalibrate(layer, [good, bad])
    both = torch.cat([good, bad]).double()
    expected = torch.stack([both[:, 0].mean(), good[:, 1].double().mean(), both[:, 2].mean()])
    torch.testing.assert_close(layer.running_mean, expected.float(), **STORED)
    assert report.changed[0].skipped == 1
    assert "1 not finite" in str(report)


def test_renormalization_starts_anew_from_the_population() -> None:
    layer = BatchNorm1d(3, renorm=True)
    [batch] = batches_of(20)
    recalibrate(layer, [batch])
    rows = batch.double()
    stddev = torch.sqrt(rows.var(0, correction=0) + layer.eps).float()
    torch.testing.assert_close(layer.running_var, rows.var(0, correction=0).float(), **STORED)
    torch.testing.assert_close(layer.renorm_mean, rows.mean(0).float(), **STORED)
    torch.testing.assert_close(layer.renorm_stddev, stddev, **STORED)
    torch.testing.assert_close(layer.running_stddev, stddev, **STORED)


@pytest.mark.parametrize(
    ("model", "batches", "options", "error", "text"),
    [
        (nn.BatchNorm1d(3), [(torch.ones(4, 3), 1)], {}, TypeError, r"call=lambda model, batch"),
        (nn.BatchNorm1d(3), [], {}, ValueError, "at least one batch"),
        (nn.Linear(3, 3), [torch.ones(4, 3)], {}, ValueError, "Linear has none"),
        (BatchNorm1d(3).freeze(), [torch.ones(4, 3)], {}, ValueError, "is frozen"),
        (nn.BatchNorm1d(3), [1], {"call": lambda model, batch: None}, ValueError, "may be a copy"),
        (nn.BatchNorm1d(3), [1], {"process_group": 1}, ValueError, "needs synchronized=True"),
        ("model", [1], {}, TypeError, "must be a torch.nn.Module"),
    ],
)
def test_refusals(model: Any, batches: Any, options: Any, error: Any, text: str) -> None:
    with pytest.raises(error, match=text):
        recalibrate(model, batches, **options)


def test_alone_synchronization_changes_nothing() -> None:
    layer, other = nn.BatchNorm1d(3), nn.BatchNorm1d(3)
    recalibrate(layer, batches_of(4, 5), synchronized=True)
    recalibrate(other, batches_of(4, 5))
    assert torch.equal(layer.running_var, other.running_var)


class _Network(nnx.Module):
    def __init__(self, norm: Any) -> None:
        self.first = norm(3, rngs=nnx.Rngs(0))
        self.drop = nnx.Dropout(0.5, rngs=nnx.Rngs(1))
        self.linear = nnx.Linear(3, 2, rngs=nnx.Rngs(2))
        self.second = norm(2, rngs=nnx.Rngs(3))

    def __call__(self, x: Any) -> Any:
        return self.second(self.linear(self.drop(self.first(x))))


@pytest.mark.parametrize("norm", [nnx.BatchNorm, batchnorm.jax.BatchNorm])
def test_nnx_stores_the_biased_variance(norm: Any) -> None:
    model = _Network(norm)
    batches = [jnp.asarray(batch.numpy()) for batch in batches_of(5, 30)]
    model.train()
    recalibrate(model, batches)
    rows = np.concatenate(batches).astype(np.float64)
    np.testing.assert_allclose(model.first.mean[...], rows.mean(0), rtol=1e-6)
    np.testing.assert_allclose(model.first.var[...], rows.var(0), rtol=1e-6)
    assert not model.first.use_running_average
    assert not model.drop.deterministic
    wide = (np.asarray(batch, np.float64) for batch in batches)
    normalized = np.concatenate([(x - x.mean(0)) / np.sqrt(x.var(0) + 1e-5) for x in wide])
    rows = normalized @ np.asarray(model.linear.kernel[...]) + np.asarray(model.linear.bias[...])
    np.testing.assert_allclose(model.second.mean[...], rows.mean(0), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(model.second.var[...], rows.var(0), rtol=1e-4)


def test_nnx_interrupted_is_unchanged() -> None:
    model = _Network(batchnorm.jax.BatchNorm)
    model.first.freeze()
    before = nnx.state(model)

    def batches() -> Iterator[Any]:
        yield jnp.ones((4, 3))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        recalibrate(model, batches())
    nnx_equal = jnp.array_equal
    for (path, a), (_, b) in zip(
        nnx.to_flat_state(before), nnx.to_flat_state(nnx.state(model)), strict=True
    ):
        if "key" not in path:
            assert nnx_equal(a[...], b[...]), path
    assert model.second.training
    with pytest.raises(ValueError, match="run on torch"):
        recalibrate(model, [jnp.ones((4, 3))], synchronized=True)


@pytest.mark.parametrize("count", [1, 5, 60])
def test_model_without_statistics_to_set_is_one_short_line(count: int) -> None:
    layers = [batchnorm.torch.BatchNorm1d(2).freeze() for _ in range(count)]
    names = [f"{'x' * 400}{i}" for i in range(count)]
    frozen = nn.ModuleDict(dict(zip(names, layers, strict=True)))
    with pytest.raises(ValueError, match="has statistics to set") as raised:
        recalibrate(frozen, [torch.ones(4, 2)])
    assert len(str(raised.value)) < 800
    assert "\n" not in str(raised.value)
    assert ("and 55 more is frozen" in str(raised.value)) == (count == 60)
    few = nn.Sequential(nn.BatchNorm1d(2, track_running_stats=False), layers[0])
    with pytest.raises(ValueError, match=r"0 keeps no running statistics; 1 is frozen; unfreeze"):
        recalibrate(few, [torch.ones(4, 2)])


def test_progress_shows_on_a_terminal_only(monkeypatch: Any, capsys: Any) -> None:
    layer = nn.BatchNorm1d(3)
    recalibrate(layer, batches_of(4))
    assert capsys.readouterr() == ("", "")
    monkeypatch.setenv("FORCE_COLOR", "1")
    recalibrate(layer, batches_of(4))
    shown = capsys.readouterr()
    assert shown.out == ""
    assert "recalibrating" in shown.err
    recalibrate(layer, batches_of(4), progress=False)
    assert capsys.readouterr() == ("", "")
