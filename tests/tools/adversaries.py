"""Files that somebody made to hang a reader, fill its memory, or lead it elsewhere.

Each function writes one of a kind, and draws what varies from a generator, so that the fuzzer can
ask for many. All are small. Beside a folder, or a file that could name another, lies `away` with
values that no reader may return.
"""

from __future__ import annotations

import io
import json
import pickle
import random
import re
import shutil
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

SECRET = 271828.0  # in files that are not to be opened

Random = random.Random
Write = Callable[[Path, Random], None]

_STATISTICS = ("weight", "bias", "running_mean", "running_var")


# safetensors


def long_safetensors_names(path: Path, rng: Random) -> None:
    """A name of very many parts, or of very many digits."""
    part = rng.choice(("a.", "a/", "1", "9.", "vars/0/", "batch_stats/"))
    name = part * rng.choice((100, 1000, 100_000, 300_000))
    _write_safetensors(path, {f"{name}{leaf}": (1,) for leaf in (".running_mean", ".running_var")})


def many_safetensors_names(path: Path, rng: Random) -> None:
    """As many arrays without values as fit, under one name but for its end."""
    stem = rng.choice(("bn.", "1", "x/", "batch_stats/", "a" * 500)) * rng.choice((1, 2, 20))
    count = min(800_000 // (len(stem) + 70), 9000)
    leaf = rng.choice(("running_mean", "mean", "vars/0"))
    _write_safetensors(path, {f"{stem}{i}.{leaf}": (0,) for i in range(count)})


def _write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 4 * int(np.prod(shape))
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + b"\0" * at)


# torch.save


def shared_dicts(path: Path, rng: Random) -> None:
    """Dictionaries that hold each other twice, under keys of any length: 2^depth paths."""
    depth, width = rng.choice((12, 16, 20, 60)), rng.choice((2, 3))
    key = "k" * rng.choice((1, 30, 60, 1000, 20_000))
    value: Any = {"running_mean": None}
    for _ in range(depth):
        value = {f"{key}{i}": value for i in range(width)}
    write_pt(path, pickle.dumps(value, 2))


def shared_lists(path: Path, rng: Random) -> None:
    """A nest of shared lists, as the protocol of an old file or as its whole content."""
    value: Any = rng.choice(([], (), {}))
    for _ in range(rng.choice((5, 10, 15, 60))):
        value = rng.choice((list, tuple))((value, value))
    magic = pickle.dumps(0x1950A86A20F9469CFC6C, 2)
    protocol = value if rng.random() < 0.7 else 1001
    rest = [pickle.dumps(v, 2) for v in (protocol, {}, value, [])]
    path.write_bytes(b"".join([magic, *rest]))


def keys_that_take_long(path: Path, rng: Random) -> None:
    """Keys whose hash takes exponential time, or that have one hash."""
    if rng.random() < 0.5:
        value: Any = ()
        for _ in range(rng.choice((30, 60))):
            value = (value, value)
        pickled = b"\x80\x02}" + pickle.dumps(value, 2)[2:-1] + b"K\x01s."
    else:
        step = (1 << 61) - 1
        numbers = (i * step for i in range(rng.choice((1000, 50_000))))
        pairs = b"".join(pickle.dumps(n, 2)[2:-1] + b"N" for n in numbers)
        pickled = b"\x80\x02}(" + pairs + b"u."
    write_pt(path, pickled)


