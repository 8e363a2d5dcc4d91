"""The report as data, as a page and as a table, whatever its layers are called."""

from __future__ import annotations

import io
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from html_checker import Checker
from rich.console import Console

from batchnorm.core.moments import Moments
from batchnorm.tools.inspection.health import judge
from batchnorm.tools.inspection.page.scales import Scale, fit
from batchnorm.tools.inspection.quantities import Observed, derive
from batchnorm.tools.inspection.records import LayerReport
from batchnorm.tools.inspection.report import Report
from batchnorm.tools.inspection.thresholds import Thresholds
from batchnorm.tools.state import BatchNormState

HOSTILE = "<script>alert(1)</script>\"'&\x1b[31m\u202e[red]\ud800"


def make_layer(name: str, *, observed: bool = True, **fields: object) -> LayerReport:
    rng = np.random.default_rng(len(name))
    mean, var = rng.normal(size=16), rng.uniform(0.5, 2.0, 16)
    state = BatchNormState(name, "torch.nn.BatchNorm2d", mean, var, np.ones(16), np.zeros(16))
    state = replace(state, eps=1e-5, decay=0.9, **fields)  # type: ignore[arg-type]
    seen = None
    if observed:
        real = Moments(np.full(16, 1e6), mean + 2.0, var)
        everything = Moments(np.full(16, 2e6), mean + 0.01, var)
        seen = Observed(real, everything, 1e6, 1e6)
    quantities = derive(state, 1e-5, seen)
    return LayerReport(state, quantities, judge(state, quantities, seen), seen)


def make_report(*layers: LayerReport, source: str = "Net") -> Report:
    return Report(source, layers, Thresholds(), batches=2)


REPORTS = {
    "sick": make_report(make_layer("a.bn"), make_layer("b.bn", var=-np.ones(16))),
    "file": make_report(make_layer("bn1", observed=False), make_layer("bn2", observed=False)),
    "one": make_report(make_layer("")),
    "none": make_report(),
    "stateless": make_report(make_layer("bn", observed=False, mean=None, var=None)),
    "not finite": make_report(make_layer("bn", mean=np.full(16, np.nan), var=np.full(16, np.inf))),
    "equal": make_report(make_layer("bn", observed=False, mean=np.zeros(16), var=np.ones(16))),
    "channel": make_report(make_layer("bn", observed=False, mean=np.zeros(1), var=np.ones(1),
                                      gamma=None, beta=None)),
    "many": make_report(*(make_layer(f"stage{i // 20}.{i}.bn") for i in range(120))),
    "hostile": make_report(make_layer(HOSTILE, kind=HOSTILE, stored=HOSTILE), source=HOSTILE),
}  # fmt: skip


@pytest.mark.parametrize("name", REPORTS)
def test_page_is_well_formed_and_refers_to_nothing_but_itself(name: str) -> None:
    page = REPORTS[name].to_html()
    found = Checker(page)
    assert found.open == []
    assert page.encode("utf-8")
    assert not set(found.elements) & {"script", "img", "iframe", "link", "object", "base"}
    anchors = found.links - {""}
    assert all(link.startswith("#layer-") and link[1:] in found.ids for link in anchors)
    assert not re.search(r"https?:|@import|url\(", page)
    assert "nan" not in re.findall(r'(?:d|x|y|height)="([^"]*)"', page)


def test_layers_with_errors_come_first_and_can_be_shown_alone() -> None:
    names = ("a", "b", "c", "d")
    layers = [make_layer(name, observed=name in "bd") for name in names]
    page = make_report(*layers).to_html()
    rows = re.findall(r'<details class="layer (\w+)">.*?<div class="body" id="layer-(\d)"', page)
    assert rows == [("error", "1"), ("error", "3"), ("ok", "0"), ("ok", "2")]
    buttons = re.findall(r'id="shown-(\w+)"[^>]*/>([^<]*)</label>', page)
    assert buttons == [("all", " all 4"), ("error", " errors 2"), ("ok", " ok 2")]
    assert "shown-all" not in make_report(*layers[::2]).to_html()  # nothing to choose from


def test_page_of_300_layers_is_below_2_megabytes() -> None:
    rng = np.random.default_rng(0)
    layers = []
    for i in range(300):
        mean, var, gamma, beta = rng.normal(size=(4, 512))
        state = BatchNormState(
            f"encoder.stages.{i // 30}.blocks.{i % 30}.norm", "torch.nn.BatchNorm2d",
            mean, np.exp(var), 1.0 + 0.2 * gamma, beta, eps=1e-5, decay=0.9,
        )  # fmt: skip
        shift = (0.01, 0.4, 2.0)[i % 3]
        real = Moments(np.full(512, 1e6), mean + shift * np.exp(var / 2), np.exp(var))
        seen = Observed(real, Moments(np.full(512, 2e6), 0.5 * mean, np.exp(var)), 1e6, 1e6)
        quantities = derive(state, 1e-5, seen)
        layers.append(LayerReport(state, quantities, judge(state, quantities, seen), seen))
    page = make_report(*layers).to_html()
    assert page.count('<details class="layer ') == 300
    assert len(page.encode()) < 2e6


