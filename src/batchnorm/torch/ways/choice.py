"""The ordered list of ways to y, and the choice of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor

from batchnorm.kernels.select import refuse_fused
from batchnorm.torch.call import Call
from batchnorm.torch.ways import array_code, eager_kernels, graph_operators


class Way(NamedTuple):
    """A way from a call to y.

    Attributes:
        name: as people read it.
        refuse: why it does not serve a call, or None.
        run: y of a call that it does not refuse.
    """

    name: str
    refuse: Callable[[Call], str | None]
    run: Callable[[Call], Tensor]


EAGER_KERNELS = Way("eager kernels", eager_kernels.refuse, eager_kernels.run)
GRAPH_OPERATORS = Way("graph operators", graph_operators.refuse, graph_operators.run)
ARRAY_CODE = Way("array code", lambda call: None, array_code.run)


def find_ways(traced: bool) -> tuple[Way, Way]:
    """The ways of a call, the fastest first; `traced`: whether `torch.compile` traces it."""
    return (GRAPH_OPERATORS if traced else EAGER_KERNELS), ARRAY_CODE


def refuse(way: Way, call: Call) -> str | None:
    """Why a way does not serve a call, or None: its own reason, or what `fused` says."""
    fused = call.settings.fused
    if way is ARRAY_CODE:
        return "fused=True demands a kernel" if fused is True else None
    return "fused=False asks for array code" if fused is False else way.refuse(call)


def run(call: Call) -> Tensor:
    """y by the first way that serves the call.

    Raises:
        ValueError: fused=True, and no kernel serves the call.
    """
    ways = find_ways(call.traced)
    for way in ways:
        if refuse(way, call) is None:
            return way.run(call)
    raise refuse_fused(call.owner, str(refuse(ways[0], call)))
