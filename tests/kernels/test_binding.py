"""The extension's errors, and its promises to direct callers."""

from __future__ import annotations

import gc
import subprocess
import sys

import numpy as np
import pytest

from batchnorm.kernels import extension
from batchnorm.kernels.kept import STATISTICS

_cpu = pytest.importorskip("batchnorm.kernels._cpu")

F16, BF16, F32, F64 = range(4)
ROWS, CHANNELS = 6, 3
FORWARD = {
    "x": 0,
    "mask": 0,
    "y": 0,
    "residual": 0,
    "residual_row": CHANNELS,
    "eps": 1e-5,
    "decay": 0.9,
    "batch": True,
    "update": False,
    "unbiased": True,
    "renorm": None,
    "threads": 1,
    "kept": None,
}
# The arguments of a step in one `State`.
STATE = (
    *("gamma", "gamma_type", "beta", "beta_type", "running_type", "running_mean", "running_var"),
    *("batches", "running_stddev", "renorm_mean", "renorm_stddev"),
)
BACKWARD = {
    "dy": 0,
    "dy_row": CHANNELS,
    "x": 0,
    "y": 0,
    "mask": 0,
    "dx": 0,
    "dresidual": 0,
    "dgamma": 0,
    "dgamma_type": F32,
    "dbeta": 0,
    "dbeta_type": F32,
    "batch": True,
    "threads": 1,
}
PLAN = {
    "type": F32,
    "outer": ROWS,
    "channels": CHANNELS,
    "inner": 1,
    "groups": 1,
    "run": 1,
    "row": CHANNELS,
    "activation": 0,
    "zero_padding": False,
}


def plan(**changes):
    return _cpu.Plan(**PLAN | changes)


class Arrays:
    """Memory for every argument of a small step."""

    def __init__(self):
        rng = np.random.default_rng(0)
        self.x, self.dy = rng.normal(size=(2, ROWS, CHANNELS)).astype(np.float32)
        self.y, self.dx, self.dresidual, self.residual = np.zeros((4, ROWS, CHANNELS), np.float32)
        self.gamma, self.running_var = np.ones((2, CHANNELS), np.float32)
        self.beta, self.running_mean, self.dgamma, self.dbeta = np.zeros((4, CHANNELS), np.float32)
        self.mask = np.ones(ROWS, np.int64)
        self.batches = np.zeros(1, np.int64)

    def at(self, *names):
        return {name: getattr(self, name).ctypes.data for name in names}

    def forward(self, of=None, **changes):
        state = _cpu.State(**{n: changes.pop(n) for n in STATE if n in changes})
        arguments = FORWARD | self.at("x", "y") | changes
        return (of or plan()).forward(state=state, **arguments)

    def backward(self, kept, of=None, **changes):
        arguments = BACKWARD | self.at("x", "dy", "dx") | changes
        return (of or plan()).backward(kept=kept, **arguments)

    def reduce(self, kept, of=None, **changes):
        arguments = self._half(("dx", "batch"), changes)
        return (of or plan()).reduce(kept=kept, **arguments)

    def apply(self, kept, sums, of=None, **changes):
        arguments = self._half(("dgamma", "dbeta", "batch"), self.at("dx") | changes)
        return (of or plan()).apply(kept=kept, sums=sums, **arguments)

    def moments(self, of=None):
        return (of or plan()).moments(**self.at("x"), mask=0, threads=1)

    def _half(self, without, changes):
        """The arguments of `backward` without some."""
        arguments = BACKWARD | self.at("x", "dy") | changes
        return {n: a for n, a in arguments.items() if not n.startswith(without)}


@pytest.fixture
def arrays():
    return Arrays()


# Construction

REFUSED = [
    ("type", -1),
    ("type", 4),
    ("outer", -1),
    ("channels", -1),
    ("inner", -1),
    ("groups", -1),
    ("run", 0),
    ("run", -1),
    ("activation", -1),
    ("activation", 3),
]


@pytest.mark.parametrize(("name", "value"), REFUSED)
def test_plan_refuses_and_names(name, value):
    with pytest.raises(ValueError, match=rf"^kernels: {name} must be .*; got {value}\.$"):
        plan(**{name: value})


INDIVISIBLE = {
    "groups": {"outer": 6, "groups": 4},
    "run": {"outer": 6, "groups": 2, "run": 2},
    "no groups": {"outer": 6, "groups": 0},
}


