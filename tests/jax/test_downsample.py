"""Masks behind convolutions and poolings (S5)."""

from __future__ import annotations

from functools import partial
from typing import Any

import equinox
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import export, lax

from batchnorm.jax import downsample_mask, sequence_mask

SIZE = 17
NAMES = ["VALID", "SAME", "SAME_LOWER", "same"]


def outputs(size: tuple[int, ...], window: Any, stride: Any, padding: Any, dilation: Any) -> Any:
    """The spatial shape of what a convolution makes of one sample."""
    names = "NC" + "XYZ"[: len(size)]
    convolve = partial(
        lax.conv_general_dilated,
        window_strides=stride,
        padding=padding.upper() if isinstance(padding, str) else padding,
        rhs_dilation=dilation,
        dimension_numbers=(names, names.replace("NC", "OI"), names),
    )
    x = jax.ShapeDtypeStruct((1, 1, *size), jnp.float32)
    kernel = jax.ShapeDtypeStruct((1, 1, *window), jnp.float32)
    return jax.eval_shape(convolve, x, kernel).shape[2:]


def draw(rng: np.random.Generator, rank: int) -> tuple[Any, Any, Any, Any]:
    window, stride, dilation = (
        tuple(int(n) for n in rng.integers(1, most, rank)) for most in (5, 4, 4)
    )
    padding: Any = str(rng.choice(NAMES))
    if rng.random() < 0.6:
        padding = [tuple(int(n) for n in rng.integers(0, 6, 2)) for _ in range(rank)]
    return window, stride, padding, dilation


@pytest.mark.parametrize("seed", range(14))
def test_a_sequence_has_as_many_real_outputs_as_alone(seed: int) -> None:
    window, stride, padding, dilation = draw(np.random.default_rng(seed), 1)
    mask = sequence_mask(np.arange(SIZE + 1), SIZE)
    found = downsample_mask(mask, window, stride, padding, dilation=dilation)
    assert found.dtype == jnp.bool_
    assert found.shape[1:] == outputs((SIZE,), window, stride, padding, dilation)
    alone = [outputs((n,), window, stride, padding, dilation)[0] for n in range(1, SIZE + 1)]
    expected = sequence_mask(np.array([0, *alone]), found.shape[1])  # an empty sample has none
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("seed", range(5))
def test_an_image_has_the_real_outputs_that_it_has_alone(seed: int) -> None:
    rng = np.random.default_rng(seed)
    args = window, stride, padding, dilation = draw(rng, 2)
    heights, widths = rng.integers(1, 12, 6), rng.integers(1, 10, 6)
    mask = sequence_mask(heights, 11)[:, :, None] & sequence_mask(widths, 9)[:, None]
    found = downsample_mask(mask, window, stride, padding, dilation=dilation)
    assert found.shape[1:] == outputs((11, 9), *args)
    for sample, h, w in zip(found, heights, widths, strict=True):
        expected = np.zeros(sample.shape, bool)
        high, wide = outputs((int(h), int(w)), *args)
        expected[:high, :wide] = True
        np.testing.assert_array_equal(sample, expected)


@pytest.mark.parametrize("seed", range(6))
def test_any_pattern_is_read_between_the_anchors(seed: int) -> None:
    rng = np.random.default_rng(seed)
    window, stride, dilation = (int(n) for n in rng.integers(1, 4, 3))
    low, high = (int(n) for n in rng.integers(0, 4, 2))
    mask = rng.random((3, SIZE)) < 0.6
    found = np.asarray(downsample_mask(mask, window, stride, [(low, high)], dilation=dilation))
    for o in range(found.shape[1]):
        first, last = o * stride, o * stride + dilation * (window - 1) - low - high
        decide = np.all if first <= last else np.any
        between = mask[:, max(min(first, last), 0) : max(first, last) + 1]
        np.testing.assert_array_equal(found[:, o], decide(between, axis=1))


@pytest.mark.parametrize("padding", ["SAME", "VALID", "CAUSAL", 1, [2], [(1, 2)]], ids=str)
def test_sizes_are_those_of_the_layers_of_flax(padding: Any) -> None:
    conv = flax.linen.Conv(1, (3,), strides=2, padding=padding, kernel_dilation=2)
    x = jnp.zeros((1, SIZE, 1))
    y = jax.eval_shape(lambda x: conv.init_with_output(jax.random.key(0), x)[0], x)
    mask = jnp.ones((1, SIZE), bool)
    found = downsample_mask(mask, 3, 2, padding, dilation=2)
    assert found.shape == y.shape[:2]
    assert found.all()
    layer = nnx.Conv(1, 1, (3,), 2, padding=padding, kernel_dilation=2, rngs=nnx.Rngs(0))
    assert found.shape == layer(x).shape[:2]


@pytest.mark.parametrize("padding", ["SAME", "VALID", 1, [1, 2], [(1, 2), (0, 1)]], ids=str)
def test_sizes_are_those_of_the_layers_of_equinox(padding: Any) -> None:
    layer = equinox.nn.Conv2d(1, 1, (3, 2), (2, 3), padding, key=jax.random.key(0))
    with jax.numpy_dtype_promotion("standard"):
        y = layer(jnp.zeros((1, SIZE, 11)))
    assert (
        downsample_mask(jnp.ones((4, SIZE, 11)) > 0, (3, 2), (2, 3), padding).shape[1:]
        == (y.shape[1:])
    )


