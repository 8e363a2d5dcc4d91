"""One table of cases, run on every front end and path, against the float64 core."""

from __future__ import annotations

import pytest

import paths
from cases import CASES, Case
from cover import cover

TORCH = (
    *("torch", "torch-arrays", "torch-graph", "torch-graph-arrays"),
    *("torch-inductor", "torch-inductor-arrays"),
)


@pytest.mark.parametrize(**paths.rows("naive-biased", "naive-unbiased", *TORCH))
def test_path_meets_the_specification(way: str, case: Case) -> None:
    paths.check(way, case)


def test_two_settings_that_meet_in_the_table_meet_in_the_cover() -> None:
    chosen = cover(CASES)
    assert len(chosen) < len(CASES) / 2
    for case in CASES:
        for ghost in ("half_samples", "half"):
            if case.ghost == 2 and case.mask == ghost and case.mode == "train":
                assert any((c.ghost, c.mask, c.mode) == (2, ghost, "train") for c in chosen)
    for option in ("dtype", "mask", "ghost", "activation", "renorm", "data"):
        of = {(str(getattr(c, option)), c.mode) for c in CASES}
        assert {(str(getattr(c, option)), c.mode) for c in chosen} == of, option


def test_a_failure_says_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: object, case: Case) -> None:
        raise AssertionError(case.name)

    monkeypatch.setattr(paths.comparison, "check", fail)
    with pytest.raises(AssertionError) as caught:
        paths.check("torch", CASES[0])
    assert caught.value.__notes__[0].endswith(f"-m conformance torch {CASES[0].name}")
