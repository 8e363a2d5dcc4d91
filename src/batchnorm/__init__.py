"""Batch normalization, exact on padded batches, for PyTorch, JAX and Keras.

This module holds the float64 reference functions and imports no framework. The layers live in
`batchnorm.torch`.
"""

from importlib.metadata import PackageNotFoundError, version

from batchnorm.core.moments import Moments
from batchnorm.environment import show_config
from batchnorm.reference import batch_norm, batch_norm_gradient

try:
    __version__ = version("batchnorm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["Moments", "__version__", "batch_norm", "batch_norm_gradient", "show_config"]
