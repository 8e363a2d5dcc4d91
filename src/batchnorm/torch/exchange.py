"""Putting layers in the place of others, with all that belongs to them."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Collection
from typing import Any

from torch import nn


def adopt(layer: nn.Module, cls: type[Any]) -> Any:
    """A `cls` with the state of `layer`: the same parameters, buffers, hooks and flags.

    Returns:
        The new layer; or the reason, a text, where `layer` has a `forward` of its own that
        cannot be put around that of `cls`.
    """
    new = object.__new__(cls)
    new.__dict__.update(layer.__dict__)
    # All else is shared: handles of hooks still remove them. These two may get new entries.
    new.__dict__["_parameters"] = dict(layer._parameters)
    new.__dict__["_buffers"] = dict(layer._buffers)
    if "forward" in layer.__dict__ and not _rebind_forward(layer, new):
        return (
            "its forward has been replaced by a function that calls the old one; convert the "
            "model first, and then patch it"
        )
    return new


def _rebind_forward(old: nn.Module, new: nn.Module) -> bool:
    """Put the function that stands around `old.forward` around `new.forward`; False if unknown.

    accelerate's hooks replace `forward` by a partial function of the module, and keep the former
    one as `_old_forward`.
    """
    own, state = new.__dict__, old.__dict__
    forward = state["forward"]
    if _is_method(forward, old):
        del own["forward"]
        return True
    if not isinstance(forward, functools.partial) or not _is_method(state.get("_old_forward"), old):
        return False
    if forward.args[:1] != (old,) or any(a is old for a in forward.keywords.values()):
        return False
    own["_old_forward"] = types.MethodType(type(new).forward, new)
    around = functools.partial(forward.func, new, *forward.args[1:], **forward.keywords)
    own["forward"] = functools.update_wrapper(around, own["_old_forward"])
    return True


def _is_method(function: Any, layer: nn.Module) -> bool:
    """True if this is the forward method of the layer's class."""
    return (
        isinstance(function, types.MethodType)
        and function.__self__ is layer
        and function.__func__ is type(layer).forward
    )


def exchange(
    module: nn.Module,
    replace: Callable[[str, nn.Module], nn.Module | None],
    prepare: Callable[[Collection[nn.Module]], None] = lambda made: None,
) -> nn.Module:
    """Replace layers by what `replace` makes of them, once for each, after all have been made.

    `prepare` gets the layers that will be replaced, before any is. Returns `module`, or what has
    taken its place.
    """
    made = {}
    for name, layer in module.named_modules():
        new = replace(name, layer)
        if new is not None:
            made[layer] = new
    prepare(made)
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in made:
                parent._modules[name] = made[child]
    return made.get(module, module)
