"""A small ResNet trained on the digits data in several processes, and again in one.

    torchrun --standalone --nproc-per-node 2 examples/digits_ddp.py

Every process takes its share of each batch. Gradients are averaged by DistributedDataParallel,
statistics merged by `convert_batchnorm(model, synchronized=True)`. Rank 0 then trains alone on
whole batches, and prints the difference between the two runs.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from batchnorm.torch import convert_batchnorm

BATCH = 120  # over all processes
STEPS = 20  # after some 25, rounding decides a ReLU or a maximum, and runs in float32 part
TOLERANCE = {torch.float32: 1e-5, torch.float64: 1e-9}  # of the loss


class Block(nn.Module):
    """Two convolutions with a shortcut around them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
        )

    def forward(self, x: Tensor) -> Tensor:
        """The activated sum."""
        return torch.relu(x + self.body(x))


def make_model(dtype: torch.dtype) -> nn.Module:
    """The same parameters in every process."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        Block(16),
        nn.MaxPool2d(2),
        Block(16),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).to(dtype)


def train(model: nn.Module, steps: int, share: slice) -> list[float]:
    """The loss on this process's share of each batch, step by step."""
    data, dtype = load_digits(), next(model.parameters()).dtype
    images = torch.tensor(data.images, dtype=dtype)[:, None] / 16
    labels = torch.tensor(data.target)
    order = torch.Generator().manual_seed(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    losses = []
    for _ in range(steps):
        chosen = torch.randperm(len(images), generator=order)[:BATCH][share]
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images[chosen]), labels[chosen])
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    """Train in all processes, then in one, and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--double", action="store_true", help="in float64")
    arguments = parser.parse_args()
    steps, dtype = arguments.steps, torch.float64 if arguments.double else torch.float32
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    rank, size = dist.get_rank(), dist.get_world_size()
    if BATCH % size:
        raise SystemExit(f"The batch of {BATCH} must be divisible by the {size} processes.")

    model = convert_batchnorm(make_model(dtype), synchronized=True)
    share = BATCH // size
    losses = train(DistributedDataParallel(model), steps, slice(rank * share, (rank + 1) * share))
    together = torch.tensor(losses, dtype=torch.float64)
    dist.all_reduce(together)
    together /= size

    if rank == 0:
        single = convert_batchnorm(make_model(dtype))
        alone = torch.tensor(train(single, steps, slice(None)), dtype=torch.float64)
        apart = (together - alone).abs().max().item()
        states = zip(model.state_dict().values(), single.state_dict().values(), strict=True)
        state = max((a.double() - b.double()).abs().max().item() for a, b in states)
        print(f"{size} processes: loss {together[0]:.4f} to {together[-1]:.4f} in {steps} steps")
        print(f"one process: loss {alone[0]:.4f} to {alone[-1]:.4f}")
        print(f"largest difference: loss {apart:.1e}, parameters and statistics {state:.1e}")
        if not apart < TOLERANCE[dtype]:
            raise SystemExit(f"The runs differ by more than {TOLERANCE[dtype]}.")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
