"""`configure` changes what it is told, and nothing else."""

from __future__ import annotations

import pytest
import torch

from batchnorm.core.config import Renorm
from batchnorm.torch import BatchNorm

CLIPPING = {"rmin": 0.0, "rmax": 2.0, "dmax": 5.0}


def trained(**options):
    torch.manual_seed(0)
    layer = BatchNorm(1, momentum=0.1, **options)
    for _ in range(50):
        layer(torch.randn(64, 1) + 10.0)
    return layer


def state(layer):
    return {name: (id(a), a.clone()) for name, a in layer.named_buffers()}


def test_new_limits_leave_statistics_frozen_and_activation_as_they_are():
    layer = trained(renorm=True, renorm_momentum=0.01, activation="relu").freeze()
    before = state(layer)
    layer.configure(renorm=True, renorm_clipping={"rmax": 2.0})
    after = state(layer)
    assert before.keys() == after.keys()
    for name, (identity, values) in before.items():
        assert after[name][0] == identity
        assert torch.equal(after[name][1], values) == (name != "renorm_limits")
    assert layer.renorm_mean.item() == pytest.approx(10.0 * (1 - 0.99**50), abs=0.1)
    assert (layer.frozen, layer.activation) == (True, "relu")
    assert layer.renorm == Renorm(0.99, rmax=2.0)


GIVEN = {
    "virtual_batch_size": (4, 4),
    "activation": ("relu", "relu"),
    "fused": (False, False),
    "synchronized": (True, True),
    "renorm": (True, Renorm(0.99)),
}


@pytest.mark.parametrize("changed", GIVEN)
def test_every_other_option_stays(changed):
    others = {name: given for name, (given, _) in GIVEN.items() if name != changed}
    layer = BatchNorm(3, **others)
    layer.configure(**{changed: GIVEN[changed][0]})
    for name, (_, kept) in GIVEN.items():
        assert getattr(layer, name) == kept, name


def test_limits_and_momentum_are_told_apart():
    layer = BatchNorm(3, renorm=True, renorm_clipping=CLIPPING, renorm_momentum=0.05)
    layer.configure(renorm_momentum=0.1)
    assert layer.renorm == Renorm(0.9, **CLIPPING)
    layer.configure(renorm_clipping={"dmax": 1.0})
    assert layer.renorm == Renorm(0.9, dmax=1.0)


def test_switching_off_takes_the_parts_along():
    layer = BatchNorm(3, renorm=True, renorm_clipping=CLIPPING)
    layer.configure(renorm=False)
    assert layer.renorm is None
    assert sorted(layer.state_dict()) == sorted(BatchNorm(3).state_dict())
    layer.configure(renorm=True)
    assert layer.renorm == Renorm(0.99)


def test_renormalization_that_is_switched_on_starts_from_the_running_statistics():
    layer = trained()
    mean = layer.running_mean.clone()
    layer.configure(renorm=True)
    assert torch.equal(layer.renorm_mean, mean)
    assert torch.equal(layer.running_mean, mean)


def test_a_refused_change_changes_nothing():
    layer = trained(renorm=True, activation="relu")
    before = state(layer)
    with pytest.raises(ValueError, match="activation"):
        layer.configure(virtual_batch_size=4, activation="gelu")
    assert layer.virtual_batch_size is None
    assert state(layer).keys() == before.keys()


def test_a_group_needs_synchronization_as_in_the_constructor():
    with pytest.raises(TypeError, match="process_group must be"):
        BatchNorm(3).configure(process_group="no group")
