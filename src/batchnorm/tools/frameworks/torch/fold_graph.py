"""Folding in the graph that torch.fx traces."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, fx, nn
from torch.nn import functional

from batchnorm.core.config import NEGATIVE_SLOPE
from batchnorm.tools.frameworks.affine import Affine, affine_of
from batchnorm.tools.frameworks.records import Folded, Kept
from batchnorm.tools.frameworks.torch import linear_maps as maps
from batchnorm.tools.frameworks.torch.private import list_leaves
from batchnorm.tools.state import BatchNormState

_ARGUMENTS = inspect.signature(functional.batch_norm)
_ABOUT = {"ndim", "shape", "dtype", "device", "size", "dim"}  # same before and after folding
_DROPOUTS = (functional.dropout, functional.dropout1d, functional.dropout2d, functional.dropout3d)
_ACTIVATIONS: dict[str, tuple[Callable[..., Any], dict[str, float]]] = {
    "relu": (functional.relu, {}),
    "leaky_relu": (functional.leaky_relu, {"negative_slope": NEGATIVE_SLOPE}),
}


class _Tracer(fx.Tracer):
    """Takes linear maps and batch norms as one operation each, and looks into other modules."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return maps.is_map(m) or maps.is_norm(m) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module, given: Mapping[str, Any]) -> fx.Graph:
    """The graph of a forward pass; arguments that are not given, or no tensors, are constants.

    Raises:
        TypeError: an argument that holds tensors, whose values would become constants.
        Exception: the model's code may raise anything when traced.
    """
    for name, value in given.items():
        if not isinstance(value, Tensor) and any(isinstance(a, Tensor) for a in list_leaves(value)):
            raise TypeError(f"argument {name!r} is a {type(value).__name__} of tensors")
    fixed = {
        name: parameter.default
        for name, parameter in inspect.signature(model.forward).parameters.items()
        if name not in given and parameter.default is not parameter.empty
    }
    fixed |= {name: value for name, value in given.items() if not isinstance(value, Tensor)}
    with warnings.catch_warnings():
        # fx warns that it cannot check fixed arguments; they cannot be passed any more.
        warnings.simplefilter("ignore", UserWarning)
        graph = _Tracer().trace(model, concrete_args=fixed or None)
    for node in graph.find_nodes(op="placeholder"):
        if str(node.target).lstrip("*") not in given:
            _erase_with_users(graph, node)
    return graph


def _erase_with_users(graph: fx.Graph, node: fx.Node) -> None:
    for user in list(node.users):
        _erase_with_users(graph, user)
    graph.erase_node(node)


class Shapes(fx.Interpreter):
    """Runs a graph, and notes the shape of each node's value."""

    def run_node(self, n: fx.Node) -> Any:
        """The value of a node."""
        value = super().run_node(n)
        n.meta["shape"] = tuple(value.shape) if isinstance(value, Tensor) else None
        return value


class _Norm(NamedTuple):
    """A batch norm in a graph."""

    node: fx.Node
    name: str
    x: fx.Node
    state: BatchNormState | None
    axis: int | None  # None: several
    residual: Any = None
    activation: str | None = None
    following: Sequence[str] = ()  # children that it calls on its output
    refusal: str | None = None


