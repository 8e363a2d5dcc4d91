"""The zoo's checks: each compares a converted model with its original, and returns a result."""

from __future__ import annotations

import copy
import io
import warnings
from collections.abc import Callable
from typing import Any

import torch
from models import Entry, first_tensor
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils import _pytree as pytree

import batchnorm.torch
from batchnorm.tools import fold
from batchnorm.torch import convert_batchnorm, padding_mask

Result = float | int | str | bool
STOCK = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Pair:
    """A model with torch's norms, its converted copy, and an input for both."""

    def __init__(self, entry: Entry) -> None:
        torch.manual_seed(0)
        self.entry = entry
        self.stock = entry.build()
        for module in self.stock.modules():  # statistics that evaluation can tell from a start
            if isinstance(module, _BatchNorm) and module.running_mean is not None:
                module.running_mean.uniform_(-0.2, 0.2)
                module.running_var.uniform_(0.5, 1.5)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            self.ours = convert_batchnorm(copy.deepcopy(self.stock))
        self.said = [str(w.message) for w in said]
        self.args, self.kwargs = entry.feed()

    def scale(self) -> float:
        """The largest output of the original."""
        with torch.no_grad():
            return float(self.call(copy.deepcopy(self.stock).eval()).abs().max())

    def copies(self) -> tuple[nn.Module, nn.Module]:
        return copy.deepcopy(self.stock), copy.deepcopy(self.ours)

    def call(self, model: nn.Module, change: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        """The model's output for the input, whose floating tensors `change` gets first."""
        args, kwargs = pytree.tree_map_only(
            Tensor, lambda x: change(x) if x.is_floating_point() else x, (self.args, self.kwargs)
        )
        torch.manual_seed(1)  # dropout, where a config cannot switch it off
        return first_tensor(model(*args, **kwargs))


def count(pair: Pair) -> Result:
    """Norms that are ours after conversion, of all."""
    ours = sum(isinstance(m, batchnorm.torch.BatchNorm) for m in pair.ours.modules())
    norms = sum(isinstance(m, _BatchNorm) for m in pair.stock.modules())
    return f"{ours} of {norms}"


def evaluation(pair: Pair) -> Result:
    """Largest difference of outputs in evaluation."""
    with torch.no_grad():
        return _apart(*(pair.call(m.eval()) for m in pair.copies()))


def training(pair: Pair) -> Result:
    """Largest difference of outputs in training."""
    with torch.no_grad():
        return _apart(*(pair.call(m.train()) for m in pair.copies()))


def keys(pair: Pair) -> Result:
    """Equality of the keys of both state_dicts, in order."""
    return list(pair.stock.state_dict()) == list(pair.ours.state_dict())


def groups(pair: Pair) -> Result:
    """Equality of the parameters that a split by isinstance spares from weight decay."""
    return _spared(pair.stock) == _spared(pair.ours)


def steps(pair: Pair) -> Result:
    """Largest difference of parameters and statistics after three steps of SGD in float64."""
    return _states_apart(*(_train(pair, model, torch.float64) for model in pair.copies()))


def steps_moved(pair: Pair) -> Result:
    """The same between torch's norms and torch's norms, whose input moved by one rounding."""
    return _moved(pair, torch.float64)


def steps_float32(pair: Pair) -> Result:
    """As `steps`, in float32."""
    return _states_apart(*(_train(pair, model, torch.float32) for model in pair.copies()))


def steps_float32_moved(pair: Pair) -> Result:
    """As `steps_moved`, in float32."""
    return _moved(pair, torch.float32)


def checkpointing(pair: Pair) -> Result:
    """Statistics' largest difference after one step with activation checkpointing and without."""
    plain, wrapped = copy.deepcopy(pair.ours).train(), copy.deepcopy(pair.ours).train()
    if hasattr(wrapped, "gradient_checkpointing_enable"):
        try:
            wrapped.gradient_checkpointing_enable()
        except ValueError as error:
            return f"not applicable: {str(error).split('.')[0]}"
    elif hasattr(wrapped, "set_grad_checkpointing"):
        try:
            wrapped.set_grad_checkpointing(True)
        except AssertionError as error:
            return f"not applicable: {error}"
    else:
        return "not applicable: the model has no switch for it"
    for model in (plain, wrapped):
        pair.call(model).square().mean().backward()
    return max(_apart(a, b) for a, b in zip(plain.buffers(), wrapped.buffers(), strict=True))


def saving(pair: Pair) -> Result:
    """Equality of outputs after a state_dict went through a file into a stock model."""
    file = io.BytesIO()
    torch.save(pair.ours.state_dict(), file)
    file.seek(0)
    stock = copy.deepcopy(pair.stock)
    stock.load_state_dict(torch.load(file))
    with torch.no_grad():
        return _apart(pair.call(stock.eval()), pair.call(copy.deepcopy(pair.ours).eval()))


def folding(pair: Pair) -> Result:
    """Norms that `batchnorm.tools.fold` folds, of all."""
    example = pair.kwargs or (pair.args[0] if len(pair.args) == 1 else pair.args)
    result = fold(copy.deepcopy(pair.ours).eval(), example)
    norms = sum(isinstance(m, _BatchNorm) for m in pair.ours.modules())
    return f"{len(result.report.folded)} of {norms}"


def padding_stock(pair: Pair) -> Result:
    """Real outputs' largest move under 100 more frames of padding: torch's norms, in training."""
    return _padded(pair, pair.stock, training=True)


def padding_training(pair: Pair) -> Result:
    """Real outputs' largest move under 100 more frames of padding: ours, in training."""
    return _padded(pair, pair.ours, training=True)


def padding_evaluation(pair: Pair) -> Result:
    """Real outputs' largest move under 100 more frames of padding: ours, in evaluation."""
    return _padded(pair, pair.ours, training=False)


CHECKS: dict[str, Callable[[Pair], Result]] = {
    "converted": count,
    "evaluation": evaluation,
    "training": training,
    "keys": keys,
    "groups": groups,
    "steps": steps,
    "steps, stock moved": steps_moved,
    "steps, float32": steps_float32,
    "steps, float32, stock moved": steps_float32_moved,
    "checkpointing": checkpointing,
    "saving": saving,
    "fold": folding,
    "padding, stock": padding_stock,
    "padding, training": padding_training,
    "padding, evaluation": padding_evaluation,
}


def _moved(pair: Pair, dtype: torch.dtype) -> Result:
    noise = torch.finfo(dtype).eps / 2
    states = [_train(pair, copy.deepcopy(pair.stock), dtype, noise=e) for e in (0.0, noise)]
    return _states_apart(*states)


def _train(
    pair: Pair, model: nn.Module, dtype: torch.dtype, *, noise: float = 0.0
) -> dict[str, Tensor]:
    """The state after three steps with an input that is off by a part `noise`, up or down."""

    def change(x: Tensor) -> Tensor:
        signs = torch.randn(x.shape, generator=torch.Generator().manual_seed(2)).sign()
        return (x.double() * (1 + noise * signs.double())).to(dtype)

    _cast(model, dtype).train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        pair.call(model, change).square().mean().backward()
        optimizer.step()
    return model.state_dict()


def _cast(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The model in another type, with tensors that its modules keep outside of buffers."""
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.is_floating_point():
                vars(module)[name] = value.to(dtype)
    return model.to(dtype)


def _states_apart(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    return max(_apart(a[key], b[key]) for key in a.keys() & b.keys())


def _padded(pair: Pair, model: nn.Module, *, training: bool) -> Result:
    if pair.entry.mask is None:
        return "not applicable: the model takes no mask"
    extra = 100 * (80 if "input_values" in pair.kwargs else 1)  # samples of a wave per frame
    outputs = []
    for more in (0, extra):
        kwargs = {key: _pad(value, more) for key, value in pair.kwargs.items()}
        rows = pair.entry.mask(model, kwargs["attention_mask"]).bool()
        for followed in (False, True):  # by the model's own lengths, and by its convolutions
            used = copy.deepcopy(model).train(training)
            given = kwargs["attention_mask"] if followed else rows
            with torch.no_grad(), padding_mask(given, follow=used if followed else None):
                torch.manual_seed(1)
                out = first_tensor(used(**kwargs))
            outputs.append(out[rows])
    return max(_apart(outputs[0], other) for other in outputs[1:])


def _pad(x: Tensor, more: int) -> Tensor:
    """Add zeros to axis 1, where time is."""
    return torch.cat([x, x.new_zeros(x.shape[0], more, *x.shape[2:])], dim=1)


def _spared(model: nn.Module) -> list[str]:
    return [
        f"{name}.{key}"
        for name, module in model.named_modules()
        if isinstance(module, STOCK)
        for key, _ in module.named_parameters(recurse=False)
    ]


def _apart(a: Any, b: Any) -> float:
    return float((a.double() - b.double()).abs().max()) if a.numel() else 0.0
