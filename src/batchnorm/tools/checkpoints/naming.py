"""Recognizing batch norms by the names of their arrays, whichever library chose them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

from batchnorm.tools.checkpoints.groups import Group, Path, last_part, summary, why_incomplete
from batchnorm.tools.checkpoints.limits import MOST_NOTES, one_line, shown
from batchnorm.tools.checkpoints.numbering import find_numbered, is_numbered
from batchnorm.tools.checkpoints.source import LayerConfig, Source

__all__ = ["Group", "find_groups"]

# Each library's names of arrays, with their roles, the fields of the canonical state.
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
    "steps": "steps",
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


def find_groups(source: Source) -> tuple[list[Group], list[str]]:
    """Every batch norm among a checkpoint's arrays.

    Returns:
        The groups in the order of the file, of a Keras model's config where there is one, and
        notes on arrays that look like a batch norm but cannot be read as one, or were left out.
    """
    configs: dict[str, LayerConfig] = {}
    for config in source.configs:
        configs.setdefault(config.name, config)
    numbered = dict.fromkeys(name for name in source.entries if is_numbered(name))
    known: set[str] = set()  # names of configs that have weights
    groups, notes = find_numbered(source, numbered, configs, known)
    named, doubtful = _find_named([n for n in source.entries if n not in numbered], source)
    _unwrap(named)
    for group in named:
        if group.family == "keras":
            group.config = configs.get(last_part(group.name))
            known.add(last_part(group.name))
    groups += named
    _make_unique(groups)
    if configs:
        order = {name: i for i, name in enumerate(configs)}
        groups.sort(key=lambda g: order.get(g.config.name, len(order)) if g.config else len(order))
    missing = [name for name in configs if name not in known]
    notes += summary("batch norms of the config have no weights here", missing)
    notes += [*doubtful, *source.notes]
    if len(notes) > MOST_NOTES:
        notes[MOST_NOTES:] = [f"{len(notes) - MOST_NOTES} more notes like these are left out."]
    return groups, [one_line(note) for note in notes]


def _find_named(names: Iterable[str], source: Source) -> tuple[list[Group], list[str]]:
    """Batch norms whose arrays have names that tell their roles."""
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
    notes = summary("arrays have the same role in a layer as another array", doubles)
    linen = any("batch_stats" in path for parts in found.values() for path in parts)
    groups = []
    for (family, mark, base), parts in found.items():
        for path, roles in _merge(base, parts):
            shown_family = family if family != "flax" else "flax.linen" if linen else "flax.nnx"
            group = Group(_join(path, family), shown_family, roles, place=mark.join(path))
            reason = why_incomplete(group, source)
            if reason is None:
                groups.append(group)
            elif _is_distinctive(group):
                notes.append(f"{shown(group.name)} cannot be read as a batch norm: {reason}.")
        if len(parts) > 1 and _are_apart(parts):
            some = shown(_join(base, family))
            notes.append(
                f"{some} is in several collections with one role twice; each is read as a layer."
            )
    return groups, notes


def _role(family: str, path: Path, leaf: str) -> tuple[str | None, Path]:
    """The role of an array in its layer, and the layer's path."""
    if family == "haiku" and leaf == "average" and len(path) >= 2 and path[-2] == "~":
        return _EMA.get(path[-1]), path[:-2]
    return _FAMILIES[family].get(leaf), path


def _merge(
    base: Path, parts: Mapping[Path, dict[str, str]]
) -> Iterable[tuple[Path, dict[str, str]]]:
    """One layer made of parts in several collections; several layers if they share a role."""
    if _are_apart(parts):
        return parts.items()
    return [(base, {role: name for roles in parts.values() for role, name in roles.items()})]


def _are_apart(parts: Mapping[Path, dict[str, str]]) -> bool:
    return len(set().union(*parts.values())) < sum(map(len, parts.values()))


def _is_distinctive(group: Group) -> bool:
    """True for an incomplete group with names that only batch norms have."""
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


def _join(path: Path, family: str) -> str:
    if family == "keras":  # `bn/bn/gamma:0` in files of Keras 2
        path = tuple(p for i, p in enumerate(path) if i == 0 or p != path[i - 1])
        return "/".join(path)
    return ("." if family == "torch" else "/").join(path)


def _without_collection(path: Path) -> Path:
    """A path without the collection that linen and Haiku file it under."""
    for name in _COLLECTIONS:
        if name in path:
            i = path.index(name)
            return path[:i] + path[i + 1 :]
    return path


def _unwrap(groups: list[Group]) -> None:
    """Take `state_dict.` and the like off the names, if all begin so."""
    for wrapper in _WRAPPERS:
        prefixes = tuple(wrapper + mark for mark in "./")
        if groups and all(g.name.startswith(prefixes) for g in groups):
            for group in groups:
                group.name = group.name[len(wrapper) + 1 :]
