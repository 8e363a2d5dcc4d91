"""Keras models whose batch norms normalize by the batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import keras
import numpy as np

from batchnorm.tools.frameworks.keras.watching import intercept
from batchnorm.tools.frameworks.records import FoundLayer


@contextmanager
def rehearse(
    model: Any, layers: Sequence[FoundLayer]
) -> Iterator[tuple[Any, Sequence[FoundLayer]]]:
    """The model itself; calls of `layers` are training calls, and what they change is put back."""
    saved = [
        (variable, np.array(keras.ops.convert_to_numpy(variable)))
        for found in layers
        for variable in found.layer.variables
    ]
    with ExitStack() as stack:
        if keras.backend.backend() == "torch":
            import torch

            stack.enter_context(torch.no_grad())
        for variable, value in saved:
            stack.callback(variable.assign, value)
        for found in layers:
            stack.enter_context(intercept(found.layer, _train))
        yield model, layers


def _train(given: dict[str, Any]) -> None:
    given["training"] = True
