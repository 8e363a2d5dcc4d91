"""Layers of timm and patches of accelerate, made here as those packages make them."""

from __future__ import annotations

import copy
import functools
import io
import sys
import types
import warnings

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from batchnorm.tools import fold
from batchnorm.torch import BatchNorm2d, convert_batchnorm, padding_mask, revert_batchnorm


class BatchNormAct2d(nn.BatchNorm2d):
    """As timm 1.0 has it."""

    def __init__(self, num_features: int, act: nn.Module, drop: nn.Module | None = None) -> None:
        super().__init__(num_features)
        self.drop = drop or nn.Identity()
        self.act = act

    def forward(self, x: Tensor) -> Tensor:
        if self.training and self.track_running_stats:
            self.num_batches_tracked.add_(1)
        x = functional.batch_norm(
            x,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            self.training,
            self.momentum,
            self.eps,
        )
        return self.act(self.drop(x))


class SyncBatchNormAct(nn.SyncBatchNorm):
    """As timm 1.0 has it."""

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(x)))


PATH = "timm.layers.norm_act"
MINE = "batchnorm.torch.guests.timm"
ACTIVATIONS = {
    "relu": (lambda: nn.ReLU(inplace=True), "relu"),
    "leaky": (nn.LeakyReLU, "leaky_relu"),
    "steep": (lambda: nn.LeakyReLU(0.3), None),
    "silu": (lambda: nn.SiLU(inplace=True), None),
    "none": (nn.Identity, None),
}
activations = pytest.mark.parametrize(("act", "fused"), ACTIVATIONS.values(), ids=ACTIVATIONS)


@pytest.fixture(autouse=True)
def timm(monkeypatch):
    """A package with these two classes, whether the real one is installed or not."""
    torch.manual_seed(0)
    # No conversion, copy or pickle may meet the real package's module of the same name.
    monkeypatch.delitem(sys.modules, MINE, raising=False)
    module = types.ModuleType(PATH)
    for cls in (BatchNormAct2d, SyncBatchNormAct):
        monkeypatch.setattr(cls, "__module__", PATH)
        setattr(module, cls.__name__, cls)
    for name in ("timm", "timm.layers"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setitem(sys.modules, PATH, module)
    yield
    sys.modules.pop(MINE, None)


def network(act: nn.Module, drop: nn.Module | None = None) -> nn.Sequential:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), BatchNormAct2d(4, act, drop), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4)
    )
    for norm in (model[1], model[3]):
        for a in (*norm.parameters(), *list(norm.buffers())[:2]):
            a.data.uniform_(0.5, 2.0)
    return model


def close(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=2e-5, atol=2e-5)


@activations
@pytest.mark.parametrize("training", [True, False])
def test_converted_layer_computes_what_timms_does(act, fused, training):
    stock = network(act()).double().train(training)
    ours = convert_batchnorm(copy.deepcopy(stock))
    assert type(ours[1]).__module__ == MINE
    assert ours[1].activation == fused
    assert isinstance(ours[1], (BatchNorm2d, BatchNormAct2d))
    x, results = torch.randn(5, 3, 8, 8).double(), []
    cotangent = torch.randn(5, 4, 6, 6).double()
    for model in (stock, ours):
        y = model(x)
        (y * cotangent).sum().backward()
        results.append([y, *(p.grad for p in model.parameters()), *model.buffers()])
    for mine, theirs in zip(*reversed(results), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-9)
    assert list(stock.state_dict()) == list(ours.state_dict())


def test_masks_reach_it():
    model = convert_batchnorm(network(nn.SiLU())).train()
    x = torch.randn(5, 3, 8, 8)
    with padding_mask(torch.tensor([True, True, True, False, False])):
        y = copy.deepcopy(model)(x)
    close(y[:3], model(x[:3]))


def test_drop_comes_between_norm_and_activation():
    model = convert_batchnorm(network(nn.ReLU(), nn.Dropout(0.5)))
    assert model[1].activation is None
    x = torch.randn(5, 4, 6, 6)
    torch.manual_seed(1)
    y = model[1](x)
    torch.manual_seed(1)
    close(y, revert_batchnorm(model)[1](x))


def test_a_child_that_is_exchanged_later_is_the_one_that_runs():
    model = convert_batchnorm(network(nn.ReLU())).eval()
    stock = revert_batchnorm(copy.deepcopy(model))
    x = torch.randn(2, 3, 8, 8)
    model(x)
    for net in (model, stock):
        net[1].act = nn.GELU()
    close(model(x), stock(x))
    for net in (model, stock):
        net[1].act = nn.ReLU()
    close(model(x), stock(x))
    assert model[1].activation == "relu"


