"""The kinds of findings, with what each means and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["EXPLANATIONS", "LEVELS", "Explanation", "Finding", "Level"]

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One problem of one layer, or a note on it.

    Args:
        code: the kind, a key of `EXPLANATIONS`.
        level: "error" (evaluation gives wrong results), "warning" (it may), "note".
        message: one sentence with the figures.
        channels: the channels concerned, in ascending order; empty if all are.
    """

    code: str
    level: Level
    message: str
    channels: tuple[int, ...] = ()


class Explanation(NamedTuple):
    """The meaning of a kind of finding, and the remedy."""

    title: str
    meaning: str
    remedy: str


EXPLANATIONS = {
    "non-finite": Explanation(
        "Values that are not finite",
        "NaN or inf among the statistics or parameters reaches every output of that channel.",
        "Recalibrate the statistics with finite data. This library's layers leave out a batch that "
        "overflows, so that statistics stay finite in training.",
    ),
    "negative-variance": Explanation(
        "Negative variance",
        "No data has a negative variance. Rounding can make it negative if it is computed as "
        "E[x²] − E[x]² in float32.",
        "Recalibrate. Train with a layer that centres before it squares.",
    ),
    "never-trained": Explanation(
        "Statistics that were never trained",
        "The running mean is still 0 and the variance 1, so evaluation does not normalize.",
        "Train, recalibrate, or look for the checkpoint whose statistics were not loaded.",
    ),
    "padding-counted": Explanation(
        "Padding in the statistics",
        "The running statistics agree with the moments of all rows, padding included, not with "
        "those of the real rows.",
        "Pass the mask to the layer in training, then recalibrate with masks.",
    ),
    "drift": Explanation(
        "Evaluation differs from training",
        "The running statistics are not those of the batches.",
        "Recalibrate on training data. If it comes back after training: with small batches use "
        "renorm=True; if momentum is too slow for the length of training, use a faster one.",
    ),
    "non-finite-input": Explanation(
        "Batches that are not finite",
        "The layer was given NaN or inf at real rows.",
        "Look for the cause in the layers before it.",
    ),
    "padding-read": Explanation(
        "Padding that comes back",
        "The layer puts out values other than 0 at padding, and a layer behind it reads them: real "
        "outputs depend on the amount of padding, in evaluation too.",
        'Let it put out zeros there: padded_output="zero". Or multiply the input of the layer '
        "behind it by the mask.",
    ),
    "padding-in-batch": Explanation(
        "Padding in the batch's statistics",
        "In training, real outputs depend on the amount of padding.",
        "Pass the mask to the layer.",
    ),
    "dead-channels": Explanation(
        "Dead channels",
        "The channel hardly varies: its variance is small against eps. Evaluation multiplies any "
        "change of its input by up to |gamma|/sqrt(eps).",
        "Prune these channels, or look for the cause: a dead activation, a weight decayed to 0, a "
        "constant input.",
    ),
    "exploding-gain": Explanation(
        "Exploding gain",
        "gamma/sqrt(var + eps) is so large that rounding errors of the input show in the output.",
        "Evaluate in float32; look at gamma's learning rate and weight decay.",
    ),
    "large-offset": Explanation(
        "Mean far from 0",
        "The mean is many standard deviations away from 0. A layer that computes E[x²] − E[x]² in "
        "float32 loses digits of the variance; half precision loses digits of the values.",
        "Use a layer that centres twice, as this library's do, or subtract a constant before it.",
    ),
    "half-statistics": Explanation(
        "Statistics in half precision",
        "A running average stops moving once its steps round to nothing.",
        "Keep the statistics in float32; this library's layers do, even when the model is cast.",
    ),
    "no-statistics": Explanation(
        "No running statistics",
        "Evaluation normalizes each batch by itself: its result depends on the batch.",
        "Nothing, if that is meant.",
    ),
    "frozen": Explanation(
        "Frozen",
        "Training normalizes by the running statistics, as evaluation does: they cannot differ.",
        "Nothing, if that is meant.",
    ),
    "unfit-mask": Explanation(
        "Masks of another shape",
        "The layer's input has other rows than the mask, so that padding was counted.",
        "Give the layer its own mask.",
    ),
    "unused": Explanation(
        "Never run",
        "The layer was not called while the batches ran.",
        "Nothing, if that is meant.",
    ),
    "padding": Explanation(
        "Padded batches",
        "The statistics that counting the padded rows would give.",
        "Nothing: the mask keeps them out.",
    ),
}
