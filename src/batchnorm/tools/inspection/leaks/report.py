"""The result of `find_leaks`, for programs, terminals and browsers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from batchnorm.tools.inspection.leaks.records import LeakFindings

__all__ = ["Leaks"]


@dataclass(frozen=True, eq=False)
class Leaks(LeakFindings):
    """The result of `batchnorm.tools.find_leaks`: a summary in print, pictures in HTML.

    Args:
        source: the model's type.
        leaks: layers that leak, each on its own: those found in evaluation first, then those found
            in training only; in the order of execution.
        sensitive: layers that leak only if the padding of the batch holds other values than the
            filling.
        layers: every call in the order in which calls end, and by how much its outputs move, in
            the mode `shown`: evaluation, unless leaks show in training only.
        moved: by how much the model's own real outputs move in the end, absolutely.
        before: sizes of the padded axes in the run with little padding.
        after: those in the run with more.
        modes: the modes that were tried.
        tolerance: the relative difference that counts as rounding.
    """

    def to_json(self) -> str:
        """`to_dict` as JSON text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def to_html(self) -> str:
        """The result as an HTML page without scripts, which loads nothing."""
        from batchnorm.tools.inspection.page.leaks import make_leaks_page

        return make_leaks_page(self)

    def save_html(self, path: str | Path) -> None:
        """Write `to_html` to a file.

        Args:
            path: of the file; replaced if it exists.
        """
        Path(path).write_text(self.to_html(), encoding="utf-8")
