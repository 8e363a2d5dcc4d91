"""Proof on first use: before the GPU's kernels serve a device, they compute some small cases.

They are compared with array code in float64. The verdict holds for the device, its driver, the
versions of torch, Triton and this library, and the kernels' own files; it is kept in the user's
cache folder. A case that is wrong, or that fails to compile, leaves the device to array code.

The proof runs in a thread of its own, where nothing of the caller's applies: no compiler that
traces, no graph that records, no autocast, no mode of gradients, no stream. Three callers cannot
wait for it and get array code unless there is a verdict: a CUDA graph that is being captured, in
which nothing else may run; a backward pass, whose thread the proof's own backward pass may need;
and `explain`, which computes nothing.
"""

from __future__ import annotations

import threading
import warnings
from pathlib import Path

import torch
from torch import Tensor

from batchnorm.kernels import explanation, proofs
from batchnorm.kernels.proofs import PASSED, Subject, Verdict, describe, name_schedule
from batchnorm.kernels.schedules import SCHEDULE, VARIABLE
from batchnorm.kernels.select import is_interpreting
from batchnorm.torch.call import Call
from batchnorm.torch.kernels.samples import SAMPLES, VISITED, compare
from batchnorm.torch.private import constant_in_graphs, not_compiling
from batchnorm.torch.recompute import in_backward
from batchnorm.torch.ways import array_code, eager_kernels

_Device = tuple[str, int | None]
_DRIVER = Path("/proc/driver/nvidia/version")


class _Proofs:
    """The verdicts of this process."""

    def __init__(self, setting: str) -> None:
        self.setting = setting
        # In the interpreter there is no card to prove: only where a setting asks for it.
        self.active = setting != "skip"
        self.on_cpu = self.active and setting != "" and is_interpreting()
        self._verdicts: dict[tuple[_Device, str], Verdict] = {}  # of a device in a schedule
        self._lock = threading.Lock()
        self._told = False

    def refuse(self, device: _Device) -> str | None:
        """The reason against the kernels on a device, or None."""
        verdict = self._find_known(device)
        if verdict is None:
            if explanation.is_asked():
                verdict = self._find_kept(device) or PASSED
            elif (reason := _find_hindrance(device)) is None:
                verdict = self._prove_once(device)
            elif (verdict := self._find_kept(device)) is None:
                self._tell_of_delay(reason)
                return f"no proof of the kernels on this device yet, and {reason}"
            else:  # without the lock, whose holder may wait for this thread
                self._settle(device, verdict)
        if verdict.passed:
            return None
        return f"the kernels are {describe(verdict)}"

    def describe(self, device: _Device) -> str:
        """The state of a device's kernels, for `explain`."""
        if not self.active:
            return "not proved on this device, as BATCHNORM_PROOF says"
        verdict = self._find_known(device) or self._find_kept(device)
        if verdict is None:
            return "not proved on this device yet; the first call does that"
        return f"on this device {describe(verdict)}"

    def describe_known(self) -> list[str]:
        """A line for each device with a verdict in this process."""
        return [
            f"{_name(device)}{name_schedule(schedule)}: {describe(verdict)}"
            for (device, schedule), verdict in self._verdicts.items()
        ]

    def _find_known(self, device: _Device) -> Verdict | None:
        return self._verdicts.get((device, SCHEDULE.name))

    def _find_kept(self, device: _Device) -> Verdict | None:
        return None if self.setting == "force" else _subject(device).read()

    def _prove_once(self, device: _Device) -> Verdict:
        with self._lock:
            verdict = self._find_known(device) or self._find_kept(device)
            if verdict is None:
                verdict, lasting = _prove_aside(device)
                if lasting:
                    _subject(device).write(verdict)
            self._settle(device, verdict)
        return verdict

    def _settle(self, device: _Device, verdict: Verdict) -> None:
        """Keep the verdict of this process, and tell once of a failure."""
        if self._find_known(device) is not None:
            return
        self._verdicts[device, SCHEDULE.name] = verdict
        if not verdict.passed:
            kernels = f"the GPU's kernels{name_schedule(SCHEDULE.name)}"
            remedy = f" {VARIABLE}=0 takes passes, which are proved apart." * SCHEDULE.visits
            warnings.warn(
                f"batchnorm: {kernels} are {describe(verdict)} on {_name(device)}. Please "
                "report this, with what `batchnorm info` and `batchnorm verify --device cuda` "
                f"print. BATCHNORM_PROOF=skip runs them all the same, =force proves again.{remedy}",
                RuntimeWarning,
                stacklevel=2,
            )

    def _tell_of_delay(self, reason: str) -> None:
        if not self._told:
            self._told = True
            warnings.warn(
                f"batchnorm: array code serves this call, since the GPU's kernels have not been "
                f"proved on this device yet, and {reason}. Run the layer once before that.",
                RuntimeWarning,
                stacklevel=2,
            )


