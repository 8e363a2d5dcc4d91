"""Mutants of the kernels' copy of what happens once per channel, by edits of its source.

Each worker has a build of its own. The oracle, which is the core's, finds them.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from running import Mutant, Verdict, judge

ROOT = Path(__file__).parent.parent.parent
FILE = "native/passes/channels.cpp"
BUILD = ROOT / "build" / "mutants"
# For what no case of the table asks for: no statistics, no eps, overflow.
OTHERS = (
    *("tests/torch/ways/test_eager_kernels.py", "tests/torch/test_drop_in.py"),
    *("tests/test_small_numbers.py", "-k", "not jax and not tensorflow and not keras"),
)
_EDITS = (
    (r" \+ ", " - "),
    (r" - ", " + "),
    (r" \* ", " / "),
    (r" / ", " * "),
    (r" \+= ", " -= "),
    (r" \*= ", " /= "),
    (r" < ", " <= "),
    (r" <= ", " < "),
    (r" > ", " >= "),
    (r" >= ", " > "),
    (r" == ", " != "),
    (r" && ", " || "),
    (r" \|\| ", " && "),
    (r"\b0\.0\b", "1.0"),
    (r"\b1\.0\b", "0.0"),
    (r"\? (\w[\w.\[\]]*) : (\w[\w.\[\]]*)", r"? \2 : \1"),
    (r"__builtin_sqrt\(", "("),
    (r"if \(!", "if ("),
    (r"-o\.dmax", "o.dmax"),
    (r"\btrue\b", "false"),
)


def mutants() -> list[Mutant]:
    """Every place of every edit, but in loops' heads, comments and #include lines."""
    source = (ROOT / FILE).read_text()
    lines = source.split("\n")
    found = []
    for i, line in enumerate(lines):
        code = line.partition("//")[0]
        if code.startswith("#") or not code.strip():
            continue
        begin = code.index("{") if code.lstrip().startswith("for (") and "{" in code else 0
        if code.lstrip().startswith("for (") and begin == 0:
            begin = code.rindex(")") if "++" in code else 0
        for pattern, new in _EDITS:
            for place in re.finditer(pattern, code):
                if place.start() < begin:
                    continue
                changed = code[: place.start()] + place.expand(new) + line[place.end() :]
                text = "\n".join((*lines[:i], changed, *lines[i + 1 :]))
                name = f"{Path(FILE).name}:{i + 1} `{line.strip()}` → `{changed.strip()}`"
                found.append(Mutant(name, FILE, text))
    return found


def prepare(workers: int) -> Callable[[Mutant], tuple[str, Verdict]]:
    """The judge of a mutant; makes a build for each worker."""
    import numpy  # noqa: F401
    import torch

    torch.set_num_threads(1)
    nanobind = subprocess.check_output([sys.executable, "-m", "nanobind", "--cmake_dir"], text=True)
    for worker in range(workers):
        tree = BUILD / str(worker)
        shutil.rmtree(tree, ignore_errors=True)
        shutil.copytree(ROOT / "native", tree / "native")
        shutil.copy(ROOT / "CMakeLists.txt", tree)
        defines = [f"-Dnanobind_DIR={nanobind.strip()}", f"-DPython_EXECUTABLE={sys.executable}"]
        configure = ["cmake", "-S", tree, "-B", tree / "build", *defines]
        subprocess.check_call(configure, stdout=subprocess.DEVNULL)
        _build(tree)
    return _judge


def _build(tree: Path) -> bool:
    command = ["cmake", "--build", tree / "build", "--target", "_cpu"]
    return (
        subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT).returncode == 0
    )


def _judge(mutant: Mutant) -> tuple[str, Verdict]:
    worker = (multiprocessing.current_process()._identity[0] - 1) % len(list(BUILD.iterdir()))
    tree = BUILD / str(worker)
    (tree / FILE).write_text(mutant.source)
    if not _build(tree):
        return mutant.name, Verdict("cover", "does not compile")
    return mutant.name, judge(partial(_load, next((tree / "build").glob("_cpu*.so"))), OTHERS)


def _load(library: Path) -> Iterator[Callable[[Any], None]]:
    name = "batchnorm.kernels._cpu"
    spec = importlib.util.spec_from_file_location(name, library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    import batchnorm.kernels
    import torch_path
    from batchnorm.verification import tolerances
    from batchnorm.verification.comparison import Path as Way
    from batchnorm.verification.comparison import check

    batchnorm.kernels._cpu = module  # type: ignore[attr-defined]
    yield partial(check, Way(torch_path.run, True, tolerances.FLOAT32))
