"""Every tolerance of the conformance table, with its reason."""

from __future__ import annotations

import numpy as np

# S3 for plain array code; the paths below must meet a stricter bound where they can.
PLAIN_FLOAT32 = 5e-5
# S3 for kernels. Eager plain code must meet it too: sums run in blocks and every quantity is
# centred twice, which leaves a few roundings of 6e-8 each, and log2(rows) of them in the sums.
FLOAT32 = 5e-6
# float64 rounds 2**29 times finer than float32; offsets of 1e6 cost no digit that matters here.
FLOAT64 = FLOAT32 / 2**29 * 10
# The oracle rounds to float64 as well, in another order: `naive` gives the difference.
NAIVE = 1e-12

HALF_ULP = {"float16": 2.0**-11, "bfloat16": 2.0**-8, "float32": 2.0**-24, "float64": 2.0**-53}


def naive(x: np.ndarray, eps: float) -> float:
    """The naive path's error, in deviations: it subtracts a mean that is rounded to float64."""
    x = x[np.isfinite(x)]
    if x.size == 0:
        return NAIVE
    return NAIVE + 4 * HALF_ULP["float64"] * np.abs(x).max() / np.hypot(x.std(), np.sqrt(eps))


def output_rounding(dtype: str, values: np.ndarray) -> np.ndarray:
    """The error of one rounding to a half type (S16); subnormals round to a fixed step."""
    if dtype not in ("float16", "bfloat16"):
        return np.zeros_like(values)
    smallest = 2.0**-25 if dtype == "float16" else 0.0
    return HALF_ULP[dtype] * np.abs(values) + smallest
