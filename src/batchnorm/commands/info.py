"""`batchnorm info`."""

from __future__ import annotations


def info() -> None:
    """Print versions and the kernels in use, for bug reports."""
    from batchnorm.environment import show_config

    show_config()
