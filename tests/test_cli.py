"""The command line: its output, its exit status, and its time."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import batchnorm
from batchnorm.cli import app
from batchnorm.commands.files import check_writable

sys.path.insert(0, str(Path(__file__).parent / "tools"))
from files import write_hdf5, write_keras, write_safetensors, write_torch

runner = CliRunner()
COMMANDS = ("inspect", "convert", "merge", "demo", "bench", "info", "verify")
HEAVY = {"torch", "jax", "flax", "keras", "tensorflow", "matplotlib", "sklearn"}


def run_fresh(*arguments: str) -> tuple[int, float, set[str]]:
    """Exit status, seconds of processor time, and modules of a command in its own process."""
    code = (
        "import sys, time\n"
        f"sys.argv = {['batchnorm', *arguments]}\n"
        "status = 0\n"
        "try:\n"
        "    from batchnorm.cli import main\n"
        "    main()\n"
        "except SystemExit as end:\n"
        "    status = end.code or 0\n"
        "print(status, time.process_time(), *sys.modules, file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    status, seconds, *modules = done.stderr.splitlines()[-1].split()
    return int(status), float(seconds), {module.partition(".")[0] for module in modules}


def test_help_starts_in_300_ms_and_without_numpy() -> None:
    runs = [run_fresh("--help") for _ in range(3)]
    assert min(seconds for _, seconds, _ in runs) < 0.3
    assert not runs[0][2] & (HEAVY | {"numpy"})


def test_info_imports_no_framework() -> None:
    status, _, modules = run_fresh("info")
    assert status == 0
    assert not modules & HEAVY


@pytest.mark.parametrize(
    "arguments",
    [
        ("demo", "--out", "picture.txt"),
        ("demo", "--framework", "theano"),
        ("bench", "--shape", "8xC"),
        ("bench", "--masked", "2"),
        ("inspect", "/nowhere.pt"),
        ("inspect", "/nowhere.pt", "--html", "report.txt"),
        ("convert", "/nowhere.pt", "new.h5"),
        ("merge", "/nowhere.pt", "/nowhere.pt", "-o", "new.pt"),
    ],
)
def test_mistakes_are_found_before_a_framework_is_imported(arguments: tuple[str, ...]) -> None:
    status, _, modules = run_fresh(*arguments)
    assert status == 2
    assert not modules & HEAVY


def test_work_is_told_on_standard_error_as_it_goes_on() -> None:
    code = "from batchnorm.cli import main; main()"
    arguments = ["bench", "--shape", "16,4", "--seconds", "60", "--json"]
    with subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stderr is not None
        assert process.stdout is not None
        lines = [process.stderr.readline().decode() for _ in range(3)]  # long before its end
        process.kill()
        assert process.stdout.read() == b""
    assert lines[:2] == [
        "bench: comparing batchnorm, torch.nn.BatchNorm1d, copy with float64\n",
        "bench: timing them in turns for about 60 s\n",
    ]
    told = re.fullmatch(r"bench: (\d+) of about 60 s\n", lines[2])
    assert told is not None
    assert int(told[1]) >= 5


def test_epochs_of_the_demo_are_told(tmp_path: Path) -> None:
    picture = tmp_path / "picture.png"
    done = runner.invoke(app, ["demo", "--quick", "--out", str(picture)])
    assert done.exit_code == 0, done.output
    told = [f"demo: training epoch: {n} of 2" for n in (1, 2)]
    assert done.stderr.splitlines()[:2] == told
    assert "demo:" not in done.stdout


def test_quick_bench_is_small_unless_a_shape_is_given() -> None:
    for options, shape in (([], [8192, 64]), (["--shape", "32,4"], [32, 4])):
        done = runner.invoke(app, ["bench", "--quick", "--json", *options])
        assert done.exit_code == 0, done.output
        assert json.loads(done.stdout)["shape"] == shape


@pytest.mark.sample(3)
@pytest.mark.parametrize("width", [40, 80, 160])
def test_tables_keep_their_names_at_any_width(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    done = runner.invoke(app, ["bench", "--shape", "32,4", "--seconds", "0.1"])
    assert {"batchnorm", "copy"} <= {
        line.split()[0] for line in done.stdout.splitlines() if line.split()
    }
    assert ("quartiles" in done.stdout) == (width >= 70)
    assert "…" not in done.stdout
    done = runner.invoke(app, ["demo", "--quick", "--out", str(tmp_path / "picture.png")])
    words = done.stdout.split()
    assert {"torch.nn", "batchnorm", "accuracy,", "s/epoch"} <= set(words)
    assert "…" not in done.stdout


@pytest.mark.parametrize("write", [write_safetensors, write_hdf5, write_torch])
def test_files_are_inspected_without_a_framework(write: object, tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write(path)  # type: ignore[operator]
    status, _, modules = run_fresh("inspect", str(path))
    assert status == 0
    assert not modules & HEAVY


@pytest.mark.parametrize("options", [(), ("--all",)])
def test_files_are_merged_without_a_framework(options: tuple[str, ...], tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_safetensors(source)
    status, _, modules = run_fresh("merge", str(source), str(source), "-o", str(target), *options)
    assert status == 0
    assert not modules & HEAVY
    assert target.exists()


def test_all_arrays_merge_from_standard_input(tmp_path: Path) -> None:
    source, target = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    write_safetensors(source)
    arguments = ["merge", "-", str(source), "-o", str(target), "--all"]
    done = runner.invoke(app, arguments, input=source.read_bytes())
    assert done.exit_code == 0, done.output
    assert "2 batch norms and 0 other arrays of 2 files merged" in done.output


def test_help_says_that_all_arrays_keep_their_names() -> None:
    output = " ".join(runner.invoke(app, ["merge", "--help"]).output.replace("│", " ").split())
    assert "--all" in output
    assert "TARGET their format: only batch norms are renamed" in output


@pytest.mark.parametrize("command", [(), *((name,) for name in COMMANDS)])
def test_help_has_every_command_and_examples(command: tuple[str, ...]) -> None:
    done = runner.invoke(app, [*command, "--help"])
    assert done.exit_code == 0
    expected = COMMANDS if not command else ("Examples:", f"batchnorm {command[0]}")
    assert all(text in done.output for text in expected)
    assert runner.invoke(app, [*command, "-h"]).output == done.output


def test_version_and_info() -> None:
    assert runner.invoke(app, ["--version"]).output == f"batchnorm {batchnorm.__version__}\n"
    assert "kernels" in runner.invoke(app, ["info"]).output
    assert json.loads(runner.invoke(app, ["info", "--json"]).output)["kernels"]["name"] == "cpu"


def test_shell_completion_is_offered() -> None:
    assert "--install-completion" in runner.invoke(app, ["--help"]).output


def test_inspect_prints_a_table_and_exits_with_0(tmp_path: Path) -> None:
    path = tmp_path / "model.keras"
    write_keras(path)
    done = runner.invoke(app, ["inspect", str(path)])
    assert done.exit_code == 0, done.output
    assert "2 layers, 9 channels: nothing wrong" in " ".join(done.output.split())


def write_state(path: Path, **arrays: object) -> None:
    """A torch state dict of one layer, as safetensors."""
    names = {"mean": "running_mean", "var": "running_var", "gamma": "weight", "beta": "bias"}
    healthy = {"mean": np.ones(4), "var": np.full(4, 2.0), "gamma": np.ones(4), "beta": np.zeros(4)}
    tensors = {
        f"bn.{names[key]}": np.asarray(value, np.float32)
        for key, value in (healthy | arrays).items()
    }
    header, data = {}, b""
    for name, array in tensors.items():
        offsets = [len(data), len(data) + array.nbytes]
        header[name] = {"dtype": "F32", "shape": list(array.shape), "data_offsets": offsets}
        data += array.tobytes()
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


@pytest.mark.parametrize(
    ("arrays", "options", "status"),
    [
        ({}, [], 0),
        ({"var": [2.0, -1.0, 2.0, 2.0]}, [], 1),
        ({"var": [2.0, 0.0, 2.0, 2.0]}, [], 0),  # a warning
        ({"var": [2.0, 0.0, 2.0, 2.0]}, ["--strict"], 1),
        ({"var": [2.0, 1e-8, 2.0, 2.0], "mean": np.zeros(4)}, ["--strict"], 0),
        ({"var": [2.0, 1e-8, 2.0, 2.0], "mean": np.zeros(4)}, ["--strict", "--eps", "1e-3"], 1),
    ],
)
def test_exit_status_serves_in_ci(
    arrays: dict[str, object], options: list[str], status: int, tmp_path: Path
) -> None:
    path = tmp_path / "model.safetensors"
    write_state(path, **arrays)
    done = runner.invoke(app, ["inspect", str(path), *options])
    assert done.exit_code == status, done.output


def test_file_without_batch_norms_is_no_success(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes((2).to_bytes(8, "little") + b"{}")
    done = runner.invoke(app, ["inspect", str(path)])
    assert done.exit_code == 1
    assert "no batch normalization found" in done.output


def test_inspect_writes_json_and_html(tmp_path: Path) -> None:
    path, page = tmp_path / "model.safetensors", tmp_path / "report.html"
    write_state(path, var=[2.0, -1.0, 2.0, 2.0])
    done = runner.invoke(
        app, ["inspect", str(path), "--json", "--per-channel", "--html", str(page)]
    )
    assert done.exit_code == 1
    found = json.loads(done.stdout)
    assert found["layers"][0]["name"] == "bn"
    assert found["layers"][0]["per_channel"]["var"] == [2.0, -1.0, 2.0, 2.0]
    assert found["layers"][0]["findings"][0]["channels"] == [1]
    assert page.read_text().startswith("<!doctype html>")


@pytest.mark.sample(6)
@pytest.mark.parametrize("framework", ["torch", "jax"])
@pytest.mark.parametrize("options", [[], ["--masked", "0.5"], ["--inference"]])
def test_bench_checks_and_times_both_layers(framework: str, options: list[str]) -> None:
    arguments = ["bench", "--framework", framework, "--shape", "64,5,3", "--seconds", "0.1"]
    done = runner.invoke(app, [*arguments, *options, "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout)
    ours, theirs, copy = found["variants"].values()
    assert list(found["variants"])[::2] == ["batchnorm", "copy"]
    assert 0 < ours["error"] <= 5e-6
    assert theirs["error"] <= 1e-3
    assert found["times as fast"] == pytest.approx(theirs["ms"] / ours["ms"], rel=0.01)
    assert found["bytes"] == 64 * 5 * 3 * 4 * (2 if options == ["--inference"] else 8)
    assert copy["rounds"] == ours["rounds"] >= 7


def test_bench_prints_a_table() -> None:
    done = runner.invoke(app, ["bench", "--shape", "32,4", "--masked", "0.5", "--seconds", "0.1"])
    assert done.exit_code == 0, done.output
    shown = ("torch on x[mask], scattered", "copy", "ratio", "cores", "50% padded")
    assert all(text in done.output for text in shown)


@pytest.mark.parametrize(
    ("limit", "status", "message"),
    [
        ("_THEIRS", 2, "torch.nn.BatchNorm1d is off by"),
        ("_OURS", 70, "RuntimeError: bench: batchn"),
    ],
)
def test_baseline_that_is_wrong_is_no_bug_of_ours(
    limit: str, status: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(f"batchnorm.benchmark.variant.{limit}", -1.0)
    done = runner.invoke(app, ["bench", "--shape", "16,4", "--seconds", "0.1"])
    assert done.exit_code == status
    assert message in done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", "--out", "/nowhere/at/all.png"], "--out: cannot write"),
        (["demo", "--out", "picture.txt"], "must end in .png"),
        (["demo", "--out", "a" * 300 + ".png"], "--out: cannot write"),
        (["demo", "--seeds", "0"], "--seeds"),
        (["demo", "--epochs", "many"], "--epochs"),
        (["demo", "--framework", "theano"], "torch or jax or keras; got theano"),
        (["dance"], "dance"),
        (["inspect"], "Missing argument"),
        (["inspect", "/nowhere/model.pt"], "cannot be read: No such file"),
        (["inspect", __file__], "it is in no known format"),
        (["inspect", __file__, "--html", "report.txt"], "must end in .html"),
        (["inspect", __file__, "--per-channel"], "add --json"),
        (["inspect", __file__, "--eps", "-1"], "--eps"),
        (["bench", "--shape", "8xC"], "--shape must be sizes with commas"),
        (["bench", "--shape", "8"], "shape must have two or more sizes"),
        (["bench", "--shape", "8,8", "--masked", "1"], "share of padded rows"),
        (["bench", "--shape", "8,8", "--masked", "0.5", "--inference"], "masked is for training"),
        (["bench", "--shape", "1,1,1,1,1,1"], "2 to 5 axes; got a shape of 6"),
        (["bench", "--framework", "theano"], "torch or jax or keras; got theano"),
    ],
)
def test_mistakes_end_with_a_sentence_and_2(arguments: list[str], message: str) -> None:
    done = runner.invoke(app, arguments)
    assert done.exit_code == 2
    assert message in " ".join(done.output.split())
    assert "Traceback" not in done.output


@pytest.mark.parametrize(
    "arguments",
    [("--debug", "inspect", __file__), ("inspect", "--debug", __file__),
     ("inspect", __file__, "--debug"), ("--debug", "inspect", "--debug", __file__)],
)  # fmt: skip
def test_debug_shows_what_is_behind_a_message(arguments: tuple[str, ...]) -> None:
    done = runner.invoke(app, arguments)
    assert done.stderr.count("The above exception was the direct cause") == 1
    assert done.exit_code == 2
    assert "Traceback" in done.stderr
    assert "CheckpointError" in done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"batchnorm: {__file__}: it is in no known")


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (RuntimeError("a wheel came off"), 70, "this is a bug"),
        (FileNotFoundError(2, "No such file", "/a/b"), 70, "this is a bug"),
        (KeyboardInterrupt(), 130, "batchnorm: interrupted"),
        (MemoryError("8 TiB"), 2, "there is not enough memory: 8 TiB"),
        (MemoryError(), 2, "there is not enough memory: nothing is left"),
        (RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory"), 2, "not enough mem"),
        (BrokenPipeError(32, "Broken pipe"), 141, ""),
        (OSError(28, "No space left on device"), 3, "standard output cannot be written: No space"),
        (SystemExit("a sentence"), 2, "batchnorm: a sentence"),
        (SystemExit(1), 2, ""),
        (SystemExit(), 0, ""),
        (ImportError("tomorrow"), 70, "this is a bug"),
    ],
)
def test_every_exception_has_its_status(
    error: BaseException, status: int, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def break_down(*args: object) -> None:
        raise error

    monkeypatch.setattr("batchnorm.environment.show_config", break_down)
    done = runner.invoke(app, ["info"])
    assert done.exit_code == status
    assert line in done.stderr
    assert ("Traceback" in done.stderr) == (status == 70)


def test_unwritable_file_is_noticed_before_the_work(tmp_path: Path) -> None:
    folder = tmp_path / "folder.png"
    folder.mkdir()
    done = runner.invoke(app, ["demo", "--out", str(folder)])
    assert done.exit_code == 2
    assert "cannot write" in done.output


def test_dangling_link_survives_the_check(tmp_path: Path) -> None:
    link = tmp_path / "link.png"
    link.symlink_to(tmp_path / "target.png")
    check_writable("--out", link, ".png")
    assert link.is_symlink()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("demo", "the demo needs rich; install it with: pip install 'batchnorm[cli,torch]'"),
        ("inspect FILE", "the table needs rich; install it with: pip install 'batchnorm[cli]'"),
        ("bench --shape 8,4 --seconds 0.1", "the table needs rich; install it with: pip"),
    ],
)
def test_missing_package_names_the_extra(
    arguments: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    write_state(path)
    for name in ("rich.console", "rich.box"):
        monkeypatch.setitem(sys.modules, name, None)
    done = runner.invoke(app, arguments.replace("FILE", str(path)).split())
    assert done.exit_code == 2
    assert message in done.output
