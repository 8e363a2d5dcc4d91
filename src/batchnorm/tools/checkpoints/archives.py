"""zip archives within limits; nothing is ever extracted to a path that an archive names."""

from __future__ import annotations

import zipfile
import zlib
from typing import BinaryIO

from batchnorm.tools.checkpoints.limits import Budget, CheckpointError, GuardedFile

__all__ = ["DAMAGED", "open_archive", "read_member", "read_part"]

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others cannot be unpacked piece by piece
_PIECE = 1 << 20


def open_archive(file: BinaryIO, budget: Budget) -> zipfile.ZipFile:
    """The directory of an archive, if headers may be as large."""
    try:
        archive = zipfile.ZipFile(GuardedFile(file, budget))
    except CheckpointError:
        raise
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
        raise budget.error(f"it is no intact zip archive: {error!s:.100}") from error
    for info in archive.infolist():
        if info.compress_type not in _METHODS or info.flag_bits & 1:
            raise budget.error(f"member {info.filename!r:.80} is encrypted or packed unusually.")
    return archive


def read_member(
    archive: zipfile.ZipFile, name: str, budget: Budget, *, header: bool = False
) -> bytes:
    """All bytes of a member, no more than it declares and the limit allows."""
    info = archive.getinfo(name)
    if header:
        budget.check_header(info.file_size, f"member {name!r:.80}")
    else:
        budget.spend(info.file_size, f"member {name!r:.80}")
    return read_part(archive, name, 0, info.file_size, budget)


def read_part(archive: zipfile.ZipFile, name: str, begin: int, size: int, budget: Budget) -> bytes:
    """Bytes of a member, without those after them; counting them is the caller's part."""
    if name not in archive.NameToInfo:
        raise budget.error(f"the archive lacks {name!r:.80}, which it refers to.")
    if begin + size > archive.getinfo(name).file_size:
        raise budget.error(f"{name!r:.80} is shorter than the arrays in it.")
    parts, at, piece = [], 0, min(_PIECE, budget.header)
    with archive.open(name) as member:
        while at < begin + size:
            part = member.read(min(piece, (begin if at < begin else begin + size) - at))
            if not part:
                raise budget.error(f"member {name!r:.80} is shorter than the archive says.")
            if at >= begin:
                parts.append(part)
            at += len(part)
    return b"".join(parts)


# What reading a damaged archive may raise.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)
