"""Small steps on which the GPU's kernels are compared with array code in float64."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from batchnorm.core.config import Options, Renorm
from batchnorm.core.running import Running
from batchnorm.torch.call import Call, Settings, Tensors, make_call
from batchnorm.torch.kernels.tensors import NAMES

__all__ = ["SAMPLES", "VISITED", "Run", "Sample", "compare"]

Run = Callable[[Call], Tensor]  # a way from a call to y

# Relative to 1 + |right value|: S3 for kernels, and one rounding to each type (S16).
_ERROR = {"float16": 5e-6, "bfloat16": 5e-6, "float32": 5e-6, "float64": 1e-12}
_ROUNDING = {"float16": 2.0**-10, "bfloat16": 2.0**-7, "float32": 0.0, "float64": 0.0}
_EPS = 1e-3
_NEAR = 1e-3  # to 0, where another rounding may change the sign
_OFFSET = 1e4  # of float32 numbers, in deviations: where a mean in one float32 is wrong


class Sample(NamedTuple):
    """One step, forward and backward.

    Attributes:
        name: for warnings and reports.
        shape: of x, channels on axis 1.
        dtype: of x.
        masked: half of the positions are padding, which holds NaN.
        residual: one is added.
        training: False for evaluation.
        last: channels come last in memory.
        options: of the core, where they are not the default.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    masked: bool = True
    residual: bool = False
    training: bool = True
    last: bool = False
    options: dict[str, Any] = {}  # noqa: RUF012 (never changed)


_RENORM = Renorm(0.99, rmin=0.9, rmax=1.1, dmax=0.2)
# Every family: several launches and one, rows of channels and channels of rows, ghost batches,
# renormalization, evaluation, each type, each ending.
SAMPLES = (
    Sample("rows", (300, 70)),
    Sample("image", (5, 3, 42, 42), options={"activation": "relu"}),
    Sample("image_last", (6, 70, 8, 8), last=True, residual=True, options={"activation": "relu"}),
    Sample("few_rows", (32, 64), torch.bfloat16, residual=True),
    Sample("ghost", (8, 3, 1100), options={"virtual_batch_size": 4, "activation": "leaky_relu"}),
    Sample("renorm", (64, 20), torch.float16, options={"renorm": _RENORM}),
    Sample("zeroed", (64, 5, 7), options={"padded_output": "zero"}),
    Sample("evaluation", (64, 5, 7), masked=False, training=False),
    Sample("float64", (40, 33), torch.float64, masked=False),
)
# Steps that suit visits, where these are on: channels of rows and rows of channels, ghost batches.
VISITED = (
    Sample("visited_image", (2, 128, 42, 42), options={"activation": "relu"}),
    Sample("visited_rows", (520, 2048), torch.bfloat16, residual=True),
    Sample("visited_ghost", (8, 128, 300), options={"virtual_batch_size": 4}),
)


class _Problem(NamedTuple):
    """The tensors of a sample; all but the mask in one type, or in float64 with its numbers."""

    x: Tensor
    dy: Tensor
    residual: Tensor | None
    weight: Tensor
    bias: Tensor
    mean: Tensor  # running statistics
    var: Tensor
    mask: Tensor | None

    def widen(self) -> _Problem:
        """The same numbers in float64."""
        return self._replace(
            **{n: a.double() for n, a in self._asdict().items() if a is not None and n != "mask"}
        )


def compare(sample: Sample, kernels: Run, arrays: Run, device: torch.device) -> str:
    """Run both ways of a sample; the first result that differs, or "" if none does."""
    problem = _make_problem(sample, device)
    if "activation" in sample.options:
        problem = _away_from_zero(sample, problem, arrays)
    found = _run(sample, problem, kernels, fused=True)
    expected = _run(sample, problem.widen(), arrays, fused=False)
    name_of_type, rows = NAMES[sample.dtype], problem.x[:, 0].numel()
    error_of_type, rounding = _ERROR[name_of_type], _ROUNDING[name_of_type]
    for name, right in expected.items():
        terms = rows if name in ("dweight", "dbias") else 8.0  # of sums; of rstd and gamma
        bound = (error_of_type * terms + rounding) * (1.0 + right.abs())
        error = (found[name].double() - right).abs()
        off = ~(error <= bound)  # NaN too
        if off.any():
            worst = float((error / bound).nan_to_num(torch.inf).max())
            count = f"{int(off.sum())} of {off.numel()} places"
            return f"{name} is wrong at {count}, by up to {worst:.3g} times what is allowed"
    return ""


