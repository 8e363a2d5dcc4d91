"""Nothing is kept for the backward pass that torch's own layers and operators do not keep."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from batchnorm.benchmark.case import Case
from batchnorm.benchmark.memory import LEAST, measure_memory
from batchnorm.benchmark.problem import make_problem
from batchnorm.kernels import extension
from batchnorm.torch import BatchNorm

pytestmark = pytest.mark.skipif(extension.missing_reason() is not None, reason="no kernels")
SHAPES = {"rows": (4096, 16), "image": (8, 16, 16, 16)}
STEPS = {"BN": (None, False), "BN, ReLU": ("relu", False), "BN, add, ReLU": ("relu", True)}
STEP = pytest.mark.parametrize(("activation", "with_residual"), STEPS.values(), ids=STEPS)


def saved_bytes(forward, *inputs):
    """Bytes of all storages that autograd saves for the backward pass, each counted once."""
    saved = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        saved[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward(*inputs)
    y.backward(torch.ones_like(y))
    return sum(saved.values())


@STEP
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_autograd_saves_no_more_than_torchs(shape, activation, with_residual):
    x = torch.randn(shape, requires_grad=True)
    residual = torch.randn(shape, requires_grad=True) if with_residual else None
    layer = BatchNorm(shape[1], activation=activation)
    own = (nn.BatchNorm1d if len(shape) == 2 else nn.BatchNorm2d)(shape[1])

    def theirs(x):
        y = own(x) if residual is None else own(x) + residual
        return y if activation is None else y.relu()

    ours = saved_bytes(lambda x: layer(x, residual=residual), x)
    assert x.nbytes <= ours <= saved_bytes(theirs, x)


@STEP
def test_what_lives_between_forward_and_backward(activation, with_residual):
    """Resident memory, which sees what is no saved tensor too."""
    shape = (LEAST // 4 // 64, 64)
    problem = make_problem(Case("kept", "", shape, activation=activation, residual=with_residual))
    found = measure_memory(problem)
    if not found:
        pytest.skip("this system does not tell a process's peak of memory")
    torchs = min(found[name]["kept"] for name in found if name != "ours")
    assert found["ours"]["kept"] < torchs + 0.1
    assert found["ours"]["kept"] > 0.9  # y at least; or nothing was measured
    peaks = [found[name]["peak"] for name in found if name != "ours"]
    assert found["ours"]["peak"] < min(peaks) + 0.1