@pytest.mark.parametrize("name", REPORTS)
def test_json_is_strict_and_complete(name: str) -> None:
    report = REPORTS[name]
    found = json.loads(report.to_json(per_channel=True), parse_constant=pytest.fail)
    assert [layer["name"] for layer in found["layers"]] == [x.name for x in report.layers]
    assert found["ok"] == report.ok
    for layer, given in zip(found["layers"], report.layers, strict=True):
        assert [f["code"] for f in layer["findings"]] == [f.code for f in given.findings]
        for values in layer["per_channel"].values():
            assert len(values) == given.state.channels


def test_json_holds_the_numbers() -> None:
    report = REPORTS["sick"]
    layer = report.to_dict(per_channel=True)["layers"][0]
    state = report.layers[0].state
    assert layer["per_channel"]["mean"] == state.mean.tolist()  # type: ignore[union-attr]
    assert layer["quantities"]["var"]["max"] == state.var.max()  # type: ignore[union-attr]
    assert layer["observed"] == {"calls": 1, "rows": 1e6, "padded": 0.5}
    assert "per_channel" not in report.to_dict()["layers"][0]


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("width", [40, 60, 140])
def test_table_is_printed_at_any_width(name: str, width: int) -> None:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(REPORTS[name])
    shown = console.export_text()
    assert max(map(len, shown.splitlines())) <= width


def show(report: Report, width: int) -> str:
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(report)
    return console.export_text()


def test_narrow_table_keeps_names_and_findings() -> None:
    report = make_report(*(make_layer(f"blocks.{i}.bn", stored="float16") for i in range(3)))
    for width in (40, 60, 80, 120):
        lines = show(report, width).splitlines()
        for layer in report.layers:
            row = next(line.split() for line in lines if line.split()[:1] == [layer.name])
            assert {word.strip(",") for word in row[1:]} & {f.code for f in layer.findings}, row
    assert "Wider terminals show: channels, median std, largest gain" in " ".join(
        show(report, 40).split()
    )
    assert "Wider terminals" not in show(report, 120)
    assert "channels" in show(report, 120)


def test_hostile_names_steer_neither_terminal_nor_page() -> None:
    report = REPORTS["hostile"]
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(report)
    for shown in (str(report), console.export_text(), report.to_html()):
        assert "\x1b" not in shown
        assert "\u202e" not in shown
        assert "\\x1b[31m" in shown
        assert "[red]" in shown
    found = Checker(report.to_html())
    assert "<script>alert(1)</script>" in "".join(found.texts)  # as text
    assert report.to_dict()["layers"][0]["name"] == HOSTILE  # JSON has its own escapes


def test_verdict_counts_layers_by_their_worst_finding() -> None:
    layers = (make_layer("a"), make_layer("b", observed=False), make_layer("c", observed=False,
              stored="bfloat16"))  # fmt: skip
    report = make_report(*layers)
    assert not report.ok
    assert [layer.level for layer in report.layers] == ["error", "ok", "warning"]
    assert report.summarize() == "Net: 3 layers, 48 channels: 1 with errors, 1 with warnings"
    assert make_report(layers[1]).summarize() == "Net: 1 layer, 16 channels: nothing wrong"


def test_page_is_written_to_a_file(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    REPORTS["sick"].save_html(path)
    assert path.read_text(encoding="utf-8") == REPORTS["sick"].to_html()


def test_scale_maps_clips_and_counts() -> None:
    scale = Scale(1.0, 100.0, log=True, start=0.0, stop=10.0)
    assert [scale(v) for v in (0.0, 1.0, 10.0, 100.0, 1e9)] == [0.0, 0.0, 5.0, 10.0, 10.0]
    assert scale.bins([1.0, 2.0, 50.0, 1e9, np.nan], 2) == [2, 2]
    assert scale.ticks() == [1.0, 10.0, 100.0]
    assert Scale(0.0, 1.0).ticks(5) == pytest.approx([0.0, 0.25, 0.5, 0.75, 1.0])


@pytest.mark.parametrize(
    "values", [[0.0], [1.0, 1.0], [-2.0, 3.0], [1e-30, 1e30], [0.0, 1e-300], [np.nan, 5.0]]
)
def test_fitted_scale_shows_all_values(values: list[float]) -> None:
    scale = fit(values)
    assert scale is not None
    assert scale.low < scale.high
    assert sum(scale.bins(values, 10)) == np.isfinite(values).sum()
    assert len(scale.ticks()) <= 8


def test_nothing_finite_has_no_scale() -> None:
    assert fit([np.nan, np.inf]) is None