@pytest.mark.parametrize("changes", INDIVISIBLE.values(), ids=INDIVISIBLE)
def test_plan_refuses_rows_that_do_not_divide(changes):
    with pytest.raises(ValueError, match=r"outer must be a multiple of groups \* run; got 6\."):
        plan(**changes)


TOO_LARGE = {
    "rows and channels": {"outer": 2**32, "channels": 2**31},
    "channels and inner": {"outer": 1, "channels": 2**32, "inner": 2**32},
    "bytes": {"outer": 2**30, "channels": 2**30},
    "all three": {"outer": 2**31, "channels": 2**31, "inner": 2**31},
}


@pytest.mark.parametrize("changes", TOO_LARGE.values(), ids=TOO_LARGE)
def test_plan_refuses_more_elements_than_memory(changes):
    with pytest.raises(ValueError, match="more elements than memory"):
        plan(**changes)


@pytest.mark.parametrize("name", ["outer", "channels", "inner", "groups", "run"])
@pytest.mark.parametrize("value", [2**63, -(2**63) - 1, 1.5, "3", None])
def test_plan_takes_only_64_bit_integers(name, value):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        plan(**{name: value})


@pytest.mark.parametrize("width", [-1, 0, 3, 5, 16])
def test_mask_width_is_that_of_an_integer_type(width):
    with pytest.raises(ValueError, match=rf"mask width must be 1, 2, 4 or 8; got {width}\."):
        plan().set_mask(width=width, repeat=1, outer=1, inner=0)


@pytest.mark.parametrize("repeat", [0, -1])
def test_mask_repeat_is_positive(repeat):
    with pytest.raises(ValueError, match=rf"mask repeat must be at least 1; got {repeat}\."):
        plan().set_mask(width=1, repeat=repeat, outer=1, inner=0)


# Forward

MISALIGNED = {
    "x": 1,
    "y": 2,
    "residual": 3,
    "gamma": 2,
    "beta": 1,
    "running_mean": 2,
    "running_var": 3,
    "batches": 4,
}


@pytest.mark.parametrize(("name", "offset"), MISALIGNED.items())
def test_forward_refuses_a_misaligned(arrays, name, offset):
    address = getattr(arrays, name).ctypes.data + offset
    message = rf"kernels: {name} must be aligned to its element size; got {address}\."
    with pytest.raises(ValueError, match=message):
        arrays.forward(**{name: address})


@pytest.mark.parametrize("name", [n for n in STATE if not n.endswith("type")])
def test_state_refuses_a_misaligned(name):
    with pytest.raises(ValueError, match=rf"kernels: {name} must be aligned to its .*; got 1\."):
        _cpu.State(**{name: 1})


@pytest.mark.parametrize("name", [n for n in STATE if n.endswith("type")])
def test_state_refuses_a_wrong(name):
    with pytest.raises(ValueError, match=r"type must be 0 \(float16\), .*; got 4\."):
        _cpu.State(**{name: 4})


@pytest.mark.parametrize(("width", "offset"), [(2, 1), (4, 2), (8, 4)])
def test_forward_refuses_a_mask_misaligned_for_its_width(arrays, width, offset):
    masked = plan()
    masked.set_mask(width=width, repeat=1, outer=1, inner=0)
    with pytest.raises(ValueError, match="mask must be aligned to its element size"):
        arrays.forward(masked, mask=arrays.mask.ctypes.data + offset)


def test_forward_takes_a_mask_of_bytes_at_any_address(arrays):
    masked = plan()
    masked.set_mask(width=1, repeat=1, outer=1, inner=0)
    mask = np.array([9, 1, 0, 1, 1, 1, 0], np.uint8)
    kept = arrays.forward(masked, mask=mask.ctypes.data + 1)
    assert kept.count() == [4]


OVERLAPPING = [2, 0, -3, 2**61, 2**63 - 1]


@pytest.mark.parametrize("row", OVERLAPPING)
def test_plan_refuses_rows_of_x_that_overlap_or_leave_memory(row):
    message = rf"row must be dense within a row, .*; got {row}\."
    with pytest.raises(ValueError, match=message):
        plan(row=row)


@pytest.mark.parametrize("row", OVERLAPPING)
def test_forward_refuses_a_residual_whose_rows_overlap_or_leave_memory(arrays, row):
    message = rf"residual must be dense within a row, .*; got {row}\."
    with pytest.raises(ValueError, match=message):
        arrays.forward(**arrays.at("residual"), residual_row=row)


