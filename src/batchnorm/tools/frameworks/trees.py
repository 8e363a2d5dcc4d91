"""Batch norms in nested maps of arrays, in which torch, linen, nnx and Haiku keep states."""

from __future__ import annotations

import copy
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from batchnorm.core.errors import ArgumentValueError
from batchnorm.tools.checkpoints.limits import shown
from batchnorm.tools.checkpoints.naming import Group, find_groups
from batchnorm.tools.checkpoints.source import Entry, Source
from batchnorm.tools.checkpoints.states import make_state
from batchnorm.tools.fitting import check_finite_casts, fit
from batchnorm.tools.frameworks.adapter import Leaves
from batchnorm.tools.state import BatchNormState

__all__ = ["Tree", "leaves_in", "owns"]

_PAIR = ("params", "state")
# Haiku's averages count updates to correct the bias of the first ones. After so many there is none,
# as in statistics that come from elsewhere.
_SETTLED = 1 << 30

Path = tuple[Any, ...]


def owns(model: Any) -> bool:
    """True for a nested map, or Haiku's pair of them."""
    return isinstance(model, Mapping) or _is_pair(model)


def leaves_in(model: Any) -> Iterator[Any]:
    """The values in nested maps, or in Haiku's pair of them, that are no maps."""
    children = model.values() if isinstance(model, Mapping) else model
    for child in children:
        if isinstance(child, Mapping):
            yield from leaves_in(child)
        else:
            yield child


class Tree:
    """The batch norms of nested maps.

    Args:
        model: a state dict of torch, variables of linen, a state or pure dict of nnx, or Haiku's
            `(params, state)`.
        leaves: reads and makes its arrays.
    """

    has_options: bool = False  # they are attributes of the modules, not arrays

    def __init__(self, model: Any, leaves: Leaves) -> None:
        self._arrays = leaves
        self._pair = _is_pair(model)
        self._tree = dict(zip(_PAIR, model, strict=True)) if self._pair else model
        self._leaves: dict[str, Any] = {}
        self._paths: dict[str, Path] = {}
        self._visit(self._tree, ())
        entries = {
            name: Entry(tuple(leaf.shape), leaves.type_of(leaf))
            for name, leaf in self._leaves.items()
        }
        source = Source("tree", entries, self._load)
        self._groups, notes = find_groups(source)
        self.notes: Sequence[str] = notes
        self.states = [make_state(group, source) for group in self._groups]

    def others(self) -> Mapping[str, NDArray[Any]]:
        """The arrays of numbers that belong to no batch norm."""
        taken = {name for group in self._groups for name in group.roles.values()}
        stems = tuple(
            name.removesuffix("average")
            for group in self._groups
            if group.family == "haiku"
            for role, name in group.roles.items()
            if role in ("mean", "var")
        )
        return {
            name: self._arrays.read(leaf)
            for name, leaf in self._leaves.items()
            if not (name in taken or name.startswith(stems) or self._arrays.is_seed(leaf))
        }

    def replaced(
        self,
        changes: Mapping[str, BatchNormState],
        others: Mapping[str, NDArray[Any]] = MappingProxyType({}),
    ) -> Any:
        """A model like this one, with other states for the layers of these names, and other arrays.

        Raises:
            ValueError: a state does not fit; nothing is changed in any case.
        """
        new = {name: self._arrays.copy(leaf) for name, leaf in self._leaves.items()}
        for name, values in others.items():
            new[name] = self._arrays.make(values, self._leaves[name])
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
            # Of flax's families only layers that debias have one.
            "steps": state.debiasing if group.family.startswith("flax") else state.steps,
        }
        if state.renorm is not None:
            values |= vars(state.renorm)
        for role, name in group.roles.items():
            value = values.get(role)
            if value is None:
                continue
            old = self._leaves[name]
            if role in ("decay", "steps"):  # stacked layers have one each
                value = np.full(tuple(old.shape), value)
            new[name] = self._make(owner, role, value, old)
            if group.family == "haiku" and role in ("mean", "var"):
                stem = name.removesuffix("average")
                counter = self._leaves[f"{stem}counter"]
                new[f"{stem}hidden"] = new[name]
                settled = np.full(np.shape(counter), _SETTLED)
                new[f"{stem}counter"] = self._arrays.make(settled, counter)

    def _make(self, owner: str, role: str, value: NDArray[Any], old: Any) -> Any:
        new = self._arrays.make(value, old)
        found = self._arrays.read(new)
        if role == "steps" and not np.array_equal(found, value):
            raise ValueError(
                f"{owner}: the counter of steps overflows its type, {self._arrays.type_of(old)}; "
                f"got {value.flat[0]}."
            )
        check_finite_casts(owner, [(role, np.asarray(value), found)])
        return new

    def _visit(self, node: Any, path: Path) -> None:
        if isinstance(node, Mapping):
            for key, child in node.items():
                self._visit(child, (*path, key))
        elif self._arrays.is_array(node):
            name = "/".join(map(str, path))
            if name in self._leaves:
                raise ArgumentValueError(
                    f"a tree's keys, joined by slashes, must name one array each; got "
                    f"{shown(name)} for {self._paths[name]} and {path}. Rename one of them."
                )
            self._leaves[name], self._paths[name] = node, path

    def _rebuild(self, node: Any, path: Path, leaves: Mapping[Path, Any]) -> Any:
        if not isinstance(node, Mapping):
            return leaves.get(path, node)
        new = type(node)({k: self._rebuild(v, (*path, k), leaves) for k, v in node.items()})  # type: ignore[call-arg]
        if isinstance(node, OrderedDict):  # torch keeps the versions of modules beside the tensors
            vars(new).update(copy.deepcopy(vars(node)))
        return new

    def _load(self, name: str) -> NDArray[Any]:
        return self._arrays.read(self._leaves[name])


def _is_pair(model: Any) -> bool:
    return (
        isinstance(model, tuple) and len(model) == 2 and all(isinstance(m, Mapping) for m in model)
    )
