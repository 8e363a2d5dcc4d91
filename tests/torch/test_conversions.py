"""The layers that convert_batchnorm is told to take, and what it says of those it leaves."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from torch import Tensor, nn

from batchnorm.torch import BatchNorm, BatchNorm2d, convert_batchnorm, register_conversion
from batchnorm.torch.conversions import _registered


@pytest.fixture(autouse=True)
def _clean(monkeypatch):
    torch.manual_seed(0)
    before = dict(_registered)
    yield
    _registered.clear()
    _registered.update(before)


def model() -> nn.Sequential:
    return nn.Sequential(
        nn.BatchNorm1d(3),
        nn.ModuleDict({"a": nn.BatchNorm2d(3), "b": nn.Sequential(nn.BatchNorm2d(3))}),
        nn.Linear(3, 3),
    )


def converted(net: nn.Module) -> list[str]:
    return [name for name, m in net.named_modules() if isinstance(m, BatchNorm)]


class FrozenBatchNorm2d(nn.Module):
    """As torchvision has it: four buffers."""

    def __init__(self, num_features: int, eps: float = 1e-3) -> None:
        super().__init__()
        self.eps = eps
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.rand(num_features) + 0.5)

    def forward(self, x: Tensor) -> Tensor:
        w, b, mean, var = (a[:, None, None] for a in self.buffers())
        return (x - mean) / torch.sqrt(var + self.eps) * w + b


class BatchRenorm2d(nn.BatchNorm2d):
    """Of torchrl's name."""


class TestNames:
    @pytest.mark.parametrize(
        ("choice", "expected"),
        [
            ({}, ["0", "1.a", "1.b.0"]),
            ({"only": "1.*"}, ["1.a", "1.b.0"]),
            ({"only": ["0", "1.a"]}, ["0", "1.a"]),
            ({"skip": "1.b*"}, ["0", "1.a"]),
            ({"only": "1.*", "skip": ["*.0"]}, ["1.a"]),
            ({"only": "[02]"}, ["0"]),
            ({"only": "elsewhere"}, []),
        ],
        ids=str,
    )
    def test_patterns_choose(self, choice, expected):
        assert converted(convert_batchnorm(model(), **choice)) == expected

    def test_a_choice_warns_of_nothing(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convert_batchnorm(nn.Sequential(BatchRenorm2d(3)), skip="0")

    @pytest.mark.parametrize("name", ["only", "skip"])
    @pytest.mark.parametrize("bad", [3, [], ["a", 3]], ids=str)
    def test_a_bad_pattern_is_refused_by_argument_and_changes_nothing(self, name, bad):
        net = model()
        with pytest.raises(TypeError, match=rf"convert_batchnorm: {name} must"):
            convert_batchnorm(net, **{name: bad})
        assert converted(net) == []

    def test_layers_of_this_library_that_are_skipped_keep_their_options(self):
        net = nn.Sequential(BatchNorm2d(3), BatchNorm2d(3))
        convert_batchnorm(net, skip="0", synchronized=True)
        assert [layer.synchronized for layer in net] == [False, True]


class TestReport:
    def test_it_names_every_norm_with_classes_and_reasons(self):
        report: list = []
        net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3), FrozenBatchNorm2d(3), nn.ReLU())
        convert_batchnorm(net, skip="1", report=report)
        assert [(c.name, c.before, c.after) for c in report] == [
            ("0", nn.BatchNorm2d, BatchNorm2d),
            ("1", nn.BatchNorm2d, None),
            ("2", FrozenBatchNorm2d, None),
        ]
        assert [c.reason for c in report] == [
            "",
            "skip= names it",
            "a frozen copy; frozen_copies=True converts it",
        ]

    def test_it_is_appended_to_only_where_the_conversion_succeeds(self):
        report: list = ["earlier"]
        with pytest.raises(ValueError, match="without parameters yet"):
            convert_batchnorm(nn.Sequential(nn.BatchNorm2d(3), nn.LazyBatchNorm2d()), report=report)
        assert report == ["earlier"]
        convert_batchnorm(nn.BatchNorm2d(3), report=report)
        assert report[1][:2] == ("", nn.BatchNorm2d)

    def test_something_else_than_a_list_is_refused(self):
        with pytest.raises(TypeError, match="report must be a list"):
            convert_batchnorm(model(), report=())


class TestFrozenCopies:
    def test_they_become_frozen_layers_of_the_same_function_and_keys(self):
        stock = FrozenBatchNorm2d(3)
        net = convert_batchnorm(nn.Sequential(stock), frozen_copies=True)
        layer, x = net[0], torch.randn(4, 3, 5, 5)
        assert (type(layer), layer.frozen, layer.eps) == (BatchNorm2d, True, 1e-3)
        torch.testing.assert_close(net.train()(x), stock(x), rtol=1e-5, atol=1e-5)
        assert sorted(layer.state_dict()) == sorted(stock.state_dict())
        assert not any(p.requires_grad for p in layer.parameters())
        assert layer.running_mean is stock.running_mean

    def test_a_class_without_eps_has_torchs(self):
        stock = FrozenBatchNorm2d(3)
        del stock.eps
        assert convert_batchnorm(stock, frozen_copies=True).eps == 1e-5

    def test_they_stay_without_a_word_unless_it_is_asked_for(self):
        net = nn.Sequential(FrozenBatchNorm2d(3))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            convert_batchnorm(net)
        assert type(net[0]) is FrozenBatchNorm2d

    def test_a_flag_that_is_none_is_refused(self):
        with pytest.raises(TypeError, match="frozen_copies"):
            convert_batchnorm(model(), frozen_copies="yes")


