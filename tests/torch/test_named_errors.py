"""Every error about an argument begins with the layer or function that the user called."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import batchnorm
import batchnorm.torch as bt
from batchnorm.core.errors import ArgumentError
from batchnorm.torch import explicit

X = torch.arange(24.0).reshape(8, 3)
MASK = torch.ones(8, dtype=torch.bool)
JAGGED = torch.nested.nested_tensor([X[:2], X[2:5]], layout=torch.jagged)


def recompute_after_two_padding_masks() -> Any:
    layer = bt.BatchNorm(3)
    for mask in (MASK, ~MASK):
        with bt.padding_mask(mask):
            y = checkpoint(layer, X.clone().requires_grad_(), use_reentrant=False)
    return y.sum().backward()


def recompute_after_too_many_steps() -> Any:
    layer = bt.BatchNorm(3, renorm=True)
    y = checkpoint(layer, X.clone().requires_grad_(), use_reentrant=False)
    for scale in range(2, 20):
        layer(X * scale)
    return y.sum().backward()


def in_a_padding_mask(mask: torch.Tensor, call: Callable[[], Any]) -> Any:
    with bt.padding_mask(mask):
        return call()


def set_attributes(layer: Any, **values: Any) -> Any:
    for name, value in values.items():
        setattr(layer, name, value)
    return layer


def started(**kwargs: Any) -> explicit.BatchNorm:
    layer = explicit.BatchNorm(**kwargs)
    layer.initialise_layer(input_shape=(3,))
    return layer


def reverted_graph() -> Any:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = bt.BatchNorm1d(3)

        def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
            y: torch.Tensor = self.norm(x, mask=mask)
            return y

    return bt.revert_batchnorm(torch.fx.symbolic_trace(Model()))


def compiled(layer: nn.Module, *arguments: Any) -> Any:
    torch._dynamo.reset()
    return torch.compile(layer, backend="eager")(*arguments)


CALLS: dict[str, tuple[str, Callable[[], Any]]] = {
    "constructor": ("BatchNorm1d", lambda: bt.BatchNorm1d(-1)),
    "constructor, eps": ("BatchNorm", lambda: bt.BatchNorm(3, eps=-1.0)),
    "constructor, group": ("BatchNorm", lambda: bt.BatchNorm(3, process_group=1)),
    "configure": ("BatchNorm2d", lambda: bt.BatchNorm2d(3).configure(activation="x")),
    "configure, unknown": ("BatchNorm", lambda: bt.BatchNorm(3).configure(shade=1)),
    "process_group": ("BatchNorm", lambda: set_attributes(bt.BatchNorm(3), process_group=1)),
    "eps": ("BatchNorm", lambda: set_attributes(bt.BatchNorm(3), eps=-1.0)(X)),
    "momentum": ("BatchNorm", lambda: set_attributes(bt.BatchNorm(3), momentum=2.0)(X)),
    "axis": ("BatchNorm", lambda: bt.BatchNorm(3, axis=5)(X)),
    "rank": ("BatchNorm2d", lambda: bt.BatchNorm2d(3)(X)),
    "channels": ("BatchNorm", lambda: bt.BatchNorm(4)(X)),
    "input": ("BatchNorm", lambda: bt.BatchNorm(3)(X.long())),
    "no tensor": ("BatchNorm", lambda: bt.BatchNorm(3)([1.0])),
    "mask": ("BatchNorm", lambda: bt.BatchNorm(3)(X, MASK[1:])),
    "mask, values": ("BatchNorm", lambda: bt.BatchNorm(3)(X, MASK.int() * 2)),
    "residual": ("BatchNorm", lambda: bt.BatchNorm(3)(X, residual=X[1:])),
    "one value": ("BatchNorm", lambda: bt.BatchNorm(3)(X[:1])),
    "ghost": ("BatchNorm", lambda: bt.BatchNorm(3, virtual_batch_size=3)(X)),
    "adjustment": ("BatchNorm", lambda: bt.BatchNorm(3, adjustment=lambda shape: 1)(X)),
    "adjusted": ("BatchNorm", lambda: bt.BatchNorm(3, adjustment=lambda s: (X.T, None))(X)),
    "fused": ("BatchNorm", lambda: bt.BatchNorm((8, 3), axis=(0, 2), fused=True)(X[:, None].mT.mT)),
    "functional_call": (
        "BatchNorm",
        lambda: torch.func.functional_call(bt.BatchNorm(3), {"weight": X}, X),
    ),
    "under vmap": ("BatchNorm", lambda: torch.func.vmap(bt.BatchNorm(4).eval())(X[None])),
    "under grad": (
        "BatchNorm",
        lambda: torch.func.grad(lambda x: bt.BatchNorm(4)(x).sum())(X),
    ),
    "explain": ("BatchNorm", lambda: batchnorm.explain(bt.BatchNorm(4), X)),
    "scripted": ("BatchNorm", lambda: torch.jit.script(bt.BatchNorm(3))),
    "exported": (
        "BatchNorm",
        lambda: in_a_padding_mask(MASK, lambda: torch.export.export(bt.BatchNorm(3), (X,))),
    ),
    "compiled": ("BatchNorm", lambda: compiled(bt.BatchNorm(4), X)),
    "compiled, masked": (
        "BatchNorm",
        lambda: in_a_padding_mask(MASK[1:], lambda: compiled(bt.BatchNorm(3), X)),
    ),
    "recomputed, masked": ("BatchNorm", recompute_after_two_padding_masks),
    "recomputed, renormalized": ("BatchNorm", recompute_after_too_many_steps),
    "jagged, axis": ("BatchNorm", lambda: bt.BatchNorm(3)(JAGGED)),
    "jagged, ghost": ("BatchNorm", lambda: bt.BatchNorm(3, axis=-1, virtual_batch_size=2)(JAGGED)),
    "jagged, mask": ("BatchNorm", lambda: bt.BatchNorm(3, axis=-1)(JAGGED, MASK)),
    "jagged, residual": ("BatchNorm", lambda: bt.BatchNorm(3, axis=-1)(JAGGED, residual=X)),
    "function": ("batch_norm", lambda: bt.batch_norm(X, None, None, training=1)),
    "function, one value": ("batch_norm", lambda: bt.batch_norm(X[:1], None, None, training=True)),
    "function, jagged": ("batch_norm", lambda: bt.batch_norm(JAGGED, None, None, training=True)),
    "function, group": (
        "batch_norm",
        lambda: bt.batch_norm(X, None, None, training=True, process_group=1),
    ),
    "padding_mask": ("padding_mask", lambda: in_a_padding_mask(X, lambda: None)),
    "padding_mask, layer": (
        "BatchNorm",
        lambda: in_a_padding_mask(MASK[1:], lambda: bt.BatchNorm(3)(X)),
    ),
    "sequence_mask": ("sequence_mask", lambda: bt.sequence_mask(torch.tensor([5]), 4)),
    "convert": ("convert_batchnorm", lambda: bt.convert_batchnorm(1)),
    "convert, option": ("convert_batchnorm", lambda: bt.convert_batchnorm(nn.ReLU(), shade=1)),
    "convert, lazy": ("convert_batchnorm", lambda: bt.convert_batchnorm(nn.LazyBatchNorm1d())),
    "revert": ("revert_batchnorm", lambda: bt.revert_batchnorm(bt.BatchNorm(3))),
    "revert, frozen": ("revert_batchnorm", lambda: bt.revert_batchnorm(bt.BatchNorm1d(3).freeze())),
    "revert, graph": ("revert_batchnorm", reverted_graph),
    "explicit": ("explicit.BatchNorm", lambda: explicit.BatchNorm(patience=2)),
    "explicit, shape": ("explicit.BatchNorm", lambda: started().forward(X[:, :2])),
    "explicit, mask": ("explicit.BatchNorm", lambda: started().forward(X, mask=MASK[1:])),
    "explicit, start": (
        "explicit.BatchNorm",
        lambda: explicit.BatchNorm().initialise_layer(input_shape=()),
    ),
    "explicit, early": ("explicit.BatchNorm", lambda: explicit.BatchNorm().forward(X)),
    "explicit, no pass": ("explicit.BatchNorm", lambda: started().backward(X)),
}


@pytest.mark.parametrize(("owner", "call"), CALLS.values(), ids=CALLS)
def test_error_begins_with_what_was_called(owner: str, call: Callable[[], Any]) -> None:
    with pytest.raises((TypeError, ValueError, RuntimeError)) as info:
        call()
    assert not isinstance(info.value, ArgumentError)
    assert str(info.value).startswith(f"{owner}: ")
