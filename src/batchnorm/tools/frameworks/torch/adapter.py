"""The answers of torch, by modules that are imported when asked."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from batchnorm.tools.frameworks.adapter import Adapter, Following, Judge, Pairs, States
from batchnorm.tools.frameworks.records import (
    FoldedModel,
    FoundLayer,
    Framework,
    Observation,
    OtherArray,
)
from batchnorm.tools.frameworks.torch import rehearsing, states

__all__ = ["ADAPTER"]


class _Torch(Adapter):
    name: Framework = "torch"
    states: States = states
    takes_pairs = True

    def can_average(self, layer: Any) -> bool:
        return hasattr(layer, "momentum")  # the explicit layer has none

    def runs_on_torch(self) -> bool:
        return True

    def to_mask(self, mask: Any, x: Any) -> Any:
        return torch.from_numpy(mask).to(x.device)

    def refuse_update(self, layer: Any) -> str | None:
        return rehearsing.refuse_update(layer)

    def rehearse(
        self, model: Any, layers: Sequence[FoundLayer]
    ) -> AbstractContextManager[tuple[Any, Sequence[FoundLayer]]]:
        return rehearsing.rehearse(model, layers)

    def copy(self, model: Any) -> Any:
        from batchnorm.tools.frameworks.torch.others import copy_model

        return copy_model(model)

    def others(self, model: Any) -> list[OtherArray]:
        from batchnorm.tools.frameworks.torch.others import find_others

        return find_others(model)

    def watch(
        self, layers: Sequence[FoundLayer], see: Callable[[Observation], None]
    ) -> AbstractContextManager[None]:
        from batchnorm.tools.frameworks.torch.watching import watch

        return watch(layers, see)

    def following(self) -> Following:
        from batchnorm.tools.frameworks.torch import following

        return following

    def fold(
        self, model: Any, layers: list[FoundLayer], example: Any, pairs: Pairs, judge: Judge
    ) -> FoldedModel:
        from batchnorm.tools.frameworks.torch.folding import fold_model

        return fold_model(model, layers, example, pairs, judge)


ADAPTER = _Torch()
