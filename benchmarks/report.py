"""A run's tables, for the terminal and for benchmarks/results/cpu.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from targets import HUGE, quotient

Record = dict[str, Any]


@dataclass
class Grid:
    """A table before it has a form; the first column is text, the others are figures."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def print_report(record: Record, console: Console) -> None:
    """The tables, without those of the targets and of all variants."""
    for grid in _grids(record):
        table = Table(title=grid.title, box=SIMPLE_HEAD, title_justify="left")
        for index, heading in enumerate(grid.headings):
            table.add_column(heading, justify="right" if index else "left", no_wrap=not index)
        for row in grid.rows:
            table.add_row(*row)
        console.print(table)


def write_markdown(record: Record) -> str:
    """The tables as markdown, under what they were measured on."""
    facts = record["machine"] | record["versions"]
    parts = [
        "# Speed on the CPU",
        f"Written by `{record['command']}`. Medians of interleaved rounds, in milliseconds; only "
        "their ratios mean anything. A step is a forward and a backward pass into fresh memory, "
        "float32 unless said otherwise. Every variant was compared with a float64 result in the "
        'same run, before it was timed. "Huge pages": torch\'s allocator asks for them '
        "(`THP_MEM_ALLOC_ENABLE=1`), which both variants then profit from. GB/s: the bytes that "
        "the job cannot do without, over the time. Copy: as many bytes copied from one array to "
        "another, both kept. Pack: `x[mask]`, torch's layer, scattered into zeros. Formula: masked "
        "normalization in elementwise operations, without running statistics.",
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        "![Times as fast as torch](cpu.png)",
    ]
    for grid in (*_grids(record), _targets(record), _all_variants(record)):
        parts += [f"## {grid.title}", _as_markdown(grid)]
    return "\n\n".join(parts) + "\n"


