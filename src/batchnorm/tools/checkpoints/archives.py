"""zip archives within limits; nothing is extracted to a path."""

from __future__ import annotations

import struct
import zipfile
import zlib
from typing import BinaryIO

from batchnorm.tools.checkpoints.limits import Budget, CheckpointError, GuardedFile, shown

__all__ = ["DAMAGED", "Archive", "Bytes"]

_METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)  # others cannot be unpacked piece by piece
_PIECE = 1 << 20
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # signature, and lengths of the name and of what follows

Bytes = bytes | bytearray

# Errors of reading a damaged archive.
DAMAGED = (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError)


class Archive:
    """An open archive, whose directory may be as large as headers may.

    A packed member is unpacked once, however many of its parts are read; of other members only
    the parts are read.
    """

    def __init__(self, file: BinaryIO, budget: Budget) -> None:
        self._file, self._budget = file, budget
        self._unpacked: dict[str, Bytes] = {}
        try:
            self._zip = zipfile.ZipFile(GuardedFile(file, budget))
        except CheckpointError:
            raise
        except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError) as error:
            raise budget.error(f"it is no intact zip archive: {error!s:.100}") from error
        for info in self._zip.infolist():
            if info.compress_type not in _METHODS or info.flag_bits & 1:
                raise budget.error(
                    f"member {shown(info.filename)} is encrypted or packed unusually."
                )
        self.names = self._zip.namelist()

    def read(self, name: str, *, header: bool = False) -> Bytes:
        """All bytes of a member, if the limit allows the size that it declares."""
        info = self._info(name)
        if header:
            self._budget.check_header(info.file_size, f"member {shown(name)}")
        else:
            self._budget.spend(info.file_size, f"member {shown(name)}")
        return self._unpack(info)

    def part(self, name: str, begin: int, size: int) -> Bytes:
        """Bytes of a member, counted against the limit."""
        info = self._info(name)
        if begin + size > info.file_size:
            raise self._budget.error(f"{shown(name)} is shorter than the arrays in it.")
        if info.compress_type == zipfile.ZIP_STORED:
            self._budget.spend(size, f"member {shown(name)}")
            whole = size == info.file_size  # only then its check sum can be compared
            return self._unpack(info) if whole else self._stored(info, begin, size)
        if name not in self._unpacked:
            self._unpacked[name] = self.read(name)
        return self._unpacked[name][begin : begin + size]

    def _info(self, name: str) -> zipfile.ZipInfo:
        if name not in self._zip.NameToInfo:
            raise self._budget.error(f"the archive lacks {shown(name)}, which it refers to.")
        return self._zip.getinfo(name)

    def _unpack(self, info: zipfile.ZipInfo) -> Bytes:
        data, left, piece = bytearray(), info.file_size, min(_PIECE, self._budget.header)
        with self._zip.open(info) as member:
            while left:
                part = member.read(min(piece, left))
                if not part:
                    break
                data += part
                left -= len(part)
        return self._checked(data, info.file_size, info)

    def _stored(self, info: zipfile.ZipInfo, begin: int, size: int) -> Bytes:
        self._file.seek(info.header_offset)
        start = self._file.read(_LOCAL_HEADER.size)
        signature, *lengths = _LOCAL_HEADER.unpack(self._checked(start, _LOCAL_HEADER.size, info))
        if signature != b"PK\x03\x04":
            raise self._budget.error(f"member {shown(info.filename)} is not where it should be.")
        self._file.seek(info.header_offset + _LOCAL_HEADER.size + sum(lengths) + begin)
        return self._checked(self._file.read(size), size, info)

    def _checked(self, data: Bytes, size: int, info: zipfile.ZipInfo) -> Bytes:
        if len(data) != size:
            raise self._budget.error(
                f"member {shown(info.filename)} is shorter than the archive says."
            )
        return data
