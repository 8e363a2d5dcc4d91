"""The GPU's kernels, interpreted: cases that the conformance table does not have."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import batchnorm
import torch_path
from batchnorm.core.config import Options
from batchnorm.core.layout import make_layout
from batchnorm.kernels.geometry import find_geometry, sizes_of
from batchnorm.kernels.kept import BYTES
from batchnorm.kernels.triton import arguments, launch, tiling
from batchnorm.torch import BatchNorm, batch_norm
from cases import Case, make_data


def train(x: Tensor, mask: Tensor | None = None, **options: Any) -> tuple[Tensor, Tensor]:
    """y and dx of a random cotangent, by the kernels."""
    x = x.detach().requires_grad_()
    y = batch_norm(x, None, None, training=True, mask=mask, fused=True, **options)
    torch.manual_seed(1)
    y.backward(torch.randn(x.shape, dtype=torch.float32).to(x.dtype))
    assert x.grad is not None
    return y.detach(), x.grad


def expect(x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The same in float64."""
    torch.manual_seed(1)
    dy = torch.randn(x.shape, dtype=torch.float32).to(x.dtype).double().numpy()
    arguments = {"mask": None if mask is None else mask.numpy(), "axis": 1}
    x64 = x.detach().double().numpy()
    y, _ = batchnorm.batch_norm(x64, **arguments)
    dx = batchnorm.batch_norm_gradient(dy, x64, **arguments)[0]
    return torch.from_numpy(y), torch.from_numpy(dx)


