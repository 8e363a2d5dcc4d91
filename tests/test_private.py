"""Names that a framework keeps to itself: each front end reads them in one file only."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

import batchnorm

ROOT = Path(batchnorm.__file__).parent


class FrontEnd(NamedTuple):
    """The folders that use a framework, the file for its private names, and its private modules."""

    folders: tuple[str, ...]
    private: str
    modules: str


FRONT_ENDS = {
    "jax": FrontEnd(
        ("jax", "tools/frameworks/nnx"),
        "jax/private.py",
        r"(jax|jaxlib|flax)(\.\w+)*\._\w*|flax\.(nnx|linen)\.\w+(\.\w+)*",
    ),
    "keras": FrontEnd(
        ("keras", "tools/frameworks/keras"),
        "keras/private.py",
        r"keras\.src(\.\w+)*|tensorflow\.(python|core|compiler)(\.\w+)*",
    ),
}
NAMED_TUPLES = {"_replace", "_asdict", "_fields", "_make"}
NAME = re.compile(r"_[a-zA-Z]\w*")


def files(front_end: FrontEnd) -> list[Path]:
    """The files that may read no private name."""
    found = [path for folder in front_end.folders for path in (ROOT / folder).rglob("*.py")]
    return [path for path in found if path != ROOT / front_end.private]


def strings(call: ast.Call) -> set[str]:
    """The strings among a call's arguments."""
    return {a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)}


def defined(tree: ast.AST) -> Iterator[str]:
    """The names that a file gives: functions, variables, attributes."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.attr
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "object.__setattr__":
            yield from strings(node)


def read(tree: ast.AST) -> Iterator[tuple[str, int]]:
    """The private attributes that a file reads, with the lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            yield node.attr, node.lineno
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr"):
            yield from ((name, node.lineno) for name in strings(node))


def modules(tree: ast.AST) -> Iterator[str]:
    """The modules that a file imports, and names that it imports, as if they were modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield str(node.module)
            yield from (f"{node.module}.{a.name}" for a in node.names if a.name.startswith("_"))
        elif isinstance(node, ast.Call):
            yield from strings(node)


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_private_names_are_read_in_one_file(name: str) -> None:
    front_end = FRONT_ENDS[name]
    trees = {path: ast.parse(path.read_text()) for path in files(front_end)}
    own = NAMED_TUPLES.union(*(defined(tree) for tree in trees.values()))
    foreign = {
        f"{path.relative_to(ROOT)}:{line}: {attribute}"
        for path, tree in trees.items()
        for attribute, line in read(tree)
        if NAME.fullmatch(attribute) and attribute not in own
    }
    assert len(trees) > 10
    assert not foreign


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_private_modules_are_imported_in_one_file(name: str) -> None:
    pattern, private = re.compile(FRONT_ENDS[name].modules), ROOT / FRONT_ENDS[name].private
    found = {
        f"{path.relative_to(ROOT)}: {module}"
        for path in ROOT.rglob("*.py")
        if path != private
        for module in modules(ast.parse(path.read_text()))
        if pattern.fullmatch(module)
    }
    assert not found


def test_rules_see_private_names() -> None:
    tree = ast.parse("import keras.src.x\nfrom jax import _src\ny = a._b\nz = getattr(a, '_c', 0)")
    assert {n for n, _ in read(tree) if NAME.fullmatch(n)} == {"_b", "_c"}
    assert {"keras.src.x", "jax._src"} <= set(modules(tree))
    for name, module in (("keras", "keras.src.x"), ("jax", "jax._src"), ("jax", "flax.nnx.nn")):
        assert re.fullmatch(FRONT_ENDS[name].modules, module)
    assert not re.fullmatch(FRONT_ENDS["jax"].modules, "flax.nnx")
