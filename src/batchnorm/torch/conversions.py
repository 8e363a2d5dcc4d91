"""The class that each kind of batch norm is converted to."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any, NamedTuple

from torch import nn

from batchnorm.core.declaration import list_arguments
from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError, names_errors
from batchnorm.torch.exchange import adopt
from batchnorm.torch.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.torch.options import OPTIONS
from batchnorm.torch.private import BatchNormBase

__all__ = ["register_conversion"]

_OURS: dict[type[nn.Module], type[BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: BatchNorm,
}
COUNTERPARTS = {ours: theirs for theirs, ours in _OURS.items() if ours is not BatchNorm}
_LAZY = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
# Classes of other packages, and the modules here that convert them and import those packages.
_GUESTS = {
    ("timm.layers.norm_act", "BatchNormAct2d"): "batchnorm.torch.guests.timm",
    ("timm.layers.norm_act", "SyncBatchNormAct"): "batchnorm.torch.guests.timm",
}
_FROZEN = ("weight", "bias", "running_mean", "running_var")  # buffers of a frozen copy
_registered: dict[type[nn.Module], Callable[..., nn.Module | None]] = {}


class Left(NamedTuple):
    """A layer that is left alone, the reason, and whether the user is warned."""

    reason: str
    warns: bool = True


@names_errors("register_conversion")
def register_conversion(cls: type[nn.Module], function: Callable[..., nn.Module | None]) -> None:
    """Let `convert_batchnorm` replace layers of a class by what a function makes of them.

    Args:
        cls: the class; subclasses of it need a registration of their own.
        function: gets the layer, and the options of `convert_batchnorm` as keywords; returns
            the module that takes the layer's place, or None to leave it there. The optimizer
            goes on working if the new module has the same parameters, not copies.

    Raises:
        TypeError: not a class of modules, or not a function.

    A later registration of the same class replaces an earlier one, and torch's own classes may be
    registered too.

    >>> from torch import nn
    >>> from batchnorm.torch import BatchNorm, convert_batchnorm
    >>> class Norm(nn.LayerNorm): ...
    >>> register_conversion(Norm, lambda layer, **options: BatchNorm(3, **options))
    >>> convert_batchnorm(nn.Sequential(Norm(3)), momentum=0.2)[0].momentum
    0.2
    """
    if not isinstance(cls, type) or not issubclass(cls, nn.Module):
        raise ArgumentTypeError(f"cls must be a subclass of torch.nn.Module; got {cls!r}.")
    if not callable(function):
        raise ArgumentTypeError(f"function must be callable; got {function!r}.")
    _registered[cls] = function


def convert_layer(
    name: str, layer: nn.Module, options: dict[str, Any], frozen_copies: bool, refused: str | None
) -> nn.Module | Left | None:
    """This library's layer in place of another; None if there is nothing to convert.

    `refused`: the reason that the user's choice of names gives against it, or None.
    """
    make = _find_conversion(layer, frozen_copies)
    if make is not None and refused is not None:
        return Left(refused, warns=False)
    if make is None or isinstance(make, Left):
        return make
    if isinstance(layer, _LAZY):  # with the first input it becomes another class
        raise ArgumentValueError(
            f"layer {name or '(the module itself)'!r} is a {type(layer).__name__} without "
            "parameters yet; run one batch through the model first."
        )
    new = make(layer, **options)
    return Left("its conversion returned None", warns=False) if new is None else new


def _find_conversion(
    layer: nn.Module, frozen_copies: bool
) -> Callable[..., nn.Module | Left | None] | Left | None:
    cls = type(layer)
    if cls in _registered:
        return _registered[cls]
    if isinstance(layer, BatchNorm):
        return None
    if cls in _OURS or isinstance(layer, _LAZY):
        return _convert_original
    if guest := _GUESTS.get((cls.__module__, cls.__name__)):
        found: Callable[..., nn.Module | Left | None] = import_module(guest).convert
        return found
    if _is_frozen_copy(layer):
        if frozen_copies:
            return _convert_frozen
        return Left("a frozen copy; frozen_copies=True converts it", warns=False)
    if cls.__name__ == "FrozenBatchNormAct2d":
        return Left(
            "a frozen norm with an activation; timm's unfreeze_batch_norm_2d makes a layer of it "
            "that can be converted, and frozen by freeze()",
            warns=frozen_copies,
        )
    if cls.__name__.startswith("BatchRenorm"):
        return Left(
            "it averages the variance, where renorm=True averages the standard deviation (S11): "
            "after 60 steps 4.55 against 3.56. Put BatchNorm(renorm=True) there, and train on"
        )
    if isinstance(layer, BatchNormBase):
        return Left(
            "subclasses may compute something else: put a BatchNorm in their place, followed by "
            "what they add, or tell register_conversion"
        )
    return None


def take_over(layer: nn.Module, ours: type[BatchNorm], options: dict[str, Any]) -> BatchNorm | Left:
    """An `ours` with the state of a layer of torch, with these options."""
    new = adopt(layer, ours)
    if isinstance(new, str):
        return Left(new)
    arguments = dict(options)
    if isinstance(layer, nn.SyncBatchNorm):
        new.__dict__.pop("process_group", None)
        if arguments.setdefault("synchronized", True):
            arguments.setdefault("process_group", layer.process_group)
    for name in ("eps", "momentum"):
        if name in arguments:
            setattr(new, name, arguments.pop(name))
    new.frozen = False
    new._set_options({**list_arguments(OPTIONS), **arguments})
    new.__dict__["_converted_from"] = type(layer)
    return new


def _convert_original(layer: nn.Module, **options: Any) -> BatchNorm | Left:
    return take_over(layer, _OURS[type(layer)], options)


def _is_frozen_copy(layer: nn.Module) -> bool:
    """True for FrozenBatchNorm2d and its like: a norm that is all buffers."""
    return (
        "FrozenBatchNorm" in type(layer).__name__
        and not layer._parameters
        and not layer._modules
        and all(layer._buffers.get(name) is not None for name in _FROZEN)
    )


def _convert_frozen(layer: nn.Module, **options: Any) -> BatchNorm:
    weight, bias, mean, var = (layer._buffers[name] for name in _FROZEN)
    assert weight is not None
    assert bias is not None
    options = {"eps": getattr(layer, "eps", 1e-5), **options}  # transformers' has no attribute
    new = BatchNorm2d(weight.numel(), device=weight.device, **options)
    new.weight = nn.Parameter(weight, requires_grad=False)
    new.bias = nn.Parameter(bias, requires_grad=False)
    new._buffers["running_mean"], new._buffers["running_var"] = mean, var
    new._buffers["num_batches_tracked"] = None  # which its state has not
    new._prepare_statistics()
    return new.train(layer.training).freeze()
