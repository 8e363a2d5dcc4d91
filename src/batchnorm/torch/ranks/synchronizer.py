"""Statistics of all ranks as those of one (S14): a layer's side of the exchange.

Statistics travel as one float64 vector: the count of real rows (one for each channel where the
mask varies along channels), the means, the biased variances. Every rank merges the same vectors
in the same order (`sums.sum_pairwise`), and gets the same bits.
"""

from __future__ import annotations

import itertools
import math
import weakref
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from batchnorm.core import config
from batchnorm.core.config import Options
from batchnorm.core.layout import Layout
from batchnorm.core.merge import merge_averages
from batchnorm.core.moments import Moments, merge_moments
from batchnorm.core.namespace import Namespace
from batchnorm.torch.namespace import HOST_OVER_RANKS, OVER_RANKS
from batchnorm.torch.options import describe_agreed
from batchnorm.torch.ranks.groups import check_group
from batchnorm.torch.ranks.messages import Expected, Peers, SynchronizationError, find_peers
from batchnorm.torch.recompute import PastSteps, in_backward

__all__ = [
    "Participation",
    "Synchronizer",
    "find_by_key",
    "find_synchronizer",
    "merge_vectors",
    "pack",
    "participate",
    "unpack",
]


_keys = itertools.count()
_numbers = itertools.count(1)
_synchronizers: weakref.WeakValueDictionary[int, Synchronizer] = weakref.WeakValueDictionary()


class Synchronizer:
    """One layer's side of the exchange with other ranks.

    Attributes:
        key: the number by which compiled code finds this object.
    """

    _STEPS = 16  # forward passes of one layer between a step and its recomputation

    def __init__(self, group: Any = None, name: str | None = None, steps: int = _STEPS) -> None:
        self.group = group
        self.key = next(_keys)
        self._name = name
        self._met = False  # other ranks have been asked before
        self._past = PastSteps(steps)
        _synchronizers[self.key] = self

    @property
    def group(self) -> Any:
        """The ProcessGroup, or None for the default one, or for one that is gone."""
        return None if self._group is None else self._group()

    @group.setter
    def group(self, group: Any) -> None:
        # Weakly: a destroyed group closes its connections, which tells the others.
        self._group = None if group is None else weakref.ref(group)

    def __deepcopy__(self, memo: Any) -> Synchronizer:
        """A copy's own; groups are shared, and copies on all ranks keep the name."""
        return Synchronizer(self.group, self._name)

    def __reduce__(self) -> Any:
        """A pickle holds the name alone; process groups do not outlive their process."""
        if self.group is not None:
            raise TypeError(
                "BatchNorm: a layer with a process_group cannot be pickled; set process_group "
                "to None first, or save the state_dict."
            )
        return Synchronizer, (None, self._name)

    @property
    def name(self) -> str:
        """The name that tells the layer apart from others, the same on all ranks."""
        if self._name is None:
            self.enlist()
            assert self._name is not None
        return self._name

    @name.setter
    def name(self, name: str) -> None:
        self._name = name

    def has_peers(self, text: str) -> bool:
        """True if there are other ranks; raises as `find_peers`."""
        return self.find_peers(text) is not None

    def enlist(self) -> None:
        """Take the next number for a name: ranks make the same layers in the same order."""
        if self._name is None:
            self._name = f"#{next(_numbers)}"

    def find_peers(self, text: str) -> Peers | None:
        """The other ranks, None if there are none.

        Raises:
            SynchronizationError: there were some, and the group is gone.
        """
        group = self.group
        try:
            if group is None and self._group is not None:
                raise LookupError("its process group is gone: it has been destroyed")
            return find_peers(group)
        except LookupError as error:
            if self._group is None and not self._met:
                return None  # one process without torch.distributed
            raise SynchronizationError(
                f"{text}: cannot reach the other ranks, since {error}. Make a new group, or set "
                "synchronized=False to go on with this process alone."
            ) from error

    def expect(self, text: str, size: int, direction: str) -> Expected | None:
        """Announce a `merge` or `total` of so many numbers, which takes the result."""
        if direction == "forward" and in_backward():
            return None
        peers = self.find_peers(text)
        if peers is None:
            return None
        waiting, cpu_device = f"{text}, {direction} pass", torch.device("cpu")
        if direction == "forward":
            self._met = True
            peers.agree(text, waiting, cpu_device)
        return peers.expect(size, f"{direction} {text}", cpu_device)

    def merge(
        self,
        local: Tensor,
        text: str,
        channels: int,
        pooled: bool,
        expected: Expected | None = None,
    ) -> Tensor:
        """The statistics of all ranks, laid out like this rank's `local`.

        A forward pass that is recomputed in a backward pass gets what it got before, and no rank
        is asked. `pooled`: averages over ghost groups instead of moments (S12).
        """
        if in_backward():
            return self._recall(local, text)
        peers = self.find_peers(text) if expected is None else expected.peers
        if peers is None:
            merged = local.clone()
        else:
            self._met = True
            waiting = f"{text}, forward pass"
            if expected is None:
                peers.agree(text, waiting, local.device)
            parts = peers.gather(local, f"forward {text}", waiting, expected)
            merged = merge_vectors(parts, channels, pooled)
        self._past.record((local,), merged)
        return merged

    def total(self, sums: Tensor, text: str, expected: Expected | None = None) -> Tensor:
        """The sum over all ranks, in the same order on each."""
        peers = self.find_peers(text) if expected is None else expected.peers
        if peers is None:
            return sums.clone()
        return peers.total(sums, f"backward {text}", f"{text}, backward pass", expected)

    def _recall(self, local: Tensor, text: str) -> Tensor:
        merged: Tensor | None = self._past.recall((local,))
        if merged is not None:
            return merged
        raise SynchronizationError(
            f"{text}: a recomputed forward pass (activation checkpointing) is none of the layer's "
            f"latest {self._past.most}; call backward sooner."
        )


