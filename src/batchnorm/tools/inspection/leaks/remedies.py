"""The causes of leaks by kind of layer, and what to do about each."""

from __future__ import annotations

from typing import NamedTuple

from batchnorm.tools.frameworks.records import Called
from batchnorm.tools.text import format_number, printable

__all__ = ["Circumstances", "explain"]


class Circumstances(NamedTuple):
    """The circumstances of a leak.

    Attributes:
        layer: the one that leaks.
        between: as in `Leak`.
        padding: largest absolute value of its inputs at padding; None where it is not known.
        norm: the last batch norm before it, if zeros at the padding of batch norms' outputs mend
            the leak; or "".
        other: the leak shows with other values in the batch's padding only.
    """

    layer: Called
    between: tuple[str, str] | None
    padding: float | None
    norm: str
    other: bool


# Parts of classes' names, and the kinds of layers that they mean; the first that fits counts.
_KINDS = (
    (("attention", "attn"), "attention"),
    (("conv",), "convolution"),
    (("pool",), "pooling"),
    (("lstm", "gru", "rnn", "bidirectional"), "recurrence"),
    (("norm",), "normalization"),
)


def explain(found: Circumstances) -> tuple[str, str]:
    """The cause of a leak, and the remedy."""
    if found.layer.norm and found.between is None:
        return _STATISTICS
    if found.other:
        return _FILLING
    subject = "It" if found.between is None else f"Its own code {_place(found.between)}"
    if found.norm:
        return _explain_norm(subject, found)
    kind = _kind(found.layer)
    if kind == "attention" or found.between is None:
        return _BY_KIND[kind]
    return (
        f"{subject} mixes positions.",
        "Keep padding out of what that code reads: a mask for a softmax or a mean over positions, "
        "zeros at padding before a convolution.",
    )


def _explain_norm(subject: str, found: Circumstances) -> tuple[str, str]:
    most = f", up to {format_number(found.padding, 2)}," if found.padding else ""
    return (
        f"{subject} reads padding that is not zero{most} behind the batch norm "
        f"{printable(found.norm)}.",
        'Let that batch norm put out zeros there: padded_output="zero" on this library\'s layer, '
        'or padding_mask(mask, padded_output="zero"). Or multiply the input of the layer that '
        "reads it by the mask.",
    )


_STATISTICS = (
    "It counts the padding in the batch's statistics.",
    "Give it the mask: mask= on this library's layer, or padding_mask(mask) around the call.",
)
_FILLING = (
    "It reads the padding of the batch, which is harmless only while it holds the filling.",
    "Fill padding with the same value always, or set the layer's input to 0 there: x * mask.",
)
_BY_KIND = {
    "attention": (
        "It attends to padding.",
        "Pass it the attention mask (or key padding mask), with padded keys left out.",
    ),
    "convolution": (
        "It reads padding that is not zero.",
        "Set its input to 0 at padding, for instance x * mask.",
    ),
    "pooling": (
        "It reduces over padding.",
        "Reduce over real positions only: sum x * mask and divide by the mask's sum.",
    ),
    "normalization": (
        "Its statistics count the padding.",
        "Give it the mask, or normalize over channels only.",
    ),
    "recurrence": (
        "Its state runs through the padding.",
        "Give it the mask, or torch's pack_padded_sequence.",
    ),
    "": (
        "Its outputs at real positions depend on padding.",
        "Give it the mask, or keep padding out of what it reads.",
    ),
}


def _kind(layer: Called) -> str:
    name = layer.kind.lower()
    return next((kind for parts, kind in _KINDS if any(part in name for part in parts)), "")


def _place(between: tuple[str, str]) -> str:
    before, after = (printable(name) for name in between)
    if before and after:
        return f"between {before} and {after}"
    if after:
        return f"before {after}"
    return f"behind {before}" if before else "in no layer"
