"""Axes and masks (S1, S12)."""

from __future__ import annotations

import numpy as np
import pytest

from batchnorm.core.config import check_size
from batchnorm.core.layout import Layout, check_length_values, make_layout, mask_value_error
from batchnorm.numpy_namespace import XP


@pytest.mark.parametrize(
    ("shape", "axis", "mask", "meant"),
    [
        ((8, 3), 1, (8,), (8, 1)),
        ((8, 3), 0, (3,), (1, 3)),
        ((8, 3, 5), 1, (8, 5), (8, 1, 5)),
        ((8, 3, 5), 1, (8,), (8, 1, 1)),
        ((8, 5, 3), -1, (8, 5), (8, 5, 1)),
        ((8, 3, 5), 1, (8, 1, 5), (8, 1, 5)),
        ((8, 3, 5), 1, (8, 3, 5), (8, 3, 5)),
        ((8, 3, 5), 1, (1, 1, 5), (1, 1, 5)),
        ((4, 2, 5, 3), (1, 3), (4, 5), (4, 1, 5, 1)),
        ((4, 2, 5, 3), (1, 3), (4,), (4, 1, 1, 1)),
        ((4, 4, 4), 1, (4, 4), (4, 1, 4)),
        ((0, 3), 1, (0,), (0, 1)),
    ],
)
def test_mask_shape_is_read_in_the_order_of_the_specification(
    shape: tuple, axis: int, mask: tuple, meant: tuple
) -> None:
    assert make_layout(shape, axis).mask_shape(mask) == meant


@pytest.mark.parametrize(
    "mask", [(), (5,), (3,), (8, 3), (5, 8), (8, 5, 1), (8, 2, 5), (8, 5, 3, 1)]
)
def test_other_mask_shapes_are_refused_naming_both(mask: tuple) -> None:
    with pytest.raises(ValueError, match=r"mask must have shape \(8, 5\).*got \(.*\(8, 3, 5\)"):
        make_layout((8, 3, 5), 1).mask_shape(mask)


@pytest.mark.parametrize(
    ("shape", "axis", "mask", "meant"),
    [
        ((3,), 0, (), (1,)),
        ((3,), -1, (3,), (3,)),
        ((3,), 0, (1,), (1,)),
        ((2, 3), (0, 1), (), (1, 1)),
    ],
)
def test_a_row_of_channels_alone_has_a_mask_of_one_value(
    shape: tuple, axis: object, mask: tuple, meant: tuple
) -> None:
    layout = make_layout(shape, axis, least_rows=0)
    assert layout.mask_shape(mask) == meant
    with pytest.raises(ValueError, match="leaves no axis to reduce over"):
        make_layout(shape, axis)


def test_group_of_a_sample_is_its_index_modulo_the_number_of_groups() -> None:
    layout = make_layout((6, 1), 1, virtual_batch_size=2)
    split = layout.split(np.arange(6.0).reshape(6, 1), XP)
    assert layout.groups == 3
    assert split[:, :, 0].tolist() == [[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]]
    assert layout.merge(split, XP).ravel().tolist() == list(range(6))


def test_a_mask_for_all_samples_serves_every_group() -> None:
    layout = make_layout((4, 3, 5), 1, virtual_batch_size=2)
    assert layout.mask(np.ones((1, 1, 5), bool), XP).shape == (1, 1, 1, 5)


@pytest.mark.parametrize("axis", [1, -2, (1,), [1]])
def test_spellings_of_one_axis_agree(axis: object) -> None:
    assert make_layout((4, 3, 5), axis) == Layout((4, 3, 5), (1,))


def test_lengths_outside_are_shown() -> None:
    check_length_values(np.array([0, 5], np.uint8), 5)
    for value in (-1, 6):
        with pytest.raises(ValueError, match=f"between 0 and size=5; got {value}"):
            check_length_values(np.array([0, value, 5]), 5)


@pytest.mark.parametrize(
    ("value", "kind"), [(-1, ValueError), (1.0, TypeError), (True, TypeError), ("3", TypeError)]
)
def test_sizes_that_are_none(value: object, kind: type) -> None:
    with pytest.raises(kind, match=r"^size must be"):
        check_size(value)
    assert check_size(np.int8(3)) == 3


def test_mask_of_other_integers_is_told_the_value_and_both_remedies() -> None:
    error = mask_value_error(np.uint16(17))
    assert isinstance(error, ValueError)
    for part in ("got the value 17", "mask != 0", "sequence_mask(lengths, size)"):
        assert part in str(error)
