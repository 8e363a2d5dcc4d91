"""The layers of several models that are the same one, and what keeps them from merging."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

import numpy as np

from batchnorm.core.errors import ArgumentValueError
from batchnorm.tools.state import BatchNormState, FloatArray
from batchnorm.tools.text import list_names, plain, plural, printable

__all__ = ["align", "check_same", "check_values", "numberless", "owner_of"]

_NUMBER = re.compile(r"_\d+(?=/|$)")  # by which Keras tells layers of one class apart

_KIND = "the kind of variance"
_REMEDIES = {_KIND: " Pass counts= (--counts), which convert it."}

States = Sequence[BatchNormState]


def align(models: Sequence[States]) -> list[list[BatchNormState]]:
    """For each layer of the first model its states in all models.

    Args:
        models: at least two, each with a batch norm.

    Raises:
        ArgumentValueError: models have other layers.
    """
    first = models[0]
    places = [_places(first, model, number) for number, model in enumerate(models)]
    return [[m[p[i]] for m, p in zip(models, places, strict=True)] for i in range(len(first))]


def _places(first: States, model: States, number: int) -> list[int]:
    """For each of the first model's layers, its position in another model."""
    wanted, found = ([plain(state.name) for state in states] for states in (first, model))
    if len(set(found)) == len(found) and sorted(wanted) == sorted(found):
        where = {name: i for i, name in enumerate(found)}
        return [where[name] for name in wanted]
    if all("keras" in state.kind for state in (*first, *model)):
        ours, theirs = ([numberless(state.name) for state in states] for states in (first, model))
        if ours == theirs:
            return list(range(len(first)))
    missing = [s.name for s in first if plain(s.name) not in found]
    surplus = [s.name for s in model if plain(s.name) not in wanted]
    raise ArgumentValueError(
        f"all models must have the same batch norms; model {number} has "
        f"{plural(len(model), 'batch norm')}, the first {len(first)}"
        + (f"; it lacks {list_names(missing, 3)}" if missing else "")
        + (f"; the first lacks {list_names(surplus, 3)}" if surplus else "")
        + "."
    )


def numberless(name: str) -> str:
    """A name without the numbers that Keras counts up from model to model."""
    return _NUMBER.sub("", name)


def check_same(states: States, counted: bool) -> None:
    """Raise unless the states of a layer have the same options and arrays.

    Args:
        states: one for each model.
        counted: counts are known, so that biased and unbiased variances may meet.
    """
    first = states[0]
    for number, state in enumerate(states):
        for what, ours, theirs in _properties(first, state, counted):
            if ours != theirs:
                raise ArgumentValueError(
                    f"{owner_of(first)}: {what} must be the same in all models; model {number} "
                    f"has {theirs}, the first {ours}.{_REMEDIES.get(what, '')}"
                )


def _properties(
    first: BatchNormState, state: BatchNormState, counted: bool
) -> Iterator[tuple[str, object, object]]:
    """Properties that the states of a layer must share, in two of them."""
    yield "the shape", first.shape or (first.channels,), state.shape or (state.channels,)
    if None not in (first.eps, state.eps):
        yield "eps", first.eps, state.eps
    kinds = (first.variance, state.variance)
    if None not in kinds and first.var is not None and not counted:
        yield _KIND, first.variance, state.variance
    for name in ("mean", "var", "gamma", "beta"):
        yield name, _presence(getattr(first, name)), _presence(getattr(state, name))
    yield "renormalization's statistics", _presence(first.renorm), _presence(state.renorm)


def _presence(value: object) -> str:
    return "none" if value is None else "some"


def check_values(states: States, counts: FloatArray | None) -> None:
    """Raise for values that are not finite, and for variances that are negative.

    Args:
        states: one for each model.
        counts: of the models; None where all weigh the same. Models that weigh nothing may have
            any values.
    """
    for number, state in enumerate(states):
        if counts is not None and counts[number] == 0:
            continue
        arrays = {name: getattr(state, name) for name in ("mean", "var", "gamma", "beta")}
        if state.renorm is not None:
            arrays |= vars(state.renorm)
        for name, array in arrays.items():
            if array is None:
                continue
            _check(state, number, name, array[~np.isfinite(array)], "finite")
            if name in ("var", "moving_stddev", "renorm_stddev"):
                _check(state, number, name, array[array < 0], "at least 0")


def _check(state: BatchNormState, number: int, name: str, wrong: FloatArray, rule: str) -> None:
    if wrong.size:
        raise ArgumentValueError(
            f"model {number}, {owner_of(state)}: {name} must be {rule} in every channel; got "
            f"{wrong[0]:g} in {wrong.size} of {state.channels}."
        )


def owner_of(state: BatchNormState) -> str:
    """A layer, in a message."""
    return f"layer {printable(state.name, 60)!r} ({state.kind})"