@dataclass
class GraphFolder:
    """Folds the batch norms of a graph whose nodes know their shapes.

    Args:
        root: the module that the graph was traced from; its linear maps change.
        graph: changes too.
    """

    root: nn.Module
    graph: fx.Graph

    def fold(self) -> tuple[list[Folded], list[Kept]]:
        """Fold every batch norm that can be."""
        self._calls = Counter(
            id(self._module(node)) for node in self.graph.find_nodes(op="call_module")
        )
        folded, kept = [], []
        for node in list(self.graph.nodes):
            norm = self._as_norm(node)
            if norm is None:
                continue
            into, reason = self._fold_one(norm)
            if into is not None:
                folded.append(Folded(norm.name, into))
            else:
                kept.append(Kept(norm.name, reason))
        for node in self.graph.find_nodes(op="get_attr"):
            if not node.users:
                self.graph.erase_node(node)
        return folded, kept

    def depth(self) -> int:
        """Number of linear maps and batch norms."""
        return sum(
            self._as_norm(node) is not None or maps.is_map(self._module(node))
            for node in self.graph.nodes
        )

    def _fold_one(self, norm: _Norm) -> tuple[str | None, str]:
        """The name of the map that it was folded into, or None with the reasons against it."""
        if norm.refusal is not None:
            return None, norm.refusal
        if norm.axis is None:
            return None, "it normalizes several channel axes"
        assert norm.state is not None
        affine = affine_of(norm.state)
        before, behind = self._before(norm), self._behind(norm, affine)
        if isinstance(before, fx.Node):
            maps.fold_previous(self._module(before), affine)
            self._remove(norm)
            return str(before.target), ""
        if isinstance(behind, fx.Node):
            maps.fold_next(self._module(behind), affine)
            self._remove(norm)
            return str(behind.target), ""
        return None, f"before it: {before}; behind it: {behind}"

    def _before(self, norm: _Norm) -> fx.Node | str:
        """The linear map before it that can take it, or the reason against it."""
        node = norm.x
        while len(_uses(node)) == 1 and self._does_nothing(node):
            node = node.all_input_nodes[0]
        module = self._module(node)
        if not maps.is_map(module):
            return self._describe(node)
        reason = self._refuse_map(node, module)
        if reason is None and len(_uses(node)) > 1:
            reason = f"its output is used in {len(_uses(node))} places"
        if reason is None and norm.axis != maps.output_axis(module, len(norm.x.meta["shape"])):
            reason = f"its channels do not lie on axis {norm.axis}"
        return node if reason is None else f"{node.target}, but {reason}"

    def _behind(self, norm: _Norm, affine: Affine) -> fx.Node | str:
        """As `_before`, for the map that follows."""
        node = norm.node
        if norm.activation is not None or norm.following:
            return f"its own {norm.activation or ', '.join(norm.following)}"
        if norm.residual is not None:
            return "its own residual"
        while True:
            uses = _uses(node)
            if len(uses) != 1:
                return f"{len(uses)} uses of its output"
            node = uses[0]
            if not self._does_nothing(node):
                break
        module = self._module(node)
        if not maps.is_map(module):
            return self._describe(node)
        reason = self._refuse_map(node, module)
        if reason is None and norm.axis != maps.output_axis(module, len(norm.x.meta["shape"])):
            reason = f"its channels do not lie on axis {norm.axis}"
        reason = reason or maps.refuse_padding(module, affine)
        return node if reason is None else f"{node.target}, {reason}"

    def _refuse_map(self, node: fx.Node, module: nn.Module) -> str | None:
        if self._calls[id(module)] > 1:
            return f"it is used in {self._calls[id(module)]} places"
        for read in self.graph.find_nodes(op="get_attr"):
            if str(read.target).rpartition(".")[0] == node.target:
                return "its parameters are used elsewhere"
        reason = maps.refuse_module(module)
        return None if reason is None else f"it {reason}"

    def _remove(self, norm: _Norm) -> None:
        """Replace a batch norm by its residual, its activation and its children, if it has any."""
        value: fx.Node = norm.x
        with self.graph.inserting_before(norm.node):
            if norm.residual is not None:
                value = self.graph.call_function(operator.add, (value, norm.residual))
            if norm.activation is not None:
                function, options = _ACTIVATIONS[norm.activation]
                value = self.graph.call_function(function, (value,), dict(options))
            for child in norm.following:
                value = self.graph.call_module(f"{norm.node.target}.{child}", (value,))
        value.meta.setdefault("shape", norm.node.meta["shape"])
        norm.node.replace_all_uses_with(value)
        self.graph.erase_node(norm.node)

    def _as_norm(self, node: fx.Node) -> _Norm | None:
        if node.op == "call_function" and node.target is functional.batch_norm:
            return self._function_norm(node)
        module = self._module(node)
        if not maps.is_norm(module):
            return None
        given = inspect.signature(module.forward).bind(*node.args, **node.kwargs).arguments
        x = next(iter(given.values()))
        refusal = maps.refuse_norm(module)
        return _Norm(
            node,
            str(node.target),
            x,
            None if refusal else maps.state_of(module),
            maps.channel_axis(module, len(x.meta["shape"])),
            given.get("residual"),
            maps.activation_of(module),
            maps.following(module),
            refusal,
        )

    def _function_norm(self, node: fx.Node) -> _Norm:
        """A call of torch's function, as in the forward pass of a subclass."""
        given = _ARGUMENTS.bind(*node.args, **node.kwargs)
        given.apply_defaults()
        values = given.arguments
        mean, var, weight, bias = (
            self._constant(values[name])
            for name in ("running_mean", "running_var", "weight", "bias")
        )
        name = str(node.name)
        if isinstance(values["running_mean"], fx.Node):
            name = str(values["running_mean"].target).rpartition(".")[0]
        refusal = None
        if mean is None or var is None or values["training"] is not False:
            refusal = "it evaluates by the batch's statistics"
        state = BatchNormState(
            name, "torch.nn.functional.batch_norm", mean, var, weight, bias, eps=values["eps"]
        )
        return _Norm(node, name, values["input"], state, 1, refusal=refusal)

    def _constant(self, value: Any) -> Any:
        """The tensor of the root that a node stands for, as an array."""
        if not isinstance(value, fx.Node) or value.op != "get_attr":
            return None
        tensor = operator.attrgetter(str(value.target))(self.root)
        return tensor.detach().cpu().double().numpy()

    def _module(self, node: fx.Node) -> Any:
        if node.op != "call_module":
            return None
        return self.root.get_submodule(str(node.target))

    def _does_nothing(self, node: fx.Node) -> bool:
        if node.op == "call_function" and node.target in _DROPOUTS:
            return node.kwargs.get("training") is False or node.args[2:3] == (False,)
        return node.op == "call_module" and maps.does_nothing(self._module(node))

    def _describe(self, node: fx.Node) -> str:
        """The name of a node in the report."""
        if node.op == "placeholder":
            return "the model's input"
        if node.op == "output":
            return "the model's output"
        if node.op == "call_module":
            return f"{node.target} ({type(self._module(node)).__name__})"
        if node.op == "call_method":
            return str(node.target)
        return str(getattr(node.target, "__name__", node.target))


def _uses(node: fx.Node) -> list[fx.Node]:
    """The nodes that compute with the values of a node."""
    return [user for user in node.users if not _asks_about(user)]


def _asks_about(user: fx.Node) -> bool:
    if user.op == "call_method":
        return user.target in _ABOUT
    return user.target is getattr and user.args[1] in _ABOUT
