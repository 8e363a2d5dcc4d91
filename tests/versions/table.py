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

ENVIRONMENTS: tuple[Environment, ...] = (
    Environment(
        "torch-newest", "torch", "3.11", ("torch==2.15.0", "torchvision==0.29.2"), "newest", _TORCH
    ),
    Environment(
        "torch-bound", "torch", "3.11", ("torch==2.12.0", "torchvision==0.27.0"), "bound", _TORCH
    ),
)
