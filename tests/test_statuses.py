"""Exit statuses and messages of the command line, in separate processes as from a shell."""

from __future__ import annotations

import os
import re
import shlex
import signal
import subprocess
import sys
from inspect import signature
from pathlib import Path

import pytest

from batchnorm.commands.statuses import MEANINGS

sys.path.insert(0, str(Path(__file__).parent / "tools"))
from files import write_safetensors

PROGRAM = [sys.executable, "-c", "from batchnorm.cli import main; main()"]
COMMAND = shlex.join(PROGRAM)
PAGE = Path(__file__).parents[1] / "docs" / "command-line.md"
PROGRESS = re.compile(r"(bench|demo): ")
SECONDS = 180  # so that nothing hangs; on a busy machine a command that imports frameworks takes 60


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    path = tmp_path / "healthy.safetensors"
    write_safetensors(path)
    return path


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    import torch

    layer = torch.nn.BatchNorm1d(3)
    layer.running_var[:] = -1.0
    path = tmp_path / "broken.pt"
    torch.save(torch.nn.Sequential(torch.nn.Linear(3, 3), layer).state_dict(), path)
    return path


def run(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    given = {"capture_output": True, "text": True, "timeout": SECONDS, **options}
    return subprocess.run([*PROGRAM, *map(str, arguments)], **given)  # type: ignore[call-overload]


def run_shell(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`batchnorm` in the line is the command; the line's status is that of its first part."""
    text = re.sub(r"\bbatchnorm\b", lambda _: COMMAND, line) + "; exit ${PIPESTATUS[0]}"
    return subprocess.run(
        ["bash", "-c", text],
        capture_output=True,
        text=True,
        timeout=SECONDS,
        env=os.environ | environment,
    )


def test_0_is_nothing_wrong_and_1_a_problem(healthy: Path, broken: Path) -> None:
    assert run("inspect", healthy).returncode == 0
    assert run("inspect", broken).returncode == 1


@pytest.mark.sample(4)
@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "dance",
        "inspect",
        "inspect FILE --eps many",
        "inspect FILE --limit 5X",
        "inspect FILE --limit 0",
        "inspect FILE --limit 100",
        "inspect FILE --html FILE",
        "inspect ''",
        "inspect /nowhere/at/all.pt",
        "--debug inspect /nowhere/at/all.pt",
        "inspect /dev/null",
        "inspect /dev/zero",
        "inspect .",
        "convert FILE /nowhere/at/all.pt",
        "convert FILE FILE",
        "convert FILE ''",
        "convert FILE -",
        "convert FILE /dev/null",
        "merge FILE",
        "merge FILE FILE",
        "merge FILE FILE -o FILE --force",
        "merge FILE FILE -o /dev/null",
        "merge FILE /dev/zero -o new.pt",
        "merge FILE FILE -o new.pt --counts 0,0",
        "bench --shape 1000000000,64",
        "bench --shape 99999999999999999999,64",
        "demo --framework theano",
        "demo --out ''",
    ],
)
def test_2_is_a_mistake_whatever_it_is(arguments: str, healthy: Path) -> None:
    done = run(*shlex.split(arguments.replace("FILE", str(healthy))))
    assert done.returncode == 2
    assert ("Traceback" in done.stderr) == arguments.startswith("--debug")
    if "Usage" not in done.stderr and arguments:
        assert done.stderr.splitlines()[-1].startswith("batchnorm: ")
        assert "Traceback" in done.stderr or done.stderr.count("\n") == 1
        assert done.stdout == ""


def test_2_is_a_missing_backend() -> None:
    for arguments, name in (
        ("bench --framework keras", "KERAS_BACKEND"),
        ("bench --framework jax", "JAX_PLATFORMS"),
    ):
        done = run(*arguments.split(), "--shape", "8,8", env=os.environ | {name: "nonsense"})
        assert done.returncode == 2
        assert done.stderr.startswith("batchnorm: ")
        assert done.stderr.count("\n") == 1


@pytest.mark.sample(5)
@pytest.mark.parametrize(
    "command",
    [
        "--help",
        "--version",
        "info",
        "inspect FILE",
        "inspect FILE --json",
        "inspect BROKEN",
        "convert FILE TARGET.msgpack",
        "bench --shape 16,2 --seconds 0.1",
        "demo --quick --out TARGET.png",
    ],
)
@pytest.mark.parametrize(
    ("lead", "status", "message"),
    [
        (">/dev/full", 3, "batchnorm: standard output cannot be written: No space left on device"),
        (">&-", 3, "batchnorm: standard output is closed"),
        ("| true", 141, None),
    ],
)
def test_3_and_141_are_output_that_does_not_arrive(
    command: str, lead: str, status: int, message: str | None, healthy: Path, broken: Path
) -> None:
    for name, path in (("FILE", healthy), ("BROKEN", broken), ("TARGET", healthy.parent / "new")):
        command = command.replace(name, shlex.quote(str(path)))
    done = run_shell(f"batchnorm {command} {lead}")
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    shown = [line for line in done.stderr.splitlines() if not PROGRESS.match(line)]
    if message is None and done.returncode != status:
        assert done.returncode == (1 if "broken" in command else 0), "all of it fitted the pipe"
    else:
        assert done.returncode == status
        assert shown == [message] * (message is not None)


