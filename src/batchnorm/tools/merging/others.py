"""The arrays of several models that belong to no batch norm, averaged."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.core.errors import ArgumentValueError
from batchnorm.core.merge import average_by_count
from batchnorm.numpy_namespace import XP
from batchnorm.tools.merging.layers import numberless
from batchnorm.tools.sides import NamedArrays
from batchnorm.tools.state import FloatArray
from batchnorm.tools.text import list_names, plural, printable

__all__ = ["average_others"]


def average_others(
    models: Sequence[NamedArrays], counts: FloatArray, names: Sequence[str] = ()
) -> NamedArrays:
    """Weighted averages in float64; what is not floating must be the same in all models.

    Args:
        models: names and arrays of each, in the order of the model.
        counts: of the models, float64.
        names: of the models, for messages; files have such.

    Raises:
        ArgumentValueError: other arrays, values that are not finite, integers that differ.
    """
    first = models[0]
    names = names or ["the first", *(f"model {number}" for number in range(1, len(models)))]
    aligned = [_align(first, arrays, number) for number, arrays in enumerate(models)]
    return [
        (name, _average(name, [arrays[i] for arrays in aligned], counts, names))
        for i, (name, _) in enumerate(first)
    ]


def _align(first: NamedArrays, model: NamedArrays, number: int) -> list[NDArray[Any]]:
    """A model's arrays in the order of the first one's."""
    wanted, found = [name for name, _ in first], dict(model)
    if found.keys() == set(wanted):
        arrays = [found[name] for name in wanted]
    elif [numberless(name) for name in wanted] == [numberless(name) for name, _ in model]:
        arrays = [array for _, array in model]
    else:
        missing = [name for name in wanted if name not in found]
        surplus = [name for name in found if name not in wanted]
        which = "lacks" if missing else "has besides"
        raise ArgumentValueError(
            "everything=True needs models with the same arrays beside their batch norms; model "
            f"{number} {which} {list_names(missing or surplus, 3)}."
        )
    for array, (name, ours) in zip(arrays, first, strict=True):
        if array.shape != ours.shape:
            raise ArgumentValueError(
                f"{printable(name)!r} must have the same shape in all models; model {number} has "
                f"{array.shape}, the first {ours.shape}."
            )
    return arrays


def _average(
    name: str, arrays: Sequence[NDArray[Any]], counts: FloatArray, names: Sequence[str]
) -> NDArray[Any]:
    weighing = np.flatnonzero(counts).tolist()
    used = [arrays[i] for i in weighing]
    differs = [i for i in weighing if not np.array_equal(arrays[i], arrays[0])]
    if not differs:
        return arrays[0]  # infinite limits of renormalization too
    if any(array.dtype.kind not in "fc" for array in used):
        raise ArgumentValueError(
            f"{printable(name)!r} holds {arrays[0].dtype.name}, which cannot be averaged, and "
            f"differs between {names[0]} and {names[differs[0]]}; make it the same, or leave "
            "everything=True (--all) out."
        )
    wide = np.stack([a.astype(np.complex128 if a.dtype.kind == "c" else np.float64) for a in used])
    for i, array in zip(weighing, wide, strict=True):
        wrong = array[~np.isfinite(array)]
        if wrong.size:
            raise ArgumentValueError(
                f"{printable(name)!r} must be finite in all models to be averaged; {names[i]} has "
                f"{wrong[0]:g} in {wrong.size:,} of {plural(array.size, 'value')}."
            )
    weight = counts[weighing].reshape(-1, *(1 for _ in wide.shape[1:]))
    return average_by_count(wide, weight, 0, XP)
