"""The module in the place of a folded batch norm."""

from __future__ import annotations

import inspect
import warnings
from typing import Any

from torch import Tensor, fx, nn
from torch.nn import functional

from batchnorm.core.config import NEGATIVE_SLOPE
from batchnorm.tools.frameworks.torch import linear_maps as maps
from batchnorm.tools.frameworks.torch.fold_calls import Call
from batchnorm.tools.frameworks.torch.fold_graph import trace


class Passed(nn.Module):
    """Takes the arguments of this library's layer; adds the residual, and applies the activation.

    Args:
        activation: as the layer's.
    """

    def __init__(self, activation: str | None) -> None:
        super().__init__()
        self.activation = activation

    def forward(
        self, input: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """The input x with residual and activation; the mask has no effect, as in evaluation."""
        y = input if residual is None else input + residual
        if self.activation == "relu":
            return functional.relu(y)
        return y if self.activation is None else functional.leaky_relu(y, NEGATIVE_SLOPE)

    def extra_repr(self) -> str:
        """The activation."""
        return f"activation={self.activation!r}"


def rest_of(norm: Call) -> nn.Module:
    """The module in the place of a folded batch norm, for which `refuse_rest` gives no reason."""
    module = norm.module
    if not maps.is_norm(module):
        rest = _without_norm(module, norm)
        assert isinstance(rest, nn.Module)
        return rest
    children = [module.get_submodule(name) for name in maps.following(module)]
    if children:
        return children[0] if len(children) == 1 else nn.Sequential(*children)
    activation = maps.activation_of(module)
    if _has_more(norm):
        return Passed(activation)
    if activation == "relu":
        return nn.ReLU()
    return nn.Identity() if activation is None else nn.LeakyReLU(NEGATIVE_SLOPE)


def refuse_rest(norm: Call) -> str | None:
    """The reason why a batch norm cannot be taken out of its module, or None."""
    if maps.is_norm(norm.module):
        more = _has_more(norm) and maps.following(norm.module)
        return "it gets a mask or a residual, which its children do not take" if more else None
    rest = _without_norm(norm.module, norm)
    return rest if isinstance(rest, str) else None


def _has_more(norm: Call) -> bool:
    """True for a call with more arguments than x."""
    return any(norm.given.get(name) is not None for name in ("mask", "residual"))


def _without_norm(module: nn.Module, norm: Call) -> nn.Module | str:
    """A module of a class of its own, without the call of torch's function in it."""
    owner = f"its class {type(module).__name__} computes more, and torch.fx cannot trace it"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            graph = trace(module, {_first(module): Tensor()})
    except Exception:  # the module's code may raise anything when traced
        return owner
    found = list(graph.find_nodes(op="call_function", target=functional.batch_norm))
    if len(found) != 1 or not isinstance(_input_of(found[0]), fx.Node):
        return owner
    found[0].replace_all_uses_with(_input_of(found[0]))
    graph.erase_node(found[0])
    for node in graph.find_nodes(op="get_attr"):
        if not node.users:
            graph.erase_node(node)
    rest = fx.GraphModule(module, graph, type(module).__name__)
    rest.eval()  # a graph module starts in training mode
    return rest


def _input_of(node: fx.Node) -> Any:
    return node.args[0] if node.args else node.kwargs.get("input")


def _first(module: nn.Module) -> str:
    return next(iter(inspect.signature(module.forward).parameters))
