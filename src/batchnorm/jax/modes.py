"""The flags of the nnx layer: training, evaluation, frozen (S15)."""

from __future__ import annotations

from typing import Any, TypeVar

from flax import nnx

__all__ = ["Modes"]

_M = TypeVar("_M", bound="Modes")


class Modes(nnx.Module):
    """A module with independent static flags `training` and `frozen`."""

    training: bool
    frozen: bool

    @property
    def use_running_average(self) -> bool:
        """True if a call without that argument uses the running statistics.

        Assigning it, as flax's `train()`, `eval()` and `view` do for whole models, sets
        `training`; a frozen layer stays frozen.
        """
        return not self.training or self.frozen

    @use_running_average.setter
    def use_running_average(self, value: bool) -> None:
        self.training = not value

    def set_view(self, use_running_average: bool | None = None) -> None:
        """Used by `nnx.view`, and described by `nnx.view_info`, which wants two spaces.

        Args:
          use_running_average: use the running statistics, rather than those of the batch.
        """
        if use_running_average is not None:
            self.use_running_average = use_running_average

    def train(self: _M, mode: bool = True, **attributes: Any) -> _M:
        """Training mode, or with `mode=False` evaluation; in place. Returns the layer."""
        self.training = bool(mode)
        if attributes:
            self.set_attributes(**attributes, raise_if_not_found=False)
        return self

    def eval(self: _M, **attributes: Any) -> _M:
        """Evaluation mode, in place. Returns the layer."""
        return self.train(False, **attributes)

    def freeze(self: _M) -> _M:
        """Normalize by the running statistics, and leave them alone, in training too (S15).

        In place; survives `train()` and `eval()`, and leaves gradients alone. Returns the layer.
        """
        self.frozen = True
        return self

    def unfreeze(self: _M) -> _M:
        """Undo `freeze`, in place. Returns the layer."""
        self.frozen = False
        return self
