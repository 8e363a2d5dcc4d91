"""A Conformer that tells nine speakers apart, trained on padded batches of speech, in PyTorch.

    python examples/speech.py --out speech.png

The network halves the frames twice by strided convolutions, and has depthwise convolutions and
self-attention behind that. It leaves padding out of attention, of its depthwise convolutions and
of the mean over frames, as good code does. Its batch norms are torch's, and know nothing of it.

`convert_batchnorm` replaces them. `padding_mask(mask, follow=model, padded_output="zero")` gives
them the mask at each resolution, and makes them return zeros at padded frames, which the next
convolution reads.

Result: the features of an utterance alone, beside a longer one, and in front of 400 frames of
padding. With torch's norms they differ, also in evaluation; with these they do not.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import AbstractContextManager

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from _common import BLUE, RED, draw_runs, parse_options, plt, print_table, save, spread
from _speech import FEATURES, SPEAKERS, Batch, Sample, join, load, pad
from batchnorm.torch import convert_batchnorm, padding_mask

WIDTH, HEADS, BLOCKS, KERNEL = 48, 4, 2, 7
BATCH, EPOCHS, MORE = 32, 15, 400
COLOURS = {"torch.nn": RED, "batchnorm": BLUE}


class Block(nn.Module):
    """A Conformer block: half a feed-forward layer, attention, convolution, the other half."""

    def __init__(self) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(WIDTH) for _ in range(5))
        self.feed = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 2 * WIDTH), nn.SiLU(), nn.Linear(2 * WIDTH, WIDTH))
            for _ in range(2)
        )
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.gate = nn.Linear(WIDTH, 2 * WIDTH)
        self.depthwise = nn.Conv1d(WIDTH, WIDTH, KERNEL, padding=KERNEL // 2, groups=WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Frames (N, L, C), real where mask (N, L) is True."""
        x = x + self.feed[0](self.norms[0](x)) / 2
        z = self.norms[1](x)
        x = x + self.attention(z, z, z, key_padding_mask=~mask, need_weights=False)[0]
        z = functional.glu(self.gate(self.norms[2](x)))
        z = self.depthwise(z.masked_fill(~mask[..., None], 0.0).mT)
        x = x + self.out(functional.silu(self.norm(z)).mT)
        x = x + self.feed[1](self.norms[3](x)) / 2
        return self.norms[4](x)


class Conformer(nn.Module):
    """Two strided convolutions, blocks, the mean over real frames, a classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.subsample = nn.Sequential(
            *(nn.Conv1d(FEATURES, WIDTH, 5, 2, 2), nn.BatchNorm1d(WIDTH), nn.SiLU()),
            *(nn.Conv1d(WIDTH, WIDTH, 5, 2, 2), nn.BatchNorm1d(WIDTH), nn.SiLU()),
        )
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.classifier = nn.Linear(WIDTH, SPEAKERS)

    def forward(self, frames: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (N, 9), and the features (N, L / 4, C) of frames (N, L, 12)."""
        x = self.subsample(frames.mT).mT
        mask = mask[:, ::4]  # the frames in the middle of the windows
        for block in self.blocks:
            x = block(x, mask)
        x = x.masked_fill(~mask[..., None], 0.0)
        return self.classifier(x.sum(1) / mask.sum(1, keepdim=True)), x


def masked(model: nn.Module, mask: Tensor) -> AbstractContextManager[None]:
    """The block for a training loop to put around the model's calls; torch's layers ignore it."""
    return padding_mask(mask, follow=model, padded_output="zero")


