"""Folding of torch models."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx, nn

from batchnorm.tools.frameworks.adapter import Judge, Pairs
from batchnorm.tools.frameworks.records import Folded, FoldedModel, FoundLayer, Kept
from batchnorm.tools.frameworks.torch import linear_maps as maps
from batchnorm.tools.frameworks.torch.fold_flow import FlowFolder
from batchnorm.tools.frameworks.torch.fold_graph import GraphFolder, Shapes, trace
from batchnorm.tools.frameworks.torch.fold_record import Recorder
from batchnorm.tools.frameworks.torch.states import find
from batchnorm.tools.frameworks.torch.values import tensors_in

# Sizes to try on a model that does not tell the shape of its input, by number of axes.
_SIZES = {0: (1,), 1: (64, 256), 2: (64, 224, 28), 3: (16, 32)}


class _Example(NamedTuple):
    """Arguments of a forward pass, by name where they have one."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def names(self, model: nn.Module) -> Mapping[str, Any]:
        """All arguments by the names of the model's forward pass, in their order."""
        return inspect.signature(model.forward).bind(*self.args, **self.kwargs).arguments


def fold_model(
    model: nn.Module, layers: list[FoundLayer], example: Any, pairs: Pairs, judge: Judge
) -> FoldedModel:
    """As `Adapter.fold`."""
    if model.training:
        raise ValueError(
            "fold: model must be in evaluation mode, which is what a folded model computes; "
            "it is in training mode. Call model.eval() first."
        )
    given = _make_example(model) if example is None else _as_example(example)
    before = _run(model, given)
    precision = max((torch.finfo(a.dtype).eps for a in before if a.is_floating_point()), default=0)
    if not precision:
        raise ValueError(
            "fold: model must return floating tensors, by which the folded model is compared; "
            f"none was found in what {type(model).__name__} returned."
        )

    def check(new: nn.Module, depth: int) -> str | None:
        try:
            after = _run(new, given)
        except Exception as error:  # the model's code may read what is gone
            return f"the model raises {type(error).__name__}: {_first_line(error)}"
        return judge(_arrays(before), _arrays(after), precision, depth)

    new = _fold_copy(model, given, before, pairs, check)
    names = {layer.name for layer in new.folded} | {layer.name for layer in new.kept}
    kept = new.kept + [
        Kept(found.name, "its forward pass does not run it, or computes it by itself")
        for found in layers
        if found.name not in names
    ]
    if isinstance(new.model, fx.GraphModule):  # which takes tensors only
        given = _Example(tuple(_tensors(given.names(model))), {})
    after = _arrays(_run(new.model, given))
    return FoldedModel(
        new.model, new.folded, kept, new.method, new.depth, _arrays(before), after, precision
    )


class _Copy(NamedTuple):
    """As `FoldedModel`, before it has run."""

    model: nn.Module
    folded: list[Folded]
    kept: list[Kept]
    method: str
    depth: int


_Check = Callable[[nn.Module, int], str | None]


def _fold_copy(
    model: nn.Module, given: _Example, before: list[Tensor], pairs: Pairs, check: _Check
) -> _Copy:
    if pairs is not None:
        return _fold_by_flow(model, given, pairs, check, "pairs")
    root = copy.deepcopy(model)
    graph, obstacle = _try_to_trace(root, given, before)
    if graph is None:
        return _fold_by_flow(model, given, None, check, f"one forward pass, since {obstacle}")
    folder = GraphFolder(root, graph)
    depth = folder.depth()
    folded, kept = folder.fold()
    new = fx.GraphModule(root, graph, type(model).__name__)
    new.eval()  # a graph module starts in training mode
    if kept:
        other = _fold_by_flow(
            model, given, None, check, "one forward pass, which tells more than torch.fx"
        )
        if len(other.folded) > len(folded):
            return other
    return _Copy(new, folded, kept, "torch.fx", depth)


