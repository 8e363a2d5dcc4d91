"""Normalizing on the TensorFlow backend."""

from batchnorm.keras.backends.tensorflow.kernels import refuse_kernel
from batchnorm.keras.backends.tensorflow.normalize import normalize, read_values, resolve_training

__all__ = ["normalize", "read_values", "refuse_kernel", "resolve_training"]
