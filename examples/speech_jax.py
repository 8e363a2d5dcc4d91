"""Features of speech that do not depend on padding: a small network in JAX, with flax.

    python examples/speech_jax.py --out speech_jax.png

A Conformer without attention and feed-forward layers, two strided convolutions and a convolution
module, tells nine speakers apart. The network takes the mask as an argument, follows it through
its convolutions by `downsample_mask`, and hands it to its norms.

It prints how much an utterance's features change beside a longer one, and in front of 400 frames
of padding, with two norms that both get the mask. flax's takes its statistics of real frames, but
leaves numbers in the padding, which the next convolution reads. This library's leaves zeros there.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from _common import BLUE, RED, parse_options
from _speech import FEATURES, SPEAKERS, Batch, Result, Sample, batches, compare, load, pad, report
from batchnorm.jax import BatchNorm, downsample_mask

WIDTH, KERNEL, EPOCHS = 48, 7, 8
MOMENTUM = 0.9  # for so few steps

NORMS: dict[str, Callable[..., Any]] = {
    "flax.nnx": partial(nnx.BatchNorm, momentum=MOMENTUM),
    "batchnorm": partial(BatchNorm, momentum=MOMENTUM, padded_output="zero"),
}
COLOURS = {"flax.nnx": RED, "batchnorm": BLUE}


class Network(nnx.Module):
    """Two strided convolutions, a convolution module, the mean over real frames, a classifier."""

    def __init__(self, norm: Callable[..., Any], rngs: nnx.Rngs) -> None:
        # Both sides by number: how "SAME" splits its padding depends on the length of the batch.
        halve = partial(nnx.Conv, strides=2, padding=[(2, 2)], use_bias=False, rngs=rngs)
        self.first, self.second = halve(FEATURES, WIDTH, 5), halve(WIDTH, WIDTH, 5)
        self.norms = nnx.List([norm(WIDTH, rngs=rngs) for _ in range(3)])
        self.gate = nnx.Linear(WIDTH, 2 * WIDTH, rngs=rngs)
        options: dict[str, Any] = {"feature_group_count": WIDTH, "use_bias": False}
        self.depthwise = nnx.Conv(WIDTH, WIDTH, KERNEL, **options, rngs=rngs)
        self.out = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.scale = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.classifier = nnx.Linear(WIDTH, SPEAKERS, rngs=rngs)

    def __call__(self, x: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Logits (N, 9), and the features (N, L / 4, C) of frames (N, L, 12)."""
        for convolution, norm in ((self.first, self.norms[0]), (self.second, self.norms[1])):
            mask = downsample_mask(mask, window=5, stride=2, padding=2)
            real = mask[..., None]  # of x's rank, as flax's norm wants it
            x = nnx.silu(norm(convolution(x), mask=real))
        z = self.depthwise(jnp.where(real, nnx.glu(self.gate(x)), 0))
        x = self.scale(x + self.out(nnx.silu(self.norms[2](z, mask=real))))
        x = jnp.where(real, x, 0)
        return self.classifier(x.sum(axis=1) / real.sum(axis=1)), x


@nnx.jit
def step(model: Network, optimizer: nnx.Optimizer, batch: Batch) -> None:
    """A step of training."""

    def loss(model: Network) -> jax.Array:
        logits, _ = model(batch.frames, batch.mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.speakers).mean()

    optimizer.update(model, nnx.grad(loss)(model))


run = nnx.jit(lambda model, batch: model(batch.frames, batch.mask))


def train(
    model: Network, samples: list[Sample], tests: list[Sample], seed: int, epochs: int
) -> list[float]:
    """Test accuracy after each epoch, %."""
    optimizer = nnx.Optimizer(model, optax.adamw(2e-3), wrt=nnx.Param)
    rng, accuracy, test = np.random.default_rng(seed), [], pad(tests)
    longest = max(len(sample.frames) for sample in samples)
    for _ in range(epochs):
        model.train()
        for batch in batches(samples, rng, longest):  # one shape is compiled
            step(model, optimizer, batch)
        model.eval()
        right = run(model, test)[0].argmax(axis=1) == test.speakers
        accuracy.append(100 * float(right.mean()))
    return accuracy


def features(model: Network, batch: Batch, training: bool) -> np.ndarray:
    """The features (N, L / 4, C) of a batch."""
    model = nnx.clone(model)  # training moves the running statistics
    if training:
        model.train()
    else:
        model.eval()
    return np.asarray(run(model, batch)[1])


def main() -> None:
    """Train a network with each norm from the same weights, print and draw."""
    options = parse_options(__doc__, seeds=3)
    # A quick run compiles for longer than it computes.
    jax.config.update("jax_disable_most_optimizations", options.quick)
    samples, tests = load()
    epochs = 2 if options.quick else EPOCHS
    results: dict[str, list[Result]] = {name: [] for name in NORMS}
    for seed in range(options.seeds):
        for name, norm in NORMS.items():
            model = Network(norm, nnx.Rngs(seed))
            accuracy = train(model, samples, tests, seed, epochs)
            results[name].append(Result(accuracy, compare(partial(features, model), tests)))
    report(samples, results, COLOURS, options.out)


if __name__ == "__main__":
    main()