def test_closed_pipe_is_141_where_the_output_is_longer_than_the_pipe(tmp_path: Path) -> None:
    import torch

    layers = torch.nn.ModuleList([torch.nn.BatchNorm1d(64) for _ in range(60)])
    torch.save(layers.state_dict(), tmp_path / "x.pt")
    done = run_shell(f"batchnorm inspect {tmp_path}/x.pt --json --per-channel | head -1")
    assert (done.returncode, done.stdout, done.stderr) == (141, "{\n", "")


def test_70_is_a_bug_with_its_traceback() -> None:
    code = (
        "import batchnorm.environment as e\n"
        "def fail(): raise RuntimeError('a wheel came off')\n"
        "e.show_config = fail\n"
        "from batchnorm.cli import main; main()\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "info"], capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 70
    assert "RuntimeError: a wheel came off" in done.stderr
    assert done.stderr.endswith("report it with what `batchnorm info` prints\n")


def test_130_is_an_interrupt() -> None:
    arguments = [*PROGRAM, "bench", "--shape", "64,4", "--seconds", "600"]
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        while "timing" not in process.stderr.readline():  # imports may swallow an interrupt
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130, errors
    lines = errors.splitlines()
    assert lines[-1] == "batchnorm: interrupted"
    assert all(PROGRESS.match(line) for line in lines[:-1])


@pytest.mark.sample(3)
@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "cp1252"])
def test_encoding_that_lacks_characters_changes_no_status(encoding: str, tmp_path: Path) -> None:
    import torch

    layer = torch.nn.BatchNorm1d(3)
    layer.running_var[:] = 1e-30
    torch.save(
        {f"naïve‑{n}.bn.{k}": v for n in "ab" for k, v in layer.state_dict().items()},
        tmp_path / "ü.pt",
    )
    for arguments, status in (
        (["inspect", tmp_path / "ü.pt"], 1),
        (["convert", tmp_path / "ü.pt", tmp_path / f"ö{encoding}.msgpack"], 0),
        (["inspect", tmp_path / "€.pt"], 2),
        (["inspect", "--help"], 0),
    ):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = run(*arguments, env=environment, text=False)
        assert done.returncode == status, done.stderr
        assert b"Traceback" not in done.stderr
        done.stdout.decode(encoding)
    shown = run(
        "inspect", tmp_path / "ü.pt", env=environment | {"PYTHONIOENCODING": "ascii"}
    ).stdout
    assert "10^-30" in shown
    assert "E[x^2]" not in shown or "²" not in shown


def test_posix_locale_changes_no_status(healthy: Path) -> None:
    plain = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    for name in ("LANG", "PYTHONIOENCODING"):
        plain[name] = ""
    done = run_shell(f"batchnorm inspect {shlex.quote(str(healthy))}", **plain)
    assert done.returncode == 0
    done = run_shell("batchnorm inspect $'/nowhere/\\xff\\xc3\\xbc.pt'", **plain)
    assert done.returncode == 2
    assert done.stderr.startswith("batchnorm: /nowhere/")


@pytest.mark.sample(3)
@pytest.mark.parametrize(
    "command", ["inspect NAME", "convert NAME new.pt", "convert FILE NAME --force"]
)
@pytest.mark.parametrize("kind", ["fifo", "device", "folder", "loop"])
def test_what_is_no_file_is_refused_at_once(command: str, kind: str, healthy: Path) -> None:
    folder = healthy.parent
    name = folder / "x.safetensors"
    if kind == "fifo":
        os.mkfifo(name)
    elif kind == "device":
        name.symlink_to("/dev/zero")
    elif kind == "folder":
        name.mkdir()
    else:
        name.symlink_to(name)
    arguments = command.replace("NAME", str(name)).replace("FILE", str(healthy)).split()
    done = run(*arguments, cwd=folder, timeout=SECONDS)
    assert done.returncode == 2
    assert done.stderr.startswith(f"batchnorm: {name}: ")
    assert done.stderr.count("\n") == 1
    assert {path.name for path in folder.iterdir()} == {healthy.name, name.name}


def test_report_is_written_to_regular_files_only(healthy: Path) -> None:
    pipe = healthy.parent / "x.html"
    os.mkfifo(pipe)
    done = run("inspect", healthy, "--html", pipe)
    assert done.returncode == 2
    assert done.stderr == f"batchnorm: --html: cannot write {pipe}: it is not a regular file\n"


def test_report_never_replaces_what_is_read(healthy: Path) -> None:
    link = healthy.parent / "x.html"
    os.link(healthy, link)
    before = healthy.read_bytes()
    done = run("inspect", healthy, "--html", link)
    assert done.returncode == 2
    assert "is the file that is read" in done.stderr
    assert healthy.read_bytes() == before


