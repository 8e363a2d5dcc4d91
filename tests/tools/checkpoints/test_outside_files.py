"""Reading opens no file outside the given file or folder."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from adversaries_stored import (
    SECRET,
    SPELLINGS,
    edit_metadata,
    hdf5_links,
    orbax_references,
    write_orbax_folder,
)
from files import WRITERS
from watching import Watch

from batchnorm.tools.checkpoints import CheckpointError, read_checkpoint
from batchnorm.tools.checkpoints.folders import Folder
from batchnorm.tools.checkpoints.limits import Budget


@pytest.fixture
def watched(tmp_path: Path) -> Callable[[Path], Any]:
    """Reads a folder, and asserts that no `away*` beside the folder was opened."""

    def read(path: Path) -> Any:
        watch = Watch(tmp_path.glob("away*"))
        try:
            return read_checkpoint(path)
        finally:
            assert watch.opened() == set()
            watch.close()

    return read


@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
def test_orbax_arrays_in_folders_are_read(driver: str, tmp_path: Path, watched: Any) -> None:
    write_orbax_folder(tmp_path / "x", "bn", driver=driver)
    (layer,) = watched(tmp_path / "x").layers
    np.testing.assert_array_equal(layer.mean, np.full(3, 1.0))
    np.testing.assert_array_equal(layer.var, np.full(3, 2.0))


@pytest.mark.sample(4)
@pytest.mark.parametrize("database", [False, True])
@pytest.mark.parametrize("key", SPELLINGS)
def test_no_spelling_of_a_key_leads_out_of_an_orbax_folder(
    key: str, database: bool, tmp_path: Path, watched: Any
) -> None:
    write_orbax_folder(tmp_path / "x", key)
    if database:
        WRITERS["orbax"](tmp_path / "seed")
        edit_metadata(tmp_path / "x", use_ocdbt=True)
        for name in ("manifest.ocdbt", "d"):
            (tmp_path / "seed" / name).rename(tmp_path / "x" / name)
    with pytest.raises(CheckpointError) as caught:
        watched(tmp_path / "x")
    assert "\n" not in str(caught.value)


_LINKED = ("_METADATA", "bn.mean", "bn.mean/.zarray", "bn.mean/0", "bn.var/0")


@pytest.mark.parametrize("victim", _LINKED)
def test_link_out_of_an_orbax_folder_is_refused(victim: str, tmp_path: Path, watched: Any) -> None:
    path, away = tmp_path / "x", tmp_path / "away.mean"
    write_orbax_folder(path, "bn")
    shutil.copy(path / "_METADATA", away)
    place = path / victim
    shutil.rmtree(place) if place.is_dir() else place.unlink()
    place.symlink_to(away if victim == "bn.mean" else away / place.name)
    with pytest.raises(CheckpointError, match=r"a link out of the folder.*cp -rL"):
        watched(path)


@pytest.mark.parametrize("victim", ["manifest.ocdbt", "d", "ocdbt.process_0", "*/manifest.ocdbt"])
def test_link_out_of_an_orbax_database_is_refused(
    victim: str, tmp_path: Path, watched: Any
) -> None:
    path, away = tmp_path / "x", tmp_path / "away"
    WRITERS["orbax"](path)
    (place,) = path.glob(victim)
    place.rename(away)
    place.symlink_to(away)
    with pytest.raises(CheckpointError, match="a link out of the folder"):
        watched(path)


@pytest.mark.parametrize("victim", ["_METADATA", "bn.mean", "bn.mean/.zarray", "bn.mean/0"])
def test_pipe_in_an_orbax_folder_is_refused_at_once(victim: str, tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_orbax_folder(path, "bn")
    (path / victim).rename(tmp_path / "kept")
    os.mkfifo(path / victim)
    with pytest.raises(CheckpointError, match="neither a file nor a folder"):
        read_checkpoint(path)


def test_link_inside_an_orbax_folder_is_followed(tmp_path: Path) -> None:
    path = tmp_path / "x"
    write_orbax_folder(path, "bn")
    (path / "bn.mean" / "0").rename(path / "kept")
    (path / "bn.mean" / "0").symlink_to("../kept")
    (path / "bn.var").rename(path / "folder")
    (path / "bn.var").symlink_to(path / "folder")
    (tmp_path / "link").symlink_to(path)
    (layer,) = read_checkpoint(tmp_path / "link").layers
    assert (layer.mean[0], layer.var[0]) == (1.0, 2.0)


def test_link_that_appears_after_the_check_is_not_followed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_orbax_folder(tmp_path / "x", "bn")
    with Folder(tmp_path / "x", Budget(tmp_path / "x")) as folder:
        (tmp_path / "x" / "late").symlink_to(tmp_path / "away.mean")
        monkeypatch.setattr(os.path, "realpath", str)  # as if it had been no link then
        with pytest.raises(CheckpointError, match="cannot be opened"):
            folder.read(("late", ".zarray"))


@pytest.mark.parametrize("seed", range(8))
def test_database_that_refers_to_other_files_is_refused(
    seed: int, tmp_path: Path, watched: Any
) -> None:
    orbax_references(tmp_path / "x", random.Random(seed))
    with pytest.raises(CheckpointError, match="cannot be opened"):
        watched(tmp_path / "x")


def test_files_beside_an_hdf5_file_are_not_opened(tmp_path: Path, watched: Any) -> None:
    h5py = pytest.importorskip("h5py")
    for seed in range(12):
        hdf5_links(tmp_path / "x", random.Random(seed))
        found = watched(tmp_path / "x")
        assert all((a != SECRET).all() for s in found.layers for a in (s.mean, s.var))
    with h5py.File(tmp_path / "x", "w") as file:  # the place of Keras 2's order of layers
        file["model_weights"] = h5py.ExternalLink(str(tmp_path / "away"), "bn")
    (note,) = watched(tmp_path / "x").notes
    assert note == "1 links, to other files or to groups, are not followed: 'model_weights'."
