"""Names of Keras and TensorFlow that are not public, and a public way without each of them.

No other file reads a private name of Keras.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from importlib import import_module
from typing import Any, NamedTuple

import keras

from batchnorm.core.errors import ArgumentRuntimeError


def _find(module: str, name: str) -> Any:
    """A name in a module that is not public; None where a release has no such thing."""
    try:
        return getattr(import_module(module), name, None)
    except ImportError:
        return None


_GET_MASK = _find("keras.src.backend", "get_keras_mask")
_SET_MASK = _find("keras.src.backend", "set_keras_mask")
_IN_SYMBOLIC_SCOPE = _find("keras.src.backend", "in_symbolic_scope")
_IN_STATELESS_SCOPE = _find("keras.src.backend", "in_stateless_scope")
_IN_XLA_GRAPH = (
    _find("tensorflow.python.ops.control_flow_util", "GraphOrParentsInXlaContext")
    if keras.backend.backend() == "tensorflow"
    else None
)


def get_mask(x: Any) -> Any:
    """The mask that Keras has attached to a tensor, or None."""
    if _GET_MASK is not None:
        return _GET_MASK(x)
    if not (isinstance(x, keras.KerasTensor) or keras.ops.is_tensor(x)):
        return None
    reader = _Reader(autocast=False, dtype=keras.backend.standardize_dtype(x.dtype))
    reader(x)
    return reader.found


def attach_mask(x: Any, mask: Any) -> Any:
    """A tensor with the values of x, or x itself, to which Keras has attached a mask."""
    if _SET_MASK is None:
        return _Giver(mask, autocast=False, dtype=keras.backend.standardize_dtype(x.dtype))(x)
    _SET_MASK(x, mask)
    return x


class _Reader(keras.layers.Layer):
    """A layer that sees the mask of its input as each layer does: as an argument."""

    found: Any = None

    def call(self, inputs: Any, mask: Any = None) -> Any:
        """The inputs."""
        object.__setattr__(self, "found", mask)
        return inputs

    def compute_output_spec(self, inputs: Any, mask: Any = None) -> Any:
        """As `call`, for symbolic inputs."""
        object.__setattr__(self, "found", mask)
        return keras.KerasTensor(inputs.shape, inputs.dtype)


class _Giver(keras.layers.Layer):
    """A layer that leaves its input a mask as each layer does: by `compute_mask`."""

    def __init__(self, mask: Any, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.supports_masking = True
        object.__setattr__(self, "given", mask)

    def call(self, inputs: Any) -> Any:
        """The inputs."""
        return inputs

    def compute_output_spec(self, inputs: Any) -> Any:
        """As `call`, for symbolic inputs."""
        return keras.KerasTensor(inputs.shape, inputs.dtype)

    def compute_mask(self, inputs: Any, previous_mask: Any = None) -> Any:
        """The mask."""
        return self.given


def in_symbolic_scope() -> bool:
    """True while Keras asks for shapes only."""
    if _IN_SYMBOLIC_SCOPE is None:
        return _is_inside(keras.SymbolicScope())
    return bool(_IN_SYMBOLIC_SCOPE())


def in_stateless_scope() -> bool:
    """True while Keras takes state as arguments, and not from variables."""
    if _IN_STATELESS_SCOPE is None:
        return _is_inside(keras.StatelessScope())
    return bool(_IN_STATELESS_SCOPE())


def _is_inside(scope: Any) -> bool:
    """True if a scope of the same kind is open, which a scope notes when it is entered."""
    with scope:
        return scope.original_scope is not None


def list_children(layer: Any) -> list[Any]:
    """The layers directly inside a layer; else those in its attributes."""
    found = getattr(layer, "_layers", None)
    if found is not None:
        return list(found)
    if isinstance(layer, keras.Sequential):  # holds itself once more, as a functional model
        return list(layer.layers)
    held = [getattr(layer, "layers", None) or []]
    held += [value for name, value in vars(layer).items() if name != "_layers"]
    layers = (a for a in keras.tree.flatten(held) if isinstance(a, keras.layers.Layer))
    return list({id(a): a for a in layers if a is not layer}.values())


def list_calls(operation: Any) -> list[Any]:
    """The calls of an operation or layer on symbolic tensors, as Keras's nodes."""
    calls = getattr(operation, "_inbound_nodes", None)
    return [] if calls is None else calls


def find_maker(tensor: Any) -> Any:
    """The history of a symbolic tensor: its operation, and the number of the call; or None.

    Without either no graph is known: dropped masks are then found by Keras's own warning alone.
    """
    return getattr(tensor, "_keras_history", None)


