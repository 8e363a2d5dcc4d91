"""The active Keras backend's way to normalize."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from importlib import import_module
from typing import Any, Protocol, cast

import keras
import numpy as np

from batchnorm.core.merge import Parts
from batchnorm.core.namespace import Array, Namespace
from batchnorm.core.running import Running
from batchnorm.keras.call import Call
from batchnorm.keras.options import BACKENDS


class Graph(Protocol):
    """A compiled function, while it is traced, that reads values anew at each of its calls.

    Attributes:
        marked: the innermost block opened in it, or None.
        notes: anything about it, by name.
    """

    marked: Any
    notes: dict[str, Any]

    def read(self, name: Any, function: Callable[[], Any], default: Any) -> Array:
        """A tensor of what `function` returns in the thread of each call; one for each name.

        `default`: a bool or floats; the value in a saved model.
        """
        ...


class Backend(Protocol):
    """The functions of each module of `batchnorm.keras.backends`.

    Attributes:
        RETRACES: compiled functions run Python again inside a block that they were not compiled in.
        ACCUMULATES: layers may collect the moments of several passes (S21).
        LIMITS_ARE_STATE: limits of renormalization are a variable of the layer.
        XP: the namespace of its arrays, where it accumulates.
        Slot: the class of collections of moments by compiled functions, where there are graphs.
    """

    RETRACES: bool
    ACCUMULATES: bool
    LIMITS_ARE_STATE: bool
    XP: Namespace
    Slot: Callable[..., Any]

    def normalize(
        self,
        x: Array,
        mask: Array | None,
        gamma: Array | None,
        beta: Array | None,
        running: Running,
        call: Call,
    ) -> tuple[Array, Running | None]:
        """y in x's type, and the statistics after a training step, else None.

        x is floating, mask boolean; gamma, beta and the statistics have the channel axes' sizes
        and are the backend's own arrays. Nothing is changed in place.
        """
        ...

    def measure(self, x: Array, mask: Array | None, call: Call) -> Parts:
        """The moments of a training pass, each of shape (1, *channels), constants (S21)."""
        ...

    def read_limits(self, layer: Any) -> Any:
        """The limits of a layer's renormalization for the record of a call (S11)."""
        ...

    def resolve_training(self, training: Any) -> Any:
        """A bool where the tensor `training` has a value now, else the tensor."""
        ...

    def read_values(self, a: Array) -> np.ndarray | None:
        """The values of a tensor where no device but the CPU has to be asked for them, or None."""
        ...

    def refuse_kernel(self, call: Call, rank: int | None) -> str | None:
        """The reason why no kernel serves such calls, of those that are known beforehand, or None.

        They are those of options and, where the rank is known, of axes.
        """
        ...

    def find_trace(self) -> Any:
        """The compiler's trace that this code runs in, or None in eager code."""
        ...

    def follows(self, trace: Any) -> bool:
        """True where this code may use tensors of a trace, or of eager code for None."""
        ...

    def repeats(self, trace: Any) -> bool:
        """True where this code may be the recomputation of a pass in a trace; of none for False."""
        ...

    def mark_block(self, trace: Any) -> AbstractContextManager[Any]:
        """A block opened in a trace, inside of which compiled functions of outside do not serve."""
        ...

    def find_graph(self) -> Graph | None:
        """The graph that this code is traced into, if it reads values at each call; or None."""
        ...

    def mark_rule(self, block: Any) -> AbstractContextManager[Any]:
        """A block about moving statistics: what is compiled in it does not stay outside."""
        ...

    def loses_context(self) -> bool:
        """True where a framework runs this code in a thread that it has started."""
        ...

    def obeys(self, block: Any) -> bool:
        """True where a block about moving statistics may rule this code."""
        ...


def load_backend() -> Backend:
    """The functional of the active Keras backend.

    Raises:
        ValueError: Keras runs on another backend.
    """
    name = keras.backend.backend()
    if name not in BACKENDS:
        raise ValueError(
            f"batchnorm.keras: the Keras backend must be one of {', '.join(BACKENDS)}; got "
            f"{name!r}. Set the environment variable KERAS_BACKEND before Keras is imported."
        )
    return cast(Backend, import_module(f"batchnorm.keras.backends.{name}"))


BACKEND = load_backend()
