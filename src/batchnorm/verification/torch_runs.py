"""The runs of a case on the torch front end."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from batchnorm.torch import BatchNorm, accumulate_statistics, keep_statistics
from batchnorm.verification.cases import Case, Data, Result, State, split
from batchnorm.verification.comparison import check_type

_BUFFERS = {
    "mean": "running_mean",
    "var": "running_var",
    "stddev": "running_stddev",
    "renorm_mean": "renorm_mean",
    "renorm_stddev": "renorm_stddev",
}


# x, mask and residual.
Arguments = tuple[Tensor, Tensor | None, Tensor | None]


def run(
    case: Case,
    data: Data,
    *,
    compiled: str | None = None,
    fused: bool | None = None,
    synchronized: bool = False,
    device: str = "cpu",
) -> Result:
    """Run a case through `BatchNorm`; `compiled` names a torch.compile backend."""
    layer = make_layer(case, data, fused, device)
    layer.synchronized = synchronized
    parts = [arguments_of(*part, device) for part in split(case, data)]
    dy = torch.tensor(data.dy, dtype=getattr(torch, case.dtype), device=device)
    return run_layer(case, layer, parts, dy, compiled)


def run_layer(
    case: Case, layer: BatchNorm, parts: list[Arguments], dy: Tensor, compiled: str | None = None
) -> Result:
    """Run a layer on the arguments of each pass."""
    call: Any = layer
    if compiled:
        torch.compiler.reset()
        call = torch.compile(layer, fullgraph=True, backend=compiled)
    passes = accumulate_statistics(layer) if case.passes > 1 else nullcontext()
    updates = nullcontext() if case.update else keep_statistics()
    with passes, updates:
        y = torch.cat([call(*part) for part in parts])
    check_type(y.dtype, dy.dtype)
    y.backward(dy)
    dx, dresidual = (
        None if column[0] is None else torch.cat([a.grad for a in column])
        for column in (list(zip(*parts, strict=True))[i] for i in (0, 2))
    )
    found = {f: _numpy(getattr(layer, b, None)) for f, b in _BUFFERS.items()}
    batches: Any = layer.num_batches_tracked
    return Result(
        _numpy(y),
        _numpy(dx),
        _numpy(None if layer.weight is None else layer.weight.grad),
        _numpy(None if layer.bias is None else layer.bias.grad),
        State(**found, batches=int(batches)),
        _numpy(dresidual),
    )


def arguments_of(case: Case, data: Data, device: str) -> Arguments:
    """x, mask and residual."""
    dtype = getattr(torch, case.dtype)
    x = torch.tensor(data.x, dtype=dtype, device=device, requires_grad=True)
    residual = None
    if data.residual is not None:
        residual = torch.tensor(data.residual, dtype=dtype, device=device, requires_grad=True)
    mask = None if data.mask is None else torch.tensor(data.mask, device=device)
    return x, mask, residual


def make_layer(case: Case, data: Data, fused: bool | None, device: str) -> BatchNorm:
    """The layer of a case, with its parameters and statistics."""
    adjusted = None
    if case.adjusted:
        adjusted = (torch.tensor(data.s), torch.tensor(data.t))
    sizes = case.channels
    layer = BatchNorm(
        sizes if len(sizes) > 1 else sizes[0],
        case.eps,
        None if case.decay is None else 1.0 - case.decay,
        affine=case.gamma,
        axis=case.axis,
        bias=case.beta,
        device=device,
        dtype=torch.float64 if case.dtype == "float64" else torch.float32,
        virtual_batch_size=case.ghost,
        renorm=case.renorm is not None,
        renorm_clipping=None if case.late_limits else case.renorm,
        adjustment=None if adjusted is None else lambda shape: adjusted,
        activation=case.activation,
        padded_output=case.padded_output,
        debias=case.debias,
        single_value=case.single_value,
        fused=fused,
    )
    if case.late_limits:
        layer.set_renorm_clipping(**(case.renorm or {}))
    with torch.no_grad():
        for parameter, value in ((layer.weight, data.gamma), (layer.bias, data.beta)):
            if parameter is not None:
                parameter.copy_(torch.tensor(value))
        for f, buffer in _BUFFERS.items():
            if getattr(data.state, f) is not None:
                getattr(layer, buffer).copy_(torch.tensor(getattr(data.state, f)))
        batches: Any = layer.num_batches_tracked
        batches.fill_(data.state.batches)
    layer.train(case.mode != "eval")
    return layer.freeze() if case.mode == "frozen" else layer


def _numpy(a: Any) -> np.ndarray | None:
    return None if a is None else a.detach().cpu().double().numpy()
