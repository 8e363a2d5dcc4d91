"""The project's own rules, checked on the source: no import cycles, few parameters."""

from __future__ import annotations

import ast
import statistics
from collections.abc import Iterator
from pathlib import Path

import pytest

import batchnorm

ROOT = Path(batchnorm.__file__).parent
ROOT_OF_SOURCES = Path(__file__).parent.parent
FILES = {
    ".".join(("batchnorm", *path.relative_to(ROOT).with_suffix("").parts)).removesuffix(
        ".__init__"
    ): path
    for path in ROOT.rglob("*.py")
}

# Files that import each other. The list must shrink.
CIRCLES: set[frozenset[str]] = set()

MOST = 8  # parameters of a function; constructors and public signatures may have more
# Functions with more, and why.
LONG = {
    "torch.kernels.operators._step": "the schema of an operator is flat",
    "torch.ways.graph_arrays._step": "the schema of an operator is flat",
    "core.gradient.gradient": "the closed form, with a name for each of its terms",
}
TRITON = "kernels.triton."  # kernels take numbers and addresses; no record has both

LENGTH = 300  # lines of a file of the library or of the compiled passes
MEDIAN = 130
NATIVE = ROOT_OF_SOURCES / "native"
# Longer ones, and why.
LONG_FILES: dict[str, str] = {}


def imported(path: Path) -> set[str]:
    """The files of this library that a file imports, at its top or inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            # A name may be a file of a folder, or something in a file.
            whole = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in FILES else str(node.module) for name in whole]
        found |= {name for name in names if name in FILES}
    return found


def circles() -> set[frozenset[str]]:
    """Sets of files that import each other, directly or by way of others in the set."""
    edges = {name: imported(path) for name, path in FILES.items()}

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = list(edges[start])
        while waiting:
            name = waiting.pop()
            if name not in seen:
                seen.add(name)
                waiting += edges[name]
        return seen

    reached = {name: reach(name) for name in FILES}
    return {
        frozenset(other for other in reached[name] if name in reached[other])
        for name in FILES
        if name in reached[name]
    }


def public_names() -> set[str]:
    """The names that the library and its front ends list as their own."""
    found: set[str] = set()
    for folder in ("", "torch", "jax", "keras", "tools"):
        tree = ast.parse((ROOT / folder / "__init__.py").read_text())
        found |= {a.value for a in ast.walk(tree) if isinstance(a, ast.Constant)}
    return found


def functions() -> Iterator[tuple[str, int]]:
    """Every function that is neither public nor a constructor, and its number of parameters."""
    public = public_names()
    for name, path in FILES.items():
        for owner, function in _functions(ast.parse(path.read_text()), ()):
            if function.name == "__init__" or {*owner, function.name} & public:
                continue
            a = function.args
            every = [*a.posonlyargs, *a.args, *a.kwonlyargs]
            count = sum(arg.arg not in ("self", "cls") for arg in every)
            count += (a.vararg is not None) + (a.kwarg is not None)
            yield ".".join((name.removeprefix("batchnorm."), *owner, function.name)), count


def _functions(
    tree: ast.AST, owner: tuple[str, ...]
) -> Iterator[tuple[tuple[str, ...], ast.FunctionDef]]:
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef):
            yield owner, node
        inside = isinstance(node, (ast.ClassDef, ast.FunctionDef))
        yield from _functions(node, (*owner, node.name) if inside else owner)


def test_no_file_imports_in_a_circle_but_the_known_ones() -> None:
    assert circles() == CIRCLES


def test_functions_have_few_parameters() -> None:
    long = {name for name, count in functions() if count > MOST}
    assert {name for name in long if not name.startswith(TRITON)} == LONG.keys()


def test_files_are_short() -> None:
    files = {str(path.relative_to(ROOT)): path for path in FILES.values()}
    own = [path for path in NATIVE.rglob("*.?pp") if "third_party" not in path.parts]
    files |= {str(path.relative_to(ROOT_OF_SOURCES)): path for path in own}
    lines = {name: len(path.read_text().splitlines()) for name, path in files.items()}
    assert {name for name, count in lines.items() if count > LENGTH} == LONG_FILES.keys()
    assert statistics.median(lines.values()) < MEDIAN


def test_docstrings_say_the_noun() -> None:
    folders = ("src", "tests", "benchmarks", "docs", "examples")
    riddles = []
    for path in (p for folder in folders for p in (ROOT_OF_SOURCES / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
                text = ast.get_docstring(node) or ""
                if text.split(" ")[0] in ("What", "Whether", "Why", "How"):
                    riddles.append(f"{path.relative_to(ROOT_OF_SOURCES)}: {text.splitlines()[0]}")
    assert riddles == []


# Frameworks whose private names stand in one file of the front end, or of the tools, which do
# without that.
PRIVATE = {"torch": ("batchnorm.torch.private", "batchnorm.tools.frameworks.torch.private")}
METHODS = {"_cdata", "_dynamo_marked_constant", "_is_zerotensor"}  # of any object


def private_names(path: Path, framework: str) -> Iterator[str]:
    """Names of a framework that begin with an underscore, as a file uses them."""
    known: dict[str, str] = {}
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == framework:
                    known[alias.asname or framework] = alias.name if alias.asname else framework
                    yield from _if_private(alias.name)
        elif isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == framework:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                yield from _if_private(f"{node.module}.{alias.name}")
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.insert(0, node.attr)
            node = node.value
        if parts and parts[-1] in METHODS:
            yield parts[-1]
        if parts and isinstance(node, ast.Name) and node.id in known:
            yield from _if_private(".".join((known[node.id], *parts)))


def _if_private(name: str) -> Iterator[str]:
    parts = [] if name.startswith("torch.ops.") else name.split(".")  # operators' own names
    if any(part.startswith("_") and not part.endswith("__") for part in parts):
        yield name


@pytest.mark.parametrize("framework", PRIVATE)
def test_private_names_of_a_framework_stand_in_one_file(framework: str) -> None:
    found = {
        f"{name}: {used}"
        for name, path in FILES.items()
        for used in private_names(path, framework)
        if name not in PRIVATE[framework]
    }
    for path in (ROOT_OF_SOURCES / "benchmarks").glob("*.py"):
        found |= {f"{path.name}: {used}" for used in private_names(path, framework)}
    assert found == set()
    for name in PRIVATE[framework]:
        assert list(private_names(FILES[name], framework)), name
