"""One table of cases, run on every front end and path, against the float64 core."""

from __future__ import annotations

from itertools import combinations

import pytest

import narrow_device
import paths
import torch_path
from batchnorm.kernels import explanation, extension
from batchnorm.torch.ways import graph_operators
from cases import CASES, Case
from cover import cover
from random_cases import names, random_case

narrow_device.register()
TORCH = (
    *("torch", "torch-arrays", "torch-traced", "torch-graph", "torch-graph-arrays"),
    *("torch-inductor", "torch-inductor-arrays", "torch-without-float64"),
)


@pytest.mark.parametrize(**paths.rows("naive-biased", "naive-unbiased", *TORCH))
def test_path_meets_the_specification(way: str, case: Case) -> None:
    paths.check(way, case)


def test_two_settings_that_meet_in_the_table_meet_in_the_cover() -> None:
    chosen = cover(CASES)
    assert len(chosen) < len(CASES) / 2
    for a, b in combinations(("dtype", "mask", "mode", "activation", "adjusted", "residual"), 2):
        pairs, found = ({(getattr(c, a), getattr(c, b)) for c in some} for some in (CASES, chosen))
        assert found == pairs, (a, b)
    hard = {(case.data, case.mode) for case in CASES}
    assert {(case.data, case.mode) for case in chosen} == hard


@pytest.mark.parametrize("name", names(40, 0))
def test_random_cases_meet_the_specification(name: str) -> None:
    case = random_case(name)
    assert case == random_case(name)
    assert case is not None
    for way in ("naive-unbiased", "torch", "torch-arrays"):
        paths.check(way, case)


@pytest.mark.skipif(extension.missing_reason() is not None, reason="no kernels are installed")
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_graph_holds_kernels_unless_the_column_has_a_reason(
    case: Case, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Otherwise `make test` would leave out cases that no other path runs."""
    monkeypatch.setattr(graph_operators, "SMALL", -1)  # the cases are
    way = torch_path.explain_graph(case).way
    refused = torch_path.refuse_operators(case) is not None
    assert way == (explanation.ARRAY_CODE if refused else explanation.KERNELS_IN_GRAPH)


def test_a_failure_says_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(path: object, case: Case) -> None:
        raise AssertionError(case.name)

    monkeypatch.setattr(paths.comparison, "check", fail)
    with pytest.raises(AssertionError) as caught:
        paths.check("torch", CASES[0])
    assert caught.value.__notes__[0].endswith(f"-m conformance torch {CASES[0].name}")
