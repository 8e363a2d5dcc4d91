"""Findings for states made by hand, whose right answers are known."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from batchnorm.core.moments import Moments
from batchnorm.tools.inspection.findings import EXPLANATIONS, Finding
from batchnorm.tools.inspection.health import judge
from batchnorm.tools.inspection.quantities import Observed, derive
from batchnorm.tools.inspection.thresholds import Thresholds
from batchnorm.tools.state import BatchNormState

EPS = 1e-5
ROWS = 10**6  # so many that sampling errors are negligible


def make_state(**fields: Any) -> BatchNormState:
    """Four healthy channels."""
    arrays = {
        "mean": np.array([0.1, -0.2, 0.3, 1.0], np.float32),
        "var": np.array([1.5, 0.4, 2.0, 0.9], np.float32),
        "gamma": np.array([1.0, 0.5, -1.0, 2.0], np.float32),
        "beta": np.zeros(4, np.float32),
    }
    given = {k: np.asarray(v, np.float32) for k, v in fields.items() if k in arrays}
    settings = {k: v for k, v in fields.items() if k not in arrays}
    state = BatchNormState("bn", "test", eps=EPS, decay=0.9, stored="float32", **arrays | given)
    return replace(state, **settings)


def see(
    mean: Any, var: Any, everything: tuple[Any, Any] | None = None, rows: int = ROWS
) -> Observed:
    """A layer's observed input; a third of the rows is padding if `everything` is given."""

    def moments(count: float, mean: Any, var: Any) -> Moments:
        mean, var = (np.asarray(a, np.float64) for a in (mean, var))
        return Moments(np.full(mean.shape, float(count)), mean, var)

    if everything is None:
        return Observed(moments(rows, mean, var), rows=rows)
    return Observed(moments(rows, mean, var), moments(1.5 * rows, *everything), rows, rows / 2)


def findings(
    state: BatchNormState, observed: Observed | None = None, **limits: float
) -> dict[str, Finding]:
    chosen = Thresholds(**limits)
    found = judge(state, derive(state, chosen.eps, observed), observed, chosen)
    assert len({finding.code for finding in found}) == len(found)
    assert {finding.code for finding in found} <= set(EXPLANATIONS)
    return {finding.code: finding for finding in found}


def test_healthy_layer_has_no_findings() -> None:
    state = make_state()
    assert findings(state) == {}
    assert findings(state, see(state.mean, state.var)) == {}


