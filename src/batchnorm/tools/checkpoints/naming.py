"""Recognizing batch norms by the names of their arrays, whichever library chose them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

from batchnorm.tools.checkpoints.source import Entry, LayerConfig, Source

__all__ = ["Group", "find_groups", "natural"]

# What each library calls what; roles are the fields of the canonical state.
_TORCH = {
    "weight": "gamma",
    "bias": "beta",
    "running_mean": "mean",
    "running_var": "var",
    "running_stddev": "moving_stddev",
    "num_batches_tracked": "steps",
}
_FLAX = {
    "scale": "gamma",
    "bias": "beta",
    "mean": "mean",
    "var": "var",
    "stddev": "moving_stddev",
    "momentum": "decay",
}
_KERAS = {
    "gamma": "gamma",
    "beta": "beta",
    "moving_mean": "mean",
    "moving_variance": "var",
    "moving_stats": "packed",
    "moving_stddev": "moving_stddev",
}
_HAIKU = {"scale": "gamma", "offset": "beta"}
_RENORM = {"renorm_mean": "renorm_mean", "renorm_stddev": "renorm_stddev"}
_FAMILIES = {
    "torch": _TORCH | _RENORM,
    "flax": _FLAX | _RENORM,
    "keras": _KERAS | _RENORM,
    "haiku": _HAIKU,
}
_COLLECTIONS = ("params", "batch_stats", "state")
_WRAPPERS = ("state_dict", "model_state_dict", "model_weights")
_EMA = {"mean_ema": "mean", "var_ema": "var"}
_LOOKS_LIKE_ONE = re.compile(r"batch_?norm|(^|[_/])bn(\d|_|/|$)", re.IGNORECASE)

_STATISTICS = ("mean", "var", "moving_stddev", "renorm_mean", "renorm_stddev")

Path = tuple[str, ...]


@dataclass
class Group:
    """The arrays of one batch norm.

    Args:
        name: path of the layer, as its library spells it.
        family: "torch", "flax.linen", "flax.nnx", "keras" or "haiku".
        roles: names of entries by field of the canonical state; "packed" for mean and variance
            in one array.
        config: what a Keras file says beside the arrays.
    """

    name: str
    family: str
    roles: dict[str, str] = field(default_factory=dict)
    config: LayerConfig | None = None


def find_groups(source: Source) -> tuple[list[Group], list[str]]:
    """Every batch norm among a checkpoint's arrays.

    Returns:
        The groups in the order of the file, of a Keras model's config where there is one, and
        notes about arrays that look like a batch norm's but cannot be told apart.
    """
    numbered = any(_numbered(_split(name)) for name in source.entries)
    notes: list[str] = []
    groups = list(_find_numbered(source, notes)) if numbered else _find_named(source.entries)
    for group in groups:
        if group.config is None and group.family == "keras":
            group.config = _find_config(group.name, source.configs)
    if source.configs:
        order = {config.name: i for i, config in enumerate(source.configs)}
        groups.sort(key=lambda g: order.get(g.config.name, len(order)) if g.config else len(order))
    return groups, notes


def _find_named(entries: Mapping[str, Entry]) -> list[Group]:
    found: dict[tuple[str, Path], Group] = {}
    linen = any("batch_stats" in _split(name) for name in entries)
    for name in entries:
        *parent, leaf = _split(name)
        leaf = leaf.removesuffix(":0")
        for family, roles in _FAMILIES.items():
            role, path = roles.get(leaf), tuple(parent)
            if family in ("flax", "haiku"):
                path = _without_collection(path)
            if family == "haiku" and len(path) >= 2 and path[-2] == "~" and leaf == "average":
                role, path = _EMA.get(path[-1]), path[:-2]
            if role is not None:
                shown = family if family != "flax" else "flax.linen" if linen else "flax.nnx"
                group = found.setdefault((family, path), Group(_join(path, family), shown))
                group.roles.setdefault(role, name)
    complete = [g for g in found.values() if _is_complete(g, entries)]
    return _unwrap(complete)


def _is_complete(group: Group, entries: Mapping[str, Entry]) -> bool:
    """Whether it has statistics, and arrays that agree in shape."""
    roles = group.roles
    if "packed" in roles:
        shape: tuple[int, ...] = entries[roles["packed"]].shape[1:]
        if entries[roles["packed"]].shape != (2, *shape):
            return False
    elif "mean" in roles and "var" in roles:
        shape = entries[roles["mean"]].shape
    else:
        return False
    arrays = (entries[roles[r]].shape for r in (*_STATISTICS, "gamma", "beta") if r in roles)
    return len(shape) > 0 and all(found == shape for found in arrays)


def _find_numbered(source: Source, notes: list[str]) -> Iterator[Group]:
    """Keras 3 numbers a layer's weights: `…/batch_normalization_3/vars/0`."""
    members: dict[Path, list[str]] = {}
    for name in source.entries:
        parts = _split(name)
        if _numbered(parts) and parts[0] != "optimizer":
            members.setdefault(tuple(parts[:-1]), []).append(name)
    for parent in sorted(members, key=natural):
        name = _keras_name(parent, source.labels)
        config = _find_config(name, source.configs)
        looks_like_one = _LOOKS_LIKE_ONE.search("/".join([*parent[-2:-1], name]))
        if config is None and (source.configs or not looks_like_one):
            continue
        names = sorted(members[parent], key=lambda n: int(_split(n)[-1]))
        roles = _number_roles([source.entries[n].shape for n in names], config)
        group = Group(name, "keras", dict(zip(roles, names, strict=False)), config)
        if roles and _is_complete(group, source.entries):
            yield group
        else:
            shapes = [source.entries[n].shape for n in names]
            notes.append(
                f"{name}: it is unclear which of its weights is which, shapes {shapes}. A .keras "
                "file says so; weights alone do not."
            )


