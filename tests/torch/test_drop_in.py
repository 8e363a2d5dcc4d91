"""Results equal those of `torch.nn.BatchNorm*d` where these are right, else ours are (S3-S16)."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import batchnorm
from batchnorm.torch import BatchNorm, BatchNorm1d, BatchNorm2d, BatchNorm3d, batch_norm

EXACT = 5e-6  # S3 in units of 1 + |x̂·gamma| + |beta|, for eager float32 code at 4096 rows
ULPS = 32  # rounding steps between two correct ways to write one formula

PAIRS = {
    "1d-rank2": (BatchNorm1d, nn.BatchNorm1d, (16, 5)),
    "1d-rank3": (BatchNorm1d, nn.BatchNorm1d, (8, 5, 7)),
    "2d": (BatchNorm2d, nn.BatchNorm2d, (4, 5, 6, 3)),
    "3d": (BatchNorm3d, nn.BatchNorm3d, (4, 5, 3, 2, 4)),
}
OPTIONS = {
    "default": {},
    "cumulative": {"momentum": None},
    "own-eps-momentum": {"eps": 0.1, "momentum": 0.3},
    "no-affine": {"affine": False},
    "no-bias": {"bias": False},
    "no-running": {"track_running_stats": False},
    "float64": {"dtype": torch.float64},
}
STATISTICS = ("running_mean", "running_var")
HALVES = (torch.float16, torch.bfloat16)
OFFSETS = (0.0, 1e2, 1e4, 1e6)

pairs = pytest.mark.parametrize("pair", PAIRS.values(), ids=PAIRS)
options = pytest.mark.parametrize("option", OPTIONS.values(), ids=OPTIONS)


def close(actual, expected, count=1):
    """Equal up to rounding, for sums over `count` values of size 1."""
    tolerance = ULPS * torch.finfo(expected.dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * count**0.5)


def randomize(layer):
    """Set parameters and running statistics to random values, so that no error stays hidden."""
    with torch.no_grad():
        for name, tensor in [*layer.named_parameters(), *layer.named_buffers()]:
            if name == "num_batches_tracked":
                tensor.fill_(3)
            elif "var" in name or "stddev" in name:
                tensor.uniform_(0.5, 2.0)
            else:
                tensor.normal_()
    return layer


def twins(pair, option):
    """Our layer and torch's, in the same state."""
    ours, theirs, shape = pair
    ours, theirs = ours(shape[1], **option), theirs(shape[1], **option)
    randomize(theirs)
    ours.load_state_dict(theirs.state_dict())
    return ours, theirs, shape, option.get("dtype", torch.float32)