@pytest.mark.parametrize("field", ["mean", "var", "gamma", "beta"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_errors(field: str, value: float) -> None:
    array = np.array(getattr(make_state(), field))
    array[2] = value
    found = findings(make_state(**{field: array}))["non-finite"]
    assert (found.level, found.channels) == ("error", (2,))
    assert {"var": "variance"}.get(field, field) in found.message


def test_negative_variance_is_an_error_and_not_a_dead_channel() -> None:
    found = findings(make_state(var=[1.0, -1e-7, 1.0, 1.0]))
    assert set(found) == {"negative-variance"}
    assert (found["negative-variance"].level, found["negative-variance"].channels) == (
        "error",
        (1,),
    )


def test_statistics_as_they_start_are_an_error_whatever_the_batches() -> None:
    state = make_state(mean=np.zeros(4), var=np.ones(4), steps=7)
    found = findings(state, see(np.full(4, 5.0), np.full(4, 9.0)))
    assert set(found) == {"never-trained"}  # drift follows from it
    assert "after 7 updates" in found["never-trained"].message


def test_one_channel_as_it_starts_is_no_finding() -> None:
    assert findings(make_state(mean=[0, 0.1, 0.2, 0.3], var=[1, 2, 1, 1])) == {}


# sqrt(var / (var + eps)) is 0.01 at var = eps·1e-4 / (1 - 1e-4).
@pytest.mark.parametrize(("var", "dead"), [(0.0, True), (0.99e-9, True), (1.01e-9, False)])
def test_channel_is_dead_where_eps_hides_its_variance(var: float, dead: bool) -> None:
    found = findings(make_state(mean=np.zeros(4), var=[1.0, var, 1.0, 1.0]))
    assert ("dead-channels" in found) == dead
    if dead:
        assert (found["dead-channels"].level, found["dead-channels"].channels) == ("warning", (1,))


def test_rounding_of_a_constant_is_no_life() -> None:
    # A constant of 1e4 in float32 has a computed variance of up to (1e4·2^-23)², beyond eps·1e-4.
    var = [1.0, (1e4 * 2.0**-24) ** 2, 1.0, 1.0]
    assert "dead-channels" in findings(make_state(mean=[0, 1e4, 0, 0], var=var))
    assert "dead-channels" not in findings(make_state(mean=[0, 1.0, 0, 0], var=var))


def test_a_layer_of_dead_channels_is_an_error() -> None:
    assert findings(make_state(mean=np.ones(4), var=np.zeros(4)))["dead-channels"].level == "error"


@pytest.mark.parametrize(("eps", "dead"), [(1e-3, True), (1e-5, False)])
def test_eps_decides_what_is_dead_and_is_taken_where_unknown(eps: float, dead: bool) -> None:
    state = make_state(mean=np.zeros(4), var=[1, 5e-8, 1, 1])
    assert ("dead-channels" in findings(replace(state, eps=eps))) == dead
    assert ("dead-channels" in findings(replace(state, eps=None), eps=eps)) == dead


def test_gain_explodes_by_gamma_and_rstd_together() -> None:
    state = make_state(var=[1.0, 1e-4, 1.0, 1.0], gamma=[900.0, 11.0, -1100.0, 1.0])
    found = findings(state)["exploding-gain"]
    assert (found.level, found.channels) == ("warning", (1, 2))  # 11 / 0.0105 = 1049
    assert "1,100" in found.message


def test_missing_gamma_counts_as_one() -> None:
    state = replace(make_state(), gamma=None)
    gain = derive(state, EPS).gain
    np.testing.assert_allclose(gain, 1 / np.sqrt(state.var.astype(float) + EPS))


def test_mean_many_deviations_away_is_a_warning() -> None:
    # E[x²] - E[x]² at mean/std 1000 is off by about 1000²·2^-24 = 6 %.
    found = findings(make_state(mean=[0, 0, 1000.0, 0], var=np.ones(4)))["large-offset"]
    assert (found.level, found.channels) == ("warning", (2,))


@pytest.mark.parametrize(("stored", "stuck"), [("float16", "0.5%"), ("bfloat16", "3.9%")])
def test_half_statistics_stop_short_of_their_target(stored: str, stuck: str) -> None:
    # A bfloat16 running mean of weight 0.1 stops at 96 for a true 100
    found = findings(make_state(stored=stored))["half-statistics"]
    assert found.level == "warning"
    assert stuck in found.message


def test_layer_without_statistics_is_a_note() -> None:
    state = replace(make_state(), mean=None, var=None)
    assert {code: f.level for code, f in findings(state).items()} == {"no-statistics": "note"}


def test_drift_is_the_distance_between_both_normalizations() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal([1.0, -3.0, 0.0], [2.0, 0.5, 1e-4], (5000, 3))
    mean, var = np.array([0.5, -3.0, 0.1]), np.array([1.0, 2.0, 1e-8])
    state = BatchNormState("bn", "test", mean, var, eps=EPS)
    drift = derive(state, EPS, see(x.mean(0), x.var(0))).drift
    assert drift is not None
    training = (x - x.mean(0)) / np.sqrt(x.var(0) + EPS)
    evaluation = (x - mean) / np.sqrt(var + EPS)
    np.testing.assert_allclose(drift.shift, evaluation.mean(0), rtol=1e-9)
    apart = np.sqrt(((evaluation - training) ** 2).mean(0))
    np.testing.assert_allclose(drift.distance, apart, rtol=1e-9)
    expected = evaluation.std(0) / training.std(0)
    np.testing.assert_allclose(drift.ratio, expected, rtol=1e-9)


@pytest.mark.parametrize(
    ("shift", "level"), [(0.29, None), (0.31, "warning"), (0.99, "warning"), (1.05, "error")]
)
def test_level_of_drift_follows_the_distance(shift: float, level: str | None) -> None:
    state = make_state()
    assert state.mean is not None
    assert state.var is not None
    mean = state.mean.astype(float)
    mean[1] += shift * np.sqrt(state.var[1] + EPS)
    found = findings(state, see(mean, state.var))
    assert (found["drift"].level if "drift" in found else None) == level
    if level:
        assert found["drift"].channels == (1,)


@pytest.mark.parametrize(("rows", "found"), [(10, False), (10**6, True)])
def test_few_rows_excuse_a_drift(rows: int, found: bool) -> None:
    state = make_state()
    observed = see(state.mean + 0.8, state.var, rows=rows)  # type: ignore[operator]
    assert ("drift" in findings(state, observed)) == found


def test_channel_without_rows_has_no_drift() -> None:
    state = make_state()
    mean = np.array(state.mean)
    mean[1] = 99.0
    moments = Moments(np.array([ROWS, 0, ROWS, ROWS]), mean, state.var)
    assert findings(state, Observed(moments, rows=ROWS)) == {}


def test_statistics_that_hold_padding_are_told_from_drift() -> None:
    state = make_state()
    assert state.mean is not None
    assert state.var is not None
    far = state.mean + 3.0
    everything = (state.mean + 0.01, state.var)
    found = findings(state, see(far, state.var, everything))
    assert found["padding-counted"].level == "error"
    assert found["padding-counted"].channels == (0, 1, 2, 3)
    assert "drift" not in found
    found = findings(state, see(far, state.var, (far + 1.0, state.var)))
    assert found["drift"].level == "error"
    assert "padding-counted" not in found


def test_padding_is_noted_with_its_share() -> None:
    state = make_state()
    found = findings(state, see(state.mean, state.var, (np.zeros(4), state.var)))
    assert set(found) == {"padding"}
    assert found["padding"].level == "note"
    assert found["padding"].message.startswith("33%")


def test_worst_findings_come_first() -> None:
    state = make_state(var=[0.0, 1.0, -1.0, 1.0], stored="bfloat16")
    found = judge(state, derive(state, EPS))
    assert [finding.level for finding in found] == ["error", "warning", "warning"]


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf"), "1"])
def test_thresholds_are_checked(value: Any) -> None:
    with pytest.raises(ValueError, match="Thresholds: gain must be a finite number"):
        Thresholds(gain=value)
