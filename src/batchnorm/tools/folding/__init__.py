"""Inference models without batch norms (S19)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from batchnorm.tools.folding.report import Folding, FoldReport, check_same, refuse_difference
from batchnorm.tools.frameworks.records import Folded, Kept
from batchnorm.tools.frameworks.switch import adapter_for
from batchnorm.tools.models import find_layers

__all__ = ["FoldReport", "Folded", "Folding", "Kept", "fold"]


def fold(
    model: Any,
    example: Any = None,
    *,
    pairs: Sequence[tuple[str, str]] | None = None,
    tolerance: float | None = None,
) -> Folding:
    """Fold the batch norms of a model in evaluation into the linear maps beside them.

    The new model computes the same with fewer operations. It is compared with the old one on a
    batch before it is returned; the old one stays as it is.

    Args:
        model: a `torch.nn.Module` in evaluation mode, a functional or sequential Keras model, or a
            `flax.nnx.Module`.
        example: input to compare on: an array, a tuple of arguments, or a mapping of keyword
            arguments (Keras: whatever the model is called with). None makes a random batch where
            model and framework say which shape that has. torch models are read on it too:
            arguments that are left out, or are no tensors, become constants of the new model.
        pairs: nnx and torch: names of a linear map and a batch norm in the order in which they
            run, like `[("conv", "norm")]`; nothing else is folded then. nnx models do not tell
            the order of their layers, but neighbours in `nnx.Sequential` need none.
        tolerance: largest difference of an output, relative to the largest one; None derives it
            from the type and the number of layers.

    Returns:
        The new model, and a report of the layers that were folded and of those that stayed, with
        the reasons. A torch model comes back as a `torch.fx.GraphModule` with the same names; one
        that torch.fx does not trace, or in which it finds less, as a copy that is folded by the
        data flow of one forward pass on the example; what is wrong then is undone, with the reason.

    Raises:
        TypeError: not a model, or a Keras model of a class of its own.
        ValueError: a torch model in training mode; no example where one is needed; pairs that are
            not a linear map and a batch norm; outputs that differ by more than the tolerance, or
            hold no finite number.

    Source: S19. Linear, Dense and convolutions (separable, depthwise, grouped, transposed) take the
    batch norm behind them, or the one in front of them where no zero padding meets its offset.
    Parameters are computed in float64 and rounded once.

    >>> import torch
    >>> model = torch.nn.Sequential(torch.nn.Conv1d(3, 8, 5), torch.nn.BatchNorm1d(8)).eval()
    >>> folded, report = fold(model, torch.randn(2, 3, 40))
    >>> [layer.name for layer in report.folded], report.kept
    (['1'], ())
    """
    layers = find_layers(model)
    if not layers:
        raise ValueError(f"fold: model must hold a batch norm; {type(model).__name__} has none.")
    adapter = adapter_for(layers[0].framework)
    if pairs is not None and not adapter.takes_pairs:
        raise ValueError(
            f"fold: pairs are for flax nnx and torch; a {adapter.name} model tells "
            "the order of its layers."
        )
    new = adapter.fold(
        model, layers, example, pairs, partial(refuse_difference, tolerance=tolerance)
    )
    return Folding(new.model, check_same(new, tolerance))
