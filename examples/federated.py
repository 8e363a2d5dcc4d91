"""Federated averaging in PyTorch: the statistics of three clients whose digits differ.

    python examples/federated.py --out federated.png

Three clients have scikit-learn's digits, on paper of three greys, so that the ink of each is scaled
and shifted. In every round they train a small convolutional network from the server's state,
and the server averages their weights by the number of images (FedAvg, McMahan et al. 2017). A
client's statistics are the averages of its batches in the round. From the clients of the last round
the server's statistics are made in four ways, which share the weights:

- average: running means and variances are averaged, as much federated code does;
- merge: `batchnorm.tools.merge`, which adds the distances of the clients' means;
- clients recalibrate: each client recalibrates the averaged model on its own images, then `merge`;
- server recalibrates: on a tenth of the clients' images, mixed, which then leave the clients.

The table has the errors of the statistics against those of all images together, averaged over
channels and layers, and the accuracy on the clients' test images. For comparison each client also
gets the averaged weights with statistics of its own images, as in SiloBN (Andreux et al. 2020).
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from _common import BLUE, GREEN, GREY, RED, parse_options, plt, print_table, save, spread
from batchnorm.tools import merge, recalibrate
from batchnorm.torch import BatchNorm2d

WIDTH, ROUNDS, EPOCHS, BATCH = 16, 20, 2, 32
PAPERS = ((600, 0.0), (300, 0.3), (150, 0.6))  # images for training, grey of the paper
TEST = 240  # images of each client
ROWS = {"1": 64, "4": 64, "8": 16}  # positions of an image at each batch norm
COLOURS = {
    "average": RED,
    "merge": BLUE,
    "clients recalibrate": GREEN,
    "server recalibrates": GREY,
}
OWN = "own statistics"


class Data(NamedTuple):
    """Images (N, 1, 8, 8) and labels (N,)."""

    images: Tensor
    labels: Tensor


class Client(NamedTuple):
    """The images of one client."""

    train: Data
    test: Data


def make_model() -> nn.Sequential:
    """Images (N, 1, 8, 8) to logits (N, 10)."""
    return nn.Sequential(
        *(nn.Conv2d(1, WIDTH, 3, padding=1), BatchNorm2d(WIDTH, momentum=None), nn.ReLU()),
        *(nn.Conv2d(WIDTH, WIDTH, 3, padding=1), BatchNorm2d(WIDTH, momentum=None), nn.ReLU()),
        nn.MaxPool2d(2),
        *(
            nn.Conv2d(WIDTH, 2 * WIDTH, 3, padding=1),
            BatchNorm2d(2 * WIDTH, momentum=None),
            nn.ReLU(),
        ),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * WIDTH, 10)),
    )


def load(seed: int) -> list[Client]:
    """The clients; no image is there twice, but the test images, which all clients share."""
    digits = load_digits()
    order = np.random.default_rng(seed).permutation(len(digits.images))
    ink = torch.from_numpy(digits.images[order]).float()[:, None] / 16
    labels = torch.from_numpy(digits.target[order])
    test, start, clients = slice(0, TEST), TEST, []
    for count, grey in PAPERS:
        train = slice(start, start + count)
        start += count
        drawn = grey + (1 - grey) * ink
        clients.append(Client(Data(drawn[train], labels[train]), Data(drawn[test], labels[test])))
    return clients


def train(model: nn.Module, data: Data, seed: int) -> None:
    """A client's part of a round; its statistics are those of the round."""
    for layer in norms(model):
        layer.reset_running_stats()
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    order = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(EPOCHS):
        for chosen in torch.randperm(len(data.labels), generator=order).split(BATCH):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(data.images[chosen]), data.labels[chosen])
            loss.backward()
            optimizer.step()


def average(models: list[nn.Module], counts: list[int]) -> nn.Module:
    """Every array of the models, averaged by count; the counters are the first one's."""
    server, states = copy.deepcopy(models[0]), [model.state_dict() for model in models]
    for name, array in server.state_dict().items():
        if array.is_floating_point():
            pairs = zip(states, counts, strict=True)
            array.copy_(sum(count * state[name].double() for state, count in pairs) / sum(counts))
    return server


def federate(clients: list[Client], rounds: int, seed: int) -> list[nn.Module]:
    """The clients' models after the last round, before the server merges them."""
    torch.manual_seed(seed)
    server: nn.Module = make_model()
    for number in range(rounds):
        models = [copy.deepcopy(server) for _ in clients]
        for place, (model, client) in enumerate(zip(models, clients, strict=True)):
            train(model, client.train, seed * 1000 + number * 10 + place)
        server = merge(models, [len(client.train.labels) for client in clients], everything=True)
    return models


