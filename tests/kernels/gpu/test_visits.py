"""Visits, the GPU's other schedule, interpreted: cuts, results, reasons, and their proof."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from test_triton_kernels import assert_close, expect, train
from torch import Tensor

import batchnorm
import triton_path
from batchnorm.core.layout import make_layout
from batchnorm.kernels import explanation, proofs, schedules
from batchnorm.kernels.geometry import Sizes, find_geometry, sizes_of
from batchnorm.kernels.kept import BYTES
from batchnorm.kernels.schedules import visiting
from batchnorm.kernels.triton import launch, tiling, visits
from batchnorm.torch import BatchNorm
from batchnorm.torch.kernels import samples
from batchnorm.torch.ways import proof

WHOLE = ["forward_whole", "backward_whole"]
PASSES = [
    *("partial_moments", "finish_channels", "normalize"),
    *("partial_gradients", "merge_gradients", "apply_gradient"),
]


@pytest.fixture
def all_visits() -> Iterator[visits.Limits]:
    """Every step is visits, of several tiles."""
    with triton_path.all_visits() as limits:
        yield limits


def sizes_of_shape(shape: tuple[int, ...], axis: int = 1) -> Sizes:
    layout = make_layout(shape, axis)
    geometry = find_geometry(layout, torch.empty(shape, device="meta").stride())
    assert geometry is not None
    return sizes_of(layout, geometry)


# Shape, type, arrays that are read twice, and channels of a visit; or a part of the reason.
CUTS = [
    ((32, 256, 14, 14), "float32", 1, 1),
    ((32, 256, 14, 14), "float32", 2, 1),
    ((32, 1024, 7, 7), "float32", 1, 4),
    ((32, 256, 28, 28), "bfloat16", 1, 1),
    ((32, 256, 28, 28), "float32", 1, "read 98 KiB twice, and 64 KiB is the most"),
    ((256, 256, 56, 56), "bfloat16", 1, "1568 KiB twice"),
    ((64, 64, 14, 14), "float32", 1, "there would be 64 visits, and 128 is the fewest"),
    ((1024, 2048), "float32", 2, 8),
    ((1024, 2048), "bfloat16", 2, 16),
    ((1024, 1000), "float32", 1, "there would be 125 visits"),
    ((4194304, 64), "float32", 1, "131072 KiB twice"),
    ((1, 1, 2**31), "float32", 1, "8388608 KiB twice"),
]


@pytest.mark.parametrize(("shape", "dtype", "arrays", "found"), CUTS)
def test_cuts_stay_within_their_limits(
    shape: tuple[int, ...], dtype: str, arrays: int, found: int | str
) -> None:
    sizes, limits, each = sizes_of_shape(shape), visits.LIMITS, BYTES[dtype]
    cut, reason = visits.find_visit(sizes, each, arrays, limits)
    if cut is None:
        assert isinstance(found, str)
        assert found in reason
        return
    assert cut.width == found
    assert cut.width * arrays * sizes.outer * sizes.inner * each <= limits.twice
    assert cut.parts * cut.width >= sizes.channels > (cut.parts - 1) * cut.width
    assert cut.parts >= limits.visits
    assert cut.tiles * cut.length >= tiling.count_positions(sizes) > (cut.tiles - 1) * cut.length
    assert cut.width * cut.length * max(4, each) <= limits.tile
    assert 1 <= cut.warps <= limits.warps


ODD = [
    *((2, 1), (515, 3), (1, 1, 2), (3, 1, 1), (5000, 1), (1031, 5)),
    *((2, 130, 3), (3, 5, 67), (2, 3, 1801)),
]


@pytest.mark.sample(2)
@pytest.mark.parametrize("shape", ODD)
@pytest.mark.parametrize("masked", [False, True])
def test_odd_sizes(
    shape: tuple[int, ...], masked: bool, all_visits: Any, launched: list[str]
) -> None:
    x, mask = torch.randn(shape) + 1e4, None
    if masked:
        mask = torch.rand((shape[0], *shape[2:])) < 0.5
        x = x.masked_fill(~mask[:, None], torch.nan)
    found = train(x, mask)
    assert launched == WHOLE
    expected = expect(x, mask)
    if mask is not None:
        real = mask[:, None].expand(shape)
        found, expected = (tuple(a[real] for a in pair) for pair in (found, expected))
    assert_close(found, expected)


def test_tiles_as_on_a_card(launched: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(visits, "LIMITS", visits.LIMITS._replace(visits=4))
    x = torch.randn(4, 4, 1500) + 100.0
    passes = train(x)
    with visiting():
        found = train(x)
        again = train(x)
    assert launched == PASSES + WHOLE + WHOLE
    assert_close(found, expect(x))
    for a, b, c in zip(found, again, passes, strict=True):
        assert torch.equal(a, b)
        assert (a - c).abs().max() <= 5e-6 * (1.0 + c.abs().max())


def test_bits_are_the_same_for_each_order_of_programs(
    all_visits: Any, monkeypatch: pytest.MonkeyPatch
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


@pytest.mark.filterwarnings("ignore:invalid value")  # numpy's, of infinities
def test_the_last_of_several_visits_counts_the_batch(all_visits: Any) -> None:
    """The update of one channel is one batch, whichever visit has that channel (S9)."""
    x = torch.randn(300, 7)
    x[0, :6] = torch.inf
    layer = BatchNorm(7, fused=True)
    layer(x)
    assert layer.num_batches_tracked == 1
    layer(torch.full((300, 7), torch.inf))
    assert layer.num_batches_tracked == 1


def test_outputs_are_written_everywhere(all_visits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_sums_alone_are_passes(all_visits: Any, launched: list[str]) -> None:
    """Without dx nothing is read twice."""
    layer = BatchNorm(3, fused=True)
    layer(torch.randn(100, 3)).sum().backward()
    assert launched == ["forward_whole", "partial_gradients", "merge_gradients"]


# The layer's arguments, x's shape, whether it trains, and the note.
NOTES: list[tuple[dict[str, Any], tuple[int, ...], bool, str]] = [
    ({}, (4, 128, 1500), True, "one visit to each channel, forward and backward"),
    ({}, (4, 128, 1500), False, "one pass, as the statistics are known"),
    ({}, (4, 4, 1500), True, "passes: there would be 4 visits, and 128 is the fewest"),
    ({}, (8, 128, 1500), True, "forward one visit to each channel; backward passes: a visit would"),
    ({}, (12, 128, 1500), True, "passes: a visit would read 71 KiB twice, and 64 KiB is the most"),
]


@pytest.mark.parametrize(("options", "shape", "training", "note"), NOTES)
def test_explain_names_the_schedule(
    options: dict[str, Any], shape: tuple[int, ...], training: bool, note: str
) -> None:
    layer = BatchNorm(shape[1], fused=True, **options).train(training)
    x = torch.zeros(shape)
    before = batchnorm.explain(layer, x)
    with visiting():
        found = batchnorm.explain(layer, x)
    assert found.way == explanation.KERNELS
    assert found.note.startswith(note)
    assert "visit" not in before.note


def test_array_code_has_no_schedule() -> None:
    with visiting():
        assert batchnorm.explain(BatchNorm(3, fused=False), torch.zeros(4, 3)).note == ""


def test_the_setting(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for value, name in (("", "passes"), ("0", "passes"), ("1", "visits")):
        monkeypatch.setenv("BATCHNORM_GPU_VISITS", value)
        assert schedules.find_setting() == name
    monkeypatch.setenv("BATCHNORM_GPU_VISITS", "yes")
    with pytest.raises(ValueError, match="BATCHNORM_GPU_VISITS must be 0 or 1; got 'yes'"):
        schedules.find_setting()
    batchnorm.show_config()
    assert "visits" not in capsys.readouterr().out
    with visiting():
        batchnorm.show_config()
    assert ", visits where they suit\n" in capsys.readouterr().out


def test_the_variable_switches_visits_on() -> None:
    code = "from batchnorm.kernels.schedules import SCHEDULE; print(SCHEDULE.visits)"
    for value, said in (("1", "True\n"), ("0", "False\n")):
        environment = os.environ | {"BATCHNORM_GPU_VISITS": value}
        command = [sys.executable, "-c", code]
        found = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        assert found.stdout == said


SMALL = samples.Sample("small_visit", (40, 6), masked=False)


class WrongVisits:
    """A kernel of a whole step that is wrong in the schedule of visits."""

    def __init__(self, kernel: Any, at: int) -> None:
        self.kernel, self.at = kernel, at

    def __getitem__(self, grid: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> None:
            self.kernel[grid](*arguments, **options)
            if schedules.SCHEDULE.visits:
                arguments[self.at].data.mul_(2)

        return run


@pytest.mark.parametrize(
    ("module", "name", "at", "wrong"),
    [("forward", "forward_whole", 3, "y"), ("backward", "backward_whole", 3, "dx")],
)
def test_wrong_visits_are_caught_by_their_own_proof(
    module: str,
    name: str,
    at: int,
    wrong: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The passes stay proved; visits leave the device to array code, and the warning says more."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(proof, "SAMPLES", ())
    monkeypatch.setattr(proof, "VISITED", (SMALL,))
    monkeypatch.setattr(proof, "PROOFS", proof._Proofs("once"))
    broken = WrongVisits(getattr(getattr(launch, module), name), at)
    monkeypatch.setattr(getattr(launch, module), name, broken)
    x, layer = torch.randn(40, 6), BatchNorm(6, fused=True)
    layer(x)
    assert proofs.describe_known() == ["Triton's interpreter: proved"]
    with triton_path.all_visits():
        refused = "fused=True demands a kernel, but the kernels are wrong"
        with (
            pytest.warns(RuntimeWarning, match="kernels with visits are wrong in case s") as told,
            pytest.raises(ValueError, match=refused),
        ):
            layer(x)
        text = str(told[0].message)
        assert f"{wrong} is wrong at" in text
        assert "BATCHNORM_GPU_VISITS=0 takes passes, which are proved apart." in text
    layer(x)
    known = sorted(proofs.describe_known())
    assert len(known) == 2
    assert known[0].startswith("Triton's interpreter with visits: wrong in case small_visit")
    assert known[1] == "Triton's interpreter: proved"


@pytest.mark.exhaustive  # 128 visits of each kernel
@pytest.mark.parametrize("sample", samples.VISITED, ids=lambda sample: sample.name)
def test_samples_of_the_proof_are_visits_and_right(
    sample: samples.Sample, launched: list[str]
) -> None:
    device = torch.device("cpu")
    with visiting():
        error = samples.compare(sample, proof._run_kernels, proof.array_code.run, device)
    assert error == ""
    assert [name for name in launched if name != "count_batch"] == WHOLE