@pytest.mark.parametrize("padding", ["SAME", "VALID", [(1, 1)]], ids=str)
def test_sizes_are_those_of_poolings(padding: Any) -> None:
    y = flax.linen.max_pool(jnp.zeros((1, SIZE, 1)), (3,), (2,), padding)
    assert downsample_mask(jnp.ones((1, SIZE), bool), 3, 2, padding).shape == y.shape[:2]


@pytest.mark.sample(3)
@pytest.mark.parametrize("padding", [(0, 0), (1, 2), (2, 0)], ids=str)
@pytest.mark.parametrize("at_the_start", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_real_outputs_of_a_convolution_are_those_of_the_sample_alone(
    stride: int, at_the_start: bool, padding: tuple[int, int]
) -> None:
    x = jnp.asarray(np.random.default_rng(0).normal(size=(3, 18, 2)).astype(np.float32))
    lengths = [18, 8, 4]
    mask = sequence_mask(lengths, 18)
    if at_the_start:
        mask = mask[:, ::-1]  # by a multiple of the stride
    conv = nnx.Conv(2, 4, (4,), stride, padding=[padding], rngs=nnx.Rngs(0))
    y = conv(jnp.where(mask[..., None], x, 0))
    real = downsample_mask(mask, 4, stride, [padding])
    for i in range(len(lengths)):
        alone = conv(x[i][mask[i]][None])[0]
        np.testing.assert_allclose(y[i][real[i]], alone, rtol=1e-5, atol=1e-6)


def test_integers_and_lists_are_masks() -> None:
    mask = np.random.default_rng(0).random((2, 4, 5)) < 0.5
    expected = downsample_mask(mask, 2)
    for given in (mask.astype(np.uint8), mask.astype(np.int64), mask.tolist()):
        np.testing.assert_array_equal(downsample_mask(given, 2), expected)


def test_transformations() -> None:
    mask = sequence_mask(np.arange(SIZE), SIZE)
    call = partial(downsample_mask, window=3, stride=2, padding=1)
    expected = call(mask)
    np.testing.assert_array_equal(jax.jit(call)(mask), expected)
    tokens = jnp.where(mask, 7, 0)
    np.testing.assert_array_equal(jax.jit(call)(tokens), expected)  # as S1 has it in traced code
    one_by_one = jax.vmap(lambda m: call(m[None])[0])(mask)
    np.testing.assert_array_equal(one_by_one, expected)


def test_a_size_that_an_exported_program_learns() -> None:
    (size,) = export.symbolic_shape("L")
    for padding in ("VALID", "SAME", 3):
        call = partial(downsample_mask, window=3, stride=2, padding=padding)
        program = export.export(jax.jit(call))(jax.ShapeDtypeStruct((2, size), jnp.bool_))
        for length in (1, 2, 8):
            mask = sequence_mask([1, length], length)
            np.testing.assert_array_equal(program.call(mask), call(mask))


@pytest.mark.parametrize("shape", [(0, 4), (2, 0), (0, 0)], ids=str)
def test_nothing_to_mark(shape: tuple[int, int]) -> None:
    found = downsample_mask(jnp.ones(shape, bool), 1, 1, [(2, 3)])
    assert found.shape == (shape[0], shape[1] + 5)
    assert not found.any()


MASK = jnp.ones((2, 8), bool)
MASKS = jnp.ones((2, 8, 8), bool)


@pytest.mark.parametrize(
    ("args", "error", "message"),
    [
        ((None, 3), TypeError, "mask must be an array; got None"),
        ((jnp.ones((2, 8)), 3), TypeError, "mask must be boolean or integer.*float32"),
        ((jnp.array([[8, 3]]), 3), ValueError, "an integer mask must hold 1.*got the value 8"),
        ((jnp.ones(2, bool), 3), ValueError, r"mask must have shape \(N, \*spatial\).*got \(2,\)"),
        ((MASK, 0), ValueError, "window must be at least 1; got 0"),
        ((MASK, (3, 3)), ValueError, r"window must be an int or have one for each of the 1 axes"),
        ((MASKS, 3, (2,)), ValueError, "stride must be .* each of the 2 axes"),
        ((MASK, 3, 1.5), TypeError, "stride must be an int or one for each axis; got 1.5"),
        ((MASK, 3, 1, "CIRCULAR"), ValueError, "padding must be 'VALID', 'SAME'.*got 'CIRCULAR'"),
        ((MASK, 3, 1, (1, 1)), ValueError, r"padding must be a name.*each of the 1 axes.*\(1, 1\)"),
        ((MASKS, 3, 1, [(1, 1, 1), 2]), TypeError, "padding must be a name, an int, or for each"),
        ((MASK, 3, 1, 1.0), TypeError, "padding must be a name, an int, or for each axis"),
        ((MASK, 3, 1, None), TypeError, "padding must be a name, an int, or for each axis"),
    ],
)
def test_errors(args: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^downsample_mask: {message}"):
        downsample_mask(*args)


def test_a_dilation_below_1() -> None:
    with pytest.raises(ValueError, match=r"^downsample_mask: dilation must be at least 1"):
        downsample_mask(MASK, 3, dilation=0)
