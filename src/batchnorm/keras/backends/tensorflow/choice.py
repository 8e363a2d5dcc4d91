"""The ordered lists of ways to y, and the choice of one."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import tensorflow as tf

from batchnorm.core.running import Running
from batchnorm.keras.backends.tensorflow import array_code, kernels, one_operation
from batchnorm.keras.backends.tensorflow.step import Step
from batchnorm.kernels import explanation
from batchnorm.kernels.select import find_way


class Way(NamedTuple):
    """A way from a step to y and the statistics after it.

    Attributes:
        name: as people read it.
        refuse: from a step to the reason why it does not serve it, or None.
        run: from a step that it does not refuse to y and the statistics.
    """

    name: str
    refuse: Callable[[Step], str | None]
    run: Callable[[Step], tuple[tf.Tensor, Running]]


KERNELS = Way(explanation.KERNELS, kernels.refuse, kernels.run)
ONE_OPERATION = Way(one_operation.NAME, one_operation.refuse, one_operation.run)
BY_BATCH = Way(explanation.ARRAY_CODE, lambda step: None, array_code.run_by_batch)
BY_RUNNING = Way(explanation.ARRAY_CODE, lambda step: None, array_code.run_by_running)

# The fastest way first.
TRAINING = (KERNELS, BY_BATCH)
EVALUATION = (ONE_OPERATION, BY_RUNNING)


def refuse(way: Way, step: Step) -> str | None:
    """The reason why a way does not serve a step, or None: its own, or what `fused` says."""
    fused = step.call.fused
    if way.name == explanation.ARRAY_CODE:  # which evaluation may take all the same
        return "fused=True demands a kernel" if fused and way is BY_BATCH else None
    return explanation.UNFUSED if fused is False else way.refuse(step)


def run(step: Step, ways: tuple[Way, ...]) -> tuple[tf.Tensor, Running]:
    """y and the statistics after the step, by the first way that serves it.

    Raises:
        ValueError: fused=True, and no kernel serves the step.
    """
    way, refused = find_way(ways, lambda way: refuse(way, step))
    explanation.report(step.call.owner, way.name, refused)
    return way.run(step)