def recalibrated(model: nn.Module, images: Tensor) -> nn.Module:
    """A copy with the statistics of the images, in one batch."""
    new = copy.deepcopy(model)
    recalibrate(new, [images], progress=False)
    return new


def make_servers(models: list[nn.Module], clients: list[Client]) -> dict[str, nn.Module]:
    """The server's model, with the statistics of each way."""
    images = [client.train.images for client in clients]
    counts = [len(own) for own in images]
    merged = merge(models, counts, everything=True)
    local = [recalibrated(merged, own) for own in images]
    rows = {name: [positions * count for count in counts] for name, positions in ROWS.items()}
    return {
        "average": average(models, counts),
        "merge": merged,
        "clients recalibrate": merge(local, rows),
        "server recalibrates": recalibrated(merged, torch.cat([own[::10] for own in images])),
    }


def errors(model: nn.Module, pooled: nn.Module) -> np.ndarray:
    """Errors of mean, in % of a deviation, and of deviation, in %, by layer: shape (2, layers)."""
    found = []
    for layer, right in zip(norms(model), norms(pooled), strict=True):
        deviation = right.running_var.sqrt()
        means = (layer.running_mean - right.running_mean).abs() / deviation
        deviations = (layer.running_var.sqrt() / deviation - 1).abs()
        found.append([100 * means.mean().item(), 100 * deviations.mean().item()])
    return np.transpose(found)


def norms(model: nn.Module) -> list[BatchNorm2d]:
    """The batch norms of a model."""
    return [layer for layer in model.modules() if isinstance(layer, BatchNorm2d)]


@torch.no_grad()
def accuracies(model: nn.Module, clients: list[Client]) -> list[float]:
    """The share of test images labelled right, in % for each client."""
    model.eval()
    return [
        100 * (model(test.images).argmax(dim=1) == test.labels).double().mean().item()
        for _, test in clients
    ]


def main() -> None:
    """Federate, compare the statistics, print and draw."""
    options = parse_options(__doc__, seeds=10)
    torch.set_num_threads(1)  # small layers gain nothing from more, and digits depend on it
    rounds = 2 if options.quick else ROUNDS
    wrong: dict[str, list[np.ndarray]] = {way: [] for way in COLOURS}
    right: dict[str, list[list[float]]] = {way: [] for way in (*COLOURS, OWN)}
    for seed in range(options.seeds):
        clients = load(seed)
        servers = make_servers(federate(clients, rounds, seed), clients)
        images = [client.train.images for client in clients]
        pooled = recalibrated(servers["merge"], torch.cat(images))
        for way, server in servers.items():
            wrong[way].append(errors(server, pooled))
            right[way].append(accuracies(server, clients))
        own = [recalibrated(servers["merge"], one) for one in images]
        pairs = zip(own, clients, strict=True)
        right[OWN].append([accuracies(model, [client])[0] for model, client in pairs])
    print(f"each client with its own statistics: {spread(np.mean(right[OWN], axis=1))} % right")
    rows = []
    for way in COLOURS:
        mean, deviation = np.mean(wrong[way], axis=2).T
        rows.append([way, spread(mean), spread(deviation), spread(np.mean(right[way], axis=1))])
    print_table(["", "error of mean, % of std", "error of std, %", "test accuracy, %"], rows)
    draw(wrong, right, options.out)


def draw(
    wrong: dict[str, list[np.ndarray]], right: dict[str, list[list[float]]], path: object
) -> None:
    """Errors by layer and accuracy by client: the mean over the seeds, and a dot for each."""
    figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.0), layout="constrained")
    norms = [f"norm {number + 1}" for number in range(wrong["merge"][0].shape[1])]
    papers = [f"paper {grey:g}\n{count} images" for count, grey in PAPERS]
    deviations = {way: np.array(w)[:, 1] for way, w in wrong.items()}
    accuracy = {way: np.array(r) for way, r in right.items()}
    for axis, title, names, found in (
        (axes[0], "Error of the standard deviation, %", norms, deviations),
        (axes[1], "Test accuracy by client, %", papers, accuracy),
    ):
        for place, (way, runs) in enumerate(found.items()):
            width = 0.8 / len(found)
            x = np.arange(len(names)) + width * (place - (len(found) - 1) / 2)
            colour = COLOURS.get(way, "black")
            axis.bar(x, runs.mean(axis=0), 0.9 * width, color=colour, alpha=0.3, label=way)
            axis.plot(x, runs.T, "o", color=colour, markersize=2.5)
        axis.set_xticks(range(len(names)), names)
        axis.set(title=title)
        axis.grid(axis="y", alpha=0.3)
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    save(figure, path)


if __name__ == "__main__":
    main()
