"""Batch norms in nested maps of arrays: flax linen's variables, nnx's pure dicts, Haiku's pair."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from batchnorm.tools.checkpoints.limits import shown
from batchnorm.tools.checkpoints.naming import Group, find_groups
from batchnorm.tools.checkpoints.source import Entry, Source
from batchnorm.tools.checkpoints.states import make_state
from batchnorm.tools.fitting import check_finite_casts, fit
from batchnorm.tools.state import BatchNormState

__all__ = ["Tree", "owns"]

_PAIR = ("params", "state")
# Haiku's averages count updates to correct the bias of the first ones. After so many there is none,
# as in statistics that come from elsewhere.
_SETTLED = 1 << 30

Path = tuple[Any, ...]


def owns(model: Any) -> bool:
    """True for a nested map, or Haiku's pair of them."""
    return isinstance(model, Mapping) or _is_pair(model)


class Tree:
    """The batch norms of nested maps.

    Args:
        model: variables of linen, a pure dict of nnx, or Haiku's `(params, state)`.
    """

    has_options: bool = False  # they are attributes of the modules, not arrays

    def __init__(self, model: Any) -> None:
        self._pair = _is_pair(model)
        self._tree = dict(zip(_PAIR, model, strict=True)) if self._pair else model
        self._leaves: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        self._visit(self._tree, ())
        entries = {
            name: Entry(np.shape(leaf), _type_of(leaf)) for name, leaf in self._leaves.items()
        }
        source = Source("tree", entries, self._load)
        self._groups, notes = find_groups(source)
        self.notes: Sequence[str] = notes
        self.states = [make_state(group, source) for group in self._groups]

    def replaced(self, changes: Mapping[str, BatchNormState]) -> Any:
        """A model like this one, with other states for the layers of these names.

        Raises:
            ValueError: a state does not fit; nothing is changed in any case.
        """
        new = dict(self._leaves)
        for group, current in zip(self._groups, self.states, strict=True):
            if group.name in changes:
                self._write(group, fit(changes[group.name], current), new)
        tree = self._rebuild(self._tree, (), {self._paths[name]: a for name, a in new.items()})
        return tuple(tree[part] for part in _PAIR) if self._pair else tree

    def _write(self, group: Group, state: BatchNormState, new: dict[str, Any]) -> None:
        owner = f"layer {group.name!r} ({group.family})"
        values: dict[str, Any] = {
            "gamma": state.gamma,
            "beta": state.beta,
            "mean": state.mean,
            "var": state.var,
            "decay": state.decay,
        }
        if state.renorm is not None:
            values |= vars(state.renorm)
        for role, name in group.roles.items():
            value = values.get(role)
            if value is None:
                continue
            old = self._leaves[name]
            if role == "decay":  # stacked layers have one each
                value = np.full(np.shape(old), value)
            cast = jnp.asarray(value, old.dtype).reshape(np.shape(old))
            check_finite_casts(owner, [(role, np.asarray(value), cast)])
            new[name] = cast
            if group.family == "haiku" and role in ("mean", "var"):
                stem = name.removesuffix("average")
                counter = self._leaves[f"{stem}counter"]
                new[f"{stem}hidden"] = cast
                new[f"{stem}counter"] = jnp.full_like(counter, _SETTLED)

    def _visit(self, node: Any, path: Path) -> None:
        if isinstance(node, Mapping):
            for key, child in node.items():
                self._visit(child, (*path, key))
        elif hasattr(node, "dtype") and hasattr(node, "shape"):
            name = "/".join(map(str, path))
            if name in self._leaves:
                raise ValueError(
                    f"transfer: a tree's keys, joined by slashes, must name one array each; got "
                    f"{shown(name)} for {self._paths[name]} and {path}. Rename one of them."
                )
            self._leaves[name], self._paths[name] = node, path

    def _rebuild(self, node: Any, path: Path, leaves: Mapping[Path, Any]) -> Any:
        if not isinstance(node, Mapping):
            return leaves.get(path, node)
        return type(node)({k: self._rebuild(v, (*path, k), leaves) for k, v in node.items()})  # type: ignore[call-arg]

    def _load(self, name: str) -> NDArray[Any]:
        leaf = np.asarray(self._leaves[name])
        return leaf.astype(np.float32) if leaf.dtype.name in ("bfloat16", "float16") else leaf


def _type_of(leaf: Any) -> str:
    return str(np.dtype(leaf.dtype).name)


def _is_pair(model: Any) -> bool:
    return (
        isinstance(model, tuple) and len(model) == 2 and all(isinstance(m, Mapping) for m in model)
    )
