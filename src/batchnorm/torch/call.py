"""The record of a call, made once at the edge; every question about a call is asked of it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from batchnorm.core import config
from batchnorm.core.errors import ArgumentValueError
from batchnorm.core.layout import Layout, check_per_channel, count_values, make_layout
from batchnorm.core.running import Running
from batchnorm.torch import checks
from batchnorm.torch.keeping import keeps_statistics
from batchnorm.torch.kernels.decision import Decision, decide
from batchnorm.torch.kernels.tensors import is_plain
from batchnorm.torch.ranks.synchronizer import Participation, Synchronizer, participate
from batchnorm.torch.recompute import recomputation_flag

_BATCHES = "num_batches_tracked"
_STATISTICS = (
    "running_mean",
    "running_var",
    _BATCHES,
    "running_stddev",
    *("renorm statistics",) * 2,
)


class Tensors(NamedTuple):
    """The tensors of a call; gamma, beta and running statistics have a value per channel."""

    x: Tensor
    mask: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    residual: Tensor | None
    running: Running | None


class Settings(NamedTuple):
    """The settings of a layer, or of a call of the function; already validated.

    Attributes:
        owner: the layer's class or the function, for explanations and messages between ranks.
        axis: channel axis or axes.
        options: as in Options.
        adjustment: function of x's shape, or None; applies in training (S13).
        fused: None, True or False.
        synchronizer: of training over ranks, or None (S14).
        pending: key of the step that this call is a pass of, in traced code a 0-d tensor; or None
            (S21).
        single_value: the rule for a single value per channel (S7).
    """

    owner: str
    axis: int | tuple[int, ...]
    options: config.Options
    adjustment: config.Adjustment | None
    fused: bool | None
    synchronizer: Synchronizer | None
    pending: int | Tensor | None = None
    single_value: str = "raise"


class Call(NamedTuple):
    """A call whose arguments are checked.

    Attributes:
        tensors, settings: its arguments.
        training: ghost batches, renormalization, adjustment and other ranks count (S15).
        update: move the running statistics, if there are any.
        traced: `torch.compile` traces it.
        layout: of x, with the ghost batches that apply.
        decision: about kernels in eager code; None where they cannot read x, or fused=False.
        part: its participation in synchronization, or None (S14).
    """

    tensors: Tensors
    settings: Settings
    training: bool
    update: bool
    traced: bool
    layout: Layout
    decision: Decision | None
    part: Participation | None

    @property
    def owner(self) -> str:
        """The class or function that explanations and messages between ranks name."""
        return self.settings.owner

    @property
    def options(self) -> config.Options:
        """The options of the core."""
        return self.settings.options

    @property
    def by_batch(self) -> bool:
        """True if x is normalized by its own statistics."""
        return self.training or self.tensors.running is None

    @property
    def renormalizes(self) -> bool:
        """True if renormalization applies (S11)."""
        wanted = self.options.renorm is not None and self.training
        return wanted and self.tensors.running is not None

    @property
    def adjustment(self) -> config.Adjustment | None:
        """The adjustment that applies (S13)."""
        return self.settings.adjustment if self.training else None

    @property
    def again(self) -> Tensor | Literal[True] | None:
        """The `recomputation_flag` of this forward pass (S9)."""
        return recomputation_flag(self.tensors.x)

    @property
    def working_type(self) -> torch.dtype:
        """The type in which array code computes."""
        return checks.working_type(self.tensors.x.dtype)

    @property
    def mask_varies(self) -> bool:
        """True if the mask may differ between channels (S1 c)."""
        mask, layout = self.tensors.mask, self.layout
        if mask is None:
            return False
        return layout.varies_along_channels(layout.mask_shape(tuple(mask.shape)))


def make_call(tensors: Tensors, settings: Settings, training: bool, update: bool) -> Call:
    """The record of a call, if its arguments fit (x itself is checked before).

    Raises:
        TypeError: a tensor of an unsupported type or dtype.
        ValueError: shapes that do not fit; a single value per channel in training.
        SynchronizationError: a layer's process group is gone.
    """
    x, mask, owner, options = tensors.x, tensors.mask, settings.owner, settings.options
    checked = checks.check_mask(mask, x.device)
    if checked is not mask:
        mask, tensors = checked, tensors._replace(mask=checked)
    size = options.virtual_batch_size if training else None
    decision = None
    if settings.fused is not False and is_plain(x):
        decision = decide(
            (x.shape, x.stride(), x.dtype, x.device.type),
            settings.axis,
            size,
            training and settings.adjustment is not None,
            options.activation,
            options.zero_padding,
            None if mask is None else (mask.shape, mask.stride(), mask.element_size()),
            settings.fused is True,
        )
        layout = decision.layout
    else:
        layout = make_layout(tuple(x.shape), settings.axis, size)
    traced = torch.compiler.is_compiling()
    update = update and not keeps_statistics()
    call = Call(tensors, settings, training, update, traced, layout, decision, None)
    _check_tensors(call)
    if _has_single_values(call):
        return _follow_rule(call)
    synchronizer = settings.synchronizer
    if synchronizer is None or not training:
        return call
    return call._replace(part=participate(synchronizer, owner, layout, options, call.mask_varies))


def _check_tensors(call: Call) -> None:
    (x, _, weight, bias, residual, running), layout = call.tensors, call.layout
    channels = layout.channels
    for name, a in (("weight", weight), ("bias", bias)):
        if a is not None:
            if a.shape != channels:
                check_per_channel(name, a, layout)
            if type(a) is not Parameter or a.dtype is not x.dtype or a.layout is not torch.strided:
                checks.check_parameter(name, a)
    if running is not None:
        _check_running(call, running, channels)
    if residual is not None:
        checks.check_residual(residual, x)


def _check_running(call: Call, running: Running, channels: tuple[int, ...]) -> None:
    layout, written = call.layout, call.update and not call.traced
    for name, a in zip(_STATISTICS, running, strict=True):
        if a is None:
            continue
        if name is not _BATCHES and (
            a.shape != channels
            or a.dtype not in checks.FLOATING
            or a.requires_grad
            or type(a) is not Tensor
            or a.layout is not torch.strided
        ):
            check_per_channel(name, a, layout)
            checks.check_statistic(name, a)
        if written and a.is_inference():
            checks.check_writable(name, a)


def _has_single_values(call: Call) -> bool:
    """True if the shape alone shows a single value per channel, to be normalized by itself."""
    layout = call.layout
    if call.tensors.mask is not None or layout.groups is not None or not call.by_batch:
        return False
    if call.training and call.settings.synchronizer is not None:
        return False
    return count_values(layout) == 1


def _follow_rule(call: Call) -> Call:
    """The call by the rule for a single value per channel (S7), which moves no statistics."""
    rule, layout = call.settings.single_value, call.layout
    if rule == "beta":
        return call._replace(update=False)
    if rule == "running" and call.tensors.running is not None:
        return call._replace(training=False, update=False)
    needs = "" if rule == "raise" else " single_value='running' needs running statistics."
    raise ArgumentValueError(
        f"Expected more than 1 value per channel when training; got an input of shape "
        f"{layout.shape} with channel axes {layout.channel_axes}.{needs} Use a larger batch, "
        'evaluation mode, a mask, or single_value="beta" or "running".'
    )
