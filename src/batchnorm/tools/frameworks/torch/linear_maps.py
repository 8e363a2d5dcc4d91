"""torch's linear maps and batch norms, as folding sees them."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from batchnorm.core.errors import naming
from batchnorm.core.fold import Folded
from batchnorm.core.layout import normalize_axis
from batchnorm.tools.frameworks.affine import Affine, into_next, into_previous, refuse_zeroing
from batchnorm.tools.frameworks.torch.states import is_batch_norm, take_state
from batchnorm.torch.layers import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d


class LinearMap(NamedTuple):
    """The axes of a kind of linear map that hold channels.

    Attributes:
        spatial: axes behind the channels of input and output.
        output: axis of the weight that holds output channels, or a group's share of them.
    """

    spatial: int
    output: int


_MAPS: dict[type, LinearMap] = {
    nn.Linear: LinearMap(0, 0),
    nn.Conv1d: LinearMap(1, 0),
    nn.Conv2d: LinearMap(2, 0),
    nn.Conv3d: LinearMap(3, 0),
    nn.ConvTranspose1d: LinearMap(1, 1),
    nn.ConvTranspose2d: LinearMap(2, 1),
    nn.ConvTranspose3d: LinearMap(3, 1),
}
# A subclass with one of these of its own may compute something else.
_COMPUTING = ("forward", "_conv_forward", "_output_padding", "__call__", "__getattr__")
# What modules of other classes call; arguments in the order of their signatures.
_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups")
_FUNCTIONS: dict[Any, tuple[LinearMap, tuple[str, ...]]] = {
    functional.linear: (LinearMap(0, 0), _CONVOLUTION[:3]),
    functional.conv1d: (LinearMap(1, 0), _CONVOLUTION),
    functional.conv2d: (LinearMap(2, 0), _CONVOLUTION),
    functional.conv3d: (LinearMap(3, 0), _CONVOLUTION),
    functional.conv_transpose1d: (LinearMap(1, 1), _TRANSPOSED),
    functional.conv_transpose2d: (LinearMap(2, 1), _TRANSPOSED),
    functional.conv_transpose3d: (LinearMap(3, 1), _TRANSPOSED),
}
_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d),
)
_DO_NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)


def is_map(module: Any) -> bool:
    """True for a linear map that a batch norm can be folded into."""
    return _find_kind(type(module)) is not None


def kind_of(module: Any) -> LinearMap:
    """The axes of a module for which `is_map` is true."""
    kind = _find_kind(type(module))
    assert kind is not None
    return kind


def _find_kind(kind: type) -> LinearMap | None:
    base = next((base for base in kind.__mro__ if base in _MAPS), None)
    if base is None or any(hasattr(kind, name) for name in ("weight", "bias")):  # computed ones
        return None
    same = (getattr(kind, name, None) is getattr(base, name, None) for name in _COMPUTING)
    return _MAPS[base] if all(same) else None


def bind_function(
    function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[LinearMap, dict[str, Any]] | None:
    """The axes and arguments of a call, if its function is a linear map."""
    if function not in _FUNCTIONS:
        return None
    kind, names = _FUNCTIONS[function]
    given = dict(zip(names, args, strict=False)) | kwargs  # dilation may lie behind the names
    return kind, given


def is_norm(module: Any) -> bool:
    """True for a class that computes a batch norm and no more than `BatchNorm` does."""
    fixed = type(module).__name__.endswith("FrozenBatchNorm2d")  # torchvision's and its copies
    known = type(module) in _NORMS or bool(_children(module))
    return known or (fixed and is_batch_norm(module))


def activation_of(norm: Any) -> str | None:
    """The activation that a batch norm computes itself, without a child that does it."""
    return None if following(norm) else getattr(norm, "activation", None)


def following(norm: Any) -> list[str]:
    """Names of the children that a batch norm calls on its output, if they do something."""
    return [name for name in _children(norm) if not does_nothing(norm.get_submodule(name))]


def _children(norm: Any) -> tuple[str, ...]:
    return norm.origin.children if isinstance(norm, BatchNorm) else ()


def does_nothing(module: Any) -> bool:
    """True for a module that returns its input in evaluation."""
    return type(module) in _DO_NOTHING and not module.training


def refuse_module(module: Any) -> str | None:
    """The reason why a linear map or batch norm does more than its type says, or None."""
    if nn.utils.parametrize.is_parametrized(module):
        return "is parametrized"
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
    if any(hooks) or module._backward_pre_hooks:
        return "has hooks"
    return None


def refuse_norm(module: Any) -> str | None:
    """The reason why a batch norm cannot be folded, or None."""
    if module.running_mean is None:
        return "keeps no running statistics, so that it evaluates by the batch's"
    if module.training and not getattr(module, "frozen", False) and type(module) in _NORMS:
        return "is in training mode; call eval() first"
    reason = refuse_zeroing(module) or refuse_module(module)
    return None if reason is None else f"it {reason}"


def channel_axis(norm: Any, rank: int) -> int | None:
    """The axis that a batch norm normalizes; None for several."""
    with naming(type(norm).__name__):
        axes = normalize_axis(getattr(norm, "axis", 1), rank)
    return axes[0] if len(axes) == 1 else None


def output_axis(module: Any, rank: int) -> int:
    """The axis of a linear map's input and output that holds channels."""
    return rank - 1 - kind_of(module).spatial


