"""The allowed imports of each part (architecture), checked in a fresh interpreter."""

from __future__ import annotations

import ast
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import numpy
import pytest

import batchnorm
from batchnorm import environment
from batchnorm.core.versions import BOUNDS, SETTING

ROOT = Path(batchnorm.__file__).parent
FRAMEWORKS = ("torch", "jax", "flax", "keras", "tensorflow")
PARTS = {
    path.stem for path in ROOT.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
}

# The packages that each part may use beside the standard library and itself.
ALLOWED = {
    "core": set(),
    "kernels": {"core"},
    "torch": {"core", "kernels", "torch", "numpy"},
    "jax": {"core", "kernels", "jax", "flax", "numpy"},
    # Each backend's module imports that backend's functional, and only when Keras runs on it.
    "keras": {"core", "kernels", "jax", "torch", "keras", "h5py", "tensorflow", "numpy"},
    # One front end and its framework, when a tool needs them.
    "tools": {"core", "kernels", "numpy_namespace", "environment", "torch", "jax", "keras"}
    | {"numpy", "flax", "equinox", "haiku", "h5py", "tensorstore", "tensorflow", "rich"}
    | {"safetensors", "msgpack", "ml_dtypes"},
    "benchmark": {"core", "kernels", "environment", "memory", "reference", "torch", "jax", "keras"}
    | {"numpy", "flax", "tensorflow"},
    "verification": {"core", "kernels", "numpy_namespace", "environment", "reference", "torch"}
    | {"jax", "keras", "numpy", "tensorflow"},
    "commands": {"benchmark", "demo", "environment", "tools", "verification", "typer", "rich"},
}


def loaded_after(statement: str) -> set[str]:
    code = f"{statement}\nimport sys\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split())


@pytest.mark.parametrize(
    "statement",
    [
        "import batchnorm",
        "import batchnorm.kernels.select",
        "from batchnorm import explain",
        "import batchnorm.benchmark.bench",
        "import batchnorm.verification",
    ],
)
def test_no_framework_is_imported(statement: str) -> None:
    assert not loaded_after(statement) & set(FRAMEWORKS)


def test_batchnorm_itself_takes_less_than_100_ms() -> None:
    code = (
        "import numpy, importlib.metadata, sys, time\n"
        "start = time.process_time()\nimport batchnorm\n"
        "print(time.process_time() - start)"
    )
    times = [
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
        for _ in range(3)
    ]
    assert min(times) < 0.1


def test_torch_front_end_imports_no_other_framework() -> None:
    loaded = loaded_after("import batchnorm.torch")
    assert "torch" in loaded
    assert not loaded & {"jax", "flax", "keras", "tensorflow", "rich", "typer", "matplotlib"}


def test_torch_front_end_takes_few_imports_beside_torch() -> None:
    """Counted, since times depend on what else runs: half a millisecond each, 50 ms in all."""
    own = loaded_after("import batchnorm.torch") - loaded_after("import numpy, torch")
    library = {name for name in own if name.split(".")[0] == "batchnorm"}
    others = {name.split(".")[0] for name in own - library}
    assert others <= sys.stdlib_module_names
    assert len(others) <= 5
    assert len(library) <= 90


def test_help_of_the_command_line_imports_neither_tools_nor_numpy() -> None:
    """In imports again: with the 300 that typer and rich need it takes 200 ms at most."""
    code = (
        "import sys; sys.argv = ['batchnorm', '--help']; from batchnorm.cli import main\n"
        "try: main()\nfinally: print(*sys.modules, file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True
    )
    loaded = set(done.stderr.split())
    own = {name for name in loaded if name.startswith("batchnorm.")}
    others = {name.split(".")[0] for name in loaded} - sys.stdlib_module_names
    assert "inspect" in done.stdout
    assert {".".join(name.split(".")[:2]) for name in own} == {
        "batchnorm.cli",
        "batchnorm.commands",
    }
    assert not others & {"numpy", "matplotlib", "sklearn", *FRAMEWORKS}
    assert len(loaded) <= 450


def test_jax_front_end_imports_flax_for_its_layer_only() -> None:
    loaded = loaded_after("import batchnorm.jax")
    assert "jax" in loaded
    assert not loaded & {"flax", "torch", "keras", "tensorflow", "rich", "typer", "matplotlib"}
    assert "flax" in loaded_after("from batchnorm.jax import BatchNorm")


