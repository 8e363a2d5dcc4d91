"""The ways from x to y that `verify` runs its sample on, for each front end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib import import_module
from typing import Any, NamedTuple

from batchnorm.kernels import extension
from batchnorm.verification import sample, tolerances
from batchnorm.verification.cases import Case, Result, refuse_kernels
from batchnorm.verification.comparison import Path

KERNELS = "kernels"  # without a framework, on NumPy arrays
FRONT_ENDS = (KERNELS, "torch", "jax", "keras")
_ARRAYS = "array code"


class UncheckedError(Exception):
    """Nothing of a front end can be checked here, for the reason in the message."""


class Way(NamedTuple):
    """A way from x to y.

    Attributes:
        name: of the way, for people to read.
        instructions: of the compiled kernels; "" where it runs others, or none.
        path: runs a case.
        cases: those that it runs.
    """

    name: str
    instructions: str
    path: Path
    cases: Sequence[Case]

    def run(self, case: Case, data: Any) -> Result:
        """Run a case with this way's instruction set."""
        if self.instructions:
            extension.use_instructions(self.instructions)
        return self.path.run(case, data)


def find_ways(front_end: str, device: str, quick: bool) -> list[Way]:
    """The ways of a front end; imports its framework.

    Raises:
        UncheckedError: there is none here.
    """
    found: list[Way] = _FIND[front_end](device, quick)
    return found


def _served(cases: Sequence[Case], refuse: Callable[[Case], str | None]) -> list[Case]:
    return [case for case in cases if refuse(case) is None]


def _kernels(device: str, quick: bool) -> list[Way]:
    missing = extension.missing_reason()
    if missing is not None:
        raise UncheckedError(missing)
    from batchnorm.verification.kernel_runs import refuse, run

    whole = [*(sample.FEW if quick else sample.EVERY), *sample.HARD]
    part = [*(sample.FEW if quick else sample.COVER), *sample.HARD]
    kinds: list[tuple[str, dict[str, Any], list[Case]]] = [
        ("one call", {}, whole),
        ("gaps between rows", {"gaps": True}, part),
        ("halves, as ranks call them", {"halves": True}, part),
    ]
    return [
        Way(
            name,
            instructions,
            Path(partial(run, **options), True, tolerances.FLOAT32),
            _served(cases, refuse),
        )
        for instructions in extension.instruction_sets()
        for name, options, cases in kinds
    ]


def _torch(device: str, quick: bool) -> list[Way]:
    torch = _import("torch")
    from batchnorm.verification.torch_runs import run

    if device == "cuda" and not torch.cuda.is_available():
        raise UncheckedError("torch finds no CUDA device")
    cases = [*(sample.FEW if quick else sample.COVER), *sample.HARD]
    run = partial(run, device=device)
    arrays = Way(
        _ARRAYS, "", Path(partial(run, fused=False), True, tolerances.PLAIN_FLOAT32), cases
    )
    instructions, missing = _choose_kernels(device)
    if missing is not None:
        return [arrays]
    kernels = Path(partial(run, fused=True), True, tolerances.FLOAT32)
    return [Way("kernels", instructions, kernels, _served(cases, refuse_kernels)), arrays]


def _choose_kernels(device: str) -> tuple[str, str | None]:
    """The instruction set of a device's kernels, and the reason why there are none."""
    if device == "cpu":
        missing = extension.missing_reason()
        return ("" if missing else extension.instructions()), missing
    from batchnorm.kernels.select import triton_status

    status = triton_status()
    return "", None if status.kernel else status.reason


def _jax(device: str, quick: bool) -> list[Way]:
    jax = _import("jax")
    try:
        jax.devices()
    except (RuntimeError, AssertionError) as error:  # a plugin is broken, or missing
        name = "CUDA device" if device == "cuda" else "processor"
        text = " ".join(str(error).split())
        raise UncheckedError(f"jax finds no {name}{': ' if text else ''}{text}") from error
    from batchnorm.verification.jax_runs import refuse, refuse_kernel, run

    cases = _few(quick)  # each is compiled for itself
    arrays = Path(partial(run, fused=False), False, tolerances.PLAIN_FLOAT32)
    found = [Way(_ARRAYS, "", arrays, _served(cases, refuse))]
    if device == "cpu" and extension.missing_reason() is None:
        kernels = Path(partial(run, fused=True), False, tolerances.FLOAT32)
        served = _served(cases, refuse_kernel)
        found.insert(0, Way("kernels", extension.instructions(), kernels, served))
    return found


def _keras(device: str, quick: bool) -> list[Way]:
    _import("keras")
    from batchnorm.verification.keras_backend import NAME, has_gpu
    from batchnorm.verification.keras_runs import refuse, run

    if device == "cuda" and not has_gpu():
        raise UncheckedError(f"Keras on {NAME} finds no CUDA device")
    cases = _few(quick)
    return [
        Way(
            f"{name}, on {NAME}",
            "",
            Path(partial(run, fused=fused), False, tolerances.PLAIN_FLOAT32),
            _served(cases, refuse),
        )
        for name, fused in (("as chosen", None), (_ARRAYS, False))
    ]


_FIND: dict[str, Callable[[str, bool], list[Way]]] = {
    KERNELS: _kernels,
    "torch": _torch,
    "jax": _jax,
    "keras": _keras,
}


def _few(quick: bool) -> list[Case]:
    """Cases for ways that take long for each."""
    wanted = sample.QUICK_HARD if quick else sample.SLOW_HARD
    return [*(sample.FEW[::2] if quick else sample.FEW), *wanted]


def _import(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise UncheckedError(f"{error}") from error
