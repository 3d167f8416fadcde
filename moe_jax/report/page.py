"""Small functions that turn values into escaped HTML, and the self-contained page."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from typing import Any, NamedTuple

DASH = "–"


class Link(NamedTuple):
    """Text that leads to a place of the page, `#` and an id; without a place it is plain text."""

    text: str
    place: str

    def __str__(self) -> str:
        return self.text


@dataclasses.dataclass(frozen=True)
class Column:
    """A table column.

    With `digits`, right-aligned numbers with so many decimals, sorted by value; `percent` shows
    fractions as signed per cent, `tiny` small values as 1e-05. `wide` lets long text wrap.
    """

    title: str
    digits: int | None = None
    percent: bool = False
    tiny: bool = False
    wide: bool = False

    @property
    def is_number(self) -> bool:
        return self.digits is not None

    def show(self, value: Any) -> str:
        if value is None:
            return DASH
        if not self.is_number:
            return str(value)
        if self.percent:
            return f"{100 * value:+.{self.digits}f} %"
        if self.tiny and 0 < value < 10.0**-self.digits:
            return f"{value:.0e}"
        return fixed(value, self.digits)


def texts(*titles: str, **settings: Any) -> list[Column]:
    return [Column(title, **settings) for title in titles]


def numbers(digits: int, *titles: str, **settings: Any) -> list[Column]:
    return [Column(title, digits, **settings) for title in titles]


def table(
    columns: Sequence[Column], rows: Iterable[Sequence[Any]], bold: Sequence[int | None] = ()
) -> str:
    """A sortable table. `bold` gives for each row the column whose value is bold, or None."""
    head = "".join(
        f'<th{_class("number" * c.is_number)}><button type="button">{escape(c.title)}</button></th>'
        for c in columns
    )
    body = []
    for r, row in enumerate(rows):
        cells = []
        for i, (column, value) in enumerate(zip(columns, row, strict=True)):
            names = ["number"] * column.is_number + ["wide"] * column.wide
            names += ["best"] * (bool(bold) and bold[r] == i)
            key = "" if value is None else escape(str(value))
            text = escape(column.show(value))
            if isinstance(value, Link) and value.place:
                text = f'<a href="{escape(value.place)}">{text}</a>'
            cells.append(f'<td{_class(*names)} data-value="{key}">{text}</td>')
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def figure(name: str, caption: str) -> str:
    """The place where figures.js draws the figure of this name."""
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure data-figure="{escape(name)}">{note}</figure>'


def details(title: str, *parts: str, name: str = "") -> str:
    """Parts that are shown on a click, or when a link leads to `name`."""
    place = f' id="{escape(name)}"' if name else ""
    return f"<details{place}><summary>{escape(title)}</summary>{''.join(parts)}</details>"


def fixed(value: float, digits: int) -> str:
    """`value` with `digits` decimals, without a minus sign at 0."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def signed(value: float) -> str:
    """`value` with three decimals and its sign, which is plus at 0."""
    return f"{round(value, 3) + 0.0:+.3f}"


def paragraph(text: str) -> str:
    return f"<p>{escape(text)}</p>"


def soft(text: str) -> str:
    """A paragraph of explanation."""
    return f'<p class="soft">{escape(text)}</p>'


def missing(text: str) -> str:
    """A sentence in place of something that is left out."""
    return f'<p class="missing">{escape(text)}</p>'


def heading(text: str) -> str:
    return f"<h3>{escape(text)}</h3>"


def bullets(lines: Iterable[str]) -> str:
    return f"<ul>{''.join(f'<li>{escape(line)}</li>' for line in lines)}</ul>"


def section(name: str, title: str, *parts: str) -> str:
    return f'<section id="{name}"><h2>{escape(title)}</h2>{"".join(parts)}</section>'


def page(
    title: str,
    subtitle: str,
    sections: Mapping[str, tuple[str, str]],
    figures: Mapping[str, Mapping[str, Any]],
) -> str:
    """The whole page of {id: (title, content)}; style, scripts and figures are inline."""
    files = resources.files("moe_jax.report")
    style, script, draw = (
        files.joinpath(name).read_text("utf-8") for name in ("style.css", "page.js", "figures.js")
    )
    links = " ".join(f'<a href="#{name}">{escape(t)}</a>' for name, (t, _) in sections.items())
    body = "".join(section(name, t, content) for name, (t, content) in sections.items())
    # In a script element only `<` could end the JSON.
    data = json.dumps(figures, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    data = data.replace("<", "\\u003c")
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n<body>"
        f'<header><h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>'
        f"<nav>{links}</nav></header>\n{body}\n"
        '<noscript><p class="missing">Figures need JavaScript.</p></noscript>'
        '<div id="tip" role="tooltip" hidden></div>\n'
        f'<script type="application/json" id="figures">{data}</script>\n'
        f"<script>\n{script}{draw}</script></body></html>\n"
    )


def _class(*names: str) -> str:
    text = " ".join(name for name in names if name)
    return f' class="{text}"' if text else ""