def spatial_axes(module: Any) -> int:
    """Axes behind the channels of a linear map's input."""
    return kind_of(module).spatial


def state_of(norm: nn.Module) -> Any:
    """Its `BatchNormState`."""
    return take_state(norm, "")


def refuse_padding(module: Any, affine: Affine) -> str | None:
    """The reason against folding a batch norm into the linear map behind it, or None."""
    if isinstance(module, nn.Linear):
        return None
    padding = module.padding if module.padding_mode == "zeros" else 0  # else of x itself
    return refuse_zeros(kind_of(module), padding, module.kernel_size, affine)


def refuse_zeros(
    kind: LinearMap, padding: Any, kernel_size: tuple[int, ...], affine: Affine
) -> str | None:
    """As `refuse_padding`, for a call of a function."""
    if kind.output == 1:
        return "a transposed convolution, at whose edges fewer inputs meet"
    if not affine.moves_zero or padding == "valid":
        return None
    if padding == "same":
        padding = [n - 1 for n in kernel_size]
    if not any(padding if isinstance(padding, (tuple, list)) else [padding]):
        return None
    return "a convolution that pads with zeros, which the batch norm would move"


def fold_previous(
    module: Any, affine: Affine, kind: LinearMap | None = None, groups: int | None = None
) -> None:
    """Fold the batch norm behind a linear map into it, in place.

    Args:
        module: has `weight` and `bias`, which may be None.
        affine: the batch norm.
        kind: of a module for which `is_map` is false.
        groups: of such a module.
    """
    where = kind or kind_of(module)
    groups = getattr(module, "groups", 1) if groups is None else groups
    weight, bias = _wide(module)
    _replace(module, into_previous(weight, bias, affine, axis=where.output, groups=groups or 1))


def fold_next(module: Any, affine: Affine, groups: int | None = None) -> None:
    """Fold the batch norm in front of a linear map into it, if `refuse_padding` gives no reason.

    Args:
        module: as for `fold_previous`.
        affine: the batch norm.
        groups: of a module for which `is_map` is false.
    """
    weight, bias = _wide(module)
    groups = getattr(module, "groups", 1) if groups is None else groups
    _replace(module, into_next(weight, bias, affine, axis=1, output_axis=0, groups=groups or 1))


def _wide(module: Any) -> tuple[Any, Any]:
    return tuple(  # type: ignore[return-value]
        None if a is None else a.detach().cpu().double().numpy()
        for a in (module.weight, module.bias)
    )


def _replace(module: Any, folded: Folded) -> None:
    """Set new parameters, since others may hold the old ones."""
    old = module.weight
    for name, array in (("weight", folded.weight), ("bias", folded.bias)):
        tensor: Tensor = torch.from_numpy(array).to(device=old.device, dtype=old.dtype)
        tensor = tensor.contiguous(memory_format=_format_of(old, tensor))
        setattr(module, name, nn.Parameter(tensor, requires_grad=old.requires_grad))


def _format_of(old: Tensor, new: Tensor) -> torch.memory_format:
    """Channels last if the old weight was, else contiguous."""
    if new.dim() == 4 and old.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    return torch.contiguous_format
