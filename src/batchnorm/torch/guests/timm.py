"""timm's batch norm with an activation behind it. Imported only where a model has one."""

from __future__ import annotations

from typing import Any

import torch
from timm.layers.norm_act import BatchNormAct2d as Original
from timm.layers.norm_act import SyncBatchNormAct
from torch import Tensor, nn
from torch.fx import Proxy

from batchnorm.core.config import NEGATIVE_SLOPE
from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError, names_errors
from batchnorm.torch import masking
from batchnorm.torch.conversions import Left, take_over
from batchnorm.torch.layers import BatchNorm, BatchNorm2d
from batchnorm.torch.options import Origin
from batchnorm.torch.private import constant_in_graphs


class BatchNormAct2d(BatchNorm2d, Original):
    """timm's BatchNormAct2d: norm, drop, activation; with masks, and this library's statistics.

    `convert_batchnorm` makes it of timm's, with the same names of parameters and children. An
    activation that a kernel computes along with the norm (S18) is not called on its own, unless
    it has hooks.
    """

    origin = Origin(("activation",), ("drop", "act"), SyncBatchNormAct)

    @names_errors()
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        raise ArgumentTypeError(
            "make timm's layer, and convert it by batchnorm.torch.convert_batchnorm."
        )

    @names_errors()
    def forward(
        self, input: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """y, as `BatchNorm.forward` describes it, through drop and activation."""
        if isinstance(input, Proxy):
            return super().forward(input, mask, residual)  # a call of the whole layer
        own = _find_activation(self)
        if own != self.activation:  # a child was exchanged, or got a hook
            self.configure(activation=own)
        y = super().forward(input, mask, residual)
        if own is not None:
            return y
        if masking.may_zero(self.padded_output) and _moves_zero(self.act):
            raise ArgumentValueError(
                f'padded_output="zero" does not reach behind the layer\'s own activation '
                f"{self.act}, which makes something else of 0 (S4). Exchange it, or leave such "
                'layers at padded_output="normalize" and mask what the layers behind them read.'
            )
        found: Tensor = self.act(self.drop(y))
        return found


def convert(layer: nn.Module, **options: Any) -> BatchNorm | Left:
    """Ours in place of timm's."""
    if not hasattr(layer, "act") or not hasattr(layer, "drop"):
        return Left("it has no drop and act, which timm's own conversion gives it")
    if "activation" in options:
        raise ArgumentValueError(
            f"activation={options['activation']!r} cannot be set for a layer of timm that has its "
            f"own: {layer.act}. Leave such layers out by skip=, or activation= away."
        )
    return take_over(layer, BatchNormAct2d, {**options, "activation": _find_activation(layer)})


def _find_activation(layer: Any) -> str | None:
    """The activation that kernels compute; None where the layer must call its own."""
    if type(layer.drop) is not nn.Identity or _has_hooks(layer.drop) or _has_hooks(layer.act):
        return None
    if type(layer.act) is nn.ReLU:
        return "relu"
    slope = getattr(layer.act, "negative_slope", None)
    return "leaky_relu" if type(layer.act) is nn.LeakyReLU and slope == NEGATIVE_SLOPE else None


@constant_in_graphs
def _moves_zero(act: nn.Module) -> bool:
    """True for an activation that does not map 0 to 0."""
    with torch.no_grad():
        like = next(act.parameters(), torch.empty(0))
        return bool((act(torch.zeros(1, device=like.device, dtype=like.dtype)) != 0).any())


def _has_hooks(module: nn.Module) -> bool:
    """True if something waits for this very module to be called."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )
