"""Recognizing batch norms by the names of their arrays, whichever library chose them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from string import digits

from batchnorm.tools.checkpoints.limits import MOST_NOTES, one_line, shown
from batchnorm.tools.checkpoints.source import LayerConfig, Source

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
_MERGED = ("flax", "haiku")  # a layer's arrays are in two collections
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
        place: the layer's path as it is in the file, which no other layer has.
    """

    name: str
    family: str
    roles: dict[str, str] = field(default_factory=dict)
    config: LayerConfig | None = None
    place: str = ""


def find_groups(source: Source) -> tuple[list[Group], list[str]]:
    """Every batch norm among a checkpoint's arrays.

    Returns:
        The groups in the order of the file, of a Keras model's config where there is one, and
        notes about what looks like a batch norm but is none that can be read, or was left out.
    """
    configs: dict[str, LayerConfig] = {}
    for config in source.configs:
        configs.setdefault(config.name, config)
    numbered = {name for name in source.entries if _numbered(name)}
    groups, notes = _find_numbered(source, numbered, configs)
    named, doubtful = _find_named([n for n in source.entries if n not in numbered], source)
    _unwrap(named)
    for group in named:
        if group.family == "keras":
            group.config = configs.get(_last(group.name))
    groups += named
    _make_unique(groups)
    if configs:
        order = {name: i for i, name in enumerate(configs)}
        groups.sort(key=lambda g: order.get(g.config.name, len(order)) if g.config else len(order))
    known = {group.config.name for group in groups if group.config is not None}
    missing = [name for name in configs if name not in known]
    notes += _summary("batch norms of the config have no weights here", missing)
    notes += [*doubtful, *source.notes]
    if len(notes) > MOST_NOTES:
        notes[MOST_NOTES:] = [f"{len(notes) - MOST_NOTES} more notes like these are left out."]
    return groups, [one_line(note) for note in notes]


def _find_named(names: Iterable[str], source: Source) -> tuple[list[Group], list[str]]:
    """Batch norms by what their arrays are called."""
    found: dict[tuple[str, str, Path], dict[Path, dict[str, str]]] = {}
    doubles = []
    for name in [*names, *source.skipped]:
        # The last mark of a name is its library's; others may be in names of layers.
        mark = "/" if name.rfind("/") > name.rfind(".") else "."
        *parent, leaf = name.split(mark)
        for family in _FAMILIES:
            role, path = _role(family, tuple(parent), leaf.removesuffix(":0"))
            if role is not None:
                base = _without_collection(path) if family in _MERGED else path
                roles = found.setdefault((family, mark, base), {}).setdefault(path, {})
                if roles.setdefault(role, name) != name:
                    doubles.append(name)
    notes = _summary("arrays have the place of another in their layer", doubles)
    linen = any("batch_stats" in path for parts in found.values() for path in parts)
    groups = []
    for (family, mark, base), parts in found.items():
        for path, roles in _merge(base, parts):
            shown_family = family if family != "flax" else "flax.linen" if linen else "flax.nnx"
            group = Group(_join(path, family), shown_family, roles, place=mark.join(path))
            reason = _why_incomplete(group, source)
            if reason is None:
                groups.append(group)
            elif _is_distinctive(group):
                notes.append(f"{shown(group.name)} is no batch norm that can be read: {reason}.")
    return groups, notes


def _role(family: str, path: Path, leaf: str) -> tuple[str | None, Path]:
    """The role of an array in its layer, and the layer's path."""
    if family == "haiku" and leaf == "average" and len(path) >= 2 and path[-2] == "~":
        return _EMA.get(path[-1]), path[:-2]
    return _FAMILIES[family].get(leaf), path


def _merge(
    base: Path, parts: Mapping[Path, dict[str, str]]
) -> Iterable[tuple[Path, dict[str, str]]]:
    """One layer of parts in several collections; several layers where parts have a role twice."""
    merged = {role: name for roles in parts.values() for role, name in roles.items()}
    apart = len(merged) < sum(map(len, parts.values()))
    return parts.items() if apart else [(base, merged)]


