"""Every option of the Keras 2 family, and their combinations, against `by_hand`."""

from __future__ import annotations

from typing import Any

import by_hand
import keras
import numpy as np
import pytest
from keras import ops

from batchnorm.keras import BatchNormalization

SHAPE = (12, 2, 5, 3)
CLIPPING = {"rmax": 1.3, "rmin": 0.8, "dmax": 0.4}
STATE = ("moving_mean", "moving_variance", "moving_stddev", "renorm_mean", "renorm_stddev")
SCALE = np.linspace(0.5, 1.5, 12).reshape(12, 1, 1, 1).astype("float32")
BIAS = np.linspace(-1.0, 1.0, 3).astype("float32")

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "first channel axis": {"axis": 1},
    "several axes": {"axis": [1, 3]},
    "several axes, unsorted": {"axis": (-1, 1)},
    "ghost": {"virtual_batch_size": 4},
    "ghost, whole batch": {"virtual_batch_size": 12},
    "renorm": {"renorm": True, "renorm_momentum": 0.7},
    "renorm, clipped": {"renorm": True, "renorm_clipping": CLIPPING},
    "renorm, one limit": {"renorm": True, "renorm_clipping": {"dmax": 0.1}},
    "renorm, ghost": {"renorm": True, "renorm_clipping": CLIPPING, "virtual_batch_size": 3},
    "several axes, ghost": {"axis": [1, 3], "virtual_batch_size": 6},
    "several axes, renorm": {"axis": [1, 3], "renorm": True},
    "several axes, renorm, ghost": {"axis": [1, 3], "renorm": True, "virtual_batch_size": 4},
    "adjustment": {"adjustment": lambda shape: (SCALE, BIAS)},
    "renorm, adjustment": {"renorm": True, "adjustment": lambda shape: (SCALE, None)},
}


def array(a: Any) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(a), np.float64)


