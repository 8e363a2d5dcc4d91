"""Code of others that makes another module of our layer, and would drop in silence what it does.

torch's fusers and `convert_sync_batchnorm` read a batch norm's buffers and know none of our
options. Without changing them, two places tell: the reading of `running_var`, and the registration
of the new module in its parent.
"""

from __future__ import annotations

import sys
import warnings
from types import FrameType
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from batchnorm.core.errors import ArgumentValueError, naming
from batchnorm.torch.buffers import RunningStatistics
from batchnorm.torch.options import find_obstacle

# Functions of torch that fold a batch norm in evaluation, by module and name.
_FUSERS = {
    ("torch.nn.utils.fusion", "fuse_conv_bn_eval"),
    ("torch.nn.utils.fusion", "fuse_linear_bn_eval"),
    ("torch.utils.mkldnn", "__init__"),
}
_CONVERTER = ("torch.nn.modules.batchnorm", "convert_sync_batchnorm")
_SHARED = ("weight", "bias", "running_mean", "running_var")


def check_reader(layer: RunningStatistics) -> None:
    """Raise if torch makes another module of this layer that would compute something else."""
    frame = sys._getframe(2)  # below __getattr__
    reader = _name(frame)
    if reader in _FUSERS:
        if reason := find_obstacle(layer, training=False):
            with naming(reader[1].replace("__init__", "to_mkldnn")):
                raise ArgumentValueError(
                    f"this {type(layer).__name__} {reason}, which would be lost; fold it with "
                    "batchnorm.tools.fold, which keeps it."
                )
    elif reader == _CONVERTER and frame.f_back is not None and _name(frame.f_back) != _CONVERTER:
        _refuse_conversion(layer)


def _name(frame: FrameType) -> tuple[str, str]:
    return frame.f_globals.get("__name__", ""), frame.f_code.co_name


def _refuse_conversion(layer: RunningStatistics) -> None:
    """Raise or warn for a layer that is converted alone; in a model, `keep_layer` keeps it."""
    remedy = (
        "For this library's layer over all ranks, set synchronized=True and leave out "
        "convert_sync_batchnorm."
    )
    if reason := find_obstacle(layer):
        with naming(_CONVERTER[1]):
            raise ArgumentValueError(
                f"this {type(layer).__name__} {reason}, which torch's SyncBatchNorm cannot do. "
                f"{remedy}"
            )
    warnings.warn(f"{_CONVERTER[1]}: torch's SyncBatchNorm takes no mask. {remedy}", stacklevel=5)


def keep_layer(parent: nn.Module, name: str, new: Any) -> nn.Module | None:
    """Our layer in place of the SyncBatchNorm that torch makes of it; or None, which is no change.

    torch calls this for each module that becomes a child of another. Warns of a fuser, freezer
    or converter that puts something else in the place of a layer with an activation or axis.
    """
    old = parent.__dict__.get("_modules", {}).get(name)
    if not isinstance(old, RunningStatistics) or isinstance(new, RunningStatistics):
        return None
    if isinstance(new, nn.SyncBatchNorm) and _shares(old, new):
        return _synchronize(old, new.process_group)
    reason = find_obstacle(old, training=False, original=_has_children(old, new))
    if reason and (isinstance(new, nn.Identity) or hasattr(new, "running_var")):
        warnings.warn(
            f"a {type(old).__name__} that {reason} has been replaced by {type(new).__name__}, "
            "which does not do that. batchnorm.tools.fold keeps it.",
            stacklevel=4,
        )
    return None


def _shares(old: RunningStatistics, new: nn.Module) -> bool:
    return all(getattr(old, name) is getattr(new, name) for name in _SHARED)


def _has_children(old: Any, new: Any) -> bool:
    """True if a layer's original put the children that it calls on its output in the new module."""
    names: tuple[str, ...] = old.origin.children
    return bool(names) and all(getattr(new, n, None) is getattr(old, n) for n in names)


def _synchronize(layer: Any, group: Any) -> Any:
    layer.configure(synchronized=True, process_group=group)
    warnings.warn(
        "convert_sync_batchnorm: this library's layers stay, now with synchronized=True over the "
        "same ranks; torch's SyncBatchNorm would lose masks and options.",
        stacklevel=5,
    )
    return layer


register_module_module_registration_hook(keep_layer)  # type: ignore[arg-type]
