"""Small functions that turn values into escaped HTML, and the self-contained page."""

import base64
import dataclasses
import struct
from collections.abc import Iterable, Sequence
from html import escape
from importlib import resources
from typing import Any

from moe_jax.report.plots import DPI, fixed

DASH = "–"


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
    columns: Sequence[Column], rows: Iterable[Sequence[Any]], best: Sequence[int] = ()
) -> str:
    """A sortable table. Each row's highest value among the columns `best` is bold."""
    head = "".join(
        f'<th{_class("number" * c.is_number)}><button type="button">{escape(c.title)}</button></th>'
        for c in columns
    )
    body = []
    for row in rows:
        values = [row[i] for i in best if row[i] is not None]
        top = max(values) if len(values) > 1 and max(values) > min(values) else None
        cells = []
        for i, (column, value) in enumerate(zip(columns, row, strict=True)):
            names = ["number"] * column.is_number + ["wide"] * column.wide
            names += ["best"] * (top is not None and i in best and value == top)
            key = "" if value is None else escape(str(value))
            cells.append(
                f'<td{_class(*names)} data-value="{key}">{escape(column.show(value))}</td>'
            )
        body.append(f"<tr>{''.join(cells)}</tr>")
    return (
        f'<div class="scroll"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div>"
    )


def figure(png: bytes, alt: str, caption: str = "") -> str:
    """An embedded PNG at its natural size (96 CSS pixels per inch)."""
    width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk, which is always first
    scale = 96 / DPI
    data = base64.b64encode(png).decode()
    note = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return (
        f'<figure><img alt="{escape(alt)}" width="{width * scale:.0f}" '
        f'height="{height * scale:.0f}" src="data:image/png;base64,{data}">{note}</figure>'
    )


def pair(*figures: str) -> str:
    """Figures side by side if there is room."""
    return f'<div class="pair">{"".join(figures)}</div>'


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


def page(title: str, subtitle: str, sections: dict[str, tuple[str, str]]) -> str:
    """The whole page of {id: (title, content)}; style and script are inline."""
    files = resources.files("moe_jax.report")
    style, script = (files.joinpath(n).read_text("utf-8") for n in ("style.css", "page.js"))
    links = "".join(f'<a href="#{name}">{escape(t)}</a>' for name, (t, _) in sections.items())
    body = "".join(section(name, t, content) for name, (t, content) in sections.items())
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title>\n<style>\n{style}</style></head>\n<body>"
        f'<header><h1>{escape(title)}</h1><p class="soft">{escape(subtitle)}</p>'
        f"<nav>{links}</nav></header>\n{body}\n<script>\n{script}</script></body></html>\n"
    )


def _class(*names: str) -> str:
    text = " ".join(name for name in names if name)
    return f' class="{text}"' if text else ""
