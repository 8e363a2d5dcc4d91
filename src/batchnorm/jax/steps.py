"""A call from its arguments to y: checked, and sent the first way that serves it."""

from __future__ import annotations

from jax import Array

from batchnorm.jax.call import Arrays, Settings, make_call
from batchnorm.jax.ways import Step, choose


def normalize_batch(arrays: Arrays, settings: Settings, *, update: bool = True) -> Step:
    """Normalize by the batch's own statistics (training).

    `update`: compute `Step.running`, which is what came in otherwise.
    """
    call = make_call(arrays, settings, training=True, update=update)
    return choose(call).train(call)


def normalize_running(arrays: Arrays, settings: Settings) -> Array:
    """Normalize by the running statistics (evaluation).

    XLA fuses array code with what surrounds it, so that kernels are used on demand only.
    """
    call = make_call(arrays, settings, training=False, update=False)
    return choose(call).evaluate(call)