def test_hooks_on_its_activation_are_called():
    calls: list[nn.Module] = []
    model = convert_batchnorm(network(nn.ReLU()))
    model(torch.randn(2, 3, 8, 8))
    handle = model[1].act.register_forward_hook(lambda module, *rest: calls.append(module))
    model(torch.randn(2, 3, 8, 8))
    assert calls == [model[1].act]
    handle.remove()
    model(torch.randn(2, 3, 8, 8))
    assert len(calls) == 1
    assert model[1].activation == "relu"


@activations
def test_reverting_gives_timms_class_and_output_back(act, fused):
    stock = network(act()).eval()
    model = revert_batchnorm(convert_batchnorm(copy.deepcopy(stock)))
    assert type(model[1]) is BatchNormAct2d
    assert set(vars(model[1])) == set(vars(stock[1]))
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(model(x), stock(x))


def test_synchronized_layers_go_to_timms_synchronized_class_and_back():
    model = revert_batchnorm(convert_batchnorm(network(nn.SiLU()), synchronized=True))
    assert type(model[1]) is SyncBatchNormAct
    assert type(model[3]) is nn.SyncBatchNorm
    x = torch.randn(2, 3, 8, 8)
    expected = model.eval()(x)
    convert_batchnorm(model)
    assert type(model[1]).__module__ == MINE
    assert model[1].synchronized
    close(model(x), expected)


def test_a_synchronized_layer_that_nobody_completed_is_left_and_told():
    model = nn.Sequential(SyncBatchNormAct(4))
    with pytest.warns(UserWarning, match="no drop and act"):
        convert_batchnorm(model)
    assert type(model[0]) is SyncBatchNormAct


def test_an_activation_for_all_layers_is_refused_before_any_is_changed():
    model = network(nn.SiLU())
    with pytest.raises(ValueError, match=r"activation='relu'.*its own: SiLU"):
        convert_batchnorm(model, activation="relu")
    assert type(model[1]) is BatchNormAct2d
    convert_batchnorm(model, activation="relu", skip="1")
    assert model[3].activation == "relu"


def test_torchs_fuser_and_converter_do_not_lose_the_activation():
    model = convert_batchnorm(network(nn.SiLU())).eval()
    with pytest.raises(ValueError, match="calls a SiLU"):
        nn.utils.fusion.fuse_conv_bn_eval(model[0], model[1])
    with pytest.raises(ValueError, match="calls a SiLU"):
        nn.SyncBatchNorm.convert_sync_batchnorm(model[1])


class FrozenBatchNormAct2d(nn.Module):
    """As timm's freeze_batch_norm_2d makes it, with the layer's children."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.register_buffer("running_var", layer.running_var)
        self.drop, self.act = layer.drop, layer.act


def test_timms_freezer_takes_the_activation_along_and_another_is_told():
    model = convert_batchnorm(network(nn.SiLU()))
    layer = model[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.add_module("1", FrozenBatchNormAct2d(layer))
    model[1] = layer
    with pytest.warns(UserWarning, match="calls a SiLU on its output"):
        model.add_module("1", nn.Identity())


def test_a_frozen_norm_with_an_activation_is_left_and_told_where_it_was_asked_for():
    model, report = nn.Sequential(FrozenBatchNormAct2d(network(nn.SiLU())[1])), []
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        convert_batchnorm(model, report=report)
    assert "unfreeze_batch_norm_2d" in report[0].reason
    with pytest.warns(UserWarning, match="unfreeze_batch_norm_2d"):
        convert_batchnorm(model, frozen_copies=True)
    assert type(model[0]) is FrozenBatchNormAct2d


def test_it_cannot_be_made_but_by_conversion():
    cls = type(convert_batchnorm(network(nn.ReLU()))[1])
    with pytest.raises(TypeError, match="convert_batchnorm"):
        cls(4)


def test_a_whole_model_is_copied_saved_and_loaded():
    model = convert_batchnorm(network(nn.SiLU())).eval()
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(torch.load(file, weights_only=False)(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_traced_by_fx_and_exported_it_computes_the_same():
    model = convert_batchnorm(network(nn.SiLU())).eval()
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))
    close(torch.export.export(model, (x,)).module()(x), model(x))


@activations
@pytest.mark.parametrize("traceable", [True, False])
def test_fold_leaves_its_children(act, fused, traceable):
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = network(act())

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x if traceable or x.sum() > 0 else x + 0)

    model = convert_batchnorm(Branching()).eval()
    x = torch.randn(2, 3, 8, 8)
    folded, report = fold(model, x)
    assert [layer.name for layer in report.folded] == ["net.1", "net.3"]
    assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    close(folded(x), model(x))


@pytest.mark.parametrize("traceable", [True, False])
def test_fold_does_not_move_it_past_its_own_activation(traceable):
    class Front(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = BatchNormAct2d(3, nn.SiLU()), nn.Conv2d(3, 4, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(self.norm(x if traceable or x.sum() > 0 else x + 0))

    _, report = fold(convert_batchnorm(Front()).eval(), torch.randn(2, 3, 8, 8))
    assert [layer.name for layer in report.folded] == []
    assert "its own act" in report.kept[0].reason


class Hook:
    """accelerate's ModelHook, which counts calls."""

    def __init__(self) -> None:
        self.seen: list[nn.Module] = []

    def pre_forward(self, module, *args, **kwargs):
        self.seen.append(module)
        return args, kwargs


