"""The pages of README and site: their code runs, and the names on them exist."""

from __future__ import annotations

import importlib
import re
import socket
from pathlib import Path

import pytest
import torch
import typer
from pages import LANGUAGES, PAGES, ROOT, missing_package, python_blocks, read_blocks, run

import batchnorm.jax
import batchnorm.tools
import batchnorm.torch
from batchnorm.cli import app

WITH_CODE = [name for name, page in PAGES.items() if python_blocks(page, keras=False)]
OF_GUESTS = {"docs/guests.md"}  # need packages that only the zoo's environment has
API = {"reference": batchnorm, **{n: getattr(batchnorm, n) for n in ("torch", "jax", "tools")}}


@pytest.fixture
def torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment of a process group of one, which torchrun would set."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    values = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": 0, "WORLD_SIZE": 1}
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))


@pytest.mark.parametrize("name", WITH_CODE)
@pytest.mark.usefixtures("torchrun")
def test_code_runs_and_prints_what_the_page_says(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = python_blocks(PAGES[name], keras=False)
    missing = missing_package(blocks) if name in OF_GUESTS else None
    if missing is not None:
        pytest.skip(f"{missing} is not installed; `make test-zoo` runs the page")
    run(blocks)


def test_speech_model_of_the_readme_does_not_read_padding() -> None:
    [block] = [b for b in python_blocks(PAGES["README.md"], keras=False) if "mel bands" in b.code]
    names = run([block])
    model, features = names["model"].eval(), names["features"]
    longer = torch.nn.functional.pad(features, (0, 300))
    real = torch.nn.functional.pad(names["mask"], (0, 300))
    with batchnorm.torch.padding_mask(real, follow=model, padded_output="zero"):
        padded = model(longer)
    for i, length in enumerate((200, 120, 90, 40)):
        alone = model(features[i : i + 1, :, :length])[0]
        assert torch.allclose(padded[i, :, : alone.shape[1]], alone, atol=1e-5)


def test_every_page_of_the_guide_has_code_that_runs() -> None:
    assert {"README.md", "docs/index.md", "docs/padding.md"} <= set(WITH_CODE)


@pytest.mark.parametrize("name", PAGES)
def test_every_block_says_its_language(name: str) -> None:
    for block in read_blocks(PAGES[name]):
        assert block.language in LANGUAGES, f"{name}:{block.line}: {block.language!r}"


@pytest.mark.parametrize("name", PAGES)
def test_no_fence_is_left_unread(name: str) -> None:
    text = PAGES[name].read_text()
    assert text.count("```") == 2 * len(read_blocks(PAGES[name]))


@pytest.mark.parametrize("name", PAGES)
def test_commands_exist(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    commands = typer.main.get_command(app).commands
    for block in read_blocks(PAGES[name]):
        if block.language != "console":
            continue
        for target in re.findall(r"\bmake ([a-z-]+)", block.code):
            assert f"\n{target}:" in makefile, f"{name}: make {target}"
        for command in re.findall(r"^(?:\$ )?batchnorm ([a-z]+)", block.code, re.MULTILINE):
            assert command in commands, f"{name}: batchnorm {command}"
        for path in re.findall(r"\b(?:examples|benchmarks|docs)/\S+\.py\b", block.code):
            assert (ROOT / path).exists(), f"{name}: {path}"


def test_readme_has_its_two_commands() -> None:
    commands = [b.code for b in read_blocks(PAGES["README.md"]) if b.language == "console"]
    assert {"demo", "test"} <= set(re.findall(r"make ([a-z]+)", "".join(commands)))


def test_links_of_the_readme_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", PAGES["README.md"].read_text()):
        assert target.startswith("http") or (ROOT / target).exists(), target


@pytest.mark.parametrize("name", API)
def test_api_page_lists_every_public_name(name: str) -> None:
    page = PAGES[f"docs/api/{name}.md"].read_text()
    listed = set(re.findall(r"^::: [\w.]+\.(\w+)$", page, re.MULTILINE))
    shared = {"__version__", "Moments", "Conversion"}  # documented once, on another page
    assert set(API[name].__all__) - shared <= listed


@pytest.mark.parametrize("name", API)
def test_every_name_of_an_api_page_exists(name: str) -> None:
    page = PAGES[f"docs/api/{name}.md"].read_text()
    for path in re.findall(r"^::: ([\w.]+)$", page, re.MULTILINE):
        module, _, attribute = path.rpartition(".")
        assert hasattr(importlib.import_module(module), attribute), path
