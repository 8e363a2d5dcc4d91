"""The report of `inspect`, for programs, terminals and browsers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from batchnorm.tools.inspection.page import make_page
from batchnorm.tools.inspection.records import Findings

if TYPE_CHECKING:
    from rich.console import RenderableType

__all__ = ["Report"]


@dataclass(frozen=True, eq=False)
class Report(Findings):
    """The report that `batchnorm.tools.inspect` returns: a summary in print, a table in rich.

    Args:
        source: the model's type, or the file's path.
        layers: in the model's order.
        limits: the thresholds that were applied.
        batches: number of batches that were run.
        notes: other remarks on a file, such as arrays that look like a layer but are none.
        leaks: layers of any kind through which padding reaches real positions; None if they were
            not searched for.
    """

    def to_json(self, *, per_channel: bool = False) -> str:
        """`to_dict` as JSON text.

        Args:
            per_channel: as in `to_dict`.
        """
        return json.dumps(self.to_dict(per_channel=per_channel), indent=2, allow_nan=False)

    def to_html(self) -> str:
        """The report as an HTML page without scripts, which loads nothing."""
        return make_page(self)

    def save_html(self, path: str | Path) -> None:
        """Write `to_html` to a file.

        Args:
            path: of the file; replaced if it exists.
        """
        Path(path).write_text(self.to_html(), encoding="utf-8")

    def __rich__(self) -> RenderableType:
        from batchnorm.tools.inspection.table import make_table

        return make_table(self)
