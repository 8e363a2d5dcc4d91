"""torch's batch norms, this library's, and frozen ones, which are buffers only."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.tools.arrays import complement, flatten, odd_shape
from batchnorm.tools.fitting import check_finite_casts, fit
from batchnorm.tools.frameworks.torch.private import BatchNormBase
from batchnorm.tools.state import BatchNormState, RenormState, Variance

_RENORM = ("running_stddev", "renorm_mean", "renorm_stddev")
_FROZEN = ("weight", "bias", "running_mean", "running_var")


def owns(model: Any) -> bool:
    """True for a torch module, or the explicit layer, which is not a module."""
    return isinstance(model, nn.Module) or _is_explicit(model)


def is_batch_norm(layer: Any) -> bool:
    """True for a layer that `take_state` reads."""
    return isinstance(layer, BatchNormBase) or _is_explicit(layer) or _is_frozen_copy(layer)


def find(model: Any) -> list[tuple[str, Any]]:
    """Names and batch norms, each once, in the order of definition."""
    if _is_explicit(model):
        return [("", model)]
    return [(name, layer) for name, layer in model.named_modules() if is_batch_norm(layer)]


def take_state(layer: Any, name: str = "") -> BatchNormState:
    """The layer's state, copied."""
    if _is_explicit(layer):
        return _take_explicit(layer, name)
    mean, weight = layer.running_mean, layer.weight
    if isinstance(weight, nn.UninitializedParameter) or isinstance(mean, nn.UninitializedBuffer):
        raise ValueError(
            f"layer {name!r} ({type(layer).__name__}) has no size yet; run one batch through the "
            "model first."
        )
    buffers = [getattr(layer, buffer, None) for buffer in _RENORM]
    renorm = None if buffers[0] is None else RenormState(*(_numpy(a) for a in buffers))
    momentum = getattr(layer, "momentum", None)
    steps = getattr(layer, "num_batches_tracked", None)
    present = next((a for a in (mean, weight) if a is not None), None)
    return BatchNormState(
        name=name,
        kind=_kind(layer),
        mean=_numpy(mean),
        var=_numpy(layer.running_var),
        gamma=_numpy(weight),
        beta=_numpy(layer.bias),
        variance=_variance(layer),
        eps=float(getattr(layer, "eps", 1e-5)),
        decay=None if momentum is None else complement(float(momentum)),
        cumulative=isinstance(layer, BatchNormBase) and momentum is None,
        steps=None if steps is None else int(steps),
        renorm=renorm,
        shape=None if present is None else odd_shape(tuple(present.shape)),
        stored=None if mean is None else str(mean.dtype).removeprefix("torch."),
    )


def put_state(layer: Any, state: BatchNormState) -> None:
    """Write the state into the layer, in place, after checking all of it."""
    current = take_state(layer, state.name)
    state = fit(state, current)
    pairs = [
        ("gamma", _tensor(layer, "gamma", "weight"), state.gamma),
        ("beta", _tensor(layer, "beta", "bias"), state.beta),
        ("mean", layer.running_mean, state.mean),
        ("var", layer.running_var, state.var),
    ]
    if state.renorm is not None:
        kept = (state.renorm.moving_stddev, state.renorm.renorm_mean, state.renorm.renorm_stddev)
        pairs += [(n, getattr(layer, n), a) for n, a in zip(_RENORM, kept, strict=True)]
    writes = [
        (name, tensor, array, torch.from_numpy(array.copy()).to(tensor.dtype))
        for name, tensor, array in pairs
        if tensor is not None and array is not None
    ]
    owner = f"layer {state.name!r} ({current.kind})"
    if _is_explicit(layer) and state.decay is not None and not 0.0 < state.decay < 1.0:
        raise ValueError(
            f"{owner}: patience must lie strictly between 0 and 1; got decay={state.decay!r}."
        )
    check_finite_casts(owner, [(name, array, cast.double()) for name, _, array, cast in writes])
    with torch.no_grad():
        for _, tensor, _, cast in writes:
            tensor.copy_(cast)
        tracked = getattr(layer, "num_batches_tracked", None)
        if tracked is not None and state.steps is not None:
            tracked.fill_(state.steps)
        elif tracked is not None and getattr(layer, "debias", False):
            tracked.fill_(state.debiasing)
    _put_options(layer, state)


def _put_options(layer: Any, state: BatchNormState) -> None:
    if _is_explicit(layer):
        if state.eps is not None:
            layer.epsilon = state.eps
        if state.decay is not None:
            layer.patience = state.decay
        return
    if state.eps is not None:
        layer.eps = state.eps
    if state.cumulative:
        layer.momentum = None
    elif state.decay is not None and hasattr(layer, "momentum"):
        layer.momentum = complement(state.decay)


def _take_explicit(layer: Any, name: str) -> BatchNormState:
    if layer.input_shape is None:
        raise ValueError(f"layer {name!r}: call initialise_layer(input_shape=...) first.")
    return BatchNormState(
        name=name,
        kind=_kind(layer),
        mean=_numpy(layer.running_mean),
        var=_numpy(layer.running_var),
        gamma=_numpy(layer.gamma),
        beta=_numpy(layer.beta),
        variance="unbiased",
        eps=layer.epsilon,
        decay=layer.patience,
        shape=odd_shape(tuple(layer.input_shape)),
        stored=str(layer.running_mean.dtype).removeprefix("torch."),
    )


def _variance(layer: Any) -> Variance:
    return "biased" if getattr(layer, "renorm", None) is not None else "unbiased"


def _kind(layer: Any) -> str:
    cls = type(layer)
    module = cls.__module__.removesuffix(".modules.batchnorm").removesuffix(".layers")
    return f"{module}.{cls.__name__}"


def _tensor(layer: Any, explicit: str, name: str) -> Tensor | None:
    return getattr(layer, explicit if _is_explicit(layer) else name)


def _numpy(a: Tensor | None) -> Any:
    if a is None:
        return None
    a = a.detach().cpu()
    return flatten((a.float() if a.dtype.itemsize < 4 else a).numpy())


def _is_explicit(layer: Any) -> bool:
    explicit = sys.modules.get("batchnorm.torch.explicit")
    return explicit is not None and isinstance(layer, explicit.BatchNorm)


def _is_frozen_copy(layer: Any) -> bool:
    """torchvision's, detectron's and transformers' FrozenBatchNorm2d share no base class."""
    return (
        isinstance(layer, nn.Module)
        and "BatchNorm" in type(layer).__name__
        and all(isinstance(getattr(layer, name, None), Tensor) for name in _FROZEN)
    )