def tensors(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Frames (N, L, 12), mask (N, L), speakers (N,)."""
    frames, mask, speakers = map(torch.from_numpy, batch)
    return frames, mask, speakers


def batches(samples: list[Sample], rng: np.random.Generator) -> Iterator[Batch]:
    """All samples in random order."""
    order = rng.permutation(len(samples))
    for first in range(0, len(order) - BATCH + 1, BATCH):
        yield pad([samples[i] for i in order[first : first + BATCH]])


def train(
    model: Conformer, samples: list[Sample], tests: list[Sample], seed: int, epochs: int
) -> list[float]:
    """Test accuracy after each epoch, %."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    rng, accuracy = np.random.default_rng(seed), []
    frames, mask, speakers = tensors(pad(tests))
    for _ in range(epochs):
        model.train()
        for batch in batches(samples, rng):
            x, real, wanted = tensors(batch)
            with masked(model, real):
                loss = functional.cross_entropy(model(x, real)[0], wanted)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        with torch.no_grad(), masked(model.eval(), mask):
            right = model(frames, mask)[0].argmax(1) == speakers
        accuracy.append(100 * right.double().mean().item())
    return accuracy


def features(model: Conformer, samples: list[Sample], more: int, training: bool) -> Tensor:
    """Features of the first sample's real frames, in a batch with `more` frames of padding."""
    frames, mask, _ = tensors(pad(samples, more))
    model = copy.deepcopy(model).train(training)  # training moves the running statistics
    with torch.no_grad(), masked(model, mask):
        found = model(frames, mask)[1][0]
    return found[: -(-len(samples[0].frames) // 4)]


def compare(model: Conformer, samples: list[Sample]) -> dict[str, np.ndarray]:
    """The largest change of an utterance's features at each of its frames, by what is changed."""
    by_length = sorted(samples, key=lambda sample: len(sample.frames))
    own, longest = by_length[len(samples) // 2], by_length[-1]
    alone = features(model, [own], 0, False)
    batch = [own, *samples[:15]]
    found = {
        "beside a longer one": features(model, [own, longest], 0, False) - alone,
        f"{MORE} more frames": features(model, [own], MORE, False) - alone,
        f"{MORE} more, in training": features(model, batch, MORE, True)
        - features(model, batch, 0, True),
    }
    return {name: change.abs().amax(1).numpy() for name, change in found.items()}


def main() -> None:
    """Train pairs of networks from the same weights, print and draw."""
    options = parse_options(__doc__, seeds=3)
    torch.set_num_threads(1)  # small layers gain nothing from more, and digits depend on it
    rng = np.random.default_rng(0)
    samples, tests = (join(load(part), rng) for part in ("TRAIN", "TEST"))
    epochs = 2 if options.quick else EPOCHS
    share = np.mean([1 - batch.mask.mean() for batch in batches(samples, rng)])
    print(
        f"{len(samples)} samples of {min(len(s.frames) for s in samples)} to "
        f"{max(len(s.frames) for s in samples)} frames; {share:.0%} of a batch is padding"
    )
    accuracy: dict[str, list[list[float]]] = {name: [] for name in COLOURS}
    moved: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in COLOURS}
    for seed in range(options.seeds):
        torch.manual_seed(seed)
        theirs = Conformer()
        ours = convert_batchnorm(copy.deepcopy(theirs))
        for name, model in zip(COLOURS, (theirs, ours), strict=True):
            accuracy[name].append(train(model, samples, tests, seed, epochs))
            moved[name].append(compare(model, tests))
    cases = list(moved["batchnorm"][0])
    print("largest change of an utterance's features, and test accuracy in %")
    rows = [
        [
            name,
            *(f"{max(found[case].max() for found in moved[name]):.1e}" for case in cases),
            spread(np.array(accuracy[name])[:, -1]),
        ]
        for name in COLOURS
    ]
    print_table(["", *cases, "accuracy"], rows)
    draw(accuracy, moved, options.out)


def draw(accuracy: dict, moved: dict, path: object) -> None:
    """The changes over an utterance's frames, of the first seed, and the accuracy."""
    cases = list(moved["batchnorm"][0])[1:]
    figure, axes = plt.subplots(1, 3, figsize=(13, 4.2), layout="constrained")
    for name, colour in COLOURS.items():
        for axis, case in zip(axes, cases, strict=False):
            change = np.maximum(moved[name][0][case], 1e-8)  # 0 is not on the scale
            axis.semilogy(4 * np.arange(len(change)), change, "o-", color=colour, label=name)
        draw_runs(axes[2], accuracy[name], colour, name)
    for axis, title in zip(axes, ("evaluation", "training"), strict=False):
        axis.axhline(1e-5, color="black", linewidth=0.8, linestyle=":")
        axis.set(title=f"{MORE} more frames of padding, {title}", xlabel="frame of the utterance")
        axis.set(ylabel="largest change of its features", ylim=(5e-9, 20))
    axes[2].set(title="Test accuracy", xlabel="epoch", ylabel="%")
    for axis in axes:
        axis.legend(frameon=False)
    save(figure, path)


if __name__ == "__main__":
    main()
