"""The installed versions, and the kernels in use."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, version

__all__ = ["__version__", "show_config"]

_PACKAGES = ("batchnorm", "numpy", "torch", "jax", "flax", "keras", "tensorflow", "tensorflow-cpu")

try:
    __version__ = version("batchnorm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def find_versions() -> dict[str, str]:
    """The versions of Python and of the packages that matter; imports none of them."""
    found = {"python": f"{platform.python_version()} ({platform.machine()}, {platform.system()})"}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            if name != "tensorflow-cpu":
                found[name] = "not installed"
    return found


def show_config() -> None:
    """Print versions and the kernels in use; imports no framework."""
    from batchnorm.kernels.select import extension_status, triton_status
    from batchnorm.memory import describe_memory

    for name, number in find_versions().items():
        print(f"{name:<11} {number}")
    status = extension_status()
    kernels = status.reason if status.kernel else f"plain array code: {status.reason}"
    print(f"kernels     {kernels}")
    print(f"outputs     {describe_memory()}")
    gpu = triton_status()
    print(f"on GPUs     {gpu.reason if gpu.kernel else f'plain array code: {gpu.reason}'}")
    for line in _describe_proofs():
        print(f"proofs      {line}")


def _describe_proofs() -> list[str]:
    """The verdicts about the GPU's kernels: this process's, and those in the cache."""
    from batchnorm.kernels import proofs

    loaded = sys.modules.get("batchnorm.torch.ways.proof")
    here = [] if loaded is None else loaded.PROOFS.describe_known()
    setting = proofs.find_setting()
    said = [f"BATCHNORM_PROOF={setting}"] if setting else []
    return list(dict.fromkeys([*said, *here, *proofs.describe_known()])) or ["none yet"]
