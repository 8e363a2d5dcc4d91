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
