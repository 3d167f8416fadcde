"""Figures of scores, losses and gains, and shared drawing functions.

Figures are `matplotlib.figure.Figure` objects (no pyplot, no global state) drawn with Agg. Sizes
grow with the number of tasks, so that every label stays legible.
"""

import functools
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath

DPI = 144
ROW = 0.165  # inches per task row: an 8 point label
SMALL, NORMAL = 8, 9.5
INK, FAINT = "#333333", "#bbbbbb"
# Okabe and Ito's palette, told apart by colour-blind readers.
PALETTE = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5C2E", "#999999"]
MARKERS = "osD^vPX*"
STYLE = {
    "font.family": "DejaVu Sans",
    "font.size": NORMAL,
    "text.parse_math": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.titlesize": NORMAL + 1,
    "axes.titlelocation": "left",
    "legend.frameon": False,
}


def styled(draw):
    """Decorator that applies the shared style to a drawing function."""

    @functools.wraps(draw)
    def wrapped(*args, **kwargs):
        with mpl.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapped


def png(figure: Figure) -> bytes:
    """The figure as PNG, cropped to what is drawn."""
    buffer = io.BytesIO()
    with warnings.catch_warnings(), mpl.rc_context(STYLE):
        # If the font lacks a script, labels show boxes, but the report is still written.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, dpi=DPI, bbox_inches="tight", pad_inches=0.08, facecolor="white")
    return buffer.getvalue()


def canvas(width: float, height: float) -> tuple[Figure, Axes]:
    """A figure whose only axes are `width` x `height` inches; labels lie outside."""
    figure = Figure(figsize=(width, height))
    return figure, figure.add_axes((0, 0, 1, 1))


@functools.cache
def text_width(text: str, size: float = SMALL, weight: str = "normal") -> float:
    """Width of a label in inches."""
    if not text.strip():
        return 0.0
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        path = TextPath((0, 0), text, size=size, prop={"weight": weight})
    return path.get_extents().width / 72


def colour(index: int, count: int = 0) -> str:
    """Colour of item `index` of `count`: of a wider palette if there are more than 8."""
    if count > len(PALETTE):
        return mpl.colors.to_hex(mpl.colormaps["tab20"](index % 20))
    return PALETTE[index % len(PALETTE)]


def fixed(value: float, digits: int) -> str:
    """`value` with `digits` decimals, without a minus sign at 0."""
    return f"{round(value, digits) + 0.0:.{digits}f}"


def short(label: str, limit: int = 48) -> str:
    return label if len(label) <= limit else label[: limit - 1] + "…"


def spans(labels: Sequence) -> list[tuple[int, int]]:
    """Runs of equal neighbours as (start, stop)."""
    cuts = [i for i in range(1, len(labels)) if labels[i] != labels[i - 1]]
    return list(zip([0, *cuts], [*cuts, len(labels)], strict=True)) if len(labels) else []


def task_rows(
    axes: Axes,
    tasks: Sequence[str],
    categories: Sequence[str],
    subcategories: Sequence[str] | None = None,
) -> None:
    """Labels rows 0..T-1: tasks on the left, sub- and categories on the right, separators."""
    axes.set_ylim(len(tasks) - 0.5, -0.5)
    axes.set_yticks(range(len(tasks)), [short(task) for task in tasks], fontsize=SMALL)
    axes.tick_params(axis="y", length=0)
    width = axes.figure.get_size_inches()[0] * axes.get_position().width
    right = 0.1
    pairs = list(zip(categories, subcategories or categories, strict=True))
    if subcategories is not None:
        for start, stop in spans(pairs):
            label = short(subcategories[start], 32)
            axes.text(
                1 + right / width,
                (start + stop - 1) / 2,
                label,
                transform=axes.get_yaxis_transform(),
                va="center",
                fontsize=SMALL,
            )
            if start and categories[start] == categories[start - 1]:
                axes.axhline(start - 0.5, color=FAINT, linewidth=0.5)
        right += max((text_width(short(s, 32)) for s in subcategories), default=0) + 0.15
    for start, stop in spans(categories):
        axes.text(
            1 + right / width,
            (start + stop - 1) / 2,
            short(categories[start], 32),
            transform=axes.get_yaxis_transform(),
            va="center",
            fontsize=SMALL + 1,
            fontweight="bold",
        )
        if start:
            axes.axhline(start - 0.5, color=INK, linewidth=1)


