"""Folding of torch models that torch.fx cannot trace, by the data flow of one forward pass."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchnorm.tools import fold
from batchnorm.torch import BatchNorm


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@dataclass
class Output:
    """As in libraries whose models return objects."""

    logits: Tensor


class Model(nn.Module):
    """Linear map, something between, batch norm; torch.fx cannot decide its branch."""

    def __init__(self, between: Any = None, linear: nn.Module | None = None) -> None:
        super().__init__()
        self.conv = linear if linear is not None else nn.Conv1d(3, 4, 3)
        self.norm = nn.BatchNorm1d(4)
        self.between = between or (lambda y, norm: norm(y))

    def forward(self, inputs: dict[str, Tensor], **options: Any) -> Output:
        x = inputs["x"]
        if x.sum() > 1e9:
            x = -x
        return Output(torch.tanh(self.between(self.conv(x), self.norm)))


def trained(model: nn.Module) -> nn.Module:
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                    tensor.uniform_(0.5, 2.0)
    return model.eval()


def report_of(model: nn.Module, x: Tensor, **options: Any) -> Any:
    model = trained(model)
    before = copy.deepcopy(model.state_dict())
    example = {"inputs": {"x": x}}
    new, report = fold(model, example, **options)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    other = {"inputs": {"x": torch.randn_like(x)}}
    torch.testing.assert_close(new(**other).logits, model(**other).logits, rtol=1e-4, atol=1e-5)
    return report


class Other(nn.Module):
    """A linear map of a class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 3))
        self.register_parameter("bias", None)

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


ROWS: dict[str, Any] = {
    "at once": lambda y, norm: norm(y),
    "a cut": lambda y, norm: norm(y[:, :, 1:]),
    "copies": lambda y, norm: norm(y.transpose(0, 2).contiguous().transpose(0, 2)),
    "a size": lambda y, norm: norm(y) * y.shape[0],
    "in place behind": lambda y, norm: norm(y).relu_(),
}
FLAT: dict[str, Any] = {
    "flattened": lambda y, norm: norm(y.flatten(0, 1)).reshape_as(y),
    "transposed": lambda y, norm: norm(y.transpose(1, 2)).transpose(1, 2),
}


@pytest.mark.parametrize("name", ROWS)
def test_pairs_are_found_behind_a_branch_on_data(name: str) -> None:
    report = report_of(Model(ROWS[name]), torch.randn(2, 3, 8))
    assert [(layer.name, layer.into) for layer in report.folded] == [("norm", "conv")]
    assert report.method.startswith("one forward pass, since torch.fx")


@pytest.mark.parametrize("linear", [nn.Linear(3, 4), Other()], ids=["linear", "of its own class"])
@pytest.mark.parametrize("name", FLAT)
def test_views_of_a_linear_map_are_followed(name: str, linear: nn.Module) -> None:
    report = report_of(Model(FLAT[name], copy.deepcopy(linear)), torch.randn(2, 5, 3))
    assert not report.kept


READ: dict[str, tuple[Any, str]] = {
    "a sum": (lambda y, norm: norm(y) + y, "add"),
    "a view of it": (lambda y, norm: norm(y) + y[:, :, :1].sum(), "sum"),
    "an array": (lambda y, norm: norm(y) * float(y.detach().numpy()[0, 0, 0]), "numpy"),
    "a list": (lambda y, norm: norm(y) * y.tolist()[0][0][0], "tolist"),
    "written": (lambda y, norm: norm(y.mul_(2)), "mul_"),
    "a mask": (lambda y, norm: norm(y.masked_fill(y < 0, 0.0)), "masked_fill"),
    "other channels": (lambda y, norm: norm(y.flip(1)), "flip"),
    "mixed channels": (lambda y, norm: norm(y.reshape(2, -1, 4).transpose(1, 2)), "axis 1"),
    "twice": (lambda y, norm: norm(norm(y)), "used 2 times"),
}


@pytest.mark.parametrize("name", READ)
def test_another_reader_keeps_the_batch_norm(name: str) -> None:
    between, word = READ[name]
    report = report_of(Model(between), torch.randn(2, 3, 8))
    assert not report.folded
    assert word in report.kept[0].reason


def test_pairs_by_name_and_wrong_ones() -> None:
    x = torch.randn(2, 3, 8)
    report = report_of(Model(), x, pairs=[("conv", "norm")])
    assert (report.method, len(report.folded)) == ("pairs", 1)
    wrong = report_of(Model(READ["a sum"][0]), x, pairs=[("conv", "norm")])
    assert "folded into conv, the model differs by" in wrong.kept[0].reason
    with pytest.raises(ValueError, match="must name linear maps and batch norms"):
        fold(trained(Model()), {"inputs": {"x": x}}, pairs=[("conv", "absent")])


def test_residual_and_activation_of_our_layer_stay() -> None:
    model = Model(lambda y, norm: norm(y, residual=torch.ones_like(y)))
    model.norm = BatchNorm(4, activation="leaky_relu")
    assert len(report_of(model, torch.randn(2, 3, 8)).folded) == 1


def test_code_that_reads_a_folded_layer_keeps_it() -> None:
    report = report_of(Model(lambda y, norm: norm(y) * norm.eps), torch.randn(2, 3, 8))
    assert "AttributeError" in report.kept[0].reason


def test_outputs_that_cannot_be_compared_are_refused() -> None:
    class Silent(Model):
        def forward(self, inputs: Any, **options: Any) -> Any:
            super().forward(inputs)
            return None

    with pytest.raises(ValueError, match="must return floating tensors"):
        fold(trained(Silent()), {"inputs": {"x": torch.randn(2, 3, 8)}})