def assert_close(found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for a, b in zip(found, expected, strict=True):
        off = (a.double() - b).abs() / (1.0 + b.abs())
        assert not off.isnan().any()
        assert off.max() <= 5e-6


def test_fused_on_the_cpu_reaches_the_interpreter(launched: list[str]) -> None:
    train(torch.randn(6, 3))
    assert launched == ["forward_whole", "backward_whole"]


@pytest.mark.parametrize("fused", [True, None])
def test_graphs_run_the_kernels_that_they_were_made_for(
    fused: bool | None, launched: list[str]
) -> None:
    torch._dynamo.reset()
    layer = torch.compile(BatchNorm(3, fused=fused), fullgraph=True, backend="aot_eager")
    layer(torch.randn(6, 3, requires_grad=True)).sum().backward()
    assert launched == (["forward_whole", "backward_whole"] if fused else [])


@pytest.mark.parametrize("mean", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("cut", ["whole", "pieces"])
def test_no_digit_is_lost_at_an_offset(
    mean: float, cut: str, request: pytest.FixtureRequest
) -> None:
    if cut == "pieces":
        request.getfixturevalue("pieces")
    torch.manual_seed(0)
    x = torch.randn(515, 3) + mean
    assert_close(train(x), expect(x))


def test_a_drift_between_tiles_loses_no_digit(pieces: Any) -> None:
    x = torch.randn(515, 2) + torch.linspace(-1e6, 1e6, 515)[:, None]
    assert_close(train(x), expect(x))


def test_an_outlier_in_the_first_tile_loses_no_digit(pieces: Any) -> None:
    x = torch.randn(515, 2)
    x[3] = 1e6
    assert_close(train(x), expect(x))


def test_squares_of_large_values_stay_finite() -> None:
    x = torch.randn(4096, 2).clamp(-1, 1).sign() * 1e18
    y, dx = train(x)
    assert y.isfinite().all()
    assert dx.isfinite().all()
    assert_close((y, dx), expect(x))


def test_nan_in_padding_reaches_nothing_real(pieces: Any) -> None:
    x, mask = torch.randn(40, 3, 7), torch.rand(40, 7) < 0.5
    clean = train(x, mask)
    spoilt = x.masked_fill(~mask[:, None], torch.nan)
    real = mask[:, None].expand(x.shape)
    for a, b in zip(train(spoilt, mask), clean, strict=True):
        assert torch.equal(a[real], b[real])


MASK_TYPES = [
    *(torch.bool, torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
]


@pytest.mark.parametrize("dtype", MASK_TYPES, ids=str)
def test_every_type_of_mask_is_read_in_place(dtype: torch.dtype) -> None:
    x, real = torch.randn(30, 3), torch.rand(30) < 0.5
    mask = real.to(dtype)
    strided = torch.stack([mask, torch.zeros_like(mask)], dim=1)[:, 0]
    for a, b in zip(train(x, strided), train(x, real), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    "shape", [(1, 1, 2), (3, 1, 1), (17, 5), (1031, 3), (2, 130, 3), (3, 5, 67), (2, 3, 5, 7, 2)]
)
def test_odd_sizes(shape: tuple[int, ...], pieces: Any) -> None:
    x = torch.randn(shape)
    assert_close(train(x), expect(x))


def test_arrays_with_gaps_and_other_orders_of_axes(pieces: Any) -> None:
    wide = torch.randn(9, 12, 6, 4)
    for x in (wide[:, 2:7], wide[::2], wide.permute(0, 2, 3, 1)[:, :5], wide[..., 1]):
        assert_close(train(x), expect(x))


@pytest.mark.parametrize("width", [1, 2])
def test_offsets_beyond_32_bits(width: int) -> None:
    """Rows 2³⁰ elements apart; the system never provides the memory that is not touched."""
    far = torch.empty(3 * 2**30 + 8).as_strided((4, width), (2**30, 1))
    far.copy_(torch.randn(4, width))
    near = far.clone()
    for a, b in zip(train(far), train(near), strict=True):
        assert torch.equal(a, b)


def test_positions_beyond_32_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 4, 50)
    expected = train(x)
    monkeypatch.setattr(arguments, "FAR", 1)  # as if a row were so long
    from batchnorm.torch.kernels import decision

    decision.decide.cache_clear()
    for a, b in zip(train(x), expected, strict=True):
        assert torch.equal(a, b)
    decision.decide.cache_clear()


def test_bits_are_the_same_each_time_and_for_each_order_of_programs(
    pieces: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.runtime import interpreter

    x, mask = torch.randn(300, 5), torch.rand(300) < 0.7
    first = train(x, mask)
    builder = interpreter.interpreter_builder
    set_index = builder.set_grid_idx
    backwards = lambda a, b, c: set_index(builder.grid_dim[0] - 1 - a, b, c)  # noqa: E731
    monkeypatch.setattr(builder, "set_grid_idx", backwards)
    for a, b in zip(train(x, mask), first, strict=True):
        assert torch.equal(a, b)


def test_the_cut_changes_no_more_than_rounding(request: pytest.FixtureRequest) -> None:
    case = Case("cut", mask="half", ghost=2, residual=True, activation="relu")
    data = make_data(case)
    whole = torch_path.run(case, data, fused=True)
    request.getfixturevalue("pieces")
    for a, b in zip(whole[:4], torch_path.run(case, data, fused=True)[:4], strict=True):
        assert abs(a - b).max() <= 5e-6


def test_outputs_are_written_everywhere(monkeypatch: pytest.MonkeyPatch, pieces: Any) -> None:
    from batchnorm.torch.kernels import step

    def poisoned(x: Tensor, decision: Any) -> Tensor:
        return torch.full_like(x, torch.nan)

    monkeypatch.setattr(step, "empty_output", poisoned)
    residual = torch.randn(37, 5, 3, requires_grad=True)
    mask = torch.rand(37) < 0.5
    y, dx = train(torch.randn(37, 5, 3), mask, residual=residual, activation="leaky_relu")
    assert residual.grad is not None
    for a in (y, dx, residual.grad):
        assert a.isfinite().all()


def test_second_derivatives_are_the_plain_path_s() -> None:
    x = torch.randn(7, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradgradcheck(
        lambda x: batch_norm(x, None, None, training=True, fused=True), (x,), fast_mode=True
    )


def test_recomputation_with_renormalization_updates_once() -> None:
    from torch.utils.checkpoint import checkpoint

    layer = BatchNorm(3, renorm=True, fused=True)
    again = BatchNorm(3, renorm=True, fused=True)
    x = torch.randn(20, 3)
    inputs = [x.clone().requires_grad_() for _ in range(2)]
    layer(inputs[0]).square().sum().backward()
    checkpoint(again, inputs[1], use_reentrant=False).square().sum().backward()
    assert torch.equal(inputs[0].grad, inputs[1].grad)
    assert torch.equal(layer.running_mean, again.running_mean)


def test_autocast_leaves_the_input_s_type() -> None:
    layer = BatchNorm(4, fused=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = layer(torch.randn(8, 4, dtype=torch.bfloat16))
    assert y.dtype is torch.bfloat16
    assert layer.running_mean.dtype is torch.float32


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
@pytest.mark.parametrize(
    "shape",
    [(4194304, 64), (256, 256, 56, 56), (256, 256, 7, 7), (32, 64), (1, 3, 2**31), (65536, 3)],
)
def test_tiles_cover_an_array_within_the_limits(shape: tuple[int, ...], dtype: str) -> None:
    layout = make_layout(shape, 1)
    strides = torch.empty(shape, device="meta").stride()
    sizes = sizes_of(layout, find_geometry(layout, strides))
    cut = tiling.find_tiling(sizes, BYTES[dtype], tiling.LIMITS)
    assert cut.parts * cut.width >= sizes.channels > (cut.parts - 1) * cut.width
    assert cut.tiles * cut.length >= tiling.count_positions(sizes) > (cut.tiles - 1) * cut.length
    assert cut.width * cut.length * BYTES[dtype] <= tiling.LIMITS.tile
    assert 1 <= cut.blocks * cut.parts <= max(tiling.LIMITS.programs, cut.parts)
    assert cut.blocks <= cut.tiles


def test_a_step_in_halves_is_the_step() -> None:
    """A synchronized layer takes such halves, with an exchange between them."""
    x, dy, nothing = torch.randn(40, 3), torch.randn(40, 3), arguments.Array(None)
    mask = arguments.Mask((torch.rand(40) < 0.5).to(torch.uint8), 1, 1, 0)
    layout = make_layout((40, 3), 1)
    geometry = find_geometry(layout, x.stride())
    assert geometry is not None
    plan = launch.Plan(layout, geometry, "float32")
    parameters = arguments.Parameters(torch.rand(3), torch.rand(3))
    found = []
    for halves in (False, True):
        y, dx, dgamma, dbeta = (
            torch.empty(40, 3),
            torch.empty(40, 3),
            torch.empty(3),
            torch.empty(3),
        )
        arrays = [arguments.Array(a, geometry.dense) for a in (x, dy, y, dx)]
        gradients = arguments.Parameters(dgamma, dbeta)
        kept = plan.forward(
            *(arrays[0], nothing, mask, arrays[2], parameters, None, Options()),
            batch=True,
            update=False,
            kept=plan.moments(arrays[0], mask) if halves else None,
        )
        if halves:
            rows = (arrays[0], arrays[1], nothing)
            sums = plan.reduce(*rows, nothing, mask, gradients, kept, Options())
            plan.apply(*rows, arrays[3], nothing, mask, sums, kept, Options())
        else:
            rows = (arrays[0], arrays[1], nothing, arrays[3], nothing)
            plan.backward(*rows, mask, gradients, kept, Options(), batch=True)
        found.append((y, dx, dgamma, dbeta))
    for a, b in zip(*found, strict=True):
        assert (a - b).abs().max() <= 5e-6


@pytest.mark.parametrize("deviation", [0.0, 1e-39, 1e-30, 1e-18])
def test_a_deviation_without_reciprocal_counts_as_none(deviation: float) -> None:
    """Without eps: x̂ and dx are 0 where the variance, of float32 squares, vanishes (S7)."""
    x = torch.tensor([[1.0], [-1.0], [-1.0], [1.0]]) * deviation
    y, dx = train(x, eps=0.0)
    expected = [1.0, -1.0, -1.0, 1.0] if deviation == 1e-18 else [0.0] * 4
    torch.testing.assert_close(y.flatten(), torch.tensor(expected))
    assert deviation == 1e-18 or (dx == 0).all()


def test_a_running_variance_of_zero_without_eps_gives_beta() -> None:
    x, zero = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.zeros(2)
    y = batch_norm(x, zero, zero.clone(), None, torch.tensor([7.0, -1.0]), eps=0.0, fused=True)
    assert y.tolist() == [[7.0, -1.0]] * 2
