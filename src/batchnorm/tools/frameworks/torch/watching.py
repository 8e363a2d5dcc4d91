"""torch's batch norms, and this library's, watched through hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from batchnorm.core.errors import naming
from batchnorm.core.layout import Layout, make_layout, normalize_axis
from batchnorm.core.moments import Moments, centre
from batchnorm.tools.frameworks.records import FoundLayer, Observation
from batchnorm.tools.measure import measure
from batchnorm.torch import checks, jagged
from batchnorm.torch.devices import has_float64
from batchnorm.torch.layers import BatchNorm
from batchnorm.torch.masking import mask_in
from batchnorm.torch.masks.blocks import find_block
from batchnorm.torch.namespace import XP


@contextmanager
def watch(layers: Sequence[FoundLayer], see: Callable[[Observation], None]) -> Iterator[None]:
    """As `Adapter.watch`."""
    with ExitStack() as stack:
        # Compiled code does not look for hooks that came later.
        stack.enter_context(torch.compiler.set_stance("force_eager"))
        for found in layers:
            if not isinstance(found.layer, nn.Module):
                raise TypeError(
                    f"observe: layer {found.name!r} must be a torch.nn.Module to be watched; got "
                    f"{found.state.kind}."
                )
            hook = partial(_before_call, found, see)
            handle = found.layer.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield


def _before_call(
    found: FoundLayer,
    see: Callable[[Observation], None],
    layer: nn.Module,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> None:
    given = inspect.signature(layer.forward).bind(*args, **kwargs).arguments
    x = next(iter(given.values())).detach()
    mask = given.get("mask") if isinstance(layer, BatchNorm) else None
    with naming(type(layer).__name__):
        axes = normalize_axis(getattr(layer, "axis", 1), x.dim())
        if mask is None and isinstance(layer, BatchNorm):
            mask = mask_in(find_block(), x, axes, layer)
        if x.layout is torch.jagged:
            x, mask = jagged.real_values(x, mask)
            axes = tuple(a - 1 for a in axes)
        if mask is not None:
            mask = checks.to_boolean(checks.check_mask(mask, x.device))
            assert mask is not None
            mask = mask.reshape(make_layout(tuple(x.shape), axes).mask_shape(mask.shape))
    see(Observation(found, x, mask, axes, _measure))


def _measure(x: Tensor, mask: Tensor | None, axes: tuple[int, ...]) -> Moments:
    if x.device.type == "cpu":
        wide = x.float() if x.dtype is torch.bfloat16 else x
        return measure(wide.numpy(), None if mask is None else mask.numpy(), axes)
    # Moving activations off the device would take longer than their forward pass.
    layout = Layout(tuple(x.shape), axes)
    wide = x.double() if has_float64(x.device) or x.dtype is torch.float64 else x.float()
    found = centre(wide, mask, layout.reduced, eps=0.0, xp=XP)
    count, anchor, shift, var = (
        a.cpu().double().numpy().reshape(-1)
        for a in (torch.as_tensor(found.count), found.anchor, found.shift, found.var)
    )
    return Moments(np.broadcast_to(count, anchor.shape), anchor + shift, var)
