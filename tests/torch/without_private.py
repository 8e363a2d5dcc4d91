"""Training, checkpointing, transformations and compilation in processes without a name of torch.

python tests/torch/without_private.py _C._get_tracing_state ...    # the last line is JSON

Each process is a copy of this one, made before the library is imported, and hides one name while
that import runs. "nothing" hides none.
"""

from __future__ import annotations

import importlib
import json
import math
import os
import sys
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch._dynamo
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

SHAPE = (8, 3, 5, 5)
MARK = "_dynamo_marked_constant"


def hide(name: str) -> Callable[[], None]:
    """Take a name away; returns what puts it back."""
    if name == "nothing":
        return lambda: None
    if name == MARK:
        private = importlib.import_module("batchnorm.torch.private")
        private._marks = False
        return lambda: None
    *path, last = name.split(".")
    owner: Any = torch
    for part in path:
        owner = getattr(owner, part)
    value = getattr(owner, last)
    if last in vars(owner):
        delattr(owner, last)
    else:
        setattr(owner, last, None)  # inherited; None hides it
        return lambda: delattr(owner, last)
    return lambda: setattr(owner, last, value)


def close(a: Tensor, b: Tensor) -> None:
    """Equal within the roundings of float32; values are about 1."""
    torch.testing.assert_close(a.double(), b.double(), rtol=1e-5, atol=1e-5)


def step(layer: nn.Module, x: Tensor, run: Callable[..., Tensor] | None = None) -> list[Tensor]:
    """y, gradients and statistics of a training step."""
    x = x.detach().clone().requires_grad_()
    y = layer(x) if run is None else run(x)
    cotangent = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y.dtype)
    y.backward(cotangent)
    gradients = [x.grad, *(p.grad for p in layer.parameters())]
    return [y.detach(), *gradients, *(b.clone() for b in layer.buffers())]


def check(bn: Any, removed: str) -> None:
    """Compare with torch's own layer in float64."""
    torch.manual_seed(0)
    x = torch.randn(SHAPE)
    expected = step(nn.BatchNorm2d(3).double(), x.double())
    for _ in range(3):  # the third call repeats the second one
        layer = bn.BatchNorm2d(3)
        for a, b in zip(step(layer, x), expected, strict=True):
            close(a, b)
    layer = bn.BatchNorm2d(3)
    again = step(layer, x, lambda x: checkpoint(layer, x, use_reentrant=False))
    for a, b in zip(again, expected, strict=True):
        close(a, b)
    check_padding(bn, x)
    check_transformations(bn, x)
    check_hooks(bn, x)
    check_memory(bn)
    check_fold(bn, removed)
    layer = bn.BatchNorm2d(3)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for a, b in zip(step(layer, x, compiled), expected, strict=True):
        close(a, b)


def check_padding(bn: Any, x: Tensor) -> None:
    """A padded batch has the results of one without padding."""
    layers = [bn.BatchNorm2d(3), bn.BatchNorm2d(3)]
    padded = nn.functional.pad(x, (0, 2), value=9.0)
    mask = torch.zeros(padded.shape[0], *padded.shape[2:], dtype=torch.bool)
    mask[..., :5] = True
    with bn.padding_mask(mask):
        y = layers[0](padded)
    close(y[..., :5], layers[1](x))
    close(layers[0].running_var, layers[1].running_var)


def check_transformations(bn: Any, x: Tensor) -> None:
    """Forward mode, vmap, and many cotangents at once agree with torch's layer in float64."""
    ours, theirs = bn.BatchNorm2d(3), nn.BatchNorm2d(3).double()
    tangent = torch.randn(SHAPE)
    found = []
    for layer, kind in ((ours, torch.float32), (theirs, torch.float64)):
        with forward_ad.dual_level():
            y = layer(forward_ad.make_dual(x.to(kind), tangent.to(kind)))
            found.append(forward_ad.unpack_dual(y).tangent)
    close(*found)
    found = []
    for layer, kind in ((ours.eval(), torch.float32), (theirs.eval(), torch.float64)):
        found.append(torch.func.vmap(layer)(torch.stack([x, tangent]).to(kind)))
    close(*found)
    cotangents = torch.randn(2, *SHAPE)
    found = []
    for layer, kind in ((ours.train(), torch.float32), (theirs.train(), torch.float64)):
        a = x.detach().to(kind, copy=True).requires_grad_()
        [dx] = torch.autograd.grad(layer(a), a, cotangents.to(kind), is_grads_batched=True)
        found.append(dx)
    close(*found)


def check_hooks(bn: Any, x: Tensor) -> None:
    """Hooks on saved tensors see them, with an activation inside the layer too."""
    seen: list[Tensor] = []
    layer, plain = (bn.BatchNorm2d(3, activation="relu") for _ in range(2))
    with torch.autograd.graph.saved_tensors_hooks(lambda a: seen.append(a) or a, lambda a: a):
        found = step(layer, x)
    assert seen
    for a, b in zip(found, step(plain, x), strict=True):
        close(a, b)


def check_memory(bn: Any) -> None:
    """Large outputs do not share memory while both live."""
    layer = bn.BatchNorm2d(16).eval()
    x = torch.randn(8, 16, 64, 64)
    with torch.no_grad():
        first = layer(x)
        kept = first.clone()
        second = layer(2 * x)
    close(first, kept)
    close(second, 2 * kept)


class Untraceable(nn.Sequential):
    """A model that torch.fx does not trace, so that `fold` watches its operators."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x if float(x.sum()) < math.inf else -x)


def check_fold(bn: Any, removed: str) -> None:
    """Folding is right, or the report says why nothing is folded."""
    tools = importlib.import_module("batchnorm.tools")
    model = Untraceable(nn.Conv2d(3, 4, 3), bn.BatchNorm2d(4)).eval()
    x = torch.randn(SHAPE)
    folded, report = tools.fold(model, x)
    if removed == "utils._python_dispatch.TorchDispatchMode":
        (kept,) = report.kept
        assert "has no TorchDispatchMode" in kept.reason
    else:
        assert len(report.folded) == 1
    close(folded(x), model(x))


def run(name: str) -> str:
    """The outcome of a process of its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            restore = hide(name)
            bn = importlib.import_module("batchnorm.torch")
            importlib.import_module("batchnorm.tools.frameworks.torch.private")
            restore()
            check(bn, name)
            said = "right"
        except BaseException:
            said = traceback.format_exc()
        os.write(write, said.encode()[-60000:])
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    os.waitpid(child, 0)
    print(name, said, sep=": ", file=sys.stderr, flush=True)
    return said


def main() -> None:
    """Run every process."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    print(json.dumps({name: run(name) for name in ("nothing", *sys.argv[1:])}))


if __name__ == "__main__":
    main()
