"""Benchmarks time only right variants, and run: nothing else calls their variants."""

from __future__ import annotations

import gc
import importlib.util
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional

from batchnorm.benchmark import jax_steps, single_passes, torch_steps
from batchnorm.benchmark.case import Case, count_bytes
from batchnorm.benchmark.huge_pages import HUGE, HugePages, time_anywhere
from batchnorm.benchmark.problem import SMALL, Expected, Problem, make_problem, solve
from batchnorm.benchmark.runner import check_all, measure
from batchnorm.benchmark.variant import Variant, check, find_error, make_copy

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def load(name: str) -> Any:
    """A file of benchmarks/ that needs none of the others, under a name of its own."""
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", BENCHMARKS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look their annotations up
    spec.loader.exec_module(module)
    return module


def shrink(case: Case) -> Case:
    axis = case.axis % len(case.shape)
    sizes = [min(n, 8 if a == axis else 16 if a == 0 else 5) for a, n in enumerate(case.shape)]
    return replace(case, shape=tuple(sizes), compiled=False, rival_compiled=False)


CPU = [shrink(case) for case in load("cases").CASES]
JAX = [shrink(case) for case in load("cases").JAX_CASES]
KERAS = [shrink(case) for case in load("cases").KERAS_CASES]


QUICK = ("small", "small-mask", "inference-rows")  # in JAX; the others differ in shape only


def quick_if(case: Case, names: tuple[str, ...]) -> Any:
    """The case as a parameter; exhaustive if its name is not among these."""
    return case if case.name in names else pytest.param(case, marks=pytest.mark.exhaustive)


def by_name(case: Case) -> str:
    return case.name


@pytest.mark.exhaustive
def test_variants_of_the_cpu_benchmark_are_checked_and_timed(tmp_path: Path) -> None:
    """All targets have their figure in a quick run, and pages are made of it."""
    command = [sys.executable, BENCHMARKS / "run.py", "--quick", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550)
    assert done.returncode == 0, done.stderr[-2000:]
    record = json.loads((tmp_path / "cpu.json").read_text())
    for case in record["cases"].values():
        assert all(v["trips"] > 0 and v["GB/s"] > 0 for v in case["variants"].values())
        assert case["variants"]["copy"]["trips"] == 1.0
    # Differences of two times, which beside other tests may be anything.
    assert all(math.isfinite(p["over a copy"]["reduce"]) for p in record["passes"].values())
    missing = [e["what"] for e in record["targets"] if e["met"] is None]
    assert not [what for what in missing if what in _find_headlines()]
    assert {"cpu.md", "cpu.png"} <= {path.name for path in tmp_path.iterdir()}


def _find_headlines() -> list[str]:
    code = "import json, targets; print(json.dumps([t.what for t in targets.HEADLINES]))"
    found = run_in_benchmarks("-c", code)
    assert found.returncode == 0, found.stderr
    whats: list[str] = json.loads(found.stdout)
    return whats


def run_in_benchmarks(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=BENCHMARKS, capture_output=True, text=True, timeout=200)


def test_committed_pages_are_of_the_committed_results() -> None:
    done = run_in_benchmarks("publish.py", "--check")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.sample(2)
@pytest.mark.parametrize(
    "name",
    ["overlap", "synchronization", "count_passes", "quick", "run_jax", "run_keras", "run_gpu"],
)
def test_programs_find_what_they_import(name: str) -> None:
    done = run_in_benchmarks("-c", f"import {name}")
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("case", CPU, ids=by_name)
def test_torch_variants_are_right(case: Case) -> None:
    problem = make_problem(case)
    variants = torch_steps.make_variants(problem)
    assert {"ours", torch_steps.name_rival(case)[0]} <= variants.keys()
    assert ("ours, reused buffers" in variants) == case.reused
    # What is compiled takes seconds; the exhaustive test has it.
    check_all(problem, {name: v for name, v in variants.items() if "compiled" not in name})


