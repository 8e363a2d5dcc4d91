"""The site's changes to its pages: files from outside docs/, and links to the specification."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, InclusionLevel
from mkdocs.utils import get_relative_url

ROOT = Path(__file__).parent.parent
SPEC = "spec.html"
ZOO = ROOT / "tests/zoo/results.json"
# Pages link to these by paths that work in the repository, and the site carries them along.
CARRIED = ("benchmarks/results/*.md", "benchmarks/results/*.png", "examples/*.py")
# The search finds guides first, then what only mentions a word; pages left out weigh 1.
WEIGHTS = {
    "index.md": 2,
    "padding.md": 6,
    "which.md": 2,
    "small-batches.md": 2,
    "inspecting.md": 2,
    "examples.md": 0.5,
    "other-suites.md": 0.3,
    "zoo.md": 0.3,
    "spec.md": 0.5,
    "guests.md": 0.5,
    "benchmarks/results/cpu.md": 0.3,
    "benchmarks/results/jax.md": 0.3,
    "benchmarks/results/keras.md": 0.3,
    "gpu.md": 0.3,
    "versions.md": 0.3,
    "scaling.md": 0.3,
}
_OUTSIDE = re.compile(r"\]\((?:\.\./)+((?:benchmarks|examples)/)")
_NUMBER = re.compile(r"\bS(1?\d|2[0-3])\b")
_TAG = re.compile(r"(<[^>]+>)")
_OPAQUE = re.compile(r"</?(a|code|pre|h[1-6]|title|script|svg)\b")


def on_files(files: Any, config: Any) -> Any:
    """Add the files that the site carries along."""
    for pattern in CARRIED:
        for path in sorted(ROOT.glob(pattern)):
            name = path.relative_to(ROOT).as_posix()
            carried = File.generated(config, name, abs_src_path=str(path))
            carried.inclusion = InclusionLevel.NOT_IN_NAV  # unless mkdocs.yml puts it there
            files.append(carried)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Weigh the page for the search, mend links that leave docs/, and put in the zoo's table."""
    page.meta.setdefault("search", {"boost": WEIGHTS.get(page.file.src_uri, 1)})
    if page.file.src_uri == "zoo.md":
        markdown = markdown.replace("<!-- zoo -->", zoo_table())
    up = "../" * page.file.src_uri.count("/")
    return _OUTSIDE.sub(rf"]({up}\1", markdown)


def zoo_table() -> str:
    """The zoo's results as tables, and the versions they are of."""
    results = json.loads(ZOO.read_text())
    rows = [row for row in results["rows"] if "missing" not in row]
    about = ("model", "package", "warnings", "leaks", "scale")
    checks = [key for key in rows[0] if key not in about]
    lines = ["| model | package | " + " | ".join(checks) + " |", "|---" * (len(checks) + 2) + "|"]
    notes: list[str] = []
    for row in rows:
        cells = [row["model"], row["package"], *(_zoo_cell(row[c], notes) for c in checks)]
        lines.append("| " + " | ".join(cells) + " |")
    lines.append("")
    lines += [f"- ({number}) {note}" for number, note in enumerate(notes, start=1)]
    lines += [
        f"- {r['model']} did not run: {r['missing']}" for r in results["rows"] if "missing" in r
    ]
    lines += [f"- {r['model']}: {r['leaks']}, in evaluation too." for r in rows if r["leaks"]]
    versions = ", ".join(f"{name} {number}" for name, number in results["versions"].items())
    return "\n".join([*lines, "", f"Versions: {versions}. Command: `{results['command']}`."])


def _zoo_cell(value: Any, notes: list[str]) -> str:
    """A cell: numbers with two digits, reasons by the number of a note."""
    if isinstance(value, bool):
        return "same" if value else "**different**"
    if isinstance(value, float):
        return f"{value:.1e}"
    text = str(value).replace("|", "/")
    if not text.startswith("not applicable: "):
        return text
    note = re.sub(r"^\w+ does not", "the model does not", text.removeprefix("not applicable: "))
    if note not in notes:
        notes.append(note)
    return f"– ({notes.index(note) + 1})"


def on_page_content(html: str, page: Any, **_: Any) -> str:
    """Give every paragraph S1 ... S23 an anchor, and make every other mention a link to it."""
    if page.url == SPEC:
        html = re.sub(r"<strong>S(\d+)\b", r'<strong id="s\1">S\1', html)
    spec = get_relative_url(SPEC, page.url)
    depth, parts = 0, _TAG.split(html)
    for i, part in enumerate(parts):
        if part.startswith("<"):
            if _OPAQUE.match(part):
                depth += -1 if part.startswith("</") else 1
        elif depth == 0 and 'id="s' not in parts[i - 1]:
            parts[i] = _NUMBER.sub(rf'<a href="{spec}#s\1">S\1</a>', part)
    return "".join(parts)
