"""Tries an installed wheel where there may be no framework: its kernels load and compute.

Normalizes a masked batch on every instruction set of the machine and on several threads, and
compares the outputs with the float64 reference, and with each other to the bit.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

import batchnorm
from batchnorm.kernels import extension

ROWS, CHANNELS = 40_000, 48


def normalize(x: np.ndarray[Any, Any], mask: np.ndarray[Any, Any], threads: int) -> Any:
    """The batch norm of rows by the compiled passes."""
    from batchnorm.kernels._cpu import TYPES, Plan

    sizes = {"outer": ROWS, "channels": CHANNELS, "inner": 1, "groups": 1, "run": 1}
    plan = Plan(type=TYPES["float32"], **sizes, row=CHANNELS, activation=0, zero_padding=True)
    plan.set_mask(width=1, repeat=1, outer=1, inner=0)
    y = np.full_like(x, np.nan)
    plan.forward(
        x=x.ctypes.data,
        mask=mask.ctypes.data,
        y=y.ctypes.data,
        residual=0,
        residual_row=0,
        state=extension.State(),
        eps=1e-5,
        decay=0.9,
        batch=True,
        update=False,
        unbiased=False,
        renorm=None,
        threads=threads,
        kept=None,
    )
    return y


def main() -> int:
    """1 if there are no kernels, or wrong ones."""
    if extension.missing_reason() is not None:
        print(f"try-wheel: {extension.missing_reason()}")
        return 1
    random = np.random.default_rng(0)
    x = (1000 + random.standard_normal((ROWS, CHANNELS))).astype(np.float32)
    mask = random.random(ROWS) < 0.7
    expected = np.asarray(batchnorm.batch_norm(x, mask=mask, eps=1e-5)[0])
    first = normalize(x, mask, 1)
    error = float(np.abs(first - expected)[mask].max())
    same = []
    for name in ("baseline", "avx2", "avx512"):
        try:
            extension.use_instructions(name)
        except ValueError:  # another machine's
            continue
        same += [np.array_equal(normalize(x, mask, threads), first) for threads in (1, 4)]
    print(f"try-wheel: {len(same)} runs, error {error:.1e}, the same bits: {all(same)}")
    return int(not (error < 2e-6 and all(same) and not first[~mask].any()))


if __name__ == "__main__":
    sys.exit(main())
