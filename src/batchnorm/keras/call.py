"""The record of a call, from a layer to its backend."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from batchnorm.core.config import Adjustment, Options


@dataclass(frozen=True)
class Call:
    """Everything about a call but its arrays.

    Attributes:
        owner: the layer's class, for explanations.
        axes: channel axes, sorted, not negative.
        options: in the core's terms.
        training: a bool, or a 0-d tensor whose value is not known yet.
        adjustment: function of x's shape, or None (S13).
        fused: None, True or False.
        synchronized: moments are those of all participants (S14).
        axis_name: JAX only, the named axis over which to synchronize.
        process_group: torch only, the ranks to synchronize with.
        update: the statistics may move; False where it is known that they do not (S20).
        limits: of renormalization, an array of shape (3,), rmin, rmax and dmax, where compiled
            steps take them as data; None for those in the options (S11).
    """

    owner: str
    axes: tuple[int, ...]
    options: Options
    training: Any
    adjustment: Adjustment | None = None
    fused: bool | None = None
    synchronized: bool = False
    axis_name: Any = None
    process_group: Any = None
    update: bool = True
    limits: Any = None
