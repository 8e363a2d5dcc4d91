"""Our layers are torch's classes to programs that ask for those."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import nn

import batchnorm.torch as bt
from batchnorm.torch import convert_batchnorm, revert_batchnorm

PAIRS = [
    (bt.BatchNorm1d, nn.BatchNorm1d),
    (bt.BatchNorm2d, nn.BatchNorm2d),
    (bt.BatchNorm3d, nn.BatchNorm3d),
]
pairs = pytest.mark.parametrize(("ours", "theirs"), PAIRS)


@pairs
def test_classes(ours, theirs):
    layer = convert_batchnorm(theirs(8))
    assert type(layer) is ours
    assert isinstance(layer, theirs)
    assert isinstance(layer, nn.modules.batchnorm._BatchNorm)
    assert [c for _, c in PAIRS if isinstance(layer, c)] == [theirs]
    assert ours.forward is bt.BatchNorm.forward
    assert type(revert_batchnorm(layer)) is theirs


def test_the_layer_of_any_rank_is_none_of_them():
    assert not any(isinstance(bt.BatchNorm(3), theirs) for _, theirs in PAIRS)


@pairs
def test_weight_decay_is_split_alike(ours, theirs):
    def split(model):
        norms = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.LayerNorm)
        plain = [
            f"{name}.{p}"
            for name, m in model.named_modules()
            for p, _ in m.named_parameters(recurse=False)
            if isinstance(m, norms)
        ]
        return plain, [name for name, _ in model.named_parameters() if name not in plain]

    model = nn.Sequential(nn.Linear(3, 8), theirs(8), nn.LayerNorm(8))
    assert split(convert_batchnorm(copy.deepcopy(model))) == split(model)


@pairs
def test_freezing_and_initializing_helpers_find_it(ours, theirs):
    layer = ours(8)
    with torch.no_grad():
        for a in (*layer.parameters(), *layer.buffers()):
            a.fill_(7)

    def initialize(module):  # as transformers and torchvision do
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
            module.running_mean.zero_()
            module.running_var.fill_(1)
            module.num_batches_tracked.zero_()

    nn.Sequential(layer).apply(initialize)
    for name, a in theirs(8).state_dict().items():
        assert torch.equal(layer.state_dict()[name], a), name


@pairs
def test_copies_and_pickles_keep_the_class(ours, theirs):
    for other in (copy.deepcopy(ours(3)), pickle.loads(pickle.dumps(ours(3)))):
        assert type(other) is ours


@pairs
def test_update_of_averaged_models_finds_it(ours, theirs):
    layer = ours(2)
    shape = (8, 2, *[3] * (layer_rank(theirs) - 2))
    batches = [torch.randn(shape, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    torch.optim.swa_utils.update_bn(batches, layer)
    assert layer.num_batches_tracked == 3
    # Batches of one size: the mean of means is the mean.
    expected = torch.cat(batches).transpose(0, 1).flatten(1).mean(1)
    torch.testing.assert_close(layer.running_mean, expected, rtol=1e-5, atol=1e-6)


def layer_rank(theirs):
    return {nn.BatchNorm1d: 2, nn.BatchNorm2d: 4, nn.BatchNorm3d: 5}[theirs]
