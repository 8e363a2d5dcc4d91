"""The stub of the extension beside the extension: names, order, types and defaults."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

import batchnorm.kernels

_cpu = pytest.importorskip("batchnorm.kernels._cpu")

STUB = Path(batchnorm.kernels.__file__).parent / "_cpu.pyi"
_ARRAY = re.compile(r"(?:numpy\.)?ndarray\[dtype=float64, [^\]]*\]")
_MODULE = re.compile(r"[\w.]*\b_cpu\.")


def signature(function: ast.FunctionDef) -> str:
    """Arguments and result, spelled in one way."""
    result = "" if function.returns is None else ast.unparse(function.returns)
    return f"({ast.unparse(function.args)}) -> {result}"


def of_extension(function: object) -> str:
    """The signature that nanobind gives a function."""
    ((text, _, defaults),) = function.__nb_signature__
    text = _MODULE.sub("", _ARRAY.sub("_Doubles", text))
    text = re.sub(r"\\(\d+)", lambda place: repr(defaults[int(place[1])]), text)
    (parsed,) = ast.parse(f"{text}: ...").body
    assert isinstance(parsed, ast.FunctionDef)
    return signature(parsed)


def stub_signatures() -> dict[str, str]:
    found = {}
    for node in ast.parse(STUB.read_text()).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = signature(node)
        elif isinstance(node, ast.ClassDef):
            for method in node.body:
                assert isinstance(method, ast.FunctionDef)
                found[f"{node.name}.{method.name}"] = signature(method)
    return found


def extension_signatures() -> dict[str, str]:
    found = {}
    for name, value in vars(_cpu).items():
        if hasattr(value, "__nb_signature__"):
            found[name] = of_extension(value)
        elif isinstance(value, type):
            for method, function in vars(value).items():
                if hasattr(function, "__nb_signature__"):
                    found[f"{name}.{method}"] = of_extension(function)
    return found


def test_stub_has_the_signatures_of_the_extension() -> None:
    assert stub_signatures() == extension_signatures()


def test_stub_has_the_constants_of_the_extension() -> None:
    annotated = (n for n in ast.parse(STUB.read_text()).body if isinstance(n, ast.AnnAssign))
    stub = {ast.unparse(n.target) for n in annotated if n.value is None}
    assert stub == {name for name, value in vars(_cpu).items() if isinstance(value, dict)}
