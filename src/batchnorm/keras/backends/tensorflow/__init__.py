"""Normalizing on the TensorFlow backend."""

from batchnorm.keras.backends.tensorflow.kernels import refuse_kernel
from batchnorm.keras.backends.tensorflow.normalize import normalize, read_values, resolve_training
from batchnorm.keras.backends.tensorflow.tracing import (
    RETRACES,
    find_trace,
    follows,
    mark_block,
    repeats,
)

__all__ = [
    "RETRACES",
    "find_trace",
    "follows",
    "mark_block",
    "normalize",
    "read_values",
    "refuse_kernel",
    "repeats",
    "resolve_training",
]