def batch(step: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(step)
    x = rng.normal(1.0 + step, 2.0, SHAPE).astype("float32")
    return x, rng.random(SHAPE) < 0.6


@pytest.mark.sample(13)
@pytest.mark.parametrize("fused", [None, False])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", OPTIONS)
def test_steps_and_statistics(name: str, masked: bool, fused: bool | None) -> None:
    options = OPTIONS[name]
    layer = BatchNormalization(momentum=0.9, fused=fused, **options)
    axis = options.get("axis", -1)
    axes = tuple(sorted(a % 4 for a in (axis if isinstance(axis, (list, tuple)) else (axis,))))
    channels = tuple(SHAPE[a] for a in axes)
    state = {n: np.full(channels, float("mean" not in n)) for n in STATE}
    rows = tuple(n for a, n in enumerate(SHAPE) if a not in axes)
    s = SCALE if "adjustment" in options else 1.0
    t = BIAS if name == "adjustment" else 0.0
    for step in range(4):
        x, draw = batch(step)
        mask = draw.reshape(-1)[: np.prod(rows)].reshape(rows)
        if step == 3:
            mask = np.zeros_like(mask)  # without real rows no statistic changes
        if not masked:
            mask = np.ones_like(mask)
        sizes = iter(rows)
        aligned = mask.reshape([1 if a in axes else next(sizes) for a in range(4)])
        expected = by_hand.train(
            x,
            np.broadcast_to(aligned, SHAPE),
            state,
            axes,
            momentum=0.9,
            ghost=options.get("virtual_batch_size"),
            renorm=(options.get("renorm_clipping") or {}) if options.get("renorm") else None,
            renorm_momentum=options.get("renorm_momentum", 0.99),
            s=s,
            t=t,
        )
        y = array(layer(x, training=True, mask=mask if masked else None))
        np.testing.assert_allclose(y, expected, rtol=2e-5, atol=2e-5)
    for n in STATE if options.get("renorm") else STATE[:2]:
        found = array(getattr(layer, n)).reshape(channels)
        np.testing.assert_allclose(found, state[n], rtol=1e-5, atol=1e-6, err_msg=n)
    x, _ = batch(9)
    y = array(layer(x, training=False))
    shape = [SHAPE[a] if a in axes else 1 for a in range(4)]
    mean, var = (state[n].reshape(shape) for n in STATE[:2])
    np.testing.assert_allclose(y, (x - mean) / np.sqrt(var + 1e-3), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize(
    ("options", "shape"),
    [
        ({}, (3,)),
        ({"axis": 1}, (2,)),
        ({"axis": [3]}, (3,)),
        ({"axis": (1, 3)}, (1, 2, 1, 3)),
        ({"axis": (3, 1)}, (1, 2, 1, 3)),
        ({"virtual_batch_size": 4}, (1, 1, 1, 3)),
        ({"virtual_batch_size": 4, "axis": 1}, (1, 2, 1, 1)),
    ],
)
def test_shape_of_weights(options: dict[str, Any], shape: tuple[int, ...]) -> None:
    layer = BatchNormalization(renorm=True, **options)
    layer.build(SHAPE)
    assert [w.name for w in layer.weights] == ["gamma", "beta", *STATE]
    assert {tuple(w.shape) for w in layer.weights} == {shape}


def test_switched_off_parameters_are_none() -> None:
    layer = BatchNormalization(center=False, scale=False)
    layer.build(SHAPE)
    assert layer.gamma is None
    assert layer.beta is None
    assert [w.name for w in layer.weights] == ["moving_mean", "moving_variance"]


def test_inference_takes_any_batch_with_ghost_batches() -> None:
    layer = BatchNormalization(virtual_batch_size=5)
    assert array(layer(np.ones((7, 2), "float32"), training=False)).shape == (7, 2)


def test_stddev_variables_start_at_the_square_root() -> None:
    layer = BatchNormalization(
        renorm=True,
        moving_variance_initializer=keras.initializers.Constant(9.0),
        moving_mean_initializer=keras.initializers.Constant(2.0),
    )
    layer.build((None, 2))
    found = {w.name: array(w).tolist() for w in layer.weights}
    assert found["moving_stddev"] == found["renorm_stddev"] == [3.0, 3.0]
    assert found["renorm_mean"] == found["moving_mean"] == [2.0, 2.0]


def test_adjustment_is_called_in_training_only() -> None:
    shapes = []

    def adjust(shape: Any) -> tuple[Any, None]:
        shapes.append(tuple(shape))
        return SCALE, None

    layer, (x, _) = BatchNormalization(adjustment=adjust), batch(0)
    layer(x, training=False)
    assert shapes == []
    layer(x, training=True)
    assert shapes == [SHAPE]


def test_adjustment_of_another_shape_is_refused() -> None:
    layer = BatchNormalization(adjustment=lambda shape: (np.ones((7, 1), "float32"), None))
    with pytest.raises(ValueError, match=r"scale must broadcast against x of shape \(12, 3\)"):
        layer(np.ones((12, 3), "float32"), training=True)


REFUSED: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "axis must be an int or a tuple of ints; got 1.5", {"axis": 1.5}),
    (TypeError, "axis must be an int", {"axis": [1, "2"]}),
    (TypeError, "axis must be an int", {"axis": None}),
    (ValueError, "at least one channel axis", {"axis": []}),
    (ValueError, "momentum must be finite and between 0 and 1; got 1.5", {"momentum": 1.5}),
    (ValueError, "epsilon must be finite and at least 0; got -1", {"epsilon": -1}),
    (ValueError, "rmax >= rmin; got rmax=0.5 and rmin=1",
     {"renorm": True, "renorm_clipping": {"rmax": 0.5, "rmin": 1.0}}),
    (ValueError, r"renorm_clipping\['dmax'\] must be finite and at least 0; got -1",
     {"renorm": True, "renorm_clipping": {"dmax": -1}}),
    (ValueError, "takes the keys .*; got other",
     {"renorm": True, "renorm_clipping": {"other": 1.0}}),
    (ValueError, "renorm_clipping needs renorm=True", {"renorm_clipping": {"dmax": 1.0}}),
    (ValueError, "virtual_batch_size must be positive; got 0", {"virtual_batch_size": 0}),
    (ValueError, "virtual_batch_size must be positive; got -3", {"virtual_batch_size": -3}),
    (TypeError, "virtual_batch_size must be a positive int", {"virtual_batch_size": 2.5}),
    (ValueError, "axis 0, which must not be a channel axis",
     {"virtual_batch_size": 2, "axis": [0, 1]}),
    (ValueError, "adjustment cannot be combined with virtual_batch_size=2",
     {"virtual_batch_size": 2, "adjustment": lambda shape: (1.0, 0.0)}),
    (TypeError, "adjustment must be a function", {"adjustment": 3}),
    (TypeError, "fused must be None", {"fused": "yes"}),
    (ValueError, "fused=True cannot be combined with synchronized=True",
     {"fused": True, "synchronized": True}),
    (ValueError, "fused=True demands a kernel, but none takes an adjustment",
     {"fused": True, "adjustment": lambda shape: (1.0, 0.0)}),
]  # fmt: skip


