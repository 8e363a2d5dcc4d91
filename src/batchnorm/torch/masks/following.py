"""Masks that follow a model: hooks that map them through its convolutions and poolings."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from batchnorm.core.errors import ArgumentRuntimeError, ArgumentValueError, naming
from batchnorm.torch.masks import modules
from batchnorm.torch.masks.blocks import are_equal, find_block, keep_distinct
from batchnorm.torch.masks.resolutions import Fit, carry, check_turned, find_fits, misfit
from batchnorm.torch.masks.walks import walk_axis
from batchnorm.torch.recompute import in_backward

_Rows = tuple[int, ...]


class _Scope:
    """The masks at hand in a submodule: those that were given, and those made of them."""

    def __init__(self, given: Sequence[Tensor]) -> None:
        self.given = tuple(given)
        self.masks = list(given)
        self._made: dict[Any, tuple[Tensor, Tensor]] = {}  # keeps the source, whose id is the key
        self._versions = self._read_versions()

    def _read_versions(self) -> list[int]:
        return [0 if mask.is_inference() else mask._version for mask in self.given]

    def refresh(self) -> None:
        """Forget masks that were made of given ones which have been written to since."""
        versions = self._read_versions()
        if versions != self._versions:
            self._versions = versions
            self.masks = list(self.given)
            self._made.clear()

    def walk(self, source: Tensor, module: nn.Module, sizes: _Rows, goals: _Rows) -> Tensor | None:
        """The mask of a module's output, or None where the sizes are not explained."""
        walks = modules.find_walks(module, sizes, goals)[: source.dim() - 1]
        if any(walk is None for walk in walks):
            return None
        key = (id(source), tuple(walks), goals)
        if key not in self._made:
            found = source
            for axis, walk in enumerate(walks):
                assert walk is not None
                found = walk_axis(found, axis + 1, goals[axis], walk)
            self._made[key] = (source, self._add(found))
        return self._made[key][1]

    def _add(self, mask: Tensor) -> Tensor:
        for known in self.masks:
            if are_equal(known, mask):
                return known
        self.masks.append(mask)
        return mask


