"""The arrays of one batch norm in a file, and a check that none is missing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from string import digits

from batchnorm.tools.checkpoints.limits import shown
from batchnorm.tools.checkpoints.source import LayerConfig, Source

__all__ = ["STATISTICS", "Group", "Path", "last_part", "natural", "summary", "why_incomplete"]

STATISTICS = ("mean", "var", "moving_stddev", "renorm_mean", "renorm_stddev")

Path = tuple[str, ...]


@dataclass
class Group:
    """The arrays of one batch norm.

    Args:
        name: path of the layer, as its library spells it.
        family: "torch", "flax.linen", "flax.nnx", "keras" or "haiku".
        roles: names of entries by field of the canonical state; "packed" for mean and variance
            in one array.
        config: options from a Keras file's config.
        place: the layer's path as it is in the file, which no other layer has.
    """

    name: str
    family: str
    roles: dict[str, str] = field(default_factory=dict)
    config: LayerConfig | None = None
    place: str = ""


def why_incomplete(group: Group, source: Source) -> str | None:
    """The reason why a group cannot be read; None if it has statistics, of shapes that agree."""
    roles, entries = group.roles, source.entries
    for name in roles.values():
        if name in source.skipped:
            return f"{shown(name)} is {source.skipped[name]}"
    if "packed" in roles:
        shape: tuple[int, ...] = entries[roles["packed"]].shape[1:]
        if entries[roles["packed"]].shape != (2, *shape):
            return f"its statistics have shape {entries[roles['packed']].shape}"
    elif "mean" in roles and "var" in roles:
        shape = entries[roles["mean"]].shape
    else:
        return "it lacks its mean or its variance"
    shapes = {r: entries[roles[r]].shape for r in (*STATISTICS, "gamma", "beta") if r in roles}
    if not shape or any(found != shape for found in shapes.values()):
        return "its arrays have shapes " + ", ".join(f"{r} {s}" for r, s in shapes.items())
    return None


def summary(what: str, names: Sequence[str]) -> list[str]:
    """One note on several names, or none."""
    some = ", ".join(map(shown, names[:3]))
    return [f"{len(names)} {what}: {some}."] if names else []


def last_part(name: str) -> str:
    """A name without the layers around it."""
    return name.rpartition("/")[2]


def natural(path: Iterable[str]) -> list[tuple[str, int]]:
    """A key that sorts `bn_2` before `bn_10`."""
    stems = [(part, part.rstrip(digits)) for part in path]
    return [(stem, int(part[len(stem) :][:18] or -1)) for part, stem in stems]