@pytest.mark.parametrize(("error", "message", "options"), REFUSED, ids=[m for _, m, _ in REFUSED])
def test_options_are_refused_at_construction(
    error: type[Exception], message: str, options: dict[str, Any]
) -> None:
    with pytest.raises(error, match=message):
        BatchNormalization(**options)


@pytest.mark.parametrize("shape", [(12, 3), (12, 4, 3), (12, 2, 5, 3)])
def test_kernel_demanded_serves_any_rank(shape: tuple[int, ...]) -> None:
    x = np.random.default_rng(0).normal(1.0, 2.0, shape).astype("float32")
    y = array(BatchNormalization(fused=True)(x, training=True))
    axes = tuple(range(len(shape) - 1))
    expected = (x - x.mean(axes)) / np.sqrt(x.var(axes) + 1e-3)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.skipif(keras.backend.backend() == "torch", reason="torch's kernels take any axes")
def test_kernel_demanded_for_axes_apart_is_refused_when_built() -> None:
    layer = BatchNormalization(axis=[1, 3], fused=True)
    with pytest.raises(ValueError, match=r"channel axes \(1, 3\) are apart in memory"):
        layer.build((None, 2, 4, 3))
    assert layer.weights == []


@pytest.mark.parametrize(
    ("message", "options", "shape"),
    [
        ("axis names the same channel axis twice", {"axis": [1, -2]}, (4, 5, 3)),
        ("axis 3 is out of range for an input of rank 3", {"axis": 3}, (4, 5, 3)),
        ("axis -4 is out of range", {"axis": [-4]}, (4, 5, 3)),
        ("known rank", {}, None),
        ("channel sizes must be known", {}, (4, None)),
        ("channel sizes must be known", {"axis": [1, 2]}, (None, None, 3)),
        ("leaves no axis to reduce over", {"axis": [0, 1]}, (4, 3)),
        (
            "which must not be a channel axis",
            {"axis": -2, "virtual_batch_size": 2},
            (4, 3),
        ),
    ],
)
def test_shapes_are_refused_and_leave_no_weights(
    message: str, options: dict[str, Any], shape: Any
) -> None:
    layer = BatchNormalization(**options)
    with pytest.raises(ValueError, match=message):
        layer.build(shape)
    assert not layer.built
    assert layer.weights == []


def test_batch_that_ghosts_do_not_divide_says_both_numbers() -> None:
    layer = BatchNormalization(virtual_batch_size=5)
    with pytest.raises(ValueError, match=r"virtual_batch_size=5 must divide .*got a batch of 12"):
        layer(np.ones((12, 3), "float32"), training=True)


@pytest.mark.parametrize("shape", [(5,), (12, 3, 1), (3, 12), (1, 12)])
def test_masks_that_do_not_fit_are_refused(shape: tuple[int, ...]) -> None:
    layer = BatchNormalization()
    with pytest.raises(ValueError, match="mask must have shape"):
        layer(np.ones((12, 3), "float32"), mask=np.ones(shape, bool), training=True)


def test_participants_of_another_backend_are_refused() -> None:
    for name, backend in (("axis_name", "jax"), ("process_group", "torch")):
        if keras.backend.backend() != backend:
            with pytest.raises(ValueError, match=f"{name} is for the {backend} backend"):
                BatchNormalization(synchronized=True, **{name: "group"})
