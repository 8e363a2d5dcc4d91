"""Models with known faults, and models that inspection must not change."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from torch import Tensor, nn

import batchnorm.jax
import batchnorm.torch
from batchnorm.tools import inspect
from batchnorm.tools.inspection import Thresholds
from batchnorm.tools.inspection.report import Report

CHANNELS = (5, 7)


def make_torch(
    norm: Callable[..., nn.Module] = nn.BatchNorm1d, dropout: float = 0.0
) -> nn.Sequential:
    torch.manual_seed(0)
    first, second = (norm(size, momentum=None) for size in CHANNELS)  # plain averages of batches
    return nn.Sequential(
        nn.Conv1d(3, 5, 1), first, nn.ReLU(), nn.Dropout(dropout), nn.Conv1d(5, 7, 1), second
    )


def make_batch(seed: int, padded: bool = True) -> tuple[Tensor, Tensor]:
    """Samples of (3, L) with mean 2, zeros behind their length, and their mask."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(16, 3, 40, generator=generator) + 2.0
    lengths = torch.randint(5, 40, (16, 1), generator=generator)
    lengths = lengths if padded else torch.full((16, 1), 40)
    mask = torch.arange(40) < lengths
    return torch.where(mask[:, None], x, 0.0), mask


BATCHES = [make_batch(seed) for seed in range(6)]
UNPADDED = [make_batch(seed, padded=False) for seed in range(6)]


def train(model: nn.Module, batches: Any, call: Callable[..., Any]) -> None:
    model.train()
    for batch in batches:
        call(model, batch)


def without_mask(model: Any, batch: tuple[Tensor, Tensor]) -> Any:
    return model(batch[0])


def with_mask(model: Any, batch: tuple[Tensor, Tensor]) -> Any:
    with batchnorm.torch.padding_mask(batch[1]):
        return model(batch[0])


def codes(report: Report) -> list[set[str]]:
    return [{finding.code for finding in layer.findings} for layer in report.layers]


def test_new_model_was_never_trained() -> None:
    report = inspect(make_torch())
    assert [layer.name for layer in report.layers] == ["1", "5"]
    assert [layer.state.channels for layer in report.layers] == list(CHANNELS)
    assert codes(report) == [{"never-trained"}] * 2
    assert report.batches == 0


def test_model_trained_without_padding_is_healthy() -> None:
    model, batches = make_torch(), UNPADDED
    train(model, batches, without_mask)
    report = inspect(model, batches, call=without_mask)
    assert codes(report) == [set(), set()]
    assert report.batches == 6
    assert [layer.observed.rows for layer in report.layers] == [6 * 16 * 40] * 2  # type: ignore[union-attr]


def test_padding_in_the_statistics_is_found_in_layers_that_take_no_mask() -> None:
    model = make_torch()
    train(model, BATCHES, without_mask)
    report = inspect(
        model, BATCHES, call=without_mask, mask=lambda batch: batch[1],
        thresholds=Thresholds(drift_warning=0.1),
    )  # fmt: skip
    assert "padding-counted" in codes(report)[0]
    share = 1.0 - np.mean([mask.float().mean() for _, mask in BATCHES])
    assert report.layers[0].observed.padded == pytest.approx(share, rel=1e-6)  # type: ignore[union-attr]


def test_layer_with_masks_has_no_padding_in_its_statistics() -> None:
    model = make_torch(batchnorm.torch.BatchNorm)
    train(model, BATCHES, with_mask)
    report = inspect(model, BATCHES, call=with_mask)
    assert codes(report) == [{"padding"}] * 2
    x = torch.cat([model[0](x).movedim(1, 2)[mask] for x, mask in BATCHES]).detach().double()
    seen = report.layers[0].observed
    assert seen is not None
    np.testing.assert_allclose(seen.real.mean, x.mean(0), rtol=1e-6)
    np.testing.assert_allclose(seen.real.var, x.var(0, correction=0), rtol=1e-6)
    whole = torch.cat([model[0](x).movedim(1, 2).reshape(-1, 5) for x, _ in BATCHES]).double()
    assert seen.everything is not None
    np.testing.assert_allclose(seen.everything.mean, whole.mean(0).detach(), rtol=1e-6)


