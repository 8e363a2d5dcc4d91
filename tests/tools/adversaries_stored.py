"""Files and folders of libraries that store arrays, made by the adversaries of `adversaries.py`.

Beside each folder, and each file that could refer to another file, lies `away`: it holds values
that no reader may return.
"""

from __future__ import annotations

import io
import json
import random
import re
import shutil
import struct
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

SECRET = 271828.0  # in files that are not to be opened

Random = random.Random


# HDF5


def hdf5_links(path: Path, rng: Random) -> None:
    """Links out of the file, in circles and to nowhere, in every place that a reader looks up."""
    import h5py

    away = path.parent / "away"
    with h5py.File(away, "w") as file:
        for leaf in ("gamma", "beta", "moving_mean", "moving_variance"):
            file[f"bn/{leaf}"] = np.full(3, SECRET, np.float32)
        file["bn"].attrs["layer_names"] = [b"bn"]
    with h5py.File(path, "w") as file:
        for name in ("bn", "model_weights", "layers", "vars", "a/b"):
            choice = rng.randrange(5)
            if choice == 0:
                file[name] = h5py.ExternalLink(str(away), "bn")
            elif choice == 1:
                file[name] = h5py.SoftLink(rng.choice(("/", "/bn", "/nowhere")))
            elif choice == 2:
                file.create_group(name)["circle"] = file["/"]
            elif choice == 3:
                file.create_dataset(
                    f"{name}/moving_mean", (3,), "f4", external=[(str(away), 0, 12)]
                )
        if rng.random() < 0.5:
            layout = h5py.VirtualLayout((3,), "f4")
            layout[:] = h5py.VirtualSource(str(away), "bn/gamma", (3,))
            file.create_virtual_dataset("virtual/moving_variance", layout)


def hdf5_sizes(path: Path, rng: Random) -> None:
    """Shapes and chunks that are larger than the file by far, and long or many names."""
    import h5py

    chunk = rng.choice((1 << 10, 1 << 10, 1 << 20, 1 << 24))
    with h5py.File(path, "w") as file:
        stem = rng.choice(("bn", "b" * 5000, "b/" * 60, "b/" * 100))
        for leaf in ("gamma", "beta", "moving_mean", "moving_variance"):
            data = file.create_dataset(
                f"{stem}/{leaf}",
                (rng.choice((4, chunk, 1 << 40)),),
                "f4",
                chunks=(chunk,),
                maxshape=(None,),
                compression="gzip",
            )
            data[:4] = 1.0
        for i in range(rng.choice((0, 2000))):
            file.create_group(f"g{i}")


def hdf5_attributes(path: Path, rng: Random) -> None:
    """Attributes that are long, many, of odd types, or no texts."""
    import h5py

    values: list[Any] = ["x" * rng.choice((10, 1 << 22)), b"\xff", "\x1b[2J", 3.5, [1, 2]]
    values += [h5py.Empty("S3"), h5py.Empty("f4"), [], [["a"]], ["ab"] * 3, [b"\xff"]]
    values += [np.zeros(3, [("a", "f4")]), np.array(["a", "b" * 999], h5py.string_dtype())]
    with h5py.File(path, "w") as file:
        for leaf in ("gamma", "beta", "moving_mean", "moving_variance"):
            file[f"bn/{leaf}"] = np.ones(3, np.float32)
        for place in ("/", "bn", "bn/gamma"):
            names = [f"a{i}" for i in range(rng.choice((1, 20, 500)))]
            names += ["name", "layer_names", "weight_names", "n" * rng.choice((1, 40_000))]
            for name in rng.sample(names, rng.randrange(1, len(names))):
                file[place].attrs[name] = rng.choice(values)
        file["there"] = 1.0
        file["there"].attrs["reference"] = file["bn"].ref


def odd_keras_configs(path: Path, rng: Random) -> None:
    """A config that is deep, of wrong types, or of very many layers."""
    import h5py

    name: Any = rng.choice(("bn", 1, None, [], "b" * 100_000))
    options = {"name": name, "epsilon": rng.choice((1, -1, "x", 10**400, None))}
    layer: Any = {"class_name": rng.choice(("BatchNormalization", 3, [])), "config": options}
    layers = [layer] * rng.choice((1, 5000))
    text = json.dumps({"class_name": "Functional", "config": {"layers": layers}})
    if rng.random() < 0.3:
        text = "[" * rng.choice((100, 100_000))
    weights = io.BytesIO()
    with h5py.File(weights, "w") as file:
        group = file.create_group("layers/batch_normalization/vars")
        group.attrs["name"] = rng.choice(("bn", "n" * 3000, "\n"))
        for i in range(rng.randrange(6)):
            group[rng.choice((str(i), "9" * 1000, "²"))] = np.ones(3, np.float32)
            break
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as archive:
        archive.writestr("config.json", text)
        archive.writestr(
            "model.weights.h5", weights.getvalue() + b"\0" * rng.choice((0,) * 9 + (40 << 20,))
        )


