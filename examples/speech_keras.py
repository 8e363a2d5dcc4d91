"""Features of speech that do not depend on padding: a small network in Keras, on any backend.

    python examples/speech_keras.py --out speech_keras.png
    KERAS_BACKEND=jax python examples/speech_keras.py

A Conformer without attention and feed-forward layers, two strided convolutions and a convolution
module, tells nine speakers apart. Convolutions drop the mask that Keras hands from layer to layer;
`Remask` gives it back, for the norms and for the mean over frames.

It prints how much an utterance's features change beside a longer one, and in front of 400 frames
of padding, with two norms that both get the mask. Keras's takes its statistics of real frames, but
leaves numbers in the padding, which the next convolution reads. This library's leaves zeros there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import keras
import numpy as np
from keras import layers, ops

from _common import BLUE, RED, parse_options
from _speech import FEATURES, SPEAKERS, Batch, Result, Sample, batches, compare, load, pad, report
from batchnorm.keras import BatchNormalization, Remask

WIDTH, KERNEL, EPOCHS = 48, 7, 8
MOMENTUM = 0.9  # for so few steps

NORMS: dict[str, Callable[[], Any]] = {
    "keras.layers": partial(layers.BatchNormalization, momentum=MOMENTUM),
    "batchnorm": partial(BatchNormalization, momentum=MOMENTUM, padded_output="zero"),
}
COLOURS = {"keras.layers": RED, "batchnorm": BLUE}


def make_models(norm: Callable[[], Any]) -> tuple[keras.Model, keras.Model]:
    """Models of frames (N, L, 12) and mask: the features (N, L / 4, C), and logits (N, 9)."""
    inputs = frames, mask = keras.Input((None, FEATURES)), keras.Input((None,), dtype="bool")
    x, masked = frames, mask
    for _ in range(2):
        # Both sides by number: how "same" splits its padding depends on the length of the batch.
        x = layers.ZeroPadding1D(2)(x)
        x = layers.Conv1D(WIDTH, 5, strides=2, use_bias=False)(x)
        masked = Remask(5, strides=2, padding="same")([x, masked])
        x = ops.silu(norm()(masked))
    z = ops.glu(layers.Dense(2 * WIDTH)(x))
    z = ops.where(mask[:, ::4, None], z, 0.0)
    z = layers.DepthwiseConv1D(KERNEL, padding="same", use_bias=False)(z)
    z = ops.silu(norm()(Remask()([z, masked])))
    x = layers.LayerNormalization()(x + layers.Dense(WIDTH)(z))
    mean = layers.GlobalAveragePooling1D()(Remask()([x, masked]))
    return keras.Model(inputs, x), keras.Model(inputs, layers.Dense(SPEAKERS)(mean))


def train(
    model: keras.Model, samples: list[Sample], tests: list[Sample], seed: int, epochs: int
) -> list[float]:
    """Test accuracy after each epoch, %."""
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(2e-3), loss)
    rng, accuracy, test = np.random.default_rng(seed), [], pad(tests)
    longest = max(len(sample.frames) for sample in samples)
    for _ in range(epochs):
        for batch in batches(samples, rng, longest):  # one shape is compiled
            model.train_on_batch((batch.frames, batch.mask), batch.speakers)
        logits = model.predict_on_batch((test.frames, test.mask))
        accuracy.append(100 * float((logits.argmax(axis=1) == test.speakers).mean()))
    return accuracy


def features(model: keras.Model, batch: Batch, training: bool) -> np.ndarray:
    """The features (N, L / 4, C) of a batch."""
    variables = model.trainable_variables, model.non_trainable_variables
    inputs = batch.frames, batch.mask
    found, _ = model.stateless_call(*variables, inputs, training=training)  # moves no statistics
    return ops.convert_to_numpy(found)


def main() -> None:
    """Train a network with each norm from the same weights, print and draw."""
    options = parse_options(__doc__, seeds=3)
    samples, tests = load()
    epochs = 2 if options.quick else EPOCHS
    results: dict[str, list[Result]] = {name: [] for name in NORMS}
    for seed in range(options.seeds):
        for name, norm in NORMS.items():
            keras.utils.set_random_seed(seed)
            encoder, classifier = make_models(norm)
            accuracy = train(classifier, samples, tests, seed, epochs)
            results[name].append(Result(accuracy, compare(partial(features, encoder), tests)))
    print(f"Keras on {keras.backend.backend()}")
    report(samples, results, COLOURS, options.out)


if __name__ == "__main__":
    main()
