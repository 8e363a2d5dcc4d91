"""`batchnorm.explain` names the way that a call takes, and why each faster way refuses."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.func import vmap

import batchnorm
from batchnorm import explain
from batchnorm.kernels import explanation, extension
from batchnorm.torch import BatchNorm, BatchNorm1d, padding_mask
from batchnorm.torch.call import make_call
from batchnorm.torch.ranks.synchronizer import Participation
from batchnorm.torch.ways import eager_kernels

pytestmark = pytest.mark.skipif(
    extension.missing_reason() is not None, reason=f"no kernels: {extension.missing_reason()}"
)

KERNELS, ARRAY_CODE = explanation.KERNELS, explanation.ARRAY_CODE
LAST_CALL, IN_GRAPH = explanation.LAST_CALL, explanation.KERNELS_IN_GRAPH
SHAPE = (8, 3, 5)


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def compiled(layer):
    return torch.compile(layer, backend="eager")


def reason(found, way):
    """The reason with which a way refused; fails if it did not."""
    return dict(found.refused)[way]


def with_statistics(layer, change):
    for name in ("running_mean", "running_var"):
        layer._buffers[name] = change(layer._buffers[name])
    return layer


def with_batches(layer, change):
    layer._buffers["num_batches_tracked"] = change(layer.num_batches_tracked)
    return layer


def with_weight(layer, weight):
    layer.weight = nn.Parameter(weight, requires_grad=False)
    return layer


def test_a_first_call_takes_kernels():
    found = explain(BatchNorm(3), torch.randn(SHAPE))
    assert found.way == KERNELS
    assert [way for way, _ in found.refused] == [LAST_CALL]


def test_a_call_that_came_twice_is_repeated():
    layer, x = BatchNorm(3), torch.randn(SHAPE)
    for expected in ("has come twice", "has come twice"):
        assert expected in reason(explain(layer, x), LAST_CALL)
        layer(x)
    assert explain(layer, x) == ("BatchNorm", LAST_CALL, (), "")


LAST_CALL_REFUSES = {
    "mask": ({"mask": torch.ones(8, dtype=torch.bool)}, "a mask or a residual"),
    "residual": ({"residual": torch.ones(SHAPE)}, "a mask or a residual"),
}


@pytest.mark.parametrize(
    ("arguments", "expected"), LAST_CALL_REFUSES.values(), ids=LAST_CALL_REFUSES
)
def test_a_last_call_is_of_x_alone(arguments, expected):
    layer, x = BatchNorm(3), torch.randn(SHAPE)
    for _ in range(3):
        layer(x)
    found = explain(layer, x, **arguments)
    assert expected in reason(found, LAST_CALL)
    assert found.way == KERNELS


def test_a_layer_that_changed_repeats_nothing():
    layer, x = BatchNorm(3), torch.randn(SHAPE)
    for _ in range(3):
        layer(x)
    layer.eps = 1e-3
    assert "has changed since" in reason(explain(layer, x), LAST_CALL)


def test_inside_padding_mask_nothing_is_repeated():
    layer, x = BatchNorm(3), torch.randn(SHAPE)
    for _ in range(3):
        layer(x)
    with padding_mask(torch.ones(8, dtype=torch.bool)):
        found = explain(layer, x)
    assert "padding_mask" in reason(found, LAST_CALL)
    assert explain(layer, x).way == LAST_CALL  # explain has changed nothing


KERNELS_REFUSE = {
    "fused": (lambda: BatchNorm(3, fused=False), {}, "fused=False asks for array code"),
    "adjustment": (
        lambda: BatchNorm(3, adjustment=lambda shape: (1.5, 0.5)),
        {},
        "none takes an adjustment",
    ),
    "mask": (
        lambda: BatchNorm(3),
        {"mask": torch.rand(SHAPE) < 0.5},
        "none takes a mask that differs between channels",
    ),
    "axes": (
        lambda: BatchNorm((8, 5), axis=(0, 2)),
        {},
        "channel axes (0, 2) are apart in memory",
    ),
    "residual": (
        lambda: BatchNorm(3),
        {"residual": torch.ones(SHAPE, dtype=torch.float64)},
        "it takes a residual of x's type torch.float32, and got torch.float64",
    ),
    "lazy": (
        lambda: BatchNorm(3),
        {"residual": torch.randn(SHAPE, dtype=torch.complex64).conj().imag},
        "it reads memory, where a lazily computed tensor holds other values, or none",
    ),
    "half statistics": (
        lambda: with_statistics(BatchNorm(3).eval(), torch.Tensor.half),
        {},
        "it keeps float32 or float64 statistics, and got torch.float16",
    ),
    "gaps": (
        lambda: with_statistics(BatchNorm(3), lambda a: a.repeat(2)[::2]),
        {},
        "it takes contiguous running statistics of one type, on cpu",
    ),
    "batches": (
        lambda: with_batches(BatchNorm(3), torch.Tensor.int),
        {},
        "it counts batches in one int64 on cpu, and got torch.int32",
    ),
}


@pytest.mark.parametrize(
    ("make", "arguments", "expected"), KERNELS_REFUSE.values(), ids=KERNELS_REFUSE
)
def test_kernels_say_why_not(make, arguments, expected):
    found = explain(make(), torch.randn(SHAPE), **arguments)
    assert found.way == ARRAY_CODE
    assert reason(found, KERNELS) == expected


def test_there_is_no_kernel_for_other_devices():
    found = explain(BatchNorm(3, device="meta"), torch.randn(SHAPE, device="meta"))
    assert reason(found, KERNELS) == "there is none for device meta"


def test_there_is_no_kernel_without_the_extension(monkeypatch):
    monkeypatch.setattr("batchnorm.torch.kernels.decision.select_kernel", lambda *a, **k: MISSING)
    found = explain(BatchNorm(3), torch.randn(2, 3, 5, 7, 11))
    assert reason(found, KERNELS) == MISSING.reason


MISSING = batchnorm.kernels.select.Choice(None, "the compiled extension is missing (test)")


def test_there_is_no_kernel_under_a_transformation():
    found = []
    vmap(lambda x: found.append(explain(BatchNorm(3), x)) or x)(torch.randn(2, *SHAPE))
    assert "not a plain tensor" in reason(found[0], KERNELS)
    assert "not a plain tensor" in reason(found[0], LAST_CALL)


def test_kernels_do_not_merge_ghost_batches_over_ranks():
    layer, x = BatchNorm(3, virtual_batch_size=4), torch.randn(SHAPE)
    calls = []

    def kept(*arguments):
        calls.append(make_call(*arguments))
        return calls[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("batchnorm.torch.layers.make_call", kept)
        layer(x)
    part = Participation(0, "text", 3, False)
    assert "ghost batches" in eager_kernels.refuse(calls[0]._replace(part=part))


GRAPH_REFUSES = {
    "fused": (lambda: BatchNorm(3, fused=False), {}, "fused=False asks for array code"),
    "evaluation": (
        lambda: BatchNorm(3).eval(),
        {},
        "the compiler fuses evaluation with what surrounds it",
    ),
    "small": (
        lambda: BatchNorm(3),
        {},
        "the compiler's code for small inputs takes less time than calls of operators",
    ),
    "ranks": (
        lambda: BatchNorm(3, synchronized=True),
        {},
        "compiled graphs merge with other ranks in array code",
    ),
    "renorm": (
        lambda: BatchNorm(3, renorm=True),
        {},
        "compiled graphs renormalize in array code",
    ),
    "axes": (
        lambda: BatchNorm((8, 5), axis=(0, 2)),
        {},
        "channel axes (0, 2) are no neighbours, as compiled graphs need them",
    ),
    "adjustment": (
        lambda: BatchNorm(3, adjustment=lambda shape: (1.5, 0.5)),
        {},
        "none takes an adjustment",
    ),
    "mask": (
        lambda: BatchNorm(3),
        {"mask": torch.rand(SHAPE) < 0.5},
        "none takes a mask that differs between channels",
    ),
    "residual": (
        lambda: BatchNorm(3),
        {"residual": torch.ones(SHAPE, dtype=torch.float64)},
        "it takes a residual of x's type torch.float32, and got torch.float64",
    ),
}


@pytest.mark.parametrize(
    ("make", "arguments", "expected"), GRAPH_REFUSES.values(), ids=GRAPH_REFUSES
)
def test_graphs_say_why_they_hold_array_code(make, arguments, expected):
    found = explain(compiled(make()), torch.randn(SHAPE), **arguments)
    assert found.way == ARRAY_CODE
    assert reason(found, IN_GRAPH) == expected


@pytest.mark.parametrize(
    ("layer", "x"),
    [
        (BatchNorm(3, fused=True), torch.ones(SHAPE)),
        (BatchNorm(3), torch.ones((2**17 // 3 + 1, 3))),
        (BatchNorm(3).eval(), torch.ones(1).expand(2**23 // 3 + 1, 3)),
    ],
    ids=["demanded", "large", "large-evaluation"],
)
def test_graphs_hold_kernels(layer, x):
    assert explain(compiled(layer), x) == ("BatchNorm", IN_GRAPH, (), "")


@pytest.mark.filterwarnings("ignore:.*torch.export traces this layer in training:UserWarning")
def test_exported_programs_and_forward_mode_hold_array_code(monkeypatch):
    layer = compiled(BatchNorm(3))
    monkeypatch.setattr(torch.compiler, "is_exporting", lambda: True)
    found = explain(layer, torch.randn(SHAPE))
    assert "exported program" in reason(found, IN_GRAPH)
    monkeypatch.undo()
    with torch.autograd.forward_ad.dual_level():
        found = explain(layer, torch.randn(SHAPE))
    assert "forward-mode" in reason(found, IN_GRAPH)


def test_a_kernel_that_is_demanded_and_missing_raises_as_the_call_does():
    layer, x = BatchNorm(3, fused=True), torch.randn(SHAPE)
    mask = torch.rand(SHAPE) < 0.5
    with pytest.raises(ValueError, match="fused=True demands a kernel") as expected:
        layer(x, mask)
    with pytest.raises(ValueError, match="fused=True demands a kernel") as found:
        explain(layer, x, mask=mask)
    assert str(found.value) == str(expected.value)


@pytest.mark.parametrize("options", [{}, {"fused": False}, {"renorm": True}], ids=str)
@pytest.mark.parametrize("wrap", [lambda layer: layer, compiled], ids=["eager", "compiled"])
def test_an_explanation_moves_nothing(options, wrap):
    layer, x = BatchNorm(3, **options), torch.randn(SHAPE)
    for _ in range(2):
        layer(x)
    before = {name: a.clone() for name, a in layer.state_dict().items()}
    memory = dict(layer._memory._known)
    for _ in range(3):
        explain(wrap(layer), x)
    for name, a in layer.state_dict().items():
        assert torch.equal(a, before[name])
    assert layer._memory._known == memory
    assert not explanation.LISTENING.active


def test_jagged_inputs_have_a_way():
    x = torch.nested.nested_tensor(
        [torch.randn(n, 3) for n in (2, 5)], layout=torch.jagged, requires_grad=False
    )
    assert explain(BatchNorm(3, axis=-1), x).way == KERNELS


def test_the_text_names_way_and_reasons():
    text = str(explain(BatchNorm1d(3, fused=False), torch.randn(SHAPE)))
    first, *rest = text.splitlines()
    assert first == "BatchNorm1d: array code"
    assert rest[-1] == "  not kernels: fused=False asks for array code"


@pytest.mark.parametrize("layer", [nn.BatchNorm1d(3), object(), None], ids=repr)
def test_other_layers_have_no_explanation(layer):
    with pytest.raises(TypeError, match="layer must be a batch norm of"):
        explain(layer, torch.randn(SHAPE))


CODE = """
import torch
from batchnorm.torch import BatchNorm
layer, x = BatchNorm(3), torch.randn(8, 3, 5)
for _ in range(3):
    layer(x)
    layer(x, torch.ones(8, 3, 5, dtype=torch.bool))
torch.compile(layer, backend="aot_eager", fullgraph=True)(torch.randn(8, 3, 6000))
"""


@pytest.mark.sample(2)
@pytest.mark.parametrize("asked", ["1", "0"])
def test_the_environment_asks_for_a_log(asked):
    done = subprocess.run(
        [sys.executable, "-c", CODE],
        env=os.environ | {"BATCHNORM_EXPLAIN": asked},
        capture_output=True,
        text=True,
        check=True,
    )
    expected = [
        "BatchNorm: kernels",
        "BatchNorm: array code",
        "  not kernels: none takes a mask that differs between channels",
        "BatchNorm: kernels in a compiled graph",
    ]
    assert done.stderr.splitlines() == (expected if asked == "1" else [])
