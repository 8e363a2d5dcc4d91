"""The answers of Keras, by modules that are imported when asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras

from batchnorm.tools.frameworks.adapter import Adapter, Follower, Judge, Pairs, States
from batchnorm.tools.frameworks.keras import states
from batchnorm.tools.frameworks.records import (
    FoldedModel,
    FoundLayer,
    Framework,
    Observation,
    Values,
)

__all__ = ["ADAPTER"]


class _Keras(Adapter):
    name: Framework = "keras"
    states: States = states

    def runs_on_torch(self) -> bool:
        return bool(keras.backend.backend() == "torch")

    def refuse_update(self, layer: Any) -> str | None:
        return None if layer.trainable else "is frozen; set trainable=True first"

    def rehearse(
        self, model: Any, layers: Sequence[FoundLayer]
    ) -> AbstractContextManager[tuple[Any, Sequence[FoundLayer]]]:
        from batchnorm.tools.frameworks.keras.rehearsing import rehearse

        return rehearse(model, layers)

    def watch(
        self, layers: Sequence[FoundLayer], see: Callable[[Observation], None]
    ) -> AbstractContextManager[None]:
        from batchnorm.tools.frameworks.keras.watching import watch

        return watch(layers, see)

    def call(self, model: Any, batch: Any) -> None:
        model(batch)  # a mapping is one input

    def follow(self, model: Any, follower: Follower, seed: int) -> AbstractContextManager[None]:
        from batchnorm.tools.frameworks.keras.following import follow

        return follow(model, follower, seed)

    def read(self, array: Any) -> Values | None:
        from batchnorm.tools.frameworks.keras.following import read

        return read(array)

    def write(self, values: Any, like: Any) -> Any:
        from batchnorm.tools.frameworks.keras.following import write

        return write(values, like)

    def run(self, model: Any, batch: Any, mask: Any) -> None:
        from batchnorm.tools.frameworks.keras.following import run

        run(model, batch, mask)

    def fold(
        self, model: Any, layers: list[FoundLayer], example: Any, pairs: Pairs, judge: Judge
    ) -> FoldedModel:
        from batchnorm.tools.frameworks.keras.folding import fold_model

        assert pairs is None
        return fold_model(model, layers, example)


ADAPTER = _Keras()
