"""Names and numbers from models and files, for people to read."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence

__all__ = ["format_number", "list_names", "plain", "plural", "printable"]

_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def printable(text: str, longest: int = 200) -> str:
    """Text without control characters: what is not printable is written as its code.

    A file may name a layer with escape sequences, characters that turn the direction of writing,
    or halves of surrogate pairs.

    Args:
        text: any.
        longest: more characters than that are cut out of the middle.

    >>> printable("a\\x1b[31mb")
    'a\\\\x1b[31mb'
    """
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]}…{text[-half:]}"
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def list_names(names: Sequence[str], most: int = 5, mark: str = ", ") -> str:
    """The first names, cut where they are long, and how many more there are.

    Args:
        names: any.
        most: names that are shown.
        mark: between two of them.

    >>> list_names(["bn1", "bn2", "bn3"], most=2)
    'bn1, bn2 and 1 more'
    """
    more = f" and {len(names) - most:,} more" if len(names) > most else ""
    return mark.join(printable(name, 120) for name in names[:most]) + more


def plural(count: int, noun: str) -> str:
    """The count with its noun.

    >>> plural(1, "layer"), plural(1200, "layer")
    ('1 layer', '1,200 layers')
    """
    return f"{count:,} {noun}" if count == 1 else f"{count:,} {noun}s"


def plain(name: str) -> str:
    """A name without case and separators, which libraries choose differently.

    >>> plain("Layer1/bn_1"), plain("layer1.bn1")
    ('layer1bn1', 'layer1bn1')
    """
    return re.sub(r"[^a-z0-9]+", "", name.lower())


def format_number(value: float, digits: int = 3) -> str:
    """The number in a few digits, with a power of ten if it is very large or small.

    Args:
        value: any.
        digits: how many matter.

    >>> [format_number(v) for v in (0.25, 12345.6, 3.2e-8, 1e6, float("nan"))]
    ['0.25', '12,346', '3.2·10⁻⁸', '10⁶', 'nan']
    """
    if not math.isfinite(value):
        return str(value)
    if value == 0:
        return "0"
    if 1e-3 <= abs(value) < 1e5:
        text = f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"
        return text.replace("-", "−")
    mantissa, exponent = f"{value:.1e}".split("e")
    mantissa = mantissa.removesuffix(".0").replace("-", "−")
    raised = str(int(exponent)).translate(_SUPERSCRIPT)
    return f"10{raised}" if mantissa == "1" else f"{mantissa}·10{raised}"
