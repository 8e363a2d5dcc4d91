"""Steps of torch: this library's layer, torch's own, and what people write by hand."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from batchnorm.benchmark.case import Case
from batchnorm.benchmark.problem import Problem
from batchnorm.benchmark.torch_passes import make_step
from batchnorm.benchmark.variant import Variant
from batchnorm.torch import BatchNorm

__all__ = ["make_variants", "name_rival"]

_LAYERS: dict[int, Any] = {
    2: nn.BatchNorm1d,
    3: nn.BatchNorm1d,
    4: nn.BatchNorm2d,
    5: nn.BatchNorm3d,
}


@dataclass(frozen=True, eq=False)
class _Job:
    """A problem's tensors, in memory that torch allocated, and the layers on them.

    Attributes:
        problem: the source of the tensors.
        device: of the tensors.
        fused: option of this library's layers.
        x, dy, residual, mask, real: as in `Problem`.
    """

    problem: Problem
    device: str
    fused: bool | None
    x: Tensor
    dy: Tensor
    residual: Tensor | None
    mask: Tensor | None
    real: Tensor | None

    @property
    def case(self) -> Case:
        """The problem's case."""
        return self.problem.case

    def load(self, layer: Any) -> Any:
        """The layer with the problem's parameters and statistics, in the case's mode."""
        layer = layer.to(self.device)
        p = self.problem
        with torch.no_grad():
            layer.weight.copy_(torch.from_numpy(p.gamma))
            layer.bias.copy_(torch.from_numpy(p.beta))
            layer.running_mean.copy_(torch.from_numpy(p.mean))
            layer.running_var.copy_(torch.from_numpy(p.var))
        return layer.train(self.case.mode == "training")

    def ours(self, padded_output: str = "normalize") -> BatchNorm:
        """This library's layer."""
        case = self.case
        layer = BatchNorm(
            case.channels,
            case.eps,
            axis=1,
            activation=case.activation,
            padded_output=padded_output,
            fused=self.fused,
        )
        return self.load(layer)

    def theirs(self) -> Any:
        """torch's own layer."""
        case = self.case
        return self.load(_pick_layer(len(case.shape))(case.channels, case.eps))


def make_variants(
    problem: Problem, only: tuple[str, ...] = (), *, device: str = "cpu", fused: bool | None = None
) -> dict[str, Variant]:
    """The variants of a problem, by name.

    Args:
        problem: to solve; channels along axis 1.
        only: names of those to make; none for all.
        device: of their tensors.
        fused: option of this library's layers.
    """
    if "torch._dynamo" in sys.modules:  # steps compiled for another case are in nobody's way
        torch._dynamo.reset()
    job = _place(problem, device, fused)
    makers = _list_makers(job)
    return {name: make() for name, make in makers.items() if not only or name in only}


def name_rival(case: Case) -> tuple[str, str]:
    """The variant that torch offers for the job: its name, and its name for readers.

    Raises:
        ValueError: torch has no layer for the shape.
    """
    layer = _pick_layer(len(case.shape))
    if case.padded is None or case.inference:
        return "torch", f"torch.nn.{layer.__name__}"
    return "pack", "torch on x[mask], scattered"


def _pick_layer(rank: int) -> Any:
    if rank not in _LAYERS:
        raise ValueError(f"bench: torch has batch norms for 2 to 5 axes; got a shape of {rank}.")
    return _LAYERS[rank]


def _place(problem: Problem, device: str, fused: bool | None) -> _Job:
    case = problem.case
    memory = torch.channels_last if case.channels_last else torch.contiguous_format
    dtype = getattr(torch, case.dtype)

    def copy(a: Any) -> Any:
        if a is None:
            return None
        made = torch.empty(a.shape, dtype=dtype, device=device, memory_format=memory)
        return made.copy_(torch.from_numpy(a))

    mask = real = None
    if problem.mask is not None:
        mask = torch.tensor(problem.mask, device=device)
        real = mask.unsqueeze(1)
    x, dy, residual = (copy(a) for a in (problem.x, problem.dy, problem.residual))
    return _Job(problem, device, fused, x, dy, residual, mask, real)


def _list_makers(job: _Job) -> dict[str, Callable[[], Variant]]:
    case = job.case
    found: dict[str, Callable[[], Variant]] = {"ours": lambda: _ours(job)}
    if case.inference:
        found["torch"] = lambda: _infer(job, job.theirs())
    elif case.padded is not None:
        formula = _formula(job)
        found["pack"] = lambda: _step(job, _pack(job), job.mask)
        found["formula"] = lambda: _step(job, formula, job.real)
        found["formula, compiled"] = lambda: _step(job, _compile(formula), job.real)
    elif case.activation is not None:
        found["torch"] = lambda: _step(job, _activate(job.theirs(), in_place=False))
        found["torch, in place"] = lambda: _step(job, _activate(job.theirs(), in_place=True))
        if job.x.is_cuda:
            found["torch, compiled"] = lambda: _step(
                job, _compile(_activate(job.theirs(), in_place=False))
            )
    else:
        found["torch"] = lambda: _step(job, job.theirs())
        if case.copied and job.x.is_cpu and not job.fused:
            found["ours, reused buffers"] = lambda: Variant(
                make_step(job.x, job.dy, job.ours(), case.eps), ours=True
            )
    if case.compiled:
        found["ours, compiled"] = lambda: _ours(job, compiled=True)
    if case.copied:
        found["copy"] = lambda: _copy(job)
    if case.padded is not None:
        found["ours, zeroed"] = lambda: _zeroed(job)
    if case.padded is not None and not case.inference:
        found["ours, no mask"] = lambda: _step(job, job.ours(), ours=True, unmasked=True)
    return found