def step(layer, x, dy):
    """y, dx and the parameters' gradients of one pass."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad, [p.grad for p in layer.parameters()]


def state(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


def assert_same_state(layer, before):
    torch.testing.assert_close(dict(layer.state_dict()), before, rtol=0, atol=0)


def reference(x, layer):
    """float64 y and x̂ of a training pass over x of shape (N, C)."""
    gamma = layer.weight.detach().double().numpy()
    beta = layer.bias.detach().double().numpy()
    y, _ = batchnorm.batch_norm(x.numpy(), gamma, beta, eps=layer.eps)
    xhat, _ = batchnorm.batch_norm(x.numpy(), eps=layer.eps)
    return torch.from_numpy(y), torch.from_numpy(xhat)


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# Same results as torch's layers


@pairs
@options
def test_training_output_is_torchs(pair, option):
    ours, theirs, shape, dtype = twins(pair, option)
    x = torch.randn(shape, dtype=dtype)
    close(ours(x), theirs(x))


@pairs
@options
def test_training_gradients_are_torchs(pair, option):
    ours, theirs, shape, dtype = twins(pair, option)
    x, dy = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    _, dx, parameters = step(ours, x, dy)
    _, dx_torch, parameters_torch = step(theirs, x, dy)
    count = x.numel() // shape[1]
    close(dx, dx_torch, count)
    for gradient, expected in zip(parameters, parameters_torch, strict=True):
        close(gradient, expected, count)


@pairs
@options
def test_state_after_several_steps_is_torchs(pair, option):
    ours, theirs, shape, dtype = twins(pair, option)
    for _ in range(5):
        x = torch.randn(shape, dtype=dtype)
        ours(x), theirs(x)
    expected = theirs.state_dict()
    assert list(ours.state_dict()) == list(expected)
    for name, value in ours.state_dict().items():
        close(value.to(dtype), expected[name].to(dtype))


@pairs
@options
def test_evaluation_is_torchs(pair, option):
    ours, theirs, shape, dtype = twins(pair, option)
    x = torch.randn(shape, dtype=dtype)
    close(ours.eval()(x), theirs.eval()(x))


@pairs
@options
def test_evaluation_gradients_are_torchs(pair, option):
    ours, theirs, shape, dtype = twins(pair, option)
    x, dy = torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype)
    _, dx, parameters = step(ours.eval(), x, dy)
    _, dx_torch, parameters_torch = step(theirs.eval(), x, dy)
    count = x.numel() // shape[1]
    close(dx, dx_torch, count)
    for gradient, expected in zip(parameters, parameters_torch, strict=True):
        close(gradient, expected, count)


@pairs
@options
def test_evaluation_changes_no_state(pair, option):
    ours, _, shape, dtype = twins(pair, option)
    before = state(ours.eval())
    ours(torch.randn(shape, dtype=dtype))
    assert_same_state(ours, before)


@pytest.mark.parametrize("dtype", HALVES)
def test_half_evaluation_is_torchs(dtype):
    ours, theirs = BatchNorm2d(4), randomize(nn.BatchNorm2d(4))
    ours.load_state_dict(theirs.state_dict())
    x = torch.randn(3, 4, 5, 5).to(dtype)
    expected = theirs.eval()(x)
    assert ours.eval()(x).dtype == expected.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(ours(x), expected, rtol=2 * eps, atol=2 * eps)


@pairs
def test_is_instance_of_torchs_base_class(pair):
    assert isinstance(pair[0](3), _BatchNorm)


def test_momentum_assigned_later_is_obeyed():
    layer = BatchNorm1d(2)
    layer.momentum = 1.0
    x = torch.randn(8, 2)
    layer(x)
    close(layer.running_mean, x.mean(0))


def test_running_statistics_are_updated_in_place():
    layer = BatchNorm1d(2)
    buffers = [layer.running_mean, layer.running_var, layer.num_batches_tracked]
    layer(torch.randn(8, 2))
    assert all(a is b for a, b in zip(buffers, layer.buffers(), strict=True))


def test_reset_parameters_starts_afresh():
    layer = randomize(BatchNorm1d(2))
    layer.reset_parameters()
    assert_same_state(layer, state(nn.BatchNorm1d(2)))


# Device and dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_dtype_is_that_of_the_parameters(dtype):
    layer = BatchNorm2d(3, dtype=dtype)
    assert layer.weight.dtype == layer.bias.dtype == dtype


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_statistics_are_float32_or_wider(dtype):
    layer = BatchNorm2d(3, dtype=dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert layer.running_mean.dtype == layer.running_var.dtype == wide


def test_device_is_that_of_every_tensor():
    layer = BatchNorm2d(3, device="meta", renorm=True)
    assert {t.device.type for t in [*layer.parameters(), *layer.buffers()]} == {"meta"}


def test_to_empty_and_reset_bring_a_meta_layer_to_life():
    layer = BatchNorm2d(3, device="meta", renorm=True).to_empty(device="cpu")
    layer.reset_parameters()
    assert_same_state(layer, state(BatchNorm2d(3, renorm=True)))


@pytest.mark.parametrize("dtype", HALVES)
def test_to_empty_keeps_statistics_float32(dtype):
    layer = BatchNorm2d(3, device="meta", dtype=dtype).to_empty(device="cpu")
    assert layer.running_var.dtype == torch.float32


def test_meta_input_gives_meta_output():
    layer = BatchNorm2d(3, device="meta")
    assert layer(torch.empty(2, 3, 4, 4, device="meta")).shape == (2, 3, 4, 4)


# State


@pairs
@options
def test_torchs_state_loads_strictly(pair, option):
    ours, theirs = pair[0](5, **option), randomize(pair[1](5, **option))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same_state(ours, state(theirs))


@pairs
@options
def test_state_loads_strictly_into_torchs(pair, option):
    ours, theirs = randomize(pair[0](5, **option)), pair[1](5, **option)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    assert_same_state(theirs, state(ours))


def test_version_1_state_loads_without_number_of_batches():
    old = randomize(nn.BatchNorm1d(3)).state_dict()
    del old["num_batches_tracked"]
    old._metadata[""]["version"] = 1
    layer = BatchNorm1d(3)
    layer.load_state_dict(old, strict=True)
    assert layer.num_batches_tracked == 0


def test_version_2_state_without_number_of_batches_is_incomplete():
    broken = BatchNorm1d(3).state_dict()
    del broken["num_batches_tracked"]
    with pytest.raises(RuntimeError, match="num_batches_tracked"):
        BatchNorm1d(3).load_state_dict(broken, strict=True)


def test_plain_dict_state_loads():
    theirs = randomize(nn.BatchNorm1d(3))
    plain = {k: v for k, v in theirs.state_dict().items() if k != "num_batches_tracked"}
    layer = BatchNorm1d(3)
    layer.load_state_dict(plain, strict=True)
    assert torch.equal(layer.running_var, theirs.running_var)


@pytest.mark.parametrize("dtype", HALVES)
def test_assigned_half_state_leaves_statistics_float32(dtype):
    half = {k: v.to(dtype) for k, v in randomize(nn.BatchNorm1d(3)).state_dict().items()}
    half["num_batches_tracked"] = torch.tensor(3)
    layer = BatchNorm1d(3)
    layer.load_state_dict(half, assign=True)
    assert layer.weight.dtype == dtype
    assert layer.running_mean.dtype == layer.running_var.dtype == torch.float32
    assert torch.equal(layer.running_mean, half["running_mean"].float())


def test_loading_a_state_does_not_change_that_state():
    plain = dict(randomize(nn.BatchNorm1d(3)).state_dict())
    keys = list(plain)
    BatchNorm1d(3, renorm=True).load_state_dict(plain, strict=True)
    assert list(plain) == keys


def test_state_without_renorm_variables_derives_them():
    theirs = randomize(nn.BatchNorm1d(3))
    layer = BatchNorm1d(3, renorm=True)
    layer.load_state_dict(theirs.state_dict(), strict=True)
    stddev = torch.sqrt(theirs.running_var + layer.eps)
    close(layer.running_stddev, stddev)
    close(layer.renorm_stddev, stddev)
    close(layer.renorm_mean, theirs.running_mean)


def test_renorm_state_comes_back_from_its_own_state():
    layer = randomize(BatchNorm1d(3, renorm=True))
    other = BatchNorm1d(3, renorm=True)
    other.load_state_dict(layer.state_dict(), strict=True)
    assert_same_state(other, state(layer))


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda layer: pickle.loads(pickle.dumps(layer)),
}
RICH = {"virtual_batch_size": 4, "renorm": True, "activation": "leaky_relu"}


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_compute_the_same(duplicate):
    layer = randomize(BatchNorm1d(3, **RICH))
    twin = duplicate(layer)
    x = torch.randn(8, 3)
    assert torch.equal(twin(x), layer(x))
    assert_same_state(twin, state(layer))


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_share_no_state(duplicate):
    layer = randomize(BatchNorm1d(3, **RICH))
    before = state(layer)
    duplicate(layer)(torch.randn(8, 3))
    assert_same_state(layer, before)


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_copies_of_a_frozen_layer_are_frozen(duplicate):
    layer = randomize(BatchNorm1d(3)).freeze()
    twin = duplicate(layer)
    before = state(twin)
    twin(torch.randn(8, 3))
    assert_same_state(twin, before)


def test_saved_state_loads_with_weights_only():
    layer, file = randomize(BatchNorm1d(3, **RICH)), io.BytesIO()
    torch.save(layer.state_dict(), file)
    file.seek(0)
    other = BatchNorm1d(3, **RICH)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert_same_state(other, state(layer))


@pairs
def test_repr_is_torchs_by_default(pair):
    assert repr(pair[0](3)) == repr(pair[1](3))


def test_repr_shows_options_that_differ_from_default():
    shown = repr(BatchNorm1d(3, virtual_batch_size=4, activation="relu").freeze())
    assert "virtual_batch_size=4" in shown
    assert "activation=relu" in shown
    assert "frozen=True" in shown


# Errors

BAD_CALLS = {
    "rank": (ValueError, "BatchNorm1d.*2D or 3D.*got 4D", lambda: torch.randn(2, 3, 4, 4), {}),
    "channels": (ValueError, "BatchNorm1d.*3.*5", lambda: torch.randn(8, 5), {}),
    "integers": (TypeError, "x must be float.*int64", lambda: torch.ones(8, 3).long(), {}),
    "complex": (TypeError, "x must be float.*complex64", lambda: torch.ones(8, 3) + 0j, {}),
    "bool": (TypeError, "x must be float.*bool", lambda: torch.ones(8, 3) > 0, {}),
    "no-tensor": (TypeError, "x must be a torch.Tensor.*ndarray", lambda: np.ones((8, 3)), {}),
    "sparse": (TypeError, "strided.*sparse", lambda: torch.randn(8, 3).to_sparse(), {}),
    "float-mask": (
        TypeError,
        "mask must be boolean or integer.*float32",
        lambda: torch.randn(8, 3),
        {"mask": torch.ones(8)},
    ),
    "mask-shape": (
        ValueError,
        r"mask must have shape \(8,\).*got \(7,\)",
        lambda: torch.randn(8, 3),
        {"mask": torch.ones(7, dtype=torch.bool)},
    ),
    "mask-scalar": (
        ValueError,
        r"mask must have shape.*got \(\)",
        lambda: torch.randn(8, 3),
        {"mask": torch.tensor(True)},
    ),
    "mask-list": (
        TypeError,
        "mask must be a torch.Tensor.*list",
        lambda: torch.randn(8, 3),
        {"mask": [True] * 8},
    ),
    "residual-shape": (
        ValueError,
        r"residual must have x's shape \(8, 3\).*\(8, 1\)",
        lambda: torch.randn(8, 3),
        {"residual": torch.randn(8, 1)},
    ),
    "single-value": (
        ValueError,
        r"Expected more than 1 value per channel when training.*\(1, 3\)",
        lambda: torch.randn(1, 3),
        {},
    ),
}
bad_calls = pytest.mark.parametrize(
    ("error", "message", "make", "rest"), BAD_CALLS.values(), ids=BAD_CALLS
)


@bad_calls
def test_bad_call_raises(error, message, make, rest):
    with pytest.raises(error, match=message):
        BatchNorm1d(3)(make(), **rest)


@bad_calls
def test_bad_call_leaves_state_untouched(error, message, make, rest):
    layer = randomize(BatchNorm1d(3))
    before = state(layer)
    with pytest.raises(error):
        layer(make(), **rest)
    assert_same_state(layer, before)


def test_indivisible_batch_leaves_state_untouched():
    layer = randomize(BatchNorm1d(3, virtual_batch_size=4))
    before = state(layer)
    with pytest.raises(ValueError, match=r"virtual_batch_size=4 must divide.*6.*drop_last"):
        layer(torch.randn(6, 3))
    assert_same_state(layer, before)


def test_failing_adjustment_leaves_state_untouched():
    layer = randomize(BatchNorm1d(3, adjustment=lambda shape: (torch.ones(7), None)))
    before = state(layer)
    with pytest.raises(ValueError, match=r"adjustment's scale must broadcast.*\(8, 3\).*\(7,\)"):
        layer(torch.randn(8, 3))
    assert_same_state(layer, before)


@pytest.mark.parametrize(("layer", "shape"), [(BatchNorm2d, (8, 3)), (BatchNorm3d, (8, 3, 4, 4))])
def test_wrong_rank_raises_in_every_layer(layer, shape):
    with pytest.raises(ValueError, match=f"{layer.__name__}.*got {len(shape)}D"):
        layer(3)(torch.randn(shape))


BAD_OPTIONS = {
    "negative-eps": (ValueError, "eps must be.*at least 0.*-1", {"eps": -1.0}),
    "infinite-eps": (ValueError, "eps must be finite.*inf", {"eps": float("inf")}),
    "nan-eps": (ValueError, "eps must be finite.*nan", {"eps": float("nan")}),
    "eps-text": (TypeError, "eps must be a real number.*str", {"eps": "small"}),
    "momentum-high": (ValueError, "momentum must be.*between 0 and 1.*1.5", {"momentum": 1.5}),
    "momentum-low": (ValueError, "momentum must be.*between 0 and 1.*-0.1", {"momentum": -0.1}),
    "momentum-text": (TypeError, "momentum must be a real number.*str", {"momentum": "0.1"}),
    "momentum-bool": (TypeError, "momentum must be a real number.*bool", {"momentum": True}),
    "affine-int": (TypeError, "affine must be True or False.*int", {"affine": 1}),
    "renorm-int": (TypeError, "renorm must be True or False.*int", {"renorm": 1}),
    "clipping-key": (
        ValueError,
        "renorm_clipping takes the keys.*rmaximum",
        {"renorm": True, "renorm_clipping": {"rmaximum": 3.0}},
    ),
    "clipping-value": (
        ValueError,
        "renorm_clipping.*dmax.*at least 0.*-1",
        {"renorm": True, "renorm_clipping": {"dmax": -1.0}},
    ),
    "clipping-order": (
        ValueError,
        "rmax >= rmin.*1.*2",
        {"renorm": True, "renorm_clipping": {"rmin": 2.0, "rmax": 1.0}},
    ),
    "clipping-type": (
        TypeError,
        "renorm_clipping must be a dict.*3",
        {"renorm": True, "renorm_clipping": 3.0},
    ),
    "clipping-alone": (
        ValueError,
        "renorm_clipping needs renorm=True",
        {"renorm_clipping": {"rmax": 3.0}},
    ),
    "renorm-momentum": (
        ValueError,
        "renorm_momentum must be.*between 0 and 1.*2",
        {"renorm": True, "renorm_momentum": 2.0},
    ),
    "renorm-without-running": (
        ValueError,
        "renorm=True.*track_running_stats=True.*False",
        {"renorm": True, "track_running_stats": False},
    ),
    "ghost-zero": (ValueError, "virtual_batch_size must be positive.*0", {"virtual_batch_size": 0}),
    "ghost-float": (
        TypeError,
        "virtual_batch_size must be a positive int.*float",
        {"virtual_batch_size": 4.0},
    ),
    "ghost-and-adjustment": (
        ValueError,
        "adjustment cannot be combined with virtual_batch_size=4",
        {"virtual_batch_size": 4, "adjustment": lambda shape: (None, None)},
    ),
    "adjustment-tensor": (
        TypeError,
        "adjustment must be a function",
        {"adjustment": 3},
    ),
    "activation": (ValueError, "activation must be.*'relu'.*gelu", {"activation": "gelu"}),
    "fused-text": (TypeError, "fused must be None.*yes", {"fused": "yes"}),
    "axis-float": (TypeError, "axis must be an int.*1.0", {"axis": 1.0}),
    "axis-none": (ValueError, "axis must name at least one", {"axis": ()}),
    "dtype-int": (TypeError, "dtype must be float16.*int32", {"dtype": torch.int32}),
}


@pytest.mark.parametrize(("error", "message", "option"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_option_raises(error, message, option):
    with pytest.raises(error, match=f"(?s)BatchNorm1d.*{message}"):
        BatchNorm1d(3, **option)


@pytest.mark.parametrize(
    ("features", "error"), [(-1, ValueError), (3.0, TypeError), ((3, 4), ValueError)]
)
def test_bad_num_features_raise(features, error):
    with pytest.raises(error, match="num_features must"):
        BatchNorm1d(features)


# One value per channel, and none


def test_single_value_per_channel_evaluates():
    x = torch.randn(1, 3)
    close(BatchNorm1d(3).eval()(x), nn.BatchNorm1d(3).eval()(x))


def test_single_value_with_mask_gives_beta():
    layer = randomize(BatchNorm1d(3))
    y = layer(torch.randn(1, 3), mask=torch.tensor([True]))
    assert torch.equal(y[0], layer.bias)


def test_single_value_with_ghost_batches_gives_beta():
    layer = randomize(BatchNorm1d(3, virtual_batch_size=1))
    y = layer(torch.randn(4, 3))
    assert torch.equal(y, layer.bias.expand(4, 3))


def test_single_value_with_mask_has_zero_input_gradient():
    layer, x = randomize(BatchNorm1d(3)), torch.randn(1, 3, requires_grad=True)
    layer(x, mask=torch.tensor([True])).backward(torch.randn(1, 3))
    assert torch.equal(x.grad, torch.zeros(1, 3))


EMPTY = {"2d": (BatchNorm2d, (0, 3, 4, 4)), "2d-area": (BatchNorm2d, (2, 3, 0, 4))}
EMPTY |= {"1d": (BatchNorm1d, (0, 3)), "3d": (BatchNorm3d, (0, 3, 2, 2, 2))}
empties = pytest.mark.parametrize(("layer", "shape"), EMPTY.values(), ids=EMPTY)
modes = pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])


@empties
@modes
def test_empty_batch_gives_empty_output(layer, shape, training):
    assert layer(3).train(training)(torch.empty(shape)).shape == shape


@empties
@modes
def test_empty_batch_leaves_statistics_unchanged(layer, shape, training):
    layer = randomize(layer(3)).train(training)
    before = state(layer)
    layer(torch.empty(shape))
    assert_same_state(layer, before)


@empties
@modes
def test_empty_batch_has_zero_gradients(layer, shape, training):
    layer, x = randomize(layer(3)).train(training), torch.empty(shape, requires_grad=True)
    layer(x).backward(torch.empty(shape))
    assert x.grad.shape == shape
    assert torch.equal(layer.weight.grad, torch.zeros(3))
    assert torch.equal(layer.bias.grad, torch.zeros(3))


def test_empty_batch_of_ghosts_is_empty():
    assert BatchNorm1d(3, virtual_batch_size=4)(torch.empty(0, 3)).shape == (0, 3)


# Memory formats and strides

FORMATS = {
    "4d": (BatchNorm2d, (4, 3, 5, 6), torch.channels_last),
    "5d": (BatchNorm3d, (4, 3, 2, 5, 6), torch.channels_last_3d),
}
formats = pytest.mark.parametrize(("layer", "shape", "format"), FORMATS.values(), ids=FORMATS)
VARIANTS = {
    "plain": ({}, False),
    "mask": ({}, True),
    "ghost": ({"virtual_batch_size": 2}, False),
    "ghost-mask": ({"virtual_batch_size": 2}, True),
    "renorm": ({"renorm": True}, False),
    "relu": ({"activation": "relu"}, False),
}
variants = pytest.mark.parametrize(("option", "masked"), VARIANTS.values(), ids=VARIANTS)


@formats
@variants
@modes
def test_channels_last_stays_channels_last(layer, shape, format, option, masked, training):
    x = torch.randn(shape).contiguous(memory_format=format)
    mask = torch.rand(shape[0], *shape[2:]) < 0.7 if masked else None
    y = layer(3, **option).train(training)(x, mask=mask)
    assert y.is_contiguous(memory_format=format)


@formats
@variants
def test_channels_last_gives_the_same_numbers(layer, shape, format, option, masked):
    x, dy = torch.randn(shape), torch.randn(shape)
    mask = torch.rand(shape[0], *shape[2:]) < 0.7 if masked else None
    plain = randomize(layer(3, **option))
    last = copy.deepcopy(plain)
    first = x.clone().requires_grad_()
    y = plain(first, mask=mask)
    y.backward(dy)
    second = x.contiguous(memory_format=format).requires_grad_()
    y_last = last(second, mask=mask)
    y_last.backward(dy.contiguous(memory_format=format))
    count = x.numel() // 3
    close(y_last, y, count)
    close(second.grad, first.grad, count)


@formats
def test_channels_last_input_gets_channels_last_gradient(layer, shape, format):
    x = torch.randn(shape).contiguous(memory_format=format).requires_grad_()
    layer(3)(x).backward(torch.randn(shape).contiguous(memory_format=format))
    assert x.grad.is_contiguous(memory_format=format)


STRIDES = {
    "transposed": lambda: torch.randn(6, 3, 8).transpose(0, 2),
    "sliced": lambda: torch.randn(16, 3, 12)[::2, :, ::2],
    "offset": lambda: torch.randn(9, 4, 7)[1:, 1:, 1:],
    "expanded": lambda: torch.randn(8, 3, 1).expand(8, 3, 6),
    "expanded-channel": lambda: torch.randn(8, 1, 6).expand(8, 3, 6),
}


@pytest.mark.parametrize("make", STRIDES.values(), ids=STRIDES)
@modes
def test_strides_do_not_matter(make, training):
    x, layer = make(), randomize(BatchNorm1d(3)).train(training)
    twin = copy.deepcopy(layer)
    close(layer(x), twin(x.contiguous()), x.numel() // 3)


@pytest.mark.parametrize("make", STRIDES.values(), ids=STRIDES)
def test_strides_do_not_matter_to_gradients(make):
    layer, x = randomize(BatchNorm1d(3)), make()
    dy = torch.randn(x.shape)
    _, dx, parameters = step(layer, x.contiguous(), dy)
    leaf = x.detach().requires_grad_()
    layer.zero_grad()
    layer(leaf).backward(dy)
    close(leaf.grad, dx, x.numel() // 3)
    close(layer.weight.grad, parameters[0], x.numel() // 3)


def test_input_is_left_alone():
    x = torch.randn(8, 3)
    before = x.clone()
    BatchNorm1d(3, activation="relu")(x)
    assert torch.equal(x, before)


# Casting (S16)

CASTS = {
    "half": lambda m: m.half(),
    "bfloat16": lambda m: m.bfloat16(),
    "to-bfloat16": lambda m: m.to(torch.bfloat16),
    "to-half-like": lambda m: m.to(torch.empty(0, dtype=torch.float16)),
    "type": lambda m: m.type(torch.float16),
    "half-float": lambda m: m.half().float(),
    "double-float": lambda m: m.double().float(),
    "double": lambda m: m.double(),
    "double-half": lambda m: m.double().half(),
    "float": lambda m: m.float(),
}
casts = pytest.mark.parametrize("cast", CASTS.values(), ids=CASTS)


@casts
@pytest.mark.parametrize("renorm", [False, True], ids=["plain", "renorm"])
def test_cast_model_keeps_statistics_to_the_bit(cast, renorm):
    model = nn.Sequential(nn.Linear(3, 3), randomize(BatchNorm1d(3, renorm=renorm)))
    before = {k: v.double() for k, v in state(model).items() if "ing" in k or "renorm" in k}
    cast(model)
    for name, value in before.items():
        assert torch.equal(model.state_dict()[name].double(), value), name


@casts
def test_cast_model_casts_parameters_as_torch(cast):
    ours, theirs = cast(BatchNorm1d(3)), cast(nn.BatchNorm1d(3))
    assert ours.weight.dtype == theirs.weight.dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_cast_model_trains_in_half(dtype):
    model = nn.Sequential(nn.Linear(4, 3), BatchNorm1d(3)).to(dtype)
    x = torch.randn(16, 4).to(dtype)
    y = model(x)
    y.backward(torch.randn(16, 3).to(dtype))
    assert y.dtype == model[1].weight.grad.dtype == dtype


@pytest.mark.parametrize("dtype", HALVES)
def test_half_output_is_rounded_once(dtype):
    x = (torch.randn(64, 3) * 3 + 7).to(dtype)
    exact, _ = batchnorm.batch_norm(x.double().numpy(), eps=1e-5)
    y = BatchNorm1d(3).to(dtype)(x)
    # Half a unit in the last place, and float32 rounding before it.
    tolerance = torch.finfo(dtype).eps * (0.5 + 2**-6)
    torch.testing.assert_close(
        y.double(), torch.from_numpy(exact), rtol=tolerance, atol=torch.finfo(dtype).tiny + 1e-6
    )


def test_bfloat16_model_converges_to_the_true_mean():
    layer = BatchNorm1d(1).bfloat16()
    means = []
    for _ in range(150):
        x = (torch.randn(256, 1) + 100).bfloat16()
        means.append(x.float().mean())
        layer(x)
    assert abs(layer.running_mean.item() - 100) < 0.5  # torch's stalls at 96


# Overflow (S9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
@pytest.mark.parametrize("value", [float("inf"), float("nan")], ids=["inf", "nan"])
def test_overflowing_batch_leaves_statistics_unchanged(dtype, value):
    layer = randomize(BatchNorm1d(3).to(dtype))
    before = state(layer)
    x = torch.randn(8, 3).to(dtype)
    x[2] = value
    layer(x)
    assert_same_state(layer, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, *HALVES])
def test_overflowing_batch_shows_in_the_output(dtype):
    x = torch.randn(8, 3).to(dtype)
    x[2] = float("inf")
    assert not BatchNorm1d(3).to(dtype)(x).isfinite().any()


def test_overflow_in_half_leaves_statistics_unchanged():
    layer = randomize(BatchNorm1d(3).half())
    before = state(layer)
    y = layer(torch.full((8, 3), 6e4).half() * torch.arange(1, 9)[:, None].half())
    assert not y.isfinite().all()
    assert_same_state(layer, before)


def test_overflowing_variance_leaves_statistics_unchanged():
    layer = randomize(BatchNorm1d(3))
    before = state(layer)
    layer(torch.randn(8, 3) * 1e30)
    assert_same_state(layer, before)


def test_overflowing_channel_does_not_stop_the_others():
    layer, twin = BatchNorm1d(3), BatchNorm1d(3)
    x = torch.randn(8, 3)
    twin(x)
    x[2, 1] = float("inf")
    layer(x)
    kept = torch.tensor([True, False, True])
    assert torch.equal(layer.running_mean[kept], twin.running_mean[kept])
    assert torch.equal(layer.running_mean[~kept], torch.zeros(1))
    assert layer.num_batches_tracked == 1


def test_overflowing_ghost_batch_leaves_statistics_unchanged():
    layer = randomize(BatchNorm1d(3, virtual_batch_size=4))
    before = state(layer)
    x = torch.randn(8, 3)
    x[0] = float("inf")
    layer(x)
    assert_same_state(layer, before)


# Freezing (S15)

SWITCHES = {
    "train": lambda layer: layer.train(),
    "eval": lambda layer: layer.eval(),
    "eval-train": lambda layer: layer.eval().train(),
    "parent": lambda layer: nn.Sequential(layer).train()[0],
}


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_frozen_layer_keeps_its_state(switch):
    layer = switch(randomize(BatchNorm1d(3)).freeze())
    before = state(layer)
    layer(torch.randn(8, 3))
    assert_same_state(layer, before)


@pytest.mark.parametrize("switch", SWITCHES.values(), ids=SWITCHES)
def test_frozen_layer_normalizes_by_running_statistics(switch):
    layer, x = randomize(BatchNorm1d(3)), torch.randn(8, 3)
    expected = copy.deepcopy(layer).eval()(x)
    assert torch.equal(switch(layer.freeze())(x), expected)


def test_unfrozen_layer_trains_again():
    layer, x = randomize(BatchNorm1d(3)), torch.randn(8, 3)
    twin = copy.deepcopy(layer)
    layer.freeze().unfreeze()(x)
    twin(x)
    assert_same_state(layer, state(twin))


def test_unfrozen_layer_keeps_its_mode():
    assert not BatchNorm1d(3).eval().freeze().unfreeze().training


def test_frozen_gradient_is_that_of_constant_statistics():
    layer, x = randomize(BatchNorm1d(3)).freeze(), torch.randn(8, 3, requires_grad=True)
    dy = torch.randn(8, 3)
    layer(x).backward(dy)
    rstd = 1 / torch.sqrt(layer.running_var + layer.eps)
    xhat = (x.detach() - layer.running_mean) * rstd
    close(x.grad, (layer.weight * rstd * dy).detach())
    close(layer.weight.grad, (dy * xhat).sum(0), 8)
    close(layer.bias.grad, dy.sum(0), 8)


def test_freezing_leaves_requires_grad_alone():
    layer = BatchNorm1d(3)
    layer.bias.requires_grad_(False)
    layer.freeze()
    assert (layer.weight.requires_grad, layer.bias.requires_grad) == (True, False)


def test_frozen_layer_takes_a_single_value():
    assert BatchNorm1d(3).freeze()(torch.randn(1, 3)).shape == (1, 3)


# Accuracy (S3)


def offset_data(offset, spread=1.0, rows=4096):
    return (torch.randn(rows, 8, dtype=torch.float64) * spread + offset).float()


@pytest.mark.parametrize("offset", OFFSETS)
def test_output_is_exact_at_offset(offset):
    x, layer = offset_data(offset), BatchNorm1d(8)
    y, _ = reference(x, layer)
    assert (layer(x).double() - y).abs().max() <= EXACT


@pytest.mark.parametrize("offset", OFFSETS)
def test_output_with_parameters_is_exact_at_offset(offset):
    x, layer = offset_data(offset), randomize(BatchNorm1d(8))
    y, xhat = reference(x, layer)
    scale = 1 + (xhat * layer.weight).abs() + layer.bias.abs()
    assert ((layer(x).double() - y).abs() / scale).max() <= EXACT


@pytest.mark.parametrize("offset", OFFSETS)
def test_output_of_ghost_batches_is_exact_at_offset(offset):
    x = offset_data(offset)
    y, _ = batchnorm.batch_norm(x.numpy(), eps=1e-5, virtual_batch_size=512)
    actual = BatchNorm1d(8, virtual_batch_size=512)(x).double()
    assert (actual - torch.from_numpy(y)).abs().max() <= 2 * EXACT  # |x̂| reaches 4


@pytest.mark.parametrize("offset", OFFSETS)
def test_output_with_mask_is_exact_at_offset(offset):
    x, mask = offset_data(offset), torch.rand(4096) < 0.5
    y, _ = batchnorm.batch_norm(x.numpy(), eps=1e-5, mask=mask.numpy())
    actual = BatchNorm1d(8)(x, mask=mask).double()
    assert (actual - torch.from_numpy(y)).abs().max() <= EXACT


@pytest.mark.parametrize("offset", OFFSETS)
def test_gradients_are_exact_at_offset(offset):
    x, layer = offset_data(offset), randomize(BatchNorm1d(8))
    dy = torch.randn(x.shape)
    _, dx, (dgamma, dbeta) = step(layer, x, dy)
    _, xhat = reference(x, layer)
    gamma = layer.weight.detach().double().numpy()
    expected = batchnorm.batch_norm_gradient(dy.double().numpy(), x.numpy(), gamma, eps=layer.eps)
    dx64, dgamma64, dbeta64 = map(torch.from_numpy, expected)
    # Each term carries the error of its x̂; sums of random terms grow like a norm.
    terms = dy.double().abs() * (1 + xhat.abs())
    assert (dx.double() - dx64).abs().max() <= EXACT * (terms * layer.weight.abs()).max()
    assert ((dgamma.double() - dgamma64).abs() <= EXACT * terms.norm(dim=0)).all()
    assert ((dbeta.double() - dbeta64).abs() <= EXACT * terms.norm(dim=0)).all()


@pytest.mark.parametrize("offset", OFFSETS)
def test_running_statistics_are_exact_at_offset(offset):
    x, layer = offset_data(offset), BatchNorm1d(8, momentum=1.0)
    layer(x)
    _, moments = batchnorm.batch_norm(x.numpy())
    mean, var = torch.from_numpy(moments.mean), torch.from_numpy(moments.var)
    assert (layer.running_mean - mean).abs().max() <= EXACT + abs(offset) * 2**-23
    assert (layer.running_var / (var * 4096 / 4095) - 1).abs().max() <= EXACT


@pytest.mark.parametrize("offset", OFFSETS)
def test_evaluation_is_exact_at_offset(offset):
    x, layer = offset_data(offset), randomize(BatchNorm1d(8, momentum=1.0))
    layer(x)
    mean, var = layer.running_mean.double(), layer.running_var.double()
    xhat = (x.double() - mean) / torch.sqrt(var + layer.eps)
    expected = xhat * layer.weight + layer.bias
    scale = 1 + (xhat * layer.weight).abs() + layer.bias.abs()
    assert ((layer.eval()(x) - expected).abs() / scale).max() <= EXACT


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0, 1e9, 1e18])
@pytest.mark.parametrize("rows", [2, 4096])
def test_output_is_exact_at_any_size(size, rows):
    x, layer = offset_data(0.0, rows=rows).clamp(-1, 1) * size, randomize(BatchNorm1d(8))
    y, xhat = reference(x, layer)
    scale = 1 + (xhat * layer.weight).abs() + layer.bias.abs()
    assert ((layer(x).double() - y).abs() / scale).max() <= EXACT


@pytest.mark.parametrize("size", [1e-12, 1e-6, 1.0, 1e9, 1e18])
def test_gradients_are_exact_at_any_size(size):
    x, layer = offset_data(0.0).clamp(-1, 1) * size, randomize(BatchNorm1d(8))
    dy = torch.randn(x.shape)
    _, dx, (dgamma, _) = step(layer, x, dy)
    gamma = layer.weight.detach().double().numpy()
    expected = batchnorm.batch_norm_gradient(dy.double().numpy(), x.numpy(), gamma, eps=layer.eps)
    dx64, dgamma64, _ = map(torch.from_numpy, expected)
    terms = dy.double().abs() * (1 + reference(x, layer)[1].abs())
    assert ((dx.double() - dx64).abs() / dx64.abs().amax(0)).max() <= EXACT
    assert ((dgamma.double() - dgamma64).abs() <= EXACT * terms.norm(dim=0)).all()


def test_function_takes_torchs_arguments_by_position():
    x, weight, bias = torch.randn(8, 3), torch.randn(3), torch.randn(3)
    ours, theirs = [torch.zeros(3), torch.ones(3)], [torch.zeros(3), torch.ones(3)]
    y = batch_norm(x, *ours, weight, bias, True, 0.3, 1e-3)
    close(y, nn.functional.batch_norm(x, *theirs, weight, bias, True, 0.3, 1e-3))
    close(ours[0], theirs[0])
    close(ours[1], theirs[1])


def test_layer_for_any_rank_takes_all_of_them():
    layer, x = BatchNorm(3).eval(), torch.randn(8, 3, 2, 2, 2, 2)
    close(layer(x), x / (1 + layer.eps) ** 0.5)


@pytest.mark.parametrize(("activation", "slope"), [("relu", 0.0), ("leaky_relu", 0.01)])
def test_residual_gradient_at_exactly_zero_is_the_negative_side(activation, slope):
    layer = BatchNorm(2, activation=activation)
    residual = torch.zeros(1, 2, requires_grad=True)
    mask = torch.ones(1, dtype=torch.bool)  # one real row: what is activated is exactly 0
    layer(torch.randn(1, 2), mask, residual).backward(torch.tensor([[3.0, -5.0]]))
    torch.testing.assert_close(residual.grad, slope * torch.tensor([[3.0, -5.0]]))


@pytest.mark.parametrize("returned", [3, torch.ones(4, 3), (1.0,)])
def test_adjustment_that_returns_no_pair_is_refused(returned):
    layer = BatchNorm(3, adjustment=lambda shape: returned)
    with pytest.raises(TypeError, match=r"adjustment must return a pair \(scale, bias\); got"):
        layer(torch.randn(4, 3))


@pytest.mark.parametrize("culprit", ["running_mean", "running_var"])
@pytest.mark.parametrize(
    ("bad", "error"),
    [
        (torch.ones(3, requires_grad=True), ValueError),
        (torch.ones(3, dtype=torch.int64), TypeError),
    ],
)
def test_statistics_that_cannot_be_updated_are_refused_before_any_update(culprit, bad, error):
    statistics = {"running_mean": torch.zeros(3), "running_var": torch.ones(3)} | {culprit: bad}
    before = {name: a.detach().clone() for name, a in statistics.items()}
    with pytest.raises(error, match=f"batch_norm: {culprit}"):
        batch_norm(torch.randn(4, 3), **statistics, training=True)
    assert all(torch.equal(statistics[name], before[name]) for name in before)


def test_scalar_input_is_refused():
    with pytest.raises(ValueError, match=r"x must have at least 2 axes.*got a scalar"):
        BatchNorm(3)(torch.tensor(1.0))
