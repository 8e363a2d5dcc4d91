"""Handwritten numbers of 1 to 12 digits, read column by column, in Keras on any backend.

    python examples/sequences.py --out sequences.png
    KERAS_BACKEND=jax python examples/sequences.py

Numbers are put together from scikit-learn's digits, with gaps of random width. A convolutional
network labels each column with its digit, or as a gap. Batches are padded to their longest
number, and most of a batch is padding.

It prints the accuracy at real columns with three norms: Keras's layer without a mask, since
convolutions drop it; Keras's layer with the mask; and this library's layer with the pair (x, mask).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import keras
import numpy as np
from sklearn.datasets import load_digits

from _common import BLUE, GREEN, RED, draw_runs, parse_options, plt, print_table, save, spread
from batchnorm.keras import BatchNormalization

WIDTH, BATCH, EPOCHS, TRAIN, TEST = 32, 16, 6, 600, 200
MULTIPLE = 32  # of padded lengths, so that few of them are compiled
GAP = 10  # the label of a column between digits
MOMENTUM = 0.9  # for so few steps


class Numbers(NamedTuple):
    """A padded batch; `mask` is 1 at real columns."""

    columns: np.ndarray  # (N, L, 8) float32
    mask: np.ndarray  # (N, L) bool
    labels: np.ndarray  # (N, L) int32


def write_number(images: np.ndarray, digits: np.ndarray, rng: np.random.Generator) -> Any:
    """A number's columns (L, 8) and their labels (L,)."""
    columns, labels = [], []
    for i in rng.integers(len(images), size=int(np.exp(rng.uniform(0, np.log(13))))):
        gap = int(rng.integers(0, 5))
        columns += [np.full((gap, 8), -1.0), images[i].T / 8 - 1]
        labels += [GAP] * gap + [int(digits[i])] * 8
    return np.concatenate(columns).astype(np.float32), np.array(labels, np.int32)


def pad(numbers: list[Any]) -> Numbers:
    """Zeros up to the longest number, and to a multiple."""
    length = -(-max(len(columns) for columns, _ in numbers) // MULTIPLE) * MULTIPLE
    n = len(numbers)
    batch = Numbers(np.zeros((n, length, 8), "float32"), *np.zeros((2, n, length), "int32"))
    for row, (columns, labels) in enumerate(numbers):
        batch.columns[row, : len(columns)] = columns
        batch.mask[row, : len(columns)] = 1
        batch.labels[row, : len(columns)] = labels
    return batch._replace(mask=batch.mask.astype(bool))


def batches(numbers: list[Any], rng: np.random.Generator) -> Iterator[Numbers]:
    """Shuffled batches, each as long as its longest number."""
    for chosen in rng.permutation(len(numbers))[: len(numbers) // BATCH * BATCH].reshape(-1, BATCH):
        yield pad([numbers[i] for i in chosen])


NORMS = {
    "keras": lambda x, mask: keras.layers.BatchNormalization(momentum=MOMENTUM)(x),
    "keras, mask=": lambda x, mask: keras.layers.BatchNormalization(momentum=MOMENTUM)(
        x, mask=mask
    ),
    "batchnorm": lambda x, mask: BatchNormalization(momentum=MOMENTUM)((x, mask)),
}
COLOURS = dict(zip(NORMS, (RED, GREEN, BLUE), strict=True))


def make_model(norm: Callable[[Any, Any], Any]) -> keras.Model:
    """Three convolutions along the columns; after each, padding is set to zero again."""
    columns, mask = keras.Input((None, 8)), keras.Input((None,), dtype="bool")
    x, real = columns, keras.ops.cast(mask, "float32")[..., None]
    for _ in range(3):
        x = keras.layers.Conv1D(WIDTH, 5, padding="same", use_bias=False)(x)
        x = keras.ops.relu(norm(x, mask)) * real
    model = keras.Model((columns, mask), keras.layers.Dense(GAP + 1)(x))
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.Adam(3e-3), loss)
    return model


def train(model: keras.Model, numbers: list[Any], test: Numbers, seed: int, epochs: int) -> Any:
    """After each epoch, the share of real test columns labelled right, %."""
    rng, found = np.random.default_rng(seed), []
    for _ in range(epochs):
        for columns, mask, labels in batches(numbers, rng):
            # Padding has no weight in the loss, whichever the norm.
            model.train_on_batch((columns, mask), labels, sample_weight=mask.astype("float32"))
        logits = model.predict_on_batch((test.columns, test.mask))
        right = logits.argmax(axis=-1) == test.labels
        found.append(100 * right[test.mask].mean())
    return found


def main() -> None:
    """Train a network with each norm, print and draw."""
    options = parse_options(__doc__, seeds=3)
    digits, rng = load_digits(), np.random.default_rng(0)
    order = rng.permutation(len(digits.images))
    parts = []  # numbers for testing are made of digits that training has not seen
    for chosen, count in ((order[:1300], TRAIN), (order[1300:], TEST)):
        pool = digits.images[chosen], digits.target[chosen]
        count = count // 6 if options.quick else count
        parts.append([write_number(*pool, rng) for _ in range(count)])
    numbers, tests = parts[0], pad(parts[1])
    share = np.mean([1 - batch.mask.mean() for batch in batches(numbers, rng)])
    print(f"Keras on {keras.backend.backend()}: {len(numbers)} numbers, {share:.0%} padding")
    epochs = 1 if options.quick else EPOCHS
    found: dict[str, list[list[float]]] = {name: [] for name in NORMS}
    for seed in range(options.seeds):
        for name, norm in NORMS.items():
            keras.utils.set_random_seed(seed)  # the same weights for each norm
            found[name].append(train(make_model(norm), numbers, tests, seed, epochs))
    rows = []
    for name, runs in found.items():
        first, last = np.array(runs)[:, [0, -1]].T
        rows.append([name, spread(first), spread(last)])
    print_table(["", "first epoch, %", "last epoch, %"], rows)
    draw(found, pad(parts[1][:12]), options.out)


def draw(found: dict[str, list[list[float]]], batch: Numbers, path: object) -> None:
    """A batch as the network sees it, and test accuracy by epoch."""
    figure, axes = plt.subplots(1, 2, figsize=(13, 4), layout="constrained", width_ratios=(1.5, 1))
    image = np.concatenate(
        [np.pad(c, ((0, 0), (0, 1)), constant_values=np.nan).T for c in batch.columns]
    )
    axes[0].imshow(image, cmap="gray_r", aspect="auto", interpolation="nearest")
    axes[0].set(title="A padded batch: 12 numbers; grey is padding", xlabel="column")
    axes[0].set_yticks([])
    for name, runs in found.items():
        line = "--" if name == "batchnorm" else "-"  # it covers the one before
        draw_runs(axes[1], runs, COLOURS[name], name, line)
    axes[1].set(title="Columns labelled right, mean and range of the seeds", xlabel="epoch")
    axes[1].set_ylabel("%")
    axes[1].legend(frameon=False)
    save(figure, path)


if __name__ == "__main__":
    main()
