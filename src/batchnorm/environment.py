"""The installed versions, and the kernels in use."""

from __future__ import annotations

import platform
import sys
from importlib.metadata import PackageNotFoundError, packages_distributions, version
from importlib.util import find_spec
from typing import Any

__all__ = ["__version__", "find_config", "find_version", "show_config"]

_PACKAGES = ("batchnorm", "numpy", "torch", "jax", "flax", "keras", "tensorflow")
# The packages that bring tensorflow, the usual ones.
_TENSORFLOW = (
    *("tensorflow", "tensorflow-cpu", "tensorflow-intel", "tensorflow-macos"),
    *("tensorflow-rocm", "tensorflow-cpu-aws", "intel-tensorflow", "tf-nightly", "tf-nightly-cpu"),
)

try:
    __version__ = version("batchnorm")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"


def find_version(name: str) -> str | None:
    """The installed version of a package; None if it is not installed.

    "tensorflow" is found under each name that it is distributed by, which then stands behind the
    version: "2.21.0 (tensorflow-cpu)".
    """
    for package in _TENSORFLOW if name == "tensorflow" else (name,):
        try:
            return _describe(name, package)
        except PackageNotFoundError:
            continue
    if name == "tensorflow" and find_spec(name) is not None:
        packages = packages_distributions().get(name)  # reads every installed package's files
        return _describe(name, packages[0]) if packages else "of unknown version"
    return None


def _describe(name: str, package: str) -> str:
    return version(package) if package == name else f"{version(package)} ({package})"


def find_config() -> dict[str, Any]:
    """The versions and kernels as data; imports no framework.

    Returns:
        `{"python", "machine", "system", "packages", "kernels", "gpu_kernels", "outputs",
        "proofs"}`.
        "packages" has a version or None by name. The kernels have "name", or None where array code
        replaces them, and "reason". "outputs" says how much memory is kept for outputs, "proofs"
        lists the verdicts about the GPU's kernels.
    """
    from batchnorm.kernels.select import extension_status
    from batchnorm.memory import describe_memory

    return {
        "python": platform.python_version(),
        "machine": platform.machine(),
        "system": platform.system(),
        "packages": {name: find_version(name) for name in _PACKAGES},
        "kernels": _name_and_reason(*extension_status()),
        "gpu_kernels": _name_and_reason(*_describe_gpu_kernels()),
        "outputs": describe_memory(),
        "proofs": _describe_proofs(),
    }


def _name_and_reason(name: str | None, reason: str) -> dict[str, str | None]:
    return {"name": name, "reason": reason}


def show_config() -> None:
    """Print versions and the kernels in use, aligned; imports no framework."""
    found = find_config()
    rows = {"python": f"{found['python']} ({found['machine']}, {found['system']})"}
    rows |= {name: number or "not installed" for name, number in found["packages"].items()}
    for label, kernels in (("kernels", found["kernels"]), ("on GPUs", found["gpu_kernels"])):
        replaced = "" if kernels["name"] else "plain array code: "
        rows[label] = f"{replaced}{kernels['reason']}"
    rows["outputs"] = found["outputs"]
    lines = [*rows.items(), *(("proofs", line) for line in found["proofs"])]
    width = max(map(len, rows))
    print("\n".join(f"{label:<{width}}  {text}" for label, text in lines))


def _describe_proofs() -> list[str]:
    """The verdicts about the GPU's kernels: this process's, and those in the cache."""
    from batchnorm.kernels import proofs

    loaded = sys.modules.get("batchnorm.torch.ways.proof")
    here = [] if loaded is None else loaded.PROOFS.describe_known()
    setting = proofs.find_setting()
    said = [f"BATCHNORM_PROOF={setting}"] if setting else []
    return list(dict.fromkeys([*said, *here, *proofs.describe_known()])) or ["none yet"]


def _describe_gpu_kernels() -> tuple[str | None, str]:
    """The name and the reason of `triton_status`, with the schedule if it is not the default."""
    from batchnorm.kernels.schedules import SCHEDULE
    from batchnorm.kernels.select import triton_status

    name, reason = triton_status()
    return name, f"{reason}, visits where they suit" if name and SCHEDULE.visits else reason
