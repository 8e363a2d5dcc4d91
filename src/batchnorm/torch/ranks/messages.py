"""Messages between the ranks of a process group: all ranks get each of them, or all raise.

gloo ends the process where ranks enter a collective with messages of different sizes, and pairs
collectives by their order alone. So with gloo every rank sends its message to every other, under
a tag made from a text that says what is exchanged: messages of different texts are never paired,
and after the group's timeout the error names the rank that has sent nothing. Other backends run
one collective. Each message then begins with a word made from the text; if words differ, the
result is NaN.
"""

from __future__ import annotations

import time
import weakref
import zlib
from collections.abc import Callable
from datetime import timedelta
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from batchnorm.torch.namespace import OVER_RANKS

__all__ = ["Expected", "Peers", "SynchronizationError", "find_peers"]

_TEXT = 512  # bytes of a text that ranks compare; longer ones are cut
_WORD = 2**14  # k ranks' words and their squares add up exactly in float64, up to k = 4096


class SynchronizationError(RuntimeError):
    """A synchronized layer could not merge its statistics, or gradients, with other ranks.

    The message names the layer, the group and what was waited for. The running statistics are as
    before the call. The group is not usable afterwards: end the process, or make a new group.
    """


class Expected(NamedTuple):
    """Messages that other ranks may send by now."""

    peers: Peers
    parts: Tensor
    tag: int
    timeout: float
    works: list[tuple[int, Any]]


