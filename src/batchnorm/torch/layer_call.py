"""A layer's side of a call: its checks, and the layer's part of the record."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.core import config
from batchnorm.core.errors import ArgumentRuntimeError, ArgumentTypeError, ArgumentValueError
from batchnorm.core.layout import make_layout, normalize_axis
from batchnorm.torch import checks, jagged, masking
from batchnorm.torch.call import Settings, Tensors
from batchnorm.torch.functional import normalize
from batchnorm.torch.keeping import keeps_statistics
from batchnorm.torch.options import find_options
from batchnorm.torch.private import constant_in_graphs
from batchnorm.torch.recompute import as_first_pass, in_backward


class Arguments(NamedTuple):
    """The arguments of `make_call`, of a layer's call.

    Attributes:
        tensors, settings, training, update: in the order of `make_call`.
        zeroing: in compiled code, where `padding_mask` decides when the graph runs, if padded rows
            are zeroed (S4): a 0-d boolean tensor; else None.
    """

    tensors: Tensors
    settings: Settings
    training: bool
    update: bool
    zeroing: Tensor | None


def gather_arguments(
    layer: Any, x: Tensor, mask: Tensor | None, residual: Tensor | None
) -> Arguments:
    """The layer's tensors and settings beside those of the call, if x fits the layer."""
    checks.check_input(x)
    layer._check_input_dim(x)
    axis = layer.axis
    if type(axis) is not int or not -x.dim() <= axis < x.dim() or x.layout is torch.jagged:
        axis = normalize_axis(axis, x.dim())
        if x.layout is torch.jagged:
            jagged.check_axes(axis, x)
    _check_channels(layer, x, axis)
    check_moving(layer)
    training = layer.training and not layer.frozen
    if training and layer.track_running_stats:
        layer.restore_width()
    running = layer._running()
    if running is None and layer.renorm is not None:
        raise ArgumentValueError(
            "renorm=True compares with running statistics, which this layer has lost "
            "(torch.func.replace_all_batch_norm_modules_ removes them). Call "
            "configure(renorm=False) before that."
        )
    needed = training or running is None or torch.is_grad_enabled()
    mask, padded_output = _find_padding(layer, x, mask, needed)
    zeroing = None
    if isinstance(padded_output, Tensor):
        zeroing, padded_output = padded_output, "normalize"
    if training and layer.track_running_stats and torch.compiler.is_exporting():
        _warn_of_export(type(layer).__name__)
    weight, bias = _find_parameter(layer, "weight"), _find_parameter(layer, "bias")
    settings = Settings(
        type(layer).__name__,
        axis,
        find_options(layer, padded_output),
        layer.adjustment,
        layer.fused,
        layer._synchronizer if layer.synchronized else None,
        layer._traced_pending if torch.compiler.is_compiling() else layer._pending,
        layer.single_value,
    )
    return Arguments(
        Tensors(x, mask, weight, bias, residual, running),
        settings,
        training,
        training and layer.track_running_stats,
        zeroing,
    )


def finish(y: Tensor, given: Arguments, late: bool) -> Tensor:
    """y as the layer returns it; `late`: this recomputation moves the statistics."""
    if late:
        _move_late(given)
    x, mask = given.tensors[:2]
    if given.zeroing is None or mask is None:
        return y
    shape = make_layout(tuple(x.shape), given.settings.axis, None).mask_shape(tuple(mask.shape))
    return torch.where((mask.reshape(shape) != 0) | ~given.zeroing, y, 0.0)


def check_tracked(layer: Any, options: Mapping[str, Any]) -> None:
    """Raise if options need running statistics, and the layer keeps none; or count passes now."""
    if layer._pending is not None:
        raise ArgumentRuntimeError("options cannot change inside accumulate_statistics.")
    if layer.running_mean is not None:
        return
    for option, needs in (
        ("renorm", options["renorm"] is not None),
        ("debias", options["debias"]),
        ("single_value", options["single_value"] == "running"),
    ):
        if needs:
            value = "'running'" if option == "single_value" else True
            raise ArgumentValueError(
                f"{option}={value} needs running statistics, so track_running_stats=True; got "
                "False."
            )


def check_moving(layer: Any) -> None:
    """Check eps and momentum, which users assign at any time: at every call."""
    eps, momentum = layer.eps, layer.momentum
    if type(eps) is not float or not 0.0 <= eps < math.inf:
        layer.eps = config.check_number("eps", eps, 0.0)
    if momentum is not None and (type(momentum) is not float or not 0.0 <= momentum <= 1.0):
        layer.momentum = config.check_number("momentum", momentum, 0.0, 1.0)


# Run while torch.export(strict=True) traces, which drops the calls of `warnings`.
@constant_in_graphs
def _warn_of_export(owner: str) -> None:
    warnings.warn(
        f"{owner}: torch.export traces this layer in training, as plain arithmetic. Tools that "
        "look for a batch norm in the program find none: move_exported_model_to_eval would leave "
        "it in training, and quantization (PT2E, QAT) would not fuse it. For these, call "
        "batchnorm.torch.revert_batchnorm(model) before torch.export; for a program of "
        "evaluation, model.eval().",
        stacklevel=2,  # one place, so that Python shows it once for all layers
    )


