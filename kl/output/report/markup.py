"""HTML from parts: whatever is not made here is text."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape
from urllib.parse import quote


class Markup(str):
    """HTML that was made here."""

    __slots__ = ()


Part = str | Markup | None


def tag(name: str, *parts: Part, **attributes: str | None) -> Markup:
    """An element; texts and attributes are escaped, None is left out. ``class_`` is the attribute ``class``."""
    given = {key.rstrip("_").replace("_", "-"): value for key, value in attributes.items() if value is not None}
    written = "".join(f' {key}="{escape(value)}"' for key, value in given.items())
    return Markup(f"<{name}{written}>{joined(parts)}</{name}>")


def joined(parts: Iterable[Part]) -> Markup:
    """Parts after one another."""
    return Markup("".join(part if isinstance(part, Markup) else escape(part) for part in parts if part is not None))


def table(heads: Sequence[str], rows: Iterable[Sequence[Part]], caption: str, *, numbers: Sequence[int] = ()) -> Markup:
    """A table that scrolls by itself where it is too wide; the columns ``numbers`` are set flush right."""
    kinds = ["number" if column in numbers else None for column in range(len(heads))]
    head = tag("tr", *(tag("th", text, scope="col", class_=kind) for text, kind in zip(heads, kinds, strict=True)))
    body = (tag("tr", *(tag("td", cell, class_=kind) for cell, kind in zip(row, kinds, strict=True))) for row in rows)
    inner = tag("table", tag("caption", caption), tag("thead", head), tag("tbody", *body))
    return tag("div", inner, class_="scrolls", tabindex="0", role="region", aria_label=caption)


def link_to(source_file: str, response_idx: int, position: int) -> str:
    """The address of a position on the page."""
    return f"#{quote(source_file, safe='/')}/{response_idx}/{position}"
