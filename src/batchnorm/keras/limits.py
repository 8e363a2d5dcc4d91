"""Limits of renormalization, which compiled steps read as data (S11)."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import keras

from batchnorm.core import config
from batchnorm.core.errors import ArgumentRuntimeError, names_errors
from batchnorm.keras.functional import BACKEND
from batchnorm.keras.private import is_held_elsewhere
from batchnorm.keras.variables import make_limits


class ClippedNormalization(keras.layers.BatchNormalization):
    """Keras's layer with limits of renormalization that may change from step to step."""

    _options: config.Options
    _clipping: config.Renorm | None = (
        None  # the limits that were set after construction, and the decay
    )
    _limits: Any = None  # the variable that holds limits, where the backend needs one

    @names_errors()
    def set_renorm_clipping(
        self,
        rmax: float | None = None,
        rmin: float | None = None,
        dmax: float | None = None,
        *,
        save: bool = False,
    ) -> None:
        """Set limits of renormalization for all later steps; nothing else changes.

        Compiled steps (`fit`, `train_on_batch`, `tf.function`, `jax.jit` of stateless calls) read
        them as data: a schedule compiles once. Configs and saved models keep the limits of the
        constructor, unless `save` is True; files of weights never have any.

        On JAX the first call adds a variable to `non_trainable_variables`, so that steps that are
        compiled already are compiled once more. There `fit` holds the state, which a callback gets
        back by asking for its `model`.

        Args:
            rmax: upper limit of r, at least `rmin`; None leaves it, inf lifts it.
            rmin: lower limit of r, at least 0; None leaves it.
            dmax: limit of the size of d, at least 0; None leaves it, inf lifts it.
            save: make them the constructor's, `renorm_clipping`, too.

        Raises:
            TypeError: a limit that is no number.
            ValueError: a layer without `renorm`, a negative limit, or `rmax` below `rmin`.
            RuntimeError: a step of JAX holds the layer's state.

        Source: S11; Ioffe 2017 (arXiv 1702.03275), section 4.
        """
        config.check_flag("save", save)
        renorm = config.change_clipping(
            self._options.renorm, {"rmax": rmax, "rmin": rmin, "dmax": dmax}
        )
        if BACKEND.LIMITS_ARE_STATE:
            self._assign_limits(renorm)
        self._clipping = renorm
        self._options = replace(self._options, renorm=renorm)
        if save:
            every = {"rmax": renorm.rmax, "rmin": renorm.rmin, "dmax": renorm.dmax}
            self.renorm_clipping = {name: a for name, a in every.items() if math.isfinite(a)}

    def _assign_limits(self, renorm: config.Renorm) -> None:
        """Write limits into their variable, which steps get as state from now on."""
        if any(is_held_elsewhere(variable) for variable in self.variables):
            raise ArgumentRuntimeError(
                "limits cannot be set while fit holds the state of the layer. Reach the layer "
                "through the callback's model, or call model.jax_state_sync() first."
            )
        values = [renorm.rmin, renorm.rmax, renorm.dmax]
        if self._limits is None:
            limits = make_limits(values, self._weight_type)
            object.__setattr__(self, "_limits", limits)  # Keras would track it as a weight
        self._limits.assign(values)

    @property
    def variables(self) -> list[Any]:
        """All state: the weights, and limits that were set, where steps take them as state."""
        return [*super().variables, *(() if self._limits is None else (self._limits,))]
