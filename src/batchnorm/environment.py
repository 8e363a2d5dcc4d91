"""The installed versions, and the kernels in use."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__", "show_config"]

_PACKAGES = ("batchnorm", "numpy", "torch", "jax", "flax", "keras", "tensorflow", "tensorflow-cpu")

try:
    __version__ = version("batchnorm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def show_config() -> None:
    """Print versions and the kernels in use; imports no framework."""
    from batchnorm.kernels.select import extension_status, triton_status
    from batchnorm.memory import describe_memory

    print(f"python      {platform.python_version()} ({platform.machine()}, {platform.system()})")
    for name in _PACKAGES:
        try:
            print(f"{name:<11} {version(name)}")
        except PackageNotFoundError:
            if name != "tensorflow-cpu":
                print(f"{name:<11} not installed")
    status = extension_status()
    kernels = status.reason if status.kernel else f"plain array code: {status.reason}"
    print(f"kernels     {kernels}")
    print(f"outputs     {describe_memory()}")
    gpu = triton_status()
    print(f"on GPUs     {gpu.reason if gpu.kernel else f'plain array code: {gpu.reason}'}")
