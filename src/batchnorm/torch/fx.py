"""Layers in graphs of torch.fx: calls of modules, with arguments that torch's layers lack."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from torch import nn
from torch.fx import GraphModule, Node, Proxy

from batchnorm.core.errors import ArgumentValueError

_ARGUMENTS = ("input", "mask", "residual")


def trace_call(layer: nn.Module, x: Proxy, given: Mapping[str, Any]) -> Proxy:
    """A call of the layer in a graph: with x alone, as torch's are called, if no more is given."""
    tracer: Any = x.tracer
    kwargs = {name: a for name, a in given.items() if a is not None}
    call: Proxy = tracer.create_proxy("call_module", tracer.path_of_module(layer), (x,), kwargs)
    return call


def keep_first_argument(module: nn.Module, layers: Collection[nn.Module]) -> None:
    """Make every graph inside `module` call these layers with x alone, as torch's are called.

    Raises:
        ValueError: a graph passes a mask or a residual. No graph is changed then.
    """
    found: dict[GraphModule, list[tuple[Node, Any]]] = {}
    for graph in module.modules():
        if isinstance(graph, GraphModule):
            for node in graph.graph.find_nodes(op="call_module"):
                if graph.get_submodule(str(node.target)) in layers:
                    found.setdefault(graph, []).append((node, _only_argument(node)))
    for graph, calls in found.items():
        for node, x in calls:
            node.args, node.kwargs = (x,), {}
        graph.recompile()


def _only_argument(node: Node) -> Any:
    given = dict(zip(_ARGUMENTS, node.args, strict=False)) | node.kwargs
    passed = [name for name in _ARGUMENTS[1:] if given.get(name) is not None]
    if passed:
        raise ArgumentValueError(
            f"the traced graph calls layer {node.target!r} with a {passed[0]}, which "
            "torch's layer does not take. Revert the model first and trace it then, or leave this "
            "layer out."
        )
    return given["input"]
