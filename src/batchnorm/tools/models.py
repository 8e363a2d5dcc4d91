"""The batch norms of a model of any framework."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from batchnorm.tools.frameworks.adapter import Adapter
from batchnorm.tools.frameworks.records import FoundLayer
from batchnorm.tools.frameworks.switch import adapter_for, adapter_of
from batchnorm.tools.state import BatchNormState

__all__ = [
    "FoundLayer",
    "find_layers",
    "put_state",
    "put_states",
    "take_state",
]


def find_layers(model: Any) -> list[FoundLayer]:
    """Every batch norm of a model, this library's and the framework's own, subclasses included.

    Args:
        model: a `torch.nn.Module`, `flax.nnx.Module`, Keras model or layer, or one of this
            library's layers.

    Returns:
        The layers in the order in which the model defines them; one that is used or held several
        times is there once, under its first name. Layers that `nnx.vmap` or `nnx.scan` has
        stacked are listed one by one, like `blocks.norm[0]`.

    Raises:
        TypeError: model is none of these.
        ValueError: a batch norm that has no weights yet.
    """
    adapter = adapter_of(model)
    if adapter is None:
        raise TypeError(
            "find_layers: model must be a torch.nn.Module, a flax.nnx.Module or a Keras layer; "
            f"got {type(model).__name__}."
        )
    return [
        FoundLayer(name, layer, adapter.name, adapter.states.take_state(layer, name))
        for name, layer in adapter.states.find(model)
    ]


def take_state(layer: Any, name: str = "") -> BatchNormState:
    """The state of one batch norm, copied.

    Args:
        layer: a batch norm of torch, flax nnx or Keras, theirs or ours.
        name: name for the state.

    Raises:
        TypeError: no batch norm.
        ValueError: it has no weights yet.
    """
    return _adapter_of("take_state", layer).states.take_state(layer, name)


def put_state(layer: Any, state: BatchNormState) -> None:
    """Write a state into a layer, in place; everything is checked first.

    Args:
        layer: as in `take_state`.
        state: its variance is written as it is, whichever kind the layer keeps (S10); `transfer`
            converts. Fields that are None where the layer has them keep the layer's values,
            except that a missing gamma or beta counts as 1 or 0.

    Raises:
        TypeError: no batch norm.
        ValueError: the state does not fit the layer, which is unchanged then.
    """
    adapter = _adapter_of("put_state", layer)
    adapter.check_shared([(layer, state)])
    adapter.states.put_state(layer, state)


def put_states(pairs: Sequence[tuple[FoundLayer, BatchNormState]]) -> None:
    """Write states into layers of one model: all, or none, even when interrupted.

    Args:
        pairs: layers, with their present state, and the state that each is to have.

    Raises:
        ValueError: a state does not fit its layer; nothing has changed.
    """
    if not pairs:
        return
    adapter = adapter_for(pairs[0][0].framework)
    adapter.check_shared([(found.layer, state) for found, state in pairs])
    written: list[FoundLayer] = []
    try:
        for found, state in pairs:
            written.append(found)
            adapter.states.put_state(found.layer, state)
    except BaseException:
        for found in written:
            adapter.states.put_state(found.layer, found.state)
        raise


def _adapter_of(owner: str, layer: Any) -> Adapter:
    adapter = adapter_of(layer)
    if adapter is None or not adapter.states.is_batch_norm(layer):
        raise TypeError(
            f"{owner}: layer must be a batch norm of torch, flax nnx or Keras; got "
            f"{type(layer).__name__}. find_layers(model) lists those of a model."
        )
    return adapter
