"""Point clouds of 16 to 128 points, padded to the longest of their batch, in PyTorch.

    python examples/point_clouds.py --out point_clouds.png

A small PointNet classifies scikit-learn's digits, scanned as points. It is an ordinary torch
model, whose batch norms count padding as data. `convert_batchnorm` replaces them, and
`padding_mask` tells the new ones which points are real; the model's code does not change.

Result: the running statistics of torch's layer are those of points and padding together, which
no cloud has. Those of the converted layer are the statistics of the points.
"""

from __future__ import annotations

import copy

import numpy as np
import torch
from torch import Tensor, nn

from _common import BLUE, RED, draw_runs, parse_options, plt, print_table, save, spread
from batchnorm.demo.data import Batch, Sample, load_samples, pad
from batchnorm.torch import convert_batchnorm, padding_mask

WIDTH, BATCH, EPOCHS = 64, 50, 12
FEWEST, MOST = 16, 128
COLOURS = {"torch.nn": RED, "batchnorm": BLUE}


class PointNet(nn.Module):
    """Layers for each point, the maximum over the real points, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Sequential(
            *(nn.Conv1d(3, WIDTH, 1), nn.BatchNorm1d(WIDTH), nn.ReLU()),
            *(nn.Conv1d(WIDTH, WIDTH, 1), nn.BatchNorm1d(WIDTH), nn.ReLU()),
        )
        self.cloud = nn.Sequential(
            *(nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH), nn.ReLU(), nn.Linear(WIDTH, 10))
        )

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Logits (N, 10) of clouds (N, 3, L), real where mask (N, L) is True."""
        found = self.points(x).masked_fill(~mask[:, None], 0.0)  # a ReLU's values are at least 0
        return self.cloud(found.amax(dim=2))


def scan(sample: Sample, rng: np.random.Generator) -> Sample:
    """A cloud of points drawn from a digit's ink; the logarithm of its size is uniform."""
    count = int(np.exp(rng.uniform(np.log(FEWEST), np.log(MOST + 1))))
    ink = sample.points[:, 2] + 1.0
    chosen = sample.points[rng.choice(len(ink), count, p=ink / ink.sum())]
    jitter = rng.uniform(-1 / 7, 1 / 7, (count, 2))  # within the pixel
    return Sample(chosen + np.pad(jitter, ((0, 0), (0, 1))).astype(np.float32), sample.label)


def tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Points (N, 3, L), mask (N, L), labels (N,)."""
    points, mask, labels = map(torch.from_numpy, batch)
    return points.mT.contiguous(), mask, labels


def train(model: nn.Module, parts: list[list[Sample]], seed: int, epochs: int) -> list[float]:
    """Test accuracy after each epoch, %."""
    clouds, tests = parts
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(clouds) // BATCH)
    rng = np.random.default_rng(seed)
    test_points, test_mask, test_labels = tensors(pad(tests))
    accuracy = []
    for _ in range(epochs):
        model.train()
        for chosen in rng.permutation(len(clouds)).reshape(-1, BATCH):
            points, mask, labels = tensors(pad([clouds[i] for i in chosen]))
            # torch's layers do not notice. "any": a whole cloud is real if one of its points is.
            with padding_mask(mask, rescale="any"):
                loss = nn.functional.cross_entropy(model(points, mask), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            decay.step()
        with torch.no_grad():
            right = model.eval()(test_points, test_mask).argmax(dim=1) == test_labels
        accuracy.append(100 * right.double().mean().item())
    return accuracy


def compare_statistics(model: PointNet, clouds: list[Sample]) -> np.ndarray:
    """The first norm's true mean and standard deviation, and the running ones, (4, C)."""
    first, norm = model.points[0], model.points[1]
    points = torch.from_numpy(np.concatenate([cloud.points for cloud in clouds]))
    with torch.no_grad():
        x = nn.functional.linear(points.double(), first.weight[..., 0].double()) + first.bias
    found = x.mean(dim=0), x.std(dim=0), norm.running_mean, norm.running_var.sqrt()
    return np.stack([a.numpy() for a in found])


def main() -> None:
    """Train pairs of networks from the same weights, print and draw."""
    options = parse_options(__doc__, seeds=3)
    torch.set_num_threads(1)  # small layers gain nothing from more, and digits depend on it
    rng = np.random.default_rng(0)
    limit, epochs = (300, 8) if options.quick else (None, EPOCHS)
    parts = [[scan(sample, rng) for sample in samples[:limit]] for samples in load_samples()]
    clouds = parts[0]
    starts = range(0, len(clouds), BATCH)
    share = np.mean([1 - pad(clouds[i : i + BATCH]).mask.mean() for i in starts])
    print(f"{len(clouds)} clouds; {share:.0%} of a batch is padding")
    accuracy: dict[str, list[list[float]]] = {name: [] for name in COLOURS}
    statistics: dict[str, list[np.ndarray]] = {name: [] for name in COLOURS}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        theirs = PointNet()
        ours = convert_batchnorm(copy.deepcopy(theirs))
        for name, model in zip(COLOURS, (theirs, ours), strict=True):
            accuracy[name].append(train(model, parts, seed, epochs))
            statistics[name].append(compare_statistics(model, clouds))
    rows = []
    for name in COLOURS:
        mean, std, running_mean, running_std = np.stack(statistics[name], axis=1)  # (seeds, C)
        mean_error = (np.abs(running_mean - mean) / std).max(axis=1)
        std_error = np.abs(running_std / std - 1).max(axis=1)
        final = np.array(accuracy[name])[:, -1]
        rows.append([name, spread(final), spread(100 * mean_error), spread(100 * std_error)])
    print_table(["", "test accuracy, %", "error of mean, % of std", "error of std, %"], rows)
    draw(accuracy, statistics, options.out)


def draw(accuracy: dict, statistics: dict, path: object) -> None:
    """Running statistics over true ones, a dot for each channel, and accuracy."""
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for name, colour in COLOURS.items():
        found = statistics[name][0]  # of the first seed
        for axis, row in zip(axes, (0, 1), strict=False):
            axis.plot(found[row], found[row + 2], "o", color=colour, markersize=4, label=name)
        draw_runs(axes[2], accuracy[name], colour, name)
    for axis, name in zip(axes, ("mean", "standard deviation"), strict=False):
        axis.axline((0, 0), slope=1, color="black", linewidth=0.8)
        axis.set(title=f"First norm: {name} of each channel", ylabel="running statistic")
        axis.set_xlabel("truth, over the real points")
    axes[2].set(title="Test accuracy, mean and range of the seeds", xlabel="epoch", ylabel="%")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, frameon=False)
    save(figure, path)


if __name__ == "__main__":
    main()