def _number_roles(shapes: list[tuple[int, ...]], config: LayerConfig | None) -> list[str]:
    """Roles of a layer's weights in Keras's order; empty if that cannot be told."""
    channels = shapes[0] if len(shapes) > 1 else shapes[-1][1:]
    packed = shapes[-1] == (2, *channels)
    statistics = (["packed"],) if packed else (list(_STATISTICS[:2]), list(_STATISTICS))
    choices = [["gamma", "beta"], []]
    if config is not None:
        choices = [["gamma"] * config.scale + ["beta"] * config.center]
    fitting = [p + s for p in choices for s in statistics if len(p) + len(s) == len(shapes)]
    return fitting[0] if len(fitting) == 1 else []


def _keras_name(parent: Path, labels: Mapping[str, str]) -> str:
    """Names of the layers around a group of weights, where the file has them."""
    paths = ("/".join([*parent[:i], "vars"]) for i in range(1, len(parent)))
    named = [labels[path] for path in paths if path in labels]
    return "/".join(named) or "/".join(part for part in parent[:-1] if part != "layers")


def _find_config(name: str, configs: Iterable[LayerConfig]) -> LayerConfig | None:
    last = name.rpartition("/")[2]
    return next((config for config in configs if config.name == last), None)


def _split(name: str) -> list[str]:
    return name.split("/" if "/" in name else ".")


def _join(path: Path, family: str) -> str:
    if family == "keras":  # `bn/bn/gamma:0` in files of Keras 2
        path = tuple(p for i, p in enumerate(path) if i == 0 or p != path[i - 1])
        return "/".join(path)
    return ("." if family == "torch" else "/").join(path)


def _without_collection(path: Path) -> Path:
    """A path without the collection that linen and Haiku file it under."""
    for i, part in enumerate(path):
        if part in _COLLECTIONS:
            return path[:i] + path[i + 1 :]
    return path


def _unwrap(groups: list[Group]) -> list[Group]:
    """Names without `state_dict.` and the like, if all begin so."""
    for wrapper in _WRAPPERS:
        prefixes = tuple(wrapper + mark for mark in "./")
        if groups and all(g.name.startswith(prefixes) for g in groups):
            for group in groups:
                group.name = group.name[len(wrapper) + 1 :]
    return groups


def _numbered(parts: list[str]) -> bool:
    return len(parts) > 1 and parts[-2] == "vars" and parts[-1].isdecimal()


def natural(path: Iterable[str]) -> list[tuple[str, int]]:
    """A key that sorts `bn_2` before `bn_10`."""
    pieces = (re.fullmatch(r"(.*?)(\d*)", part, re.DOTALL) for part in path)
    return [(m[1], int(m[2][:18] or -1)) for m in pieces if m is not None]
