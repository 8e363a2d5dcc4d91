"""Small batches in JAX: plain batch norm, renormalization and ghost batches, compared.

    python examples/small_batches.py --out small_batches.png

A small perceptron learns scikit-learn's digits, with batches of 2, 4, 8 and 32. Each kind of
norm at each size gets the learning rate that is best on validation digits, the same number of
digits to learn from, and running statistics over the same number of digits. All networks of a
cell, a learning rate and a seed each, train at once under `jax.vmap`.

It prints the test accuracy in evaluation mode. "Ghost" uses batches of 32, normalized in groups of
2, 4 or 8.
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
from sklearn.datasets import load_digits

from _common import BLUE, GREEN, GREY, RED, deviation, parse_options, plt, print_table, save, spread
from batchnorm.jax import BatchNorm

SIZES, LARGEST = (2, 4, 8, 32), 32
WIDTH, EPOCHS, MEMORY = 64, 6, 400  # digits that the running statistics remember
RATES = (3e-4, 1e-3, 3e-3, 1e-2)
CLIPPING = {"rmin": 1 / 3, "rmax": 3.0, "dmax": 5.0}  # where Ioffe's schedule ends
COLOURS = {"plain": RED, "renorm": BLUE, "ghost": GREEN, "none": GREY}


def make_model(norm: Callable[..., Any], rngs: nnx.Rngs) -> nnx.Sequential:
    """Images (N, 64) to logits (N, 10), with a norm after each of two hidden layers."""
    return nnx.Sequential(
        *(nnx.Linear(64, WIDTH, rngs=rngs), norm(WIDTH, rngs=rngs), nnx.relu),
        *(nnx.Linear(WIDTH, WIDTH, rngs=rngs), norm(WIDTH, rngs=rngs), nnx.relu),
        nnx.Linear(WIDTH, 10, rngs=rngs),
    )


def make_norm(kind: str, size: int) -> tuple[Callable[..., Any], int]:
    """The layer, and the batch size, for statistics over `size` samples."""
    if kind == "none":
        return lambda width, rngs: lambda x: x, size
    batch = LARGEST if kind == "ghost" else size
    options: dict[str, Any] = {"momentum": 1.0 - batch / MEMORY}
    if kind == "ghost":
        options["virtual_batch_size"] = size
    if kind == "renorm":
        options |= {"renorm": True, "renorm_clipping": CLIPPING}
        options["renorm_momentum"] = options["momentum"]
    return partial(BatchNorm, **options), batch


def load() -> dict[str, tuple[jax.Array, jax.Array]]:
    """Images from -1 to 1, and labels."""
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.data))
    images = jnp.asarray(digits.data[order] / 8 - 1, jnp.float32)
    labels = jnp.asarray(digits.target[order], jnp.int32)
    bounds = {"train": (0, 960), "validation": (960, 1300), "test": (1300, 1797)}
    return {name: (images[a:b], labels[a:b]) for name, (a, b) in bounds.items()}


def train(
    graph: Any, data: dict, parameters: Any, rest: Any, order: jax.Array, rate: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Validation and test accuracy, %, of one network trained on batches (steps, N) of indices."""
    images, labels = data["train"]
    optimizer = optax.adam(rate)

    def step(state: Any, chosen: jax.Array) -> tuple[Any, None]:
        parameters, rest, moments = state

        def loss(parameters: Any) -> Any:
            model = nnx.merge(graph, parameters, rest, copy=True)
            found = model(images[chosen])
            error = optax.softmax_cross_entropy_with_integer_labels(found, labels[chosen])
            return error.mean(), nnx.state(model, nnx.Not(nnx.Param))  # statistics have moved

        gradient, rest = jax.grad(loss, has_aux=True)(parameters)
        updates, moments = optimizer.update(gradient, moments)
        return (optax.apply_updates(parameters, updates), rest, moments), None

    state = parameters, rest, optimizer.init(parameters)
    (parameters, rest, _), _ = jax.lax.scan(step, state, order)
    trained = nnx.merge(graph, parameters, rest)
    trained.eval()
    validation, test = (data[name] for name in ("validation", "test"))
    found = [trained(images).argmax(axis=1) == labels for images, labels in (validation, test)]
    return 100 * found[0].mean(), 100 * found[1].mean()


def compare(kind: str, size: int, epochs: int, seeds: int, data: dict) -> tuple[float, np.ndarray]:
    """The best learning rate, and test accuracy by seed with it."""
    norm, batch = make_norm(kind, size)
    models = [nnx.split(make_model(norm, nnx.Rngs(seed)), nnx.Param, ...) for seed in range(seeds)]
    graphs, *states = zip(*models, strict=True)
    parameters, rest = (jax.tree.map(lambda *a: jnp.stack(a), *found) for found in states)
    count, rng = len(data["train"][0]), np.random.default_rng(0)
    orders = [[rng.permutation(count) for _ in range(epochs)] for _ in range(seeds)]
    order = jnp.asarray(np.reshape(orders, (seeds, -1, batch)))  # (seeds, steps, N)
    by_seed = jax.vmap(partial(train, graphs[0], data), in_axes=(0, 0, 0, None))
    by_rate = jax.jit(jax.vmap(by_seed, in_axes=(None, None, None, 0)))
    validation, test = by_rate(parameters, rest, order, jnp.asarray(RATES))  # (rates, seeds)
    best = int(validation.mean(axis=1).argmax())
    return RATES[best], np.asarray(test[best])


def main() -> None:
    """Train every cell, print and draw."""
    options = parse_options(__doc__, seeds=8)
    data, epochs = load(), 1 if options.quick else EPOCHS
    cells = [(size, kind) for size in ((8,) if options.quick else SIZES) for kind in COLOURS]
    found: dict[str, dict[int, np.ndarray]] = {kind: {} for kind in COLOURS}
    rows = []
    for size, kind in cells:
        if kind == "ghost" and size == LARGEST:
            continue  # one group is no ghost batch
        rate, found[kind][size] = compare(kind, size, epochs, options.seeds, data)
        batch = str(LARGEST if kind == "ghost" else size)
        rows.append([kind, batch, str(size), f"{rate:g}", spread(found[kind][size], ".2f")])
    print_table(["norm", "batch", "statistics over", "learning rate", "test accuracy, %"], rows)
    draw(found, options.out)


def draw(found: dict[str, dict[int, np.ndarray]], path: object) -> None:
    """Mean and standard deviation over the seeds."""
    figure, axis = plt.subplots(figsize=(7.5, 4.2), layout="constrained")
    labels = {"ghost": f"ghost batches of a batch of {LARGEST}", "none": "no norm"}
    for place, (kind, cells) in enumerate(found.items()):
        x = np.array(list(cells)) * 1.03 ** (place - 1.5)  # side by side
        mean, error = ([f(accuracy) for accuracy in cells.values()] for f in (np.mean, deviation))
        look = {"color": COLOURS[kind], "label": labels.get(kind, kind), "capsize": 3}
        axis.errorbar(x, mean, error, marker="o", markersize=5, **look)
    axis.set_xscale("log", base=2)
    axis.set_xticks(SIZES, [str(size) for size in SIZES])
    axis.set(title="Handwritten digits: mean and standard deviation of the seeds")
    axis.set(xlabel="samples that a statistic is taken over", ylabel="test accuracy, %")
    axis.grid(axis="y", alpha=0.3)
    axis.legend(frameon=False)
    save(figure, path)


if __name__ == "__main__":
    main()
