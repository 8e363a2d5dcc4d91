"""Folding the batch norms of torch models."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from batchnorm.tools import fold
from batchnorm.torch import BatchNorm, BatchNorm1d, BatchNorm2d


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def trained(model: nn.Module) -> nn.Module:
    """The model in evaluation mode, with random weights and statistics everywhere."""
    for layer in model.modules():
        if isinstance(layer, nn.modules.batchnorm._BatchNorm):
            with torch.no_grad():
                for name in ("weight", "bias", "running_mean", "running_var"):
                    if getattr(layer, name) is not None:
                        getattr(layer, name).uniform_(0.5, 2.0)
    return model.eval()


def folded_by(model: nn.Module, example: Any = None, **options: Any) -> tuple[Any, Any, Any]:
    """The new model, the folded layers with their targets, the kept ones with the reasons."""
    before = copy.deepcopy(model.state_dict())
    new, report = fold(model, example, **options)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert 0 <= report.difference <= report.tolerance
    return (
        new,
        {layer.name: layer.into for layer in report.folded},
        {layer.name: layer.reason for layer in report.kept},
    )


def norms_in(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]


MAPS = {
    "linear": (nn.Linear(4, 6), (5, 4)),
    "conv1d": (nn.Conv1d(4, 6, 3, padding=1), (2, 4, 9)),
    "conv2d_grouped": (nn.Conv2d(4, 6, 3, groups=2, bias=False), (2, 4, 9, 8)),
    "conv3d": (nn.Conv3d(4, 6, 2, stride=2), (2, 4, 4, 5, 3)),
    "transposed1d": (nn.ConvTranspose1d(4, 6, 3), (2, 4, 5)),
    "transposed2d_grouped": (nn.ConvTranspose2d(4, 6, 3, groups=2), (2, 4, 5, 6)),
    "transposed3d": (nn.ConvTranspose3d(4, 6, 2, bias=False), (2, 4, 3, 3, 3)),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", MAPS)
def test_folding_into_the_map_before(name: str, dtype: torch.dtype) -> None:
    linear, shape = MAPS[name]
    model = trained(nn.Sequential(copy.deepcopy(linear), BatchNorm(6), nn.Tanh())).to(dtype)
    new, into, kept = folded_by(model, torch.randn(shape).to(dtype))
    assert into == {"1": "0"}
    assert not kept
    assert not norms_in(new)
    assert new.get_submodule("0").weight.dtype is dtype


PADDED: dict[str, tuple[nn.Module, bool]] = {
    "linear": (nn.Linear(4, 6), True),
    "no padding": (nn.Conv2d(4, 6, 3, groups=2), True),
    "1x1": (nn.Conv2d(4, 6, 1, padding="same"), True),
    "zeros": (nn.Conv2d(4, 6, 3, padding=1), False),
    "same": (nn.Conv2d(4, 6, 3, padding="same"), False),
    "copies": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="reflect"), True),
    "transposed": (nn.ConvTranspose2d(4, 6, 3), False),
}


@pytest.mark.parametrize("name", PADDED)
def test_folding_into_the_map_behind(name: str) -> None:
    linear, folds = PADDED[name]
    norm = BatchNorm(4, axis=-1) if name == "linear" else nn.BatchNorm2d(4)
    model = trained(nn.Sequential(nn.ReLU(), norm, nn.Dropout(), linear))
    x = torch.randn(2, 5, 5, 4) if name == "linear" else torch.randn(2, 4, 5, 5)
    _, into, kept = folded_by(model, x)
    assert into == ({"1": "3"} if folds else {})
    assert folds or "before it: 0 (ReLU); behind it: 3, a" in kept["1"]


def test_padding_is_harmless_without_an_offset() -> None:
    model = trained(nn.Sequential(nn.ReLU(), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 3, padding=1)))
    with torch.no_grad():
        model[1].bias.zero_()
        model[1].running_mean.zero_()
    _, into, _ = folded_by(model)
    assert into == {"1": "2"}


class Block(nn.Module):
    """A residual block with layers that fold and layers that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = BatchNorm2d(4, activation="leaky_relu")
        self.conv2 = nn.Conv2d(4, 4, 3, padding=1)
        self.bn2 = BatchNorm2d(4, activation="relu")
        self.bn3 = nn.BatchNorm2d(4)
        self.shared = nn.Conv2d(4, 4, 1)
        self.bn4 = nn.BatchNorm2d(4)
        self.twice = nn.Conv2d(4, 4, 1)
        self.bn5 = nn.BatchNorm2d(4)
        self.stateless = nn.BatchNorm2d(4, track_running_stats=False)
        self.head = nn.Linear(4, 2)
        self.bn6 = BatchNorm1d(5)
        self.idle = nn.BatchNorm1d(5)

    def forward(self, x: Any, mask: Any = None, scale: float = 1.0) -> Any:
        if mask is not None:
            x = x * mask
        shortcut = self.bn1(self.conv1(x), mask)
        x = self.bn2(self.conv2(shortcut), residual=shortcut)
        x = self.bn3(x + scale)
        x = self.bn4(self.shared(x)) + self.shared(x)
        y = self.twice(x)
        x = self.stateless(self.bn5(y) + y.mean())
        rows = self.head(x.mean(3).movedim(1, 2)[:, :5])
        return {"y": self.bn6(rows), "shape": x.shape[0]}


