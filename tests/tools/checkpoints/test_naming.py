"""Every layer of a file is read, or a note names it."""

from __future__ import annotations

import random
import re
import time
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import adversaries
import numpy as np
import pytest
import torch
from files import write_keras

from batchnorm.tools import inspect
from batchnorm.tools.checkpoints import read_checkpoint
from batchnorm.tools.checkpoints.groups import natural
from batchnorm.tools.checkpoints.naming import find_groups
from batchnorm.tools.checkpoints.source import Entry, LayerConfig, Source
from batchnorm.tools.convert import convert_checkpoint

_LEAVES = ("weight", "bias", "running_mean", "running_var")


def state_dict(*names: str, **changes: Any) -> dict[str, torch.Tensor]:
    """Batch norms of these names, whose means are 0, 1, 2, …."""
    arrays: dict[str, torch.Tensor] = {}
    for i, name in enumerate(names):
        arrays |= {f"{name}.{leaf}": torch.ones(3) for leaf in _LEAVES}
        arrays[f"{name}.running_mean"] = torch.full((3,), float(i))
    return arrays | changes


def means(path: Path) -> dict[str, float]:
    """The means of a file's layers by name."""
    return {layer.name: float(layer.mean[0]) for layer in read_checkpoint(path).layers}  # type: ignore[index]


def write_safetensors(path: Path, arrays: Mapping[str, torch.Tensor]) -> None:
    from safetensors.torch import save_file

    save_file(dict(arrays), path)


@pytest.mark.parametrize("write", [lambda p, a: torch.save(a, p), write_safetensors])
def test_names_with_slashes_and_dots_are_layers_of_their_own(write: Any, tmp_path: Path) -> None:
    names = ["a/b", "a.b", "a/b.c", "a.b/c", "a.b.c", "x/y/z", "params.d", "vars.0", "/e", "f/"]
    write(tmp_path / "x.safetensors", state_dict(*names))
    assert means(tmp_path / "x.safetensors") == {name: i for i, name in enumerate(names)}


def test_nan_in_a_layer_whose_name_has_a_slash_is_an_error(tmp_path: Path) -> None:
    arrays = state_dict("untrained", "bn", "a/b")
    arrays["a/b.running_var"][1] = float("nan")
    torch.save(arrays, tmp_path / "x.pt")
    report = inspect(tmp_path / "x.pt")
    levels = {layer.name: layer.level for layer in report.layers}
    assert levels == {"untrained": "error", "bn": "ok", "a/b": "error"}


def test_every_one_of_300_layers_is_found(tmp_path: Path) -> None:
    rng = random.Random(0)
    marks = [rng.choice((".", "/")) for _ in range(300)]
    names = [f"block{i % 17}{mark}bn{i}{mark}x" for i, mark in enumerate(marks)]
    torch.save(state_dict(*names), tmp_path / "x.pt")
    assert list(means(tmp_path / "x.pt")) == names


@pytest.mark.parametrize("suffix", [".pt", ".safetensors", ".msgpack"])
def test_conversion_carries_layers_whose_names_have_slashes(suffix: str, tmp_path: Path) -> None:
    names = ["a/b", "a.c", "d/e.f"]
    torch.save(state_dict(*names), tmp_path / "x.pt")
    convert_checkpoint(tmp_path / "x.pt", tmp_path / f"y{suffix}")
    wanted = {name: float(i) for i, name in enumerate(names)}
    if suffix == ".msgpack":
        wanted = {name.replace(".", "/"): value for name, value in wanted.items()}
    assert means(tmp_path / f"y{suffix}") == wanted


@pytest.mark.parametrize("suffix", [".msgpack", ".h5", ".weights.h5"])
def test_conversion_says_so_where_two_layers_would_have_one_name(
    suffix: str, tmp_path: Path
) -> None:
    torch.save(state_dict("a/b", "a.b"), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="two layers would be named"):
        convert_checkpoint(tmp_path / "x.pt", tmp_path / f"y{suffix}")
    assert not (tmp_path / f"y{suffix}").exists()


def test_same_layer_in_two_collections_is_two_layers(tmp_path: Path) -> None:
    names = ["bn.mean", "bn.var", "state.bn.mean", "state.bn.var"]
    write_safetensors(tmp_path / "x", {n: torch.full((3,), float(i)) for i, n in enumerate(names)})
    assert means(tmp_path / "x") == {"bn": 0, "state/bn": 2}
    (note,) = read_checkpoint(tmp_path / "x").notes
    assert note == "'bn' is in several collections with one role twice; each is read as a layer."


def test_collections_inside_a_state_are_joined(tmp_path: Path) -> None:
    leaves = ("params.bn.scale", "params.bn.bias", "batch_stats.bn.mean", "batch_stats.bn.var")
    write_safetensors(tmp_path / "x", {f"state.{leaf}": torch.ones(3) for leaf in leaves})
    (layer,) = read_checkpoint(tmp_path / "x").layers
    assert layer.name == "state/bn"
    assert layer.gamma is not None
    assert layer.beta is not None


def test_layers_of_lists_and_of_numbered_dictionaries_are_read(tmp_path: Path) -> None:
    models = [state_dict("bn"), state_dict("x", "bn")]
    torch.save({"models": models, "ema": {7: models[1]}}, tmp_path / "x.pt")
    wanted = {"models.0.bn": 0, "models.1.x": 0, "models.1.bn": 1, "ema.7.x": 0, "ema.7.bn": 1}
    assert means(tmp_path / "x.pt") == wanted