def merge_vectors(parts: Tensor, channels: int, pooled: bool) -> Tensor:
    """The ranks' vectors, one row each, as one; `pooled` as in `Synchronizer.merge`."""
    if not parts.is_cpu:
        return torch.cat(_merge_rows(parts, channels, pooled, OVER_RANKS))
    with np.errstate(all="ignore"):  # as torch, which does not warn of what is not finite
        return torch.from_numpy(
            np.concatenate(_merge_rows(parts.numpy(), channels, pooled, HOST_OVER_RANKS))
        )


def _merge_rows(parts: Any, channels: int, pooled: bool, xp: Namespace) -> Moments:
    first = parts.shape[1] - 2 * channels  # 1, or one count for each channel
    means, variances = parts[:, first:-channels], parts[:, -channels:]
    # Mixed-up messages are NaN; as a count, NaN would pass for no rows, and be hidden (S6).
    counts = xp.where(xp.isfinite(parts[:, :first]), parts[:, :first], 1.0)
    combine = merge_averages if pooled else merge_moments
    found = combine(Moments(xp.broadcast_like(counts, means), means, variances), 0, xp)
    return found._replace(count=found.count[:first])


class Participation(NamedTuple):
    """A call's participation: the layer's key, the text that ranks agree on, the channels.

    `varying`: the mask varies along channels, so that each has its own count.
    """

    key: int
    text: str
    channels: int
    varying: bool


def participate(
    synchronizer: Synchronizer, owner: str, layout: Layout, options: Options, varying: bool
) -> Participation | None:
    """The participation of a training call; None where there is no rank to merge with."""
    channels = math.prod(list(layout.channels))
    # Compiled code asks when it runs: it may be traced before there is a group.
    if channels == 0 or not (
        torch.compiler.is_compiling() or synchronizer.has_peers(f"{owner} {synchronizer.name}")
    ):
        return None
    describe = _describe if torch.compiler.is_compiling() else _cached_description
    text = describe(owner, synchronizer.name, channels, options, varying)
    return Participation(synchronizer.key, text, channels, varying)


def _describe(owner: str, name: str, channels: int, options: Options, varying: bool) -> str:
    """The text that all ranks must agree on, for people to read."""
    shown = f"{owner} {name}" if name else owner
    shown = f"{shown} ({channels} channels, eps={options.eps}, decay={options.decay}"
    shown = ", ".join([shown, *describe_agreed(options)])
    return f"{shown}, mask varies along channels)" if varying else f"{shown})"


_cached_description = lru_cache(maxsize=1024)(_describe)


def pack(moments: Moments, varying: bool) -> Tensor:
    """Per-channel float64 moments as one vector; one count for all, unless they vary."""
    count, mean, var = (a.reshape(-1) for a in moments)
    return torch.cat([count if varying else count[:1], mean, var])


def unpack(packed: Tensor, channels: int, shape: tuple[int, ...]) -> Moments:
    """The moments in a vector, each of the given shape of as many values as channels."""
    count = packed[: packed.numel() - 2 * channels].expand(channels)
    mean, var = packed[-2 * channels : -channels], packed[-channels:]
    return Moments(*(a.reshape(shape) for a in (count, mean, var)))


def find_by_key(key: int) -> Synchronizer:
    """The synchronizer of a participation."""
    return _synchronizers[key]


_of_functions: weakref.WeakKeyDictionary[Any, Synchronizer] = weakref.WeakKeyDictionary()


def find_synchronizer(synchronized: Any, group: Any) -> Synchronizer | None:
    """The synchronizer that calls without a layer share, or None; checks both arguments."""
    check_group(config.check_flag("synchronized", synchronized), group)
    if not synchronized:
        return None
    if group is None:
        return _of_default_group
    if group not in _of_functions:
        _of_functions[group] = Synchronizer(group, "", _CALLS)
    return _of_functions[group]


_CALLS = 256  # steps that calls without a layer remember together
_of_default_group = Synchronizer(None, "", _CALLS)
