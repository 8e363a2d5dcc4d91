"""Fine-tuning with frozen batch norms, in PyTorch.

    python examples/fine_tuning.py --out fine_tuning.png

A convolutional network learns the digits 0 to 4 of scikit-learn. Then it gets a new head and a few
images of 5 to 9, in batches of 4 and with fainter ink. Either the head alone is trained or the
whole network, with moving statistics or with statistics that `freeze()` holds.

Result: with fixed weights and moving statistics, the body still changes, and its accuracy on the
old digits falls. A frozen body keeps every bit. The cost: frozen statistics are not those of the
new images. `train()` leaves a frozen layer frozen; a layer that was put into evaluation mode by
hand would silently return to training.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from _common import BLUE, RED, parse_options, plt, print_table, save, spread
from batchnorm.torch import BatchNorm2d

WIDTH, OLD_EPOCHS, NEW_EPOCHS = 16, 10, 20
IMAGES, BATCH = 40, 4  # for fine-tuning
FAINT = 0.5  # the ink of the new digits
METHODS = {  # name: train the body, freeze the statistics
    "head only, statistics move": (False, False),
    "head only, frozen": (False, True),
    "everything, statistics move": (True, False),
    "everything, frozen": (True, True),
}
Data = tuple[Tensor, Tensor]


def make_body() -> nn.Sequential:
    """Images (N, 1, 8, 8) to features (N, 2 * WIDTH)."""
    return nn.Sequential(
        *(nn.Conv2d(1, WIDTH, 3, padding=1, bias=False), BatchNorm2d(WIDTH), nn.ReLU()),
        *(nn.Conv2d(WIDTH, WIDTH, 3, padding=1, bias=False), BatchNorm2d(WIDTH), nn.ReLU()),
        nn.MaxPool2d(2),
        *(nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1, bias=False), BatchNorm2d(2 * WIDTH)),
        *(nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    )


def load(seed: int) -> tuple[Data, Data, Data, Data]:
    """Digits 0 to 4 for training and testing, then 5 to 9; labels count from 0 in both."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.images))
    ink = torch.from_numpy(digits.images[order]).float()[:, None] / 16
    labels = torch.from_numpy(digits.target[order])
    old, new = labels < 5, labels >= 5
    images = torch.where(new[:, None, None, None], FAINT * ink, ink)
    return (
        (images[old][:600], labels[old][:600]),
        (images[old][600:], labels[old][600:]),
        (images[new][:IMAGES], labels[new][:IMAGES] - 5),
        (images[new][IMAGES:], labels[new][IMAGES:] - 5),
    )


def train(model: nn.Module, data: Data, batch: int, epochs: int, rate: float, seed: int) -> None:
    """Adam on the parameters that require a gradient."""
    images, labels = data
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=rate)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(images), generator=order).split(batch):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images[chosen]), labels[chosen]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(body: nn.Module, head: nn.Module, data: Data) -> float:
    """The share of images labelled right in evaluation mode, %."""
    body.eval()
    return 100 * (head(body(data[0])).argmax(dim=1) == data[1]).double().mean().item()


def fine_tune(body: nn.Module, data: Data, method: str, epochs: int, seed: int) -> nn.Module:
    """Train a new head on `body`, and perhaps the body too; return the head."""
    train_body, frozen = METHODS[method]
    torch.manual_seed(seed)
    head = nn.Linear(2 * WIDTH, 5)
    body.requires_grad_(train_body)
    if frozen:
        for layer in body.modules():
            if isinstance(layer, BatchNorm2d):
                layer.freeze()
    train(nn.Sequential(body, head), data, BATCH, epochs, 3e-3, seed)
    return head


def main() -> None:
    """Fine-tune a network by each method, print and draw."""
    options = parse_options(__doc__, seeds=10)
    torch.set_num_threads(1)  # small layers gain nothing from more, and digits depend on it
    old_epochs, new_epochs = (1, 2) if options.quick else (OLD_EPOCHS, NEW_EPOCHS)
    before: list[float] = []
    found: dict[str, list[tuple[float, float]]] = {method: [] for method in METHODS}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        old_train, old_test, new_train, new_test = load(seed)
        trained, old_head = make_body(), nn.Linear(2 * WIDTH, 5)
        train(nn.Sequential(trained, old_head), old_train, 32, old_epochs, 3e-3, seed)
        before.append(accuracy(trained, old_head, old_test))
        for method in METHODS:
            body = copy.deepcopy(trained)
            new_head = fine_tune(body, new_train, method, new_epochs, seed)
            pair = accuracy(body, new_head, new_test), accuracy(body, old_head, old_test)
            found[method].append(pair)
    print(f"before fine-tuning, 0 to 4: {spread(before)} %")
    rows = [[m, *(spread(values) for values in zip(*found[m], strict=True))] for m in METHODS]
    print_table(["", "5 to 9 (new), %", "0 to 4 (old head), %"], rows)
    draw(found, before, options.out)


def draw(found: dict[str, list[tuple[float, float]]], before: list[float], path: object) -> None:
    """A dot for each seed, a bar for the mean."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.6), layout="constrained", sharey=True)
    titles = "The new digits, 5 to 9", "The old ones, 0 to 4, with their old head"
    for place, (axis, title) in enumerate(zip(axes, titles, strict=True)):
        for row, (method, pairs) in enumerate(found.items()):
            colour = BLUE if METHODS[method][1] else RED
            values = [pair[place] for pair in pairs]
            axis.barh(row, np.mean(values), 0.6, color=colour, alpha=0.25)
            jitter = np.linspace(-0.2, 0.2, len(values))
            axis.plot(values, row + jitter, "o", color=colour, markersize=4)
        axis.set(title=title, xlabel="test accuracy, %")
        axis.grid(axis="x", alpha=0.3)
    line = axes[1].axvline(np.mean(before), color="black", linewidth=1)
    figure.legend([line], ["before fine-tuning"], loc="outside lower right", frameon=False)
    axes[0].set_yticks(range(len(found)), list(found))
    axes[0].invert_yaxis()
    save(figure, path)


if __name__ == "__main__":
    main()
