"""Tensors in a state dict."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor


def is_array(leaf: Any) -> bool:
    """True for a tensor."""
    return isinstance(leaf, Tensor)


def is_seed(leaf: Any) -> bool:
    """False: random numbers of torch come from no state dict."""
    return False


def type_of(leaf: Tensor) -> str:
    """The name of its type, like "float32"."""
    return str(leaf.dtype).removeprefix("torch.")


def read(leaf: Tensor) -> NDArray[Any]:
    """The values; half types as float32."""
    leaf = leaf.detach().cpu()
    narrow = leaf.is_floating_point() and leaf.dtype.itemsize < 4
    return (leaf.float() if narrow else leaf.clone()).numpy()


def copy(leaf: Tensor) -> Tensor:
    """A tensor with values of its own."""
    return leaf.detach().clone()


def make(values: Any, like: Tensor) -> Tensor:
    """Values as a tensor of the type, shape and device of another."""
    return torch.as_tensor(values).to(like.device, like.dtype).reshape(like.shape)
