"""Processes of Keras: workers of tf.distribute, or ranks of torch.distributed."""

from __future__ import annotations

import json
import os
import socket
import warnings
from contextlib import ExitStack, closing
from typing import Any

from cases import Case, Data, Result
from processes import World


def make_tensorflow_world(size: int) -> World:
    return World(size, start_tensorflow, stop_tensorflow, fresh=True)


def start_tensorflow(rank: int, size: int, address: list[int] | None, timeout: None) -> list[int]:
    """Learn the ports of all workers, which the first one chooses; `join` then connects them."""
    ports = _free_ports(size) if address is None else address
    os.environ |= {
        "KERAS_BACKEND": "tensorflow",
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "TF_CONFIG": json.dumps(
            {
                "cluster": {"worker": [f"127.0.0.1:{port}" for port in ports]},
                "task": {"type": "worker", "index": rank},
            }
        ),
    }
    return ports


def join_tensorflow() -> None:
    import tensorflow as tf

    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(2)
    _inside.enter_context(tf.distribute.MultiWorkerMirroredStrategy().scope())


def stop_tensorflow() -> None:
    """Do nothing: other workers may be gone already, and the process ends anyway."""


def make_torch_world(size: int) -> World:
    import torch_world  # only here and below: TensorFlow's processes do without torch

    return World(size, start_torch, torch_world.stop, torch_world.PATIENCE)


def start_torch(rank: int, size: int, address: int | None, timeout: float) -> int:
    import torch_world

    os.environ["KERAS_BACKEND"] = "torch"
    return torch_world.start(rank, size, address, timeout)


def run(case: Case, data: Data) -> Result:
    import keras_path

    # Keras 3.15's variables, under NumPy 2.
    warnings.filterwarnings("ignore", "__array__ implementation doesn't", DeprecationWarning)
    return keras_path.run(case, data, synchronized=True)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as held:
        sockets = [held.enter_context(closing(socket.socket())) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


_inside: Any = ExitStack()  # of the strategy's scope, for as long as the process runs
