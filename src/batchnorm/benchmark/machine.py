"""The machine and the versions behind figures."""

from __future__ import annotations

import os
import platform
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

from batchnorm.kernels import extension

__all__ = ["count_cores", "describe_machine", "describe_versions"]

_HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def count_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(threads: int) -> dict[str, Any]:
    """Processor, cores, instruction set, huge pages, threads."""
    return {
        "processor": _processor(),
        "architecture": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "threads": threads,
        "instructions": extension.instructions(),
        "transparent huge pages": _huge_pages(),
    }


def describe_versions(*names: str) -> dict[str, str]:
    """Versions of Python, this library, numpy and other distributions whose speed enters."""
    packages = {name: version(name) for name in ("batchnorm", "numpy", *names)}
    return {"python": platform.python_version()} | packages


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor()
    found = re.search(r"^model name\s*:\s*(.+)$", text, flags=re.MULTILINE)
    return found[1].strip() if found else platform.processor()


def _huge_pages() -> str:
    try:
        found = re.search(r"\[(\w+)\]", _HUGE_PAGES.read_text())
    except OSError:
        return "none"
    return found[1] if found else "unknown"
