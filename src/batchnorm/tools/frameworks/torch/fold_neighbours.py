"""Folding of neighbours in nn.Sequential, for models that torch.fx does not trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import nn

from batchnorm.core.config import NEGATIVE_SLOPE
from batchnorm.tools.frameworks.affine import Affine, affine_of
from batchnorm.tools.frameworks.records import Folded, Kept
from batchnorm.tools.frameworks.torch import linear_maps as maps

_Children = list[tuple[str, nn.Module]]


def fold_neighbours(
    model: nn.Module, run: Callable[[], Any], obstacle: str
) -> tuple[list[Folded], list[Kept]]:
    """Fold, in place, batch norms that stand beside a linear map.

    Args:
        model: in evaluation mode.
        run: runs it on the example.
        obstacle: the reason for not tracing it.
    """
    names = {id(module): name for name, module in model.named_modules()}
    norms = [module for module in model.modules() if maps.is_norm(module)]
    calls, ranks = _watch(model, run)
    into: dict[int, str] = {}
    reasons: dict[int, str] = {}
    for parent in list(model.modules()):
        if type(parent).forward is not nn.Sequential.forward:
            continue
        children = [
            (key, child)
            for key, child in parent._modules.items()
            if child is not None and not maps.does_nothing(child)
        ]
        for at, (key, norm) in enumerate(children):
            if not maps.is_norm(norm):
                continue
            refusal = maps.refuse_norm(norm) or _refuse_use(norm, calls)
            taker = None if refusal else _fold_one(children, at, calls, ranks[id(norm)])
            if taker is None:
                reasons[id(norm)] = refusal or "neither neighbour takes it"
                continue
            into[id(norm)] = names[id(taker)]
            rest = parent._modules[key] = _left_over(norm)
            children[at] = (key, rest)
    kept = [
        (norm, reasons.get(id(norm), "it stands in no nn.Sequential"))
        for norm in norms
        if id(norm) not in into
    ]
    return (
        [Folded(names[id(norm)], into[id(norm)]) for norm in norms if id(norm) in into],
        [Kept(names[id(norm)], f"{reason}; {obstacle}") for norm, reason in kept],
    )


def _watch(model: nn.Module, run: Callable[[], Any]) -> tuple[Counter[int], dict[int, int]]:
    """The number of calls of each module, and the rank of its last input."""
    calls: Counter[int] = Counter()
    ranks: dict[int, int] = {}

    def count(module: nn.Module, args: tuple[Any, ...]) -> None:
        calls[id(module)] += 1
        if args and hasattr(args[0], "dim"):
            ranks[id(module)] = args[0].dim()

    with ExitStack() as stack:
        for module in model.modules():
            if maps.is_norm(module) or maps.is_map(module):
                stack.callback(module.register_forward_pre_hook(count).remove)
        run()
    return calls, ranks


def _refuse_use(module: nn.Module, calls: Counter[int]) -> str | None:
    """The reason against folding a module that is not called exactly once, or None."""
    times = calls[id(module)]
    return None if times == 1 else f"it is used {times} times"


def _fold_one(children: _Children, at: int, calls: Counter[int], rank: int) -> nn.Module | None:
    """The neighbour that has taken the batch norm, or None."""
    norm: Any = children[at][1]
    axis = maps.channel_axis(norm, rank)
    affine = affine_of(maps.state_of(norm))

    def takes(module: Any) -> bool:
        return (
            maps.is_map(module)
            and calls[id(module)] == 1
            and maps.refuse_module(module) is None
            and maps.output_axis(module, rank) == axis
        )

    if at > 0 and takes(children[at - 1][1]):
        maps.fold_previous(children[at - 1][1], affine)
        return children[at - 1][1]
    return _fold_behind(children, at, affine, takes)


def _fold_behind(
    children: _Children, at: int, affine: Affine, takes: Callable[[Any], bool]
) -> nn.Module | None:
    norm: Any = children[at][1]
    if at + 1 == len(children) or getattr(norm, "activation", None) is not None:
        return None
    module = children[at + 1][1]
    if not takes(module) or maps.refuse_padding(module, affine) is not None:
        return None
    maps.fold_next(module, affine)
    return module


def _left_over(norm: Any) -> nn.Module:
    """The module in the place of a folded batch norm."""
    activation = getattr(norm, "activation", None)
    if activation == "relu":
        return nn.ReLU()
    return nn.Identity() if activation is None else nn.LeakyReLU(NEGATIVE_SLOPE)
