"""Others' conversions and fusers, which must not drop in silence what our layers do."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval
from torch.utils.mkldnn import to_mkldnn

from batchnorm.torch import BatchNorm, BatchNorm1d, BatchNorm2d, convert_batchnorm

convert = nn.SyncBatchNorm.convert_sync_batchnorm


def test_sync_conversion_keeps_layers_of_a_model_and_synchronizes_them():
    model = nn.Sequential(nn.Linear(3, 8), BatchNorm1d(8, activation="relu").freeze())
    layer = model[1]
    with pytest.warns(UserWarning, match="layers stay, now with synchronized=True"):
        assert convert(model) is model
    assert model[1] is layer
    assert (layer.synchronized, layer.activation, layer.frozen) == (True, "relu", True)


def test_sync_conversion_of_a_deep_model_warns_once_and_converts_torch_s_own():
    block = nn.Sequential(
        nn.BatchNorm1d(4), nn.Sequential(BatchNorm(4), nn.ModuleList([BatchNorm(4)]))
    )
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        convert(block)
    assert type(block[0]) is nn.SyncBatchNorm
    assert all(type(m) is BatchNorm and m.synchronized for m in (block[1][0], block[1][1][0]))
    assert len(caught) == 1


def test_a_group_is_handed_on(monkeypatch):
    model, asked = nn.Sequential(BatchNorm(4)), []
    monkeypatch.setattr(BatchNorm, "configure", lambda self, **options: asked.append(options))
    with pytest.warns(UserWarning, match="layers stay"):
        convert(model, process_group="the group")
    assert asked == [{"synchronized": True, "process_group": "the group"}]


def test_sync_conversion_of_a_layer_alone_is_told():
    with pytest.raises(
        ValueError, match=r"convert_sync_batchnorm: .*activation='relu'.*synchronized"
    ):
        convert(BatchNorm1d(8, activation="relu"))
    with pytest.raises(ValueError, match="is frozen"):
        convert(BatchNorm1d(8).freeze())
    with pytest.warns(UserWarning, match="takes no mask"):
        assert type(convert(BatchNorm1d(8))) is nn.SyncBatchNorm


@pytest.mark.parametrize("options", [{"activation": "relu"}, {"axis": -1}], ids=str)
@pytest.mark.parametrize(
    ("fuse", "before"),
    [(fuse_conv_bn_eval, nn.Conv2d(3, 8, 1)), (fuse_linear_bn_eval, nn.Linear(3, 8))],
    ids=["conv", "linear"],
)
def test_fusers_refuse_what_they_would_drop(options, fuse, before):
    layer = BatchNorm(8, **options).eval()
    with pytest.raises(ValueError, match=rf"{fuse.__name__}: this BatchNorm has .*tools.fold"):
        fuse(before.eval(), layer)


@pytest.mark.parametrize("options", [{}, {"renorm": True}, {"virtual_batch_size": 2}], ids=str)
def test_fusers_take_what_evaluation_does_not_see(options):
    conv, layer = nn.Conv2d(3, 8, 1).eval(), BatchNorm2d(8, **options)
    layer(torch.randn(4, 8, 5, 5))
    layer.eval().freeze()
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(fuse_conv_bn_eval(conv, layer)(x), layer(conv(x)))


def test_fuse_modules_names_the_classes_that_it_does_not_know():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), BatchNorm2d(8, activation="relu")).eval()
    with pytest.raises(
        AssertionError, match=r"did not find fuser method for: .*batchnorm\.torch\.layers"
    ):
        torch.ao.quantization.fuse_modules(model, [["0", "1"]])


def test_fx_fusion_leaves_the_layer():
    from torch.fx.experimental.optimization import fuse

    model = nn.Sequential(nn.Conv2d(3, 8, 1), BatchNorm2d(8, activation="relu")).eval()
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(fuse(model)(x), model(x))


def test_mkldnn_conversion_refuses_an_activation():
    with pytest.raises(ValueError, match=r"to_mkldnn: .*activation"):
        to_mkldnn(nn.Sequential(BatchNorm2d(8, activation="relu")).eval())
    x = torch.randn(2, 8, 4, 4)
    layer = BatchNorm2d(8).eval()
    torch.testing.assert_close(to_mkldnn(nn.Sequential(layer))(x.to_mkldnn()).to_dense(), layer(x))


class Frozen(nn.Module):
    """A norm as freezing helpers make it."""

    def __init__(self, layer):
        super().__init__()
        self.register_buffer("running_var", layer.running_var.clone())


@pytest.mark.parametrize("make", [lambda layer: nn.Identity(), Frozen], ids=["fuser", "freezer"])
def test_a_replacement_that_lacks_the_activation_is_told(make):
    model = nn.Sequential(BatchNorm2d(8, activation="relu"))
    with pytest.warns(UserWarning, match="activation='relu' has been replaced by"):
        model[0] = make(model[0])
    plain = nn.Sequential(BatchNorm2d(8))
    plain[0] = make(plain[0])


def test_quantized_tensors_are_refused_with_a_remedy():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch means to do without quantized tensors
        x = torch.quantize_per_tensor(torch.randn(2, 8, 4, 4), 0.1, 0, torch.quint8)
    with pytest.raises(TypeError, match="revert_batchnorm"):
        BatchNorm2d(8).eval()(x)


def test_copies_and_reading_the_variance_work_as_ever():
    layer = BatchNorm2d(8, activation="relu")
    assert copy.deepcopy(layer).running_var is not layer.running_var
    assert getattr(layer, "qconfig", None) is None
    model = convert_batchnorm(nn.Sequential(nn.BatchNorm2d(8)))
    assert model[0].running_var.shape == (8,)
