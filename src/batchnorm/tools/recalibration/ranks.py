"""Merging moments over the ranks of torch.distributed (S14)."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from batchnorm.core.moments import Moments
from batchnorm.tools.measure import merge
from batchnorm.torch.devices import has_float64
from batchnorm.torch.ranks.messages import Peers, SynchronizationError, find_peers


def find_ranks(process_group: Any) -> Peers | None:
    """The ranks of a group; None without torch.distributed, or where this process is alone."""
    if process_group is None and not (dist.is_available() and dist.is_initialized()):
        return None
    return find_peers(process_group)


def merge_over_ranks(
    owner: str,
    peers: Peers,
    names: Sequence[str],
    tallies: Sequence[tuple[int, int, Moments]],
    device: torch.device,
) -> list[tuple[int, int, Moments]]:
    """The uses, skipped uses and moments of all ranks together, the same on each of them.

    Args:
        owner: of error messages.
        peers: the ranks.
        names: of the layers, alike on all ranks.
        tallies: uses, skipped uses and moments of each layer on this rank.
        device: a device that the ranks can send from.

    Raises:
        SynchronizationError: a rank has failed, or has other layers.
    """
    counts = [found.mean.size for _, _, found in tallies]
    vector = np.concatenate([[1.0], *(_pack(*tally) for tally in tallies)])
    rows = _gather(owner, peers, names, counts, vector, device)
    failed = [rank for rank, row in enumerate(rows) if row[0] != 1.0]
    if failed:
        raise SynchronizationError(
            f"{owner}: rank {failed[0]} of the {peers} has failed; the statistics are as before "
            "on all ranks."
        )
    merged, begin = [], 1
    for channels in counts:
        parts = rows[:, begin : begin + 2 + 3 * channels]
        begin += 2 + 3 * channels
        moments = [Moments(*np.split(part[2:], 3)) for part in parts]
        merged.append((int(parts[:, 0].sum()), int(parts[:, 1].sum()), merge(moments)))
    return merged


def report_failure(
    owner: str, peers: Peers, names: Sequence[str], counts: Sequence[int], device: torch.device
) -> None:
    """Tell the ranks that wait in `merge_over_ranks` not to wait for this one."""
    vector = np.zeros(1 + sum(2 + 3 * channels for channels in counts))
    _gather(owner, peers, names, counts, vector, device)


def _gather(
    owner: str,
    peers: Peers,
    names: Sequence[str],
    counts: Sequence[int],
    vector: Any,
    device: torch.device,
) -> Any:
    listed = ", ".join(f"{name} ({n})" for name, n in zip(names, counts, strict=True))
    waiting = f"{owner}: merging {len(names)} layers"
    text = f"{owner} of {len(names)} layers, {zlib.crc32(listed.encode()):08x}"
    peers.agree(text, waiting, device)
    return peers.gather(torch.from_numpy(vector).to(device), text, waiting).cpu().numpy()


def _pack(uses: int, skipped: int, moments: Moments) -> Any:
    return np.concatenate([[uses, skipped], *moments])


def device_of(layer: Any) -> torch.device:
    """The device of a layer's statistics, from which its ranks can send; or the host."""
    statistic = getattr(layer, "running_mean", None)
    if statistic is None:  # a Keras layer
        statistic = layer.moving_mean.value
    device = torch.device(statistic.device)
    return device if has_float64(device) else torch.device("cpu")
