"""Exchanging the batch norms of a whole model."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError, names_errors
from batchnorm.torch.fx import keep_first_argument
from batchnorm.torch.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d
from batchnorm.torch.options import OPTIONS, convertible, find_obstacle

__all__ = ["convert_batchnorm", "revert_batchnorm"]

_OURS: dict[type[nn.Module], type[BatchNorm]] = {
    nn.BatchNorm1d: BatchNorm1d,
    nn.BatchNorm2d: BatchNorm2d,
    nn.BatchNorm3d: BatchNorm3d,
    nn.SyncBatchNorm: BatchNorm,
}
_THEIRS = {ours: theirs for theirs, ours in _OURS.items() if ours is not BatchNorm}
_LAZY = (nn.LazyBatchNorm1d, nn.LazyBatchNorm2d, nn.LazyBatchNorm3d)
_PRIVATE = ("frozen", "_synchronizer", "_converted_from", "_memory")


@names_errors("convert_batchnorm")
def convert_batchnorm(module: nn.Module, **options: Any) -> nn.Module:
    """Replace every torch batch norm inside `module` by this library's, in place.

    Args:
        module: any model, or a single batch norm.
        **options: options of `BatchNorm` for all of them: eps, momentum, virtual_batch_size,
            renorm, renorm_clipping, renorm_momentum, adjustment, activation, fused,
            synchronized, process_group.

    Parameters and buffers stay the very same objects (half-precision statistics become float32,
    S16), so optimizers go on working; so do the training flag and all hooks. A layer used in
    several places stays one layer. Masks reach the layers through `padding_mask`. A SyncBatchNorm
    stays synchronized over its own process group, unless the options say otherwise. Layers that
    are this library's already keep their options, except `synchronized` and `process_group`, if
    given; all get their path in the model as the name by which ranks tell them apart.

    Returns:
        `module`, or its replacement if it is a batch norm itself.

    Raises:
        TypeError: not a module, or an unknown option.
        ValueError: a lazy batch norm that has not seen an input yet, or a bad option. The model
            is unchanged then.

    Warns:
        UserWarning: a subclass with behaviour of its own was left alone.

    >>> model = convert_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    >>> type(model[0]).__module__
    'batchnorm.torch.layers'
    """
    _check_module(module)
    _check_options(options)
    left: list[str] = []

    def replace(name: str, layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, _BatchNorm) or isinstance(layer, BatchNorm):
            return None
        if isinstance(layer, _LAZY):  # with the first input it becomes another class
            raise ArgumentValueError(
                f"layer {name!r} is a {type(layer).__name__} without parameters yet; "
                "run one batch through the model first."
            )
        ours = _OURS.get(type(layer))
        if ours is None:
            left.append(name)
            return None
        return _convert(layer, ours, options)

    module = _exchange(module, replace)
    if left:
        shown = ", ".join(left[:5]) + (f" and {len(left) - 5} more" if len(left) > 5 else "")
        warnings.warn(
            f"convert_batchnorm: left alone, because subclasses may compute something else: "
            f"{shown}. Put a BatchNorm in their place, followed by what they add.",
            stacklevel=2,
        )
    for name, layer in module.named_modules():
        if isinstance(layer, BatchNorm):
            if "synchronized" in options:
                layer.synchronized = options["synchronized"]
                layer.process_group = options.get("process_group")
            layer.name_for_ranks(name)
    return module


@names_errors("revert_batchnorm")
def revert_batchnorm(module: nn.Module) -> nn.Module:
    """Replace every batch norm of this library inside `module` by torch's, in place.

    Synchronized layers become SyncBatchNorm, which needs a GPU in training. Parameters and buffers
    stay the same objects; running statistics take the type of half precision weights, which
    torch's layer demands. A model that torch.fx has traced keeps its graph.

    Returns:
        `module`, or its replacement if it is a batch norm itself.

    Raises:
        TypeError: not a module.
        ValueError: a layer with an option that torch's lacks, a frozen one, one for any rank
            that is not synchronized, or one that a graph of torch.fx calls with a mask or a
            residual. The model is unchanged then.

    >>> type(revert_batchnorm(BatchNorm1d(3)))
    <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    _check_module(module)

    def replace(name: str, layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, BatchNorm):
            return None
        theirs = layer.__dict__.get("_converted_from") or _THEIRS.get(type(layer))
        if layer.synchronized:
            theirs = nn.SyncBatchNorm
        if theirs is None:
            raise ArgumentValueError(
                f"layer {name!r} is a {type(layer).__name__}, for which torch has no "
                "counterpart; use BatchNorm1d, BatchNorm2d or BatchNorm3d."
            )
        if reason := find_obstacle(layer):
            raise ArgumentValueError(f"layer {name!r} {reason}, which torch's layer cannot do.")
        return _revert(layer, theirs)

    return _exchange(module, replace, lambda made: keep_first_argument(module, made))


