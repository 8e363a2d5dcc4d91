"""The answers of Keras, by modules that are imported when asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import keras

from batchnorm.tools.frameworks.adapter import Adapter, Following, Judge, Pairs, States
from batchnorm.tools.frameworks.keras import states
from batchnorm.tools.frameworks.records import (
    FoldedModel,
    FoundLayer,
    Framework,
    Observation,
    OtherArray,
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

    def copy(self, model: Any) -> Any:
        from batchnorm.tools.frameworks.keras.others import copy_model

        return copy_model(model)

    def others(self, model: Any) -> list[OtherArray]:
        from batchnorm.tools.frameworks.keras.others import find_others

        return find_others(model)

    def watch(
        self, layers: Sequence[FoundLayer], see: Callable[[Observation], None]
    ) -> AbstractContextManager[None]:
        from batchnorm.tools.frameworks.keras.watching import watch

        return watch(layers, see)

    def call(self, model: Any, batch: Any) -> None:
        model(batch)  # a mapping is one input

    def following(self) -> Following:
        from batchnorm.tools.frameworks.keras import following

        return following

    def fold(
        self, model: Any, layers: list[FoundLayer], example: Any, pairs: Pairs, judge: Judge
    ) -> FoldedModel:
        from batchnorm.tools.frameworks.keras.folding import fold_model

        assert pairs is None
        return fold_model(model, layers, example)


ADAPTER = _Keras()
