"""The matching of the layers of one model with those of another."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from batchnorm.tools.state import BatchNormState
from batchnorm.tools.text import list_names, plain, plural, printable

__all__ = ["Names", "match"]

Names = Mapping[str, "str | None"] | Callable[[str], "str | None"] | None


def match(
    sources: Sequence[BatchNormState], targets: Sequence[BatchNormState], names: Names
) -> list[tuple[int, int]]:
    """Positions of source and target for every pair.

    Args:
        sources: the states to be moved.
        targets: the layers' present states.
        names: target by source name, as a map or a function; None for a source that is not
            moved. Without it: by name, if the names of both sides agree but for case and
            separators; else by order, if both have the same channels in the same order.

    Raises:
        ValueError: unknown names, two sources for one target, or no match.
    """
    if names is not None:
        return _match_by_map(sources, targets, names)
    if len(sources) == len(targets) == 1:
        return [(0, 0)]
    ours, theirs = ([plain(s.name) for s in side] for side in (sources, targets))
    if len(set(ours)) == len(ours) and sorted(ours) == sorted(theirs):
        where = {name: i for i, name in enumerate(theirs)}
        return [(i, where[name]) for i, name in enumerate(ours)]
    if [s.channels for s in sources] == [t.channels for t in targets]:
        return [(i, i) for i in range(len(sources))]
    raise ValueError(
        "transfer: the batch norms of the two sides match neither by name nor by order and "
        f"channels. Pass names={{source: target, ...}}. {_list('source', sources)}; "
        f"{_list('target', targets)}."
    )


def _match_by_map(
    sources: Sequence[BatchNormState], targets: Sequence[BatchNormState], names: Names
) -> list[tuple[int, int]]:
    at_source = {s.name: i for i, s in enumerate(sources)}
    at_target = {t.name: i for i, t in enumerate(targets)}
    if callable(names):
        names = {s.name: names(s.name) for s in sources}
    assert names is not None
    pairs: list[tuple[int, int]] = []
    for source, target in names.items():
        if source not in at_source:
            raise ValueError(
                f"transfer: names has {source!r:.200}, which is no batch norm of the source. Of "
                f"the {_list('source', sources)}."
            )
        if target is None:
            continue
        if target not in at_target:
            raise ValueError(
                f"transfer: names has {target!r:.200}, which is no batch norm of the target. Of "
                f"the {_list('target', targets)}."
            )
        pairs.append((at_source[source], at_target[target]))
    taken = [j for _, j in pairs]
    twice = next((targets[j].name for j in taken if taken.count(j) > 1), None)
    if twice is not None:
        raise ValueError(f"transfer: names has two sources for {twice!r}; give it one.")
    return pairs


def _list(side: str, states: Sequence[BatchNormState]) -> str:
    shown = list_names([f"{printable(s.name, 60)!r} ({s.channels})" for s in states])
    return f"{side}, {plural(len(states), 'batch norm')}: {shown or 'none'}"
