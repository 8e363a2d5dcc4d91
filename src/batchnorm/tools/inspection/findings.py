"""The kinds of findings, with what each means and what to do about it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

__all__ = ["EXPLANATIONS", "LEVELS", "Explanation", "Finding", "Level"]

Level = Literal["error", "warning", "note"]
LEVELS: tuple[Level, ...] = ("error", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong with one layer, or worth knowing.

    Args:
        code: which kind, a key of `EXPLANATIONS`.
        level: "error" (evaluation gives wrong results), "warning" (it may), "note".
        message: what was found, in one sentence.
        channels: the channels that it is about, in ascending order; empty if it is about all.
    """

    code: str
    level: Level
    message: str
    channels: tuple[int, ...] = ()


class Explanation(NamedTuple):
    """What a kind of finding means, and what to do about it."""

    title: str
    meaning: str
    remedy: str


EXPLANATIONS = {
    "non-finite": Explanation(
        "Values that are not finite",
        "NaN or inf among the statistics or parameters reaches every output of that channel.",
        "Recalibrate the statistics with finite data. They stay finite in training when a batch "
        "that overflows is left out, as this library's layers do.",
    ),
    "negative-variance": Explanation(
        "Negative variance",
        "No data has one. A variance computed as E[x²] − E[x]² in float32 can turn out negative.",
        "Recalibrate. Train with a layer that centres before it squares.",
    ),
    "never-trained": Explanation(
        "Statistics that were never trained",
        "The running mean is still 0 and the variance 1, so evaluation does not normalize.",
        "Train, recalibrate, or look for the checkpoint whose statistics were not loaded.",
    ),
    "padding-counted": Explanation(
        "Padding in the statistics",
        "The running statistics agree with the moments of all rows, not with those of real rows.",
        "Pass the mask to the layer in training, then recalibrate with masks.",
    ),
    "drift": Explanation(
        "Evaluation differs from training",
        "The running statistics are not those of the batches.",
        "Recalibrate on training data. If it comes back: small batches ask for renorm=True, a "
        "momentum too slow for the length of training for a faster one.",
    ),
    "non-finite-input": Explanation(
        "Batches that are not finite",
        "The layer was given NaN or inf at real rows.",
        "Look at what comes before the layer.",
    ),
    "dead-channels": Explanation(
        "Dead channels",
        "The channel hardly varies, so that eps, not the variance, decides its scale. Any change "
        "of its input in evaluation is multiplied by up to |gamma|/sqrt(eps).",
        "Prune them, or look for the cause: a dead activation, a weight decayed to 0, an input "
        "that is constant.",
    ),
    "exploding-gain": Explanation(
        "Exploding gain",
        "gamma/sqrt(var + eps) is so large that rounding of the input shows in the output.",
        "Evaluate in float32; look at gamma's learning rate and weight decay.",
    ),
    "large-offset": Explanation(
        "Mean far from 0",
        "The mean is many deviations away. A layer that computes E[x²] − E[x]² in float32 loses "
        "its variance's digits, half precision loses the values themselves.",
        "Use a layer that centres twice, as this library's do; subtract a constant before.",
    ),
    "half-statistics": Explanation(
        "Statistics in half precision",
        "A running average stops where its step rounds to nothing.",
        "Keep the statistics in float32, as this library's layers do under any cast.",
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
        "What the statistics would be if the padded rows were counted.",
        "Nothing: the mask keeps them out.",
    ),
}
