"""The environments that `make test-versions` tests: which versions, and which of the tests.

"newest" is the newest release when the row was last changed; warnings are errors there. "bound" is
the oldest version that pyproject.toml allows. Other roles name what the row is about.
"""

from __future__ import annotations

from typing import NamedTuple


class Environment(NamedTuple):
    """An environment, and the tests that run in it.

    Attributes:
        name: of the session, and of its row on the page.
        front_end: "torch", "jax" or "keras".
        python: the version, as "3.11".
        requirements: pinned, for pip; beside them `tests/versions/requirements.txt` is installed.
        role: "newest", "bound", "python" or "numpy".
        tests: arguments of `tests/run.py`: names of parts, and options of pytest.
    """

    name: str
    front_end: str
    python: str
    requirements: tuple[str, ...]
    role: str
    tests: tuple[str, ...]

    @property
    def warnings_are_errors(self) -> bool:
        """True of the newest: what is deprecated there has to be mended."""
        return self.role == "newest"


_TORCH = (
    *("torch", "table on torch", "ranks", "kernels", "GPU kernels, interpreted"),
    "--ignore=tests/sync/test_frameworks.py",  # needs JAX and Keras too
)

_JAX = ("JAX", "table on JAX")
_KERAS = ("Keras on TensorFlow", "Keras on JAX", "Keras on torch")
# Not torch, whose builds for a CPU alone PyPI does not have.
_KERAS_ALONE = ("Keras on TensorFlow", "Keras on JAX")
_JAX_TOOLS = ("optax==0.2.8", "dm-haiku==0.0.17", "equinox==0.13.8")
_JAX_NEWEST = ("jax==0.12.0.1", "flax==0.12.12", *_JAX_TOOLS)
_KERAS_NEWEST = ("keras==3.15.1", "tensorflow-cpu==2.21.0")

ENVIRONMENTS: tuple[Environment, ...] = (
    Environment(
        "torch-newest", "torch", "3.11", ("torch==2.15.0", "torchvision==0.29.2"), "newest", _TORCH
    ),
    Environment(
        "torch-bound", "torch", "3.11", ("torch==2.12.0", "torchvision==0.27.0"), "bound", _TORCH
    ),
    Environment("jax-newest", "jax", "3.13", _JAX_NEWEST, "newest", _JAX),
    Environment(
        "jax-bound",
        "jax",
        "3.11",
        ("jax==0.10.0", "jaxlib==0.10.0", "flax==0.12.8", *_JAX_TOOLS),
        "bound",
        _JAX,
    ),
    Environment(
        "keras-newest",
        "keras",
        "3.11",
        (*_KERAS_NEWEST, "torch==2.13.0", "jax==0.10.2", "flax==0.12.8"),
        "newest",
        _KERAS,
    ),
    Environment(
        "keras-bound",
        "keras",
        "3.11",
        ("keras==3.14.0", "tensorflow-cpu==2.21.0", "torch==2.13.0", "jax==0.10.0", "flax==0.12.8"),
        "bound",
        _KERAS,
    ),
    Environment(  # JAX 0.10 and Keras 3.13 need Python 3.11
        "python-3.10", "torch", "3.10", ("torch==2.13.0", "torchvision==0.28.0"), "python", _TORCH
    ),
    Environment("python-3.12", "jax", "3.12", _JAX_NEWEST, "python", _JAX),
    Environment(
        "python-3.13", "keras", "3.13", (*_KERAS_NEWEST, *_JAX_NEWEST), "python", _KERAS_ALONE
    ),
    Environment("python-3.14", "jax", "3.14", _JAX_NEWEST, "python", _JAX),
    Environment(
        "numpy-1.26",
        "keras",
        "3.11",
        (*_KERAS_NEWEST, "torch==2.13.0", "numpy==1.26.4"),
        "numpy",
        ("Keras on TensorFlow", "Keras on torch", "kernels"),
    ),
)