# orbax

SPELLINGS = (
    *("..%2faway", "..%2Faway", "%2e%2e%2Faway", "%2E%2E/away", "%252e%252e%252faway"),
    *("..\\away", "z\\..\\..\\away", "../away", "./../away", "/{away}", "//{away}", "{away}"),
    *("a\0b", "..", ".", "", "file:///{away}", "..;/away", "\uff0e\uff0e/away", "..\u2215away"),
)


def orbax_keys(path: Path, rng: Random) -> None:
    """Keys that spell a path out of the folder; at its end lies an array of the same form."""
    write_orbax_folder(path, rng.choice(("bn", *SPELLINGS)), driver=rng.choice(("zarr", "zarr3")))
    if rng.random() < 0.5:
        edit_metadata(path, use_ocdbt=rng.choice((True, None, 0, "false")))


def orbax_links(path: Path, rng: Random) -> None:
    """Links out of the folder, which replace a file or folder that is read."""
    write_orbax_folder(path, "bn", driver=rng.choice(("zarr", "zarr3")))
    away = path.parent / "away"
    choices = [p for p in path.rglob("*") if p.name != "_METADATA" or rng.random() < 0.3]
    victim = rng.choice(sorted(choices))
    target = away.joinpath(*victim.relative_to(path).parts[1:]) if rng.random() < 0.7 else away
    shutil.rmtree(victim) if victim.is_dir() else victim.unlink()
    victim.symlink_to(rng.choice((target, Path("/dev/zero"), Path("/"), victim, Path("loop"))))


def orbax_references(path: Path, rng: Random) -> None:
    """A database whose manifest refers to a file elsewhere."""
    import tensorstore

    base = {"driver": "file", "path": f"{path}/"}
    config = {"compression": None, "max_inline_value_bytes": 0}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base, "config": config}).result()
    store.write("bn.mean/.zarray", json.dumps(_ZARRAY).encode()).result()
    del store
    _write_metadata(path, ["bn"], "zarr", together=True)
    manifest = path / "manifest.ocdbt"
    content = manifest.read_bytes()
    found = re.search(rb"d/[0-9a-f]{32}", content)
    assert found is not None
    away = path.parent / "away"
    shutil.copytree(path / "d", away, dirs_exist_ok=True)
    name = rng.choice(("../away/x", f"{away}/x", "..\\away\\x", "%2e%2e/away/x", "d/../../away/x"))
    new = name.encode().ljust(len(found[0]), b"x")[: len(found[0])]
    shutil.copy(path / found[0].decode(), away / new.decode().rpartition("/")[2])
    edited = content.replace(found[0], new)[:-4]
    manifest.write_bytes(edited + struct.pack("<I", _crc32c(edited)))


_ZARRAY = {
    "zarr_format": 2,
    "shape": [3],
    "chunks": [3],
    "dtype": "<f4",
    "compressor": None,
    "fill_value": None,
    "filters": None,
    "order": "C",
    "dimension_separator": ".",
}


def write_orbax_folder(path: Path, key: str, *, driver: str = "zarr") -> None:
    """A folder without a database, with arrays at the path `key`, and `away` beside the folder."""
    away = path.parent / "away"
    key = key.format(away=away)
    path.mkdir()
    for folder, value in ((away, SECRET), (path / "bn.mean", 1.0), (path / "bn.var", 2.0)):
        _write_array(folder, value, driver)
    for leaf in ("scale", "bias", "mean", "var"):  # whatever follows the key
        _write_array(path.parent / f"away.{leaf}", SECRET, driver)
    _write_metadata(path, [key], driver, together=False)


def _write_array(folder: Path, value: float, driver: str) -> None:
    import tensorstore

    if folder.exists():
        shutil.rmtree(folder)
    spec = {"driver": driver, "kvstore": {"driver": "file", "path": f"{folder}/"}}
    store = tensorstore.open(spec, create=True, dtype="float32", shape=[3]).result()
    store.write(np.full(3, value, np.float32)).result()


def _write_metadata(path: Path, keys: list[str], driver: str, *, together: bool) -> None:
    tree = {}
    for leaf in ("mean", "var"):
        parts = [{"key": key, "key_type": 2} for key in (*keys, leaf)]
        tree[leaf] = {"key_metadata": parts, "value_metadata": {"value_type": "jax.Array"}}
    # The whole path may be the key, too: what follows a key would not be there.
    if keys != ["bn"]:
        parts = [{"key": keys[0], "key_type": 2}]
        tree["whole"] = {"key_metadata": parts, "value_metadata": {"value_type": "jax.Array"}}
    metadata = {"tree_metadata": tree, "use_ocdbt": together, "use_zarr3": driver == "zarr3"}
    (path / "_METADATA").write_text(json.dumps(metadata))


def edit_metadata(path: Path, **changes: Any) -> None:
    """Replace entries of a folder's metadata."""
    file = path / "_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF
