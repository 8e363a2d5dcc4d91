"""The folders of tools: imports go down only, and one switch knows the frameworks' folders."""

from __future__ import annotations

import ast
import itertools
import subprocess
import sys
from pathlib import Path

import pytest

import batchnorm.tools

ROOT = Path(batchnorm.tools.__file__).parent
TOP = "batchnorm.tools"
FRAMEWORKS = ("torch", "jax", "flax", "keras", "tensorflow", "equinox")
VERBS = {"inspect": "inspection", "recalibrate": "recalibration"}
VERBS |= {"fold": "folding", "transfer": "transferring", "find_leaks": "inspection.leaks"}
VERBS |= {"merge": "merging"}
FOLDERS = tuple(f"{TOP}.frameworks.{name}" for name in ("torch", "nnx", "keras"))


def module_names() -> dict[str, Path]:
    names = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT).with_suffix("").parts
        names[".".join([TOP, *(part for part in parts if part != "__init__")])] = path
    return names


def imports_of(path: Path, known: set[str]) -> set[str]:
    """The modules of tools that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inner & known) or {str(node.module)}
    return found & known


MODULES = module_names()
ARROWS = {name: imports_of(path, set(MODULES)) for name, path in MODULES.items()}


def run(code: str) -> list[str]:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.split()


def is_in(module: str, *folders: str) -> bool:
    return any(module == folder or module.startswith(f"{folder}.") for folder in folders)


def test_imports_inside_functions_are_seen() -> None:
    assert f"{TOP}.frameworks.switch" in ARROWS[f"{TOP}.models"]
    assert f"{TOP}.inspection.table" in ARROWS[f"{TOP}.inspection.report"]


def test_names_taken_from_the_package_itself_exist() -> None:
    """mypy cannot check such names: the package has a `__getattr__`."""
    for path in ROOT.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == TOP:
                for alias in node.names:
                    assert f"{TOP}.{alias.name}" in MODULES or alias.name in VERBS, path


@pytest.mark.parametrize("folder", FOLDERS)
def test_frameworks_do_not_know_each_other(folder: str) -> None:
    others = set(FOLDERS) - {folder}
    for module in MODULES:
        if is_in(module, folder):
            assert not {m for m in ARROWS[module] if is_in(m, *others)}, module


def test_tools_reach_frameworks_through_the_switch_alone() -> None:
    trees = (f"{TOP}.frameworks.trees", f"{TOP}.frameworks.equinox")
    for module, arrows in ARROWS.items():
        if module != f"{TOP}.frameworks.switch" and not is_in(module, *FOLDERS, *trees):
            assert not {m for m in arrows if is_in(m, *FOLDERS, *trees)}, module


def test_frameworks_know_no_verb() -> None:
    verbs = [f"{TOP}.{home}" for home in VERBS.values()]
    verbs += [f"{TOP}.{name}" for name in ("models", "observe", "convert")]
    for module, arrows in ARROWS.items():
        if is_in(module, f"{TOP}.frameworks"):
            assert not {m for m in arrows if is_in(m, *verbs)}, module


def test_importing_tools_imports_no_framework() -> None:
    modules = " ".join(f"import {TOP}.{home};" for home in [*VERBS.values(), "models", "convert"])
    assert not set(run(f"{modules} import sys; print(*sys.modules)")) & set(FRAMEWORKS)


def test_looking_for_layers_imports_the_framework_in_use_only() -> None:
    code = (
        "import torch, sys; from batchnorm.tools.models import find_layers\n"
        "find_layers(torch.nn.BatchNorm1d(3)); print(*sys.modules)"
    )
    loaded = set(run(code))
    assert not loaded & {"jax", "flax", "keras", "tensorflow", "batchnorm.torch"}
    assert "batchnorm.tools.frameworks.torch.states" in loaded


@pytest.mark.parametrize("order", list(itertools.permutations(("function", "module", "inner"))))
def test_verbs_are_functions_in_every_order_of_imports(order: tuple[str, ...]) -> None:
    inner = {"inspect": "report", "recalibrate": "report", "fold": "report", "transfer": "remarks"}
    inner |= {"find_leaks": "report", "merge": "states"}
    code = ""
    for verb, home in VERBS.items():
        statements = {
            "function": f"from {TOP} import {verb}",
            "module": f"import {TOP}.{home}",
            "inner": f"import {TOP}.{home}.{inner[verb]}",
        }
        code += "\n".join(statements[step] for step in order) + "\n"
    checks = ", ".join(f"callable({verb}), {TOP}.{verb} is {verb}" for verb in VERBS)
    assert set(run(f"{code}import {TOP}; print({checks})")) == {"True"}
