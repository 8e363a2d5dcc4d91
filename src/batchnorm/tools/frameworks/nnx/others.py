"""Copies of nnx models, and their variables that belong to no batch norm."""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from numpy.typing import NDArray

from batchnorm.tools.frameworks import array_leaves
from batchnorm.tools.frameworks.nnx import states
from batchnorm.tools.frameworks.nnx.stacked import Slice, module_of
from batchnorm.tools.frameworks.records import OtherArray


def copy_model(model: Any) -> Any:
    """A model, layer or slice with variables of its own."""
    if isinstance(model, Slice):
        return Slice(nnx.clone(model.module), model.index)
    return nnx.clone(model)


def find_others(model: Any) -> list[OtherArray]:
    """Variables, each once, sorted by path as flax does."""
    taken = {
        id(value)
        for _, layer in states.find(model)
        for value in vars(module_of(layer)).values()
        if isinstance(value, nnx.Variable)
    }
    return [
        OtherArray(
            "/".join(map(str, path)),
            partial(array_leaves.read, variable),
            partial(_write, variable),
        )
        for path, variable in nnx.iter_graph(module_of(model))
        if isinstance(variable, nnx.Variable)
        and id(variable) not in taken
        and array_leaves.is_array(variable)
        and not array_leaves.is_seed(variable)
    ]


def _write(variable: Any, values: NDArray[Any]) -> None:
    old: jax.Array = variable[...]
    variable[...] = jnp.asarray(values, old.dtype).reshape(old.shape)
