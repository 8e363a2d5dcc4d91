"""All runs of a model, and the leaks that they find together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

from batchnorm.core.errors import ArgumentValueError
from batchnorm.tools.frameworks.adapter import Adapter, Follower
from batchnorm.tools.frameworks.records import FoundLayer
from batchnorm.tools.inspection.leaks.comparing import tolerance_of
from batchnorm.tools.inspection.leaks.following import Call, Found, Judging, Measuring, Recording
from batchnorm.tools.inspection.leaks.padding import Padded
from batchnorm.tools.inspection.leaks.records import Leak, Mode, Movement
from batchnorm.tools.inspection.leaks.remedies import explain
from batchnorm.tools.inspection.leaks.report import Leaks
from batchnorm.tools.inspection.leaks.resolution import Sizes

__all__ = ["Search"]


@dataclass(eq=False)
class _Mode:
    """The runs in one mode."""

    first: Recording
    measured: Measuring
    found: list[Found]
    sensitive: list[Found]


class Search:
    """All runs of a model."""

    def __init__(
        self,
        adapter: Adapter,
        model: Any,
        padded: Padded,
        run: Callable[[Any, Any, Any], Any],
        tolerance: float | None,
    ) -> None:
        self._adapter, self._following = adapter, adapter.following()
        self._model, self._padded = model, padded
        self._run, self._given = run, tolerance
        self._modes: dict[Mode, _Mode] = {}
        self._tolerance = 0.0

    def run(self, mode: Mode, layers: Sequence[FoundLayer]) -> None:
        """Run the model in one mode.

        Args:
            mode: its name.
            layers: the batch norms that run as in training.
        """
        sizes = self._padded.sizes
        first = Recording(self._following)
        self._follow(layers, first, sizes.before, False, 0)
        if not first.calls:
            raise ArgumentValueError(
                "model must run its layers eagerly to be followed; no call of a layer was seen. "
                "Call the model itself, not a compiled function of it."
            )
        self._tolerance = self._given or tolerance_of(first.dtypes)
        self._check_steady(layers, first)
        measured = Measuring(self._following, first, sizes, self._tolerance)
        self._follow(layers, measured, sizes.after, False, 0)
        found = self._judge(layers, first, other=False)
        if any(leak.about.norm for leak in found):
            found = self._blame_norms(layers, first, found)
        keys = {_key(leak) for leak in found}
        others = self._judge(layers, first, other=True)
        sensitive = [leak for leak in others if _key(leak) not in keys]
        self._modes[mode] = _Mode(first, measured, found, sensitive)

    def _judge(self, layers: Sequence[FoundLayer], first: Recording, *, other: bool) -> list[Found]:
        """The leaks in the order of execution.

        At a coarser layer some positions are not surely real. If one moves and a layer behind
        takes it for real, that layer seems to leak, but no longer where all positions are given
        back. Then the layer that moved the last position of a sample is the leak, if one did.
        """
        sizes, tolerance = self._padded.sizes, self._tolerance
        plain = self._run_judging(
            layers, Judging(self._following, first, sizes, tolerance, other=other)
        )
        if not plain:
            return []
        found = self._run_judging(
            layers, Judging(self._following, first, sizes, tolerance, other=other, edges=True)
        )
        certain = {_key(leak) for leak in found if not leak.edge}
        if {_key(leak) for leak in plain} <= certain:
            return [leak for leak in found if not leak.edge]
        return found or plain

    def _run_judging(self, layers: Sequence[FoundLayer], judging: Judging) -> list[Found]:
        self._follow(layers, judging, self._padded.sizes.after, judging.other, 0)
        return judging.found

    def _blame_norms(
        self, layers: Sequence[FoundLayer], first: Recording, found: list[Found]
    ) -> list[Found]:
        """The leaks; a batch norm stays named where zeros at the padding of its output mend one.

        Samples with padding in the first run are left out: they read it there already.
        """
        unpadded = self._padded.sizes.unpadded()
        left = {_key(leak) for leak in found}
        if unpadded is not None:
            judging = Judging(
                self._following, first, unpadded, self._tolerance, edges=True, clears=True
            )
            left = {_key(leak) for leak in self._run_judging(layers, judging)}
        return [
            replace(leak, about=leak.about._replace(norm="")) if _key(leak) in left else leak
            for leak in found
        ]

    def _check_steady(self, layers: Sequence[FoundLayer], first: Recording) -> None:
        """Raise if the same batch gives other outputs with other random numbers."""
        sizes = self._padded.sizes
        alone = Sizes(sizes.real, sizes.before, sizes.before)
        again = Measuring(self._following, first, alone, self._tolerance)
        self._follow(layers, again, sizes.before, False, 1)
        for (name, _), difference in again.found.items():
            if difference.relative > self._tolerance:
                raise ArgumentValueError(
                    f"model must give the same outputs for the same batch; those of layer {name!r} "
                    f"differ by {difference.amount:.2g}. Switch its random numbers off, such as a "
                    "dropout that ignores the mode, or call the model with them off in run."
                )

    def _follow(
        self,
        layers: Sequence[FoundLayer],
        follower: Follower,
        sizes: tuple[int, ...],
        other: bool,
        seed: int,
    ) -> None:
        batch, mask = self._padded.make(sizes, other)
        with ExitStack() as stack:
            actor, _ = stack.enter_context(self._adapter.rehearse(self._model, layers))
            stack.enter_context(self._following.follow(actor, follower, seed))
            self._run(actor, batch, mask)

    def result(self) -> Leaks:
        """The leaks of all modes together."""
        leaks = _merge({mode: runs.found for mode, runs in self._modes.items()})
        known = {(leak.name, leak.between) for leak in leaks}
        others = _merge({mode: runs.sensitive for mode, runs in self._modes.items()})
        sensitive = tuple(leak for leak in others if (leak.name, leak.between) not in known)
        shown = self._modes[leaks[0].modes[0] if leaks else "evaluation"]
        leaking = {leak.name: leak.modes for leak in leaks}
        layers = tuple(
            _movement(call, shown.measured, leaking.get(call.layer.name, ()))
            for call in shown.first.calls.values()
        )
        sizes = self._padded.sizes
        return Leaks(
            source=type(self._model).__name__,
            leaks=leaks,
            sensitive=sensitive,
            layers=layers,
            moved=layers[-1].amount or 0.0,
            before=sizes.before,
            after=sizes.after,
            modes=tuple(self._modes),
            tolerance=self._tolerance,
        )


def _key(found: Found) -> tuple[str, tuple[str, str] | None]:
    return found.about.layer.name, found.about.between


def _movement(call: Call, measured: Measuring, leaks: tuple[Mode, ...]) -> Movement:
    difference = measured.found.get(call.key)
    return Movement(
        name=call.layer.name,
        kind=call.layer.kind,
        call=call.number,
        inner=call.inner,
        leaks=leaks,
        amount=None if difference is None else difference.amount,
        relative=None if difference is None else difference.relative,
        profile=() if difference is None else difference.profile,
    )


def _merge(found: dict[Mode, list[Found]]) -> tuple[Leak, ...]:
    """One leak for each layer, with the modes in which it was found, in order."""
    merged: dict[tuple[str, tuple[str, str] | None], dict[Mode, list[Found]]] = {}
    for mode, leaks in found.items():
        for leak in leaks:
            merged.setdefault(_key(leak), {}).setdefault(mode, []).append(leak)
    result = []
    for by_mode in merged.values():
        worst = [max(leaks, key=lambda leak: leak.difference.amount) for leaks in by_mode.values()]
        about = next(iter(by_mode.values()))[0].about
        cause, remedy = explain(about)
        result.append(
            Leak(
                name=about.layer.name,
                kind=about.layer.kind,
                modes=tuple(by_mode),
                amounts=tuple(leak.difference.amount for leak in worst),
                relative=worst[0].difference.relative,
                between=about.between,
                norm=about.norm,
                cause=cause,
                remedy=remedy,
            )
        )
    return tuple(result)