@pytest.mark.parametrize("case", [quick_if(c, QUICK) for c in JAX], ids=by_name)
def test_jax_variants_are_right(case: Case) -> None:
    problem = make_problem(case)
    variants = jax_steps.make_variants(problem)
    assert {"ours", "ours, plain", "ours, function", "flax nnx", "flax linen"} <= variants.keys()
    assert variants["copy"].copies == 1
    assert ("ours, no mask" in variants) == (case.padded is not None)
    check_all(problem, variants)


@pytest.mark.exhaustive
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_keras_variants_are_right(backend: str) -> None:
    code = (
        "from batchnorm.benchmark.case import Case\n"
        "from batchnorm.benchmark.keras_steps import make_variants\n"
        "from batchnorm.benchmark.problem import make_problem\n"
        "from batchnorm.benchmark.runner import check_all\n"
        f"for case in {KERAS}:\n"
        "    problem = make_problem(case)\n"
        "    print(*check_all(problem, make_variants(problem)))\n"
    )
    environment = os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines() == ["ours keras ours, kernels copy"] * len(KERAS)


@pytest.mark.parametrize("case", [c for c in CPU if c.padded is None], ids=by_name)
def test_solution_is_what_torch_finds_in_float64(case: Case) -> None:
    problem = make_problem(case)
    found, p = solve(problem), {f.name: getattr(problem, f.name) for f in fields(Problem)}
    arrays = {n: torch.tensor(a).double() for n, a in p.items() if isinstance(a, np.ndarray)}
    leaves = [arrays[n].requires_grad_() for n in ("x", "gamma", "beta")]
    training = case.mode == "training"
    y = functional.batch_norm(
        leaves[0], arrays["mean"], arrays["var"], *leaves[1:], training, 0.0, case.eps
    )
    if case.residual:
        leaves.append(arrays["residual"].requires_grad_())
        y = y + leaves[-1]
    y = y.relu() if case.activation else y
    torch.testing.assert_close(torch.from_numpy(found.y), y.detach(), rtol=0, atol=1e-12)
    if case.inference:
        assert found.dx is None
        return
    names = ("dx", "dgamma", "dbeta", "dresidual")
    gradients = torch.autograd.grad(y, leaves, arrays["dy"])
    for name, gradient in zip(names, gradients, strict=False):
        right = torch.from_numpy(getattr(found, name))
        torch.testing.assert_close(right, gradient, rtol=1e-9, atol=1e-9)