@pytest.mark.sample(3)
@pytest.mark.parametrize("backend", ["tensorflow", "jax", "torch"])
def test_keras_front_end_imports_its_active_backend_only(backend: str) -> None:
    code = "import batchnorm.keras, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        env=os.environ | {"KERAS_BACKEND": backend, "TF_CPP_MIN_LOG_LEVEL": "3"},
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = {name for name in done.stdout.split() if name.startswith("batchnorm.")}
    others = {"jax", "torch"} - {backend}
    assert f"batchnorm.keras.backends.{backend}" in loaded
    assert not {name for name in loaded if name.split(".")[1] in others}
    assert not loaded & {f"batchnorm.keras.backends.{other}" for other in others}


@pytest.mark.parametrize("part", ALLOWED)
def test_source_imports_only_what_its_part_may(part: str) -> None:
    for path in (ROOT / part).rglob("*.py"):
        for module in _imports(path):
            top, *rest = module.split(".")
            if part == "kernels" and "triton" in path.parts and top in ("torch", "triton"):
                continue  # the only kernels that use a framework
            if path.parent.name == "guests" and top == path.stem:
                continue  # imported only where a model has a class of that package
            if top == "batchnorm":
                used = rest[0] if rest else ""
                assert used in {part} | (ALLOWED[part] & PARTS), f"{path}: {module}"
            else:
                allowed = top in sys.stdlib_module_names or top in ALLOWED[part]
                assert allowed, f"{path}: {module}"


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            found |= {
                f"{node.module}.{alias.name}" if node.module == "batchnorm" else str(node.module)
                for alias in node.names
            }
    return found


@pytest.mark.parametrize(
    ("missing", "statement"),
    [
        ("torch", "import batchnorm.torch"),
        ("jax", "import batchnorm.jax"),
        ("flax", "from batchnorm.jax import BatchNorm"),
    ],
)
def test_missing_framework_says_which_extra_to_install(missing: str, statement: str) -> None:
    extra = "torch" if missing == "torch" else "jax"
    code = f"import sys; sys.modules[{missing!r}] = None\n{statement}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert f"pip install 'batchnorm[{extra}]'" in done.stderr


@pytest.mark.parametrize(
    ("package", "old", "statement"),
    [
        ("torch", "2.11.0", "import batchnorm.torch"),
        ("jax", "0.9.2", "import batchnorm.jax"),
        ("flax", "0.12.7", "from batchnorm.jax import BatchNorm"),
        ("keras", "3.13.2", "import batchnorm.keras"),
    ],
)
def test_versions_below_the_bound_end_in_one_line(package: str, old: str, statement: str) -> None:
    code = f"import {package}; {package}.__version__ = {old!r}\n{statement}"
    without = {k: v for k, v in os.environ.items() if k != SETTING}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=without
    )
    last = done.stderr.rstrip().rpartition("\n")[2]
    assert done.returncode == 1
    assert last.startswith("ImportError: batchnorm.")
    assert f"needs {package} {BOUNDS[package]} or newer, but {old} is installed" in last
    assert f"pip install '{package}>={BOUNDS[package]}'" in last


def test_show_config_reports_versions_and_kernels_in_two_columns(
    capsys: pytest.CaptureFixture[str],
) -> None:
    batchnorm.show_config()
    lines = capsys.readouterr().out.splitlines()
    rows = {line.split()[0]: line for line in lines}
    assert rows["batchnorm"].endswith(f"  {batchnorm.__version__}")
    assert "  compiled, " in rows["kernels"]
    assert {"python", "torch", "tensorflow", "outputs", "on"} <= rows.keys()
    (column,) = {re.search(r"  +", line).end() for line in lines}  # type: ignore[union-attr]
    assert all(line[column] != " " for line in lines)


def test_config_is_data() -> None:
    found = json.loads(json.dumps(environment.find_config()))
    assert found["packages"]["numpy"] == numpy.__version__
    assert found["kernels"]["name"] == "cpu"
    assert found["gpu_kernels"].keys() == {"name", "reason"}


@pytest.mark.parametrize("package", ["tensorflow", "tensorflow-intel", "tf-nightly", "of-a-vendor"])
def test_tensorflow_is_found_under_the_name_of_any_package(
    package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if name != package:
            raise PackageNotFoundError(name)
        return "9.8"

    monkeypatch.setattr(environment, "version", version)
    monkeypatch.setattr(environment, "find_spec", lambda name: object())
    monkeypatch.setattr(environment, "packages_distributions", lambda: {"tensorflow": [package]})
    expected = "9.8" if package == "tensorflow" else f"9.8 ({package})"
    assert environment.find_version("tensorflow") == expected
    assert environment.find_version("jax") is None
