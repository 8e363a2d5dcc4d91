"""These tests need four devices: tests/jax/test_synchronization.py starts a process with them."""

from __future__ import annotations

import os

if "device_count=4" not in os.environ.get("XLA_FLAGS", ""):
    collect_ignore_glob = ["test_*.py"]