def test_report_that_exists_is_replaced_only_by_force(healthy: Path) -> None:
    page = healthy.parent / "x.html"
    page.write_text("mine")
    done = run("inspect", healthy, "--html", page)
    assert done.returncode == 2
    assert done.stderr == (
        f"batchnorm: --html: {page} exists; give another name, or --force to replace it.\n"
    )
    assert page.read_text() == "mine"
    assert run("inspect", healthy, "--html", page, "--force").returncode == 0
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.parametrize(("answer", "status"), [("y", 0), ("n", 2)])
def test_report_that_exists_is_asked_about_on_a_terminal(
    answer: str, status: int, healthy: Path
) -> None:
    page = healthy.parent / "x.html"
    page.write_text("mine")
    ours, theirs = os.openpty()
    try:
        os.write(ours, f"{answer}\n".encode())
        done = run(
            "inspect", healthy, "--html", page,
            stdin=theirs, stderr=theirs, stdout=subprocess.DEVNULL, capture_output=False,
        )  # fmt: skip
        asked = os.read(ours, 10_000).decode()
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == status
    assert "exists. Replace it? [y/N]" in asked
    assert (page.read_text() == "mine") == (status == 2)


@pytest.mark.parametrize("form", ["batchnorm COMMAND < FILE", "cat FILE | batchnorm COMMAND"])
def test_dash_reads_standard_input(form: str, healthy: Path) -> None:
    line = form.replace("FILE", shlex.quote(str(healthy)))
    done = run_shell(line.replace("COMMAND", "inspect -") + "; exit ${PIPESTATUS[-1]}")
    assert "standard input: 2 layers" in " ".join(done.stdout.split()), done.stderr
    target = healthy.parent / "new.msgpack"
    done = run_shell(line.replace("COMMAND", f"convert - {shlex.quote(str(target))}"))
    assert "2 batch norms written" in done.stdout
    assert target.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("batchnorm inspect - <&-", "standard input is closed"),
        ("batchnorm inspect - </dev/null", "no known format"),
    ],
)
def test_standard_input_without_a_file_is_refused(line: str, message: str) -> None:
    done = run_shell(line)
    assert done.returncode == 2
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stdout + done.stderr


def test_file_behind_standard_input_is_not_replaced(healthy: Path) -> None:
    name, before = shlex.quote(str(healthy)), healthy.read_bytes()
    for source in ("-", "/dev/stdin"):
        done = run_shell(f"batchnorm convert {source} {name} --force < {name}")
        assert done.returncode == 2
        assert "it is the source" in done.stderr
    assert healthy.read_bytes() == before


def test_bounds_are_those_of_the_reader() -> None:
    from batchnorm.commands.convert import convert
    from batchnorm.commands.inspect import inspect
    from batchnorm.tools.checkpoints import DEFAULT_LIMIT, DEFAULT_SECONDS

    for command in (inspect, convert):
        defaults = {p.name: p.default for p in signature(command).parameters.values()}
        assert (defaults["limit"], defaults["seconds"]) == (DEFAULT_LIMIT, DEFAULT_SECONDS)


def test_terminal_is_no_file() -> None:
    ours, theirs = os.openpty()
    try:
        done = run("inspect", "-", stdin=theirs)
    finally:
        os.close(ours)
        os.close(theirs)
    assert done.returncode == 2
    assert "standard input is a terminal" in done.stderr


def test_limit_reaches_the_reader(tmp_path: Path) -> None:
    import torch

    torch.save(torch.nn.BatchNorm1d(1 << 16).state_dict(), tmp_path / "x.pt")
    assert run("inspect", tmp_path / "x.pt", "--limit", "8M").returncode == 1  # never trained
    done = run("inspect", tmp_path / "x.pt", "--limit", str(1 << 16))
    assert done.returncode == 2
    assert str(1 << 16) in done.stderr
    done = run("convert", tmp_path / "x.pt", tmp_path / "y.pt", "--limit", "64K")
    assert done.returncode == 2


def test_help_and_page_have_the_table() -> None:
    help_text = " ".join(run("--help", env=os.environ | {"COLUMNS": "200"}).stdout.split())
    page = PAGE.read_text()
    for status, meaning in MEANINGS.items():
        assert f"{int(status)} {meaning}" in help_text
        assert re.search(rf"^\| {int(status)} \| {re.escape(meaning)} \|$", page, re.MULTILINE)
    rows = re.findall(r"^\| (\d+) \|", page, re.MULTILINE)
    assert [int(row) for row in rows] == list(MEANINGS)


def test_numbers_of_statistics_survive_ascii() -> None:
    from batchnorm.commands.streams import prepare

    assert prepare()
    assert "3.2·10⁻⁸ ± 1…".encode("ascii", "batchnorm.plain") == b"3.2*10^-8 +- 1..."
    assert "\udcff é".encode("ascii", "batchnorm.plain") == b"\\udcff \\xe9"