def test_solution_in_parts_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = make_problem(Case("large", "", (2, 7, SMALL // 8), padded=0.3))
    in_parts = solve(problem)
    monkeypatch.setattr("batchnorm.benchmark.problem.SMALL", problem.x.size + 1)
    whole = solve(problem)
    for name in ("y", "dx", "dgamma", "dbeta"):
        np.testing.assert_allclose(getattr(in_parts, name), getattr(whole, name), rtol=1e-12)


@pytest.mark.parametrize("axis", [1, -1])
def test_some_channels_are_checked_like_all(axis: int) -> None:
    case = Case("part", "", (6, 8, 5) if axis == 1 else (6, 5, 8), axis=axis, padded=0.3)
    problem = make_problem(case)
    whole, part = solve(problem), solve(problem, every=4)
    results = {n: getattr(whole, n) for n in ("y", "dx", "dgamma", "dbeta")}
    for name, right in results.items():
        np.testing.assert_array_equal(part.take(name, right), getattr(part, name))
        assert getattr(part, name).size == right.size // 4
    assert (
        check("ours", Variant(lambda: results.values(), tuple(results), True), problem, part) == 0
    )
    spoilt = np.array(whole.y)
    spoilt[(slice(None), 4) if axis == 1 else (..., 4)] += 1e-3
    with pytest.raises(RuntimeError, match="is off by"):
        check("ours", Variant(lambda: (spoilt, whole.dx), ours=True), problem, part)


def test_passes_alone_are_right_and_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    for case in single_passes.CASES:
        problem = make_problem(shrink(case))
        passes, whole = single_passes.make_passes(problem)
        assert set(passes) == {*single_passes.PASSES, "copy"}
        check("passes", whole, problem, solve(problem))
        for step in passes.values():
            step()
    costs = {"moments": 2, "normalize": 3, "reduce": 4, "apply": 5, "copy": 1}

    def take_turns(steps: dict[str, Any], *_: Any) -> dict[str, list[float]]:
        named = {name: name.split() for name in steps}  # 7 µs a call, and the elements' time
        return {n: [7e-6 + costs[a] * 1e-9 * int(b)] * 3 for n, (a, b) in named.items()}

    monkeypatch.setattr(single_passes, "take_turns", take_turns)
    found = single_passes.measure_passes(0.0, 3)["rows"]
    assert found["ns"] == pytest.approx(costs)
    assert found["over a copy"] == pytest.approx({n: costs[n] for n in single_passes.PASSES})


def test_torch_with_huge_pages_takes_turns_in_a_process_of_its_own() -> None:
    case = Case("turns", "", (64, 8))
    problem = make_problem(case)
    with HugePages() as pages:
        for every in (1, 4):
            variants = torch_steps.make_variants(problem, ("ours",)) | pages.offer(case, every)
            found = measure(problem, variants, 0.01, 3, clock=time_anywhere, every=every)
            assert 0 < found[f"torch{HUGE}"]["error"] < 1e-5
            assert found[f"torch{HUGE}"]["ms"] > 0
        variants = pages.offer(replace(case, shape=(1, 8)))  # torch refuses one row
        with pytest.raises(ValueError, match="Expected more than 1 value"):
            check_all(problem, variants)
    assert "THP_MEM_ALLOC_ENABLE" not in os.environ


def test_bounds_depend_on_the_speed_of_copies() -> None:
    judging = load("judging")
    target = judging.Target("", 1.2, judging.over_copies(["rows"], 4), True, 1.6, "rows")

    def judge(trips: float, speed: float) -> Any:
        variants = {"ours": {"trips": trips}, "copy": {"GB/s": speed, "trips": 1.0}}
        return target.judge({"cases": {"rows": {"variants": variants}}})

    slow, fast = 30.0, 50.0
    assert pytest.approx(4 * 2 * 67.1 / 12, rel=0.01) == judging.FAST_COPY
    assert [judge(t, slow)["met"] for t in (4.7, 4.9, 6.3)] == [True, False, False]
    assert [judge(t, fast)["met"] for t in (4.9, 6.3, 6.5)] == [True, True, False]
    assert judge(4.9, fast)["floor"] == 1.6
    assert target.judge({"cases": {}})["met"] is None


def test_problems_of_bfloat16_have_its_values() -> None:
    problem = make_problem(Case("half", "", (64, 8), dtype="bfloat16"))
    for array in (problem.x, problem.dy):
        rounded = torch.from_numpy(array).bfloat16().float().numpy()
        np.testing.assert_array_equal(array, rounded)
    plain = make_problem(Case("half", "", (64, 8)))
    nearest = torch.from_numpy(plain.x).bfloat16().float().numpy()
    np.testing.assert_array_equal(problem.x, nearest)


def test_step_on_addresses_keeps_its_tensors() -> None:
    case = Case("kept", "", (64, 8), reused=True)
    problem = make_problem(case)
    (variant,) = torch_steps.make_variants(problem, ("ours, reused buffers",)).values()
    before = variant.step()[0].clone()
    gc.collect()
    others = [torch.full((64, 8), float("nan")) for _ in range(100)]
    y, dx, x, dy = variant.step()
    np.testing.assert_array_equal(x, problem.x)
    np.testing.assert_array_equal(dy, problem.dy)
    torch.testing.assert_close(y, before, rtol=0, atol=0)
    assert others[0].data_ptr() not in (y.data_ptr(), dx.data_ptr())


@pytest.fixture(name="solved")
def _solved() -> tuple[Problem, Expected]:
    problem = make_problem(Case("wrong", "", (16, 3), padded=0.25))
    return problem, solve(problem)


def spoil(solved: tuple[Problem, Expected], value: float) -> Callable[[], Any]:
    """A step whose y is wrong by `value` at one padded row."""
    problem, expected = solved
    y = np.array(expected.y)
    y[np.flatnonzero(~problem.mask)[0]] += value
    return lambda: (y, expected.dx)


def test_wrong_result_has_no_speed(solved: tuple[Problem, Expected]) -> None:
    problem, expected = solved
    right = {"y": expected.y, "dx": expected.dx, "dgamma": expected.dgamma}
    assert find_error(right, expected, None) == 0.0
    y, dx = spoil(solved, 1.0)()
    assert find_error({"y": y, "dx": dx}, expected, None) > 0.1
    assert find_error({"y": y, "dx": dx}, expected, problem.real) == 0.0
    y[0] = np.nan
    assert np.isnan(find_error({"y": y, "dx": dx}, expected, None))


def test_padded_rows_count_for_this_library_only(solved: tuple[Problem, Expected]) -> None:
    step = spoil(solved, 1.0)
    assert check("theirs", Variant(step), *solved) == 0.0
    with pytest.raises(RuntimeError, match="wrong: ours is off by"):
        check("ours", Variant(step, ours=True), *solved)


def test_missing_result_and_other_shape_are_errors(solved: tuple[Problem, Expected]) -> None:
    expected = solved[1]
    with pytest.raises(RuntimeError, match="must have y, dx; got y"):
        check("theirs", Variant(lambda: (expected.y,), ("y",)), *solved)
    with pytest.raises(RuntimeError, match=r"must have shape \(16, 3\); got \(3, 16\)"):
        check("theirs", Variant(lambda: (expected.y.T, expected.dx)), *solved)


def test_rival_that_is_wrong_is_an_error_of_its_own(solved: tuple[Problem, Expected]) -> None:
    expected = solved[1]
    with pytest.raises(ValueError, match=r"theirs is off by .* at this shape"):
        check("theirs", Variant(lambda: (expected.y, expected.dx + 1.0)), *solved)


@pytest.mark.parametrize("rows", [4, 1 << 17])  # one thread, and all cores
def test_copy_is_checked(rows: int) -> None:
    problem = make_problem(Case("copy", "", (rows, 2)))
    variant = make_copy(problem)
    assert check("copy", variant, problem, solve(problem)) == 0.0
    (y,) = variant.step()
    assert y is not problem.x
    y_of_nothing = np.zeros_like(problem.x)
    with pytest.raises(RuntimeError, match="is no copy"):
        check("copy", replace(variant, step=lambda: (y_of_nothing,)), problem, solve(problem))


def test_bytes_of_a_mask_and_of_a_copy() -> None:
    case = Case("rows", "", (64, 16), padded=0.5)
    problem = make_problem(case)
    whole = 64 * 16 * 4
    assert count_bytes(case) == 8 * whole
    assert count_bytes(replace(case, mode="inference")) == 2 * whole
    assert count_bytes(replace(case, padded=None, residual=True)) == 12 * whole
    share = problem.mask.mean()
    assert count_bytes(case, problem.mask) == int((3 + 5 * share) * whole) + 3 * 64
    variants = torch_steps.make_variants(problem, ("ours", "ours, no mask", "copy"))
    figures = measure(problem, variants, 0.01, 3, size=whole)
    moved = {n: v["GB/s"] * 1e6 * v["ms"] / whole for n, v in figures.items()}
    assert moved == pytest.approx({"ours": 1.0, "copy": 2.0, "ours, no mask": 8.0}, rel=0.02)
    copy = figures["copy"]["ms"]
    trips = {n: v["ms"] / copy for n, v in figures.items()}
    assert {n: v["trips"] for n, v in figures.items()} == pytest.approx(trips, rel=0.01)


def test_calls_in_turn_move_the_bytes_of_both() -> None:
    case = Case("turns", "", (4, 8), "inference", turns=True)
    assert count_bytes(case) == 2 * (4 + 3) * 8 * 4
    (variant,) = torch_steps.make_variants(make_problem(case), ("ours",)).values()
    assert [tuple(y.shape) for y in variant.step()] == [(4, 8), (3, 8)]


def test_problems_are_the_same_every_time() -> None:
    case = Case("same", "", (16, 4), activation="relu", residual=True)
    first, second = make_problem(case), make_problem(case)
    for name in ("x", "dy", "residual", "gamma", "beta", "mean", "var"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
