"""Normalizing on the TensorFlow backend."""

from batchnorm.keras.backends.tensorflow.arrays import XP
from batchnorm.keras.backends.tensorflow.kernels import refuse_kernel
from batchnorm.keras.backends.tensorflow.normalize import (
    measure,
    normalize,
    read_limits,
    read_values,
    resolve_training,
)
from batchnorm.keras.backends.tensorflow.slot import Slot
from batchnorm.keras.backends.tensorflow.tracing import (
    RETRACES,
    find_graph,
    find_trace,
    follows,
    loses_context,
    mark_block,
    mark_rule,
    obeys,
    repeats,
)

ACCUMULATES = True
LIMITS_ARE_STATE = False  # graphs read them at each call

__all__ = [
    "ACCUMULATES",
    "LIMITS_ARE_STATE",
    "RETRACES",
    "XP",
    "Slot",
    "find_graph",
    "find_trace",
    "follows",
    "loses_context",
    "mark_block",
    "mark_rule",
    "measure",
    "normalize",
    "obeys",
    "read_limits",
    "read_values",
    "refuse_kernel",
    "repeats",
    "resolve_training",
]