def test_drift_of_other_data_is_found_at_its_layer_only() -> None:
    model = make_torch()
    train(model, UNPADDED, without_mask)
    moved = [(x + 3.0, mask) for x, mask in UNPADDED]
    report = inspect(model, moved, call=without_mask)
    assert codes(report) == [{"drift"}, set()]  # the first layer normalizes the shift away


def test_dropout_before_a_batch_norm_is_drift() -> None:
    # Without dropout, the layer's input varies less: Li et al. 2019, arXiv 1801.05134.
    model = make_torch(dropout=0.5)
    train(model, UNPADDED, without_mask)
    report = inspect(model, UNPADDED, call=without_mask)
    assert codes(report) == [set(), {"drift"}]
    assert np.median(report.layers[1].quantities.drift.ratio) < 0.9  # type: ignore[union-attr]


def test_model_is_the_same_afterwards() -> None:
    model = make_torch(dropout=0.5)
    train(model, BATCHES, without_mask)
    model[1].eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random = torch.get_rng_state()
    inspect(model, BATCHES, call=without_mask)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_mask_of_another_shape_is_noted() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3), nn.AvgPool1d(2), nn.BatchNorm1d(3))
    report = inspect(model, BATCHES, call=without_mask, mask=lambda batch: batch[1])
    assert "unfit-mask" not in codes(report)[0]
    assert "unfit-mask" in codes(report)[1]
    assert report.layers[1].observed.padded is None  # type: ignore[union-attr]


def test_batch_that_is_not_finite_is_an_error() -> None:
    model = nn.Sequential(nn.BatchNorm1d(3))
    x = torch.randn(16, 3, 4)
    bad = x.clone()
    bad[0, 1, 2] = torch.nan
    report = inspect(model, [x, bad])
    found = next(f for f in report.layers[0].findings if f.code == "non-finite-input")
    assert "1 of 2 calls" in found.message


def test_frozen_and_unused_layers_are_notes() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.frozen = batchnorm.torch.BatchNorm(3)
            self.unused = nn.BatchNorm1d(3)
            self.frozen.freeze()

        def forward(self, x: Tensor) -> Tensor:
            return self.frozen(x)

    report = inspect(Net(), [torch.randn(8, 3)])
    assert "frozen" in codes(report)[0]
    assert "unused" in codes(report)[1]


@pytest.mark.parametrize("norm", [nnx.BatchNorm, batchnorm.jax.BatchNorm])
def test_nnx_model_is_inspected_and_left_alone(norm: Any) -> None:
    class Net(nnx.Module):
        def __init__(self, rngs: nnx.Rngs) -> None:
            self.linear = nnx.Linear(3, 5, rngs=rngs)
            self.norm = norm(5, momentum=0.5, rngs=rngs)

        def __call__(self, x: Any, mask: Any = None) -> Any:
            return self.norm(self.linear(x), mask=mask)

    model = Net(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (64, 3)) + 1.0
    for _ in range(30):
        model(x)
    before = jax.tree.map(np.array, nnx.to_pure_dict(nnx.state(model)))
    assert codes(inspect(model, [x])) == [set()]
    mask = jnp.arange(64)[:, None] < 48
    report = inspect(
        model,
        [x + 5.0 * (jnp.arange(64)[:, None] >= 48)],
        call=lambda model, x: model(x, mask=mask),
    )
    assert report.layers[0].observed.padded == 0.25  # type: ignore[union-attr]
    jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))


def test_model_without_batch_norms_is_an_empty_report() -> None:
    report = inspect(nn.Linear(2, 2), [torch.ones(1, 2)])
    assert (report.layers, report.ok, report.batches) == ((), True, 0)
    assert "no batch normalization found" in str(report)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"model": 3}, TypeError, "model must be a torch.nn.Module"),
        ({"batches": []}, ValueError, "inspect: batches must yield at least one batch"),
        ({"batches": [(1, 2)]}, TypeError, "inspect: batches must yield arrays or mappings"),
        (
            {"call": without_mask},
            ValueError,
            "inspect: call, mask and leaks are for batches; got no",
        ),
        ({"model": "model.pt", "batches": [1]}, ValueError, "a checkpoint cannot run batches"),
    ],
)
def test_errors_say_what_to_do(arguments: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        inspect(**{"model": make_torch(), **arguments})