def test_residual_graph_with_everything() -> None:
    model = trained(Block())
    x = torch.randn(2, 3, 6, 6)
    new, into, kept = folded_by(model, x)
    assert into == {"bn1": "conv1", "bn2": "conv2"}
    assert list(kept) == ["bn3", "bn4", "bn5", "stateless", "bn6", "idle"]
    assert kept["bn3"] == "before it: add; behind it: 2 uses of its output"
    assert "shared, but it is used in 2 places" in kept["bn4"]
    assert "twice, but its output is used in 2 places" in kept["bn5"]
    assert "keeps no running statistics" in kept["stateless"]
    assert "head, but its channels do not lie on axis 1" in kept["bn6"]
    assert "does not run it" in kept["idle"]
    assert isinstance(new, torch.fx.GraphModule)
    assert not new.training
    assert dict(new.named_parameters()).keys() >= {"conv1.weight", "conv1.bias", "bn4.weight"}
    # Arguments left out of the example become constants; keeping an unused argument would mislead.
    with pytest.raises(TypeError):
        new(x, torch.ones(2, 1, 6, 6))


def test_arguments_by_name_and_constants() -> None:
    model = trained(Block()).double()
    x, mask = torch.randn(2, 3, 6, 6).double(), torch.ones(2, 1, 6, 6, dtype=torch.int32)
    new, into, _ = folded_by(model, {"x": x, "mask": mask, "scale": 2.0})
    assert list(into) == ["bn1", "bn2"]
    torch.testing.assert_close(new(x, mask=mask)["y"], model(x, mask, 2.0)["y"])


def test_tensors_in_a_list_do_not_become_constants() -> None:
    class Summed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))

        def forward(self, parts: Any) -> Any:
            return self.body(torch.stack(list(parts)).sum(0))

    model = trained(Summed())
    first, second = ([torch.randn(5, 3), torch.randn(5, 3)] for _ in range(2))
    new, into, _ = folded_by(model, {"parts": first})
    assert into == {"body.1": "body.0"}
    torch.testing.assert_close(new(second), model(second))


class Louder(nn.BatchNorm2d):
    """A subclass with its own forward pass, as in image libraries."""

    def forward(self, x: Any) -> Any:
        torch._assert(x.ndim == 4, f"got {x.ndim} axes")
        y = nn.functional.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.1, self.eps
        )
        return 2 * torch.relu(y)


def test_a_subclass_is_folded_by_what_it_computes() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), Louder(4)))
    new, into, kept = folded_by(model)
    assert into == {"1": "0"}
    assert not kept
    assert not norms_in(new)


class Named(nn.Conv3d):
    """A subclass that only fixes arguments, as in torchvision's video models."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1, bias=False)


class Residual(nn.Module):
    """A block that adds its input in place."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv, self.norm = Named(channels), nn.BatchNorm3d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(x))
        y += x
        return y.relu_()


def test_a_subclass_without_a_forward_pass_of_its_own_is_a_linear_map() -> None:
    model = trained(nn.Sequential(Residual(3), Residual(3)))
    new, into, kept = folded_by(model, torch.randn(2, 3, 4, 5, 6))
    assert into == {"0.norm": "0.conv", "1.norm": "1.conv"}
    assert not kept
    assert not norms_in(new)


