"""The answers of flax nnx, by modules that are imported when asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

from batchnorm.tools.frameworks.adapter import Adapter, Following, Judge, Pairs, States
from batchnorm.tools.frameworks.nnx import rehearsing, stacked, states
from batchnorm.tools.frameworks.records import (
    FoldedModel,
    FoundLayer,
    Framework,
    Observation,
    OtherArray,
)
from batchnorm.tools.state import BatchNormState

__all__ = ["ADAPTER"]


class _Nnx(Adapter):
    name: Framework = "nnx"
    states: States = states
    takes_pairs = True

    def check_shared(self, pairs: Sequence[tuple[Any, BatchNormState]]) -> None:
        stacked.check_shared(pairs)

    def refuse_update(self, layer: Any) -> str | None:
        return rehearsing.refuse_update(layer)

    def rehearse(
        self, model: Any, layers: Sequence[FoundLayer]
    ) -> AbstractContextManager[tuple[Any, Sequence[FoundLayer]]]:
        return rehearsing.rehearse(model, layers)

    def copy(self, model: Any) -> Any:
        from batchnorm.tools.frameworks.nnx.others import copy_model

        return copy_model(model)

    def others(self, model: Any) -> list[OtherArray]:
        from batchnorm.tools.frameworks.nnx.others import find_others

        return find_others(model)

    def watch(
        self, layers: Sequence[FoundLayer], see: Callable[[Observation], None]
    ) -> AbstractContextManager[None]:
        from batchnorm.tools.frameworks.nnx.watching import watch

        return watch(layers, see)

    def settle(self) -> None:
        from batchnorm.tools.frameworks.nnx.watching import settle

        settle()

    def following(self) -> Following:
        from batchnorm.tools.frameworks.nnx import following

        return following

    def fold(
        self, model: Any, layers: list[FoundLayer], example: Any, pairs: Pairs, judge: Judge
    ) -> FoldedModel:
        from batchnorm.tools.frameworks.nnx.folding import fold_model

        return fold_model(model, layers, example, pairs)


ADAPTER = _Nnx()
