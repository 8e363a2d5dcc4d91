"""Graphs of torch.fx and modules of torch.jit: they work, or an error of one line has a remedy."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import fx, nn

from batchnorm.tools import fold
from batchnorm.torch import BatchNorm, BatchNorm1d, convert_batchnorm, revert_batchnorm

# torch's own about itself: these ways into a graph are old
pytestmark = [
    pytest.mark.filterwarnings("ignore:`torch.jit.*` is deprecated:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:`torch.jit.*:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The TorchScript type system:UserWarning"),
    # A traced model keeps the shapes of its example; that is what tracing means.
    pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning"),
]
C = 4


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(3, C), BatchNorm1d(C), nn.ReLU(), BatchNorm1d(C))


class Masked(nn.Module):
    """A model that passes an argument to its layer."""

    def __init__(self, name: str | None, positional: bool = False) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(3, C), BatchNorm1d(C)
        self.name, self.positional = name, positional

    def forward(self, x, given):
        y = self.linear(x)
        if self.name is None:
            return self.norm(y, None, None)
        if self.positional:
            return self.norm(y, *((given,) if self.name == "mask" else (None, given)))
        return self.norm(input=y, **{self.name: given})


# torch.fx


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_reverted_graph_computes_what_the_reverted_model_does(training):
    model = network().train(training)
    graph = revert_batchnorm(fx.symbolic_trace(copy.deepcopy(model)))
    assert not any(isinstance(m, BatchNorm) for m in graph.modules())
    x = torch.randn(6, 3)
    assert torch.equal(graph(x), revert_batchnorm(model)(x))


def test_graph_inside_a_model_is_reverted():
    inner = fx.symbolic_trace(network())
    model = nn.ModuleDict({"first": inner, "second": nn.Sequential(fx.symbolic_trace(network()))})
    expected = copy.deepcopy(inner)
    revert_batchnorm(model)
    x = torch.randn(6, 3)
    torch.testing.assert_close(model["first"](x), expected(x), rtol=1e-5, atol=1e-5)
    assert model["second"](x).isfinite().all()


def test_reverted_graph_can_be_scripted():
    graph = revert_batchnorm(fx.symbolic_trace(network().eval()))
    x = torch.randn(6, 3)
    assert torch.equal(torch.jit.script(graph)(x), graph(x))


def test_graph_calls_the_layer_as_torchs():
    for node in fx.symbolic_trace(network()).graph.find_nodes(op="call_module"):
        assert (len(node.args), node.kwargs) == (1, {})


def test_graph_with_arguments_of_none_is_mended():
    """Such graphs come from other versions, and from code that names every argument."""
    graph = fx.symbolic_trace(network())
    expected = copy.deepcopy(graph)
    for node in graph.graph.find_nodes(op="call_module", target="1"):
        node.args = (*node.args, None, None)
    for node in graph.graph.find_nodes(op="call_module", target="3"):
        node.args, node.kwargs = (), {"input": node.args[0], "residual": None}
    graph.recompile()
    x = torch.randn(6, 3)
    torch.testing.assert_close(revert_batchnorm(graph)(x), expected(x), rtol=1e-5, atol=1e-5)


def test_model_that_passes_none_is_traced_as_one_that_passes_nothing():
    graph = revert_batchnorm(fx.symbolic_trace(Masked(None)))
    assert graph(torch.randn(6, 3), None).isfinite().all()


@pytest.mark.parametrize("positional", [True, False], ids=["by position", "by name"])
@pytest.mark.parametrize("name", ["mask", "residual"])
def test_traced_mask_and_residual_are_handed_on(name, positional):
    model = Masked(name, positional)
    graph = fx.symbolic_trace(copy.deepcopy(model))
    x = torch.randn(6, 3)
    given = torch.rand(6) < 0.7 if name == "mask" else torch.randn(6, C)
    assert torch.equal(graph(x, given), model(x, given))


@pytest.mark.parametrize("positional", [True, False], ids=["by position", "by name"])
@pytest.mark.parametrize("name", ["mask", "residual"])
def test_graph_that_passes_something_is_not_reverted(name, positional):
    graph = nn.Sequential(fx.symbolic_trace(network()), fx.symbolic_trace(Masked(name, positional)))
    before = [str(g.graph) for g in graph]
    with pytest.raises(ValueError, match=f"layer 'norm' with a {name}, which"):
        revert_batchnorm(graph)
    assert sum(isinstance(m, BatchNorm) for m in graph.modules()) == 3
    assert [str(g.graph) for g in graph] == before


def test_converted_graph_that_names_its_input():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm1d(C)

        def forward(self, x):
            return self.norm(input=x)

    model, x = Named(), torch.randn(6, C)
    graph = convert_batchnorm(fx.symbolic_trace(copy.deepcopy(model)))
    torch.testing.assert_close(graph(x), model(x), rtol=1e-5, atol=1e-5)
    assert revert_batchnorm(graph)(x).isfinite().all()


# torch.jit


@pytest.mark.parametrize("make", [lambda: BatchNorm1d(C), network, lambda: Masked("mask")])
def test_script_says_what_to_do(make):
    with pytest.raises(TypeError, match=r"torch\.jit\.script cannot compile.*fold.*revert"):
        torch.jit.script(make())


def test_folded_and_reverted_models_can_be_scripted():
    model, x = nn.Sequential(nn.Linear(3, C), BatchNorm1d(C), nn.ReLU()).eval(), torch.randn(6, 3)
    expected = model(x)
    for ready in (fold(copy.deepcopy(model), x)[0], revert_batchnorm(copy.deepcopy(model))):
        torch.testing.assert_close(torch.jit.script(ready)(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_traced_model_computes_what_the_model_does(training):
    model, x = network().train(training), torch.randn(6, 3)
    expected = copy.deepcopy(model)(x)
    traced = torch.jit.trace(copy.deepcopy(model), x, check_trace=False)
    torch.testing.assert_close(traced(x), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("change", [convert_batchnorm, revert_batchnorm])
def test_module_of_jit_is_not_changed(change):
    traced = torch.jit.trace(network().eval(), torch.randn(6, 3))
    with pytest.raises(TypeError, match=r"a module of torch\.jit.*made from.*fold.*revert"):
        change(traced)
