"""Figures as data: each function returns what figures.js draws, as values for JSON."""

import base64
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

MOST_POINTS = 300  # of a curve
MOST_FRAMES = 16  # of a slider


def heatmap(
    frames: Mapping[str, np.ndarray],
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    title: str,
    what: str,
    low: float = 0.0,
    high: float = 1.0,
    short: Sequence[str] = (),
    blocks: Sequence[str] = (),
    groups: Sequence[Sequence[str]] = (),
    links: Sequence[str] = (),
    orders: Mapping[str, Sequence[int]] | None = None,
    marks: Sequence[int] = (),
    notes: Mapping[int, str] | None = None,
    given: str = "as given",
    slider: str = "",
    sortable: bool = False,
    square: bool = False,
) -> dict[str, Any]:
    """A matrix of coloured cells.

    Args:
        frames: {label: values [R, C]}; several are shown by a slider, the last one first. NaN is
            drawn as not measured.
        rows, columns: R and C names.
        what: the noun before a value where the pointer is.
        low, high: the range of values. If `low` is below 0, so are some of the values: they have
            another colour. Else the colour begins at `low`.
        short: C short names above the columns.
        blocks: names of equally many neighbouring columns each.
        groups: for each level of the ontology, R names.
        links: for each row, the place it links to, or ''.
        orders: {name: rank [R]} to sort rows by.
        marks: cells with a dot; a cell is its index in row-major order.
        notes: {cell: a further line where the pointer is}.
        given: the name of the order of `rows`.
        slider: what the slider is called.
        sortable: has a menu of orders.
        square: has as many rows as columns: small cells without numbers above.
    """
    return {
        "kind": "heatmap",
        "title": title,
        "what": what,
        "low": low,
        "high": high,
        "rows": list(rows),
        "columns": list(columns),
        "short": list(short) or [""] * len(columns),
        "blocks": list(blocks),
        "groups": [list(group) for group in groups],
        "links": list(links) or [""] * len(rows),
        "orders": {name: [int(r) for r in rank] for name, rank in (orders or {}).items()},
        "marks": [int(i) for i in marks],
        "notes": {str(i): note for i, note in (notes or {}).items()},
        "given": given,
        "slider": slider,
        "sortable": sortable,
        "square": square,
        "frames": [
            {"label": label, "values": packed(value_RxC, low, high)}
            for label, value_RxC in frames.items()
        ],
    }


def packed(values: np.ndarray, low: float, high: float) -> str:
    """Floats in [low, high] as base64 of uint16, little-endian; NaN becomes 65535.

    The error is below (high - low) / 100,000.
    """
    values = np.asarray(values, np.float64)
    scaled = np.round((np.clip(values, low, high) - low) / (high - low) * 65534)
    whole = np.where(np.isnan(values), 65535, scaled).astype("<u2")
    return base64.b64encode(whole.tobytes()).decode()


def dots(
    rows: Sequence[str],
    series: Mapping[str, Sequence[float | None]],
    *,
    title: str,
    intervals: Mapping[str, Sequence[Sequence[float] | None]] | None = None,
    links: Sequence[str] = (),
) -> dict[str, Any]:
    """A row for each name, a dot for each series, and a bar for its range if there is one.

    The axis reaches at least from 0 to 1.

    Args:
        series: {name: R values or None}.
        intervals: {name: R pairs or None}.
    """
    drawn = []
    for name, values in series.items():
        pairs = [pair or (None, None) for pair in (intervals or {}).get(name, [])]
        low, high = ([pair[i] for pair in pairs] for i in range(2))
        drawn.append({"name": name, "values": list(values), "low": low, "high": high})
    return {
        "kind": "dots",
        "title": title,
        "rows": list(rows),
        "links": list(links) or [""] * len(rows),
        "series": drawn,
    }


def lines(
    curves: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, title: str
) -> dict[str, Any]:
    """A curve for each name of (x, y); long ones are means of neighbouring points. An empty one
    only takes its colour."""
    series = []
    for name, (x, y) in curves.items():
        parts = np.array_split(np.arange(len(x)), min(len(x), MOST_POINTS)) if len(x) else []
        means = [[float(np.mean(np.take(v, part))) for part in parts] for v in (x, y)]
        series.append({"name": name, "x": means[0], "y": means[1]})
    return {"kind": "lines", "title": title, "series": series}


def spread(items: Sequence[Any], most: int = MOST_FRAMES) -> list[Any]:
    """At most `most` of the items, evenly spaced, with the first and the last."""
    index = np.linspace(0, len(items) - 1, min(most, len(items)))
    return [items[round(i)] for i in index]
