"""Pipes, devices and standard input instead of a file."""

from __future__ import annotations

import io
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from files import WRITERS
from test_checkpoints import check

from batchnorm.tools.checkpoints import CheckpointError, read_checkpoint
from batchnorm.tools.checkpoints.limits import Budget
from batchnorm.tools.checkpoints.reading import detect


@pytest.fixture
def socket_path(tmp_path: Path) -> Iterator[Path]:
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket"))
        yield tmp_path / "socket"


def test_what_is_no_file_is_refused_at_once(tmp_path: Path, socket_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "fifo")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    cases: dict[str | Path, str] = {
        tmp_path / "fifo": "a pipe; name it '-'",
        tmp_path / "link": "a pipe; name it '-'",
        "/dev/zero": "a device",
        "/dev/null": "a device",
        socket_path: "a socket",
        tmp_path / "loop": "cannot be read",
        "": "path is empty",
        "a\0b": "cannot be read",
        "x" * 5000: "cannot be read",
        tmp_path: "no orbax checkpoint",
    }
    for path, message in cases.items():
        with pytest.raises(CheckpointError, match=message) as caught:
            read_checkpoint(path, seconds=5)
        assert "\n" not in str(caught.value)
        assert "\0" not in str(caught.value)


def test_pipe_that_takes_the_place_of_a_file_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    with pytest.raises(CheckpointError, match="no file any more"):
        detect(tmp_path / "fifo", Budget(tmp_path / "fifo"))


def test_missing_and_closed_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = io.StringIO()
    closed.close()
    for stream in (None, closed):
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(CheckpointError, match="standard input is closed"):
            read_checkpoint("-")


def test_terminal_as_standard_input_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    _, terminal = os.openpty()
    with os.fdopen(terminal) as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(CheckpointError, match="standard input is a terminal"):
            read_checkpoint("-")


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", [name for name in WRITERS if name != "orbax"])
def test_dash_reads_every_format_from_standard_input(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / f"x.{name}"
    WRITERS[name](path)
    with path.open() as stream:
        monkeypatch.setattr(sys, "stdin", stream)
        assert check(Path("-")).path == Path("-")
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(path.read_bytes())))
    check(Path("-"))
    code = "from batchnorm.tools.checkpoints import *; print(len(read_checkpoint('-').layers))"
    data = path.read_bytes()
    done = subprocess.run([sys.executable, "-c", code], input=data, capture_output=True, check=True)
    assert done.stdout == b"2\n"


def test_standard_input_may_be_as_large_as_the_limit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.pt"
    WRITERS["pt"](path)
    for stream in (path.open(), io.TextIOWrapper(io.BytesIO(path.read_bytes()))):
        with stream:
            monkeypatch.setattr(sys, "stdin", stream)
            with pytest.raises(CheckpointError, match=r"standard input has more .*--limit"):
                read_checkpoint("-", limit=path.stat().st_size - 1)


def test_pipe_that_gives_nothing_ends_with_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    with os.fdopen(reading) as stream, os.fdopen(writing, "w"):
        monkeypatch.setattr(sys, "stdin", stream)
        with pytest.raises(CheckpointError, match="longer than 2 s"):
            read_checkpoint("-", seconds=2)