class Following:
    """The masks of one block, as far as the model has run in it."""

    def __init__(
        self,
        model: nn.Module,
        given: Mapping[str | None, Sequence[Tensor]],
        rescale: str | None,
    ) -> None:
        """`given`: masks by the name of a submodule; or those of the model, under None."""
        self.model = model
        self._rescale = rescale
        self._scopes = {name: _Scope(masks) for name, masks in given.items()}
        self._homes: WeakKeyDictionary[nn.Module, list[_Scope]] = WeakKeyDictionary()
        # Masks that an output may have, by data flow: one, or those of equal sizes at its input.
        self._tags: Any = WeakTensorKeyDictionary()
        self._taken: WeakKeyDictionary[nn.Module, dict[_Rows, list[Tensor]]] = WeakKeyDictionary()
        self._hooks = ExitStack()
        for name, module in model.named_modules(remove_duplicate=False):
            self._settle(name, module)

    def _settle(self, name: str, module: nn.Module) -> None:
        """Find the scope of a module: of the innermost submodule that was named."""
        parts = name.split(".") if name else []
        for length in range(len(parts), -1, -1):
            scope = self._scopes.get(".".join(parts[:length]))
            if scope is not None:
                homes = self._homes.setdefault(module, [])
                if scope not in homes:
                    homes.append(scope)
                return

    def open(self) -> None:
        """Put the hooks on the model."""
        self._hooks.enter_context(_eager_code)
        with ExitStack() as started:
            started.push(self._hooks)
            for module in self.model.modules():
                if modules.is_known(module) or not any(True for _ in module.children()):
                    handle = module.register_forward_hook(self._after, with_kwargs=True)
                    self._hooks.callback(handle.remove)
            started.pop_all()

    def close(self) -> None:
        """Take the hooks off; masks stay for recomputations."""
        self._tags.clear()
        self._hooks.close()

    def _after(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Follow the masks through a module that has run."""
        if torch.compiler.is_compiling() or in_backward():
            return  # the layers of a recomputation find what they took
        block = find_block()
        if block is None or block.follower is not self:
            return  # another thread, or an inner block
        x, y = _first((*args, *kwargs.values())), _first(output)
        if x is None or y is None:
            return
        if modules.is_known(module):
            with naming("padding_mask"):
                self._walk(module, x, y)
        elif y.shape == x.shape and x in self._tags:
            self._tags[y] = self._tags[x]

    def _walk(self, module: nn.Module, x: Tensor, y: Tensor) -> None:
        axes = modules.count_axes(module, x.dim())
        if x.dim() != axes + 2 or y.dim() != x.dim():
            return
        rows, goals = (x.shape[0], *x.shape[2:]), tuple(y.shape[2:])
        scope = self._find_scope(module)
        if scope is None:
            return
        fits = [fit.mask for fit in self._find_fits(scope, x, rows) if not fit.turned]
        found = [scope.walk(mask, module, rows[1:], goals) for mask in fits]
        known = [mask for mask in found if mask is not None]
        if known:
            self._tags[y] = keep_distinct(known)

    def _find_scope(self, module: nn.Module | None) -> _Scope | None:
        if None in self._scopes:
            return self._scopes[None]
        homes = self._homes.get(module, []) if module is not None else []
        if len(homes) > 1:
            raise ArgumentValueError(
                f"a {type(module).__name__} is part of several of the submodules {self._names()} "
                "that padding_mask names. Name one that has it alone."
            )
        return homes[0] if homes else None

    def _require_scope(self, layer: nn.Module | None) -> _Scope:
        scope = self._find_scope(layer)
        if scope is None:
            raise ArgumentValueError(
                f"in padding_mask, this layer is in none of the submodules {self._names()}. "
                "Name the one that it is in too, with its mask or None."
            )
        return scope

    def _names(self) -> list[str]:
        return sorted(name for name in self._scopes if name is not None)

    def _find_fits(self, scope: _Scope, x: Tensor, rows: _Rows) -> list[Fit]:
        """By data flow where x comes straight from a module, else by sizes."""
        scope.refresh()
        tagged = self._tags.get(x)
        return (find_fits(tagged, rows) if tagged else []) or find_fits(scope.masks, rows)

    def list_given(self, layer: nn.Module | None) -> Sequence[Tensor]:
        """The masks that were given for a layer."""
        return self._require_scope(layer).given

    def find_mask(self, layer: nn.Module | None, x: Tensor, rows: _Rows) -> Tensor | None:
        """The mask of a layer with this input; None for a layer that is named to have none."""
        if in_backward() and (taken := self._find_taken(layer, rows)) is not None:
            return taken
        scope = self._require_scope(layer)
        if not scope.given:
            return None
        fits = self._find_fits(scope, x, rows)
        for fit in fits:
            check_turned(fit, layer)
        found = self._choose(scope, [fit.mask for fit in fits], rows)
        if layer is not None:
            known = self._taken.setdefault(layer, {}).setdefault(rows, [])
            if not any(found is other for other in known):
                known.append(found)
        return found

    def _choose(self, scope: _Scope, found: list[Tensor], rows: _Rows) -> Tensor:
        if len(found) == 1:
            return found[0]
        if not found:
            # Only whole samples are left, of which the given masks know.
            whole = [m for m in scope.given if m.dim() > len(rows) and m.shape[: len(rows)] == rows]
            if whole:
                return carry(whole, rows, self._rescale)
            raise misfit(scope.masks, rows, _UNSEEN, followed=True)
        if self._rescale is None:
            raise misfit(
                found,
                rows,
                'its input may have either, from several branches; rescale="all" takes the '
                'positions that are real in each, rescale="any" those in one',
                followed=True,
            )
        stacked = torch.stack(found)
        return stacked.all(0) if self._rescale == "all" else stacked.any(0)

    def _find_taken(self, layer: nn.Module | None, rows: _Rows) -> Tensor | None:
        """The mask that a layer had in its forward pass, or None if it had no pass."""
        if layer is None or layer not in self._taken:
            return None
        taken = keep_distinct(self._taken[layer].get(rows, []))
        if len(taken) > 1:
            raise ArgumentRuntimeError(
                "a layer that ran more than once inside padding_mask, with several masks of one "
                "size, is recomputed (activation checkpointing), and either may be meant. Leave "
                "it out of the checkpoint, or use a layer for each."
            )
        return taken[0] if taken else None


def _first(values: Any) -> Tensor | None:
    """The first dense tensor of a module's arguments or outputs."""
    if isinstance(values, Tensor):
        return values if values.layout is torch.strided else None
    found = values if isinstance(values, (tuple, list)) else ()
    return next((a for a in found if isinstance(a, Tensor) and a.layout is torch.strided), None)


class _EagerCode:
    """Compiled models run as eager code while any block follows: they would pass hooks over."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._stance: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._blocks == 0:
                try:
                    self._stance = torch.compiler.set_stance("force_eager")
                except RuntimeError:
                    raise ArgumentRuntimeError(
                        "follow= puts hooks on the model, which compiled code does not run. Open "
                        "the block around the compiled function, not inside it."
                    ) from None
            self._blocks += 1

    def __exit__(self, *error: object) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                self._stance.__exit__(*error)


_eager_code = _EagerCode()
_UNSEEN = (
    "follow= has seen no convolution, pooling or resampling module that makes these sizes (calls "
    "of torch.nn.functional are not seen)"
)
