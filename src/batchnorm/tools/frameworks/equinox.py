"""Equinox's batch norm, whose statistics live in a state beside the model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import equinox as eqx
import jax
import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from batchnorm.tools.arrays import flatten
from batchnorm.tools.fitting import check_finite_casts, fit
from batchnorm.tools.frameworks import array_leaves
from batchnorm.tools.state import BatchNormState

__all__ = ["Pair", "owns"]

# "batch" mode counts updates to correct the bias of the first ones. After so many there is none, as
# in statistics that come from elsewhere.
_SETTLED = 1 << 30


def owns(model: Any) -> bool:
    """True for a pair of a model and its state."""
    return isinstance(model, tuple) and len(model) == 2 and isinstance(model[1], eqx.nn.State)


class Pair:
    """The batch norms of `(model, state)`; the pair itself stays usable, and as it is."""

    notes: Sequence[str] = ()  # layers are known by class, not guessed from names
    has_options: bool = True

    def __init__(self, pair: Any) -> None:
        self._model, self._state = pair
        self._layers = dict(_find(self._model))
        self.states = [_take(layer, self._state, name) for name, layer in self._layers.items()]

    def others(self) -> Mapping[str, NDArray[Any]]:
        """The arrays of numbers that belong to no batch norm."""
        own = {
            id(array)
            for layer in self._layers.values()
            for index in vars(layer).values()
            if isinstance(index, eqx.nn.StateIndex)
            for array in jax.tree_util.tree_leaves(self._state.get(index))
        }
        leaves, _ = jax.tree_util.tree_flatten_with_path(
            (self._model, self._state), is_leaf=_is_batch_norm
        )
        return {
            jax.tree_util.keystr(path): array_leaves.read(leaf)
            for path, leaf in leaves
            if array_leaves.is_array(leaf) and not (array_leaves.is_seed(leaf) or id(leaf) in own)
        }

    def replaced(
        self,
        changes: Mapping[str, BatchNormState],
        others: Mapping[str, NDArray[Any]] = MappingProxyType({}),
    ) -> Any:
        """A pair like this one, with other states for the layers of these names, and other arrays.

        Raises:
            ValueError: a state does not fit.
        """

        def renewed(path: Any, leaf: Any) -> Any:
            values = others.get(jax.tree_util.keystr(path))
            return leaf if values is None else array_leaves.make(values, leaf)

        # A new state in any case, since `set` invalidates the old one.
        whole, state = jax.tree_util.tree_map_with_path(
            renewed, (self._model, self._state), is_leaf=_is_batch_norm
        )
        new: dict[int, Any] = {}
        for current in self.states:
            if current.name in changes:
                layer = self._layers[current.name]
                fitted = fit(changes[current.name], current)
                new[id(layer)], state = _put(layer, state, fitted, current)
        model = jax.tree_util.tree_map(
            lambda node: new.get(id(node), node), whole, is_leaf=_is_batch_norm
        )
        return model, state


def _find(model: Any) -> Iterator[tuple[str, Any]]:
    leaves, _ = jax.tree_util.tree_flatten_with_path(model, is_leaf=_is_batch_norm)
    seen = set()
    for path, layer in leaves:
        if _is_batch_norm(layer) and id(layer) not in seen:
            seen.add(id(layer))
            yield jax.tree_util.keystr(path, simple=True, separator="."), layer


def _take(layer: Any, state: Any, name: str) -> BatchNormState:
    if layer.mode == "ema":
        mean, var = state.get(layer.ema_state_index)
        steps = None
    else:
        mean, var = state.get(layer.batch_state_index)
        steps = int(state.get(layer.batch_counter))
        if steps > 0:
            mean, var = (a / (1 - layer.momentum**steps) for a in (mean, var))
    return BatchNormState(
        name=name,
        kind="equinox.nn.BatchNorm",
        mean=flatten(mean),
        var=flatten(var),
        gamma=flatten(layer.weight),
        beta=flatten(layer.bias),
        variance="biased",
        eps=float(layer.eps),
        decay=float(layer.momentum),
        steps=steps,
        stored=np.dtype(mean.dtype).name,
    )


def _put(layer: Any, state: Any, fitted: BatchNormState, current: BatchNormState) -> Any:
    values = {name: getattr(fitted, name) for name in ("mean", "var", "gamma", "beta")}
    dtype = jnp.dtype(current.stored)
    cast = {name: None if a is None else jnp.asarray(a, dtype) for name, a in values.items()}
    owner = f"layer {current.name!r} ({current.kind})"
    check_finite_casts(owner, [(n, a, cast[n]) for n, a in values.items() if a is not None])
    moments = (cast["mean"], cast["var"])
    if layer.mode == "ema":
        state = state.set(layer.ema_state_index, moments)
        state = state.set(layer.ema_first_time_index, jnp.array(False))
    else:
        state = state.set(layer.batch_state_index, moments)
        state = state.set(layer.batch_counter, jnp.array(_SETTLED))
    new = object.__new__(type(layer))  # as Equinox's own unflattening does: fields are frozen
    for field in layer.__dataclass_fields__:
        object.__setattr__(new, field, getattr(layer, field))
    changes: dict[str, Any] = {"weight": cast["gamma"], "bias": cast["beta"]}
    changes |= {"eps": fitted.eps, "momentum": fitted.decay}
    for field, value in changes.items():
        if value is not None:
            object.__setattr__(new, field, value)
    return new, state


def _is_batch_norm(node: Any) -> bool:
    return isinstance(node, eqx.nn.BatchNorm)
