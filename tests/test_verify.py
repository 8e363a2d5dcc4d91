"""`batchnorm verify`: it finds kernels that are wrong on purpose, on every instruction set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import product
from pathlib import Path
from typing import Any

import pytest

import batchnorm
from batchnorm.kernels import extension
from batchnorm.verification import FRONT_ENDS, sample
from batchnorm.verification.cases import refuse_kernels
from batchnorm.verification.messages import MARK

pytestmark = pytest.mark.skipif(
    extension.missing_reason() is not None, reason="no kernels are installed"
)
FRAMEWORKS = ("torch", "jax", "flax", "keras", "tensorflow")
WITHOUT = f"import sys\nfor name in {FRAMEWORKS}:\n    sys.modules[name] = None\n"
# Kernels whose y is wrong by 1 in its first value, on one instruction set and type.
BROKEN = """
import ctypes, os
from batchnorm.kernels import extension
from batchnorm.kernels.kept import TYPES

make = extension.make_plan

class Broken:
    def __init__(self, plan, wrong):
        self.plan, self.wrong = plan, wrong
    def __getattr__(self, name):
        return getattr(self.plan, name)
    def forward(self, **arguments):
        kept = self.plan.forward(**arguments)
        if self.wrong and extension.instructions() == "baseline":
            FAULT
        return kept

def make_plan(layout, geometry, dtype, *rest):
    wrong = dtype == "float32" and 0 not in layout.shape
    return Broken(make(layout, geometry, dtype, *rest), wrong)

extension.make_plan = make_plan
"""
ADD_ONE = 'ctypes.c_float.from_address(arguments["y"]).value += 1.0'


def run(tmp_path: Path, changed: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command in processes that run the code `changed` at their start."""
    (tmp_path / "sitecustomize.py").write_text(changed)
    return subprocess.run(
        [sys.executable, "-c", "from batchnorm.cli import main; main()", "verify", *arguments],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
    )


def rows(found: dict[str, Any], front_end: str = "kernels") -> list[dict[str, Any]]:
    return [check for check in found["checks"] if check["front_end"] == front_end]


