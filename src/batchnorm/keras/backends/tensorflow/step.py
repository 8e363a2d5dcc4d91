"""The record of a step: a call and its tensors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import tensorflow as tf

from batchnorm.core.config import Options, Renorm
from batchnorm.core.running import Running
from batchnorm.keras.call import Call


@dataclass(frozen=True)
class Step:
    """A call and its tensors.

    Attributes:
        x: of known rank.
        mask: of x's rank, or None.
        gamma: with the channel axes' sizes, or None.
        beta: with the channel axes' sizes, or None.
        running: the statistics before the step.
        call: everything else.
        limits: of renormalization, of shape (3,): rmin, rmax, dmax; or None.
    """

    x: tf.Tensor
    mask: tf.Tensor | None
    gamma: tf.Tensor | None
    beta: tf.Tensor | None
    running: Running
    call: Call
    limits: tf.Tensor | None = None

    @property
    def options(self) -> Options:
        """The options of the core, with the limits as tensors of the working type."""
        options = self.call.options
        if options.renorm is None or self.limits is None:
            return options
        limits = tf.unstack(tf.cast(self.limits, self.working_type))
        return replace(options, renorm=Renorm(options.renorm.decay, *limits))

    @property
    def given(self) -> list[tf.Tensor]:
        """The tensors that have gradients: x, gamma and beta, as far as there are such."""
        return [a for a in (self.x, self.gamma, self.beta) if a is not None]

    def place(self, given: Sequence[Any]) -> tuple[Any, Any, Any]:
        """x, gamma and beta out of those that there are; None for the others."""
        rest = iter(given)
        x = next(rest)
        gamma = None if self.gamma is None else next(rest)
        return x, gamma, None if self.beta is None else next(rest)

    @property
    def working_type(self) -> tf.DType:
        """The type of sums and statistics (S16)."""
        return tf.float64 if self.x.dtype == tf.float64 else tf.float32

    @property
    def has_channels(self) -> bool:
        """False for x without elements along a channel axis."""
        return all(self.x.shape[a] != 0 for a in self.call.axes)

    @property
    def masks_channels(self) -> bool:
        """True for a mask that differs between channels (S1 c)."""
        return self.mask is not None and any(self.mask.shape[a] != 1 for a in self.call.axes)
