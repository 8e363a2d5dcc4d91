"""Files made to hang a reader, to fill its memory, or to lead it to other files."""

from __future__ import annotations

import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import adversaries
import pytest
from adversaries import write_pt
from files import WRITERS

from batchnorm.tools.checkpoints import (
    CheckpointError,
    child,
    isolated,
    limits,
    read_checkpoint,
    serial,
)
from batchnorm.tools.checkpoints.limits import LONGEST_NAME, Budget

MOST_SECONDS, MOST_BYTES = 10, 400 << 20  # on a busy machine; of the reading process

# Reads a file for its batch norms, then for all arrays, and prints the longer time, the memory of
# the process that read it, and the outcomes.
_COST = """
import resource, sys, time
from batchnorm.tools.checkpoints import CheckpointError, read_checkpoint
outcomes, times = [], []
for everything in (False, True):
    start = time.perf_counter()
    try:
        found = read_checkpoint(sys.argv[1], everything=everything)
        outcomes.append(f"read {len(found.layers)} layers")
    except CheckpointError as error:
        outcomes.append(str(error))
    times.append(time.perf_counter() - start)
print(max(times), resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
print(*outcomes, sep="\\n")
"""


def outcome_within_bounds(path: Path) -> str:
    """The outcome of reading a small file, asserted to be cheap and one line long."""
    assert path.stat().st_size < 1 << 20
    command = [sys.executable, "-c", _COST, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    numbers, outcome, whole = done.stdout.strip().split("\n")
    seconds, kilobytes = map(float, numbers.split())
    assert seconds < MOST_SECONDS
    assert kilobytes * 1024 < MOST_BYTES
    assert max(len(outcome), len(whole)) < len(str(path)) + 350
    return outcome


def shared(depth: int, key: str) -> Any:
    value: Any = {"running_mean": None}
    for _ in range(depth):
        value = {f"{key}0": value, f"{key}1": value}
    return value


def nest_of_lists() -> bytes:
    value: Any = []
    for _ in range(60):
        value = [value, value]
    parts = (0x1950A86A20F9469CFC6C, value, {}, {}, [])
    return b"".join(pickle.dumps(part, 2) for part in parts)


def same_hash() -> bytes:
    numbers = (i * ((1 << 61) - 1) for i in range(50_000))
    pairs = b"".join(pickle.dumps(n, 2)[2:-1] + b"N" for n in numbers)
    return b"\x80\x02}(" + pairs + b"u."


def late_tensors(path: Path) -> None:
    size = 1 << 28
    places = {f"bn{i}.{leaf}": size // 4 - 4 for i in range(60) for leaf in ("weight", "bias")}
    places |= {n.replace("weight", "running_mean"): at for n, at in places.items()}
    places |= {n.replace("running_mean", "running_var"): at for n, at in places.items()}
    pickled = adversaries.pickled_tensors(places, size // 4)
    write_pt(path, pickled, b"\0" * size, zipfile.ZIP_DEFLATED)


def long_key(length: int, depth: int = 1) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        import msgpack

        array = msgpack.ExtType(1, msgpack.packb(((1,), "float32", b"\0\0\0\0")))
        tree: Any = {str(i): array for i in range(20_000)}
        for _ in range(depth):
            tree = {"k" * length: tree}
        path.write_bytes(msgpack.packb(tree))

    return write


def long_name(name: str) -> Callable[[Path], None]:
    return lambda path: adversaries.write_safetensors(path, {f"{name}.running_mean": (1,)})


def claims(path: Path) -> None:
    """Nested lists, each of which claims to be as long as the file."""
    path.write_bytes(
        b"\x81\xa1a" + (b"\xdd" + (400_000).to_bytes(4, "big")) * 400 + b"\0" * 400_000
    )


def wide() -> Any:
    """Very many names that are short except for a common prefix."""
    value: Any = {f"{i}": {} for i in range(40_000)}
    return {"k" * 1000: {"a": value, "b": value, "c": value}}


def bomb(path: Path) -> None:
    import h5py

    with h5py.File(path, "w") as file:
        for leaf in ("gamma", "beta", "moving_mean", "moving_variance"):
            shape, chunk = (4,), (1 << 24,)
            data = file.create_dataset(
                f"bn/{leaf}", shape, "f4", chunks=chunk, maxshape=(None,), compression="gzip"
            )
            data[:] = 1.0


def pickled(value: Callable[[], Any]) -> Callable[[Path], None]:
    return lambda path: write_pt(path, pickle.dumps(value(), 2))


# A writer of the file, and the messages that the outcome may have.
_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "protocol of shared lists": (lambda p: p.write_bytes(nest_of_lists()), "protocol is not 1001"),
    "shared dicts, long keys": (pickled(lambda: shared(16, "k" * 20_000)), "more than 1024"),
    "shared dicts, short keys": (pickled(lambda: shared(16, "k" * 50)), "read 0"),
    "shared dicts, deep": (pickled(lambda: shared(60, "k")), "objects, more than weights need"),
    "many names, one prefix": (pickled(wide), "read 0 layers"),
    "keys of one hash": (lambda p: write_pt(p, same_hash()), "read 0 layers"),
    "tensors at the end of a packed storage": (late_tensors, "read 60 layers"),
    "msgpack, key of 200 kB": (long_key(200_000), "more than 1024"),
    "msgpack, keys of 1000": (long_key(1000), "read 0"),
    "msgpack, keys within each other": (long_key(15, 60), "read 0"),
    "msgpack, lists that claim": (claims, "memory|cut off"),
    "safetensors, 100,000 parts": (long_name("a." * 100_000), "more than 1024"),
    "safetensors, 100,000 parts of /": (long_name("a/" * 100_000), "more than 1024"),
    "safetensors, 100,000 digits": (long_name("vars/" + "1" * 100_000), "more than 1024"),
    "HDF5, chunks larger than the file": (bomb, "read 1 layers|exceeds the limit"),
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("name", _FILES)
def test_small_file_costs_little_time_and_memory(name: str, tmp_path: Path) -> None:
    write, message = _FILES[name]
    write(tmp_path / "x")
    outcome = outcome_within_bounds(tmp_path / "x")
    assert any(part in outcome for part in message.split("|")), outcome


def test_name_may_be_as_long_as_the_constant_says(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    stem = "n" * (LONGEST_NAME - len(".running_mean"))
    adversaries.write_safetensors(path, {f"{stem}.running_{k}": (2,) for k in ("mean", "var")})
    assert [layer.name for layer in read_checkpoint(path).layers] == [stem]
    adversaries.write_safetensors(path, {f"n{stem}.running_mean": (2,)})
    with pytest.raises(CheckpointError, match=f"more than {LONGEST_NAME}"):
        read_checkpoint(path)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_read_under_the_bound_of_time(name: str, tmp_path: Path) -> None:
    path = tmp_path / f"x.{name}"
    WRITERS[name](path)
    with pytest.raises(CheckpointError, match=r"longer than 0\.001 s; raise seconds= \(--seconds"):
        read_checkpoint(path, seconds=0.001)


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_is_read_under_the_bound_of_memory(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reading process's memory bound, as the system reports it."""
    path = tmp_path / f"x.{name}"
    WRITERS[name](path)
    code = isolated._CHILD.replace(
        "sys.exit(main(sys.argv[1:]))",
        "import resource; main(sys.argv[1:]); "
        "kinds = (resource.RLIMIT_AS, resource.RLIMIT_CPU); "
        "assert all(resource.getrlimit(kind)[0] != -1 for kind in kinds); "
        "assert resource.getrlimit(resource.RLIMIT_AS)[0] < 1200 << 20, 'large'",
    )
    monkeypatch.setattr(isolated, "_CHILD", code)
    read_checkpoint(path, limit=1 << 20)  # an assertion that fails is an abnormal end


@pytest.mark.parametrize(
    ("library", "message"),
    [
        ("import os; os.abort()", r"ended abnormally \(status -6\)"),
        ("bytearray(1 << 33)", r"more memory .* raise limit= \(--limit"),
        ("while True: pass", r"longer than 2 s; raise seconds= \(--seconds"),
        ("print('x' * 999)", "damaged"),  # h5py is empty then
    ],
)
def test_library_that_misbehaves_is_reported(
    library: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "x.weights.h5"
    WRITERS["weights.h5"](path)
    (tmp_path / "h5py.py").write_text(library)
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        read_checkpoint(path, seconds=2 if "while" in library else 60)


def answer_of(**changes: Any) -> bytes:
    nothing = {"format": "x", "entries": [], "layers": [], "notes": [], "others": 0}
    text = json.dumps(nothing | changes).encode()
    return struct.pack("<Q", len(text)) + text


def whole_answer_of(data: bytes, **changes: Any) -> bytes:
    """An answer with all arrays of a file."""
    kinds = {"x": [[2], "float32"], "negative": [[-1, -2], "float32"], "object": [[0], "object"]}
    kinds["vast"] = [[1 << 40, 1 << 20], "float32"]
    contents = {"roles": [], "others": [], "paths": {}, "texts": []} | changes
    entries = [[name, *kind] for name, kind in kinds.items()]
    return answer_of(entries=entries, contents=contents) + data


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"\1\0\0\0\0\0\0\0{",
        b"\xff" * 99,
        answer_of() + b"x",
        answer_of(format=1),
        answer_of(others="0"),
        answer_of(notes=[[]]),
        answer_of(entries=[["x", ["3"], "float32"]]),
        answer_of(layers=[{"plain": {"shape": None}, "arrays": []}]),
        answer_of(layers=[{"plain": {"shape": None}, "arrays": [["mean", "object", 1]]}]),
        answer_of(layers=[{"plain": {"shape": None}, "arrays": [["mean", "float32", 1 << 60]]}]),
        struct.pack("<Q", 100_000) + b"[" * 100_000,
        whole_answer_of(b"", others=["x"]),
        whole_answer_of(b"\0" * 9, others=["x"]),
        whole_answer_of(b"\0" * 16, others=["x", "x"]),
        whole_answer_of(b"\0" * 8, others=["unknown"]),
        whole_answer_of(b"", others=["negative"]),
        whole_answer_of(b"", others=["object"]),
        whole_answer_of(b"", others=["vast"]),
        whole_answer_of(b"", roles=[{"mean": "x"}]),
        whole_answer_of(b"", paths={"x": [1]}),
        whole_answer_of(b"", paths=[]),
        whole_answer_of(b"", texts=[["", "format", 1]]),
        whole_answer_of(b"", texts=[["", "format", [1]]]),
        whole_answer_of(b"", texts=[["", ["format"], ""]]),
        answer_of(contents=None),
    ],
)
def test_answer_of_the_process_is_not_trusted(answer: bytes) -> None:
    serial.decode(memoryview(answer_of()), Budget(Path("x")))
    whole = serial.decode(memoryview(whole_answer_of(b"\0" * 8, others=["x"])), Budget(Path("x")))
    assert whole.contents is not None
    assert whole.contents.others["x"].tolist() == [0, 0]
    with pytest.raises(CheckpointError, match="nonsense"):
        serial.decode(memoryview(answer), Budget(Path("x")))


def test_nothing_stays_in_the_folder_for_temporary_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    WRITERS["orbax"](tmp_path / "x")
    read_checkpoint(tmp_path / "x")
    lingers = "import tempfile, time; tempfile.mkdtemp(); time.sleep(60)"
    monkeypatch.setattr(isolated, "_CHILD", lingers)
    with pytest.raises(CheckpointError, match="takes longer than 1 s"):
        read_checkpoint(tmp_path / "x", seconds=1)
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), True, "1"])
def test_seconds_are_checked(seconds: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="seconds must be a positive number"):
        read_checkpoint(tmp_path, seconds=seconds)


def test_message_about_a_bound_names_the_option_that_raises_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    WRITERS["safetensors"](path)
    with pytest.raises(CheckpointError, match=r"raise limit= \(--limit on the command line\)"):
        read_checkpoint(path, limit=8)
    assert len(read_checkpoint(path, limit=1 << 20).layers) == 2


def test_names_of_a_file_do_not_reach_the_terminal_as_they_are(tmp_path: Path) -> None:
    path = tmp_path / "a\n\x1b[2Jb.safetensors"
    name = "x\n\x1b[2J" + "y" * 100
    adversaries.write_safetensors(path, {f"{name}.running_mean": (3,)})
    (note,) = read_checkpoint(path).notes
    assert note.isprintable()
    adversaries.write_safetensors(path, {name * 20: (3,)})
    with pytest.raises(CheckpointError) as caught:
        read_checkpoint(path)
    assert str(caught.value).isprintable()


def test_page_says_the_bounds_that_hold() -> None:
    page = (Path(__file__).parents[3] / "docs" / "security.md").read_text()
    assert f"{limits.DEFAULT_LIMIT >> 30} GiB | `limit=`" in page
    assert f"| {limits.DEFAULT_SECONDS:g} s | `seconds=`" in page
    assert f"{limits.SLACK >> 20} MiB, the file's size" in page
    assert f"at most {limits.MEMORY_PER_BYTE} bytes for each byte of the file" in page
    assert (limits.COPIES, limits.OBJECTS_PER_BYTE) == (3, 32)  # three times, a thirty-second
    assert f"| characters of a name | {LONGEST_NAME} |" in page
    assert f"values examined | {limits.MOST_VALUES:,} |" in page
    assert f"several times | {limits.MOST_VISITS:,} |" in page
    assert f"within each other | {limits.DEEPEST} |" in page
    assert f"of a message | {limits.LONGEST_MESSAGE}," in page
    assert f"| notes | {limits.MOST_NOTES}," in page


def test_child_reports_what_it_cannot_import(capfdbinary: Any, monkeypatch: Any) -> None:
    def fail(*arguments: Any) -> bytes:
        raise ImportError("No module named 'x'")

    monkeypatch.setattr(child, "_read", fail)
    monkeypatch.setattr(os, "dup2", lambda *arguments: None)
    assert child.main(["x", "path", "1", "1"]) == 0
    answer = capfdbinary.readouterr().out
    assert answer.startswith(b"-reading it needs a package: No module named 'x'")
