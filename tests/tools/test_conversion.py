"""Checkpoints of one library written as another's."""

from __future__ import annotations

import stat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files import CHANNELS, WRITERS, random_states
from flax import serialization
from typer.testing import CliRunner

from batchnorm.cli import app
from batchnorm.tools.checkpoints import CheckpointError, read_checkpoint, writing
from batchnorm.tools.checkpoints.writing import FORMATS
from batchnorm.tools.convert import convert_checkpoint
from batchnorm.torch import BatchNorm

CASES = [(suffix, names) for suffix, allowed in FORMATS.items() for names in allowed]


def source(folder: Path, name: str = "safetensors") -> Path:
    path = folder / f"source.{name}"
    WRITERS[name](path)
    return path


@pytest.mark.sample(2)
@pytest.mark.parametrize(("suffix", "names"), CASES)
def test_every_format_and_naming_is_read_back_to_the_bit(
    suffix: str, names: Any, tmp_path: Path
) -> None:
    target = tmp_path / f"target{suffix}"
    done = convert_checkpoint(source(tmp_path), target, names=names)
    kind = {"flax": "flax.linen", "nnx": "flax.nnx"}.get(names, names)
    found = read_checkpoint(target).layers
    assert [(s.name, s.kind) for s in found] == [("bn1", kind), ("bn2", kind)]
    for state, wanted in zip(found, random_states().values(), strict=True):
        for role, array in wanted.items():
            np.testing.assert_array_equal(getattr(state, role), array)
    assert any("copied unchanged" in note for note in done.notes) == (names != "torch")


def test_torch_loads_what_was_written_for_it(tmp_path: Path) -> None:
    target = tmp_path / "x.pt"
    convert_checkpoint(source(tmp_path, "msgpack"), target, count=8)
    model = torch.nn.ModuleDict(
        {n: torch.nn.BatchNorm1d(c) for n, c in zip(("bn1", "bn2"), CHANNELS, strict=True)}
    )
    model.load_state_dict(torch.load(target, weights_only=True))
    wanted = random_states()["bn1"]["var"] * np.float64(8 / 7)
    np.testing.assert_allclose(model["bn1"].running_var, wanted, rtol=2.0**-23)


def test_flax_restores_what_was_written_for_it(tmp_path: Path) -> None:
    target = tmp_path / "x.msgpack"
    convert_checkpoint(source(tmp_path, "pt"), target)
    tree = serialization.msgpack_restore(target.read_bytes())
    assert set(tree) == {"params", "batch_stats"}
    np.testing.assert_array_equal(tree["params"]["bn2"]["scale"], random_states()["bn2"]["gamma"])
    np.testing.assert_array_equal(tree["batch_stats"]["bn2"]["var"], random_states()["bn2"]["var"])


def test_renormalization_and_several_axes_survive(tmp_path: Path) -> None:
    layer = BatchNorm((2, 3), axis=(1, 2), renorm=True)
    layer.renorm_mean.fill_(4.0)
    torch.save(layer.state_dict(), tmp_path / "x.pt")
    for suffix in (".safetensors", ".msgpack", ".weights.h5"):
        done = convert_checkpoint(tmp_path / "x.pt", tmp_path / f"y{suffix}")
        (found,) = read_checkpoint(done.path).layers
        assert found.shape == (2, 3)
        assert found.renorm is not None
        assert found.renorm.renorm_mean.tolist() == [4.0] * 6
        assert done.notes == [], "with renormalization the variance is biased everywhere"


def test_existing_file_is_kept_unless_forced(tmp_path: Path) -> None:
    target = tmp_path / "x.safetensors"
    target.write_text("precious")
    with pytest.raises(CheckpointError, match="it exists"):
        convert_checkpoint(source(tmp_path), target)
    assert target.read_text() == "precious"
    convert_checkpoint(source(tmp_path), target, force=True)
    assert len(read_checkpoint(target).layers) == 2


SPELLINGS = {
    "itself": lambda path: path,
    "relative": lambda path: path.parent / "." / "sub" / ".." / path.name,
    "symbolic link": lambda path: link(path.parent / "sub" / "x.safetensors", path),
    "hard link": lambda path: link(path.parent / "sub" / "x.safetensors", path, hard=True),
    "link to its folder": lambda path: link(path.parent / "sub" / "x", path.parent) / path.name,
}


