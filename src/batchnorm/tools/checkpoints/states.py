"""A batch norm's state from its arrays in a checkpoint."""

from __future__ import annotations

from typing import Any

from numpy.typing import NDArray

from batchnorm.tools.arrays import flatten, odd_shape
from batchnorm.tools.checkpoints.naming import Group
from batchnorm.tools.checkpoints.source import Source
from batchnorm.tools.state import BatchNormState, RenormState

__all__ = ["make_state"]

_RENORM = ("moving_stddev", "renorm_mean", "renorm_stddev")


def make_state(group: Group, source: Source) -> BatchNormState:
    """Load a group's arrays.

    Raises:
        ValueError: an array that is not floating.
    """
    arrays = {role: source.load(name) for role, name in group.roles.items()}
    stored = source.entries[group.roles.get("packed", group.roles.get("mean", ""))].dtype
    if "packed" in arrays:
        arrays["mean"], arrays["var"] = arrays.pop("packed")
    renorm = None
    if all(name in arrays for name in _RENORM):
        renorm = RenormState(*(_floats(arrays[name], group) for name in _RENORM))
    found: dict[str, Any] = {
        role: _floats(arrays[role], group) if role in arrays else None
        for role in ("mean", "var", "gamma", "beta")
    }
    eps = decay = None
    if group.config is not None:
        eps, decay = group.config.eps, group.config.decay
    if "decay" in arrays:
        decay = _scalar(arrays["decay"])
    torch = group.family == "torch"
    return BatchNormState(
        name=group.name,
        kind=group.family,
        variance="unbiased" if torch and renorm is None else "biased",
        eps=eps,
        decay=decay,
        steps=int(arrays["steps"].reshape(-1)[0]) if "steps" in arrays else None,
        renorm=renorm,
        shape=odd_shape(arrays["mean"].shape),
        stored=stored,
        **found,
    )


def _floats(array: NDArray[Any], group: Group) -> NDArray[Any]:
    if array.dtype.kind != "f":
        raise ValueError(f"{group.name!r:.80} has statistics of type {array.dtype.name}.")
    flat = flatten(array)
    assert flat is not None
    return flat


def _scalar(array: NDArray[Any]) -> float | None:
    """A number between 0 and 1; float32 as the shortest decimal that means the same.

    Stacked layers have one each; where they differ there is no number for all.
    """
    if array.size == 0 or (array != array.flat[0]).any():
        return None
    value = float(str(array.reshape(-1)[0]))
    return value if 0.0 <= value <= 1.0 else None