@pytest.mark.parametrize("name", ["x", "residual"])
def test_gaps_between_rows_are_left_alone(arrays, name):
    wide = np.full((ROWS, CHANNELS + 2), np.nan, np.float32)
    wide[:, :CHANNELS] = getattr(arrays, name)
    arrays.forward(**arrays.at("residual"))
    dense = arrays.y.copy()
    rows = {"row": CHANNELS + 2} if name == "x" else {}
    given = arrays.at("residual") | {name: wide.ctypes.data}
    if name == "residual":
        given["residual_row"] = CHANNELS + 2
    arrays.forward(plan(**rows), **given)
    np.testing.assert_array_equal(arrays.y, dense)


@pytest.mark.parametrize("name", ["x", "y"])
def test_forward_refuses_a_null_pointer_for(arrays, name):
    with pytest.raises(ValueError, match=f"{name} is missing; got a null pointer"):
        arrays.forward(**{name: 0})


@pytest.mark.parametrize("threads", [0, -1])
def test_forward_refuses_threads(arrays, threads):
    with pytest.raises(ValueError, match=rf"threads must be at least 1; got {threads}\."):
        arrays.forward(threads=threads)


@pytest.mark.parametrize("code", [-1, 4])
@pytest.mark.parametrize("name", ["gamma_type", "beta_type", "running_type"])
def test_forward_refuses_a_wrong_type_code(arrays, name, code):
    with pytest.raises(ValueError, match=rf"type must be 0 \(float16\), .*; got {code}\."):
        arrays.forward(**{name: code})


@pytest.mark.parametrize("given", [(), ("running_mean",), ("running_var",)])
def test_update_needs_running_statistics(arrays, given):
    with pytest.raises(ValueError, match="an update needs running statistics"):
        arrays.forward(**arrays.at(*given), update=True)


def test_cumulative_average_needs_the_number_of_batches(arrays):
    with pytest.raises(ValueError, match="needs the number of batches"):
        arrays.forward(**arrays.at("running_mean", "running_var"), update=True, decay=-1.0)


NUMBERS = {"decay": 0.9, "rmin": 0.9, "rmax": 1.1, "dmax": 1.0}


def renorm():
    return _cpu.Renorm(**NUMBERS)


@pytest.mark.parametrize("missing", NUMBERS)
def test_renorm_has_all_its_numbers(missing):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        _cpu.Renorm(**{name: n for name, n in NUMBERS.items() if name != missing})


@pytest.mark.parametrize("missing", FORWARD)
def test_forward_takes_every_argument_by_name(arrays, missing):
    arguments = {name: a for name, a in (FORWARD | arrays.at("x", "y")).items() if name != missing}
    with pytest.raises(TypeError, match="incompatible function arguments"):
        plan().forward(state=_cpu.State(), **arguments)


def test_arguments_have_no_places(arrays):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        plan().moments(arrays.x.ctypes.data, 0, 1)


@pytest.mark.parametrize("update", [False, True])
def test_refused_call_writes_nothing(arrays, update):
    state = arrays.at("running_mean", "running_var", "batches")
    with pytest.raises(ValueError, match="threads"):
        arrays.forward(**state, update=update, threads=0)
    assert not arrays.y.any()
    assert not arrays.running_mean.any()
    assert not arrays.batches.any()


def test_empty_arrays_may_be_null(arrays):
    kept = arrays.forward(plan(outer=0), x=0, y=0)
    assert kept.count() == [0]


# Backward


@pytest.mark.parametrize("changes", [{"channels": 4}, {"groups": 2}, {"groups": 0, "outer": 0}])
def test_backward_refuses_what_another_plan_kept(arrays, changes):
    kept = plan(**changes | {"outer": 0}).moments(x=0, mask=0, threads=1)
    with pytest.raises(ValueError, match="kept must come from a step of this plan"):
        arrays.backward(kept)


def test_backward_refuses_to_go_without_what_forward_kept(arrays):
    with pytest.raises(TypeError, match="incompatible function arguments"):
        arrays.backward(None)


@pytest.mark.parametrize("name", ["dy", "x"])
def test_backward_refuses_a_null_pointer_for(arrays, name):
    with pytest.raises(ValueError, match=f"{name} is missing; got a null pointer"):
        arrays.backward(arrays.forward(), **{name: 0})


@pytest.mark.parametrize("missing", ["y", "dx"])
def test_gradient_of_the_residual_needs(arrays, missing):
    given = arrays.at("y", "dx", "dresidual") | {missing: 0}
    with pytest.raises(ValueError, match="dresidual needs dx, and an activation and y"):
        arrays.backward(arrays.forward(), **given)


