"""Reasons against kernels that are known before a call, and the moments of a pass."""

from __future__ import annotations

from typing import Any

from batchnorm.core.accumulate import contribution
from batchnorm.core.config import Options
from batchnorm.core.forward import average_of
from batchnorm.core.layout import Layout
from batchnorm.core.merge import Parts
from batchnorm.core.moments import centre
from batchnorm.core.namespace import Namespace
from batchnorm.keras.call import Call
from batchnorm.keras.options import refuse_options
from batchnorm.kernels.select import extension_status

__all__ = ["ONE_PARTICIPANT", "list_limits", "measure_parts", "refuse_apart", "refuse_calls"]

ONE_PARTICIPANT = (
    "accumulate_statistics takes the passes of one process and device; got several replicas or "
    "ranks. Leave it out there."
)


def refuse_calls(call: Call) -> str | None:
    """The reason why no kernel serves calls with these options here, or None."""
    status = extension_status()
    return status.reason if status.kernel is None else refuse_options(call)


def refuse_apart(axes: tuple[int, ...], rank: int | None) -> str | None:
    """The reason against channel axes, which a known rank has made final, or None."""
    if rank is not None and axes[-1] - axes[0] != len(axes) - 1:
        return f"channel axes {axes} are apart in memory"
    return None


def list_limits(options: Options) -> list[float]:
    """The limits of renormalization, in the order of Renorm: rmin, rmax, dmax."""
    assert options.renorm is not None
    return [options.renorm.rmin, options.renorm.rmax, options.renorm.dmax]


def measure_parts(x: Any, mask: Any, layout: Layout, options: Options, xp: Namespace) -> Parts:
    """The moments of a pass as its step takes them, each of shape (1, *channels) (S21).

    x is in the working type, the mask boolean or None.
    """
    view, real = layout.split(x, xp), layout.mask(mask, xp)
    centred = centre(view, real, layout.reduced, eps=options.eps, xp=xp)
    average = average_of(centred, layout, xp)
    unbiased = options.unbiased and options.renorm is None
    parts = contribution(average, layout.groups is not None, unbiased, xp)
    return Parts(*(xp.reshape(a, (1, *layout.channels)) for a in parts))
