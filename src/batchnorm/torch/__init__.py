"""Batch normalization for PyTorch: drop-in layers, a function, and conversion of whole models."""

try:
    import torch
except ImportError as error:
    raise ImportError(
        "batchnorm.torch needs PyTorch, which is not installed; "
        "install it with: pip install 'batchnorm[torch]'"
    ) from error
else:
    from batchnorm.core.versions import check_version

    check_version("batchnorm.torch", "torch", str(torch.__version__))

from batchnorm.core.conversion import Conversion
from batchnorm.torch.accumulation import accumulate_statistics
from batchnorm.torch.conversions import register_conversion
from batchnorm.torch.convert import convert_batchnorm, revert_batchnorm
from batchnorm.torch.functional import RenormStatistics, batch_norm
from batchnorm.torch.keeping import keep_statistics
from batchnorm.torch.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.torch.masking import padding_mask, sequence_mask
from batchnorm.torch.ranks.messages import SynchronizationError

__all__ = [
    "BatchNorm",
    "BatchNorm1d",
    "BatchNorm2d",
    "BatchNorm3d",
    "Conversion",
    "RenormStatistics",
    "SynchronizationError",
    "accumulate_statistics",
    "batch_norm",
    "convert_batchnorm",
    "keep_statistics",
    "padding_mask",
    "register_conversion",
    "revert_batchnorm",
    "sequence_mask",
]
