"""Recordings of the vowels a and e by nine men, as sequences of 12 features (Kudo et al. 1999).

The data set JapaneseVowels of the UCI archive, as the package sktime ships it: linear prediction
analysis has made 12 cepstral coefficients of each frame, and an utterance has 7 to 29 frames.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import numpy as np

FEATURES, SPEAKERS = 12, 9
MOST = 8  # utterances that one sample strings together


class Sample(NamedTuple):
    """Frames (L, 12) float32, and the number of the speaker."""

    frames: np.ndarray
    speaker: int


class Batch(NamedTuple):
    """A padded batch; `mask` is True at real frames."""

    frames: np.ndarray  # (N, L, 12) float32
    mask: np.ndarray  # (N, L) bool
    speakers: np.ndarray  # (N,) int64


def load(part: str) -> list[Sample]:
    """The utterances of "TRAIN" (270) or "TEST" (370)."""
    found = importlib.util.find_spec("sktime")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("The recordings are in the package sktime: pip install sktime")
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "JapaneseVowels"
    lines = (folder / f"JapaneseVowels_{part}.ts").read_text().splitlines()
    rows = lines[lines.index("@data") + 1 :]
    return [_read(row) for row in rows if row]


def _read(row: str) -> Sample:
    """A line of the file: 12 lists of numbers and the speaker, between colons."""
    *features, speaker = row.split(":")
    frames = np.array([values.split(",") for values in features], np.float32)
    return Sample(frames.T.copy(), int(speaker) - 1)


def join(utterances: list[Sample], rng: np.random.Generator) -> list[Sample]:
    """As many samples of one to eight utterances of the same speaker, one after another."""
    found = []
    for first in utterances:
        count = int(np.exp(rng.uniform(0, np.log(MOST + 1))))
        others = [u.frames for u in utterances if u.speaker == first.speaker]
        more = [others[i] for i in rng.integers(len(others), size=count - 1)]
        found.append(Sample(np.concatenate([first.frames, *more]), first.speaker))
    return found


def pad(samples: list[Sample], frames: int = 0) -> Batch:
    """Zeros up to the longest sample, and `frames` more."""
    length = max(len(sample.frames) for sample in samples) + frames
    batch = Batch(
        np.zeros((len(samples), length, FEATURES), np.float32),
        np.zeros((len(samples), length), bool),
        np.array([sample.speaker for sample in samples]),
    )
    for row, sample in enumerate(samples):
        batch.frames[row, : len(sample.frames)] = sample.frames
        batch.mask[row, : len(sample.frames)] = True
    return batch
