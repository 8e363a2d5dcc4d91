"""The Keras front end's paths through the table, on this process's backend."""

from __future__ import annotations

from functools import partial
from typing import Any

from batchnorm.verification import keras_backend, tolerances
from batchnorm.verification.comparison import Path
from batchnorm.verification.keras_runs import refuse, run
from cases import Case, Data, Result
from paths import Way

__all__ = ["WAYS", "refuse", "run"]


def refuse_graph(case: Case) -> str | None:
    """The reason why no compiled function holds the case, or None."""
    if keras_backend.NAME == "torch":
        return "Keras runs torch eagerly"
    return refuse(case)


def run_by_kernels(case: Case, data: Data, **options: Any) -> Result:
    """Run a case by kernels where they serve it, also where array code would be faster."""
    try:
        return run(case, data, fused=True, **options)
    except ValueError as error:
        if "demands a kernel" not in str(error) and "cannot be combined" not in str(error):
            raise
        return run(case, data, **options)


# XLA compiles each case for itself: a sample that holds every mode, option and hard data.
_XLA = (
    "1d_signal-half",
    "two_axes-channelwise",
    "ghost2-half_samples-train",
    "renorm_clipped-none-train",
    "renorm_ghost-half_samples-train",
    "adjusted-half-train",
    "bfloat16-half-train",
    "bfloat16-half-eval",
    "train-offset1e6-half",
    "train-offset1e6-none",
    "eval-offset1e6-half",
    "offset1e6-renorm",
    "train-huge-none",
    "nan_padding-plain-train",
    "nan_padding-zeroed-train",
    "nan_padding-zeroed-eval",
    "zeroed-2d_last-half-eval",
    "zeroed-bfloat16-frozen",
    "frozen-half",
    "debias-half",
    "no_update-half",
    "passes3-half",
    "late_limits-half",
)
_COMPILES = keras_backend.NAME == "jax"  # operations one by one, in eager code too


def _path(tolerance: float = tolerances.FLOAT32, **options: Any) -> Path:
    return Path(partial(run, **options), False, tolerance)


_ARRAYS = partial(_path, tolerances.PLAIN_FLOAT32, fused=False)
WAYS = {
    "keras": Way(_path(), refuse, costly=_COMPILES, sister="keras-graph"),
    "keras-arrays": Way(_ARRAYS(), refuse, costly=_COMPILES, sister="keras"),
    "keras-graph": Way(
        Path(partial(run_by_kernels, compiled="graph"), False, tolerances.FLOAT32),
        refuse_graph,
        costly=True,
    ),
    "keras-graph-arrays": Way(
        _ARRAYS(compiled="graph"), refuse_graph, costly=True, sister="keras-graph"
    ),
    "keras-xla": Way(
        _path(tolerances.PLAIN_FLOAT32, compiled="xla"), refuse_graph, costly=True, sample=_XLA
    ),
}
