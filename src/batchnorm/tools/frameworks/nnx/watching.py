"""flax nnx's batch norm, and this library's, watched through their class.

A transformation such as `jit`, `scan` or `vmap` makes new objects of the same layers, and gives
them tracers. So every watched layer gets a number, in an array beside its statistics:
transformations pass it on and slice it like these. A callback receives the number and the values.
"""

from __future__ import annotations

import functools
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from batchnorm.core.errors import naming
from batchnorm.core.layout import make_layout, normalize_axis
from batchnorm.core.moments import Moments
from batchnorm.tools.frameworks.nnx.stacked import module_of, stack_of
from batchnorm.tools.frameworks.records import FoundLayer, Observation
from batchnorm.tools.measure import measure

_NUMBER = "_watched_number"
_lock = threading.RLock()  # classes belong to all threads
_numbers = itertools.count()
# By number, since compiled code outlives the watch that it was traced for.
_watched: dict[int, tuple[FoundLayer, Callable[[Observation], None]]] = {}
_failures: list[BaseException] = []


@contextmanager
def watch(layers: Sequence[FoundLayer], see: Callable[[Observation], None]) -> Iterator[None]:
    """As `Adapter.watch`. Python looks up `__call__` in the class, so the class is changed."""
    modules = {id(module): module for module in (module_of(found.layer) for found in layers)}
    with _lock, ExitStack() as stack:
        for module in modules.values():
            slices = [found for found in layers if module_of(found.layer) is module]
            stack.enter_context(_number(module, slices, see))
        # Subclasses that call their parent's method are seen once, by the outer one.
        running: set[int] = set()
        for cls in {type(module) for module in modules.values()}:
            stack.enter_context(_watch_class(cls, running))
        yield
        settle()


def settle() -> None:
    """Wait until all calls so far have been seen, and raise what `see` raised."""
    jax.effects_barrier()
    if _failures:
        failure = _failures[0]
        _failures.clear()
        raise failure


@contextmanager
def _number(
    module: Any, slices: Sequence[FoundLayer], see: Callable[[Observation], None]
) -> Iterator[None]:
    """Give a module the numbers of its layers, in the type of its statistics."""
    stack = stack_of(module)
    numbers = np.array([next(_numbers) for _ in range(math.prod(stack))]).reshape(stack)
    for found in slices:
        index = getattr(found.layer, "index", ()) if stack else ()
        _watched[int(numbers[index])] = found, see
    setattr(module, _NUMBER, nnx.BatchStat(jnp.asarray(numbers, jnp.int32)))
    try:
        yield
    finally:
        delattr(module, _NUMBER)
        for number in numbers.flat:
            _watched.pop(int(number), None)
        _failures.clear()


@contextmanager
def _watch_class(cls: Any, running: set[int]) -> Iterator[None]:
    original = cls.__call__
    thread = threading.get_ident()

    @functools.wraps(original)
    def call(layer: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        number = getattr(layer, _NUMBER, None)
        if number is None or threading.get_ident() != thread or id(layer) in running:
            return original(layer, x, *args, **kwargs)
        running.add(id(layer))
        try:
            _show(layer, number[...], x, kwargs.get("mask"))
            return original(layer, x, *args, **kwargs)
        finally:
            running.discard(id(layer))

    with replace_call(cls, call):
        yield


@contextmanager
def replace_call(cls: Any, call: Any) -> Iterator[None]:
    """Put a function in the place of a class's `__call__`."""
    own = cls.__dict__.get("__call__")
    cls.__call__ = call
    try:
        yield
    finally:
        if own is None:
            del cls.__call__
        else:
            cls.__call__ = own


def _show(layer: Any, number: Any, x: Any, mask: Any) -> None:
    """Call `see` with a layer's input: now, or when traced code runs."""
    x, owner = jnp.asarray(x), type(layer).__name__
    if number.ndim:
        raise ValueError(
            f"{owner}: the layer is several, stacked as {' x '.join(map(str, number.shape))}; run "
            "it under nnx.scan or nnx.vmap, as the model does in training."
        )
    with naming(owner):
        axes = normalize_axis(layer.axis, x.ndim)
        if mask is not None:
            mask = jnp.asarray(mask) != 0
            mask = mask.reshape(make_layout(x.shape, axes).mask_shape(mask.shape))
    arrays = (x,) if mask is None else (x, mask)
    if not any(isinstance(array, jax.core.Tracer) for array in (number, *arrays)):
        found, see = _watched[int(number)]
        see(Observation(found, x, mask, axes, _measure))
        return
    jax.debug.callback(functools.partial(_receive, axes), number, *arrays)


def _receive(axes: tuple[int, ...], number: Any, x: Any, mask: Any = None) -> None:
    """The callback; it runs in a thread of JAX's, where an exception would only be logged."""
    if int(number) not in _watched:
        return
    found, see = _watched[int(number)]
    try:
        see(Observation(found, x, mask, axes, _measure))
    except BaseException as error:
        _failures.append(error)


def _measure(x: Any, mask: Any, axes: tuple[int, ...]) -> Moments:
    return measure(np.asarray(x), None if mask is None else np.asarray(mask), axes)
