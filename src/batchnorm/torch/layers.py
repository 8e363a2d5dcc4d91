"""The layers, which keep parameters and statistics as torch's own do."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy

from batchnorm.core import config
from batchnorm.core.declaration import check_arguments, check_known, list_arguments
from batchnorm.core.errors import ArgumentTypeError, names_errors
from batchnorm.core.layout import check_axis
from batchnorm.kernels.explanation import Explanation
from batchnorm.torch import layer_call
from batchnorm.torch.buffers import RunningStatistics
from batchnorm.torch.call import make_call
from batchnorm.torch.functional import normalize
from batchnorm.torch.fx import trace_call
from batchnorm.torch.options import OPTIONS, Origin, change_arguments, make_signature
from batchnorm.torch.ranks.groups import check_group
from batchnorm.torch.ranks.synchronizer import Synchronizer
from batchnorm.torch.rebuilt import check_reader
from batchnorm.torch.ways.choice import run
from batchnorm.torch.ways.last_call import LastCalls, explain_call

__all__ = ["BatchNorm", "BatchNorm1d", "BatchNorm2d", "BatchNorm3d"]


class BatchNorm(RunningStatistics):
    """Batch normalization over every axis but the channel axes, for inputs of any rank.

    Takes the place of `torch.nn.BatchNorm1d`, `2d`, `3d`, with their arguments and state_dict.

    Args:
        num_features: C; with several axes their sizes in increasing order of axis, like
            `(A, B)`.
        eps: added to the variance, at least 0.
        momentum: weight of the *new* value in the running statistics, between 0 and 1; None for
            the cumulative average.
        affine: learn weight (gamma) and, with `bias`, bias (beta).
        track_running_stats: keep running statistics; without them evaluation uses the batch's.
        device: of parameters and buffers.
        dtype: of weight and bias. Running statistics are float32 or wider (S16), and stay so
            when the model is cast to half or bfloat16.
        axis: channel axis or axes of the input.
        bias: learn beta, if affine.
        virtual_batch_size: samples of one ghost batch, which must divide the batch in training
            (S12).
        renorm: batch renormalization (S11); needs running statistics.
        renorm_clipping: any of "rmin", "rmax", "dmax"; missing ones are 0, ∞, ∞.
        renorm_momentum: weight of the new value in the statistics that r and d compare with.
        adjustment: function of the input's shape returning (scale, bias), each broadcastable
            against the input, applied before weight and bias in training (S13).
        activation: None, "relu" or "leaky_relu" (slope 0.01), applied last (S18).
        padded_output: "normalize" padded rows of the output like real ones, or "zero" them (S4).
        debias: let the running statistics forget their start of 0 and 1 at the first step (S23).
        single_value: the rule for inputs whose shape alone gives a single value per channel in
            training: "raise", "beta" (the output is the bias), or "running" (normalize by the
            running statistics); such inputs move no statistics (S7).
        fused: None takes the fastest path, True demands a kernel, False plain array code.
        synchronized: normalize in training by the statistics of all ranks' batches together,
            whatever their sizes and masks (S14). All ranks must run the layer, forward and
            backward; one without data passes an empty batch. Without torch.distributed, or with
            one rank, an ordinary layer.
        process_group: the ranks that take part; None for the default group.

    Raises:
        TypeError: an option of the wrong type.
        ValueError: an option out of range, or options that exclude each other.

    Source: S1-S18; Ioffe and Szegedy 2015 (arXiv 1502.03167), algorithms 1 and 2; Ioffe 2017
    (arXiv 1702.03275), algorithm 1. Unlike torch's it takes masks, keeps its digits at large
    offsets (S3), updates statistics once under checkpointing and never from an empty or
    overflowing channel (S9), stays frozen when told so, and rejects no empty batch.

    >>> layer = BatchNorm(3)
    >>> layer(torch.randn(8, 3, 5), mask=torch.ones(8, 5, dtype=torch.bool)).shape
    torch.Size([8, 3, 5])
    """

    origin = Origin()

    axis: int | tuple[int, ...]
    adjustment: config.Adjustment | None
    fused: bool | None
    synchronized: bool

    @names_errors()
    def __init__(
        self,
        num_features: int | tuple[int, ...],
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        device: Any = None,
        dtype: torch.dtype | None = None,
        *,
        axis: int | tuple[int, ...] = 1,
        bias: bool = True,
        virtual_batch_size: int | None = None,
        renorm: bool = False,
        renorm_clipping: Mapping[str, float] | None = None,
        renorm_momentum: float = 0.01,
        adjustment: config.Adjustment | None = None,
        activation: str | None = None,
        padded_output: str = "normalize",
        debias: bool = False,
        single_value: str = "raise",
        fused: bool | None = None,
        synchronized: bool = False,
        process_group: Any = None,
    ) -> None:
        given = locals()
        sizes = layer_call.check_features(num_features, check_axis(axis))
        config.check_flag("affine", affine)
        config.check_flag("bias", bias)
        config.check_flag("track_running_stats", track_running_stats)
        layer_call.check_dtype(dtype)
        super().__init__(
            sizes if len(sizes) > 1 else sizes[0],
            eps,
            momentum,
            affine,
            track_running_stats,
            device=device,
            dtype=dtype,
        )
        if not bias:
            self.register_parameter("bias", None)
        self.frozen = False
        self._set_options({name: given[name] for name in list_arguments(OPTIONS) if name in given})
        self.reset_running_stats()

    @names_errors()
    def configure(self, **options: Any) -> None:
        """Set and check options that torch's layers lack; arguments as the constructor's.

        Those left out stay as they are, and so do the running statistics and `freeze`'s effect.
        Renormalization that is switched on starts from the running statistics (S11).
        """
        check_known(OPTIONS, options)
        self._set_options(change_arguments(self, options))

    configure.__signature__ = make_signature()  # type: ignore[attr-defined]

    def _set_options(self, arguments: Mapping[str, Any]) -> None:
        layer_call.check_moving(self)
        values = check_arguments(OPTIONS, arguments)
        layer_call.check_tracked(self, values)
        for name, value in values.items():
            setattr(self, name, value)
        if "_synchronizer" not in self.__dict__:
            self._synchronizer = Synchronizer()
        self._synchronizer.group = arguments.get("process_group")
        if self.synchronized:
            self._synchronizer.enlist()
        self._memory = LastCalls()
        self._prepare_statistics()

    def forward(
        self, input: Tensor, mask: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """Normalize the input x.

        Args:
            input: x, floating, of a rank that has the channel axes, `(N, C, ...)` by default; or
                jagged.
            mask: bool, or integer with 1 at real rows and 0 at padding: x's shape without its
                channel axes, a prefix of that, or x's rank with sizes of x or 1 (S1). None takes
                the one of `padding_mask`, if any.
            residual: added before the activation, of x's shape (S18).

        Returns:
            y, of x's shape and type.

        Raises:
            TypeError: a tensor of the wrong dtype.
            ValueError: shapes that do not fit; a single value per channel in training. State is
                unchanged then.
        """
        x = input
        # torch.fx traces into no module of torch, nor into these.
        if type(x) is not Tensor and isinstance(x, Proxy):
            return trace_call(self, x, {"mask": mask, "residual": residual})
        alone = mask is None and residual is None and not torch.compiler.is_compiling()
        key = self._memory.find_key(self, x) if alone else None
        if key is not None and (y := self._memory.repeat(self, x, key)) is not None:
            return y
        return self._run(x, mask, residual, key)

    @names_errors()
    def _run(self, x: Tensor, mask: Tensor | None, residual: Tensor | None, key: Any) -> Tensor:
        """y of a call that repeats none; `key`: to remember it by, or None."""
        given = layer_call.gather_arguments(self, x, mask, residual)
        late = layer_call.note_pass(self, x, given)
        if x.layout is torch.jagged:
            y = normalize(*given[:2], training=given.training, update=given.update)
        else:
            call = make_call(*given[:4])
            y = run(call)
            if key is not None and call.tensors.mask is None:
                self._memory.learn(self, key, call)
        if late or given.zeroing is not None:
            y = layer_call.finish(y, given, late)
        return y

    def _explain(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        residual: Tensor | None = None,
        *,
        graph: bool = False,
    ) -> Explanation:
        """The way that a call takes; `graph`: in a graph of `torch.compile`."""
        return explain_call(self, BatchNorm.forward, (x, mask, residual), graph=graph)

    @property
    def process_group(self) -> Any:
        """The ranks that a synchronized layer merges statistics with; None: the default group."""
        return self._synchronizer.group

    @process_group.setter
    @names_errors()
    def process_group(self, group: Any) -> None:
        check_group(self.synchronized, group)
        self._synchronizer.group = group

    def name_for_ranks(self, name: str) -> None:
        """Set the name by which ranks tell synchronized layers apart: the same on all of them."""
        self._synchronizer.name = name

    @names_errors()
    def __prepare_scriptable__(self) -> Any:
        """Refuse: torch.jit.script calls this before it compiles a module."""
        raise ArgumentTypeError(
            "torch.jit.script cannot compile this layer. Before it, fold "
            "the layer into its neighbours (batchnorm.tools.fold) or put torch's back "
            "(batchnorm.torch.revert_batchnorm); or use torch.jit.trace or torch.export."
        )

    def __getattr__(self, name: str) -> Any:
        """torch's search for parameters and buffers, but with regard to who asks."""
        if name == "running_var":
            check_reader(self)
        return super().__getattr__(name)

    def __getstate__(self) -> dict[str, Any]:
        """Everything but the memory of calls and of a step's passes, which a copy begins anew."""
        left_out = ("_memory", "_pending", "_traced_pending")
        return {name: value for name, value in self.__dict__.items() if name not in left_out}

    def __setstate__(self, state: dict[str, Any]) -> None:
        kept = {option.name: option.kept for option in OPTIONS}
        super().__setstate__(kept | state)  # an older state lacks newer options and buffers
        self._memory = LastCalls()
        self._prepare_statistics()

    def extra_repr(self) -> str:
        """torch's description, and every option that differs from its default."""
        shown = [super().extra_repr()]
        for option in OPTIONS:
            value = getattr(self, option.name)
            if option.shown and value != option.kept:
                shown.append(f"{option.name}={value}")
        return ", ".join([*shown, *(["frozen=True"] if self.frozen else [])])

    def _check_input_dim(self, input: Tensor) -> None:
        """Every rank that has the channel axes will do."""


class BatchNorm1d(BatchNorm, torch.nn.BatchNorm1d):
    """`BatchNorm` for inputs of rank 2 or 3, `(N, C)` or `(N, C, L)`; a `torch.nn.BatchNorm1d`."""

    def _check_input_dim(self, input: Tensor) -> None:
        layer_call.check_rank(input, (2, 3))


class BatchNorm2d(BatchNorm, torch.nn.BatchNorm2d):
    """`BatchNorm` for inputs of rank 4, `(N, C, H, W)`; a `torch.nn.BatchNorm2d`."""

    def _check_input_dim(self, input: Tensor) -> None:
        layer_call.check_rank(input, (4,))


class BatchNorm3d(BatchNorm, torch.nn.BatchNorm3d):
    """`BatchNorm` for inputs of rank 5, `(N, C, D, H, W)`; a `torch.nn.BatchNorm3d`."""

    def _check_input_dim(self, input: Tensor) -> None:
        layer_call.check_rank(input, (5,))