def many_tensors_of_one_storage(path: Path, rng: Random) -> None:
    """Tensors at the end of one storage, which is packed: each takes unpacking what is before."""
    size, count = rng.choice((1 << 20, 1 << 26)), rng.choice((10, 120, 1000))
    packed = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    size = size if packed == zipfile.ZIP_DEFLATED else 1 << 18
    places = {f"bn{i}.{leaf}": size // 4 - 4 for i in range(count) for leaf in _STATISTICS}
    write_pt(path, pickled_tensors(places, size // 4), b"\0" * size, packed)


def spread_tensors(path: Path, rng: Random) -> None:
    """Shapes that repeat one value, or reach beyond the storage."""
    shape = rng.choice(((1 << 40,), (1 << 20, 1 << 20), (1 << 28,), (4,) * 31, (0, 1 << 61)))
    places = {f"bn.{leaf}": rng.choice((0, -1, 1 << 40)) for leaf in _STATISTICS}
    stride = rng.choice((0, 1, -1, 1 << 62))
    write_pt(path, pickled_tensors(places, 4, shape, (stride,) * len(shape)), b"\0" * 16)


def odd_torch_names(path: Path, rng: Random) -> None:
    """Names with the marks of other libraries, long ones, ones that become the same."""
    stems = ["a/b", "a.b", "a/b.c", "a.b/c", "\n\x1b[2J", "", "/", ".", "x" * 2000, "vars.0"]
    stems += ["batch_stats/a", "params.a", "state_dict.a"]
    names = rng.sample(stems, rng.randrange(1, 5))
    places = {f"{stem}.{leaf}": 0 for stem in names for leaf in _STATISTICS}
    write_pt(path, pickled_tensors(places, 4), struct.pack("<4f", 1, 2, 3, 4))


def pickled_tensors(
    places: Mapping[str, int],
    length: int,
    shape: tuple[int, ...] = (4,),
    strides: tuple[int, ...] = (1,),
) -> bytes:
    """A dictionary of tensors of one storage, by name and offset."""
    parts = [b"\x80\x02}("]
    for name, offset in places.items():
        parts += [_dump(name), b"ctorch._utils\n_rebuild_tensor_v2\n(("]
        parts += [_dump("storage"), b"ctorch\nFloatStorage\n", _dump("0"), _dump("cpu")]
        parts += [_dump(length), b"tQ", _dump(offset), _dump(shape), _dump(strides), b"\x89NtR"]
    return b"".join([*parts, b"u."])


def _dump(value: Any) -> bytes:
    return pickle.dumps(value, 2)[2:-1]


def write_pt(
    path: Path, pickled: bytes, data: bytes = b"", method: int = zipfile.ZIP_STORED
) -> None:
    """An archive of `torch.save` with one storage."""
    with zipfile.ZipFile(path, "w", method) as archive:
        archive.writestr("x/data.pkl", pickled)
        archive.writestr("x/byteorder", "little")
        archive.writestr("x/data/0", data)


# msgpack


def long_msgpack_keys(path: Path, rng: Random) -> None:
    """One long key above many arrays, or many keys within each other above one."""
    import msgpack

    array = msgpack.ExtType(1, msgpack.packb(((1,), "float32", b"\0\0\0\0")))
    tree: Any = {str(i): array for i in range(rng.choice((10, 20_000)))}
    length, depth = rng.choice(((200_000, 1), (1000, 60), (15, 62), (1, 300)))
    for _ in range(depth):
        tree = {"k" * length: tree}
    path.write_bytes(msgpack.packb(tree))


def deep_msgpack(path: Path, rng: Random) -> None:
    """Lists or maps within each other, each of which claims to be as long as the file."""
    size = rng.choice((1000, 400_000))
    head = rng.choice((b"\xdd", b"\xdf")) + struct.pack(">I", size // rng.choice((1, 2, 100)))
    path.write_bytes(b"\x81\xa1a" + head * rng.choice((10, 500, 2000)) + b"\xc0" * size)


def extensions_in_extensions(path: Path, rng: Random) -> None:
    """An array that is in an array, and so on: each would be copied."""
    data = b"\xc0" * rng.choice((10, 200_000))
    for _ in range(rng.choice((3, 60, 400))):
        data = b"\xc9" + struct.pack(">Ib", len(data), 1) + data
    path.write_bytes(b"\x81\xa1a" + data)


def odd_chunks(path: Path, rng: Random) -> None:
    """Arrays that flax has cut, whose parts do not fit."""
    import msgpack

    size = rng.randrange(4)
    chunk = msgpack.ExtType(1, msgpack.packb(((size,), "float32", b"\0" * 4 * size)))
    value = {
        "__msgpack_chunked_array__": True,
        "shape": {"0": rng.choice((size, 4, 1 << 61, -1, "x", None))},
        "chunks": {str(rng.randrange(3)): rng.choice((chunk, None, 1))},
    }
    for key in rng.sample(sorted(value), rng.randrange(2)):
        del value[key]
    path.write_bytes(msgpack.packb({"bn": dict.fromkeys(("mean", "var", "scale"), value)}))


# HDF5


def hdf5_links(path: Path, rng: Random) -> None:
    """Links out of the file, in circles and to nowhere, in any place where one is looked up."""
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
    """Keys that spell a way out of the folder; beside it lies an array of the same form."""
    write_orbax_folder(path, rng.choice(("bn", *SPELLINGS)), driver=rng.choice(("zarr", "zarr3")))
    if rng.random() < 0.5:
        _edit_metadata(path, use_ocdbt=rng.choice((True, None, 0, "false")))


def orbax_links(path: Path, rng: Random) -> None:
    """Links out of the folder in the place of a file or folder that is read."""
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
    """A folder without a database, whose arrays have `key` for their path, and `away` beside it."""
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


def _edit_metadata(path: Path, **changes: Any) -> None:
    file = path / "_METADATA"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def _crc32c(data: bytes) -> int:
    value = 0xFFFFFFFF
    for byte in data:
        value ^= byte
        for _ in range(8):
            value = (value >> 1) ^ (0x82F63B78 if value & 1 else 0)
    return value ^ 0xFFFFFFFF


ADVERSARIES: Mapping[str, tuple[Write, ...]] = {
    "safetensors": (long_safetensors_names, many_safetensors_names),
    "pt": (
        shared_dicts,
        keys_that_take_long,
        many_tensors_of_one_storage,
        spread_tensors,
        odd_torch_names,
    ),
    "old.pt": (shared_lists,),
    "msgpack": (long_msgpack_keys, deep_msgpack, extensions_in_extensions, odd_chunks),
    "weights.h5": (hdf5_links, hdf5_sizes),
    "keras": (odd_keras_configs,),
    "orbax": (orbax_keys, orbax_links, orbax_references),
}