def test_kernels_are_checked_without_a_framework_on_every_instruction_set(tmp_path: Path) -> None:
    done = run(tmp_path, WITHOUT, "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    sets = extension.instruction_sets()
    assert extension.instructions() in sets
    assert [check["instructions"] for check in rows(found)] == [s for s in sets for _ in range(3)]
    assert rows(found) == found["checks"]
    assert {entry["front_end"] for entry in found["unchecked"]} == {"torch", "jax", "keras"}
    assert all("not installed" in entry["reason"] for entry in found["unchecked"])
    served = [case for case in sample.EVERY if refuse_kernels(case) is None]
    assert all(check["cases"] > len(served) for check in rows(found)[::3])
    assert found["seconds"] < 60


@pytest.mark.parametrize("fault", [ADD_ONE, "os.abort()"], ids=["wrong", "crash"])
def test_a_broken_kernel_is_found(tmp_path: Path, fault: str) -> None:
    changed = WITHOUT + BROKEN.replace("FAULT", fault)
    done = run(tmp_path, changed, "--quick", "--json")
    assert done.returncode == 1, done.stderr
    found = json.loads(done.stdout)
    assert found["passed"] is False
    wrong = [check for check in found["checks"] if check["failures"]]
    assert {check["instructions"] for check in wrong} == {"baseline"}
    errors = [failure["error"] for check in wrong for failure in check["failures"]]
    if fault == ADD_ONE:
        assert len(wrong) == 3
        assert all(error.startswith("y: 1 of ") for error in errors)
        cases = {failure["case"] for check in wrong for failure in check["failures"]}
        known = {case.name: case for case in (*sample.FEW, *sample.HARD)}
        assert {known[name].dtype for name in cases} == {"float32"}
    else:
        assert errors == ["the process ended by SIGABRT"]


def test_the_table_and_the_progress_are_for_people(tmp_path: Path) -> None:
    done = run(tmp_path, WITHOUT + BROKEN.replace("FAULT", ADD_ONE), "--quick")
    assert done.returncode == 1
    assert "kernels" in done.stdout
    assert "wrong: kernels, one call baseline: " in done.stdout
    assert "not checked: torch: torch is not installed" in done.stdout
    assert "results are wrong; cpu" in done.stdout
    steps = [line for line in done.stderr.splitlines() if line.startswith("kernels: ")]
    assert len(steps) == 4
    done_cases, all_cases = steps[-1].removeprefix("kernels: ").split(" of ")
    assert f"{done_cases} cases" == all_cases


def test_every_installed_front_end_is_checked() -> None:
    """`--quick`, through the function; and with fewer cases than the whole sample has."""
    seen: list[tuple[str, int, int]] = []
    found = batchnorm.verify(quick=True, progress=lambda *step: seen.append(step))
    assert found.passed, found
    assert {check.front_end for check in found.checks} == set(FRONT_ENDS)
    assert found.unchecked == ()
    assert {front_end for front_end, done, every in seen if done == every} == set(FRONT_ENDS)
    kernels = [check for check in found.checks if check.way == "kernels"]
    assert [check.front_end for check in kernels] == ["torch", "jax"]
    assert {check.instructions for check in kernels} == {extension.instructions()}
    assert all(0.0 < check.worst <= 1.0 for check in found.checks)
    whole = [case for case in sample.EVERY if refuse_kernels(case) is None]
    assert all(check.cases < len(whole) / 4 for check in found.checks)
    assert found.versions["batchnorm"] == batchnorm.__version__
    text = json.loads(found.to_json())
    assert text.keys() == {
        *("passed", "device", "quick", "versions", "checks", "unchecked", "seconds"),
    }
    assert all(
        check.keys()
        == {"front_end", "way", "instructions", "cases", "worst", "failures", "seconds"}
        for check in text["checks"]
    )


def test_nothing_to_check_is_a_mistake(tmp_path: Path) -> None:
    done = run(tmp_path, WITHOUT, "--device", "cuda", "--json")
    assert done.returncode == 2
    assert "nothing could be checked on cuda: kernels: " in done.stderr
    assert json.loads(done.stdout)["passed"] is False


@pytest.mark.sample(3)
@pytest.mark.skipif(Path("/dev/nvidia0").exists(), reason="there is a CUDA device")
@pytest.mark.parametrize("front_end", ["torch", "jax", "keras"])
def test_a_front_end_without_the_device_is_not_checked_on_another(front_end: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "batchnorm.verification.process", front_end, "cuda", "quick"],
        capture_output=True,
        text=True,
        env=os.environ | {"JAX_PLATFORMS": "cuda", "TF_CPP_MIN_LOG_LEVEL": "3"},
    )
    (message,) = [line for line in done.stdout.split("\n") if MARK in line]
    assert "finds no CUDA device" in json.loads(message.removeprefix(MARK))["unchecked"]


def test_unknown_device_is_named() -> None:
    with pytest.raises(ValueError, match=r"verify: device must be 'cpu' or 'cuda'; got 'tpu'"):
        batchnorm.verify("tpu")


def test_the_sample_has_every_family_with_every_type_layout_and_mask() -> None:
    parts = [set(column) for column in zip(*(c.name.split("-") for c in sample.EVERY), strict=True)]
    families, types, layouts, masks = parts
    assert types == {"float32", "bfloat16", "float16", "float64"}
    names = {case.name for case in sample.EVERY}
    flat = {"rows", "wide"}  # have one row axis, on which all masks are of one kind
    for place in product(families, types, layouts, masks):
        assert ("-".join(place) in names) == (
            place[2] not in flat or place[3] not in ("samples", "prefix")
        )
    for few in (sample.COVER, sample.FEW):
        found = [set(column) for column in zip(*(c.name.split("-") for c in few), strict=True)]
        assert found == parts