def add_hook(layer: nn.Module, hook: Hook) -> None:
    """As accelerate 1.15's add_hook_to_module does."""
    old_forward = layer._old_forward if hasattr(layer, "_old_forward") else layer.forward
    layer._old_forward, layer._hf_hook = old_forward, hook

    def new_forward(module, *args, **kwargs):
        args, kwargs = module._hf_hook.pre_forward(module, *args, **kwargs)
        return module._old_forward(*args, **kwargs)

    partial = functools.partial(new_forward, layer)
    layer.forward = functools.update_wrapper(partial, old_forward)


def remove_hook(layer: nn.Module) -> None:
    """As accelerate 1.15's remove_hook_from_module does."""
    layer.forward = layer._old_forward
    del layer._old_forward, layer._hf_hook


def hooked() -> tuple[nn.Sequential, Hook]:
    model, hook = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)), Hook()
    add_hook(model[1], hook)
    return model, hook


def test_our_forward_runs_within_accelerates_hook():
    model, hook = hooked()
    stock = copy.deepcopy(model)
    convert_batchnorm(model)
    x = torch.randn(6, 3)
    close(model(x), stock(x))
    assert hook.seen == [model[1]]
    with padding_mask(torch.arange(6) < 4):
        y = model(x)
    close(y[:4], model(x[:4]))
    assert model[1].num_batches_tracked == 3


def test_a_hooked_model_is_copied_with_its_hooks():
    model, _ = hooked()
    twin = copy.deepcopy(convert_batchnorm(model))
    twin(torch.randn(6, 3))
    assert (model[1].num_batches_tracked, twin[1].num_batches_tracked) == (0, 1)


def test_a_hook_put_on_twice_is_carried_once():
    model, _ = hooked()
    again = Hook()
    add_hook(model[1], again)
    convert_batchnorm(model)(torch.randn(6, 3))
    assert again.seen == [model[1]]


@pytest.mark.parametrize("removed_first", [True, False])
def test_a_removed_hook_leaves_our_forward_or_torchs(removed_first):
    model, hook = hooked()
    if removed_first:
        remove_hook(model[1])
        convert_batchnorm(model)
    else:
        convert_batchnorm(model)
        remove_hook(model[1])
    with padding_mask(torch.arange(6) < 4):
        model(torch.randn(6, 3))
    assert hook.seen == []
    assert model[1].num_batches_tracked == 1


def test_a_hooked_model_is_reverted_with_its_hooks():
    model, hook = hooked()
    revert_batchnorm(convert_batchnorm(model))
    assert type(model[1]) is nn.BatchNorm1d
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(torch.randn(6, 3))
    assert hook.seen == [model[1]]


@activations
def test_padding_is_zero_behind_the_activation_too(act, fused):
    model = convert_batchnorm(network(act()), padded_output="zero")
    mask = torch.tensor([True, True, False])
    y = model[1](torch.randn(3, 4, 2, 2), mask)
    assert torch.equal(y[2], torch.zeros(4, 2, 2))
    assert (y[:2] != 0).any()


@pytest.mark.parametrize("backend", [None, "aot_eager"])
@pytest.mark.parametrize("own", ["zero", "normalize"])
def test_an_activation_that_moves_zero_is_an_error(own, backend):
    model = convert_batchnorm(network(nn.Sigmoid()), padded_output=own)
    layer = torch.compile(model[1], fullgraph=True, backend=backend) if backend else model[1]
    x, mask = torch.randn(3, 4, 2, 2), torch.tensor([True, True, False])
    block = padding_mask(mask, padded_output=None if own == "zero" else "zero")
    with block, pytest.raises(Exception, match="does not reach behind the layer"):
        layer(x)