def _convert(layer: nn.Module, ours: type[BatchNorm], options: dict[str, Any]) -> BatchNorm:
    new = _adopt(layer, ours)
    extra = dict(options)
    if isinstance(layer, nn.SyncBatchNorm):
        new.__dict__.pop("process_group", None)
        if extra.setdefault("synchronized", True):
            extra.setdefault("process_group", layer.process_group)
    for name in ("eps", "momentum"):
        if name in extra:
            setattr(new, name, extra.pop(name))
    new.frozen = False
    new._set_options(extra)
    new.__dict__["_converted_from"] = type(layer)
    return new


def _revert(layer: BatchNorm, theirs: type[nn.Module]) -> nn.Module:
    new = _adopt(layer, theirs)
    for name in (*(option.name for option in OPTIONS), *_PRIVATE):
        new.__dict__.pop(name, None)
    if theirs is nn.SyncBatchNorm:
        new.process_group = layer.process_group
    for name in ("running_mean", "running_var"):
        buffer = new._buffers.get(name)
        if buffer is not None and layer.weight is not None and layer.weight.dtype != buffer.dtype:
            new._buffers[name] = buffer.to(layer.weight.dtype)
    return new


def _adopt(layer: nn.Module, cls: type[Any]) -> Any:
    """A `cls` with the state of `layer`: the same parameters, buffers, hooks and flags."""
    new = object.__new__(cls)
    new.__dict__.update(layer.__dict__)
    # All else is shared: handles of hooks still remove them. These two may get new entries.
    new.__dict__["_parameters"] = dict(layer._parameters)
    new.__dict__["_buffers"] = dict(layer._buffers)
    return new


def _exchange(
    module: nn.Module,
    replace: Callable[[str, nn.Module], nn.Module | None],
    prepare: Callable[[Collection[nn.Module]], None] = lambda made: None,
) -> nn.Module:
    """Replace layers by what `replace` makes of them, once for each, after all have been made.

    `prepare` gets the layers that will be replaced, before any is.
    """
    made = {}
    for name, layer in module.named_modules():
        new = replace(name or "(the module itself)", layer)
        if new is not None:
            made[layer] = new
    prepare(made)
    for parent in list(module.modules()):
        for name, child in parent._modules.items():
            if child in made:
                parent._modules[name] = made[child]
    return made.get(module, module)


def _check_options(options: dict[str, Any]) -> None:
    """Raise for an option that no layer could take, before any layer is touched."""
    accepted = ("eps", "momentum", *convertible())
    if unknown := sorted(set(options) - set(accepted)):
        raise ArgumentTypeError(
            f"options must be among {', '.join(accepted)}; got {', '.join(unknown)}."
        )
    moving = {name: options[name] for name in ("eps", "momentum") if name in options}
    rest = {name: value for name, value in options.items() if name not in moving}
    BatchNorm(1, **moving).configure(**rest)


def _check_module(module: Any) -> None:
    if not isinstance(module, nn.Module):
        raise ArgumentTypeError(f"module must be a torch.nn.Module; got {type(module).__name__}.")
    if isinstance(module, torch.jit.ScriptModule):
        raise ArgumentTypeError(
            "a module of torch.jit cannot be changed; take the one that it was made "
            "from. torch.jit.script compiles torch's layers only: fold this library's, or revert "
            "them, before it."
        )
