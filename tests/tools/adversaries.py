"""Files made to hang a reader, fill its memory, or lead it to other files.

Each function writes files of one kind. A generator draws their details, so that the fuzzer can
ask for many. All are small. HDF5 and orbax are in `adversaries_stored.py`.
"""

from __future__ import annotations

import json
import pickle
import random
import struct
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from adversaries_stored import (
    hdf5_attributes,
    hdf5_links,
    hdf5_sizes,
    odd_keras_configs,
    orbax_keys,
    orbax_links,
    orbax_references,
)

Random = random.Random
Write = Callable[[Path, Random], None]

_STATISTICS = ("weight", "bias", "running_mean", "running_var")


# safetensors


def long_safetensors_names(path: Path, rng: Random) -> None:
    """A name of very many parts, or of very many digits."""
    part = rng.choice(("a.", "a/", "1", "9.", "vars/0/", "batch_stats/"))
    name = part * rng.choice((100, 1000, 100_000, 300_000))
    write_safetensors(path, {f"{name}{leaf}": (1,) for leaf in (".running_mean", ".running_var")})


def many_safetensors_names(path: Path, rng: Random) -> None:
    """As many arrays without values as fit; their names differ only at the end."""
    stem = rng.choice(("bn.", "1", "x/", "batch_stats/", "a" * 500)) * rng.choice((1, 2, 20))
    count = min(800_000 // (len(stem) + 70), 9000)
    leaf = rng.choice(("running_mean", "mean", "vars/0"))
    write_safetensors(path, {f"{stem}{i}.{leaf}": (0,) for i in range(count)})


def write_safetensors(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Arrays of zeros, by name."""
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
    """Keys whose hash takes exponential time, or that all have the same hash."""
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
    """Tensors at the end of one compressed storage: each needs the data before it decompressed."""
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
    """Names with the marks of other libraries, long names, names that become the same."""
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
    """One long key above many arrays, or many nested keys above one array."""
    import msgpack

    array = msgpack.ExtType(1, msgpack.packb(((1,), "float32", b"\0\0\0\0")))
    tree: Any = {str(i): array for i in range(rng.choice((10, 20_000)))}
    length, depth = rng.choice(((200_000, 1), (1000, 60), (15, 62), (1, 300)))
    for _ in range(depth):
        tree = {"k" * length: tree}
    path.write_bytes(msgpack.packb(tree))


def deep_msgpack(path: Path, rng: Random) -> None:
    """Nested lists or maps, each of which claims to be as long as the file."""
    size = rng.choice((1000, 400_000))
    head = rng.choice((b"\xdd", b"\xdf")) + struct.pack(">I", size // rng.choice((1, 2, 100)))
    path.write_bytes(b"\x81\xa1a" + head * rng.choice((10, 500, 2000)) + b"\xc0" * size)


def extensions_in_extensions(path: Path, rng: Random) -> None:
    """Nested arrays: each level would be copied."""
    data = b"\xc0" * rng.choice((10, 200_000))
    for _ in range(rng.choice((3, 60, 400))):
        data = b"\xc9" + struct.pack(">Ib", len(data), 1) + data
    path.write_bytes(b"\x81\xa1a" + data)


def odd_chunks(path: Path, rng: Random) -> None:
    """Arrays that flax has cut into chunks, with chunks that do not fit together."""
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
    "weights.h5": (hdf5_links, hdf5_sizes, hdf5_attributes),
    "keras": (odd_keras_configs,),
    "orbax": (orbax_keys, orbax_links, orbax_references),
}
