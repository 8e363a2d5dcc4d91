"""Folding by the data flow of one forward pass, or by pairs that the caller names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from torch import nn

from batchnorm.tools.frameworks.affine import Affine, affine_of
from batchnorm.tools.frameworks.records import Folded, Kept
from batchnorm.tools.frameworks.torch import linear_maps as maps
from batchnorm.tools.frameworks.torch.fold_calls import Call, reaches
from batchnorm.tools.frameworks.torch.fold_record import Recorder
from batchnorm.tools.frameworks.torch.fold_rest import refuse_rest, rest_of
from batchnorm.tools.frameworks.torch.private import find_address
from batchnorm.tools.text import list_names

Pairs = Sequence[tuple[str, str]]


class _Fold(NamedTuple):
    """A batch norm, and the linear map that can take it."""

    norm: Call
    map: Call
    behind: bool  # the map runs after the batch norm


@dataclass
class FlowFolder:
    """Folds the batch norms of a model, in place, by what a run of it did.

    Args:
        model: in evaluation mode.
        record: of a run.
    """

    model: nn.Module
    record: Recorder

    def __post_init__(self) -> None:
        self._names = {id(module): name for name, module in self.model.named_modules()}
        self._counts: Counter[int] = self.record.count()

    def depth(self) -> int:
        """Number of linear maps and batch norms that ran."""
        return len(self.record.calls)

    def fold(
        self, pairs: Pairs | None, check: Callable[[], str | None]
    ) -> tuple[list[Folded], list[Kept]]:
        """Fold every batch norm that can be.

        Args:
            pairs: names of a linear map and a batch norm in the order in which they run; None
                finds them.
            check: runs the model, and returns the reason against it or None.
        """
        folds, reasons = self._find() if pairs is None else self._take(pairs)
        reasons |= {fold.norm: reason for fold, reason in self._apply_right(folds, check)}
        done = [fold for fold in folds if fold.norm not in reasons]
        return (
            [Folded(self._name(fold.norm), self._name(fold.map)) for fold in done],
            [Kept(self._name(norm), reason) for norm, reason in reasons.items()],
        )

    def _find(self) -> tuple[list[_Fold], dict[Call, str]]:
        folds: list[_Fold] = []
        reasons: dict[Call, str] = {}
        for norm in self._norms():
            refusal = self._refuse_norm(norm)
            if refusal is not None:
                reasons[norm] = refusal
                continue
            before, behind = self._before(norm), self._behind(norm)
            if isinstance(before, Call):
                folds.append(_Fold(norm, before, False))
            elif isinstance(behind, Call):
                folds.append(_Fold(norm, behind, True))
            else:
                reasons[norm] = f"before it: {before}; behind it: {behind}"
        return folds, reasons

    def _take(self, pairs: Pairs) -> tuple[list[_Fold], dict[Call, str]]:
        """As `_find`, with pairs that the caller names."""
        folds: list[_Fold] = []
        reasons: dict[Call, str] = {}
        for pair in pairs:
            first, second = (self._named(name) for name in pair)
            fold = _Fold(second, first, False)
            if first.kind is None:
                fold = _Fold(first, second, True)
            if (first.kind is None) == (second.kind is None):
                raise ValueError(
                    "fold: a pair must be a linear map and a batch norm; got "
                    f"{pair!r}, a {type(first.module).__name__} and a "
                    f"{type(second.module).__name__}."
                )
            refusal = self._refuse_norm(fold.norm) or self._refuse_map(fold.map)
            refusal = refusal or self._refuse_pair(fold)
            if refusal is None:
                folds.append(fold)
            else:
                reasons[fold.norm] = refusal
        for norm in self._norms():
            if all(norm is not fold.norm for fold in folds):
                reasons.setdefault(norm, "no pair names it")
        return folds, reasons

    def _named(self, name: str) -> Call:
        found = [call for call in self.record.calls if self._name(call) == name]
        if not found:
            names = sorted({self._name(call) for call in self.record.calls})
            raise ValueError(
                "fold: pairs must name linear maps and batch norms that the model runs; got "
                f"{name!r:.200}. There are {list_names(names, 8)}."
            )
        return found[0]

    def _refuse_pair(self, fold: _Fold) -> str | None:
        kind, module = fold.map.kind, fold.map.module
        assert kind is not None
        groups = _groups(fold.map) or getattr(module, "groups", 1)
        side = 1 if fold.behind else kind.output
        size = module.weight.shape[side] * (groups if side == 1 else 1)
        features = fold.norm.module.num_features
        if features != size:
            return f"{self._name(fold.map)} has {size} channels there, the batch norm {features}"
        if fold.behind:
            return _refuse_own(fold.norm) or self._refuse_zeros(fold.map, _affine(fold.norm))
        return None

    def _norms(self) -> list[Call]:
        """One call of each batch norm, in the order in which they run."""
        seen: dict[int, Call] = {}
        for call in self.record.calls:
            if call.kind is None:
                seen.setdefault(id(call.module), call)
        return list(seen.values())

    def _refuse_norm(self, norm: Call) -> str | None:
        if self._counts[id(norm.module)] > 1:
            return f"it is used {self._counts[id(norm.module)]} times"
        if norm.x is None or norm.y is None:
            return "its input or output is no ordinary tensor"
        if _axis(norm) is None:
            return "it normalizes several channel axes"
        reason = maps.refuse_norm(norm.module) or _refuse_patch(norm.module)
        return reason or refuse_rest(norm)

    def _refuse_map(self, call: Call) -> str | None:
        if self._counts[id(call.module)] > 1:
            return f"it is used {self._counts[id(call.module)]} times"
        for parameter in (call.module.weight, call.module.bias):
            if parameter is not None:
                readers = self.record.parameter_readers.get(
                    find_address(parameter.untyped_storage())
                )
                if readers:
                    return f"its parameters are used elsewhere, in {readers[0]}"
        reason = maps.refuse_module(call.module)
        return _refuse_patch(call.module) if reason is None else f"it {reason}"

    def _before(self, norm: Call) -> Call | str:
        """The linear map before it that can take it, or the reason against it."""
        call = norm.source
        if isinstance(call, str) or call.kind is None:
            return call if isinstance(call, str) else self._name(call)
        reason = self._refuse_map(call)
        others = [self._describe(a) for a in call.readers if a is not norm]
        if reason is None and others:
            reason = f"its output is also used by {list_names(others, 3)}"
        if reason is None and not reaches(call, _axis(call), norm.x, _axis(norm)):
            reason = f"its channels do not lie on axis {_axis(norm)}"
        return call if reason is None else f"{self._name(call)}, but {reason}"

    def _behind(self, norm: Call) -> Call | str:
        """As `_before`, for the map that follows."""
        own = _refuse_own(norm)
        if own is not None:
            return own
        if len(norm.readers) != 1:
            return f"{len(norm.readers)} uses of its output"
        call = norm.readers[0]
        if isinstance(call, str) or call.kind is None:
            return self._describe(call)
        reason = self._refuse_map(call) or self._refuse_zeros(call, _affine(norm))
        if reason is None and not reaches(norm, _axis(norm), call.x, _axis(call)):
            reason = f"its channels do not lie on axis {_axis(norm)}"
        return call if reason is None else f"{self._name(call)}, {reason}"

    def _refuse_zeros(self, call: Call, affine: Affine) -> str | None:
        if call.whole:
            return maps.refuse_padding(call.module, affine)
        assert call.kind is not None
        size = tuple(call.module.weight.shape[2:])
        return maps.refuse_zeros(call.kind, call.given.get("padding", 0), size, affine)

    def _apply_right(
        self, folds: list[_Fold], check: Callable[[], str | None]
    ) -> list[tuple[_Fold, str]]:
        """Apply the folds after which the model computes the same; the others with the reason."""
        undo = [self._apply(fold) for fold in folds]
        if not folds or check() is None:
            return []
        for back in reversed(undo):
            back()
        wrong = []
        for fold in folds:
            back = self._apply(fold)
            reason = check()
            if reason is not None:
                back()
                wrong.append((fold, f"folded into {self._name(fold.map)}, {reason}"))
        return wrong

    def _apply(self, fold: _Fold) -> Callable[[], None]:
        """Fold one batch norm, and return a function that undoes it."""
        module, affine = fold.map.module, _affine(fold.norm)
        old = (module.weight, module.bias)
        if fold.behind:
            maps.fold_next(module, affine, _groups(fold.map))
        else:
            maps.fold_previous(module, affine, fold.map.kind, _groups(fold.map))
        places = [
            (parent, key)
            for parent in self.model.modules()
            for key, child in parent._modules.items()
            if child is fold.norm.module
        ]
        rest = rest_of(fold.norm)
        for parent, key in places:
            parent._modules[key] = rest

        def undo() -> None:
            module.weight, module.bias = old
            for parent, key in places:
                parent._modules[key] = fold.norm.module

        return undo

    def _name(self, call: Call) -> str:
        return self._names[id(call.module)]

    def _describe(self, reader: Call | str) -> str:
        return reader if isinstance(reader, str) else self._name(reader)


def _axis(call: Call) -> int | None:
    """The axis of a call's input and output that holds channels."""
    assert call.x is not None
    rank = len(call.x.shape)
    if call.kind is None:
        return maps.channel_axis(call.module, rank)
    return rank - 1 - call.kind.spatial


def _affine(norm: Call) -> Affine:
    return affine_of(maps.state_of(norm.module))


def _groups(call: Call) -> int | None:
    """Groups of a call of a function; None for a module that knows its own."""
    return None if call.whole else int(call.given.get("groups", 1))


def _refuse_own(norm: Call) -> str | None:
    """The residual or activation of a batch norm itself, or None."""
    if norm.given.get("residual") is not None:
        return "its own residual"
    if not norm.whole:
        return None
    own = maps.activation_of(norm.module) or ", ".join(maps.following(norm.module))
    return f"its own {own}" if own else None


def _refuse_patch(module: nn.Module) -> str | None:
    return "its forward is patched" if "forward" in vars(module) else None
