"""Every layer of a torch model, followed through hooks."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.tools.frameworks.adapter import Follower
from batchnorm.tools.frameworks.records import Called, Values
from batchnorm.tools.frameworks.torch.private import fill_tree, flatten_tree
from batchnorm.tools.frameworks.torch.states import is_batch_norm
from batchnorm.torch.masking import padding_mask


@contextmanager
def follow(model: nn.Module, follower: Follower, seed: int) -> Iterator[None]:
    """As `Following.follow`. Compiled code falls back to eager code."""
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    with ExitStack() as stack:
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        stack.enter_context(torch.random.fork_rng(devices=devices))
        # The fast path of torch's transformers packs real positions, and calls no inner layer.
        stack.callback(
            torch.backends.mha.set_fastpath_enabled, torch.backends.mha.get_fastpath_enabled()
        )
        torch.backends.mha.set_fastpath_enabled(False)
        torch.manual_seed(seed)
        for name, module in model.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # takes no hooks; it is part of the layer around it
            layer = Called(name, type(module).__name__, is_batch_norm(module))
            before = module.register_forward_pre_hook(
                partial(_enter, layer, follower), with_kwargs=True
            )
            after = module.register_forward_hook(partial(_leave, layer, follower))
            stack.callback(before.remove)
            stack.callback(after.remove)
        yield


def _enter(layer: Called, follower: Follower, module: nn.Module, args: Any, kwargs: Any) -> Any:
    leaves, tree = flatten_tree((args, kwargs))
    return _replaced(leaves, follower.enter(layer, leaves), tree)


def _leave(layer: Called, follower: Follower, module: nn.Module, args: Any, result: Any) -> Any:
    leaves, tree = flatten_tree(result)
    return _replaced(leaves, follower.leave(layer, leaves), tree)


def _replaced(before: list[Any], after: list[Any], tree: Any) -> Any:
    """The arrays in their containers; None, which keeps the old containers, if none is new."""
    unchanged = all(a is b for a, b in zip(before, after, strict=True))
    return None if unchanged else fill_tree(after, tree)


def read(array: Any) -> Values | None:
    """As `Following.read`; NumPy arrays in a batch are read too."""
    if isinstance(array, np.ndarray):
        return Values(array.copy(), array.dtype.name)
    if not isinstance(array, Tensor) or array.is_nested or array.is_quantized:
        return None
    if array.layout is not torch.strided:
        return None
    a = array.detach()
    dtype = str(a.dtype).removeprefix("torch.")
    if a.is_floating_point() and a.dtype.itemsize < 4:
        a = a.float()
    return Values(a.resolve_conj().resolve_neg().cpu().numpy().copy(), dtype)


def write(values: Any, like: Any) -> Any:
    """As `Following.write`."""
    if isinstance(like, np.ndarray):
        return np.asarray(values, like.dtype)
    return torch.from_numpy(np.ascontiguousarray(values)).to(like.device, like.dtype)


def run(model: nn.Module, batch: Any, mask: Any) -> None:
    """As `Following.run`; this library's layers get the mask by `padding_mask`, which follows."""
    given = {"mask": mask} if "mask" in inspect.signature(model.forward).parameters else {}
    with padding_mask(torch.as_tensor(mask) != 0, rescale="any", follow=model):
        if isinstance(batch, dict):
            model(**{**given, **batch})
        else:
            model(batch, **given)
