"""Checkpoints of every format, merged into one file, in Python and on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files import WRITERS, random_states, torch_model
from typer.testing import CliRunner, Result

from batchnorm.cli import app
from batchnorm.tools import merge
from batchnorm.tools.checkpoints import CheckpointError, read_checkpoint
from batchnorm.tools.merging.files import merge_checkpoints

pytestmark = pytest.mark.sample(2)


@pytest.fixture
def pair(tmp_path: Path) -> list[Path]:
    """Two state dicts that differ in the mean of their first layer and in their counters."""
    paths = [tmp_path / f"{name}.pt" for name in "ab"]
    for path, offset in zip(paths, (0.0, 6.0), strict=True):
        model = torch_model()
        model.bn1.running_mean += offset
        model.bn1.num_batches_tracked += int(offset)
        torch.save(model.state_dict(), path)
    return paths


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, ["merge", *map(str, arguments)])


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_merged_with_itself(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{name}"
    WRITERS[name](path)
    done = merge_checkpoints([path, path], tmp_path / "b.safetensors")
    for state, wanted in zip(done.written.states, random_states().values(), strict=True):
        for role, array in wanted.items():
            np.testing.assert_array_equal(getattr(state, role), array)
    found = read_checkpoint(done.written.path).layers
    assert [s.name for s in found] == ["bn1", "bn2"]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".msgpack", ".weights.h5", ".h5"])
def test_every_target_holds_the_merged_states_of_its_kind(
    suffix: str, pair: list[Path], tmp_path: Path
) -> None:
    counts = [5, 15]
    done = merge_checkpoints(pair, tmp_path / f"c{suffix}", counts=counts)
    first = read_checkpoint(tmp_path / f"c{suffix}").layers[0]
    biased = np.float64(random_states()["bn1"]["var"]) * ((5 - 1) + (15 - 1)) / 20
    biased += (4.5**2 * 5 + 1.5**2 * 15) / 20
    unbiased = suffix in (".safetensors", ".pt")
    np.testing.assert_allclose(first.var, biased * (20 / 19 if unbiased else 1.0), rtol=3e-7)
    np.testing.assert_allclose(first.mean, random_states()["bn1"]["mean"] + 4.5, rtol=2e-7)
    assert first.steps == (7 + 13 if unbiased else None)
    assert not any("copied unchanged" in note for note in done.written.notes)


def test_paths_and_checkpoints_are_models_too(pair: list[Path]) -> None:
    states = merge(pair)
    assert [s.name for s in states] == ["bn1", "bn2"]
    into = merge([torch_model(), read_checkpoint(pair[1])])
    assert torch.equal(into.bn1.running_var, torch.from_numpy(states[0].var))
    with pytest.raises(ValueError, match="checkpoints are read for their batch norms alone"):
        merge(pair, everything=True)
    with pytest.raises(CheckpointError, match="limit="):
        merge(pair, limit=100)


def test_command_writes_and_says_what_an_average_would_miss(
    pair: list[Path], tmp_path: Path
) -> None:
    target = tmp_path / "c.msgpack"
    done = run(*pair, "-o", target, "--counts", "100,300")
    assert done.exit_code == 0, done.output
    lines = done.output.splitlines()
    assert (
        lines[0]
        == f"{target}: 2 batch norms of 2 files merged, flax's names, 2 other arrays left out"
    )
    report = merge_checkpoints(pair, tmp_path / "d.pt", counts=[100, 300]).layers
    assert lines[1:3] == [f"  {layer}" for layer in report]
    assert report[0].missed > 0.7
    assert lines[2].endswith(
        "bn2: means up to 0 deviations apart; an average of variances would miss up to 0%"
    )
    without = run(*pair, "-o", target, "--force")
    assert "note: 2 of 2 variances were copied unchanged (unbiased)" in without.output


def test_command_keeps_an_existing_file_unless_forced(pair: list[Path], tmp_path: Path) -> None:
    target = tmp_path / "c.pt"
    target.write_text("precious")
    done = run(*pair, "-o", target)
    assert done.exit_code == 2
    assert "it exists; force=True (--force) replaces it" in done.output
    assert target.read_text() == "precious"
    assert run(*pair, "--out", target, "--force").exit_code == 0
    assert len(read_checkpoint(target).layers) == 2


def test_no_source_is_replaced(pair: list[Path]) -> None:
    for target in pair:
        before = target.read_bytes()
        done = run(*pair, "-o", target, "--force")
        assert done.exit_code == 2
        assert "it is the source" in done.output
        assert target.read_bytes() == before


def test_names_of_a_file_are_printed_without_control_characters(tmp_path: Path) -> None:
    layer = torch.nn.BatchNorm1d(2).state_dict()
    torch.save({f"a\x1b[31m.{name}": tensor for name, tensor in layer.items()}, tmp_path / "a.pt")
    done = run(tmp_path / "a.pt", tmp_path / "a.pt", "-o", tmp_path / "b.pt")
    assert done.exit_code == 0, done.output
    assert "\x1b" not in done.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("A -o C", "Missing argument"),
        ("A B", "Missing option"),
        ("A B -o C --counts 3", "counts must be one finite number for each model"),
        ("A B -o C --counts 3,-1", "not negative"),
        ("A B -o C --counts 3,x", "--counts must be numbers with commas, like 100,250; got '3,x'"),
        ("A B -o ''", "--out: the name is empty"),
        ("A B -o x.txt", "must end in .safetensors"),
        ("A B -o C.h5 --names torch", "can have the names of keras; got torch"),
        ("A OTHER -o C", "layer 'bn1' (torch): the shape must be the same in all models"),
        ("A FEWER -o C", "model 1 has 1 batch norm, the first 2; it lacks bn2"),
        ("A NAN -o C", "model 1, layer 'bn1' (torch): mean must be finite in every channel"),
        ("A NONE -o C", "it has no batch norm among its 2 arrays"),
        ("A DAMAGED -o C", "no intact zip archive"),
        ("A /nowhere/x.pt -o C", "cannot be read: No such file"),
        ("A MIXED -o C", "Pass counts= (--counts), which convert it"),
        ("- - -o C", "only one of the files can be standard input"),
        ("A B -o C --limit 10", "limit"),
    ],
)
def test_mistakes_end_with_a_sentence_and_2_and_write_nothing(
    arguments: str, message: str, pair: list[Path], tmp_path: Path
) -> None:
    bn1, bn2 = (torch.nn.BatchNorm1d(n) for n in (4, 5))
    spoiled = torch_model()
    spoiled.bn1.running_mean[0] = torch.nan
    models: dict[str, Any] = {
        "OTHER": torch.nn.ModuleDict({"bn1": bn2, "bn2": bn1}),
        "FEWER": torch.nn.ModuleDict({"bn1": bn1}),
        "NAN": spoiled,
        "NONE": torch.nn.Linear(2, 2),
    }
    files = {"A": pair[0], "B": pair[1], "C": tmp_path / "c.pt", "C.h5": tmp_path / "c.h5"}
    for name, model in models.items():
        files[name] = tmp_path / f"{name}.pt"
        if name in arguments:
            torch.save(model.state_dict(), files[name])
    files |= {"DAMAGED": tmp_path / "damaged.pt", "MIXED": tmp_path / "mixed.msgpack", "''": Path()}
    files["DAMAGED"].write_bytes(b"PK\x03\x04")
    if "MIXED" in arguments:
        WRITERS["msgpack"](files["MIXED"])
    words = ["" if word == "''" else files.get(word, word) for word in arguments.split()]
    done = run(*words)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output
    assert not (tmp_path / "c.pt").exists()
