"""A folder of which regular files are opened, and nothing outside it.

A name from a file never becomes a path for a library. Its real path is computed, and refused if it
leads out of the folder. Then each part of it is opened from the descriptor of the part before
without following links, so that a link put there meanwhile has no effect. Libraries want paths:
they get those of a private folder with a link to each descriptor.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from batchnorm.tools.checkpoints.limits import Budget, shown

__all__ = ["Folder"]

_DESCRIPTORS = Path("/dev/fd")
_FLAGS = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
_DIRECTORY = getattr(os, "O_DIRECTORY", 0)

Parts = tuple[str, ...]


class Folder:
    """An open folder, closed with `with`.

    Args:
        path: of the folder; a link to it is followed.
        budget: of the checkpoint.

    Raises:
        CheckpointError: it cannot be opened, or the system cannot open files relative to it.
    """

    def __init__(self, path: Path, budget: Budget) -> None:
        if os.open not in os.supports_dir_fd or not _DESCRIPTORS.is_dir():
            raise budget.error("this system has no way to read a folder and nothing outside it.")
        self._budget, self._root = budget, Path(os.path.realpath(path))
        self._stack = ExitStack()
        self._descriptor = os.open(self._root, _FLAGS | _DIRECTORY)
        self._stack.callback(os.close, self._descriptor)
        _allow_descriptors()

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    def names(self, parts: Parts = ()) -> dict[str, bool]:
        """Names in this folder or one below it; True for those of folders that are no links."""
        names: dict[str, bool] = {}
        with self._opened(parts, stat.S_ISDIR) as descriptor, os.scandir(descriptor) as found:
            for entry in found:
                self._budget.check_values(len(names))
                names[entry.name] = entry.is_dir(follow_symlinks=False)
        return dict(sorted(names.items()))

    def is_folder(self, parts: Parts) -> bool:
        """True for a folder, or a link to one in this folder; any other link is refused."""
        with self._opened(parts, lambda mode: True) as descriptor:
            return stat.S_ISDIR(os.fstat(descriptor).st_mode)

    def read(self, parts: Parts) -> bytes:
        """The bytes of a file, which may be as large as headers may."""
        with self._opened(parts, stat.S_ISREG) as descriptor:
            self._budget.check_header(os.fstat(descriptor).st_size, shown("/".join(parts)))
            with os.fdopen(os.dup(descriptor), "rb") as file:
                return file.read()

    @contextmanager
    def lent(self, files: Sequence[tuple[Parts, Parts]]) -> Iterator[Path]:
        """A private folder with links to the descriptors of some files.

        Args:
            files: for each, the parts of its path in this folder, and in the private one.
        """
        with ExitStack() as stack:
            place = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lent-")))
            for parts, new in files:
                descriptor = stack.enter_context(self._opened(parts, stat.S_ISREG))
                link = place.joinpath(*new)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(_DESCRIPTORS / str(descriptor))
            yield place

    def lend(self, files: Sequence[tuple[Parts, Parts]]) -> Path:
        """As `lent`, until this folder is closed."""
        return self._stack.enter_context(self.lent(files))

    @contextmanager
    def _opened(self, parts: Parts, is_right: Callable[[int], bool]) -> Iterator[int]:
        descriptor = self._open(parts)
        try:
            if not is_right(os.fstat(descriptor).st_mode):
                raise self._budget.error(f"{shown('/'.join(parts))} is not what it should be.")
            yield descriptor
        finally:
            os.close(descriptor)

    def _open(self, parts: Parts) -> int:
        where = shown("/".join(parts))
        if any(part in ("", ".", "..") or "/" in part or "\0" in part for part in parts):
            raise self._budget.error(f"{where} is no path inside the folder.")
        real = Path(os.path.realpath(self._root.joinpath(*parts)))
        if not real.is_relative_to(self._root):
            raise self._budget.error(
                f"{where} is a link out of the folder, where nothing is opened. Copy the folder "
                "with the files themselves (cp -rL)."
            )
        current = os.dup(self._descriptor)
        try:
            for part in real.relative_to(self._root).parts:
                mode = os.stat(part, dir_fd=current, follow_symlinks=False).st_mode
                if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):  # opening a device may act
                    raise OSError(0, "it is neither a file nor a folder")
                inner = os.open(part, _FLAGS, dir_fd=current)
                os.close(current)
                current = inner
        except OSError as error:
            os.close(current)
            reason = error.strerror or error
            raise self._budget.error(f"{where} cannot be opened: {reason}.") from error
        return current


def _allow_descriptors() -> None:
    """Raise the limit of open files to the highest that the system allows."""
    import resource

    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