def _away_from_zero(sample: Sample, problem: _Problem, arrays: Run) -> _Problem:
    """The problem without gradients where a rounding may decide on the activation's side."""
    options = {name: value for name, value in sample.options.items() if name != "activation"}
    before = _run(sample._replace(options=options), problem.widen(), arrays, fused=False)["y"]
    near = (before.abs() < _NEAR) & (before != 0.0)  # 0 is padding
    return problem._replace(dy=torch.where(near, 0.0, problem.dy))


def _make_problem(sample: Sample, device: torch.device) -> _Problem:
    rng, shape, channels = np.random.default_rng(0), sample.shape, sample.shape[1]
    state = torch.float64 if sample.dtype is torch.float64 else torch.float32
    offset = _OFFSET if sample.dtype is torch.float32 else 1.0

    def place(a: Any, dtype: torch.dtype) -> Tensor:
        return torch.tensor(a, device=device).to(dtype)

    x, dy, residual = rng.normal(size=(3, *shape))
    mask = rng.random((shape[0], *shape[2:])) < 0.5
    if sample.masked:
        padding = np.broadcast_to(~np.expand_dims(mask, 1), shape)
        x[padding] = dy[padding] = np.nan
    found = place(x + offset, sample.dtype)
    if sample.last:
        found = found.movedim(1, -1).contiguous().movedim(-1, 1)
    weight, bias, mean, var = rng.uniform(0.5, 1.5, (4, channels))
    return _Problem(
        found,
        place(dy, sample.dtype),
        place(residual, sample.dtype) if sample.residual else None,
        place(weight, state),
        place(bias, state),
        place(mean + offset, state),
        place(var, state),
        place(mask, torch.bool) if sample.masked else None,
    )


def _run(sample: Sample, problem: _Problem, way: Run, *, fused: bool) -> dict[str, Tensor]:
    """The results of a way by name; those at padding, which are not specified, are left out."""
    x, residual, weight, bias = (
        None if a is None else a.clone(memory_format=torch.preserve_format).requires_grad_()
        for a in (problem.x, problem.residual, problem.weight, problem.bias)
    )
    assert x is not None
    running = _make_running(sample, problem)
    options = Options(eps=_EPS, decay=0.9, unbiased=True, **sample.options)
    settings = Settings("proof", 1, options, None, fused, None)
    tensors = Tensors(x, problem.mask, weight, bias, residual, running)
    y = way(make_call(tensors, settings, sample.training, sample.training))
    y.backward(problem.dy)
    rows = {"y": y.detach(), "dx": x.grad}
    if residual is not None:
        rows["dresidual"] = residual.grad
    if problem.mask is not None and not options.zero_padding:
        real = problem.mask.unsqueeze(1)
        rows = {name: torch.where(real, a, 0.0) for name, a in rows.items() if a is not None}
    found = rows | {"dweight": _grad(weight), "dbias": _grad(bias)}
    found |= {n: a for n, a in running._asdict().items() if a is not None}
    return {name: a for name, a in found.items() if a is not None}


def _make_running(sample: Sample, problem: _Problem) -> Running:
    mean, var = problem.mean.clone(), problem.var.clone()
    batches = torch.tensor(3, device=mean.device)
    if "renorm" not in sample.options:
        return Running(mean, var, batches)
    stddev = torch.sqrt(var)
    return Running(mean, var, batches, stddev, mean.clone(), stddev.clone())


def _grad(a: Tensor | None) -> Tensor | None:
    return None if a is None else a.grad
