"""The demo's main job, end to end and in parts."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from typer.testing import CliRunner

from batchnorm.cli import app
from batchnorm.demo import data, experiment
from batchnorm.demo.network import Framework, Network

runner = CliRunner()


@pytest.fixture(scope="module")
def samples() -> list[data.Sample]:
    training, testing = data.load_samples()
    return training + testing


def test_every_digit_becomes_its_ink_points(samples: list[data.Sample]) -> None:
    from sklearn.datasets import load_digits

    ink = sorted(int(np.count_nonzero(image)) for image in load_digits().images)
    assert sorted(len(s.points) for s in samples) == ink
    assert len(samples) == 1797


def test_points_lie_within_the_unit_square(samples: list[data.Sample]) -> None:
    points = np.concatenate([s.points for s in samples])
    assert np.abs(points).max() == 1.0
    assert (points[:, 2] > -1.0).all()  # a point has ink


@pytest.mark.parametrize("extra", [0, 5])
def test_padding_is_zero_where_the_mask_is_false(samples: list[data.Sample], extra: int) -> None:
    batch = data.pad(samples[:7], extra)
    assert batch.mask.sum(axis=1).tolist() == [len(s.points) for s in samples[:7]]
    assert (batch.points[~batch.mask] == 0).all()
    assert batch.mask.shape[1] == extra + int(batch.mask.sum(axis=1).max())
    assert (batch.points[batch.mask] == np.concatenate([s.points for s in samples[:7]])).all()


def test_lengths_can_be_multiples(samples: list[data.Sample]) -> None:
    assert {b.mask.shape[1] % 32 for b in data.batches(samples, 64, 0, 96, multiple=32)} == {0}


def test_padding_varies_from_batch_to_batch(samples: list[data.Sample]) -> None:
    shares = [b.mask.mean() for b in data.batches(samples, 64, 0, 96)]
    assert max(shares) - min(shares) > 0.2


def test_same_seed_gives_the_same_batches(samples: list[data.Sample]) -> None:
    first, again = (next(data.batches(samples, 8, 3, 96)) for _ in range(2))
    other = next(data.batches(samples, 8, 4, 96))
    assert (first.labels == again.labels).all()
    assert not (first.labels == other.labels).all()


class Run(NamedTuple):
    """A run of the demo by a user's command, and its measurements."""

    status: int
    output: str
    picture: Path
    results: dict[str, experiment.Measured]


@pytest.fixture(
    scope="module",
    params=[
        pytest.param(name, marks=[] if name == "torch" else [pytest.mark.exhaustive])
        for name in experiment.FRAMEWORKS
    ],
)
def framework(request: pytest.FixtureRequest) -> Framework:
    return experiment.load_framework(request.param)


@pytest.fixture(scope="module")
def pair(framework: Framework) -> tuple[Network, Network]:
    """Untrained networks, shared by the tests since each network compiles its functions."""
    return framework.make_pair(0)


@pytest.fixture(scope="module")
def trained(framework: Framework, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The demo, trained once for each framework."""
    name = next(n for n in experiment.FRAMEWORKS if experiment.load_framework(n) is framework)
    picture = tmp_path_factory.mktemp("demo") / "picture.png"
    kept = {}

    def run(*arguments: Any, **options: Any) -> dict[str, experiment.Measured]:
        kept.update(train(*arguments, **options))
        return kept

    train = experiment.run
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiment, "run", run)
        done = runner.invoke(app, ["demo", "--quick", "--framework", name, "--out", str(picture)])
    return Run(done.exit_code, done.output, picture, kept)


def test_without_padding_both_networks_agree(
    pair: tuple[Network, Network], samples: list[data.Sample]
) -> None:
    # Equal lengths, so nothing is padded: then the norms compute the same.
    length = len(samples[0].points)
    batch = data.pad([s for s in samples if len(s.points) == length])
    assert batch.mask.all()
    first, second = (n.logits(batch, training=True) for n in pair)
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-4)


def test_pooling_leaves_padding_out(
    pair: tuple[Network, Network], samples: list[data.Sample]
) -> None:
    network = pair[1]
    short, long = (network.logits(data.pad(samples[:4], e), training=False) for e in (0, 20))
    np.testing.assert_allclose(short, long, rtol=1e-5, atol=1e-5)


def test_looking_changes_nothing(pair: tuple[Network, Network], samples: list[data.Sample]) -> None:
    network, batch = pair[1], data.pad(samples[:4])
    before = network.logits(batch, training=False)
    network.logits(batch, training=True)
    assert (network.logits(batch, training=False) == before).all()


def test_demo_prints_a_table_and_draws_a_picture(framework: Framework, trained: Run) -> None:
    assert trained.status == 0, trained.output
    theirs, _ = framework.names
    for part in (theirs, "batchnorm", "accuracy", "variance", "s/epoch", "picture:"):
        assert part in trained.output
    assert trained.picture.read_bytes().startswith(b"\x89PNG")


def test_masked_norm_recovers_the_true_statistics(trained: Run) -> None:
    padded, masked = trained.results.values()
    # Batches of unequal counts are averaged, so a little error stays.
    assert masked.mean_error[0] < 0.02 < padded.mean_error[0]
    assert masked.var_error[0] < 0.02 < padded.var_error[0]
    assert masked.moved[0][-1] < 1e-4 < padded.moved[0][-1]


def test_same_seed_gives_the_same_results() -> None:
    framework = experiment.load_framework("torch")
    first, again = (experiment.run(framework, 1, 1, lambda: None, limit=128) for _ in range(2))
    for name, measured in first.items():
        other = again[name]
        assert measured.accuracy == other.accuracy
        assert measured.moved == other.moved
        assert (measured.mean_error, measured.var_error) == (other.mean_error, other.var_error)