def link(new: Path, path: Path, *, hard: bool = False) -> Path:
    if hard:
        new.hardlink_to(path)
    else:
        new.symlink_to(path)
    return new


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_source_is_never_replaced(spelling: str, tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    path = source(tmp_path)
    target, before = SPELLINGS[spelling](path), path.read_bytes()
    for force in (False, True):
        with pytest.raises(CheckpointError, match="it is the source"):
            convert_checkpoint(path, target, force=force)
    with pytest.raises(CheckpointError, match="it is the source"):
        convert_checkpoint(target, path, force=True)
    assert path.read_bytes() == before
    assert target.exists()


def test_folder_that_is_read_is_not_written_into(tmp_path: Path) -> None:
    path = source(tmp_path, "orbax")
    before = sorted(path.rglob("*"))
    (tmp_path / "link").symlink_to(path)
    for folder in (path, tmp_path / "link"):
        for target in (path / "new.pt", tmp_path / "link" / "new.pt"):
            with pytest.raises(CheckpointError, match="it lies inside the source"):
                convert_checkpoint(folder, target)
    assert sorted(path.rglob("*")) == before


@pytest.mark.sample(2)
@pytest.mark.parametrize("name", ["pt", "weights.h5", "keras", "msgpack"])
def test_what_is_left_out_is_counted(name: str, tmp_path: Path) -> None:
    path = source(tmp_path, name)
    done = convert_checkpoint(path, tmp_path / "new.safetensors")
    used = 8 if name != "pt" else 10  # with the counts of batches
    assert done.left_out == len(read_checkpoint(path).entries) - used
    if name == "pt":
        tensors = torch.nn.Sequential(*(torch.nn.Linear(2, 2) for _ in range(159)))
        layers = {f"bn{i}": torch.nn.BatchNorm1d(2) for i in range(12)}
        whole = torch.nn.ModuleDict({"maps": tensors, **layers})
        torch.save(whole.state_dict(), tmp_path / "whole.pt")
        arguments = [str(tmp_path / "whole.pt"), str(tmp_path / "few.pt")]
        shown = CliRunner().invoke(app, ["convert", *arguments]).output
        assert "12 batch norms written, torch's names, 318 other arrays left out" in shown


def test_interrupted_writing_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(path: Path, arrays: Any) -> None:
        path.write_bytes(b"half")
        raise KeyboardInterrupt

    path = source(tmp_path)
    monkeypatch.setattr(writing, "_WRITERS", {".pt": fail})
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(path, tmp_path / "x.pt")
    assert list(tmp_path.iterdir()) == [path]


def test_written_file_has_ordinary_permissions(tmp_path: Path) -> None:
    done = convert_checkpoint(source(tmp_path), tmp_path / "x.safetensors")
    (tmp_path / "plain").touch()
    assert stat.S_IMODE(done.path.stat().st_mode) == stat.S_IMODE(
        (tmp_path / "plain").stat().st_mode
    )


@pytest.mark.parametrize(
    ("target", "options", "message"),
    [
        ("x.txt", {}, r"must end in \.safetensors.*got \.txt"),
        ("x.h5", {"names": "torch"}, "can have the names of keras; got torch"),
        ("missing/x.pt", {}, "cannot be written"),
        ("x.pt", {"count": 0}, "count must be a positive int"),
    ],
)
def test_impossible_targets_are_refused(
    target: str, options: Any, message: str, tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match=message):
        convert_checkpoint(source(tmp_path), tmp_path / target, **options)


def test_source_without_batch_norms_is_refused(tmp_path: Path) -> None:
    torch.save(torch.nn.Linear(2, 2).state_dict(), tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="no batch norm among its 2 arrays"):
        convert_checkpoint(tmp_path / "x.pt", tmp_path / "y.pt")


def test_layers_of_one_name_are_refused(tmp_path: Path) -> None:
    layer = torch.nn.BatchNorm1d(2).state_dict()
    both = {f"a.b.{n}": t for n, t in layer.items()} | {f"a_b.{n}": t for n, t in layer.items()}
    torch.save(both, tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="two layers would be named 'a_b'"):
        convert_checkpoint(tmp_path / "x.pt", tmp_path / "y.h5")


def test_command_writes_and_says_what(tmp_path: Path) -> None:
    target = tmp_path / "x.msgpack"
    arguments = ["convert", str(source(tmp_path)), str(target)]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "2 batch norms written, flax's names, nothing left out" in done.output
    assert (
        "note: 2 of 2 variances were copied unchanged (unbiased). flax expects biased ones"
        in done.output
    )
    again = CliRunner().invoke(app, arguments)
    assert again.exit_code == 2
    assert "it exists; force=True (--force) replaces it" in again.output
    forced = CliRunner().invoke(app, [*arguments, "--force", "--count", "8", "--names", "nnx"])
    assert forced.exit_code == 0
    assert "note" not in forced.output
    assert {s.kind for s in read_checkpoint(target).layers} == {"flax.nnx"}


def test_command_reports_a_damaged_file_in_one_line(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    path.write_bytes(b"PK\x03\x04")
    done = CliRunner().invoke(app, ["convert", str(path), str(tmp_path / "y.pt")])
    assert done.exit_code == 2
    assert "no intact zip archive" in done.output
    assert "Traceback" not in done.output
