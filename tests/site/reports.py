"""The pages that tools write, as a reader uses them: links, the filter, narrow screens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

__all__ = ["check_reports", "write_reports"]


def write_reports(folder: Path) -> list[str]:
    """Write the pages into a folder; their names."""
    import torch

    from batchnorm.tools import find_leaks, inspect

    torch.manual_seed(0)
    blocks = [
        torch.nn.Sequential(torch.nn.Conv1d(8, 8, 3, padding=1), torch.nn.BatchNorm1d(8))
        for _ in range(12)
    ]
    model = torch.nn.Sequential(*blocks)
    mask = torch.arange(60) < torch.tensor([60, 30, 20])[:, None]
    batch = torch.randn(3, 8, 60) * mask[:, None]
    for _ in range(30):
        model(batch)
    for number in (1, 5):
        blocks[number][1].running_var.neg_()
    model[7][1].running_mean.add_(0.4 * model[7][1].running_var.sqrt())
    report = inspect(model, [batch], mask=lambda _: mask, progress=False)
    report.save_html(folder / "report.html")
    for number in (1, 5):
        blocks[number][1].running_var.neg_()
    find_leaks(model, batch, mask).save_html(folder / "leaks.html")
    return ["report.html", "leaks.html"]


def check_reports(browser: Any, address: str) -> list[str]:
    """Faults of the report, one line each."""
    wrong = []
    for width in (1280, 390):
        page = browser.new_page(viewport={"width": width, "height": 800})
        page.goto(f"{address}/report.html")
        page.locator("article li a").first.click()
        rows = page.locator("details.layer[open]")
        if rows.count() != 1 or not rows.first.locator(".body").is_visible():
            wrong.append(f"report.html ({width}): a finding's link opens {rows.count()} rows")
        page.goto(f"{address}/report.html")
        page.locator("#shown-error").check()
        levels = page.eval_on_selector_all(
            "details.layer", "rows => rows.filter(r => r.checkVisibility()).map(r => r.className)"
        )
        if set(levels) != {"layer error"}:
            wrong.append(f"report.html ({width}): the filter for errors shows {levels}")
        hidden = page.eval_on_selector_all(
            ".row .spark", "cells => cells.filter(c => !c.offsetWidth && c.offsetParent).length"
        )
        titles = page.locator(".titles small").first
        if hidden or not titles.is_visible():
            wrong.append(f"report.html ({width}): charts or their titles are hidden")
        page.close()
    return wrong
