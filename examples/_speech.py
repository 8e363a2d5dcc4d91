"""Shared parts of the examples on speech: recordings, batches, changes by padding, pictures.

The recordings are of the vowels a and e by nine men, as sequences of 12 features (Kudo et al.
1999): the data set JapaneseVowels of the UCI archive, as the package sktime ships it. Linear
prediction analysis has made 12 cepstral coefficients of each frame, and an utterance has 7 to 29
frames.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from _common import draw_runs, plt, print_table, save, spread

FEATURES, SPEAKERS = 12, 9
MOST = 8  # utterances that one sample strings together
BATCH, MORE = 32, 400  # samples; frames of padding that a comparison adds
STRIDE = 4  # of the networks' features, in frames


class Sample(NamedTuple):
    """Frames (L, 12) float32, and the number of the speaker."""

    frames: np.ndarray
    speaker: int


class Batch(NamedTuple):
    """A padded batch; `mask` is True at real frames."""

    frames: np.ndarray  # (N, L, 12) float32
    mask: np.ndarray  # (N, L) bool
    speakers: np.ndarray  # (N,) int64


class Result(NamedTuple):
    """A trained network: test accuracy after each epoch, %, and `compare`'s changes."""

    accuracy: list[float]
    changes: dict[str, np.ndarray]


def load() -> tuple[list[Sample], list[Sample]]:
    """Samples to train and to test with: one to eight utterances of a speaker each."""
    rng = np.random.default_rng(0)
    return _join(_read_part("TRAIN"), rng), _join(_read_part("TEST"), rng)


def _read_part(part: str) -> list[Sample]:
    """The utterances of "TRAIN" (270) or "TEST" (370)."""
    found = importlib.util.find_spec("sktime")
    if found is None or not found.submodule_search_locations:
        raise SystemExit("The recordings are in the package sktime: pip install sktime")
    folder = Path(found.submodule_search_locations[0]) / "datasets" / "data" / "JapaneseVowels"
    lines = (folder / f"JapaneseVowels_{part}.ts").read_text().splitlines()
    rows = lines[lines.index("@data") + 1 :]
    return [_read_row(row) for row in rows if row]


def _read_row(row: str) -> Sample:
    """A line of the file: 12 lists of numbers and the speaker, between colons."""
    *features, speaker = row.split(":")
    frames = np.array([values.split(",") for values in features], np.float32)
    return Sample(frames.T.copy(), int(speaker) - 1)


def _join(utterances: list[Sample], rng: np.random.Generator) -> list[Sample]:
    """As many samples of one to eight utterances of the same speaker, one after another."""
    found = []
    for first in utterances:
        count = int(np.exp(rng.uniform(0, np.log(MOST + 1))))
        others = [u.frames for u in utterances if u.speaker == first.speaker]
        more = [others[i] for i in rng.integers(len(others), size=count - 1)]
        found.append(Sample(np.concatenate([first.frames, *more]), first.speaker))
    return found


def pad(samples: list[Sample], more: int = 0, multiple: int = 1) -> Batch:
    """Zeros up to the longest sample, and `more` frames, and a multiple of frames."""
    length = max(len(sample.frames) for sample in samples) + more
    length = -(-length // multiple) * multiple
    batch = Batch(
        np.zeros((len(samples), length, FEATURES), np.float32),
        np.zeros((len(samples), length), bool),
        np.array([sample.speaker for sample in samples]),
    )
    for row, sample in enumerate(samples):
        batch.frames[row, : len(sample.frames)] = sample.frames
        batch.mask[row, : len(sample.frames)] = True
    return batch


def batches(samples: list[Sample], rng: np.random.Generator, multiple: int = 1) -> Iterator[Batch]:
    """All samples in random order, but a rest that fills no batch."""
    order = rng.permutation(len(samples))
    for first in range(0, len(order) - BATCH + 1, BATCH):
        yield pad([samples[i] for i in order[first : first + BATCH]], multiple=multiple)


def compare(
    features: Callable[[Batch, bool], np.ndarray], samples: list[Sample]
) -> dict[str, np.ndarray]:
    """The largest change of a sample's features at each position, by what is changed.

    `features(batch, training)` of shape (N, L / 4, C) must leave the network as it was.
    """
    by_length = sorted(samples, key=lambda sample: len(sample.frames))
    own, longest = by_length[len(samples) // 2], by_length[-1]
    real = -(-len(own.frames) // STRIDE)

    def run(chosen: list[Sample], more: int = 0, training: bool = False) -> np.ndarray:
        return features(pad(chosen, more), training)[0, :real]

    alone, batch = run([own]), [own, *samples[:15]]
    changes = {
        "beside a longer one": run([own, longest]) - alone,
        f"{MORE} more frames": run([own], MORE) - alone,
        f"{MORE} more, in training": run(batch, MORE, True) - run(batch, 0, True),
    }
    return {case: np.abs(change).max(axis=1) for case, change in changes.items()}


def report(
    samples: list[Sample],
    results: dict[str, list[Result]],
    colours: dict[str, str],
    path: Path | None,
) -> None:
    """Print the data's sizes and a row for each norm, with a result for each seed; draw them."""
    lengths = [len(sample.frames) for sample in samples]
    padding = [1 - batch.mask.mean() for batch in batches(samples, np.random.default_rng(0))]
    print(
        f"{len(samples)} samples of {min(lengths)} to {max(lengths)} frames; "
        f"{np.mean(padding):.0%} of a batch is padding"
    )
    print("largest change of an utterance's features, and test accuracy in %")
    cases = list(next(iter(results.values()))[0].changes)
    rows = []
    for name, found in results.items():
        largest = [max(result.changes[case].max() for result in found) for case in cases]
        accuracy = spread([result.accuracy[-1] for result in found])
        rows.append([name, *(f"{change:.1e}" for change in largest), accuracy])
    print_table(["", *cases, "accuracy"], rows)
    save(_draw(results, cases[1:], colours), path)


def _draw(results: dict[str, list[Result]], cases: list[str], colours: dict[str, str]) -> Any:
    """The changes over an utterance's frames, of the first seed, and the accuracy."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for name, found in results.items():
        for axis, case in zip(axes, cases, strict=False):
            change = np.maximum(found[0].changes[case], 1e-8)  # 0 is not on the scale
            frames = STRIDE * np.arange(len(change))
            axis.semilogy(frames, change, "o-", color=colours[name], label=name)
        draw_runs(axes[2], [result.accuracy for result in found], colours[name], name)
    for axis, title in zip(axes, ("evaluation", "training"), strict=False):
        axis.axhline(1e-5, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=f"{MORE} more frames of padding, {title}", xlabel="frame of the utterance")
        axis.set(ylabel="largest change of its features", ylim=(5e-9, 20))
    axes[2].set(title="Test accuracy", xlabel="epoch", ylabel="%")
    for axis in axes:
        axis.legend(frameon=False)
    return figure