@pytest.mark.parametrize("row", OVERLAPPING)
def test_backward_refuses_rows_of_dy_that_overlap_or_leave_memory(arrays, row):
    message = rf"dy must be dense within a row, .*; got {row}\."
    with pytest.raises(ValueError, match=message):
        arrays.backward(arrays.forward(), dy_row=row)


@pytest.mark.parametrize("name", ["dy", "x", "y", "dx", "dresidual", "dgamma", "dbeta"])
def test_backward_refuses_a_misaligned(arrays, name):
    given = arrays.at("y", "dresidual") | {name: getattr(arrays, name).ctypes.data + 1}
    with pytest.raises(ValueError, match=f"{name} must be aligned to its element size"):
        arrays.backward(arrays.forward(), **given)


@pytest.mark.parametrize("name", ["dy", "x", "y", "dresidual", "dgamma", "dbeta"])
def test_reduce_refuses_a_misaligned(arrays, name):
    given = arrays.at("y", "dresidual") | {name: getattr(arrays, name).ctypes.data + 1}
    with pytest.raises(ValueError, match=f"{name} must be aligned to its element size"):
        arrays.reduce(arrays.forward(), **given)


@pytest.mark.parametrize("name", ["dy", "x", "y", "dx", "dresidual"])
def test_apply_refuses_a_misaligned(arrays, name):
    kept = arrays.forward()
    given = arrays.at("y", "dresidual") | {name: getattr(arrays, name).ctypes.data + 1}
    with pytest.raises(ValueError, match=f"{name} must be aligned to its element size"):
        arrays.apply(kept, np.zeros(2 * CHANNELS), **given)


def test_backward_refuses_threads(arrays):
    with pytest.raises(ValueError, match=r"threads must be at least 1; got 0\."):
        arrays.backward(arrays.forward(), threads=0)


# Calls that must not crash, in processes of their own: a crash would end the other tests