class Scaled(nn.BatchNorm2d):
    """Somebody's own class."""


class TestRegisterConversion:
    def test_the_function_gets_layer_and_options_and_makes_the_layer(self):
        register_conversion(Scaled, lambda layer, **o: BatchNorm2d(layer.num_features, **o))
        net = convert_batchnorm(nn.Sequential(Scaled(3)), momentum=0.2, activation="relu")
        assert type(net[0]) is BatchNorm2d
        assert (net[0].momentum, net[0].activation) == (0.2, "relu")

    def test_none_leaves_the_layer_without_a_warning(self):
        register_conversion(Scaled, lambda layer, **options: None)
        report: list = []
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            net = convert_batchnorm(nn.Sequential(Scaled(3)), report=report)
        assert type(net[0]) is Scaled
        assert report[0].reason == "its conversion returned None"

    def test_a_later_one_replaces_an_earlier_one_and_torchs_own_class_may_be_told(self):
        register_conversion(nn.BatchNorm2d, lambda layer, **options: None)
        assert type(convert_batchnorm(nn.BatchNorm2d(3))) is nn.BatchNorm2d
        register_conversion(nn.BatchNorm2d, lambda layer, **options: nn.Identity())
        assert type(convert_batchnorm(nn.BatchNorm2d(3))) is nn.Identity

    def test_subclasses_need_their_own(self):
        class Special(Scaled):
            pass

        register_conversion(Scaled, lambda layer, **options: None)
        with pytest.warns(UserWarning, match="subclasses may compute something else"):
            convert_batchnorm(nn.Sequential(Special(3)))

    def test_a_skipped_layer_is_not_given_to_it(self):
        register_conversion(Scaled, lambda layer, **options: pytest.fail("it was called"))
        convert_batchnorm(nn.Sequential(Scaled(3)), skip="*")

    @pytest.mark.parametrize(
        ("arguments", "named"),
        [((3, print), "cls"), ((int, print), "cls"), ((Scaled, 3), "function")],
        ids=str,
    )
    def test_bad_arguments_are_refused_by_name(self, arguments, named):
        with pytest.raises(TypeError, match=f"register_conversion: {named} must"):
            register_conversion(*arguments)


class TestWarnings:
    def test_batch_renorm_of_others_is_named_with_what_differs(self):
        net = nn.Sequential(BatchRenorm2d(3), BatchRenorm2d(3))
        with pytest.warns(UserWarning, match=r"0, 1.*averages the variance.*4\.55 against 3\.56"):
            convert_batchnorm(net)
        assert [type(m) for m in net] == [BatchRenorm2d] * 2

    def test_a_subclass_is_left_and_told_with_the_remedy(self):
        with pytest.warns(UserWarning, match="register_conversion"):
            convert_batchnorm(nn.Sequential(Scaled(3)))


def _closure(layer: nn.Module):
    old = layer.forward
    return lambda *args: old(*args) * 2


def _partial(layer: nn.Module):
    return functools.partial(lambda old, x: old(x) * 2, layer.forward)


def _partial_of_another(layer: nn.Module):
    layer._old_forward = layer.forward
    return functools.partial(lambda other, x: layer._old_forward(x) * 2, nn.BatchNorm2d(3))


def _partial_with_another_old_forward(layer: nn.Module):
    layer._old_forward = lambda x: x
    return functools.partial(lambda module, x: module._old_forward(x) * 2, layer)


class TestPatchedForwards:
    @pytest.mark.parametrize(
        "patch", [_closure, _partial, _partial_of_another, _partial_with_another_old_forward]
    )
    def test_of_an_unknown_kind_leave_the_layer_and_are_told(self, patch):
        net = nn.Sequential(nn.BatchNorm2d(3), nn.BatchNorm2d(3))
        first = net[0]
        first.forward = patch(first)
        report: list = []
        with pytest.warns(UserWarning, match="0: its forward has been replaced|: 0"):
            convert_batchnorm(net, report=report)
        assert net[0] is first
        assert type(net[1]) is BatchNorm2d
        assert "convert the model first" in report[0].reason
        x = torch.randn(4, 3, 2, 2)
        fresh = nn.BatchNorm2d(3)
        known = x if patch is _partial_with_another_old_forward else fresh(x)
        torch.testing.assert_close(first(x), known * 2)

    def test_that_are_the_class_s_own_are_dropped(self):
        layer = nn.BatchNorm2d(3)
        layer.forward = layer.forward
        new = convert_batchnorm(layer)
        assert "forward" not in vars(new)
        new(torch.randn(4, 3, 2, 2), mask=torch.ones(4, dtype=torch.bool))
