"""What is measured: every case, its name for `--case`, and the bytes that it has to move."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

ROWS = (262144, 64)
IMAGE = (32, 256, 56, 56)
VOLUME = (8, 64, 16, 64, 64)
OFFSETS = (0.0, 1e2, 1e4, 1e6)  # means of the accuracy table, at deviation 1
ELEMENT = {"float32": 4, "bfloat16": 2}
LINE = 64  # bytes that memory hands out at a time


@dataclass(frozen=True)
class Case:
    """One shape and what is done with it.

    Attributes:
        name: for `--case`, the JSON and the targets.
        title: for readers.
        shape: of x, channels along axis 1.
        mode: "training" and "evaluation" are steps, forward and backward; "inference" is a
            forward pass in evaluation mode without autograd.
        channels_last: how x lies in memory.
        dtype: of x and y.
        padded: share of rows that a mask excludes, or None for no mask.
        activation: applied after the normalization, or None.
        residual: whether one is added before the activation.
        copied: whether plain copies of the same size are timed too.
        quick: whether `--quick` measures it.
        compiled: whether this library's layer is timed under torch.compile too.
    """

    name: str
    title: str
    shape: tuple[int, ...]
    mode: str = "training"
    channels_last: bool = False
    dtype: str = "float32"
    padded: float | None = None
    activation: str | None = None
    residual: bool = False
    copied: bool = False
    quick: bool = False
    compiled: bool = False

    @property
    def plain(self) -> bool:
        """Whether torch's layer does the same by itself."""
        return self.padded is None and self.activation is None

    @property
    def rival(self) -> str:
        """The variant that torch offers for the job."""
        return "torch" if self.padded is None else "pack"


_LARGE = (
    Case("rows", "(262144, 64)", ROWS, copied=True, quick=True, compiled=True),
    Case(
        "channels-last",
        "(32, 256, 56, 56), channels last",
        IMAGE,
        channels_last=True,
        copied=True,
    ),
    Case("channels-first", "(32, 256, 56, 56)", IMAGE, copied=True),
    Case("volume", "(8, 64, 16, 64, 64)", VOLUME, copied=True),
)
_OTHER_SHAPES = (
    Case("wide", "(4096, 1024)", (4096, 1024)),
    Case("three-channels", "(65536, 3)", (65536, 3)),
    Case("small", "(32, 64)", (32, 64), quick=True, compiled=True),
    Case("one-row", "(1, 4096), evaluation", (1, 4096), mode="evaluation", quick=True),
    Case("bfloat16", "(32, 256, 56, 56), bfloat16", IMAGE, dtype="bfloat16"),
)
_MASKED = (
    Case("mask-0", "(262144, 64), 0 % padded", ROWS, padded=0.0),
    Case("mask-50", "(262144, 64), 50 % padded", ROWS, padded=0.5, quick=True, compiled=True),
    Case("mask-95", "(262144, 64), 95 % padded", ROWS, padded=0.95),
    Case("mask-image", "(32, 256, 56, 56), 50 % padded", IMAGE, padded=0.5),
)
_INFERENCE = tuple(
    Case(
        f"inference-{case.name}",
        case.title,
        case.shape,
        mode="inference",
        channels_last=case.channels_last,
        copied=True,
        quick=case.quick,
        compiled=case.compiled,
    )
    for case in _LARGE
)
_ACTIVATED = (
    Case("relu", "(262144, 64), ReLU", ROWS, activation="relu"),
    Case("add-relu", "(262144, 64), add, ReLU", ROWS, activation="relu", residual=True, quick=True),
    Case("relu-image", "(32, 256, 56, 56), ReLU", IMAGE, activation="relu"),
    Case(
        "add-relu-image",
        "(32, 256, 56, 56), add, ReLU",
        IMAGE,
        activation="relu",
        residual=True,
    ),
)
CASES = (*_LARGE, *_OTHER_SHAPES, *_MASKED, *_ACTIVATED, *_INFERENCE)


def select_cases(names: list[str], quick: bool) -> list[Case]:
    """Cases whose name contains one of `names`, or all; with `quick` and no names, a few."""
    if names:
        return [case for case in CASES if any(name in case.name for name in names)]
    return [case for case in CASES if case.quick or not quick]


def count_bytes(case: Case, mask: Tensor | None) -> int:
    """Bytes between memory and processor that the job cannot do without.

    A training step reads x for the moments; x, and writes y; dy and x for the sums; dy and x, and
    writes dx. With a mask only y and dx are whole, and so is x for y. Of the rest, lines that
    hold a real row count, and the mask itself, three times.
    """
    elements = 1
    for size in case.shape:
        elements *= size
    passes: float = {"inference": 2, "evaluation": 6, "training": 8}[case.mode]
    if case.residual:  # the residual, y for its sign twice, and the residual's gradient
        passes += 4
    masks = 0
    if mask is not None:
        passes = 3 + 5 * _lines_with_real_rows(case, mask)
        masks = 3 * mask.numel()
    return int(passes * elements * ELEMENT[case.dtype]) + masks


def _lines_with_real_rows(case: Case, mask: Tensor) -> float:
    if case.channels_last or len(case.shape) == 2:  # a row is lines of its own
        return mask.float().mean().item()
    together = LINE // ELEMENT[case.dtype]
    return mask.reshape(-1, together).any(dim=1).float().mean().item()
