"""The compiler and the devices that run TensorFlow's operations."""

from __future__ import annotations

import tensorflow as tf

from batchnorm.keras.private import in_xla_graph


def is_compiled() -> bool:
    """True while a function is traced for XLA."""
    return in_xla_graph(tf.compat.v1.get_default_graph())


def find_accelerator() -> str | None:
    """The type of a device beside the CPU, on which TensorFlow may place a tensor."""
    kinds = (device.device_type for device in tf.config.list_logical_devices())
    return next((kind for kind in kinds if kind != "CPU"), None)
