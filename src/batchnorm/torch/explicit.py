"""Batch normalization with its backward pass by hand, for networks built without autograd."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from batchnorm.core.backward import backward_batch, backward_running
from batchnorm.core.config import Options, check_flag, check_padded_output
from batchnorm.core.errors import ArgumentTypeError, ArgumentValueError, names_errors
from batchnorm.core.forward import Inputs, Outcome, forward_batch, forward_running
from batchnorm.core.gradient import Gradients
from batchnorm.core.layout import Layout, make_layout
from batchnorm.core.running import Running
from batchnorm.torch import checks
from batchnorm.torch.keeping import keeps_statistics
from batchnorm.torch.namespace import XP
from batchnorm.torch.rollback import write_all

__all__ = ["BatchNorm"]

_OWNER = "explicit.BatchNorm"
_REDUCTIONS = ("sum", "mean")
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


class _Pass(NamedTuple):
    """The part of the latest forward pass that `backward` needs."""

    inputs: Inputs
    result: Outcome | Tensor  # of own statistics, or y by the running ones
    running: Running
    layout: Layout
    dtype: torch.dtype


class BatchNorm:
    """Batch normalization over the batch axis alone, with explicit forward and backward passes.

    For images every pixel has its own gamma, beta and statistics. Training normalizes with the
    unbiased variance, and stores it.

    Args:
        patience: weight of the *old* running value (decay), strictly between 0 and 1.
        parameter_gradient: "sum" over the batch, the true gradient, or "mean", which divides it
            by the number of real rows.
        padded_output: "normalize" padded rows of the output like real ones, or "zero" them (S4).
        debias: let the running statistics forget their start of 0 and 1 at the first step (S23).
        **kwargs: ignored, so that the layers of a network can share one set of arguments.

    Attributes:
        epsilon: added to the variance, 1e-6.
        gamma, beta: parameters of shape `input_shape` and type `data_type`; `backward` adds to
            their `.grad`, creating it if it is absent.
        running_mean, running_var: of shape `input_shape`, float32 or wider, updated in place.
        num_batches_tracked: the steps that have updated them, int64.
        input_shape, output_shape, nparams: set by `initialise_layer`.

    Raises:
        TypeError: patience is not a number.
        ValueError: patience, parameter_gradient or padded_output out of range.

    Source: S2-S9, with k = 1 in S8; Ioffe and Szegedy 2015, algorithm 1 and section 3.

    >>> layer = BatchNorm(patience=0.9)
    >>> layer.initialise_layer(input_shape=(2,))
    >>> y = layer.forward(torch.tensor([[0.0, 1.0], [2.0, 5.0]]), training=True)
    >>> layer.backward(torch.ones(2, 2)).abs().max().item() < 1e-6, layer.beta.grad.tolist()
    (True, [2.0, 2.0])
    """

    epsilon = 1e-6
    name = "Batch normalisation"

    @names_errors(_OWNER)
    def __init__(
        self,
        patience: float = 0.9,
        *,
        parameter_gradient: str = "sum",
        padded_output: str = "normalize",
        debias: bool = False,
        **kwargs: Any,
    ) -> None:
        if isinstance(patience, bool) or not isinstance(patience, (int, float)):
            raise ArgumentTypeError(f"patience must be a number; got {patience!r}.")
        if not 0.0 < patience < 1.0:
            raise ArgumentValueError(
                f"patience must lie strictly between 0 and 1; got {patience!r}."
            )
        if parameter_gradient not in _REDUCTIONS:
            raise ArgumentValueError(
                f'parameter_gradient must be "sum" or "mean"; got {parameter_gradient!r}.'
            )
        self.patience = float(patience)
        self.parameter_gradient = parameter_gradient
        self.padded_output = check_padded_output(padded_output)
        self.debias = check_flag("debias", debias)
        self.input_shape: tuple[int, ...] | None = None
        self._pass: _Pass | None = None

    @names_errors(_OWNER)
    def initialise_layer(
        self,
        *,
        input_shape: Sequence[int],
        data_type: torch.dtype = torch.float32,
        device: Any = None,
    ) -> None:
        """Create parameters and statistics.

        Args:
            input_shape: of one sample, without the batch dimension.
            data_type: of gamma and beta; statistics are float32 where it is a 16-bit type.
            device: of all of them.

        Raises:
            TypeError: data_type is not a floating type, or input_shape no sequence of ints.
            ValueError: input_shape is empty or has a negative size.
        """
        shape = (input_shape,) if isinstance(input_shape, int) else tuple(input_shape)
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in shape):
            raise ArgumentTypeError(f"input_shape must be a sequence of ints; got {input_shape!r}.")
        if not shape or min(shape) < 0:
            raise ArgumentValueError(
                f"input_shape must name at least one size, none negative; got "
                f"{input_shape!r}. For one feature use (1,)."
            )
        if data_type not in checks.FLOATING:
            raise ArgumentTypeError(f"data_type must be a floating type; got {data_type!r}.")
        wide = checks.working_type(data_type)
        self.input_shape = self.output_shape = shape
        self.nparams = 2 * math.prod(shape)
        self.gamma = torch.ones(shape, dtype=data_type, device=device)
        self.beta = torch.zeros(shape, dtype=data_type, device=device)
        self.running_mean = torch.zeros(shape, dtype=wide, device=device)
        self.running_var = torch.ones(shape, dtype=wide, device=device)
        self.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=device)
        self._pass = None

    @torch.no_grad()
    @names_errors(_OWNER)
    def forward(
        self, input: Tensor, training: bool = False, mask: Tensor | None = None, **ignored: Any
    ) -> Tensor:
        """Normalize a batch; no autograd graph is recorded.

        Args:
            input: `(N, *input_shape)`, floating; N at least 2 in training.
            training: normalize by the batch and update the running statistics, or by the latter.
            mask: bool, or integer with 1 at real rows and 0 at padding, of shape `(N,)` or of
                input's rank with sizes of input or 1 (S1).
            **ignored: for networks that hand the same arguments to every layer.

        Returns:
            y, like input.

        Raises:
            RuntimeError: the layer is not initialised.
            TypeError: input is not a floating tensor, or training not a bool.
            ValueError: another shape, or a batch below 2 in training.
        """
        self._pass = None  # backward must never see an older pass
        layout = self._check_forward(input, training)
        if training:
            for name in _STATISTICS:
                checks.check_writable(name, getattr(self, name))
        work = checks.working_type(input.dtype)
        mask = checks.to_boolean(checks.check_mask(mask, input.device))
        # Copies: an optimizer's step or an in-place operation must not reach into backward.
        inputs = Inputs(
            input.to(work, copy=not training),
            None if mask is None else mask.clone(),
            self.gamma.to(work, copy=True),
            self.beta.to(work, copy=True),
        )
        mean, var, steps = [getattr(self, name) for name in _STATISTICS]
        running = Running(mean.to(work, copy=True), var.to(work, copy=True), steps)
        options = self._options()
        result: Outcome | Tensor
        if training:
            update = not keeps_statistics()
            result = outcome = forward_batch(inputs, running, layout, options, update=update, xp=XP)
            inputs, y, moved = inputs._replace(x=None), outcome.y.to(input.dtype), outcome.running
            assert moved is not None
            if update:
                assert moved.batches is not None
                write_all([(mean, moved.mean), (var, moved.var), (steps, moved.batches)])
        else:
            wide: Tensor = forward_running(inputs, running, layout, options, xp=XP)
            result, y = wide, wide.to(input.dtype)
        self._pass = _Pass(inputs, result, running, layout, input.dtype)
        return y

    @torch.no_grad()
    @names_errors(_OWNER)
    def backward(self, dCdy: Tensor, **ignored: Any) -> Tensor:
        """The gradient of the latest forward pass; adds to `gamma.grad` and `beta.grad`.

        Args:
            dCdy: gradient with respect to the output, of its shape; ignored at padded rows.
            **ignored: for networks that hand the same arguments to every layer.

        Returns:
            dCdx, of the input's shape and type, zero at padded rows.

        Raises:
            RuntimeError: there was no forward pass.
            TypeError: dCdy is not a floating tensor.
            ValueError: another shape.
        """
        if self._pass is None:
            raise RuntimeError(f"{_OWNER}: backward needs a forward pass before it; got none.")
        saved = self._pass
        checks.check_input(dCdy, "dCdy")
        if tuple(dCdy.shape) != saved.layout.shape:
            raise ArgumentValueError(
                f"dCdy must have the output's shape {saved.layout.shape}; got {tuple(dCdy.shape)}."
            )
        found = self._gradients(dCdy, saved)
        rows = 1 if self.parameter_gradient == "sum" else self._rows(saved)
        for parameter, gradient in ((self.gamma, found.dgamma), (self.beta, found.dbeta)):
            gradient = (gradient / rows).to(parameter.dtype)
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)
        return found.dx.to(saved.dtype)

    def get_parameters(self) -> tuple[Tensor, Tensor]:
        """gamma and beta, always the same two tensors, for an optimizer to update in place."""
        self._check_initialised()
        return self.gamma, self.beta

    def summary(self, offset: str = "") -> str:
        """One line about the layer, after `offset`."""
        self._check_initialised()
        return f"{offset}{self.name}: shape {self.output_shape}, {self.nparams} parameters"

    def _gradients(self, dCdy: Tensor, saved: _Pass) -> Gradients:
        dy = dCdy.to(checks.working_type(saved.dtype))
        options = self._options()
        if isinstance(saved.result, Outcome):
            return backward_batch(dy, saved.inputs, saved.result, saved.layout, options, xp=XP)
        return backward_running(
            dy, saved.result, saved.inputs, saved.running, saved.layout, options, xp=XP
        )

    def _rows(self, saved: _Pass) -> Any:
        """Real rows per channel, at least 1."""
        mask = saved.layout.mask(saved.inputs.mask, XP)
        if mask is None:
            return max(saved.layout.shape[0], 1)
        return mask.expand(saved.layout.shape).sum(dim=0).clamp(min=1)

    def _options(self) -> Options:
        return Options(
            eps=self.epsilon,
            decay=self.patience,
            unbiased=True,
            correction=1,
            padded_output=self.padded_output,
            debias=self.debias,
        )

    def _check_initialised(self) -> None:
        if self.input_shape is None:
            raise RuntimeError(f"{_OWNER}: call initialise_layer(input_shape=...) first.")

    def _check_forward(self, input: Any, training: Any) -> Layout:
        self._check_initialised()
        checks.check_input(input, "input")
        if not isinstance(training, bool):
            raise ArgumentTypeError(
                f"training must be True or False; got {training!r} of type "
                f"{type(training).__name__}."
            )
        assert self.input_shape is not None
        if input.dim() == 0 or tuple(input.shape[1:]) != self.input_shape:
            raise ArgumentValueError(
                f"input must have shape (N, *{self.input_shape}); got {tuple(input.shape)}."
            )
        if training and input.shape[0] < 2:
            raise ArgumentValueError(
                f"training needs a batch of at least 2; got {input.shape[0]}. "
                "Use a larger batch or training=False."
            )
        return make_layout(tuple(input.shape), tuple(range(1, input.dim())))
