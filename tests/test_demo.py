"""The main job, end to end and in parts."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from batchnorm.cli import app
from batchnorm.demo import data, experiment
from batchnorm.demo.network import Framework

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


@pytest.fixture(params=experiment.FRAMEWORKS)
def framework(request: pytest.FixtureRequest) -> Framework:
    return experiment.load_framework(request.param)


def test_without_padding_both_networks_agree(
    framework: Framework, samples: list[data.Sample]
) -> None:
    # Equal lengths, so nothing is padded: then the norms compute the same.
    length = len(samples[0].points)
    batch = data.pad([s for s in samples if len(s.points) == length])
    assert batch.mask.all()
    first, second = (n.logits(batch, training=True) for n in framework.make_pair(0))
    np.testing.assert_allclose(first, second, rtol=1e-4, atol=1e-4)


def test_pooling_leaves_padding_out(framework: Framework, samples: list[data.Sample]) -> None:
    network = framework.make_pair(0)[1]
    short, long = (network.logits(data.pad(samples[:4], e), training=False) for e in (0, 20))
    np.testing.assert_allclose(short, long, rtol=1e-5, atol=1e-5)


def test_looking_changes_nothing(framework: Framework, samples: list[data.Sample]) -> None:
    network, batch = framework.make_pair(0)[1], data.pad(samples[:8])
    before = network.logits(batch, training=False)
    network.logits(batch, training=True)
    assert (network.logits(batch, training=False) == before).all()


@pytest.mark.parametrize("framework", experiment.FRAMEWORKS)
def test_demo_prints_a_table_and_draws_a_picture(framework: str, tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    arguments = ["demo", "--quick", "--framework", framework, "--out", str(picture)]
    done = runner.invoke(app, arguments)
    assert done.exit_code == 0, done.output
    theirs, _ = experiment.load_framework(framework).names
    for part in (theirs, "batchnorm", "accuracy", "variance", "s/epoch", "picture:"):
        assert part in done.output
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_masked_norm_recovers_the_true_statistics(framework: Framework) -> None:
    results = experiment.run(framework, 1, 1, lambda: None, limit=640)
    padded, masked = results.values()
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
