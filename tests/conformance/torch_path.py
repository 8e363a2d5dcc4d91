"""The runs of a case on the torch front end."""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch

import tolerances
from batchnorm import explain
from batchnorm.kernels.explanation import Explanation
from batchnorm.torch import BatchNorm, accumulate_statistics, keep_statistics
from cases import Case, Data, Result, State, make_data, split
from comparison import Path
from paths import Way

_BUFFERS = {
    "mean": "running_mean",
    "var": "running_var",
    "stddev": "running_stddev",
    "renorm_mean": "renorm_mean",
    "renorm_stddev": "renorm_stddev",
}


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
    layer = _layer(case, data, fused, device)
    layer.synchronized = synchronized
    parts = [_arguments(*part, device) for part in split(case, data)]
    dtype = getattr(torch, case.dtype)
    call: Any = layer
    if compiled:
        torch._dynamo.reset()
        call = torch.compile(layer, fullgraph=True, backend=compiled)
    passes = accumulate_statistics(layer) if case.passes > 1 else nullcontext()
    updates = nullcontext() if case.update else keep_statistics()
    with passes, updates:
        y = torch.cat([call(*part) for part in parts])
    assert y.dtype == dtype
    y.backward(torch.tensor(data.dy, dtype=dtype, device=device))
    dx, dresidual = (
        None if column[0] is None else torch.cat([a.grad for a in column])
        for column in (list(zip(*parts, strict=True))[i] for i in (0, 2))
    )
    found = {f: _numpy(getattr(layer, b, None)) for f, b in _BUFFERS.items()}
    return Result(
        _numpy(y),
        _numpy(dx),
        _numpy(None if layer.weight is None else layer.weight.grad),
        _numpy(None if layer.bias is None else layer.bias.grad),
        State(**found, batches=layer.num_batches_tracked.item()),
        _numpy(dresidual),
    )


def explain_graph(case: Case) -> Explanation:
    """The way of a case in a compiled graph."""
    data = make_data(case)
    layer = _layer(case, data, None, "cpu")
    x, mask, residual = _arguments(case, data, "cpu")
    return explain(layer, x, mask=mask, residual=residual, graph=True)


def _arguments(
    case: Case, data: Data, device: str
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """x, mask and residual."""
    dtype = getattr(torch, case.dtype)
    x = torch.tensor(data.x, dtype=dtype, device=device, requires_grad=True)
    residual = None
    if data.residual is not None:
        residual = torch.tensor(data.residual, dtype=dtype, device=device, requires_grad=True)
    mask = None if data.mask is None else torch.tensor(data.mask, device=device)
    return x, mask, residual


def _layer(case: Case, data: Data, fused: bool | None, device: str) -> BatchNorm:
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
        layer.set_renorm_clipping(**case.renorm)
    with torch.no_grad():
        for parameter, value in ((layer.weight, data.gamma), (layer.bias, data.beta)):
            if parameter is not None:
                parameter.copy_(torch.tensor(value))
        for f, buffer in _BUFFERS.items():
            if getattr(data.state, f) is not None:
                getattr(layer, buffer).copy_(torch.tensor(getattr(data.state, f)))
        layer.num_batches_tracked.fill_(data.state.batches)
    layer.train(case.mode != "eval")
    return layer.freeze() if case.mode == "frozen" else layer


def _numpy(a: Any) -> np.ndarray | None:
    return None if a is None else a.detach().double().cpu().numpy()


# Compiling takes seconds a case: a sample that holds every mode, option and hard data.
_COMPILED = (
    "1d_signal-half",
    "image-channelwise",
    "ghost2-half_samples-train",
    "renorm_clipped-none-train",
    "residual_relu-half-train",
    "residual_relu-half-eval",
    "ghost_residual_relu-half_samples-train",
    "bfloat16-half-train",
    "train-offset1e6-half",
    "train-offset1e6-none",
    "offset1e6-renorm",
    "nan_padding-plain-train",
)


def _path(tolerance: float = tolerances.FLOAT32, **options: Any) -> Path:
    return Path(partial(run, **options), True, tolerance)


def refuse_operators(case: Case) -> str | None:
    """The reason why compiled graphs hold array code for the case, or None."""
    if case.mode != "train" or case.single_value == "running":
        return "evaluation is array code in graphs"
    if case.renorm is not None:
        return "renormalization is array code in graphs"
    if case.adjusted:
        return "an adjustment is array code"
    if case.mask == "channelwise" and case.channels != (1,):
        return "a mask that varies along channels is array code"
    if case.axes[-1] - case.axes[0] != len(case.axes) - 1:
        return "channel axes apart are array code in graphs"
    return None


WAYS = {
    "torch": Way(_path()),
    "torch-arrays": Way(_path(fused=False)),
    "torch-graph": Way(
        _path(compiled="aot_eager", fused=True),
        refuse_operators,
        costly=True,
        sister="torch-graph-arrays",
    ),
    "torch-graph-arrays": Way(_path(compiled="aot_eager", fused=False), costly=True),
    "torch-inductor": Way(
        _path(tolerances.PLAIN_FLOAT32, compiled="inductor"), costly=True, sample=_COMPILED
    ),
    "torch-inductor-arrays": Way(
        _path(tolerances.PLAIN_FLOAT32, compiled="inductor", fused=False),
        costly=True,
        sample=_COMPILED,
    ),
}