@styled
def scores(
    tasks: Sequence[str],
    categories: Sequence[str],
    subcategories: Sequence[str],
    score_by_run: Mapping[str, Sequence[float | None]],
    colours: Mapping[str, str],
) -> Figure:
    """A row per task, a dot per run."""
    figure, axes = canvas(6.5, max(1.2, ROW * len(tasks)))
    values = np.array([[np.nan if x is None else x for x in row] for row in score_by_run.values()])
    known = np.isfinite(values).any(0)
    axes.hlines(
        np.flatnonzero(known),
        np.nanmin(values[:, known], 0),
        np.nanmax(values[:, known], 0),
        color=FAINT,
        linewidth=1.2,
        zorder=1,
    )
    handles = [
        axes.scatter(
            row,
            range(len(tasks)),
            s=20,
            marker=MARKERS[i % 8],
            color=colours[run],
            alpha=0.9,
            linewidths=0,
            zorder=2,
        )
        for i, (run, row) in enumerate(zip(score_by_run, values, strict=True))
    ]
    task_rows(axes, tasks, categories, subcategories)
    low, high = np.nanmin(values), np.nanmax(values)
    axes.set_xlim(min(-0.02, low - 0.03), max(1.02, high + 0.03))
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.set_xlabel("score")
    tall = len(tasks) > 40
    axes.tick_params(axis="x", labeltop=tall, top=tall)
    _legend_above(figure, axes, handles, list(score_by_run), 0.25 if tall else 0.04)
    return figure


@styled
def category_means(
    categories: Sequence[str],
    mean_by_run: Mapping[str, Sequence[float]],
    colours: Mapping[str, str],
) -> Figure:
    """Grouped bars: a group per category, a bar per run."""
    runs = len(mean_by_run)
    group = min(0.3 + 0.28 * runs, 12 / len(categories))
    figure, axes = canvas(max(4.5, len(categories) * group), 2.6)
    x = np.arange(len(categories))
    width = 0.8 / runs
    handles = []
    for i, (run, means) in enumerate(mean_by_run.items()):
        bars = axes.bar(x + (i - (runs - 1) / 2) * width, means, width * 0.92, color=colours[run])
        if runs * len(categories) <= 40:
            axes.bar_label(bars, fmt="%.2f", fontsize=SMALL - 0.5, padding=1)
        handles.append(bars)
    axes.axhline(0, color=INK, linewidth=0.8)
    rotated = any(text_width(c, NORMAL) > group for c in categories)
    axes.set_xticks(
        x,
        [short(c, 28) for c in categories],
        rotation=35 if rotated else 0,
        ha="right" if rotated else "center",
    )
    axes.tick_params(axis="x", length=0)
    axes.set_ylabel("mean score")
    axes.margins(y=0.12)
    _legend_above(figure, axes, handles, list(mean_by_run))
    return figure


