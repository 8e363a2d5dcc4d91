"""Every example runs by its own command, which the page about the examples shows."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "examples"
PAGE = (ROOT / "docs" / "examples.md").read_text()
PAGES = PAGE + (ROOT / "docs" / "federated.md").read_text()
LARGEST_PICTURE = 200_000  # bytes
ERRORS = ("-W", "error")


def run(name: str, *options: str, warnings: tuple[str, ...] = ERRORS) -> tuple[int, str, str]:
    """Exit status, output and errors of an example."""
    environment = os.environ | {"KERAS_BACKEND": "tensorflow", "TF_CPP_MIN_LOG_LEVEL": "3"}
    command = [sys.executable, *warnings, str(FOLDER / f"{name}.py"), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=500)
    return done.returncode, done.stdout, done.stderr


def run_quickly(name: str, folder: Path, warnings: tuple[str, ...] = ERRORS) -> str:
    """The output of a short run that ends well and draws a picture."""
    picture = folder / "picture.png"
    status, output, errors = run(name, "--quick", "--out", str(picture), warnings=warnings)
    assert status == 0, output + errors
    assert picture.read_bytes().startswith(b"\x89PNG")
    return output


def read_table(output: str) -> dict[str, list[float]]:
    """Rows of numbers by their first cell; of each mean ± deviation only the mean."""
    cells = [re.split(r" {2,}", line) for line in output.splitlines() if " ± " in line]
    return {row[0]: [float(cell.split(" ± ")[0]) for cell in row[1:]] for row in cells if row[1:]}


@pytest.mark.exhaustive
def test_point_clouds_masked_statistics_are_those_of_the_points(tmp_path: Path) -> None:
    found = read_table(run_quickly("point_clouds", tmp_path))
    assert found["batchnorm"][1] < 0.5 * found["torch.nn"][1]  # error of the mean


@pytest.mark.parametrize(
    ("name", "theirs"),
    [
        ("speech", "torch.nn"),
        pytest.param("speech_jax", "flax.nnx", marks=pytest.mark.exhaustive),
        pytest.param("speech_keras", "keras.layers", marks=pytest.mark.exhaustive),
    ],
)
def test_speech_features_do_not_depend_on_padding(name: str, theirs: str, tmp_path: Path) -> None:
    # TensorFlow warns when it is imported.
    warnings = () if name == "speech_keras" else ERRORS
    found = read_table(run_quickly(name, tmp_path, warnings=warnings))
    *changes, accuracy = found["batchnorm"]
    assert len(changes) == 3
    assert max(changes) < 1e-5
    assert min(found[theirs][:-1]) > 1e-2
    assert accuracy > 30.0  # % of nine speakers: features that say nothing would not change either


@pytest.mark.exhaustive
def test_sequences_with_a_mask_learn_like_keras(tmp_path: Path) -> None:
    # TensorFlow warns when it is imported.
    found = read_table(run_quickly("sequences", tmp_path, warnings=()))
    assert found["batchnorm"] == pytest.approx(found["keras, mask="], abs=1.0)  # %, of rounding
    assert all(accuracy > 20.0 for accuracies in found.values() for accuracy in accuracies)


@pytest.mark.exhaustive
def test_fine_tuning_leaves_a_frozen_body_as_it_was(tmp_path: Path) -> None:
    output = run_quickly("fine_tuning", tmp_path)
    before = re.search(r"before fine-tuning, 0 to 4: (\S+) ±", output)
    found = read_table(output)
    assert found["head only, frozen"][1] == float(before[1])
    assert found["head only, statistics move"][1] != float(before[1])


@pytest.mark.exhaustive
def test_small_batches_learn_with_every_norm(tmp_path: Path) -> None:
    found = read_table(run_quickly("small_batches", tmp_path))
    assert found.keys() == {"plain", "renorm", "ghost", "none"}
    assert all(accuracy > 80.0 for *_, accuracy in found.values())


@pytest.mark.exhaustive
def test_merged_statistics_are_closer_to_those_of_all_data_than_averaged_ones(
    tmp_path: Path,
) -> None:
    output = run_quickly("federated", tmp_path)
    own = re.search(r"own statistics: (\S+) ±", output)
    found = read_table(output)
    error_of_mean, error_of_deviation, _ = zip(*found.values(), strict=True)
    assert list(found) == [
        *("average", "merge"),
        *("clients recalibrate", "server recalibrates"),
    ]
    assert error_of_mean[0] == error_of_mean[1]
    assert error_of_deviation[1] < 0.9 * error_of_deviation[0]
    assert max(error_of_mean[2:]) < 0.5 * error_of_mean[1]
    assert float(own[1]) > max(accuracy for *_, accuracy in found.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "0"], "--seeds must be at least 1; got 0."),
        (["--out", "picture.txt"], "--out must end in .png; got picture.txt."),
        (["--out", "/nowhere/at/all.png"], "--out: the folder /nowhere/at does not exist."),
    ],
)
def test_bad_options_end_with_a_message(
    options: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setattr(sys, "argv", ["example.py", *options])
    with pytest.raises(SystemExit, match="2"):
        import_module("_common").parse_options("An example.", seeds=3)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", sorted(p.stem for p in FOLDER.glob("[!_]*.py")))
def test_page_shows_the_example_by_its_command(name: str) -> None:
    assert re.search(rf"^(python|torchrun .*) examples/{name}\.py", PAGE, flags=re.MULTILINE)
    assert f"(../examples/{name}.py)" in PAGE


@pytest.mark.parametrize("picture", re.findall(r"\]\((images/\S+)\)", PAGES))
def test_picture_of_the_page_is_small(picture: str) -> None:
    assert (ROOT / "docs" / picture).stat().st_size < LARGEST_PICTURE
