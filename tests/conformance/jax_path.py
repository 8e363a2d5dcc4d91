"""The JAX front end's paths through the table."""

from __future__ import annotations

from functools import partial

from batchnorm.verification import tolerances
from batchnorm.verification.comparison import Path
from batchnorm.verification.jax_runs import refuse, refuse_kernel, run
from paths import Way

__all__ = ["WAYS", "run"]

WAYS = {
    "jax-arrays": Way(
        Path(partial(run, fused=False), False, tolerances.FLOAT32), refuse, costly=True
    ),
    "jax-kernels": Way(
        Path(partial(run, fused=True), False, tolerances.FLOAT32), refuse_kernel, costly=True
    ),
}