class Doubling(nn.Conv2d):
    """A subclass that computes something else in a method of its base."""

    def _conv_forward(self, *args: Any) -> Tensor:
        return 2 * super()._conv_forward(*args)


def test_a_subclass_that_computes_something_else_stays() -> None:
    _, into, kept = folded_by(trained(nn.Sequential(Doubling(3, 3, 1), nn.BatchNorm2d(3))))
    assert not into
    assert set(kept) == {"1"}


@pytest.mark.parametrize("example", [torch.zeros(0, 3, 4, 4), torch.full((2, 3, 4, 4), torch.nan)])
def test_outputs_without_a_number_check_nothing(example: Tensor) -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)))
    with pytest.raises(ValueError, match=r"hold finite numbers.*\(., 4, 4, 4\) without any"):
        fold(model, example)


def test_parameters_that_others_hold_stay() -> None:
    first, second = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
    second.weight = first.weight
    model = trained(nn.Sequential(first, nn.BatchNorm2d(3), nn.ReLU(), second))
    _, into, _ = folded_by(model)
    assert into == {"1": "0"}


def test_modules_that_do_more_than_their_type_says_stay() -> None:
    hooked = nn.Conv2d(3, 3, 1)
    hooked.register_forward_hook(lambda module, args, y: 2 * y)
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 3, 1))
    model = nn.Sequential(hooked, nn.BatchNorm2d(3), nn.ReLU(), normed, nn.BatchNorm2d(3))
    _, into, kept = folded_by(trained(model))
    assert not into
    assert "it has hooks" in kept["1"]
    assert "3 (Parametrized" in kept["4"]


class Untraceable(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        shared = nn.Conv2d(4, 4, 1)
        self.body = nn.Sequential(
            *(nn.Conv2d(3, 4, 3), nn.Dropout(), BatchNorm2d(4, activation="relu")),
            *(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1)),
            *(shared, nn.BatchNorm2d(4), nn.ReLU()),
            *(nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3, padding=1)),
        )
        self.tail = nn.Sequential(shared, nn.ReLU())
        self.alone = nn.BatchNorm2d(4)

    def forward(self, x: Any) -> Any:
        if x.sum() > 1e9:
            x = x - 1
        return self.alone(self.tail(self.body(x)))


def test_model_that_is_not_traced_is_folded_by_a_forward_pass() -> None:
    model = trained(Untraceable())
    new, into, kept = folded_by(model)
    assert type(new) is Untraceable
    assert into == {"body.2": "body.0", "body.3": "body.4"}
    assert isinstance(new.body[2], nn.ReLU)
    assert list(kept) == ["body.6", "body.8", "alone"]
    assert kept["body.6"] == "before it: body.5, but it is used 2 times; behind it: relu"
    assert "a convolution that pads with zeros" in kept["body.8"]
    assert kept["alone"] == "before it: relu; behind it: the model's output"


def test_layers_in_training_mode_and_frozen_ones() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), BatchNorm2d(4), nn.Conv2d(4, 4, 3), BatchNorm2d(4))
    trained(model)
    model[1].train().freeze()
    _, into, _ = folded_by(model)
    assert into == {"1": "0", "3": "2"}
    model[1].unfreeze()
    model[3].train()
    with pytest.raises(ValueError, match="must be in evaluation mode"):
        fold(model.train())


def test_digits_that_folding_changes_are_refused() -> None:
    model = trained(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    with torch.no_grad():
        model[0].bias += 1e6
        model[1].running_mean += 1e6
    with pytest.raises(ValueError, match="must agree with the original within"):
        fold(model)
    _, report = fold(model, tolerance=0.5)
    assert report.tolerance == 0.5
    assert 1e-4 < report.difference < 0.5
    assert "folded 1 of 1 batch norms (torch.fx)" in str(report)


@pytest.mark.parametrize(
    ("model", "text"),
    [
        (nn.Sequential(nn.Embedding(5, 3), nn.BatchNorm1d(3)), "example is needed; the model"),
        (nn.Bilinear(2, 3, 4), "Bilinear has none"),
        (nn.Sequential(nn.BatchNorm1d(4), nn.Linear(3, 2)), "example is needed; the model"),
    ],
)
def test_refusals(model: nn.Module, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        fold(model.eval())


def test_random_numbers_are_left_alone() -> None:
    model = trained(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    state = torch.get_rng_state()
    fold(model)
    assert torch.equal(state, torch.get_rng_state())
