"""Keras's own tests of its layer, run on ours."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from keras.src import layers
from keras.src.layers.normalization import batch_normalization_test as stock

from batchnorm.keras import BatchNormalization

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*shuffle=True.*:UserWarning"),
    pytest.mark.filterwarnings("ignore:The model does not have any trainable weights:UserWarning"),
]


class TestStock(stock.BatchNormalizationTest):
    """Every test but those that say otherwise than the specification."""

    test_renorm_invalid_clipping_keys = None  # the errors have their own words here

    @pytest.fixture(autouse=True)
    def _put_ours_in_place(self, monkeypatch: pytest.MonkeyPatch) -> None:
        replaced = SimpleNamespace(**{**vars(layers), "BatchNormalization": BatchNormalization})
        monkeypatch.setattr(stock, "layers", replaced)


for _index in range(8, 16):  # axis=1: a mask of whole channels, which then take moving statistics
    setattr(TestStock, f"test_correctness{_index}", None)
