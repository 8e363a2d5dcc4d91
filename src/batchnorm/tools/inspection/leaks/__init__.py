"""The search for layers through which padding reaches real positions."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError, names_errors
from batchnorm.tools.frameworks.adapter import Adapter
from batchnorm.tools.frameworks.records import FoundLayer
from batchnorm.tools.frameworks.switch import adapter_of
from batchnorm.tools.inspection.leaks.comparing import tolerance_of
from batchnorm.tools.inspection.leaks.following import (
    Call,
    Found,
    Judging,
    Measuring,
    Recording,
)
from batchnorm.tools.inspection.leaks.padding import Padded, pad_batch
from batchnorm.tools.inspection.leaks.positions import Sizes
from batchnorm.tools.inspection.leaks.records import Leak, Mode, Movement
from batchnorm.tools.inspection.leaks.remedies import explain
from batchnorm.tools.inspection.leaks.report import Leaks
from batchnorm.tools.models import find_layers

__all__ = ["Leak", "Leaks", "Movement", "find_leaks"]

_OWNER = "find_leaks"


@names_errors(_OWNER)
def find_leaks(
    model: Any,
    batch: Any,
    mask: Any,
    *,
    run: Callable[[Any, Any, Any], Any] | None = None,
    more: int | None = None,
    axes: Sequence[int] | None = None,
    multiple: int = 1,
    fill: float = 0.0,
    training: bool = True,
    tolerance: float | None = None,
) -> Leaks:
    """Find the layers through which padding reaches real positions.

    The model runs on the batch with as little padding as its longest sample allows, and with more,
    and the outputs of every layer are compared at real positions. A layer leaks if its real
    outputs move though its real inputs do not. In the run that finds them, what has moved is put
    back behind each layer, so each is judged by itself, and later leaks are found too.

    Three kinds of runs: in evaluation; with the batch norms as in training, by the statistics of
    the batch, and all else (dropout) as in evaluation; and each of them once with other values
    than `fill` in all of the padding. The model is unchanged afterwards, also after an error.

    Args:
        model: a `torch.nn.Module`, `flax.nnx.Module` or Keras model. Its layers must run eagerly;
            what a compiled part computes counts as the layer around it.
        batch: what the model takes: an array, a mapping of keyword arguments (Keras: one input),
            or with `run` any nesting of arrays. Samples on axis 0. A few samples do: all
            activations are kept. Arrays equal to the mask are padded as the mask is.
        mask: `(N, *padded axes)`, or `(rows,)` for rows of no sample in particular; True, or not
            0, at real positions (S1). Padding is added behind the end, whatever the mask.
        run: function of model, batch and mask that calls the model. The default passes the mask as
            `mask=` if the model's call has such an argument; torch models run inside
            `padding_mask(mask, rescale="any")` as well.
        more: positions that are added along each padded axis; None for half as much again, in
            steps of 32.
        axes: the padded axes of the batch's arrays, where their sizes leave it open.
        multiple: the model takes sizes that are multiples of this only, as a U-Net does.
        fill: the value of padding in the batch.
        training: try the statistics of the batch too, if the model has batch norms.
        tolerance: largest difference, relative to the root mean square of a layer's real outputs
            plus the value itself, that counts as rounding. None derives it from the model's
            coarsest type: 1.2e-4 for float32 (1024 eps: sums of 10⁵ terms in another order),
            2.3e-13 for float64, 7.8e-3 for float16 and 6.3e-2 for bfloat16 (8 eps). In half
            precision only big leaks show, so search in float32.

    Returns:
        The leaks, the first one first; `print` it, or use `to_json` or `save_html`.

    Raises:
        TypeError: not a model; a mask without values.
        ValueError: a mask that fits no array, or fits several ways; a model that has no layers to
            follow, runs none eagerly, or differs from run to run on the same batch.

    Source: S4, S5.
    """
    adapter = adapter_of(model)
    if adapter is None:
        raise ArgumentTypeError(
            "model must be a torch.nn.Module, a flax.nnx.Module or a Keras layer, whose layers can "
            f"be followed; got {type(model).__name__}. A tree of arrays has none: compare the "
            "outputs of your own functions."
        )
    if not isinstance(batch, dict) and run is None and isinstance(batch, (tuple, list)):
        raise ArgumentTypeError(
            f"batch must be an array or a mapping of keyword arguments; got a "
            f"{type(batch).__name__} of {len(batch)}. Say what of it the model gets, for instance "
            "run=lambda model, batch, mask: model(batch[0])."
        )
    _check_number("more", more)
    _check_number("multiple", multiple)
    padded = pad_batch(adapter, batch, mask, more, axes, multiple, fill)
    search = _Search(adapter, model, padded, run or adapter.run, tolerance)
    search.run("evaluation", ())
    layers = find_layers(model) if training else []
    layers = [found for found in layers if adapter.refuse_update(found.layer) is None]
    if layers:
        search.run("training", layers)
    return search.result()


def _check_number(name: str, value: Any) -> None:
    if value is not None and not (isinstance(value, int) and value > 0):
        raise ArgumentValueError(f"{name} must be a positive integer; got {value!r}.")


@dataclass(eq=False)
class _Mode:
    """The runs in one mode."""

    first: Recording
    measured: Measuring
    found: list[Found]
    sensitive: list[Found]


class _Search:
    """All runs of a model."""

    def __init__(
        self,
        adapter: Adapter,
        model: Any,
        padded: Padded,
        run: Callable[[Any, Any, Any], Any],
        tolerance: float | None,
    ) -> None:
        self._adapter, self._model, self._padded = adapter, model, padded
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
        first = Recording(self._adapter)
        self._follow(layers, first, sizes.before, False, 0)
        if not first.calls:
            raise ArgumentValueError(
                "model must run its layers eagerly to be followed; no call of a layer was seen. "
                "Call the model itself, not a compiled function of it."
            )
        self._tolerance = self._given or tolerance_of(first.dtypes)
        self._check_steady(layers, first)
        measured = Measuring(self._adapter, first, sizes, self._tolerance)
        self._follow(layers, measured, sizes.after, False, 0)
        found = self._judge(layers, first, False)
        keys = {_key(leak) for leak in found}
        sensitive = [leak for leak in self._judge(layers, first, True) if _key(leak) not in keys]
        self._modes[mode] = _Mode(first, measured, found, sensitive)

    def _judge(self, layers: Sequence[FoundLayer], first: Recording, other: bool) -> list[Found]:
        judging = Judging(self._adapter, first, self._padded.sizes, self._tolerance, other)
        self._follow(layers, judging, self._padded.sizes.after, other, 0)
        return judging.found

    def _check_steady(self, layers: Sequence[FoundLayer], first: Recording) -> None:
        """Raise if the same batch gives other outputs with other random numbers."""
        sizes = self._padded.sizes
        alone = Sizes(sizes.real, sizes.before, sizes.before)
        again = Measuring(self._adapter, first, alone, self._tolerance)
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
        follower: Recording | Measuring | Judging,
        sizes: tuple[int, ...],
        other: bool,
        seed: int,
    ) -> None:
        batch, mask = self._padded.make(sizes, other)
        with ExitStack() as stack:
            actor, _ = stack.enter_context(self._adapter.rehearse(self._model, layers))
            following: AbstractContextManager[None] = self._adapter.follow(actor, follower, seed)
            stack.enter_context(following)
            self._run(actor, batch, mask)

    def result(self) -> Leaks:
        """The leaks of all modes together."""
        leaks = _merge({mode: runs.found for mode, runs in self._modes.items()})
        known = {(leak.name, leak.between) for leak in leaks}
        others = _merge({mode: runs.sensitive for mode, runs in self._modes.items()})
        sensitive = tuple(leak for leak in others if (leak.name, leak.between) not in known)
        runs = self._modes["evaluation"]
        shown = self._modes.get("training", runs) if not runs.found else runs
        names = {leak.name for leak in leaks}
        layers = tuple(
            _movement(call, shown.measured, names) for call in shown.first.calls.values()
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


def _movement(call: Call, measured: Measuring, leaking: set[str]) -> Movement:
    difference = measured.found.get(call.key)
    return Movement(
        name=call.layer.name,
        kind=call.layer.kind,
        call=call.number,
        inner=call.inner,
        leaks=call.layer.name in leaking,
        amount=None if difference is None else difference.amount,
        relative=None if difference is None else difference.relative,
        profile=() if difference is None else difference.profile,
    )


def _merge(found: dict[Mode, list[Found]]) -> tuple[Leak, ...]:
    """One leak for each layer, with the modes in which it was found, in order."""
    merged: dict[tuple[str, tuple[str, str] | None], tuple[list[Mode], list[Found]]] = {}
    for mode, leaks in found.items():
        for leak in leaks:
            modes, all_of_it = merged.setdefault(_key(leak), ([], []))
            modes += [mode] if mode not in modes else []
            all_of_it.append(leak)
    result = []
    for modes, all_of_it in merged.values():
        worst = max(all_of_it, key=lambda leak: leak.difference.relative)
        about = all_of_it[0].about
        cause, remedy = explain(about)
        result.append(
            Leak(
                name=about.layer.name,
                kind=about.layer.kind,
                modes=tuple(modes),
                amount=worst.difference.amount,
                relative=worst.difference.relative,
                between=about.between,
                norm=about.norm,
                cause=cause,
                remedy=remedy,
            )
        )
    return tuple(result)
