"""The public oracle: numbers worked by hand, finite differences, and its errors."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import batchnorm

ROWS, CHANNELS = 12, 3


def test_two_rows_by_hand() -> None:
    # mean 3, variance 1: (x - 3) / 1, then times 2 plus 10.
    y, moments = batchnorm.batch_norm([[2.0], [4.0]], [2.0], [10.0], eps=0.0)
    assert y.tolist() == [[8.0], [12.0]]
    assert [m.tolist() for m in moments] == [[2.0], [3.0], [1.0]]


def test_eps_is_added_to_the_variance() -> None:
    y, _ = batchnorm.batch_norm([[2.0], [4.0]], eps=3.0)
    assert y.tolist() == [[-0.5], [0.5]]


def test_padded_row_is_normalized_by_the_real_rows() -> None:
    y, _ = batchnorm.batch_norm([[2.0], [4.0], [7.0]], mask=[1, 1, 0], eps=0.0)
    assert y.tolist() == [[-1.0], [1.0], [4.0]]


def test_no_real_row_uses_the_running_statistics() -> None:
    y, moments = batchnorm.batch_norm(
        [[5.0]], mask=[False], running_mean=[1.0], running_var=[4.0], eps=0.0
    )
    assert y.tolist() == [[2.0]]
    assert [m.tolist() for m in moments] == [[0.0], [0.0], [0.0]]


def test_no_real_row_and_no_running_statistics_take_mean_0_and_variance_1() -> None:
    y, _ = batchnorm.batch_norm([[5.0]], mask=[False], eps=0.0)
    assert y.tolist() == [[5.0]]


def test_one_real_row_gives_beta() -> None:
    y, _ = batchnorm.batch_norm([[5.0], [9.0]], [2.0], [0.5], mask=[True, False])
    assert y[0].tolist() == [0.5]
    assert np.isfinite(y).all()


def test_ghost_batches_take_every_other_sample() -> None:
    # G = 2: samples 0 and 2 form one group, 1 and 3 the other (S12).
    y, moments = batchnorm.batch_norm([[1.0], [10.0], [3.0], [30.0]], virtual_batch_size=2, eps=0.0)
    assert y.ravel().tolist() == [-1.0, -1.0, 1.0, 1.0]
    assert moments.mean.tolist() == [[2.0], [20.0]]
    assert moments.count.shape == (2, 1)


def test_renormalization_by_hand() -> None:
    # mean 3, stddev 1, against mean 1, stddev 2: r = 1/2, d = 1.
    y, _ = batchnorm.batch_norm([[2.0], [4.0]], renorm_mean=[1.0], renorm_stddev=[2.0], eps=0.0)
    assert y.tolist() == [[0.5], [1.5]]


def test_renormalization_is_clipped() -> None:
    y, _ = batchnorm.batch_norm(
        [[2.0], [4.0]],
        renorm_mean=[1.0],
        renorm_stddev=[2.0],
        renorm_clipping={"rmin": 0.75, "dmax": 0.25},
        eps=0.0,
    )
    assert y.tolist() == [[-0.5], [1.0]]


def test_order_is_adjustment_affine_residual_activation() -> None:
    y, _ = batchnorm.batch_norm(
        [[2.0], [4.0]],
        [10.0],
        [100.0],
        adjustment=lambda shape: (np.full(shape, 2.0), np.full((1, 1), 3.0)),
        residual=[[-111.0], [1.0]],
        activation="leaky_relu",
        eps=0.0,
    )
    # x̂ = ∓1 -> ·2+3 = 1, 5 -> ·10+100 = 110, 150 -> + residual = -1, 151 -> act.
    assert y.ravel().tolist() == pytest.approx([-0.01, 151.0], rel=1e-15)


def test_gradient_by_hand() -> None:
    # x̂ = -1, 1; dbeta = 1, dgamma = -1; dx = gamma (dy - 1/2 + x̂/2) = 0.
    dx, dgamma, dbeta = batchnorm.batch_norm_gradient([[1.0], [0.0]], [[1.0], [3.0]], eps=0.0)
    assert (dx.tolist(), dgamma.tolist(), dbeta.tolist()) == ([[0.0], [0.0]], [-1.0], [1.0])


@pytest.mark.parametrize(("activation", "slope"), [("relu", 0.0), ("leaky_relu", 0.01)])
def test_derivative_at_exactly_zero_is_the_negative_side(activation: str, slope: float) -> None:
    # One row: x̂ = 0, so what is activated is exactly beta = 0.
    *_, dbeta = batchnorm.batch_norm_gradient([[3.0]], [[7.0]], activation=activation)
    assert dbeta.tolist() == [3.0 * slope]


OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "ghost": {"virtual_batch_size": 4},
    "relu": {"activation": "relu"},
    "leaky_relu_residual": {
        "activation": "leaky_relu",
        "residual": np.random.default_rng(5).normal(size=(ROWS, CHANNELS)),
    },
    "adjusted": {"adjustment": lambda shape: (np.linspace(0.5, 2, CHANNELS), np.ones(1))},
    "evaluation": {
        "training": False,
        "running_mean": np.array([0.1, 0.2, 0.3]),
        "running_var": np.array([1.0, 2.0, 3.0]),
    },
}


@pytest.mark.parametrize("kind", "bBhHiIlLqQ")
def test_integer_masks_of_every_width(kind: str) -> None:
    mask = np.array([1, 0, 1]).astype(kind)
    y, moments = batchnorm.batch_norm([[1.0], [99.0], [3.0]], mask=mask, eps=0.0)
    assert y[mask != 0].ravel().tolist() == [-1.0, 1.0]
    assert moments.count.tolist() == [2.0]


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("option", OPTIONS)
def test_gradient_matches_finite_differences(option: str, masked: bool) -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(ROWS, CHANNELS))
    gamma, beta, dy = rng.normal(size=3), rng.normal(size=3), rng.normal(size=x.shape)
    mask = rng.random(ROWS) < 0.6 if masked else np.ones(ROWS, bool)
    options = {"mask": mask if masked else None} | OPTIONS[option]

    def loss(x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> float:
        y, _ = batchnorm.batch_norm(x, gamma, beta, **options)
        return float((y * dy)[mask].sum())

    arguments = [x, gamma, beta]
    found = batchnorm.batch_norm_gradient(dy, *arguments, **options)
    for index, gradient in enumerate(found):
        expected = _differences(loss, arguments, index)
        if index == 0:
            expected[~mask] = 0.0  # a padded output is a constant, so is its own input (S8)
        np.testing.assert_allclose(gradient, expected, atol=1e-7)


def _differences(loss: Any, arguments: list[np.ndarray], index: int, h: float = 1e-6) -> np.ndarray:
    found = np.zeros_like(arguments[index])
    for at in np.ndindex(found.shape):
        sides = []
        for step in (h, -h):
            moved = [a.copy() for a in arguments]
            moved[index][at] += step
            sides.append(loss(*moved))
        found[at] = (sides[0] - sides[1]) / (2 * h)
    return found


ERRORS: dict[str, tuple[type[Exception], str, dict[str, Any]]] = {
    "integer x": (TypeError, "x must be a real floating array; got dtype int64", {"x": [[1]]}),
    "complex x": (TypeError, "x must be a real floating array", {"x": [[1j]]}),
    "axis out of range": (ValueError, "axis 2 is out of range for an input of rank 2", {"axis": 2}),
    "axis twice": (ValueError, "names the same channel axis twice", {"axis": (1, -1)}),
    "axis of a wrong type": (TypeError, "axis must be an int or a tuple", {"axis": 1.5}),
    "no axis": (ValueError, "at least one channel axis", {"axis": ()}),
    "nothing to reduce": (ValueError, "leaves no axis to reduce over", {"axis": (0, 1)}),
    "negative eps": (ValueError, "eps must be finite and at least 0; got -1", {"eps": -1.0}),
    "eps NaN": (ValueError, "eps must be finite", {"eps": float("nan")}),
    "eps of a wrong type": (TypeError, "eps must be a real number; got '1'", {"eps": "1"}),
    "gamma of a wrong shape": (ValueError, r"gamma must have shape \(3,\)", {"gamma": [1.0]}),
    "float mask": (TypeError, "mask must be boolean or integer", {"mask": [1.0, 0.0]}),
    "lengths": (
        ValueError,
        r"must hold 1 .*got the value 2\. Pass mask != 0.*sequence_mask",
        {"mask": [2, 0]},
    ),
    "negative mask": (ValueError, r"got the value -1\.", {"mask": np.array([0, -1], np.int8)}),
    "huge mask": (ValueError, f"got the value {2**63}", {"mask": np.array([1, 2**63], np.uint64)}),
    "mask of a wrong shape": (
        ValueError,
        r"mask must have shape \(2,\).*got \(3,\)",
        {"mask": [1] * 3},
    ),
    "scalar mask": (ValueError, r"mask must have shape .* got \(\)", {"mask": True}),
    "ghost remainder": (
        ValueError,
        "virtual_batch_size=3 must divide the batch size in training; got a batch of 2",
        {"virtual_batch_size": 3},
    ),
    "ghost zero": (
        ValueError,
        "virtual_batch_size must be positive; got 0",
        {"virtual_batch_size": 0},
    ),
    "ghost on the channel axis": (
        ValueError,
        "must not be a channel axis",
        {"virtual_batch_size": 1, "axis": 0, "gamma": None},
    ),
    "ghost and adjustment": (
        ValueError,
        "adjustment cannot be combined",
        {"virtual_batch_size": 1, "adjustment": lambda s: (1, 0)},
    ),
    "adjustment not callable": (TypeError, "adjustment must be a function", {"adjustment": 3}),
    "unknown activation": (
        ValueError,
        "activation must be None, 'relu', 'leaky_relu'; got 'gelu'",
        {"activation": "gelu"},
    ),
    "half of a pair": (ValueError, "running_mean needs running_var", {"running_mean": [0.0] * 3}),
    "residual of a wrong shape": (
        ValueError,
        "residual must have x's shape",
        {"residual": [[1.0]]},
    ),
    "clipping without renorm": (
        ValueError,
        "renorm_clipping needs renorm=True",
        {"renorm_clipping": {}},
    ),
    "training not a bool": (TypeError, "training must be True or False; got 1", {"training": 1}),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error_names_argument_rule_and_value(name: str) -> None:
    kind, message, change = ERRORS[name]
    arguments: dict[str, Any] = {"x": np.ones((2, 3)), "gamma": np.ones(3)} | change
    if np.shape(arguments["x"]) != (2, 3):
        arguments["gamma"] = None
    with pytest.raises(kind, match=f"batch_norm: .*{message}"):
        batchnorm.batch_norm(**arguments)


@pytest.mark.parametrize(
    ("clipping", "kind", "message"),
    [
        ({"rmix": 1.0}, ValueError, "takes the keys .* got rmix"),
        ({"rmax": 1.0, "rmin": 2.0}, ValueError, "needs rmax >= rmin; got rmax=1 and rmin=2"),
        ({"dmax": -1.0}, ValueError, "must be finite and at least 0; got -1"),
        ([("rmax", 1.0)], TypeError, "must be a dict"),
    ],
)
def test_renorm_clipping_is_checked(clipping: Any, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        batchnorm.batch_norm(
            np.ones((2, 1)), renorm_mean=[0.0], renorm_stddev=[1.0], renorm_clipping=clipping
        )


def test_cotangent_of_a_wrong_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="dy must have x's shape"):
        batchnorm.batch_norm_gradient(np.ones(3), np.ones((2, 3)))
