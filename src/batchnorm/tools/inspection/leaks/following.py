"""The runs of a model: one to remember, others to compare with it.

In a run that judges, a layer whose real outputs have moved gets those of the first run in their
place before they reach the next layer. So every layer is judged with real inputs that did not
move, and all leaks show in one run, each by itself.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from batchnorm.tools.frameworks.adapter import Following
from batchnorm.tools.frameworks.records import Called
from batchnorm.tools.inspection.leaks.comparing import Difference, clear, compare, give_back
from batchnorm.tools.inspection.leaks.positions import locate
from batchnorm.tools.inspection.leaks.remedies import Circumstances
from batchnorm.tools.inspection.leaks.resolution import Sizes

__all__ = ["Call", "Found", "Judging", "Measuring", "Recording"]


@dataclass(eq=False)
class Call:
    """One call of a layer.

    Args:
        layer: the layer.
        number: of its calls before this one.
        inputs: its floating arrays, None for all else.
        outputs: the same.
        inner: it called other layers.
        last: name of the last layer that it called and that has returned.
        padding: largest absolute value of its inputs at padding that the first run did not have.
    """

    layer: Called
    number: int
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)
    inner: bool = False
    last: str = ""
    padding: float | None = None

    @property
    def key(self) -> tuple[str, int]:
        """The same for the same call in another run."""
        return self.layer.name, self.number


class _Following:
    """A follower that keeps the calls that are open, and hands arrays on unchanged."""

    def __init__(self, following: Following) -> None:
        self._following = following
        self._open: list[Call] = []
        self._counts: dict[str, int] = {}

    def enter(self, layer: Called, arrays: list[Any]) -> list[Any]:
        """As `Follower.enter`."""
        number = self._counts.get(layer.name, 0)
        self._counts[layer.name] = number + 1
        call = Call(layer, number)
        new = self._see_inputs(call, arrays)
        if self._open:
            self._open[-1].inner = True
        self._open.append(call)
        return new

    def leave(self, layer: Called, arrays: list[Any]) -> list[Any]:
        """As `Follower.leave`."""
        call = self._open.pop()
        while call.layer != layer:  # a layer that ended by an exception, which another one caught
            call = self._open.pop()
        new = self._see_outputs(call, arrays)
        if self._open:
            self._open[-1].last = layer.name
        return new

    def _see_inputs(self, call: Call, arrays: list[Any]) -> list[Any]:
        return arrays

    def _see_outputs(self, call: Call, arrays: list[Any]) -> list[Any]:
        return arrays

    def _floats(self, arrays: list[Any], dtypes: set[str] | None = None) -> list[Any]:
        """The values of floating arrays, None for all else."""
        found = []
        for array in arrays:
            seen = self._following.read(array)
            usable = seen is not None and seen.values.dtype.kind == "f"
            found.append(seen.values if seen is not None and usable else None)
            if seen is not None and usable and dtypes is not None:
                dtypes.add(seen.dtype)
        return found


class Recording(_Following):
    """The first run: remembers inputs and outputs of all calls."""

    def __init__(self, following: Following) -> None:
        super().__init__(following)
        self.calls: dict[tuple[str, int], Call] = {}  # in the order in which they end
        self.dtypes: set[str] = set()

    def _see_inputs(self, call: Call, arrays: list[Any]) -> list[Any]:
        call.inputs = self._floats(arrays, self.dtypes)
        return arrays

    def _see_outputs(self, call: Call, arrays: list[Any]) -> list[Any]:
        call.outputs = self._floats(arrays, self.dtypes)
        self.calls[call.key] = call
        return arrays


class Measuring(_Following):
    """A run that finds by how much each layer's outputs move, and changes nothing."""

    def __init__(
        self, following: Following, first: Recording, sizes: Sizes, tolerance: float
    ) -> None:
        super().__init__(following)
        self._first, self._sizes, self._tolerance = first, sizes, tolerance
        self.found: dict[tuple[str, int], Difference] = {}

    def _see_outputs(self, call: Call, arrays: list[Any]) -> list[Any]:
        before = self._first.calls.get(call.key)
        if before is not None:
            pairs = _pair(before.outputs, self._floats(arrays))
            found = [compare(a, b, self._sizes, self._tolerance, profile=True) for a, b in pairs]
            known = [difference for difference in found if difference is not None]
            if known:
                self.found[call.key] = max(known, key=lambda difference: difference.relative)
        return arrays


@dataclass(frozen=True)
class Found:
    """A leak as a run found it.

    Args:
        about: its circumstances.
        difference: the largest one.
        edge: it shows only at positions of which it is open if they are real.
    """

    about: Circumstances
    difference: Difference
    edge: bool = False


