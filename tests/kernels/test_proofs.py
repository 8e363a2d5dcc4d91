"""Verdicts in the cache folder: what is not exactly one of this user's counts as none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from batchnorm.kernels import proofs
from batchnorm.kernels.proofs import PASSED, Verdict

WRONG = Verdict("rows", "y is wrong at 1 of 2 places")


@pytest.fixture
def cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "batchnorm" / "proofs"


@pytest.mark.parametrize("verdict", [PASSED, WRONG])
def test_a_verdict_is_found_again_for_its_subject_alone(cache: Path, verdict: Verdict) -> None:
    subject = proofs.make_subject("a card", "a driver")
    assert subject.read() is None
    subject.write(verdict)
    assert subject.read() == verdict
    assert [path.suffix for path in cache.iterdir()] == [".json"]
    assert cache.stat().st_mode & 0o077 == 0
    for field in subject._fields:
        assert subject._replace(**{field: "another"}).read() is None
    assert proofs.describe_known() == [f"a card: {proofs.describe(verdict)}"]
    subject._replace(torch="1.0").write(PASSED)
    assert len(proofs.describe_known()) == 1  # of other versions nothing is said


def edit(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def apply(path: Path) -> None:
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return apply


def replace_by_link(path: Path) -> None:
    path.rename(path.with_suffix(".moved"))
    path.symlink_to(path.with_suffix(".moved"))


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def replace_by_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


BROKEN: dict[str, Callable[[Path], None]] = {
    "empty": lambda path: path.write_bytes(b""),
    "cut short": lambda path: path.write_bytes(path.read_bytes()[:-20]),
    "bytes": lambda path: path.write_bytes(bytes(range(256))),
    "deep": lambda path: path.write_text("[" * 8000),
    "large": lambda path: path.write_text(path.read_text() + " " * (1 << 15)),
    "a list": lambda path: path.write_text("[]"),
    "another format": edit(lambda content: content.update(format=2)),
    "format true": edit(lambda content: content.update(format=True)),
    "one more key": edit(lambda content: content.update(more="")),
    "one key less": edit(lambda content: content.pop("verdict")),
    "no text": edit(lambda content: content["verdict"].update(case=1)),
    "one more word": edit(lambda content: content["verdict"].update(more="")),
    "error alone": edit(lambda content: content["verdict"].update(case="")),
    "control characters": edit(lambda content: content["verdict"].update(error="\x1b[2J")),
    "long": edit(lambda content: content["verdict"].update(error="a" * 600)),
    "another subject": edit(lambda content: content["subject"].update(device="b")),
    "link": replace_by_link,
    "fifo": replace_by_fifo,
    "folder": replace_by_folder,
}


@pytest.mark.parametrize("damage", BROKEN.values(), ids=BROKEN.keys())
def test_a_file_that_is_no_verdict_is_ignored(cache: Path, damage: Callable[[Path], None]) -> None:
    subject = proofs.make_subject("a card", "a driver")
    subject.write(WRONG)
    (path,) = cache.iterdir()
    damage(path)
    assert subject.read() is None
    proofs.describe_known()
    subject.write(PASSED)
    if not path.is_dir():
        assert subject.read() == PASSED


def test_a_folder_that_cannot_be_written_costs_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    subject = proofs.make_subject("a card", "a driver")
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    subject.write(PASSED)
    assert subject.read() is None
    assert proofs.describe_known() == []


def test_a_cache_folder_that_is_not_absolute_is_ignored(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "cache")
    monkeypatch.setenv("HOME", str(tmp_path))
    proofs.make_subject("a card", "a driver").write(PASSED)
    assert len(list((tmp_path / ".cache" / "batchnorm" / "proofs").iterdir())) == 1


def test_another_user_s_file_is_ignored(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    subject = proofs.make_subject("a card", "a driver")
    subject.write(PASSED)
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert subject.read() is None