def _zeroed(job: _Job) -> Variant:
    """This library's layer with zeros at padded rows of y."""
    layer = job.ours("zero")
    if job.case.inference:
        made = _infer(job, lambda x: layer(x, job.mask), ours=True)
    else:
        made = _step(job, layer, job.mask, ours=True)
    return replace(made, zeroed=True)


def _ours(job: _Job, *, compiled: bool = False) -> Variant:
    layer: Any = job.ours()
    if compiled:
        layer = _compile(layer, fullgraph=True)
    if job.case.inference:
        return _infer(job, layer, ours=True)
    if job.residual is None:
        return _step(job, layer, job.mask, ours=True)
    return _step(job, lambda x, residual: layer(x, residual=residual), ours=True)


def _compile(function: Any, *, fullgraph: bool = False) -> Any:
    return torch.compile(function, dynamic=False, fullgraph=fullgraph)


def _step(
    job: _Job,
    forward: Any,
    mask: Tensor | None = None,
    *,
    ours: bool = False,
    unmasked: bool = False,
) -> Variant:
    """A forward and a backward pass on leaves of the variant's own."""
    x, dy = job.x.detach().requires_grad_(), job.dy
    if job.residual is not None:
        return _step_with_residual(job, forward, x, ours=ours)
    arguments = (x,) if mask is None else (x, mask)

    def step() -> tuple[Tensor, Tensor | None]:
        x.grad = None
        y: Tensor = forward(*arguments)
        y.backward(dy)
        return y, x.grad

    return Variant(step, ours=ours, unmasked=unmasked)


def _step_with_residual(job: _Job, forward: Any, x: Tensor, *, ours: bool) -> Variant:
    assert job.residual is not None
    dy, residual = job.dy, job.residual.detach().requires_grad_()

    def step() -> tuple[Tensor, Tensor | None, Tensor | None]:
        x.grad = residual.grad = None
        y: Tensor = forward(x, residual)
        y.backward(dy)
        return y, x.grad, residual.grad

    return Variant(step, ("y", "dx", "dresidual"), ours)


def _infer(job: _Job, layer: Any, *, ours: bool = False) -> Variant:
    x = job.x

    def step() -> tuple[Tensor]:
        with torch.no_grad():
            return (layer(x),)

    return Variant(step, ("y",), ours)


def _pack(job: _Job) -> Callable[[Tensor, Tensor], Tensor]:
    """torch's layer on the real rows, scattered into zeros: torch takes no mask."""
    layer = job.load(nn.BatchNorm1d(job.case.channels, job.case.eps))

    def forward(x: Tensor, mask: Tensor) -> Tensor:
        rows = x.movedim(1, -1)
        y = torch.zeros(rows.shape, dtype=x.dtype, device=x.device)
        return y.index_put_((mask,), layer(rows[mask])).movedim(-1, 1)

    return forward


def _activate(layer: Any, *, in_place: bool) -> Callable[..., Tensor]:
    """torch's layer, addition and ReLU as operators of their own."""

    def separate(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = layer(x)
        return torch.relu(y if residual is None else y + residual)

    def overwrite(x: Tensor, residual: Tensor | None = None) -> Tensor:
        y = layer(x)
        return torch.relu_(y if residual is None else y.add_(residual))

    return overwrite if in_place else separate


def _formula(job: _Job) -> Callable[[Tensor, Tensor], Tensor]:
    """Masked normalization in elementwise operations; without running statistics."""
    row, eps = (1, -1, *(1,) * (job.x.dim() - 2)), job.case.eps
    gamma, beta = (
        torch.tensor(a, device=job.device).reshape(row).requires_grad_()
        for a in (job.problem.gamma, job.problem.beta)
    )
    reduced = [a for a in range(job.x.dim()) if a != 1]

    def formula(x: Tensor, mask: Tensor) -> Tensor:
        count = mask.sum()
        mean = torch.where(mask, x, 0.0).sum(reduced, keepdim=True) / count
        centred = torch.where(mask, x - mean, 0.0)
        var = (centred * centred).sum(reduced, keepdim=True) / count
        return centred * (gamma * torch.rsqrt(var + eps)) + beta

    return formula


def _copy(job: _Job) -> Variant:
    """As many bytes as the job needs, read and written by copying x into one buffer."""
    x, y = job.x, torch.empty_like(job.x)
    copies = 1 if job.case.inference else 4

    def step() -> tuple[Tensor]:
        for _ in range(copies):
            y.copy_(x)
        return (y,)

    return Variant(step, ("y",), copies=True)