def _fold_by_flow(
    model: nn.Module, given: _Example, pairs: Pairs, check: _Check, method: str
) -> _Copy:
    root = copy.deepcopy(model)
    recorder = Recorder(root)
    try:
        with recorder.listen():
            outputs = _run(root, given)
        recorder.finish(outputs)
    except Exception as error:  # the model may refuse to be watched
        reason = f"a forward pass cannot be recorded ({_first_line(error)}); {method}"
        kept = [Kept(name, reason) for name, _ in find(model)]
        return _Copy(copy.deepcopy(model), [], kept, "nothing", 1)
    folder = FlowFolder(root, recorder)
    folded, kept = folder.fold(pairs, lambda: check(root, folder.depth()))
    return _Copy(root, folded, kept, method, folder.depth())


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _try_to_trace(
    root: nn.Module, given: _Example, before: list[Tensor]
) -> tuple[fx.Graph | None, str]:
    """The graph, with shapes; or None with the reason, which the report has for every layer."""
    try:
        names = given.names(root)
        graph = trace(root, names)
        found = _seeded(lambda: Shapes(root, graph=graph).run(*_tensors(names)))
    except Exception as error:  # the model's code may raise anything when traced
        return (
            None,
            f"torch.fx cannot trace the model ({type(error).__name__}: {_first_line(error)})",
        )
    same = len(found) == len(before) and all(
        a.shape == b.shape and torch.allclose(a, b, equal_nan=True)
        for a, b in zip(found, before, strict=True)
    )
    return (graph, "") if same else (None, "what torch.fx traces computes something else")


def _tensors(names: Mapping[str, Any]) -> list[Tensor]:
    return [value for value in names.values() if isinstance(value, Tensor)]


def _run(model: nn.Module, given: _Example) -> list[Tensor]:
    """All tensors in the model's output."""
    return _seeded(lambda: model(*given.args, **given.kwargs))


def _seeded(compute: Callable[[], Any]) -> list[Tensor]:
    # A model may draw random numbers in evaluation too.
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return tensors_in(compute())


def _arrays(tensors: list[Tensor]) -> list[Any]:
    return [a.detach().cpu().double().numpy() for a in tensors]


def _as_example(example: Any) -> _Example:
    if isinstance(example, Mapping):
        return _Example((), dict(example))
    return _Example(tuple(example) if isinstance(example, (tuple, list)) else (example,), {})


def _make_example(model: nn.Module) -> _Example:
    """A random batch that the model accepts."""
    first: Any = next((m for m in model.modules() if maps.is_map(m) or maps.is_norm(m)), None)
    needed = [
        parameter.name
        for parameter in inspect.signature(model.forward).parameters.values()
        if parameter.default is parameter.empty and parameter.kind is not parameter.VAR_KEYWORD
    ]
    if first is None or len(needed) != 1:
        raise ValueError(
            "fold: example is needed for a model whose input cannot be guessed: a tensor, a "
            "tuple of arguments or a mapping of keyword arguments."
        )
    generator = torch.Generator().manual_seed(0)
    for size in _SIZES[_spatial(first)]:
        shape = (2, _channels(first), *(size,) * _spatial(first))
        like = next(model.parameters(), torch.empty(0))
        batch = torch.randn(shape, generator=generator).to(like.device, like.dtype)
        given = _Example((batch,), {})
        try:
            _run(model, given)
        except Exception as error:  # a wrong shape may raise anything
            last = error
        else:
            return given
    raise ValueError(
        f"fold: example is needed; the model refuses random inputs of shape {shape} and "
        f"others ({last}). Pass a tensor, a tuple of arguments or a mapping of keyword arguments."
    ) from last


def _spatial(module: Any) -> int:
    if isinstance(module, (nn.BatchNorm2d, nn.BatchNorm3d)):
        return 2 if isinstance(module, nn.BatchNorm2d) else 3
    return maps.spatial_axes(module) if maps.is_map(module) else 0


def _channels(module: Any) -> int:
    for name in ("in_channels", "in_features", "num_features"):
        if hasattr(module, name):
            return int(getattr(module, name))
    return 1
