"""A run's tables, for the terminal and for benchmarks/results/cpu.md."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from judging import HUGE, copy_speed, quotient, sign, state, trips

Record = dict[str, Any]


@dataclass
class Grid:
    """A table before it has a form; the first column is text, the others are figures."""

    title: str
    headings: list[str]
    rows: list[list[str]]

    def without_empty_columns(self) -> Grid:
        """The table without columns that have no figure."""
        count = len(self.headings)
        kept = [i for i in range(count) if i == 0 or any(row[i] for row in self.rows)]
        rows = [[row[i] for i in kept] for row in self.rows]
        return Grid(self.title, [self.headings[i] for i in kept], rows)


def print_report(record: Record, console: Console) -> None:
    """The tables, without those of the targets and of all variants."""
    for grid in make_grids(record):
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
        "their ratios mean anything. A step is a forward and a backward pass, float32 unless said "
        "otherwise. Every variant was compared with a float64 result in the same run, before it "
        'was timed. "With huge pages": the same quotient for a torch whose allocator asks for them '
        "(`THP_MEM_ALLOC_ENABLE=1`), in a process that takes turns with ours. GB/s: the bytes that "
        "the job cannot do without pass after pass, over the time. Copy: x copied into an array "
        "that is kept. Trips: the time over that of one copy. Reused: the passes alone, into "
        "arrays that are kept. Pack: `x[mask]`, torch's layer, scattered into zeros. Formula: "
        "masked normalization in elementwise operations, without running statistics.",
        "\n".join(f"- {name}: {value}" for name, value in facts.items()),
        "![Times as fast as torch](cpu.png)",
    ]
    grids = (*make_grids(record), make_targets(record), _all_variants(record))
    for grid in grids:
        parts += [f"## {grid.title}", as_markdown(grid)]
    return "\n\n".join(parts) + "\n"


def as_markdown(grid: Grid) -> str:
    """The table, without its title."""
    lines = [grid.headings, ["---", *["---:"] * (len(grid.headings) - 1)], *grid.rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def make_grids(record: Record) -> Iterator[Grid]:
    """The tables of a run."""
    cases = record["cases"]
    groups = {
        "Training step, no option": lambda c: c["mode"] != "inference" and _plain(c),
        "Training step with ReLU; torch's operators separate": lambda c: c["activation"],
        "Forward pass, inference": lambda c: c["mode"] == "inference" and _plain(c),
    }
    for title, belongs in groups.items():
        names = [name for name, case in cases.items() if belongs(case)]
        if names:
            yield _against_torch(title, record, names).without_empty_columns()
    masked = [name for name, case in cases.items() if case["padded"] is not None]
    steps = [name for name in masked if cases[name]["mode"] != "inference"]
    if steps:
        yield _against_pack(record, steps).without_empty_columns()
    if zeroed := [name for name in masked if name not in steps]:
        yield _zeroed(record, zeroed)
    compiled = [name for name, case in cases.items() if "ours, compiled" in case["variants"]]
    if compiled:
        yield _under_compile(record, compiled)
    if "passes" in record:
        yield _passes(record)
    if weighed := [name for name, case in cases.items() if case.get("memory")]:
        yield _memory(record, weighed)
    if "accuracy" in record:
        yield _accuracy(record)


def _plain(case: Record) -> bool:
    return case["padded"] is None and case["activation"] is None


def _against_torch(title: str, record: Record, names: list[str]) -> Grid:
    headings = ["", "ours", "torch", "times as fast", "with huge pages", "torch in place ÷ ours"]
    grid = Grid(title, [*headings, *_SPEEDS, "reused: trips"], [])
    for name in names:
        case = record["cases"][name]
        row = [
            case["title"],
            _ms(case, "ours"),
            _ms(case, "torch"),
            _times(record, name, "torch", "ours"),
            _times(record, name, f"torch{HUGE}", "ours"),
            _times(record, name, "torch, in place", "ours"),
            *_speeds(record, name),
            _number(trips(record, name, "ours, reused buffers")),
        ]
        grid.rows.append(row)
    return grid


_SPEEDS = ("GB/s", "copy, GB/s", "trips")


def _speeds(record: Record, name: str) -> list[str]:
    speed = record["cases"][name]["variants"]["ours"]["GB/s"]
    return [_number(a) for a in (speed, copy_speed(record, name), trips(record, name))]


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
    grid = Grid("Training step with a mask", [*headings, *ratios, *_SPEEDS], [])
    for name in names:
        case = record["cases"][name]
        grid.rows.append(
            [
                case["title"],
                *(_ms(case, variant) for variant in variants),
                _times(record, name, "pack", "ours"),
                _times(record, name, f"pack{HUGE}", "ours"),
                _times(record, name, "formula, compiled", "ours"),
                _times(record, name, "ours", "ours, no mask"),
                _times(record, name, "ours, zeroed", "ours"),
                *_speeds(record, name),
            ]
        )
    return grid


def _under_compile(record: Record, names: list[str]) -> Grid:
    variants = ("ours", "ours, compiled", "torch, compiled")
    ratios = ["compiled ÷ eager", "torch compiled ÷ ours"]
    grid = Grid("Under torch.compile", ["", *variants, *ratios], [])
    for name in names:
        case = record["cases"][name]
        times = [_ms(case, variant) for variant in variants]
        over = _times(record, name, "ours, compiled", "ours")
        against = _times(record, name, "torch, compiled", "ours, compiled")
        grid.rows.append([_kind(case) + case["title"], *times, over, against])
    return grid.without_empty_columns()


def _passes(record: Record) -> Grid:
    """Each pass, over a copy of one array; times are those of an element."""
    names = list(next(iter(record["passes"].values()))["over a copy"])
    headings = ["", "copy, ns", *(f"{name}, ns" for name in names)]
    grid = Grid("One pass, one core, data in its cache", headings, [])
    grid.headings += [f"{name} ÷ copy" for name in names]
    for found in record["passes"].values():
        times = [_number(found["ns"][name]) for name in ("copy", *names)]
        over = [f"{found['over a copy'][name]:.2f}" for name in names]
        grid.rows.append([found["title"], *times, *over])
    return grid


def _memory(record: Record, names: list[str]) -> Grid:
    """In arrays of x's size, y included."""
    variants = ("ours", "torch", "torch, in place")
    grid = Grid("Memory of a step, in arrays of x's size", [""], [])
    for what in ("kept", "peak"):
        grid.headings += [f"{what}, {variant}" for variant in variants]
    for name in names:
        memory = record["cases"][name]["memory"]
        figures = [
            _number(memory[v][what]) if v in memory else ""
            for what in ("kept", "peak")
            for v in variants
        ]
        grid.rows.append([record["cases"][name]["title"], *figures])
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