PROOFS = _Proofs(proofs.find_setting())


def refuse(call: Call) -> str | None:
    """The reason against the GPU's kernels for a call that they could serve, or None."""
    x = call.tensors.x
    if x.is_cpu and not (PROOFS.on_cpu and _is_interpreted(call)):
        return None
    return _refuse(x.device.type, x.device.index) if PROOFS.active else None


def note(call: Call) -> str:
    """The state of the kernels that serve a call, for `explain`; "" on a CPU."""
    x = call.tensors.x
    if x.is_cpu and not (PROOFS.on_cpu and _is_interpreted(call)):
        return ""
    return _note(x.device.type, x.device.index)


def _is_interpreted(call: Call) -> bool:
    """True if a call on the CPU takes the GPU's kernels."""
    decision = call.decision
    return call.settings.fused is True if decision is None else decision.kernel == "triton"


@constant_in_graphs
def _refuse(kind: str, index: int | None) -> str | None:
    return PROOFS.refuse((kind, index))


@constant_in_graphs
def _note(kind: str, index: int | None) -> str:
    return PROOFS.describe((kind, index))


def _find_hindrance(device: _Device) -> str | None:
    """The reason why nothing can be proved now, or None."""
    if device[0] == "cuda" and torch.cuda.is_current_stream_capturing():
        return "a CUDA graph is being captured"
    return "a backward pass is running" if in_backward() else None


def _prove_aside(device: _Device) -> tuple[Verdict, bool]:
    """The verdict about a device, and whether it holds for later processes too."""
    found: list[tuple[Verdict, bool]] = []
    thread = threading.Thread(target=lambda: found.append(_prove(device)), daemon=True)
    with not_compiling():
        thread.start()
        thread.join()
    return found[0]


def _prove(device: _Device) -> tuple[Verdict, bool]:
    kind, index = device
    place = torch.device(kind) if index is None else torch.device(kind, index)
    for sample in (*SAMPLES, *(VISITED if SCHEDULE.visits else ())):
        try:
            error = compare(sample, _run_kernels, array_code.run, place)
        except Exception as raised:  # of compilers and drivers, whatever they raise
            text = " ".join(f"{type(raised).__name__}: {raised}".split())
            return Verdict(sample.name, text), not isinstance(raised, torch.OutOfMemoryError)
        if error:
            return Verdict(sample.name, error), True
    return PASSED, True


def _run_kernels(call: Call) -> Tensor:
    reason = eager_kernels.refuse(call)
    if reason is not None:
        raise RuntimeError(f"the kernels refuse the case: {reason}")
    return eager_kernels.run(call)


def _name(device: _Device) -> str:
    if device[0] == "cpu":
        return "Triton's interpreter"
    about = torch.cuda.get_device_properties(device[1])
    return f"{about.name}, compute capability {about.major}.{about.minor}"


def _subject(device: _Device) -> Subject:
    return proofs.make_subject(_name(device), _describe_driver(device))


def _describe_driver(device: _Device) -> str:
    if device[0] == "cpu":
        return "none"
    try:
        first = _DRIVER.read_text().splitlines()[0]
    except (OSError, IndexError):  # no Linux, or no NVIDIA
        first = "unknown"
    return " ".join(f"{first}; CUDA {torch.version.cuda}".split())
