"""Features of the torch backend alone: state updated in place, checkpointing, ranks."""

from __future__ import annotations

import keras
import numpy as np
import pytest

if keras.backend.backend() != "torch":
    pytest.skip("needs the torch backend", allow_module_level=True)

import torch
from torch.utils.checkpoint import checkpoint

from batchnorm.keras import BatchNormalization, SyncBatchNormalization


@pytest.mark.parametrize("renorm", [False, True])
def test_checkpointed_step_moves_the_statistics_once(renorm: bool) -> None:
    x = torch.tensor(np.random.default_rng(0).normal(2.0, 3.0, (16, 3)), dtype=torch.float32)
    dy = torch.randn(16, 3)
    found = []
    for again in (False, True):
        layer = BatchNormalization(momentum=0.5, renorm=renorm)
        layer.build((16, 3))
        leaf = x.clone().requires_grad_()

        def call(a: torch.Tensor, layer: BatchNormalization = layer) -> torch.Tensor:
            return layer(a, training=True)

        y = checkpoint(call, leaf, use_reentrant=False) if again else call(leaf)
        y.backward(dy)
        found.append([leaf.grad, *(w.value.detach() for w in layer.non_trainable_weights)])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


def test_one_process_is_an_ordinary_layer() -> None:
    x = torch.randn(8, 3)
    found = [cls()(x, training=True) for cls in (SyncBatchNormalization, BatchNormalization)]
    torch.testing.assert_close(*found)
