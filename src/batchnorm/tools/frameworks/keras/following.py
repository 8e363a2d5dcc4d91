"""Every layer of a Keras model, followed through the layers' `call`."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import numpy as np

from batchnorm.keras.private import attach_mask, get_mask
from batchnorm.tools.frameworks.adapter import Follower
from batchnorm.tools.frameworks.keras.states import is_batch_norm, named_layers
from batchnorm.tools.frameworks.keras.watching import is_traced, replace_call
from batchnorm.tools.frameworks.records import Called, Values


@contextmanager
def follow(model: Any, follower: Follower, seed: int) -> Iterator[None]:
    """As `Following.follow`; Keras layers keep their random state themselves."""
    with ExitStack() as stack:
        if keras.backend.backend() == "torch":
            import torch

            stack.enter_context(torch.no_grad())
        for name, layer in named_layers(model):
            called = Called(name, type(layer).__name__, is_batch_norm(layer))
            stack.enter_context(_patch(layer, called, follower))
        yield


@contextmanager
def _patch(layer: Any, called: Called, follower: Follower) -> Iterator[None]:
    original = layer.call

    @functools.wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        given = (list(args), kwargs)
        leaves = keras.tree.flatten(given)
        if any(keras.ops.is_tensor(leaf) and is_traced(leaf) for leaf in leaves):
            return original(*args, **kwargs)
        args, kwargs = keras.tree.pack_sequence_as(
            given, _keep(follower.enter(called, leaves), leaves)
        )
        result = original(*args, **kwargs)
        leaves = keras.tree.flatten(result)
        left = _keep(follower.leave(called, leaves), leaves)
        return keras.tree.pack_sequence_as(result, left)

    with replace_call(layer, call):
        yield


def _keep(new: list[Any], old: list[Any]) -> list[Any]:
    """The new arrays, with the masks that Keras has attached to the old ones."""
    kept = list(new)
    for i, before in enumerate(old):
        mask = get_mask(before)
        if new[i] is not before and mask is not None:
            kept[i] = attach_mask(new[i], mask)
    return kept


def read(array: Any) -> Values | None:
    """As `Following.read`."""
    if isinstance(array, np.ndarray):
        return Values(array.copy(), array.dtype.name)
    if not keras.ops.is_tensor(array) or is_traced(array):
        return None
    dtype = keras.backend.standardize_dtype(array.dtype)
    if dtype in ("float16", "bfloat16"):
        array = keras.ops.cast(array, "float32")
    return Values(np.array(keras.ops.convert_to_numpy(array)), dtype)


def write(values: Any, like: Any) -> Any:
    """As `Following.write`."""
    if isinstance(like, np.ndarray):
        return np.asarray(values, like.dtype)
    return keras.ops.convert_to_tensor(values, keras.backend.standardize_dtype(like.dtype))


def run(model: Any, batch: Any, mask: Any) -> None:
    """As `Following.run`; a mapping is one input.

    Functional and sequential models make and propagate their masks themselves.
    """
    takes = "mask" in inspect.signature(model.call).parameters
    takes = takes and not type(model).call.__module__.startswith("keras.")
    model(batch, **({"mask": mask} if takes else {}))