def check_rank(x: Tensor, ranks: tuple[int, ...]) -> None:
    """Raise unless x has one of these ranks."""
    if x.dim() not in ranks:
        wanted = " or ".join(f"{rank}D" for rank in ranks)
        raise ArgumentValueError(
            f"expected {wanted} input; got {x.dim()}D, shape "
            f"{tuple(x.shape)}. BatchNorm takes any rank."
        )


def check_features(num_features: Any, axes: tuple[int, ...]) -> tuple[int, ...]:
    """The sizes of the channel axes, one for each."""
    sizes = tuple(num_features) if isinstance(num_features, (tuple, list)) else (num_features,)
    if not all(isinstance(n, int) and not isinstance(n, bool) for n in sizes):
        raise ArgumentTypeError(
            f"num_features must be an int, or a tuple of ints with several axes; got "
            f"{num_features!r}."
        )
    if any(n < 0 for n in sizes):
        raise ArgumentValueError(f"num_features must not be negative; got {num_features!r}.")
    if len(sizes) != len(axes):
        raise ArgumentValueError(
            f"num_features must have one size for each channel axis; got "
            f"{num_features!r} for axis {axes if len(axes) > 1 else axes[0]}."
        )
    return sizes


def check_dtype(dtype: Any) -> None:
    """Raise unless parameters can be of this type; None is torch's default."""
    if dtype is not None and dtype not in checks.FLOATING:
        raise ArgumentTypeError(
            f"dtype must be float16, bfloat16, float32 or float64; got {dtype!r}."
        )


def _check_channels(layer: Any, x: Tensor, axis: int | tuple[int, ...]) -> None:
    features = layer.num_features
    if type(axis) is int and x.shape[axis] == features:
        return
    if features == 0 and layer.weight is None and layer.running_mean is None:
        return  # a lazy layer without state never learns its size
    expected = tuple(features) if isinstance(features, tuple) else (features,)
    found = tuple(x.shape[a] for a in ((axis,) if isinstance(axis, int) else axis))
    if found != expected:
        raise ArgumentValueError(
            f"x must have num_features={features} along axis {layer.axis}; got "
            f"{found if len(found) > 1 else found[0]} in shape {tuple(x.shape)}."
        )


def _find_parameter(layer: Any, name: str) -> Tensor | None:
    own = layer._parameters  # the attribute behind it, without a search
    found: Tensor | None = own[name] if name in own else getattr(layer, name)
    return found


def _find_padding(
    layer: Any, x: Tensor, mask: Tensor | None, needed: bool
) -> tuple[Tensor | None, str | Tensor]:
    """The mask, and `padded_output` or, in compiled code, `Arguments.zeroing`.

    `padding_mask` gives what the call leaves open; a recomputed step takes what it had at first.
    `needed`: the mask matters though padded rows are normalized.
    """
    memory, own = layer._memory, layer.padded_output
    traced = torch.compiler.is_compiling()
    if not masking.in_use() and (traced or not memory.masked):
        return mask, own
    axes = normalize_axis(layer.axis, x.dim())
    if traced:
        zeroing = masking.traced_zeroing(x, own)
        if mask is None and (needed or zeroing is not False):
            mask = masking.traced_mask(x, axes)
        return mask, own if isinstance(zeroing, bool) else zeroing
    block, again = masking.find_block(), in_backward()
    if again:
        block = memory.passes.find_block(block)
    said = masking.padded_output_in(block) or own
    alone = mask is None
    if alone and (needed or said == "zero"):
        mask = masking.mask_in(block, x, axes, layer)
    if not again:
        memory.passes.note_block(block)
        memory.masked = (alone and mask is not None) or said != own
    return mask, said


def note_pass(layer: Any, x: Tensor, given: Arguments) -> bool:
    """Remember a pass whose recomputation may have to move the statistics in its stead.

    Returns:
        True if this is the recomputation of such a pass, and moves them (`move_late`).
    """
    if not given.training or given.tensors.running is None or torch.compiler.is_compiling():
        return False
    if keeps_statistics():  # as the caller wants, who is no other library
        return False
    passes, again = layer._memory.passes, in_backward()
    if not given.update:
        if not torch.is_grad_enabled() and not again:
            passes.note_untracked(x)
        return False
    if not passes.untracked:
        return False
    if again:
        return bool(passes.take_untracked(x))
    passes.note_tracked(x)
    return False


def _move_late(given: Arguments) -> None:
    """Move the statistics in a recomputation, whose own y is that of its first pass."""
    settings = given.settings._replace(adjustment=None)  # moves nothing, and may draw at random
    with torch.no_grad(), as_first_pass():
        normalize(given.tensors, settings, training=True, update=True)
