"""Names of `extension`, `geometry` and `kept` together, for the torch front end."""

from batchnorm.kernels.extension import find_team, make_plan, missing_reason, warn_if_missing
from batchnorm.kernels.geometry import (
    Geometry,
    MaskView,
    dense_strides,
    find_geometry,
    row_distance,
    view_mask,
)
from batchnorm.kernels.kept import STATISTICS, TYPES

__all__ = [
    "STATISTICS",
    "TYPES",
    "Geometry",
    "MaskView",
    "dense_strides",
    "find_geometry",
    "find_team",
    "make_plan",
    "missing_reason",
    "row_distance",
    "view_mask",
    "warn_if_missing",
]