def _as_markdown(grid: Grid) -> str:
    lines = [grid.headings, ["---", *["---:"] * (len(grid.headings) - 1)], *grid.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _grids(record: Record) -> Iterator[Grid]:
    cases = record["cases"]
    groups = {
        "Training step, no option": lambda c: c["mode"] != "inference" and _plain(c),
        "Training step with ReLU; torch's operators separate": lambda c: c["activation"],
        "Forward pass, inference": lambda c: c["mode"] == "inference" and _plain(c),
    }
    for title, belongs in groups.items():
        names = [name for name, case in cases.items() if belongs(case)]
        if names:
            yield _without_empty_columns(_against_torch(title, record, names))
    masked = [name for name, case in cases.items() if case["padded"] is not None]
    steps = [name for name in masked if cases[name]["mode"] != "inference"]
    if steps:
        yield _without_empty_columns(_against_pack(record, steps))
    if zeroed := [name for name in masked if name not in steps]:
        yield _zeroed(record, zeroed)
    compiled = [name for name, case in cases.items() if "ours, compiled" in case["variants"]]
    if compiled:
        yield _under_compile(record, compiled)
    if "accuracy" in record:
        yield _accuracy(record)


def _plain(case: Record) -> bool:
    return case["padded"] is None and case["activation"] is None


def _against_torch(title: str, record: Record, names: list[str]) -> Grid:
    headings = ["", "ours", "torch", "times as fast", "with huge pages", "GB/s"]
    in_place = any("torch, in place" in record["cases"][name]["variants"] for name in names)
    headings += ["torch in place ÷ ours"] if in_place else ["ours ÷ copy", "reused ÷ copy"]
    grid = Grid(title, headings, [])
    for name in names:
        case = record["cases"][name]
        row = [
            case["title"],
            _ms(case, "ours"),
            _ms(case, "torch"),
            _times(record, name, "torch", "ours"),
            _times(record, name, f"torch{HUGE}", f"ours{HUGE}"),
            f"{case['variants']['ours']['GB/s']:.3g}",
        ]
        if in_place:
            row.append(_times(record, name, "torch, in place", "ours"))
        else:
            row += [
                _times(record, name, "ours", "copy"),
                _times(record, name, "ours, reused buffers", "copy"),
            ]
        grid.rows.append(row)
    return grid


def _zeroed(record: Record, names: list[str]) -> Grid:
    """Zeros at padding need the mask, which evaluation does not read else."""
    headings = ["", "no mask", "zeros at padding", "zeros ÷ no mask"]
    grid = Grid("Forward pass, inference, with zeros at padding", headings, [])
    for name in names:
        case = record["cases"][name]
        row = [_ms(case, "ours"), _ms(case, "ours, zeroed")]
        grid.rows.append([case["title"], *row, _times(record, name, "ours, zeroed", "ours")])
    return grid


def _against_pack(record: Record, names: list[str]) -> Grid:
    variants = ("ours", "ours, no mask", "pack", "formula", "formula, compiled")
    headings = ["", *variants, "pack ÷ ours", "with huge pages", "compiled ÷ ours"]
    ratios = ["ours ÷ no mask", "zeroed ÷ ours"]
    grid = Grid("Training step with a mask", [*headings, *ratios, "GB/s"], [])
    for name in names:
        case = record["cases"][name]
        grid.rows.append(
            [
                case["title"],
                *(_ms(case, variant) for variant in variants),
                _times(record, name, "pack", "ours"),
                _times(record, name, f"pack{HUGE}", f"ours{HUGE}"),
                _times(record, name, "formula, compiled", "ours"),
                _times(record, name, "ours", "ours, no mask"),
                _times(record, name, "ours, zeroed", "ours"),
                f"{case['variants']['ours']['GB/s']:.3g}",
            ]
        )
    return grid


def _under_compile(record: Record, names: list[str]) -> Grid:
    variants = ("ours", "ours, compiled")
    grid = Grid("Under torch.compile", ["", *variants, "eager ÷ compiled"], [])
    for name in names:
        case = record["cases"][name]
        times = [_ms(case, variant) for variant in variants]
        grid.rows.append([_kind(case) + case["title"], *times, _times(record, name, *variants)])
    return grid


def _kind(case: Record) -> str:
    return "inference, " if case["mode"] == "inference" else ""


def _accuracy(record: Record) -> Grid:
    titles = {"ours": "ours", "plain": "ours, plain array code", "torch": "torch"}
    rows = [
        [mean, *(f"{errors[name]:.1e}" for name in titles)]
        for mean, errors in record["accuracy"].items()
    ]
    title = "Largest error of y, float32 (4096, 8), deviation 1"
    return Grid(title, ["mean", *titles.values()], rows)


def _targets(record: Record) -> Grid:
    grid = Grid("Targets", ["", "target", "measured", ""], [])
    for e in record["targets"]:
        if e["met"] is not None:
            sign = "≤" if e["at most"] else "≥"
            where = f", {e['where']}" if e["where"] else ""
            state = "ok" if e["met"] else "short"
            grid.rows.append(
                [f"{e['what']}{where}", f"{sign} {e['floor']:g}", f"{e['measured']:g}", state]
            )
    return grid


def _all_variants(record: Record) -> Grid:
    headings = ["", "variant", "median, ms", "quartiles", "GB/s", "rounds", "error"]
    grid = Grid("Every variant", headings, [])
    for case in record["cases"].values():
        for name, v in case["variants"].items():
            low, high = v["quartiles"]
            figures = [_figure(v["ms"]), f"{_figure(low)} to {_figure(high)}", f"{v['GB/s']:.3g}"]
            row = [
                _kind(case) + case["title"],
                name,
                *figures,
                str(v["rounds"]),
                f"{v['error']:.0e}",
            ]
            grid.rows.append(row)
    return grid


def _ms(case: Record, variant: str) -> str:
    found = case["variants"].get(variant)
    return "" if found is None else _figure(found["ms"])


def _times(record: Record, case: str, above: str, below: str) -> str:
    value = quotient(record, case, above, below)
    return "" if value is None else f"{value:.2f}"


def _figure(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _without_empty_columns(grid: Grid) -> Grid:
    kept = [i for i in range(len(grid.headings)) if i == 0 or any(row[i] for row in grid.rows)]
    rows = [[row[i] for i in kept] for row in grid.rows]
    return Grid(grid.title, [grid.headings[i] for i in kept], rows)
