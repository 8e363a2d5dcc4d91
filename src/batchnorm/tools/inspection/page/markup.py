"""HTML and SVG in which every string is escaped unless this module made it."""

from __future__ import annotations

from html import escape

__all__ = ["Markup", "element", "join"]

_VOID = frozenset({"meta", "path", "rect", "line", "circle", "input"})


class Markup(str):
    """Text that is HTML already."""

    __slots__ = ()


def element(name: str, attributes: dict[str, object] | None = None, *children: str) -> Markup:
    """`<name attributes>children</name>`.

    Args:
        name: of the element.
        attributes: by name; those that are None are left out. Floats lose what cannot be seen.
        children: escaped, except for `Markup`.
    """
    given = {key: value for key, value in (attributes or {}).items() if value is not None}
    written = "".join(f' {key}="{_value(value)}"' for key, value in given.items())
    if name in _VOID and not children:
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(*children)}</{name}>")


def join(*children: str) -> Markup:
    """The children one after another, escaped except for `Markup`."""
    return Markup("".join(c if isinstance(c, Markup) else escape(c) for c in children))


def _value(value: object) -> str:
    return escape(
        f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
    )
