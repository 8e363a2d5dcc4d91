"""Benchmarks time only right variants, and run: nothing else calls their variants."""

from __future__ import annotations

import gc
import importlib.util
import json
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

from batchnorm.benchmark import jax_steps, torch_steps
from batchnorm.benchmark.case import Case, count_bytes
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
    spec.loader.exec_module(module)
    return module


def shrink(case: Case) -> Case:
    axis = case.axis % len(case.shape)
    sizes = [min(n, 8 if a == axis else 16 if a == 0 else 5) for a, n in enumerate(case.shape)]
    return replace(case, shape=tuple(sizes), compiled=False)


CPU = [shrink(case) for case in load("cases").CASES]
JAX = [shrink(case) for case in load("run_jax").CASES]
KERAS = [shrink(case) for case in load("run_keras").CASES]


QUICK = ("small", "small-mask", "inference-rows")  # in JAX; the others differ in shape only


def quick_if(case: Case, names: tuple[str, ...]) -> Any:
    """The case as a parameter; exhaustive if its name is not among these."""
    return case if case.name in names else pytest.param(case, marks=pytest.mark.exhaustive)


def by_name(case: Case) -> str:
    return case.name


@pytest.mark.exhaustive
def test_variants_of_the_cpu_benchmark_are_checked_and_timed(tmp_path: Path) -> None:
    command = [sys.executable, BENCHMARKS / "run.py", "--quick", "--output", tmp_path]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr[-2000:]
    cases = json.loads((tmp_path / "cpu.json").read_text())["cases"]
    assert any("ours, reused buffers" in case["variants"] for case in cases.values())


@pytest.mark.parametrize(
    "name", ["overlap", "synchronization", "count_passes", "run_jax", "run_keras", "run_gpu"]
)
def test_programs_find_what_they_import(name: str) -> None:
    code = f"import {name}"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.parametrize("case", CPU, ids=by_name)
def test_torch_variants_are_right(case: Case) -> None:
    problem = make_problem(case)
    variants = torch_steps.make_variants(problem)
    assert {"ours", torch_steps.name_rival(case)[0]} <= variants.keys()
    assert ("ours, reused buffers" in variants) == (case.copied and not case.inference)
    # What is compiled takes seconds; the exhaustive test has it.
    check_all(problem, {name: v for name, v in variants.items() if "compiled" not in name})


@pytest.mark.parametrize("case", [quick_if(c, QUICK) for c in JAX], ids=by_name)
def test_jax_variants_are_right(case: Case) -> None:
    problem = make_problem(case)
    variants = jax_steps.make_variants(problem)
    assert {"ours", "ours, plain", "ours, function", "flax nnx", "flax linen"} <= variants.keys()
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
    assert done.stdout.splitlines() == ["ours keras ours, kernels"] * len(KERAS)


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


def test_problems_of_bfloat16_have_its_values() -> None:
    problem = make_problem(Case("half", "", (64, 8), dtype="bfloat16"))
    for array in (problem.x, problem.dy):
        rounded = torch.from_numpy(array).bfloat16().float().numpy()
        np.testing.assert_array_equal(array, rounded)
    plain = make_problem(Case("half", "", (64, 8)))
    nearest = torch.from_numpy(plain.x).bfloat16().float().numpy()
    np.testing.assert_array_equal(problem.x, nearest)


def test_step_on_addresses_keeps_its_tensors() -> None:
    case = Case("kept", "", (64, 8), copied=True)
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
    case = Case("rows", "", (64, 16), padded=0.5, copied=True)
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
    assert moved == pytest.approx({"ours": 1.0, "copy": 8.0, "ours, no mask": 8.0}, rel=0.02)


def test_problems_are_the_same_every_time() -> None:
    case = Case("same", "", (16, 4), activation="relu", residual=True)
    first, second = make_problem(case), make_problem(case)
    for name in ("x", "dy", "residual", "gamma", "beta", "mean", "var"):
        np.testing.assert_array_equal(getattr(first, name), getattr(second, name))
