"""The site's hooks, and the checks of its links; `make docs-check` runs them on every page."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from pages import ROOT, read_blocks

sys.path.insert(0, str(Path(__file__).parent / "site"))
from links import check_links


def load(name: str) -> ModuleType:
    pytest.importorskip("latex2mathml", reason="the site's packages are not installed")
    spec = importlib.util.spec_from_file_location(f"site_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def page_of(name: str) -> Any:
    file = SimpleNamespace(src_uri=name)
    return SimpleNamespace(file=file, url=name.replace(".md", ".html"), meta={})


@pytest.mark.parametrize(
    ("link", "fault"),
    [
        ("other.html#here", None),
        ("other.html", None),
        ("#s1", None),
        ("folder/", None),
        ("https://example.org/#anything", None),
        ("mailto:a@example.org", None),
        ("other.html#gone", "leads to no anchor of that page"),
        ("#gone", "leads to no anchor of that page"),
        ("gone.html", "leads to no file"),
        ("/other.html", "is absolute: the site may be served from any folder"),
    ],
)
def test_links_are_followed_to_their_anchors(link: str, fault: str | None, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    for name in ("other.html", "folder/index.html"):
        (tmp_path / name).write_text('<p id="here">')
    (tmp_path / "index.html").write_text(f'<b id="s1"></b><a href="{link}">x</a>')
    assert check_links(tmp_path) == ([f"index.html: {link}: {fault}"] if fault else [])


@pytest.mark.parametrize(
    "tag",
    [
        '<script src="https://cdn.example.org/a.js"></script>',
        '<link rel="stylesheet" href="https://fonts.example.org/a.css">',
        '<img src="//example.org/a.png">',
    ],
)
def test_pages_load_nothing_from_other_hosts(tag: str, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text(tag)
    [fault] = check_links(tmp_path)
    assert fault.endswith("is loaded from another host")


def test_formulas_become_mathematics() -> None:
    hook, page = load("mathematics"), page_of("a.md")
    text = hook.on_page_markdown("so:\n\n```math\nx_1 * y_2\n```\n\nand $`\\mu`$.", page)
    assert "math" not in text
    html = "".join(f"<p>{part}</p>" for part in text.split("\n\n"))
    done = hook.on_page_content(html, page)
    assert done.startswith('<p>so:</p><div class="formula"><math')
    assert 'display="block"' in done
    assert done.endswith("</math>.</p>")
    assert "<msub><mi>x</mi><mn>1</mn></msub>" in done


def test_pages_of_mathematics_have_formulas() -> None:
    for name in ("spec.md", "small-batches.md"):
        languages = [block.language for block in read_blocks(ROOT / "docs" / name)]
        assert "math" in languages


def test_every_paragraph_of_the_specification_has_an_anchor() -> None:
    hooks = load("hooks")
    html = "<p><strong>S1 Mask.</strong> see S19</p><p><strong>S19</strong> Folding</p>"
    done = hooks.on_page_content(html, page_of("spec.md"))
    assert 'id="s1"' in done
    assert 'id="s19"' in done
    assert '<a href="#s19">S19</a>' in done.replace("spec.html#", "#").replace('"./#', '"#')


def test_search_weighs_only_pages_that_exist() -> None:
    for name in load("hooks").WEIGHTS:
        assert (ROOT / "docs" / name).exists() or (ROOT / name).exists(), name


BROKEN = {
    "wide.html": '<div style="width: 900px">x</div>',
    "error.html": "<script>missing()</script>",
    "image.html": '<img src="gone.png">',
    "host.html": '<img src="http://127.0.0.2:9/a.png">',
    "scheme.html": '<body data-md-color-scheme="default">x',
    "fine.html": "<p>x</p>",
}


def test_walk_finds_what_is_broken(tmp_path: Path) -> None:
    pytest.importorskip("playwright", reason="only make docs-check installs playwright")
    from browser import find_chromium, open_browser, serve
    from walk import walk

    try:
        find_chromium()
    except SystemExit as missing:
        pytest.skip(str(missing))
    for name, body in BROKEN.items():
        page = f'<!doctype html><meta name="viewport" content="width=device-width">{body}'
        (tmp_path / name).write_text(page)
    with open_browser() as browser, serve(tmp_path) as address:
        faults = walk(browser, address, list(BROKEN))
    found = {(fault.split(" (")[0], fault.split("): ")[1].split(":")[0]) for fault in faults}
    assert {name for name, _ in found} == set(BROKEN) - {"fine.html"}
    assert ("wide.html", "900 wide") in found or any("wide" in what for _, what in found)
    assert ("error.html", "script") in found
    assert ("host.html", "asks another host") in found
    assert ("scheme.html", "is default for readers who want dark") in found
    assert all("narrow" in fault for fault in faults if fault.startswith("wide.html"))
