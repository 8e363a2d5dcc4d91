"""Random changes to files and folders, also inside archives whose checksums stay valid."""

from __future__ import annotations

import io
import os
import random
import shutil
import struct
import zipfile
from pathlib import Path

_EXTREMES = (0, 1, *((1 << n) - 1 for n in (7, 8, 16, 31, 32, 63, 64)), 1 << 40)


def mutate(source: Path, target: Path, rng: random.Random) -> None:
    """Write a changed copy of a file or folder."""
    if source.is_dir():
        shutil.copytree(source, target)
        for _ in range(rng.choice((1, 1, 2, 8))):
            _mutate_folder(target, rng)
        return
    data = source.read_bytes()
    repack = data[:2] == b"PK" and rng.random() < 0.7  # with valid checksums of the archive
    target.write_bytes(_mutate_member(data, rng) if repack else _mutate_bytes(data, rng))


def _mutate_folder(folder: Path, rng: random.Random) -> None:
    files = sorted(p for p in folder.rglob("*") if p.is_file() and not p.is_symlink())
    if not files:
        return
    # Readers skip most of the files.
    metadata = folder / "_METADATA"
    chosen = metadata if metadata in files and rng.random() < 0.3 else rng.choice(files)
    other, choice = rng.choice(files), rng.random()
    if choice < 0.7:
        chosen.write_bytes(_mutate_bytes(chosen.read_bytes(), rng))
        return
    content = other.read_bytes()
    chosen.unlink()
    if choice < 0.75:
        chosen.write_bytes(content)
    elif choice < 0.8:
        chosen.symlink_to(other)
    elif choice < 0.85:
        chosen.symlink_to(rng.choice(("/dev/zero", "/etc", chosen.name, "..", "nowhere")))
    elif choice < 0.9:
        chosen.mkdir()
    elif choice < 0.95:
        os.mkfifo(chosen)


def _mutate_member(data: bytes, rng: random.Random) -> bytes:
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    large = [name for name, content in members.items() if len(content) > 8]
    chosen = rng.choice(large)
    members[chosen] = _mutate_bytes(members[chosen], rng)
    out = io.BytesIO()
    method = rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def _mutate_bytes(data: bytes, rng: random.Random) -> bytes:
    content = bytearray(data or b"\0")
    for _ in range(rng.choice((1, 1, 1, 2, 4, 16))):
        at, size = _place(len(content), rng), rng.randrange(1, 64)
        choice = rng.randrange(7)
        if choice == 0:
            content[at] ^= 1 << rng.randrange(8)
        elif choice == 1:
            content[at] = rng.randrange(256)
        elif choice == 2:
            value, width = rng.choice(_EXTREMES), rng.choice((2, 4, 8))
            layout = rng.choice("<>") + {2: "H", 4: "I", 8: "Q"}[width]
            content[at : at + width] = struct.pack(layout, value & ((1 << 8 * width) - 1))
        elif choice == 3:
            del content[at : at + size]
        elif choice == 4:
            content[at:at] = content[_place(len(content), rng) :][:size]
        elif choice == 5:
            content[at : at + size] = rng.randbytes(size)
        elif rng.random() < 0.3:
            del content[at:]
        content = content or bytearray(b"\0")
    return bytes(content)


def _place(size: int, rng: random.Random) -> int:
    """Anywhere, but rather at the ends, where headers and directories are."""
    where = rng.random()
    if where < 0.4:
        return rng.randrange(min(size, 512))
    return size - 1 - rng.randrange(min(size, 512)) if where < 0.6 else rng.randrange(size)
