"""Exchanging the batch norms of a whole model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import nn

from batchnorm.core.config import check_flag
from batchnorm.core.conversion import (
    Choice,
    Conversion,
    check_choice,
    check_report,
    describe_left,
)
from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError, names_errors
from batchnorm.torch.conversions import COUNTERPARTS, Left, convert_layer
from batchnorm.torch.exchange import adopt, exchange
from batchnorm.torch.fx import keep_first_argument
from batchnorm.torch.layers import BatchNorm
from batchnorm.torch.options import OPTIONS, convertible, find_obstacle

__all__ = ["convert_batchnorm", "revert_batchnorm"]

_PRIVATE = ("frozen", "_synchronizer", "_converted_from", "_memory")


@names_errors("convert_batchnorm")
def convert_batchnorm(
    module: nn.Module,
    *,
    only: str | list[str] | None = None,
    skip: str | list[str] | None = None,
    frozen_copies: bool = False,
    report: list[Conversion] | None = None,
    **options: Any,
) -> nn.Module:
    """Replace every torch batch norm inside `module` by this library's, in place.

    Args:
        module: any model, or a single batch norm.
        only: pattern of the names of layers to convert, or several, as `"encoder.*"`: `*` stands
            for any characters, `?` for one, `[ab]` for one of these. None: all layers.
        skip: pattern of the names of layers to leave alone, or several.
        frozen_copies: convert FrozenBatchNorm2d, as torchvision, detectron2 and transformers have
            it, to a BatchNorm2d that is frozen (`freeze`); its weight and bias become parameters
            without gradients.
        report: a list, to which one `Conversion(name, before, after, reason)` is appended for each
            layer that was converted, or left alone (`after` is None, `reason` says why).
        **options: options of `BatchNorm` for all of them: eps, momentum, virtual_batch_size,
            renorm, renorm_clipping, renorm_momentum, adjustment, activation, padded_output,
            debias, single_value, fused, synchronized, process_group.

    Parameters and buffers stay the very same objects (half-precision statistics become float32,
    S16), so optimizers go on working; so do the training flag and all hooks, and the hooks of
    accelerate, which sit around `forward`. A layer used in several places stays one layer. Masks
    reach the layers through `padding_mask`. A SyncBatchNorm stays synchronized over its own
    process group, unless the options say otherwise. timm's BatchNormAct2d keeps its drop and its
    activation, which is computed together with the norm where it is ReLU. Other classes are
    converted as `register_conversion` has been told. Layers that are this library's already keep
    their options, except `synchronized` and `process_group`, if given; all get their path in the
    model as the name by which ranks tell them apart.

    Returns:
        `module`, or its replacement if it is a batch norm itself.

    Raises:
        TypeError: not a module, or an unknown option.
        ValueError: a lazy batch norm that has not seen an input yet, or a bad option. The model
            is unchanged then.

    Warns:
        UserWarning: a layer was left alone, since it has behaviour of its own, or a `forward` of
            its own that cannot be put around this library's.

    >>> model = convert_batchnorm(torch.nn.Sequential(torch.nn.BatchNorm1d(3)))
    >>> type(model[0]).__module__
    'batchnorm.torch.layers'
    """
    _check_module(module)
    _check_options(options)
    choice = check_choice(only, skip)
    check_flag("frozen_copies", frozen_copies)
    report = check_report(report)
    found: list[Conversion] = []
    told: list[Conversion] = []  # that the user should know without asking

    def replace(name: str, layer: nn.Module) -> nn.Module | None:
        before = type(layer)
        reason = choice.refuse(name)
        new = convert_layer(name, layer, options, frozen_copies, reason)
        if isinstance(new, Left):
            found.append(Conversion(name, before, None, new.reason))
            told.extend(found[-1:] if new.warns else ())
            return None
        if new is not None:
            found.append(Conversion(name, before, type(new)))
        return new

    module = exchange(module, replace)
    if told:
        warnings.warn(f"convert_batchnorm: left alone: {describe_left(told)}.", stacklevel=3)
    _set_ranks(module, choice, options)
    report.extend(found)
    return module


def _set_ranks(module: nn.Module, choice: Choice, options: dict[str, Any]) -> None:
    for name, layer in module.named_modules():
        if isinstance(layer, BatchNorm):
            if "synchronized" in options and choice.refuse(name) is None:
                layer.configure(
                    synchronized=options["synchronized"],
                    process_group=options.get("process_group"),
                )
            layer.name_for_ranks(name)


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

    >>> from batchnorm.torch import BatchNorm1d
    >>> type(revert_batchnorm(BatchNorm1d(3)))
    <class 'torch.nn.modules.batchnorm.BatchNorm1d'>
    """
    _check_module(module)

    def replace(name: str, layer: nn.Module) -> nn.Module | None:
        if not isinstance(layer, BatchNorm):
            return None
        theirs = layer.__dict__.get("_converted_from") or COUNTERPARTS.get(type(layer))
        if layer.synchronized:
            theirs = layer.origin.synchronized
        if theirs is None:
            raise ArgumentValueError(
                f"layer {name!r} is a {type(layer).__name__}, for which torch has no "
                "counterpart; use BatchNorm1d, BatchNorm2d or BatchNorm3d."
            )
        if reason := find_obstacle(layer, original=True):
            raise ArgumentValueError(f"layer {name!r} {reason}, which torch's layer cannot do.")
        return _revert(name, layer, theirs)

    return exchange(module, replace, lambda made: keep_first_argument(module, made))


def _revert(name: str, layer: BatchNorm, theirs: type[nn.Module]) -> nn.Module:
    new = adopt(layer, theirs)
    if isinstance(new, str):
        raise ArgumentValueError(f"layer {name!r}: {new}.")
    for name in (*(option.name for option in OPTIONS), *_PRIVATE):
        new.__dict__.pop(name, None)
    if issubclass(theirs, nn.SyncBatchNorm):
        new.process_group = layer.process_group
    for name in ("running_mean", "running_var"):
        buffer = new._buffers.get(name)
        if buffer is not None and layer.weight is not None and layer.weight.dtype != buffer.dtype:
            new._buffers[name] = buffer.to(layer.weight.dtype)
    return new


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