def shows_graph(operation: Any) -> bool:
    """True if Keras keeps the calls of an operation where this library looks for them."""
    made = find_maker(keras.Input((1,), name="batchnorm_input"))
    lists = [getattr(operation, name, None) for name in ("_inbound_nodes", "_outbound_nodes")]
    return made is not None and None not in lists


class Node(NamedTuple):
    """A call in a graph of symbolic tensors; Keras's own have these attributes too."""

    operation: Any
    input_tensors: list[Any]
    outputs: list[Any]


class RecordedGraph(NamedTuple):
    """A graph: its calls, in an order in which they can run, and the tensors at both ends."""

    nodes: list[Any]
    inputs: list[Any]
    outputs: list[Any]


def record_graph(model: Any) -> RecordedGraph:
    """The graph of a functional model, or else of a copy of it, with the model's own layers."""
    by_depth = getattr(model, "_nodes_by_depth", None)
    if by_depth is not None:
        nodes = [node for depth in sorted(by_depth, reverse=True) for node in by_depth[depth]]
        return RecordedGraph(nodes, model.inputs, model.outputs)
    originals: dict[int, tuple[Any, Any]] = {}  # the copies too, so that ids stay theirs
    calls: list[Node] = []

    def copy(layer: Any) -> Any:
        new = layer
        if isinstance(layer, keras.layers.Layer):
            new = type(layer).from_config(layer.get_config())
        originals[id(new)] = (layer, new)
        return new

    def call(operation: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = operation(*args, **kwargs)
        given = [a for a in keras.tree.flatten((args, kwargs)) if isinstance(a, keras.KerasTensor)]
        calls.append(Node(originals[id(operation)][0], given, keras.tree.flatten(outputs)))
        return outputs

    new = keras.models.clone_model(model, clone_function=copy, call_function=call)
    return RecordedGraph(list(calls), new.inputs, new.outputs)


@contextmanager
def unchanged_graph(operations: list[Any]) -> Iterator[None]:
    """Forget the calls in the block, which Keras notes in layers and operations."""
    names = ("_inbound_nodes", "_outbound_nodes")
    lists = [getattr(a, name) for a in operations for name in names]
    lengths = [len(nodes) for nodes in lists]
    try:
        yield
    finally:
        for nodes, length in zip(lists, lengths, strict=True):
            del nodes[length:]


@contextmanager
def unlocked(layer: Any) -> Iterator[None]:
    """Let a built layer take weights and layers in the block."""
    tracker: Any = getattr(layer, "_tracker", None)
    locked = getattr(tracker, "locked", False)
    if locked:
        tracker.unlock()
    try:
        yield
    except ValueError as error:
        if tracker is not None:
            raise
        raise ArgumentRuntimeError(
            f"layer {layer.name!r} is built, and Keras {keras.__version__} lets no weight be added "
            "then. Convert the model before it is built."
        ) from error
    finally:
        if locked:
            tracker.lock()


def open_name_scope(layer: Any) -> AbstractContextManager[Any]:
    """The scope in which the layer's weights get its name before theirs."""
    scope = getattr(layer, "_open_name_scope", None)
    return keras.name_scope(layer.name) if scope is None else scope()


def replace_build(layer: Any, build: Callable[..., None]) -> None:
    """Put a function in the place of the `build` that Keras has wrapped for this layer."""
    wrapper = vars(layer).get("build")
    if wrapper is None:  # the class's is called
        return
    names, cells = wrapper.__code__.co_freevars, wrapper.__closure__ or ()
    cell = dict(zip(names, cells, strict=True)).get("original_build_method")
    if cell is not None:
        cell.cell_contents = build
        return

    @wraps(build)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        with open_name_scope(layer), unlocked(layer):
            build(*args, **kwargs)
        layer.built = True

    object.__setattr__(layer, "build", wrapped)


def is_held_elsewhere(variable: Any) -> bool:
    """True while a step of `fit` on JAX has the value of a variable."""
    try:
        return getattr(variable, "_value") is None  # noqa: B009
    except AttributeError:
        return _makes_values(variable)


def _makes_values(variable: Any) -> bool:
    """True for a variable without a value, which makes one at each reading, or cannot."""
    try:
        return variable.value is not variable.value
    except TypeError:  # it was not made by an initializer
        return True


def in_xla_graph(graph: Any) -> bool:
    """True while a TensorFlow function is traced for XLA; any graph is taken for one else."""
    return bool(graph.building_function if _IN_XLA_GRAPH is None else _IN_XLA_GRAPH(graph))