@styled
def losses(
    curves: Mapping[str, Mapping[str, tuple[Sequence[int], Sequence[float]]]],
    colours: Mapping[str, str],
) -> Figure:
    """One panel per quantity ({quantity: {run: (steps, values)}}), a line per run."""
    columns = min(2, len(curves))
    rows = math.ceil(len(curves) / columns)
    figure = Figure(figsize=(5.3 * columns, 3.1 * rows))
    grid = figure.subplots(
        rows, columns, squeeze=False, gridspec_kw={"wspace": 0.25, "hspace": 0.45}
    ).ravel()
    handles: dict[str, Any] = {}
    for axes, (quantity, runs) in zip(grid, curves.items(), strict=False):
        for run, (steps, values) in runs.items():
            steps, values = np.asarray(steps), np.asarray(values, np.float64)
            many = len(values) > 60
            if many:
                axes.plot(steps, values, color=colours[run], alpha=0.2, linewidth=0.8)
                values = smooth(values, len(values) // 30)
            (handles[run],) = axes.plot(
                steps,
                values,
                color=colours[run],
                linewidth=1.6,
                marker=None if many or len(values) > 20 else "o",
                markersize=3.5,
            )
        axes.set_title(quantity)
        axes.set_xlabel("step")
        axes.grid(color="#eeeeee")
    for axes in grid[len(curves) :]:
        axes.set_visible(False)
    figure.legend(
        list(handles.values()),
        list(handles),
        loc="lower center",
        bbox_to_anchor=(0.5, 0.96),
        ncols=min(6, len(handles)),
    )
    return figure


def smooth(values: np.ndarray, width: int) -> np.ndarray:
    """Centred running mean over `width` values (made odd), over fewer at the ends."""
    half = width // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    index = np.arange(len(values))
    low, high = np.maximum(index - half, 0), np.minimum(index + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


@styled
def gains(
    tasks: Sequence[str],
    gain_by_start: Mapping[str, Sequence[float]],
    total_by_start: Mapping[str, tuple[float, Sequence[float] | None]],
    colours: Mapping[str, str],
) -> Figure:
    """A row per task with its relative gains, and below it each start's ARG and interval."""
    rows = len(tasks) + len(total_by_start)
    figure, axes = canvas(6.5, max(1.2, 1.35 * ROW * rows))
    handles = []
    for i, (start, values) in enumerate(gain_by_start.items()):
        row = len(tasks) + i
        arg, ci95 = total_by_start[start]
        marker, paint = MARKERS[i % 8], colours[start]
        handles.append(
            axes.scatter(
                100 * np.asarray(values),
                range(len(tasks)),
                s=24,
                marker=marker,
                color=paint,
                alpha=0.9,
                linewidths=0,
                zorder=3,
            )
        )
        if ci95 is not None:
            axes.hlines(row, 100 * ci95[0], 100 * ci95[1], color=paint, linewidth=2.5, zorder=2)
        axes.scatter([100 * arg], [row], s=46, marker=marker, color=paint, zorder=3)
    axes.axvline(0, color=INK, linewidth=1, zorder=1)
    axes.axhline(len(tasks) - 0.5, color=INK, linewidth=1)
    labels = [short(task) for task in tasks] + [f"ARG {start}" for start in total_by_start]
    axes.set_yticks(range(rows), labels, fontsize=SMALL + 0.5)
    for label in axes.get_yticklabels()[len(tasks) :]:
        label.set_fontweight("bold")
    axes.tick_params(axis="y", length=0)
    axes.set_ylim(rows - 0.5, -0.5)
    axes.grid(axis="x", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.set_xlabel("relative gain over direct fine-tuning, %")
    largest = max((abs(x) for row in gain_by_start.values() for x in row), default=0)
    if largest > 5:  # 500 %: otherwise one tiny baseline would hide the others
        axes.set_xscale("symlog", linthresh=100)
        axes.xaxis.set_major_formatter("{x:g}")
    _legend_above(figure, axes, handles, list(gain_by_start))
    return figure


def _legend_above(
    figure: Figure, axes: Axes, handles: list, labels: list[str], gap: float = 0.04
) -> None:
    height = figure.get_size_inches()[1] * axes.get_position().height
    axes.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(0, 1 + gap / height),
        borderaxespad=0,
        ncols=min(6, len(labels)),
        handletextpad=0.3,
        columnspacing=1.2,
    )
