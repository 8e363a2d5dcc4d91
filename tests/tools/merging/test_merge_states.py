"""States of several models as one (S22): the mathematics, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchnorm.tools import merge
from batchnorm.tools.merging import MergedLayer
from batchnorm.tools.state import BatchNormState, RenormState, Variance

CHANNELS = 3
EPS = 0.25
ROUNDING = 1e-9  # of a variance at mean/std 1e6: the mean is rounded to 1e-10 deviations


def state_of(x: np.ndarray, variance: Variance = "biased", **fields: Any) -> BatchNormState:
    """The state of a layer that has seen the rows x, float64."""
    correction = 1 if variance == "unbiased" and len(x) > 1 else 0
    mean, var = x.mean(axis=0), x.var(axis=0, ddof=correction)
    return BatchNormState("bn", "torch", mean, var, variance=variance, **fields)


def rows(seed: int, sizes: list[int], offset: float) -> list[np.ndarray]:
    """Parts of a data set, each with a mean and a deviation of its own."""
    rng = np.random.default_rng(seed)
    return [
        offset + rng.normal(rng.normal(0, 2), rng.uniform(0.5, 2), (n, CHANNELS)) for n in sizes
    ]


parts = st.builds(
    rows,
    st.integers(0, 2**32 - 1),
    st.lists(st.integers(1, 9), min_size=2, max_size=5),
    st.sampled_from([0.0, 1e6]),
)
quickly = settings(max_examples=60, deadline=None)


def check(found: BatchNormState, wanted: BatchNormState) -> None:
    assert found.mean is not None
    assert wanted.mean is not None
    np.testing.assert_allclose(found.mean, wanted.mean, rtol=1e-15, atol=1e-14)
    np.testing.assert_allclose(found.var, wanted.var, rtol=ROUNDING, atol=1e-18)  # type: ignore[arg-type]


@quickly
@given(parts, st.sampled_from(["biased", "unbiased"]))
def test_parts_merge_to_the_moments_of_the_whole(xs: list[np.ndarray], kind: Variance) -> None:
    found = merge([state_of(x, kind) for x in xs], [len(x) for x in xs])
    check(found, state_of(np.concatenate(xs), kind))
    assert found.variance == kind


@quickly
@given(parts, st.sampled_from(["biased", "unbiased"]), st.randoms(use_true_random=False))
def test_order_and_grouping_do_not_matter(xs: list[np.ndarray], kind: Variance, rng: Any) -> None:
    pairs = [(state_of(x, kind, gamma=x[0], beta=-x[0], steps=len(x)), len(x)) for x in xs]
    states, counts = map(list, zip(*pairs, strict=True))
    at_once = merge(states, counts)
    step, count = states[0], counts[0]
    for state, more in pairs[1:]:
        step, count = merge([step, state], [count, more]), count + more
    rng.shuffle(pairs)
    shuffled = merge(*map(list, zip(*pairs, strict=True)))
    for other in (step, shuffled):
        check(other, at_once)
        np.testing.assert_allclose(other.gamma, at_once.gamma, rtol=1e-14, atol=1e-14)
        np.testing.assert_allclose(other.beta, at_once.beta, rtol=1e-14, atol=1e-14)
        assert other.steps == at_once.steps == sum(counts)


def test_hand_worked_numbers() -> None:
    a = BatchNormState("", "torch", np.array([0.0]), np.array([2.0]), variance="unbiased")
    b = replace(a, mean=np.array([4.0]), var=np.array([3.0]))
    # Rows 2 and 6: biased 1 and 2.5; mean 3; (2·(1 + 9) + 6·(2.5 + 1))/8 = 5.125, times 8/7.
    found = merge([a, b], [2, 6])
    assert found.mean.tolist() == [3.0]
    np.testing.assert_allclose(found.var, 5.125 * 8 / 7, rtol=1e-15)
    # As they are, with equal weights: 2.5 + 4.
    assert merge([a, b]).var.tolist() == [6.5]


def test_report_says_what_an_average_of_variances_would_miss() -> None:
    a = BatchNormState("bn", "flax", np.array([0.0, 5.0]), np.array([1.0, 1.0]), variance="biased")
    report: list[MergedLayer] = []
    merge([a, replace(a, mean=np.array([6.0, 5.0]))], report=report)
    (layer,) = report
    assert layer.channels == 2
    assert layer.apart == pytest.approx(3 / np.sqrt(10))  # ±3 around 3, of a variance of 1 + 9
    assert layer.missed == pytest.approx(0.9)
    assert "bn: means up to 0.95 deviations apart" in str(layer)
    constant = replace(a, var=np.zeros(2))
    merge([constant, constant], report=report)
    assert (report[1].apart, report[1].missed) == (0.0, 0.0)


def with_renorm(x: np.ndarray, early: np.ndarray) -> BatchNormState:
    """A layer that renormalizes, whose slower statistics are those of other rows."""
    deviation = np.sqrt(early.var(axis=0) + EPS)
    renorm = RenormState(np.sqrt(x.var(axis=0) + EPS), early.mean(axis=0), deviation)
    return state_of(x, renorm=renorm, eps=EPS)


@pytest.mark.parametrize("known", [True, False])
def test_deviations_of_renormalization_merge_through_their_variances(known: bool) -> None:
    xs, early = rows(1, [5, 8], 0.0), rows(2, [5, 8], 3.0)
    states = [with_renorm(*pair) for pair in zip(xs, early, strict=True)]
    if not known:
        states = [replace(state, eps=None) for state in states]
    found = merge(states, [5, 8])
    wanted = with_renorm(np.concatenate(xs), np.concatenate(early))
    check(found, wanted)
    assert found.renorm is not None
    assert wanted.renorm is not None
    for name, array in vars(wanted.renorm).items():
        np.testing.assert_allclose(getattr(found.renorm, name), array, rtol=1e-14)


def test_counts_may_differ_by_layer() -> None:
    xs, ys = rows(1, [5, 8], 0.0), rows(2, [3, 90], 0.0)
    models = [
        [replace(state_of(x), name="a"), replace(state_of(y), name="b")]
        for x, y in zip(xs, ys, strict=True)
    ]
    a, b = merge(models, {"a": [5, 8], "b": [3, 90]})
    check(a, state_of(np.concatenate(xs)))
    check(b, state_of(np.concatenate(ys)))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_model_with_count_0_weighs_nothing_whatever_it_holds(place: int) -> None:
    states = [state_of(x, gamma=x[0], steps=len(x)) for x in rows(1, [5, 8], 0.0)]
    broken = replace(states[0], var=np.full(CHANNELS, np.nan), gamma=np.full(CHANNELS, np.inf))
    counts = [5, 8]
    wanted = merge(states, counts)
    states.insert(place, broken)
    counts.insert(place, 0)
    found = merge(states, counts)
    for name in ("mean", "var", "gamma"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    assert found.steps == 13


def test_types_are_the_first_models_and_a_merge_of_equals_changes_nothing() -> None:
    wide = state_of(rows(1, [5], 1e6)[0])
    narrow = replace(wide, mean=np.float32(wide.mean), var=np.float32(wide.var))
    assert merge([narrow, wide]).var.dtype == np.float32
    assert merge([wide, narrow]).var.dtype == np.float64
    for counts in (None, [1, 2, 3]):
        found = merge([narrow, narrow, narrow], counts)
        for name in ("mean", "var"):
            np.testing.assert_array_equal(getattr(found, name), getattr(narrow, name))


def test_inputs_are_unchanged() -> None:
    states = [state_of(x, gamma=x[0]) for x in rows(1, [5, 8], 0.0)]
    before = [[a.copy() for a in (s.mean, s.var, s.gamma)] for s in states]
    merge(states, [5, 8])
    for state, arrays in zip(states, before, strict=True):
        for name, array in zip(("mean", "var", "gamma"), arrays, strict=True):
            np.testing.assert_array_equal(getattr(state, name), array)


GOOD = state_of(rows(1, [5], 0.0)[0], steps=1, eps=EPS, gamma=np.ones(CHANNELS))
RENORM = RenormState(*(np.ones(CHANNELS) for _ in range(3)))


def spoiled(array: np.ndarray | None, value: float) -> np.ndarray:
    assert array is not None
    return np.array([array[0], value, array[2]])


BAD_STATES = {
    "name": (replace(GOOD, name="other"), "model 1 has 1 batch norm, the first 1; it lacks bn;"),
    "size": (
        replace(GOOD, mean=np.ones(2), var=np.ones(2), gamma=np.ones(2)),
        r"layer 'bn' \(torch\): the shape must be the same in all models; model 1 has \(2,\)",
    ),
    "shape": (replace(GOOD, shape=(1, 3)), "the shape must be the same"),
    "eps": (replace(GOOD, eps=1e-3), "eps must be the same in all models; model 1 has 0.001"),
    "kind": (replace(GOOD, variance="unbiased"), r"kind of variance must be .* Pass counts="),
    "gamma": (replace(GOOD, gamma=None), "gamma must be the same .*has none, the first some"),
    "statistics": (replace(GOOD, mean=None, var=None), "mean must be the same"),
    "renorm": (replace(GOOD, renorm=RENORM), "renormalization's statistics must be the same"),
    "nan": (
        replace(GOOD, mean=spoiled(GOOD.mean, np.nan)),
        r"model 1, layer 'bn' \(torch\): mean must be finite in every channel; got nan in 1 of 3",
    ),
    "inf": (replace(GOOD, var=spoiled(GOOD.var, np.inf)), "var must be finite.*got inf"),
    "gamma nan": (replace(GOOD, gamma=spoiled(GOOD.gamma, np.nan)), "gamma must be finite"),
    "negative": (replace(GOOD, var=spoiled(GOOD.var, -1.0)), "var must be at least 0.*got -1"),
    "range": (replace(GOOD, mean=np.full(CHANNELS, 1e200)), "merged var overflows float64"),
}


@pytest.mark.parametrize("case", BAD_STATES)
def test_state_that_does_not_belong_is_refused_in_one_line(case: str) -> None:
    state, message = BAD_STATES[case]
    report: list[MergedLayer] = []
    with pytest.raises(ValueError, match=f"^merge: .*{message}") as raised:
        merge([GOOD, state], report=report)
    assert "\n" not in str(raised.value)
    assert report == []


def test_negative_deviations_are_refused() -> None:
    wrong = replace(RENORM, renorm_stddev=-RENORM.renorm_stddev)
    with pytest.raises(ValueError, match="renorm_stddev must be at least 0"):
        merge([replace(GOOD, renorm=RENORM), replace(GOOD, renorm=wrong)])


def test_variances_of_both_kinds_merge_where_counts_are_known() -> None:
    xs = rows(1, [5, 8], 0.0)
    found = merge([state_of(xs[0], "unbiased"), state_of(xs[1], "biased")], [5, 8])
    check(found, state_of(np.concatenate(xs), "unbiased"))


BAD_COUNTS: dict[str, tuple[Any, type[Exception], str]] = {
    "few": ([3], ValueError, "got 1 for 2 models"),
    "negative": ([3, -1], ValueError, r"not negative and not all zero; got \[3, -1\]"),
    "nan": ([3.0, float("nan")], ValueError, "one finite number for each model"),
    "inf": ([3.0, float("inf")], ValueError, "one finite number for each model"),
    "zeros": ([0, 0], ValueError, "not all zero"),
    "number": (7, TypeError, "got int"),
    "text": ("34", TypeError, "got str"),
    "words": (["3", "4"], TypeError, "one finite number"),
    "truths": ([True, False], TypeError, "one finite number"),
    "missing": ({}, ValueError, "name every batch norm and nothing else; it lacks bn"),
    "unknown": ({"bn": [1, 2], "bn2": [1, 2]}, ValueError, "it has, beside them, bn2"),
    "layer": ({"bn": [1, 2, 3]}, ValueError, r"counts\['bn'\] must be .*got 3 for 2"),
}


@pytest.mark.parametrize("case", BAD_COUNTS)
def test_counts_that_do_not_fit_are_refused(case: str) -> None:
    counts, error, message = BAD_COUNTS[case]
    with pytest.raises(error, match=f"^merge: .*{message}"):
        merge([GOOD, GOOD], counts)


def test_counts_are_numbers_of_any_type() -> None:
    states = [state_of(x) for x in rows(1, [5, 8], 0.0)]
    wanted = merge(states, [5, 8])
    for counts in ((5.0, 8.0), np.array([5, 8]), [np.int64(5), np.float32(8)]):
        np.testing.assert_array_equal(merge(states, counts).var, wanted.var)


@pytest.mark.parametrize(
    ("models", "options", "error", "message"),
    [
        ([GOOD], {}, ValueError, "must hold two or more; got 1"),
        ([], {}, ValueError, "must hold two or more; got 0"),
        (GOOD, {}, TypeError, "must be a list or tuple of them; got BatchNormState"),
        ("a.pt", {}, TypeError, "must be a list or tuple of them; got str"),
        ([GOOD, 3], {}, TypeError, "batch norms can be in models and layers.*got int"),
        ([GOOD, []], {}, ValueError, "every model must have a batch norm; model 1 has none"),
        ([GOOD, GOOD], {"report": ()}, TypeError, "report must be a list; got tuple"),
        ([GOOD, GOOD], {"everything": True}, ValueError, "everything=True needs models"),
    ],
)
def test_other_arguments_are_refused(
    models: Any, options: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=f"^merge: .*{message}"):
        merge(models, **options)
