"""The ordered list of ways to y, and the choice of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from batchnorm.kernels import explanation
from batchnorm.kernels.explanation import LISTENING
from batchnorm.kernels.select import find_way, refuse_fused
from batchnorm.torch.call import Call
from batchnorm.torch.kernels.recycling import RECYCLER
from batchnorm.torch.private import constant_in_graphs
from batchnorm.torch.ways import array_code, eager_kernels, graph_operators, proof, schedule


class Way(NamedTuple):
    """A way from a call to y.

    Attributes:
        name: as people read it.
        refuse: the reason against it for a call, or None.
        run: y of a call that it does not refuse.
    """

    name: str
    refuse: Callable[[Call], str | None]
    run: Callable[[Call], Tensor]


EAGER_KERNELS = Way(explanation.KERNELS, eager_kernels.refuse, eager_kernels.run)
GRAPH_OPERATORS = Way(explanation.KERNELS_IN_GRAPH, graph_operators.refuse, graph_operators.run)
ARRAY_CODE = Way(explanation.ARRAY_CODE, lambda call: None, array_code.run)


def find_ways(traced: bool) -> tuple[Way, Way]:
    """The ways of a call, the fastest first; `traced`: `torch.compile` traces it."""
    return (GRAPH_OPERATORS if traced else EAGER_KERNELS), ARRAY_CODE


def refuse(way: Way, call: Call) -> str | None:
    """The reason against a way for a call, or None: its own, or that of `fused`."""
    fused = call.settings.fused
    if way is ARRAY_CODE:
        return "fused=True demands a kernel" if fused is True else None
    return explanation.UNFUSED if fused is False else way.refuse(call) or proof.refuse(call)


def run(call: Call) -> Tensor:
    """y by the first way that serves the call.

    Raises:
        ValueError: fused=True, and no kernel serves the call.
    """
    ways = find_ways(call.traced)
    if LISTENING.active:
        ways = _explain(call)
    for way in ways:
        if refuse(way, call) is None:
            return way.run(call)
    raise refuse_fused(str(refuse(ways[0], call)))


def _explain(call: Call) -> tuple[Way, Way]:
    """The ways of a call, after a report of the one that serves it."""
    ways = find_ways(call.traced or explanation.asks_for_graph())
    way, refused = find_way(ways, lambda way: refuse(way, call))
    decision, note = call.decision, "" if way is ARRAY_CODE else _note(call)
    large = way is EAGER_KERNELS and decision is not None and decision.large and not note
    _report(call.owner, way.name, refused, large, note)
    return ways


def _note(call: Call) -> str:
    """The state of the kernels, and the order of their passes on a GPU."""
    on_gpu = not call.tensors.x.is_cpu or (call.decision and call.decision.kernel == "triton")
    notes = (proof.note(call), schedule.note(call) if on_gpu else "")
    return "; ".join(note for note in notes if note)


@constant_in_graphs
def _report(
    owner: str, way: str, refused: tuple[tuple[str, str], ...], large: bool, note: str
) -> None:
    explanation.report(owner, way, refused, f"outputs {RECYCLER}" if large else note)
