"""Proof on first use: kernels that are wrong on purpose, or fail to compile, do not serve a device.

In Triton's interpreter a CPU stands for the card: `card` lets layers take the GPU's kernels there.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
import triton.language as tl
from torch import nn

import batchnorm
from batchnorm.kernels import explanation, proofs
from batchnorm.kernels.select import Choice
from batchnorm.kernels.triton import launch
from batchnorm.torch import BatchNorm
from batchnorm.torch.kernels import decision, samples
from batchnorm.torch.ways import graph_operators, proof

FEW = tuple(sample for sample in samples.SAMPLES if sample.name in ("evaluation", "zeroed"))
X = torch.randn(32, 4, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """Layers on a CPU take the GPU's kernels, as on a card, and nothing is proved yet."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def choose(device: str, *rest: Any) -> Choice:
        return Choice("triton")

    for module in (decision, graph_operators):
        monkeypatch.setattr(module, "choose", choose)
    monkeypatch.setattr(proof, "SAMPLES", FEW)
    monkeypatch.setattr(proof, "PROOFS", proof._Proofs("once"))
    decision.decide.cache_clear()
    yield
    decision.decide.cache_clear()
    torch._dynamo.reset()


class Doubled:
    """A kernel whose y is twice what it should be."""

    def __init__(self, kernel: Any) -> None:
        self.kernel = kernel

    def __getitem__(self, grid: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> None:
            self.kernel[grid](*arguments, **options)
            arguments[2].data.mul_(2)

        return run


@triton.jit
def uncompilable(x, residual, y, mask, kept, parameters, running, walk, eps, task):
    """Calls what the language does not have."""
    tl.no_such_function(x)


def break_kernel(monkeypatch: pytest.MonkeyPatch, kernel: Any) -> None:
    monkeypatch.setattr(launch.forward, "normalize", kernel)


def way_of(layer: nn.Module, **arguments: Any) -> tuple[str, str]:
    found = batchnorm.explain(layer, X, **arguments)
    return found.way, found.note


def expected() -> torch.Tensor:
    return BatchNorm(4, fused=False).eval()(X)


@pytest.mark.usefixtures("card")
def test_right_kernels_serve_and_the_verdict_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    layer = BatchNorm(4).eval()
    assert way_of(layer) == (
        explanation.KERNELS,
        "not proved on this device yet; the first call does that",
    )
    assert proofs.describe_known() == []  # a question proves nothing
    torch.testing.assert_close(layer(X), expected())
    assert way_of(layer) == (explanation.KERNELS, "on this device proved")
    batchnorm.show_config()
    assert "proofs      Triton's interpreter: proved\n" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("kernel", "error"),
    [(Doubled(launch.forward.normalize), "y is wrong at "), (uncompilable, "no_such_function")],
    ids=["wrong", "uncompilable"],
)
@pytest.mark.usefixtures("card")
def test_broken_kernels_leave_the_device_to_array_code(
    monkeypatch: pytest.MonkeyPatch, kernel: Any, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    break_kernel(monkeypatch, kernel)
    layer = BatchNorm(4).eval()
    with pytest.warns(RuntimeWarning, match="in case evaluation") as warned:
        y = layer(X)
    assert len(warned) == 1
    text = str(warned[0].message)
    assert error in text
    assert "Please report this, with what `batchnorm info` and `batchnorm verify" in text
    torch.testing.assert_close(y, expected(), rtol=0, atol=0)
    with warnings.catch_warnings():  # once
        warnings.simplefilter("error")
        layer(X)
        BatchNorm(4)(X)
    found = batchnorm.explain(layer, X)
    assert found.way == explanation.ARRAY_CODE
    assert any("the kernels are wrong in case evaluation" in r.reason for r in found.refused)
    with pytest.raises(ValueError, match="fused=True demands a kernel, but the kernels are wrong"):
        BatchNorm(4, fused=True)(X)
    batchnorm.show_config()
    assert "proofs      Triton's interpreter: wrong in case evaluation" in capsys.readouterr().out


@pytest.mark.parametrize("broken", [False, True], ids=["right", "broken"])
@pytest.mark.usefixtures("card")
def test_a_compiled_graph_is_decided_before_it_runs(
    monkeypatch: pytest.MonkeyPatch, broken: bool
) -> None:
    """The proof is not part of the graph, whose operators show which way was taken."""
    if broken:
        break_kernel(monkeypatch, Doubled(launch.forward.normalize))
        monkeypatch.setattr(proof, "_is_interpreted", lambda call: True)  # without fused=True
        monkeypatch.setattr(graph_operators, "SMALL", -1)  # as on a card, whatever the size
    seen: list[str] = []

    def look(graph: torch.fx.GraphModule, inputs: Any) -> Any:
        seen.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    layer = BatchNorm(4, fused=None if broken else True)
    compiled = torch.compile(layer, backend=look, fullgraph=True)
    caught: Any
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        y = compiled(X)
    assert any("proof" in str(w.message) or "in case" in str(w.message) for w in caught) == broken
    assert any("differentiable_step" in name for name in seen) != broken
    assert len(proofs.describe_known()) == 1
    torch.testing.assert_close(y, BatchNorm(4, fused=False)(X), atol=1e-5, rtol=1e-5)


def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of samples that are run from here on."""
    names: list[str] = []
    compare = samples.compare

    def noted(sample: Any, *rest: Any) -> str:
        names.append(sample.name)
        return compare(sample, *rest)

    monkeypatch.setattr(proof, "compare", noted)
    return names


@pytest.mark.parametrize(("setting", "again"), [("once", False), ("force", True), ("skip", False)])
@pytest.mark.usefixtures("card")
def test_settings(monkeypatch: pytest.MonkeyPatch, setting: str, again: bool) -> None:
    names = counted(monkeypatch)
    BatchNorm(4)(X)
    BatchNorm(4)(X)
    assert names == ["zeroed", "evaluation"] == [sample.name for sample in FEW]
    names.clear()
    monkeypatch.setattr(proof, "PROOFS", proof._Proofs(setting))  # as a new process
    BatchNorm(4)(X)
    assert bool(names) == again
    if setting == "skip":
        break_kernel(monkeypatch, Doubled(launch.forward.normalize))
        torch.testing.assert_close(BatchNorm(4).eval()(X), 2 * expected())


@pytest.mark.usefixtures("card")
def test_a_backward_pass_and_a_captured_graph_prove_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names, found = counted(monkeypatch), []

    class Late(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: torch.Tensor) -> torch.Tensor:
            found.append(BatchNorm(4).eval()(X))
            return dy

    with pytest.warns(RuntimeWarning, match="a backward pass is running. Run the layer once"):
        Late.apply(X.clone().requires_grad_()).sum().backward()
    torch.testing.assert_close(found[0], expected(), rtol=0, atol=0)
    assert names == []

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(proof, "_name", lambda device: "a card")
    with pytest.warns(RuntimeWarning, match="a CUDA graph is being captured"):
        reason = proof._Proofs("").refuse(("cuda", 0))
    assert reason is not None
    assert reason.endswith("a CUDA graph is being captured")
    proofs.make_subject("a card", proof._describe_driver(("cuda", 0))).write(proofs.PASSED)
    again = proof._Proofs("")
    assert again.refuse(("cuda", 0)) is None  # the verdict is there
    assert again.describe_known() == ["a card: proved"]


@pytest.mark.usefixtures("card")
def test_a_proof_leaves_the_caller_s_state_alone() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16), torch.device("meta"):
        BatchNorm(4, device="cpu")(X)
        assert not torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), before)
    assert len(proofs.describe_known()) == 1


SECOND = """
import torch
from batchnorm.torch.ways import graph_operators, proof
from batchnorm.torch import BatchNorm
proof.SAMPLES = tuple(s for s in proof.SAMPLES if s.name == "evaluation")
compare = proof.compare
def noted(*arguments):
    print("proves")
    return compare(*arguments)
proof.compare = noted
BatchNorm(4, fused=True).eval()(torch.zeros(3, 4))
print(proof.PROOFS.describe_known()[0])
"""


def test_a_second_process_finds_the_verdict(tmp_path: Path) -> None:
    environment = os.environ | {"XDG_CACHE_HOME": str(tmp_path), "BATCHNORM_PROOF": "once"}
    said = [
        subprocess.run(
            [sys.executable, "-c", SECOND],
            env=environment,
            capture_output=True,
            text=True,
            check=True,
        ).stdout.splitlines()
        for _ in range(2)
    ]
    assert said == [["proves", "Triton's interpreter: proved"], ["Triton's interpreter: proved"]]


KERNELS = {
    *("partial_moments", "merge_moments", "finish_channels", "normalize", "forward_whole"),
    *("partial_gradients", "merge_gradients", "finish_gradients", "apply_gradient"),
    "backward_whole",
}


def test_every_sample_is_right_and_they_launch_every_kernel(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen, start = set(), launch.Plan._launch

    def note(self: launch.Plan, kernel: Any, *rest: Any, **more: Any) -> None:
        seen.add(kernel.fn.__name__)
        start(self, kernel, *rest, **more)

    monkeypatch.setattr(launch.Plan, "_launch", note)
    device = torch.device("cpu")
    for sample in samples.SAMPLES:
        error = samples.compare(sample, proof._run_kernels, proof.array_code.run, device)
        assert error == "", sample.name
    source = Path(launch.__file__).read_text()
    assert set(re.findall(r"_launch\(\s*(?:forward|backward)\.(\w+)", source)) == KERNELS
    assert seen == KERNELS


def test_a_setting_that_does_not_exist_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("BATCHNORM_PROOF", "never")
    with pytest.raises(ValueError, match="BATCHNORM_PROOF must be one of once, force, skip"):
        proofs.find_setting()
