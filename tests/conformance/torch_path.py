"""The torch front end's paths through the table."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch

from batchnorm import explain
from batchnorm.kernels.explanation import Explanation
from batchnorm.verification import tolerances
from batchnorm.verification.comparison import Path
from batchnorm.verification.torch_runs import arguments_of, make_layer, run, run_layer
from cases import Case, Data, Result, make_data, split
from narrow_device import Narrow, move_all, narrow_device, to_narrow
from paths import Way

__all__ = ["WAYS", "explain_graph", "refuse_operators", "run", "run_without_float64"]


def explain_graph(case: Case) -> Explanation:
    """The way of a case in a compiled graph."""
    data = make_data(case)
    layer = make_layer(case, data, None, "cpu")
    x, mask, residual = arguments_of(case, data, "cpu")
    return explain(layer, x, mask=mask, residual=residual, graph=True)


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


def run_without_float64(case: Case, data: Data, synchronized: bool = False) -> Result:
    """Run a case on a device that refuses float64."""
    layer = make_layer(case, data, None, "cpu")
    layer.synchronized = synchronized
    parts = [arguments_of(*part, "cpu") for part in split(case, data)]
    dy = torch.tensor(data.dy, dtype=getattr(torch, case.dtype))
    with narrow_device():
        return run_layer(case, to_narrow(layer), move_all(parts), Narrow(dy))


def refuse_float64(case: Case) -> str | None:
    """The reason why a device without float64 does not have the case, or None."""
    return "x itself is float64" if case.dtype == "float64" else None


WAYS = {
    "torch-without-float64": Way(
        Path(run_without_float64, True, tolerances.FLOAT32), refuse_float64, costly=True
    ),
    "torch": Way(_path()),
    "torch-arrays": Way(_path(fused=False)),
    "torch-graph": Way(
        _path(compiled="aot_eager", fused=True),
        refuse_operators,
        costly=True,
        sister="torch-traced",
    ),
    "torch-graph-arrays": Way(
        _path(compiled="aot_eager", fused=False), costly=True, sister="torch-traced"
    ),
    # Dynamo alone: a graph as it was traced, which autograd then differentiates.
    "torch-traced": Way(_path(compiled="eager", fused=False), costly=True, stand_in=True),
    "torch-inductor": Way(
        _path(tolerances.PLAIN_FLOAT32, compiled="inductor"), costly=True, sample=_COMPILED
    ),
    "torch-inductor-arrays": Way(
        _path(tolerances.PLAIN_FLOAT32, compiled="inductor", fused=False),
        costly=True,
        sample=_COMPILED,
    ),
}