def test_tensor_with_attributes_is_read(tmp_path: Path) -> None:
    arrays = state_dict("bn")
    arrays["bn.running_mean"].origin = "here"  # type: ignore[attr-defined]
    torch.save(arrays, tmp_path / "x.pt")
    assert means(tmp_path / "x.pt") == {"bn": 0}


def incomplete(name: str) -> dict[str, torch.Tensor]:
    arrays = state_dict("bn")
    del arrays[f"bn.{name}"]
    return arrays


_UNREADABLE: list[tuple[Any, str]] = [
    (incomplete("running_var"), r"'bn' cannot be read .*: it lacks its mean or its variance"),
    (incomplete("running_mean"), r"'bn' cannot be read .*: it lacks its mean or its variance"),
    (
        state_dict("bn", **{"bn.running_var": torch.ones(4)}),
        r"'bn' cannot be read .* mean \(3,\), var \(4,\)",
    ),
    (state_dict("bn", **{"bn.running_var": torch.tensor(1.0)}), r"'bn' cannot be read .* \(\)"),
    (
        state_dict("bn", **{"bn.running_var": torch.ones(3).to(torch.float8_e4m3fn)}),
        r"'bn.running_var' is a tensor of torch._utils._rebuild_tensor_v3",
    ),
    (
        state_dict("bn", **{"bn.running_var": torch.ones(3, dtype=torch.complex64)}),
        r"'bn.running_var' is of type ComplexFloatStorage",
    ),
    (
        state_dict("bn", **{"bn.running_var": torch.ones(3).to_sparse()}),
        r"'bn.running_var' is a tensor of torch._utils._rebuild_sparse_tensor",
    ),
    (
        {"model": torch.nn.BatchNorm1d(3), "epoch": 1},
        r"1 models were pickled whole and are not read, 'model' \(torch.nn.*BatchNorm1d\); save",
    ),
    (
        {"a.b": {"running_mean": torch.ones(3)}, "a": {"b.running_mean": torch.ones(3)}},
        r"1 arrays have the name of another and are left out: 'a.b.running_mean'",
    ),
]


@pytest.mark.parametrize(("arrays", "note"), _UNREADABLE)
def test_layer_that_cannot_be_read_has_a_line(arrays: Any, note: str, tmp_path: Path) -> None:
    torch.save(arrays, tmp_path / "x.pt")
    found = read_checkpoint(tmp_path / "x.pt")
    assert found.layers == []
    assert any(re.search(note, line) for line in found.notes), found.notes
    assert inspect(tmp_path / "x.pt").notes == tuple(found.notes)


def test_safetensors_of_a_type_that_is_not_read_has_a_line(tmp_path: Path) -> None:
    arrays = state_dict("bn", "other")
    arrays["bn.running_var"] = arrays["bn.running_var"].to(torch.float8_e4m3fn)
    write_safetensors(tmp_path / "x", arrays)
    found = read_checkpoint(tmp_path / "x")
    assert [layer.name for layer in found.layers] == ["other"]
    assert found.notes == [
        "'bn' cannot be read as a batch norm: 'bn.running_var' is of type F8_E4M3."
    ]


def test_keras_weights_that_do_not_say_what_they_are_have_a_line(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    with h5py.File(tmp_path / "x.weights.h5", "w") as file:
        for i in range(4):
            file[f"layers/normalizer/vars/{i}"] = np.ones(3, np.float32)
            file[f"layers/batch_normalization/vars/{i}"] = np.ones(3, np.float32)
    found = read_checkpoint(tmp_path / "x.weights.h5")
    assert [layer.name for layer in found.layers] == ["batch_normalization"]
    assert found.notes == ["'normalizer' may be a batch norm by its shapes, not by its name."]


def test_batch_norm_of_a_keras_config_without_weights_has_a_line(tmp_path: Path) -> None:
    write_keras(tmp_path / "x.keras")
    with zipfile.ZipFile(tmp_path / "x.keras") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["config.json"] = members["config.json"].replace(b'"bn2"', b'"missing"')
    with zipfile.ZipFile(tmp_path / "y.keras", "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    found = read_checkpoint(tmp_path / "y.keras")
    assert [layer.name for layer in found.layers] == ["bn1"]
    assert found.notes == ["1 batch norms of the config have no weights here: 'missing'."]


def test_many_notes_are_cut_and_counted(tmp_path: Path) -> None:
    names = {f"bn{i}.running_mean": (3,) for i in range(500)}
    adversaries.write_safetensors(tmp_path / "x", names)
    notes = read_checkpoint(tmp_path / "x").notes
    assert len(notes) == 101
    assert notes[-1] == "400 more notes like these are left out."


def test_names_take_time_in_proportion_to_their_number() -> None:
    names = [f"bn{i}" for i in range(20_000)]
    parts = [(f"{name}/vars/{j}", name) for name in names for j in range(4)]
    entries = {f"layers/{part}": Entry((3,), "float32") for part, _ in parts}
    labels = {f"layers/{name}/vars": name for name in names}
    configs = tuple(LayerConfig(name) for name in reversed(names))
    source = Source("hdf5", entries, lambda name: np.ones(3), configs, labels)
    start = time.process_time()
    groups, notes = find_groups(source)
    natural(["1" * 100_000 + "x"] * 10)
    assert time.process_time() - start < 10, "a look at every config for every layer takes minutes"
    assert [group.name for group in groups] == names[::-1]
    assert notes == []