class Judging(_Following):
    """A run that finds the layers that leak by themselves.

    Args:
        following: of the model's framework.
        first: the run with little padding.
        sizes: of both runs.
        tolerance: largest relative difference that is rounding.
        other: the batch's padding holds other values.
        edges: coarser layers get all values of the first run, not only those that are surely real.
        clears: give batch norms outputs of 0 at padding, to see which leaks that mends.
    """

    def __init__(
        self,
        following: Following,
        first: Recording,
        sizes: Sizes,
        tolerance: float,
        *,
        other: bool = False,
        edges: bool = False,
        clears: bool = False,
    ) -> None:
        super().__init__(following)
        self._first, self._sizes, self._tolerance = first, sizes, tolerance
        self.other, self._edges, self._clears = other, edges, clears
        self._norm = ""
        self.found: list[Found] = []

    def _see_inputs(self, call: Call, arrays: list[Any]) -> list[Any]:
        before = self._first.calls.get(call.key)
        if before is None:
            return arrays
        now = self._floats(arrays)
        beyond = [_beyond(a, b, self._sizes) for a, b in _pair(before.inputs, now)]
        call.padding = max((most for most in beyond if most is not None), default=None)
        # Arrays with one number for each sample, such as relative lengths, may depend on sizes.
        wide = [a if a is not None and a.ndim > 1 else None for a in before.inputs]
        new, moved = self._restore(wide, now, arrays)
        if moved is not None and self._open:
            caller = self._open[-1]
            self._note(caller, (caller.last, call.layer.name), moved)
        return new

    def _see_outputs(self, call: Call, arrays: list[Any]) -> list[Any]:
        before = self._first.calls.get(call.key)
        if before is None:
            return arrays
        now = self._floats(arrays)
        new, moved = self._restore(before.outputs, now, arrays)
        between = (call.last, "") if call.inner else None
        if moved is not None:
            self._note(call, between, moved)
        elif self._edges:
            pairs = _pair(before.outputs, now)
            found = [compare(a, b, self._sizes, self._tolerance, edges=True) for a, b in pairs]
            at_edge = self._worst(found)
            if at_edge is not None:
                self._note(call, between, at_edge, edge=True)
        if call.layer.norm:
            beyond = [_beyond(a, b, self._sizes) for a, b in _pair(before.outputs, now)]
            if any(most for most in beyond):
                self._norm = call.layer.name or call.layer.kind
            if self._clears:
                new = self._clear(before.outputs, new)
        return new

    def _clear(self, before: list[Any], arrays: list[Any]) -> list[Any]:
        """The outputs of a batch norm with zeros at padding."""
        new = list(arrays)
        for i, (a, b) in enumerate(zip(before, self._floats(arrays), strict=False)):
            cleared = None if a is None or b is None else clear(a, b, self._sizes)
            new[i] = new[i] if cleared is None else self._following.write(cleared, arrays[i])
        return new

    def _note(
        self,
        call: Call,
        between: tuple[str, str] | None,
        moved: Difference,
        edge: bool = False,
    ) -> None:
        # What code between layers reads at padding is not seen; the norm is only a suspect yet.
        padding = call.padding if between is None else None
        suspected = (padding or between is not None) and not self.other
        norm = self._norm if suspected else ""
        about = Circumstances(call.layer, between, padding, norm, self.other)
        self.found.append(Found(about, moved, edge))

    def _restore(
        self, before: list[Any], now: list[Any], arrays: list[Any]
    ) -> tuple[list[Any], Difference | None]:
        """The arrays with the real values of the first run, and their largest movement if any."""
        if len(before) != len(now):
            return arrays, None
        new, found = list(arrays), []
        for i, (a, b) in enumerate(zip(before, now, strict=True)):
            if a is None or b is None:
                continue
            difference = compare(a, b, self._sizes, self._tolerance)
            found.append(difference)
            if difference is None or difference.shifted:
                continue
            restored = give_back(a, b, self._sizes, edges=self._edges)
            if restored is not None:
                new[i] = self._following.write(restored, arrays[i])
        return new, self._worst(found)

    def _worst(self, found: list[Difference | None]) -> Difference | None:
        """The largest difference that is more than rounding, or None."""
        known = [d for d in found if d is not None and d.relative > self._tolerance]
        return max(known, key=lambda difference: difference.relative, default=None)


def _pair(before: list[Any], now: list[Any]) -> list[tuple[Any, Any]]:
    """Arrays of two runs that belong together; none if the numbers of arrays differ."""
    if len(before) != len(now):
        return []
    pairs = zip(before, now, strict=True)
    return [(a, b) for a, b in pairs if a is not None and b is not None]


def _beyond(a: Any, b: Any, sizes: Sizes) -> float | None:
    """The largest absolute value at positions that only the second run has; None without any."""
    place = locate(a.shape, b.shape, sizes)
    if place is None or place.before == place.after:
        return None
    b = b.reshape(place.after)
    most = 0.0
    for axis, size in enumerate(place.before):
        rest = b[(slice(None),) * axis + (slice(size, None),)]
        if rest.size:
            most = max(most, float(np.max(np.nan_to_num(np.abs(rest), nan=np.inf))))
    return most