def make_targets(record: Record) -> Grid:
    """The targets that were measured, and the verdicts."""
    grid = Grid("Targets", ["", "target", "measured", "", "copy, GB/s"], [])
    for e in record["targets"]:
        if e["met"] is not None:
            where = f", {e['where']}" if e["where"] else ""
            bound, copy = f"{sign(e)} {e['floor']:g}", _number(e.get("copy, GB/s"))
            row = [f"{e['what']}{where}", bound, f"{e['measured']:g}", state(e), copy]
            grid.rows.append(row)
    return grid.without_empty_columns()


def _all_variants(record: Record) -> Grid:
    headings = ["", "variant", "median, ms", "quartiles", "GB/s", "trips", "rounds", "error"]
    grid = Grid("Every variant", headings, [])
    for case in record["cases"].values():
        for name, v in case["variants"].items():
            low, high = v["quartiles"]
            figures = [_figure(v["ms"]), f"{_figure(low)} to {_figure(high)}"]
            figures += [_number(v["GB/s"]), _number(v.get("trips"))]
            figures += [str(v["rounds"]), f"{v['error']:.0e}"]
            grid.rows.append([_kind(case) + case["title"], name, *figures])
    return grid.without_empty_columns()


def _ms(case: Record, variant: str) -> str:
    found = case["variants"].get(variant)
    return "" if found is None else _figure(found["ms"])


def _times(record: Record, case: str, above: str, below: str) -> str:
    value = quotient(record, case, above, below)
    return "" if value is None else f"{value:.2f}"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3g}"


def _figure(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"
