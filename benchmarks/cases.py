"""What is measured: shapes for speed, offsets for accuracy."""

from __future__ import annotations

SHAPES: dict[str, tuple[int, ...]] = {
    "(262144, 64)": (262144, 64),
    "(32, 64, 56, 56)": (32, 64, 56, 56),
    "(4096, 64)": (4096, 64),
    "(32, 64)": (32, 64),
}
OFFSETS = (0.0, 1e2, 1e4, 1e6)
