"""The tables, the picture, README's and the performance page's figures, made from results' JSON.

    python benchmarks/publish.py            # of benchmarks/results; measures nothing
    python benchmarks/publish.py --check    # fails where a page is not what the results give

Figures stand on those two pages between comments, and are replaced there.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cases import CASES
from chart import draw
from judging import HUGE, RESULTS, against_flax, copy_speed, judge, quotient, trips
from report import Grid, as_markdown, write_markdown
from report_others import write_jax, write_keras
from targets import JAX, TORCH

Record = dict[str, Any]
_EVEN = 0.995  # times as fast, rounded to two digits
_NO_SLOWER = 1.05  # over eager code; the difference is not seen from run to run
ROOT = Path(__file__).parent.parent
_ROWS = (  # of README's table: case, title and rival
    ("rows", "training step, (262144, 64)", "torch"),
    ("channels-first", "training step, (32, 256, 56, 56)", "torch"),
    ("mask-50", "(262144, 64), half padded, against `x[mask]` → torch → scatter", "pack"),
    ("add-relu-image", "BN → add → ReLU, (32, 256, 56, 56)", "torch"),
    ("inference-channels-first", "inference, (32, 256, 56, 56)", "torch"),
)


def write_pages(folder: Path) -> list[str]:
    """Write what the JSON files in a folder give, and return the names of what was written.

    Args:
        folder: with results; where they are the committed ones, README and site follow.
    """
    records = _read(folder)
    texts = _make_texts(folder, records)
    for path, text in texts.items():
        path.write_text(text)
    written = [path.name for path in texts]
    if "cpu" in records:
        draw(records["cpu"], folder / "cpu.png")
        written.append("cpu.png")
    return written


def find_stale() -> list[str]:
    """The names of committed pages that are not what the committed results give."""
    texts = _make_texts(RESULTS, _read(RESULTS))
    return [path.name for path, text in texts.items() if path.read_text() != text]


def _read(folder: Path) -> dict[str, Record]:
    paths = (folder / f"{name}.json" for name in _WRITERS)
    return {path.stem: json.loads(path.read_text()) for path in paths if path.exists()}


def _make_texts(folder: Path, records: dict[str, Record]) -> dict[Path, str]:
    texts = {folder / f"{name}.md": _WRITERS[name](record) for name, record in records.items()}
    if folder.resolve() == RESULTS.resolve():
        for path, block in make_blocks(records).items():
            texts[path] = replace_block(path.read_text(), block)
    return texts


def _write_torch(record: Record) -> str:
    return write_markdown(record | {"targets": judge(record, TORCH)})


def _write_jax(record: Record) -> str:
    return write_jax(record | {"targets": judge(record, JAX)})


_WRITERS = {"cpu": _write_torch, "jax": _write_jax, "keras": write_keras}


def make_blocks(records: dict[str, Record]) -> dict[Path, str]:
    """The text between the comments, by page.

    Args:
        records: "cpu", "jax" and "keras".
    """
    rest = "\n\n".join(_list_rest(records))
    readme = "\n\n".join(_list_headlines(records["cpu"]))
    return {ROOT / "README.md": readme, ROOT / "docs" / "performance.md": rest}


_BLOCK = re.compile(r"(<!-- make bench writes this -->\n).*?(<!-- up to here -->)", re.DOTALL)


def replace_block(text: str, block: str) -> str:
    """The page with another text between the comments.

    Raises:
        ValueError: the page does not have them once.
    """
    if len(_BLOCK.findall(text)) != 1:
        raise ValueError("pages: a page must have the two comments once around its figures.")
    return _BLOCK.sub(lambda found: f"{found[1]}\n{block}\n\n{found[2]}", text)


def _list_headlines(record: Record) -> Iterator[str]:
    headings = ["", "ours, ms", "torch, ms", "times as fast", "with huge pages", "trips"]
    grid = Grid("", headings, [])
    for name, title, rival in _ROWS:
        variants = record["cases"][name]["variants"]
        times = [f"{variants[v]['ms']:.3g}" for v in ("ours", rival)]
        grid.rows.append([title, *times, *_against(record, name, rival), _trips(record, name)])
    yield as_markdown(grid.without_empty_columns())
    yield _describe(record)
    yield _list_losses(record) or "No case without options is slower than torch."


def _describe(record: Record) -> str:
    machine, versions = record["machine"], record["versions"]
    speed = copy_speed(record, "rows")
    copies = (
        ""
        if trips(record, "rows") is None
        else " Trips: the time over that of one copy of x into an array that is kept, here "
        f"{speed:.3g} GB/s."
    )
    return (
        f"Medians of one run, float32, {machine['threads']} cores of {machine['processor']} "
        f"({machine['instructions']}), torch {versions['torch']}. With huge pages: against a torch "
        "whose allocator asks for them (`THP_MEM_ALLOC_ENABLE=1`)." + copies
    )


def _list_losses(record: Record) -> str:
    """Cases without options that torch does faster, and those that are slower when compiled."""
    found = []
    for suffix, rival in (("", "torch"), (HUGE, "torch with huge pages")):
        slower = []
        for case in CASES:
            value = quotient(record, case.name, f"torch{suffix}", "ours") if case.plain else None
            if value is not None and value < _EVEN:
                kind = "inference, " if case.inference else ""
                slower.append(f"{kind}{case.title}: {value:.2f}")
        if slower:
            found.append(f"Times as fast as {rival}, where that is faster: {'; '.join(slower)}.")
    compiled = []
    for case in CASES:
        value = quotient(record, case.name, "ours, compiled", "ours")
        if value is not None and value > _NO_SLOWER:
            kind = "inference, " if case.inference else ""
            compiled.append(f"{kind}{case.title}: {value:.2f}")
    if compiled:
        found.append(f"Time under `torch.compile` over eager, where more: {'; '.join(compiled)}.")
    return " ".join(found)


def _list_rest(records: dict[str, Record]) -> Iterator[str]:
    record = records["cpu"]
    yield "### PyTorch"
    headings = ["", "times as fast", "with huge pages", "trips", "over unmasked"]
    grid = Grid("", [*headings, "compiled ÷ eager"], [])
    for case in CASES:
        if case.name not in record["cases"] or (case.inference and case.padded is not None):
            continue
        masked = case.padded is not None
        kind = "inference, " if case.inference else ""
        grid.rows.append(
            [
                kind + case.title,
                *_against(record, case.name, "pack" if masked else "torch"),
                _trips(record, case.name),
                _times(record, case.name, "ours", "ours, no mask"),
                _times(record, case.name, "ours, compiled", "ours"),
            ]
        )
    yield as_markdown(grid.without_empty_columns())
    yield _describe(record) + " With a mask, torch packs the real rows, and scatters its result."
    yield _list_losses(record) or "No case without options is slower than torch."
    yield "### JAX"
    jax = Grid("", ["", "times as fast as flax", "trips"], [])
    for name, case in records["jax"]["cases"].items():
        found = against_flax(name)(records["jax"])
        times = "" if found is None else f"{found[0]:.2f}"
        jax.rows.append([case["title"], times, _trips(records["jax"], name)])
    yield as_markdown(jax.without_empty_columns())
    yield "### Keras"
    yield "Times as fast as Keras's own layer, by backend."
    backends = records["keras"]["backends"]
    keras = Grid("", ["", *backends], [])
    for name in next(iter(backends.values())):
        found = [backends[b][name] for b in backends]
        keras.rows.append([name, *(f"{v['keras']['ms'] / v['ours']['ms']:.2f}" for v in found)])
    yield as_markdown(keras)


def _against(record: Record, case: str, rival: str) -> list[str]:
    return [_times(record, case, rival + suffix, "ours") for suffix in ("", HUGE)]


def _times(record: Record, case: str, above: str, below: str) -> str:
    value = quotient(record, case, above, below)
    return "" if value is None else f"{value:.2f}"


def _trips(record: Record, case: str) -> str:
    value = trips(record, case)
    return "" if value is None else f"{value:.3g}"


def main() -> None:
    """Write the pages, or compare them."""
    parser = argparse.ArgumentParser(description="Make pages from benchmarks' results.")
    parser.add_argument(
        "--check", action="store_true", help="write nothing; fail where one differs"
    )
    if not parser.parse_args().check:
        print("Written:", *write_pages(RESULTS))
    elif stale := find_stale():
        sys.exit(f"publish: {', '.join(stale)} are not of these results; make bench-pages")


if __name__ == "__main__":
    main()
