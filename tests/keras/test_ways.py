"""The TensorFlow backend's ways to y: an order, reasons, and one place for `fused`."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np
import pytest

if keras.backend.backend() != "tensorflow":
    pytest.skip("needs the TensorFlow backend", allow_module_level=True)

from batchnorm import explain
from batchnorm.keras import BatchNormalization
from batchnorm.keras.backends.tensorflow import choice
from batchnorm.kernels.explanation import ARRAY_CODE, UNFUSED

X = np.random.default_rng(0).standard_normal((8, 3)).astype("float32")


def build(**options: Any) -> BatchNormalization:
    layer = BatchNormalization(**options)
    layer.build(X.shape)
    return layer


def make_way(name: str, reason: str | None) -> choice.Way:
    def run(step: Any) -> Any:
        return step.x + 1.0, step.running

    return choice.Way(name, lambda step: reason, run)


@pytest.mark.parametrize(("modes", "training"), [("TRAINING", True), ("EVALUATION", False)])
class TestMadeUpWays:
    def test_the_first_that_serves_runs(
        self, monkeypatch: pytest.MonkeyPatch, modes: str, training: bool
    ) -> None:
        ways = (make_way("slides", "no snow"), make_way("walks", None), *getattr(choice, modes))
        monkeypatch.setattr(choice, modes, ways)
        layer = build()
        found = explain(layer, X, training=training)
        assert (found.way, found.refused) == ("walks", (("slides", "no snow"),))
        np.testing.assert_array_equal(layer(X, training=training), X + 1.0)

    def test_every_reason_is_told(
        self, monkeypatch: pytest.MonkeyPatch, modes: str, training: bool
    ) -> None:
        array_code = getattr(choice, modes)[-1]
        ways = (make_way("slides", "no snow"), make_way("walks", "no road"), array_code)
        monkeypatch.setattr(choice, modes, ways)
        found = explain(build(), X, training=training)
        assert found.way == ARRAY_CODE
        assert found.refused == (("slides", "no snow"), ("walks", "no road"))

    def test_unfused_layers_take_array_code(
        self, monkeypatch: pytest.MonkeyPatch, modes: str, training: bool
    ) -> None:
        ways = (make_way("walks", None), getattr(choice, modes)[-1])
        monkeypatch.setattr(choice, modes, ways)
        found = explain(build(fused=False), X, training=training)
        assert (found.way, found.refused) == (ARRAY_CODE, (("walks", UNFUSED),))


@pytest.mark.parametrize(("modes", "training"), [("TRAINING", True), ("EVALUATION", False)])
def test_kernels_are_demanded_of_training_only(
    monkeypatch: pytest.MonkeyPatch, modes: str, training: bool
) -> None:
    ways = (make_way("walks", "there is no road"), getattr(choice, modes)[-1])
    monkeypatch.setattr(choice, modes, ways)
    layer = build(fused=True)
    if not training:
        assert explain(layer, X, training=False).way == ARRAY_CODE
        return
    with pytest.raises(ValueError, match="fused=True demands a kernel, but there is no road"):
        layer(X, training=True)
