"""Batch norms of Keras 3's weights files, whose arrays have numbers for names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping

from batchnorm.tools.checkpoints.groups import (
    STATISTICS,
    Group,
    Path,
    last_part,
    natural,
    why_incomplete,
)
from batchnorm.tools.checkpoints.limits import shown
from batchnorm.tools.checkpoints.source import LayerConfig, Source

__all__ = ["find_numbered", "is_numbered"]

_LOOKS_LIKE_ONE = re.compile(r"batch_?norm|(^|[_/])bn(\d|_|/|$)", re.IGNORECASE)


def find_numbered(
    source: Source, numbered: Iterable[str], configs: Mapping[str, LayerConfig], known: set[str]
) -> tuple[list[Group], list[str]]:
    """Batch norms, and notes on other layers, of weights like `…/batch_normalization_3/vars/0`.

    Args:
        source: of the arrays.
        numbered: names of arrays that are numbers.
        configs: by name of the layer.
        known: gets the names of the layers that are found.
    """
    members: dict[Path, list[str]] = {}
    for name in numbered:
        parts = tuple(name.split("/"))
        if parts[0] != "optimizer":
            members.setdefault(parts[:-1], []).append(name)
    groups, notes = [], []
    for parent in sorted(members, key=natural):
        name = _keras_name(parent, source.labels)
        config = configs.get(last_part(name))
        known.add(last_part(name))
        names = sorted(members[parent], key=lambda n: natural([last_part(n)]))
        shapes = [source.entries[n].shape for n in names]
        looks_like_one = _LOOKS_LIKE_ONE.search("/".join([*parent[-2:-1], name]))
        if config is None and (source.configs or not looks_like_one):
            if not source.configs and len(shapes) == 4 and len(set(shapes)) == 1 == len(shapes[0]):
                notes.append(f"{shown(name)} may be a batch norm by its shapes, not by its name.")
            continue
        roles = _number_roles(shapes, config)
        group = Group(name, "keras", dict(zip(roles, names, strict=False)), config)
        group.place = "/".join(parent)
        if roles and why_incomplete(group, source) is None:
            groups.append(group)
        else:
            who = name if len(name) < 80 else shown(name)
            notes.append(
                f"{who}: its weights have shapes {shapes[:8]}, which do not tell which is which; a "
                ".keras file does."
            )
    return groups, notes


def _number_roles(shapes: list[tuple[int, ...]], config: LayerConfig | None) -> list[str]:
    """Roles of a layer's weights in Keras's order; empty if they are ambiguous."""
    channels = shapes[0] if len(shapes) > 1 else shapes[-1][1:]
    packed = shapes[-1] == (2, *channels)
    statistics = (["packed"],) if packed else (list(STATISTICS[:2]), list(STATISTICS))
    choices = [["gamma", "beta"], []]
    if config is not None:
        choices = [["gamma"] * config.scale + ["beta"] * config.center]
    fitting = [p + s for p in choices for s in statistics if len(p) + len(s) == len(shapes)]
    return fitting[0] if len(fitting) == 1 else []


def _keras_name(parent: Path, labels: Mapping[str, str]) -> str:
    """Names of the layers around a group of weights, where the file has them."""
    paths = ("/".join([*parent[:i], "vars"]) for i in range(1, len(parent)) if labels)
    named = [labels[path] for path in paths if path in labels]
    return "/".join(named) or "/".join(part for part in parent[:-1] if part != "layers")


def is_numbered(name: str) -> bool:
    """True if an array's name is a number among a layer's weights."""
    parts = name.rsplit("/", 2)[-2:]
    return len(parts) == 2 and parts[0] == "vars" and parts[1].isdecimal()