class Peers:
    """A process group of several ranks, as synchronized layers see it."""

    def __init__(self, group: Any) -> None:
        # Weakly: a destroyed group closes its connections, which tells the others.
        self._group = weakref.ref(group)
        self.rank: int = dist.get_rank(group)
        self.size: int = dist.get_world_size(group)
        self._ranks = dist.get_process_group_ranks(group)
        self._backend = str(dist.get_backend(group))
        self._others = [(self.rank + i) % self.size for i in range(1, self.size)]
        self._agreed: set[str] = set()
        self._sequence = 0

    def __str__(self) -> str:
        shown = ", ".join(map(str, self._ranks[:8])) + (", ..." if self.size > 8 else "")
        return f"process group of {self.size} ranks ({shown}; {self._backend})"

    def gather(
        self, message: Tensor, text: str, waiting: str, expected: Expected | None = None
    ) -> Tensor:
        """The messages of all ranks, one row each, in the order of ranks.

        Args:
            message: float64, of one axis, of the same size on every rank with this text.
            text: says what is exchanged; messages of different texts are not paired.
            waiting: the layer and pass that wait, for errors.
            expected: from `expect`, if that was asked.

        Raises:
            SynchronizationError: a rank failed, or sent nothing with this text in time.
        """
        if expected is None:
            expected = self.expect(message.numel(), text, message.device)
        if expected is not None:
            return self.receive(expected, message, waiting)
        word = float(_word(self._next(text)))
        sent = torch.cat([message.new_tensor([word]), message])
        parts = sent.new_empty(self.size * sent.numel())
        self._run(_all_gather, (parts, sent), waiting)
        parts = parts.reshape(self.size, -1)
        return torch.where((parts[:, 0] == word).all(), parts[:, 1:], torch.nan)

    def total(
        self, message: Tensor, text: str, waiting: str, expected: Expected | None = None
    ) -> Tensor:
        """The sum of all ranks' messages, the same bits on every rank; otherwise as `gather`."""
        if expected is None:
            expected = self.expect(message.numel(), text, message.device)
        if expected is not None:
            parts = self.receive(expected, message, waiting)
            return OVER_RANKS.sum(parts, axis=(0,), keepdims=False)
        word = float(_word(self._next(text)))
        sent = torch.cat([message.new_tensor([word, word * word]), message])
        self._run(dist.all_reduce, (sent,), waiting)
        # Cauchy and Schwarz: equal only if all words are.
        same = sent[0] * sent[0] == self.size * sent[1]
        return torch.where(same, sent[2:], torch.nan)

    def agree(self, text: str, waiting: str, device: torch.device) -> None:
        """Raise unless all ranks give the same text here; ask once for each text."""
        if text in self._agreed:
            return
        shown = bytearray(text.encode()[:_TEXT].ljust(_TEXT))
        sent = torch.frombuffer(shown, dtype=torch.uint8).to(device, torch.float64)
        found = self.gather(sent, "agreement", waiting).nan_to_num(63.0).to(torch.uint8).cpu()
        texts = [bytes(row.tolist()).decode(errors="replace").rstrip() for row in found]
        if len(set(texts)) > 1:
            listed = "; ".join(f"rank {r}: {t}" for r, t in zip(self._ranks, texts, strict=True))
            raise SynchronizationError(
                f"{waiting}: the ranks of the {self} do not agree on layer and options: {listed}. "
                "All ranks must call the same synchronized layers in the same order, with the "
                "same channels and options. Layers are told apart by the order in which they were "
                "made, or by name after convert_batchnorm(model, synchronized=True)."
            )
        self._agreed.add(text)

    def _next(self, text: str) -> str:
        """A text that no other exchange of the group has."""
        self._sequence += 1
        return f"{self._sequence} {text}"

    def _backend_on(self, device: torch.device) -> Any:
        group = self._group()
        assert group is not None  # whoever holds Peers has found them by their group
        return group._get_backend(device)

    def _run(self, collective: Callable[..., Any], tensors: tuple[Tensor, ...], text: str) -> None:
        try:
            collective(*tensors, group=self._group())
        except (RuntimeError, ValueError) as error:
            raise self._failure(text, None, error) from error

    def expect(self, size: int, text: str, device: torch.device) -> Expected | None:
        """Announce a `gather` of so many numbers, the next exchange of this group.

        With gloo, others then send theirs without waiting for this rank. Costs nothing where
        something is computed between the two.
        """
        backend = self._backend_on(device)
        if backend.name() != "gloo":
            return None
        tag = zlib.crc32(self._next(text).encode()) & 0x7FFFFFFF
        parts = torch.empty((self.size, size), dtype=torch.float64)
        expected = Expected(self, parts, tag, backend.options._timeout.total_seconds(), [])
        for peer in self._others:
            expected.works.append((peer, _begin(backend.recv, parts[peer], peer, tag)))
        return expected

    def receive(self, expected: Expected, message: Tensor, waiting: str) -> Tensor:
        """Send the message to all, and wait for theirs."""
        deadline = time.monotonic() + expected.timeout
        self.send(expected, message)
        peer = self.rank
        try:
            for other, work in expected.works:
                peer = other  # whom an error names
                work.wait(timedelta(seconds=max(deadline - time.monotonic(), 0.001)))
        except RuntimeError as error:
            raise self._failure(waiting, peer, error) from error
        return expected.parts.to(message.device)

    def send(self, expected: Expected, message: Tensor) -> None:
        """Send the message to all; what fails is raised by `receive`."""
        # Its memory is in use until the last one has it, and is kept with theirs.
        expected.parts[self.rank] = message.cpu()
        sent, backend = expected.parts[self.rank], self._backend_on(message.device)
        for peer in self._others:
            expected.works.append((peer, _begin(backend.send, sent, peer, expected.tag)))

    def _failure(self, waiting: str, peer: int | None, error: Exception) -> SynchronizationError:
        whom = "the other ranks" if peer is None else f"rank {self._ranks[peer]}"
        return SynchronizationError(
            f"{waiting}: waited for {whom} of the {self}; rank {self._ranks[self.rank]} is this "
            "one. Either it has failed, or it did not run this layer here: all ranks run all "
            "synchronized layers, forward and backward, in the same order, mode and options; a "
            f"rank without data passes an empty batch. Reported: {error}"
        )


class _Lost(NamedTuple):
    """A message that could not be begun."""

    error: RuntimeError

    def wait(self, timeout: timedelta) -> None:
        raise self.error


def _begin(exchange: Callable[..., Any], message: Tensor, peer: int, tag: int) -> Any:
    """Begin to send or to receive a message.

    Where that fails, the other messages still go their way: a rank that gets none of them would
    name this one, and not the one that has failed.
    """
    try:
        return exchange([message], peer, tag)
    except RuntimeError as error:
        return _Lost(error)


# The older name gives a FutureWarning from torch 2.13 on.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_known: weakref.WeakKeyDictionary[Any, Peers] = weakref.WeakKeyDictionary()


def find_peers(group: Any) -> Peers | None:
    """The ranks of a process group, None for the default one; None where this rank is alone.

    Raises:
        LookupError: there is no such group, or no longer.
    """
    if not dist.is_available() or not dist.is_initialized():
        raise LookupError("the default process group is gone, or was never made")
    group = dist.group.WORLD if group is None else group
    try:
        dist.get_backend(group)
    except ValueError as error:
        raise LookupError("its process group is gone: it has been destroyed") from error
    peers = _known.get(group)
    if peers is None:
        peers = _known[group] = Peers(group)
    return peers if peers.size > 1 else None


def _word(text: str) -> int:
    return zlib.crc32(text.encode()) % _WORD
