"""Batch normalization for Keras 3: layers with masks, on the TensorFlow, JAX and torch backends."""

try:
    import keras
except ImportError as error:
    raise ImportError(
        f"batchnorm.keras needs Keras 3 and its backend, but {error.name or error} is missing; "
        "install it with: pip install 'batchnorm[keras]', and one of tensorflow, jax and torch"
    ) from error
else:
    from batchnorm.core.versions import check_version

    check_version("batchnorm.keras", "keras", keras.__version__)

from batchnorm.core.conversion import Conversion
from batchnorm.keras.accumulating import accumulate_statistics
from batchnorm.keras.convert import convert_batchnorm
from batchnorm.keras.files import load_weights
from batchnorm.keras.finding import DroppedMask, find_dropped_masks
from batchnorm.keras.layers import BatchNormalization, SyncBatchNormalization
from batchnorm.keras.lengths import sequence_mask
from batchnorm.keras.masked import MaskedBatchNormalization
from batchnorm.keras.masking import padding_mask
from batchnorm.keras.moving import keep_statistics
from batchnorm.keras.remask import Remask

__all__ = [
    "BatchNormalization",
    "Conversion",
    "DroppedMask",
    "MaskedBatchNormalization",
    "Remask",
    "SyncBatchNormalization",
    "accumulate_statistics",
    "convert_batchnorm",
    "find_dropped_masks",
    "keep_statistics",
    "load_weights",
    "padding_mask",
    "sequence_mask",
]
