"""All arrays of a checkpoint, and the texts that its format keeps beside them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

import numpy as np

from batchnorm.tools.checkpoints.groups import Group
from batchnorm.tools.checkpoints.limits import Budget, shown
from batchnorm.tools.checkpoints.source import Contents, Source, loaded_type
from batchnorm.tools.state import BatchNormState

__all__ = ["RENORM", "ROLES", "load_contents"]

RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")
# The arrays of a layer that its state holds.
ROLES = ("gamma", "beta", "mean", "var", "packed", "steps", *RENORM)

# Maps of torch and flax beside the weights; callbacks of Lightning hold the best loss, as a tensor.
_OPTIMIZER = re.compile(r"optim|opt(_|$)|(callbacks|loops|lr_schedulers)$", re.IGNORECASE)
_KERAS_OPTIMIZER = ("optimizer", "optimizer_weights")
_MARKS = {"torch": ".", "msgpack": "/"}
_REMEDY = "leave everything=True (--all) out, which then handles the batch norms alone"


def load_contents(
    source: Source, groups: Sequence[Group], layers: Sequence[BatchNormState], budget: Budget
) -> tuple[Contents, list[str]]:
    """Load what `make_state` has not, within the same budget.

    Args:
        source: of the arrays.
        groups, layers: the batch norms, one of each for a layer.
        budget: of the file.

    Returns:
        The contents, and notes on what is left out of them.

    Raises:
        CheckpointError: an array of another type, or at a place that cannot be written again.
    """
    pairs = zip(groups, layers, strict=True)
    roles = [_roles(group, state, source, budget) for group, state in pairs]
    used = {name for names in roles for name in names.values()}
    names = dict.fromkeys([*source.entries, *source.skipped])
    left = {name: None for name in names if _is_an_optimizers(name, source)}
    for name, what in source.skipped.items():
        if name not in left:
            raise budget.error(f"{shown(name)} is {what}, which cannot be averaged; {_REMEDY}.")
    for name in used & left.keys():
        raise budget.error(f"{shown(name)} of a batch norm lies among an optimizer's arrays.")
    kept = [name for name in source.entries if name not in left]
    paths = {name: _texts_of(name, source, budget) for name in kept if name in source.paths}
    others = {}
    for name in kept:
        if name not in used:
            dtype = loaded_type(source.entries[name].dtype)
            array = np.ascontiguousarray(source.load(name), dtype)
            others[name] = array.reshape(source.entries[name].shape)
    details = source.details()
    notes = details.omitted.notes()
    if left:
        what = "array of an optimizer or callback is"
        if len(left) > 1:
            what = "arrays of optimizers or callbacks are"
        some = ", ".join(map(shown, [*left][:3]))
        notes.insert(0, f"{len(left):,} {what} left out: {some}.")
    texts = {key: text for key, text in details.texts.items() if not _is_in_optimizer(key[0])}
    return Contents(roles, others, paths, texts), notes


def _is_an_optimizers(name: str, source: Source) -> bool:
    """True for an array of an optimizer's state, which has a map of its own beside the weights."""
    if source.format == "hdf5":
        return _is_in_optimizer(name)
    path = source.paths.get(name, ())
    return len(path) > 1 and bool(_OPTIMIZER.match(str(path[0])))


def _is_in_optimizer(place: str) -> bool:
    return place.partition("/")[0] in _KERAS_OPTIMIZER


def _roles(group: Group, state: BatchNormState, source: Source, budget: Budget) -> dict[str, str]:
    """The arrays that the state holds; others of a layer, as a momentum, are kept by themselves."""
    roles = {role: name for role, name in group.roles.items() if role in ROLES}
    if "packed" in roles:
        roles = {role: name for role, name in roles.items() if role not in ("mean", "var")}
    if state.renorm is None and any(role in RENORM for role in roles):
        raise budget.error(
            f"{shown(group.name)} has but a part of renormalization's statistics, and they cannot "
            f"be merged; {_REMEDY}."
        )
    if "steps" in roles and math.prod(source.entries[roles["steps"]].shape) != 1:
        del roles["steps"]  # of stacked layers
    return roles


def _texts_of(name: str, source: Source, budget: Budget) -> tuple[str, ...]:
    """The keys that lead to an array, if they can be written as they are."""
    path = source.paths[name]
    keys = tuple(key for key in path if isinstance(key, str))
    if len(keys) < len(path) or _MARKS[source.format].join(keys) != name:
        raise budget.error(
            f"{shown(name)} lies in a list, or under a key that is a number or empty, which "
            f"cannot be written again; {_REMEDY}."
        )
    return keys
