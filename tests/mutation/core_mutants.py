"""Mutants of the core's formulas, by the operators of cosmic-ray.

The naive implementation, which shares no code with the core, is what finds them.
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import importlib.util
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from running import Mutant, Verdict, judge

ROOT = Path(__file__).parent.parent.parent
CORE = ROOT / "src" / "batchnorm" / "core"
FORMULAS = ("moments", "normalize", "gradient", "running", "forward", "backward", "layout")
# For what no case of the table asks for: corrections, gradients of adjustments, merging.
OTHERS = ("tests/core", "tests/torch/test_explicit.py")
_SWAPS = (("Add", "Sub"), ("Mul", "Div"), ("BitAnd", "BitOr"))
_COMPARISONS = ("Lt_LtE", "LtE_Lt", "Gt_GtE", "GtE_Gt", "Gt_Lt", "Lt_Gt", "Eq_NotEq", "NotEq_Eq")
_OPERATORS = (
    *(f"ReplaceBinaryOperator_{a}_{b}" for pair in _SWAPS for a, b in (pair, pair[::-1])),
    *(f"ReplaceComparisonOperator_{name}" for name in (*_COMPARISONS, "Is_IsNot", "IsNot_Is")),
    *("ReplaceUnaryOperator_Delete_USub", "ReplaceUnaryOperator_Delete_Not", "NumberReplacer"),
    *("ReplaceTrueWithFalse", "ReplaceFalseWithTrue", "ReplaceAndWithOr", "ReplaceOrWithAnd"),
)


def mutants() -> list[Mutant]:
    """Every edit that changes what is computed."""
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.operators.provider import OperatorProvider

    found, operators = [], OperatorProvider()
    for name in FORMULAS:
        path = CORE / f"{name}.py"
        source = path.read_text()
        meaning = _meaning(source)
        for operator in _OPERATORS:
            for occurrence in range(1000):
                changed = mutate_code(source, operators[operator](), occurrence)
                if changed is None:
                    break
                if _meaning(changed) not in (meaning, ""):
                    found.append(Mutant(_describe(path, source, changed), str(path), changed))
    return found


def _meaning(source: str) -> str:
    """The program without what no calculation sees: annotations, assertions, messages.

    Empty if it is none: the operators take the asterisk before keywords for a product.
    """

    class Strip(ast.NodeTransformer):
        def visit_AnnAssign(self, node: ast.AnnAssign) -> Any:
            return node if node.value is not None else None

        def visit_arg(self, node: ast.arg) -> Any:
            node.annotation = None
            return node

        def visit_FunctionDef(self, node: ast.FunctionDef) -> Any:
            node.returns = None
            return self.generic_visit(node)

        def visit_arguments(self, node: ast.arguments) -> Any:
            self.generic_visit(node)
            node.args = [*node.posonlyargs, *node.args, *node.kwonlyargs]
            node.defaults = [*node.defaults, *(d for d in node.kw_defaults if d is not None)]
            node.posonlyargs, node.kwonlyargs, node.kw_defaults = [], [], []
            return node

        def visit_Raise(self, node: ast.Raise) -> Any:
            return ast.Pass()

        def visit_Assert(self, node: ast.Assert) -> Any:
            return ast.Pass()

    try:
        return ast.dump(Strip().visit(ast.parse(source)))
    except SyntaxError:
        return ""


def _describe(path: Path, source: str, changed: str) -> str:
    lines = zip(source.splitlines(), changed.splitlines(), strict=False)
    i, line, new = next((i, a, b) for i, (a, b) in enumerate(lines, start=1) if a != b)
    return f"{path.name}:{i} `{line.strip()}` → `{new.strip()}`"


def prepare(workers: int) -> Callable[[Mutant], tuple[str, Verdict]]:
    """The judge of a mutant; imports that take long happen here, before processes are forked."""
    import numpy  # noqa: F401
    import torch

    torch.set_num_threads(1)
    assert not any(name.startswith("batchnorm") for name in sys.modules)
    return _judge


def _judge(mutant: Mutant) -> tuple[str, Verdict]:
    return mutant.name, judge(partial(_load, mutant), OTHERS)


class _Instead(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports a module from other source."""

    def __init__(self, name: str, mutant: Mutant) -> None:
        self._name, self._mutant = name, mutant

    def find_spec(
        self, fullname: str, path: Any = None, target: Any = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        return importlib.util.spec_from_loader(fullname, self, origin=self._mutant.path)

    def exec_module(self, module: ModuleType) -> None:
        exec(compile(self._mutant.source, self._mutant.path, "exec"), module.__dict__)


def _load(mutant: Mutant) -> Iterator[Callable[[Any], None]]:
    name = f"batchnorm.core.{Path(mutant.path).stem}"
    sys.meta_path.insert(0, _Instead(name, mutant))
    import naive
    import torch_path
    from batchnorm.verification import tolerances
    from batchnorm.verification.comparison import Path as Way
    from batchnorm.verification.comparison import check

    for way in (
        Way(partial(naive.run, unbiased=False), False, tolerances.NAIVE),
        Way(partial(naive.run, unbiased=True), True, tolerances.NAIVE),
        Way(partial(torch_path.run, fused=False), True, tolerances.FLOAT32),
    ):
        yield partial(check, way)