def outcome(code):
    """The output of `code`, which may call `forward(plan, **changes)` and so on."""
    header = "import sys; sys.path.insert(0, sys.argv[1])\nfrom test_binding import *\n"
    here = __file__.rsplit("/", 1)[0]
    done = subprocess.run(
        [sys.executable, "-c", header + code, here], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, f"exit status {done.returncode}: {done.stderr}"
    return done.stdout.strip()


UNALLOCATABLE = {
    "channels, training": ({"outer": 0, "channels": 2**55}, True),
    "channels, evaluation": ({"outer": 0, "channels": 2**55}, False),
    "bytes of statistics past 63 bits": ({"outer": 0, "channels": 2**58}, False),
    "number of statistics past 63 bits": ({"outer": 0, "channels": 2**60}, False),
    "number of statistics past 64 bits": ({"outer": 0, "channels": 2**61}, False),
    "groups": ({"outer": 0, "groups": 2**55}, True),
    "groups times channels past 64 bits": (
        {"outer": 0, "groups": 2**20, "channels": 2**44},
        True,
    ),
    "groups times channels past 64 bits, evaluation": (
        {"outer": 0, "groups": 2**20, "channels": 2**44},
        False,
    ),
}


@pytest.mark.parametrize(("sizes", "batch"), UNALLOCATABLE.values(), ids=UNALLOCATABLE)
def test_statistics_that_no_memory_holds_are_an_error(sizes, batch):
    code = f"""
try:
    Arrays().forward(plan(**{sizes}), x=0, y=0, batch={batch})
except (MemoryError, ValueError) as error:
    print("refused")
"""
    assert outcome(code) == "refused"


def test_statistics_that_do_not_fit_are_a_memory_error():
    with pytest.raises(MemoryError):
        Arrays().forward(plan(outer=0, channels=2**55), x=0, y=0)


def test_moments_that_no_memory_holds_are_an_error():
    code = """
try:
    plan(outer=0, groups=2**20, channels=2**44).moments(x=0, mask=0, threads=1)
except (MemoryError, ValueError) as error:
    print("refused")
"""
    assert outcome(code) == "refused"


@pytest.mark.parametrize("missing", ["running_stddev", "renorm_mean", "renorm_stddev"])
def test_renorm_refuses_a_null_pointer_for_its_statistics(missing):
    code = f"""
a = Arrays()
names = {{"running_stddev", "renorm_mean", "renorm_stddev"}} - {{{missing!r}}}
state = a.at("running_mean", "running_var") | dict.fromkeys(names, a.running_var.ctypes.data)
try:
    a.forward(**state, renorm=renorm(), update=True)
except ValueError as error:
    print("refused")
"""
    assert outcome(code) == "refused"


# Results without any framework


def test_moments_are_those_of_the_rows(arrays):
    kept = arrays.moments()
    x = arrays.x.astype(np.float64)
    mean, low = kept.row(STATISTICS["mean"]), kept.row(STATISTICS["low"])
    np.testing.assert_allclose(mean + low, x.mean(axis=0), rtol=5e-6, atol=5e-6)
    np.testing.assert_allclose(kept.row(STATISTICS["var"]), x.var(axis=0), rtol=5e-6)


def test_forward_normalizes_the_rows(arrays):
    arrays.forward()
    x = arrays.x.astype(np.float64)
    expected = (x - x.mean(axis=0)) / np.sqrt(x.var(axis=0) + 1e-5)
    np.testing.assert_allclose(arrays.y, expected, rtol=5e-6, atol=5e-6)


def test_backward_gives_the_gradient_of_beta(arrays):
    arrays.backward(arrays.forward(), **arrays.at("dbeta"))
    np.testing.assert_allclose(arrays.dbeta, arrays.dy.sum(axis=0), rtol=5e-6, atol=5e-6)


def test_gradient_of_x_sums_to_nothing(arrays):
    arrays.backward(arrays.forward())
    assert np.abs(arrays.dx).max() > 0.1
    np.testing.assert_allclose(arrays.dx.sum(axis=0), 0, atol=5e-6 * ROWS)


@pytest.mark.parametrize("which", [-1, 8])
def test_statistics_have_eight_rows(arrays, which):
    with pytest.raises(ValueError, match=rf"row must be one of the rows; got {which}\."):
        arrays.forward().row(which)


def test_row_of_statistics_outlives_what_was_kept(arrays):
    expected = arrays.forward().row(STATISTICS["rstd"]).copy()
    row = arrays.forward().row(STATISTICS["rstd"])
    gc.collect()
    others = [arrays.forward() for _ in range(100)]
    assert np.array_equal(row, expected)
    assert len(others) == 100


# Instruction sets


@pytest.fixture
def restored():
    before = extension.instructions()
    yield
    extension.use_instructions(before)


@pytest.mark.parametrize("name", ["", "sse9", "AVX2", "avx", "baseline "])
def test_unknown_instructions_are_refused(name):
    with pytest.raises(ValueError, match=f"this machine cannot run {name!r} instructions"):
        extension.use_instructions(name)


def test_refused_instructions_change_nothing():
    before = extension.instructions()
    with pytest.raises(ValueError, match="sse9"):
        extension.use_instructions("sse9")
    assert extension.instructions() == before


@pytest.mark.usefixtures("restored")
def test_baseline_instructions_run_everywhere():
    extension.use_instructions("baseline")
    assert extension.instructions() == "baseline"


# Steps in halves; other processes' sums are added in between


class TestHalves:
    def test_forward_step_in_halves_is_the_whole_step_to_the_bit(self, arrays):
        whole = arrays.forward(update=True, **arrays.at("gamma", "running_mean", "running_var"))
        y, mean, var = arrays.y.copy(), arrays.running_mean.copy(), arrays.running_var.copy()
        fresh = Arrays()
        kept = fresh.moments()
        given = {"update": True, "kept": kept}
        state = fresh.at("gamma", "running_mean", "running_var")
        assert fresh.forward(**state, **given) is kept
        np.testing.assert_array_equal(fresh.y, y)
        np.testing.assert_array_equal(fresh.running_mean, mean)
        np.testing.assert_array_equal(fresh.running_var, var)
        for row in STATISTICS.values():
            if row < STATISTICS["r"]:
                np.testing.assert_array_equal(kept.row(row), whole.row(row))

    def test_forward_step_normalizes_by_the_moments_that_it_is_given(self, arrays):
        kept = arrays.moments()
        mean, var = np.array([1.0, -2.0, 3.0]), np.array([4.0, 0.25, 1.0])
        kept.count()[:] = 100.0
        kept.row(STATISTICS["mean"])[:] = mean
        kept.row(STATISTICS["low"])[:] = 0.0
        kept.row(STATISTICS["var"])[:] = var
        arrays.forward(
            kept=kept, update=True, decay=0.0, eps=0.0, **arrays.at("running_mean", "running_var")
        )
        np.testing.assert_allclose(arrays.y, (arrays.x - mean) / np.sqrt(var), rtol=1e-6)
        np.testing.assert_allclose(arrays.running_mean, mean, rtol=1e-7)
        np.testing.assert_allclose(arrays.running_var, var * 100 / 99, rtol=1e-7)

    def test_given_moments_without_rows_hand_over_to_the_running_ones(self, arrays):
        kept = arrays.moments()
        kept.count()[:] = 0.0
        arrays.running_mean[:] = 5.0
        arrays.forward(kept=kept, update=True, eps=0.0, **arrays.at("running_mean", "running_var"))
        np.testing.assert_allclose(arrays.y, arrays.x - 5.0, rtol=1e-6)
        np.testing.assert_array_equal(arrays.running_mean, [5.0] * CHANNELS)

    @pytest.mark.parametrize("masked", [False, True])
    def test_backward_step_in_halves_is_the_whole_step_to_the_bit(self, arrays, masked):
        of = plan()
        mask = {}
        if masked:
            arrays.mask[2:4] = 0
            of.set_mask(width=8, repeat=1, outer=1, inner=0)
            mask = arrays.at("mask")
        kept = arrays.forward(of, **mask)
        arrays.backward(kept, of, **mask, **arrays.at("dgamma", "dbeta"))
        dx, dgamma, dbeta = arrays.dx.copy(), arrays.dgamma.copy(), arrays.dbeta.copy()
        sums = arrays.reduce(kept, of, **mask, **arrays.at("dgamma", "dbeta"))
        arrays.dx[:] = np.nan
        arrays.apply(kept, sums, of, **mask)
        np.testing.assert_array_equal(arrays.dx, dx)
        np.testing.assert_array_equal(arrays.dgamma, dgamma)
        np.testing.assert_array_equal(arrays.dbeta, dbeta)

    def test_sums_are_of_the_gradient_and_of_its_product_with_the_deviation(self, arrays):
        sums = arrays.reduce(arrays.forward())
        centred = arrays.x - arrays.x.mean(0, dtype=np.float64)
        assert sums.dtype == np.float64
        assert sums.shape == (2 * CHANNELS,)
        np.testing.assert_allclose(sums[:CHANNELS], arrays.dy.sum(0, np.float64), atol=1e-6)
        np.testing.assert_allclose(sums[CHANNELS:], (arrays.dy * centred).sum(0), atol=1e-6)

    def test_sums_outlive_the_plan_and_what_it_kept(self, arrays):
        sums = arrays.reduce(arrays.forward())
        expected = sums.copy()
        gc.collect()
        np.testing.assert_array_equal(sums, expected)

    def test_application_uses_the_sums_that_it_is_given(self, arrays):
        kept = arrays.forward(eps=0.0)
        sums = arrays.reduce(kept)
        arrays.apply(kept, np.zeros_like(sums))
        rstd = kept.row(STATISTICS["rstd"])
        np.testing.assert_allclose(arrays.dx, arrays.dy * rstd, rtol=1e-5)

    @pytest.mark.parametrize("size", [0, CHANNELS, 2 * CHANNELS + 1])
    def test_sums_of_another_size_are_refused(self, arrays, size):
        with pytest.raises(ValueError, match="sums must be two for each statistic"):
            arrays.apply(arrays.forward(), np.zeros(size))

    def test_moments_of_another_plan_are_refused(self, arrays):
        other = arrays.moments(plan(channels=2))
        with pytest.raises(ValueError, match="kept must come from a step of this plan"):
            arrays.forward(kept=other)
        with pytest.raises(ValueError, match="kept must come from a step of this plan"):
            arrays.reduce(other)

    def test_given_moments_and_running_statistics_exclude_each_other(self, arrays):
        kept = arrays.moments()
        with pytest.raises(ValueError, match="kept moments need batch=True"):
            arrays.forward(kept=kept, batch=False)

    def test_residual_gradient_needs_an_activation(self, arrays):
        kept = arrays.forward()
        with pytest.raises(ValueError, match=r"dresidual needs .*, or padding that is zeroed"):
            arrays.reduce(kept, **arrays.at("dresidual"))
        with pytest.raises(ValueError, match=r"dresidual needs .*, or padding that is zeroed"):
            arrays.apply(kept, np.zeros(2 * CHANNELS), **arrays.at("dresidual"))
