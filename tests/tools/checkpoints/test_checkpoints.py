"""Reading checkpoints: files that libraries wrote, and malformed files."""

from __future__ import annotations

import argparse
import json
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from files import WRITERS, random_states, torch_model
from fuzz_checkpoints import fuzz

from batchnorm.core.running import LONG_RUNNING
from batchnorm.tools.checkpoints import CheckpointError, read_checkpoint
from batchnorm.torch import BatchNorm


def check(path: Path) -> Any:
    """Read, and compare with `random_states` to the bit."""
    found = read_checkpoint(path)
    assert [state.name for state in found.layers] == ["bn1", "bn2"]
    for state, wanted in zip(found.layers, random_states().values(), strict=True):
        for role, array in wanted.items():
            np.testing.assert_array_equal(getattr(state, role), array, err_msg=role)
            assert getattr(state, role).dtype == np.float32
    assert found.notes == []
    return found


@pytest.mark.parametrize("name", WRITERS)
def test_batch_norms_of_every_format_are_read_to_the_bit(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"file.{name}"
    WRITERS[name](path)
    found = check(path)
    torch_like = name in ("safetensors", "pt", "old.pt")
    assert {s.variance for s in found.layers} == {"unbiased" if torch_like else "biased"}
    assert {s.steps for s in found.layers} == {7 if "pt" in name.split(".") else None}
    known = (0.5, 0.75) if name == "keras" else (None, None)
    assert {(s.eps, s.decay) for s in found.layers} == {known}


def test_other_arrays_are_listed_and_not_loaded(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    model = torch_model()
    model.big = torch.nn.Linear(1000, 1000)
    torch.save(model.state_dict(), path)
    found = read_checkpoint(path, limit=1 << 20)
    assert found.entries["big.weight"].shape == (1000, 1000)
    assert len(found.layers) == 2


def test_torch_tensors_of_every_kind(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    base = torch.arange(24.0).reshape(4, 6)
    layer = BatchNorm(4, renorm=True)
    state = layer.state_dict()
    state["running_mean"] = base[:, 2]  # a strided view into a larger storage
    state["weight"] = torch.nn.Parameter(base[1, 1:5].bfloat16())
    torch.save({"model": {f"bn.{k}": v for k, v in state.items()}, "args": Path("x")}, path)
    (found,) = read_checkpoint(path).layers
    assert (found.name, found.variance, found.stored) == ("model.bn", "biased", "float32")
    np.testing.assert_array_equal(found.mean, base[:, 2].numpy())
    np.testing.assert_array_equal(found.gamma, base[1, 1:5].numpy())
    assert found.renorm is not None


def test_pickled_model_is_refused_and_never_run(tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(torch.nn.BatchNorm1d(3), path)
    with pytest.raises(CheckpointError, match=r"pickled torch\.nn.*Save model.state_dict"):
        read_checkpoint(path)
    ran = tmp_path / "ran"

    class Hostile:
        def __reduce__(self) -> Any:
            return Path.touch, (ran,)

    torch.save(OrderedDict(a=Hostile()), path)
    assert read_checkpoint(path).layers == []
    assert not ran.exists()


def write_pt(path: Path, pickled: bytes, data: bytes = b"") -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/byteorder", "little")
        archive.writestr("x/data/0", data)


def nested_tuples(depth: int) -> Any:
    value: Any = ()
    for _ in range(depth):
        value = (value, value)
    return value


def shared_dicts(depth: int) -> Any:
    value: Any = {}
    for _ in range(depth):
        value = {"a": value, "b": value}
    return value


@pytest.mark.parametrize(
    ("pickled", "message"),
    [
        (b"\x80\x02r\xff\xff\xff\xff.", "damaged"),  # a memo slot that needs 32 GiB
        (b"\x80\x02B\xff\xff\xff\xff.", "truncated"),
        (b"\x80\x02" + b"(" * 1000, "truncated"),
        (b"\x80\x02I1\n.", "not used by weights"),
        (pickle.dumps(shared_dicts(60), 2), "objects, more than weights need"),
        (b"", "truncated"),
    ],
)
def test_hostile_pickles_are_refused_at_once(tmp_path: Path, pickled: bytes, message: str) -> None:
    write_pt(tmp_path / "x.pt", pickled)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(tmp_path / "x.pt")


def test_key_whose_hash_takes_for_ever_is_harmless(tmp_path: Path) -> None:
    pickled = pickle.dumps(nested_tuples(60), 2)[:-1]
    write_pt(tmp_path / "x.pt", b"\x80\x02}" + pickled[2:] + b"K\x01s.")
    assert read_checkpoint(tmp_path / "x.pt").layers == []


def test_tensor_that_claims_more_than_its_storage_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    model = torch.nn.BatchNorm1d(3)
    torch.save(model.state_dict(), path)
    with zipfile.ZipFile(path) as archive:
        members = {n: archive.read(n) for n in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data[:4] if "/data/" in name else data)
    with pytest.raises(CheckpointError, match="shorter than the arrays"):
        read_checkpoint(path)


def header(entries: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(*span: int, shape: Any = (1,), dtype: Any = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(span)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (header({}, length=1 << 40), "claims 1099511627776 bytes"),
        (header({"a": entry(0, 4)}, b"\0" * 3), "not fully covered"),
        (header({"a": entry(0, 4)}, b"\0" * 5), "not fully covered"),
        (header({"a": entry(4, 8)}, b"\0" * 8), "invalid offset for tensor `a`"),
        (header({"a": entry(0, 4), "b": entry(0, 4)}, b"\0" * 4), "invalid offset for tensor"),
        (header({"a": entry(0, 4, shape=(2,))}, b"\0" * 4), "invalid shape, data type, or offset"),
        (header({"a": entry(0, 4, shape=(-1,))}, b"\0" * 4), "invalid value: integer `-1`"),
        (
            header({"a": entry(0, 4, shape=(1 << 40, 1 << 40))}, b"\0" * 4),
            "overflow computing buffer size",
        ),
        (header({"a": entry(0, True)}), "invalid type: boolean"),
        (header({"a": 1}), "expected struct TensorInfo"),
        (header(b'{"a":1,"a":1}'), "expected struct TensorInfo"),
        (header(b"{" + b'"a":[' * 100_000), "invalid JSON"),
        (header({"__metadata__": {"a": 1}}), "expected a string"),
    ],
)
def test_broken_safetensors_headers_are_refused(
    tmp_path: Path, content: bytes, message: str
) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\xdf\xff\xff\xff\xff", "cut off"),
        (b"\x81\xa1a" + b"\xdd\xff\xff\xff\xff" * 100, "nested deeper|cut off"),
        (b"\x81\xa1a\xc7\x10\x01\x93", "cut off"),
        (b"\x81\xa1a\x01\x01", "follow the end"),
        (b"\x82\xa1a\x01\xa1a\x01", "appears twice"),
        (b"\x81\xa1\xff\x01", "not UTF-8"),
    ],
)
def test_broken_msgpack_is_refused(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "x.msgpack"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path)


def test_archive_bomb_is_refused_before_it_is_unpacked(tmp_path: Path) -> None:
    path = tmp_path / "x.keras"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("config.json", "{}")
        archive.writestr("model.weights.h5", b"\0" * (20 << 20))
    assert path.stat().st_size < 1 << 16
    with pytest.raises(CheckpointError, match="exceeds the limit"):
        read_checkpoint(path, limit=10 << 20)


def test_hdf5_link_out_of_the_file_is_not_followed(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path, other = tmp_path / "x.h5", tmp_path / "other.h5"
    with h5py.File(other, "w") as file:
        file["secret"] = np.ones(3, np.float32)
    with h5py.File(path, "w") as file:
        for i, name in enumerate(("gamma", "beta", "moving_mean")):
            file[f"bn/{name}"] = np.full(3, i, np.float32)
        file["bn/moving_variance"] = h5py.ExternalLink(str(other), "secret")
        file["bn/circle"] = file["bn"]
    found = read_checkpoint(path)
    assert "bn/moving_variance" not in found.entries
    assert found.layers == []


def test_hdf5_dataset_of_a_huge_declared_shape_is_refused(tmp_path: Path) -> None:
    h5py = pytest.importorskip("h5py")
    path = tmp_path / "x.h5"
    with h5py.File(path, "w") as file:
        for name in ("gamma", "beta", "moving_mean", "moving_variance"):
            file.create_dataset(f"bn/{name}", (1 << 36,), "f4", chunks=(1 << 20,))
    assert path.stat().st_size < 1 << 16
    with pytest.raises(CheckpointError, match="exceeds the limit"):
        read_checkpoint(path)


def test_missing_package_is_named_with_the_extra_that_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.weights.h5"
    WRITERS["weights.h5"](path)
    (tmp_path / "h5py.py").write_text("raise ModuleNotFoundError(\"No module named 'h5py'\")")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match=r"No module named 'h5py'; .*batchnorm\[files\]"):
        read_checkpoint(path)


def test_nothing_is_imported_from_the_folder_of_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.weights.h5"
    WRITERS["weights.h5"](path)
    (tmp_path / "h5py.py").write_text("open('ran', 'w')")
    monkeypatch.chdir(tmp_path)
    check(path)
    assert not (tmp_path / "ran").exists()


def test_limit_and_path_are_checked(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_checkpoint(tmp_path / "missing.pt")
    with pytest.raises(CheckpointError, match="no orbax checkpoint"):
        read_checkpoint(tmp_path)
    (tmp_path / "empty").touch()
    with pytest.raises(CheckpointError, match="no known format"):
        read_checkpoint(tmp_path / "empty")
    with pytest.raises(ValueError, match="limit must be a positive number"):
        read_checkpoint(tmp_path, limit=0)


def test_message_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "broken.weights.h5"
    WRITERS["weights.h5"](path)
    path.write_bytes(path.read_bytes()[:-500])
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    assert "\n" not in message


@pytest.mark.parametrize("cases", [300, pytest.param(1200, marks=pytest.mark.exhaustive)])
def test_mutated_files_of_every_format_give_states_or_the_one_error(
    tmp_path: Path, cases: int
) -> None:
    report = fuzz(tmp_path, cases=cases, seed=1)
    assert report.problems == []
    assert report.refused > 100
    assert report.read > 10, "mutations that leave the file readable show that reading was tried"


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_pickles_of_every_protocol_and_of_unknown_classes_are_read(
    protocol: int, tmp_path: Path
) -> None:
    path = tmp_path / "lightning.ckpt"
    content = {
        "state_dict": torch_model().state_dict(),
        "hyper_parameters": argparse.Namespace(lr=0.1, layers={1, 2}, frozen=frozenset((3,))),
        "callbacks": {Path("x"): [torch.device("cpu"), 1 << 70, 1.5, b"bytes"]},
    }
    torch.save(content, path, pickle_protocol=protocol)
    check(path)


def test_arrays_that_flax_has_cut_are_read(tmp_path: Path, monkeypatch: Any) -> None:
    from flax import serialization

    monkeypatch.setattr(serialization, "MAX_CHUNK_SIZE", 8)
    path = tmp_path / "x.msgpack"
    WRITERS["msgpack"](path)
    assert b"__msgpack_chunked_array__" in path.read_bytes()
    found = check(path)
    assert found.entries["params/bn2/scale"].shape == (5,)


@pytest.mark.parametrize(("steps", "counted"), [(5, 5), (LONG_RUNNING + 5, None)])
def test_a_counter_of_steps_is_read(steps: int, counted: int | None, tmp_path: Path) -> None:
    from flax import nnx, serialization

    from batchnorm.jax import BatchNorm

    layer = BatchNorm(3, debias=True, rngs=nnx.Rngs(0))
    layer.steps[...] = layer.steps[...] + steps
    path = tmp_path / "x.msgpack"
    path.write_bytes(serialization.to_bytes({"bn": nnx.to_pure_dict(nnx.state(layer))}))
    (state,) = read_checkpoint(path).layers
    assert (state.steps, state.counted, state.channels) == (steps, counted, 3)


@pytest.mark.parametrize("name", ["safetensors", "msgpack"])
def test_bfloat16_is_read_as_float32_of_the_same_values(name: str, tmp_path: Path) -> None:
    import ml_dtypes
    import safetensors.numpy
    from flax import serialization

    path = tmp_path / "x"
    values = np.array([1, 1 / 3, 3e38], ml_dtypes.bfloat16)
    if name == "safetensors":
        safetensors.numpy.save_file({f"bn.{leaf}": values for leaf in ("mean", "var")}, path)
    else:
        path.write_bytes(serialization.to_bytes({"bn": {"mean": values, "var": values}}))
    (layer,) = read_checkpoint(path).layers
    assert layer.stored == "bfloat16"
    assert layer.mean is not None
    assert layer.mean.dtype == np.float32
    np.testing.assert_array_equal(layer.mean, values.astype(np.float32))