def _why_incomplete(group: Group, source: Source) -> str | None:
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
    shapes = {r: entries[roles[r]].shape for r in (*_STATISTICS, "gamma", "beta") if r in roles}
    if not shape or any(found != shape for found in shapes.values()):
        return "its arrays have shapes " + ", ".join(f"{r} {s}" for r, s in shapes.items())
    return None


def _is_distinctive(group: Group) -> bool:
    """Whether a group that is not whole has names that only batch norms have."""
    statistics = group.roles.keys() & {"mean", "var", "packed"}
    if group.family in ("torch", "keras"):
        return bool(statistics)
    collected = any("batch_stats" in name for name in group.roles.values())
    return len(statistics) == 2 or (bool(statistics) and collected)


def _make_unique(groups: list[Group]) -> None:
    """Give layers whose names are the same, as those of `a/b` and `a.b`, the names of the file."""
    count = Counter(group.name for group in groups)
    for group in groups:
        if count[group.name] > 1 and group.place:
            group.name = group.place


def _find_numbered(
    source: Source, numbered: Iterable[str], configs: Mapping[str, LayerConfig]
) -> tuple[list[Group], list[str]]:
    """Keras 3 numbers a layer's weights: `…/batch_normalization_3/vars/0`."""
    members: dict[Path, list[str]] = {}
    for name in numbered:
        parts = tuple(name.split("/"))
        if parts[0] != "optimizer":
            members.setdefault(parts[:-1], []).append(name)
    groups, notes = [], []
    for parent in sorted(members, key=natural):
        name = _keras_name(parent, source.labels)
        config = configs.get(_last(name))
        names = sorted(members[parent], key=lambda n: natural([_last(n)]))
        shapes = [source.entries[n].shape for n in names]
        looks_like_one = _LOOKS_LIKE_ONE.search("/".join([*parent[-2:-1], name]))
        if config is None and (source.configs or not looks_like_one):
            if not source.configs and len(shapes) == 4 and len(set(shapes)) == 1 == len(shapes[0]):
                notes.append(f"{shown(name)} may be a batch norm by its shapes, not by its name.")
            continue
        roles = _number_roles(shapes, config)
        group = Group(name, "keras", dict(zip(roles, names, strict=False)), config)
        group.place = "/".join(parent)
        if roles and _why_incomplete(group, source) is None:
            groups.append(group)
        else:
            who = name if len(name) < 80 else shown(name)
            notes.append(
                f"{who}: it is unclear which of its weights is which, shapes {shapes[:8]}. A "
                ".keras file says so; weights alone do not."
            )
    return groups, notes


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


def _summary(what: str, names: Sequence[str]) -> list[str]:
    some = ", ".join(map(shown, names[:3]))
    return [f"{len(names)} {what}: {some}."] if names else []


def _keras_name(parent: Path, labels: Mapping[str, str]) -> str:
    """Names of the layers around a group of weights, where the file has them."""
    paths = ("/".join([*parent[:i], "vars"]) for i in range(1, len(parent)) if labels)
    named = [labels[path] for path in paths if path in labels]
    return "/".join(named) or "/".join(part for part in parent[:-1] if part != "layers")


def _last(name: str) -> str:
    return name.rpartition("/")[2]


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


def _unwrap(groups: list[Group]) -> None:
    """Take `state_dict.` and the like off the names, if all begin so."""
    for wrapper in _WRAPPERS:
        prefixes = tuple(wrapper + mark for mark in "./")
        if groups and all(g.name.startswith(prefixes) for g in groups):
            for group in groups:
                group.name = group.name[len(wrapper) + 1 :]


def _numbered(name: str) -> bool:
    parts = name.rsplit("/", 2)[-2:]
    return len(parts) == 2 and parts[0] == "vars" and parts[1].isdecimal()


def natural(path: Iterable[str]) -> list[tuple[str, int]]:
    """A key that sorts `bn_2` before `bn_10`."""
    stems = [(part, part.rstrip(digits)) for part in path]
    return [(stem, int(part[len(stem) :][:18] or -1)) for part, stem in stems]
