"""Figures of routes: the experts of each task, and their relation to human categories."""

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from scipy.cluster import hierarchy

from moe_jax.report import plots
from moe_jax.report.plots import FAINT, INK, NORMAL, ROW, SMALL, styled
from moe_jax.report.statistics import Agreement, Correlations


def category_colours(categories: Sequence[str]) -> dict[str, str]:
    names = list(dict.fromkeys(categories))
    return {name: plots.colour(i, len(names)) for i, name in enumerate(names)}


@styled
def heatmap(
    route_TxNxE: np.ndarray,
    layers: Sequence[str],
    tasks: Sequence[str],
    categories: Sequence[str],
    subcategories: Sequence[str],
) -> Figure:
    """Task x expert weights, rows in the given order; columns layer by layer."""
    figure, axes = plots.canvas(_columns_width(route_TxNxE.shape), max(1, ROW * len(tasks)))
    image = axes.imshow(
        route_TxNxE.reshape(len(tasks), -1),
        cmap="Blues",
        vmin=0,
        vmax=1,
        aspect="auto",
        interpolation="none",
    )
    plots.task_rows(axes, tasks, categories, subcategories)
    _layer_columns(axes, layers, route_TxNxE.shape[2])
    _colourbar(axes, image, "weight of the expert in the task's route")
    return figure


@styled
def clusters(
    similarity_TxT: np.ndarray,
    tree: np.ndarray,
    tasks: Sequence[str],
    categories: Sequence[str],
) -> Figure:
    """Similarity of routes with rows and columns in the tree's order, beside the tree."""
    height = max(1.5, ROW * len(tasks))
    width = float(np.clip(height, 4.0, 9.0))
    side, strip = 1.1, 0.14
    total = side + strip + 0.04 + width
    figure = Figure(figsize=(total, height))
    branches = figure.add_axes((0, 0, side / total, 1))
    colours = category_colours(categories)
    drawn = hierarchy.dendrogram(
        tree, ax=branches, orientation="left", no_labels=True, link_color_func=lambda _: INK
    )
    branches.invert_yaxis()  # row 0 on top, as in the heatmap
    branches.axis("off")
    for line in branches.collections:
        line.set_linewidth(0.8)
    order = drawn["leaves"]
    strips = figure.add_axes((side / total, 0, strip / total, 1))
    for row, task in enumerate(order):
        strips.axhspan(row - 0.5, row + 0.5, color=colours[categories[task]], linewidth=0)
    strips.set_ylim(len(order) - 0.5, -0.5)
    strips.axis("off")
    axes = figure.add_axes(((total - width) / total, 0, width / total, 1))
    image = axes.imshow(
        similarity_TxT[np.ix_(order, order)],
        cmap="Blues",
        vmin=float(similarity_TxT.min()),
        vmax=1,
        aspect="auto",
        interpolation="none",
    )
    axes.set_xticks([])
    axes.yaxis.tick_right()
    axes.set_yticks(range(len(order)), [plots.short(tasks[i]) for i in order], fontsize=SMALL)
    axes.tick_params(axis="y", length=0)
    axes.legend(
        handles=[Patch(color=paint, label=plots.short(c, 32)) for c, paint in colours.items()],
        loc="lower left",
        bbox_to_anchor=(0, 1 + 0.05 / height),
        borderaxespad=0,
        ncols=max(1, min(5, len(colours))),
        fontsize=SMALL + 1,
        handlelength=1,
    )
    _colourbar(axes, image, "cosine similarity of routes")
    return figure


@styled
def controls(agreements: dict[str, Agreement]) -> Figure:
    """For each level, the histogram of shuffled controls and the observed value."""
    figure = Figure(figsize=(3.6 * len(agreements), 2.1))
    panels = figure.subplots(1, len(agreements), squeeze=False)[0]
    for axes, (level, agreement) in zip(panels, agreements.items(), strict=True):
        axes.hist(agreement.control, bins=30, color=FAINT)
        axes.axvline(agreement.ami, color=plots.PALETTE[1], linewidth=2)
        side = "right" if agreement.ami > np.mean(axes.get_xlim()) else "left"
        axes.annotate(
            f"routes: {plots.fixed(agreement.ami, 2)}",
            (agreement.ami, 1),
            xycoords=("data", "axes fraction"),
            xytext=(-4 if side == "right" else 4, -4),
            textcoords="offset points",
            ha=side,
            va="top",
            color=plots.PALETTE[1],
        )
        axes.set_title(level)
        axes.set_xlabel("adjusted mutual information")
        axes.set_yticks([])
        axes.spines["left"].set_visible(False)
    panels[0].set_ylabel("shuffled controls")
    figure.subplots_adjust(wspace=0.15)
    return figure


@styled
def correlations(result: Correlations, layers: Sequence[str], level: float) -> Figure:
    """Category x expert correlations; a dot marks q <= level, grey was not tested."""
    count, (n, e, _) = len(result.categories), result.r_NxExC.shape
    figure, axes = plots.canvas(_columns_width((count, n, e)), max(0.5, 0.26 * count))
    r_CxF = result.r_NxExC.reshape(n * e, count).T
    axes.set_facecolor("#dddddd")
    image = axes.imshow(r_CxF, cmap="RdBu_r", vmin=-1, vmax=1, aspect="auto", interpolation="none")
    points = [(layer * e + expert, c) for layer, expert, c in result.significant(level)]
    if points:
        size = min(3.0, 0.5 * 72 * axes.figure.get_size_inches()[0] / (n * e))
        axes.scatter(*zip(*points, strict=True), s=size**2, color="black", linewidths=0)
    axes.set_yticks(
        range(count), [plots.short(c, 32) for c in result.categories], fontsize=SMALL + 1
    )
    axes.set_ylim(count - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    _layer_columns(axes, layers, e)
    _colourbar(axes, image, "point-biserial correlation")
    return figure


@styled
def usage(usage_NxE: np.ndarray, layers: Sequence[str]) -> Figure:
    """Mean weight of each expert over tasks, layer by layer."""
    n, e = usage_NxE.shape
    figure, axes = plots.canvas(max(1.6, 0.42 * n), max(0.6, 0.24 * e))
    highest = float(usage_NxE.max())
    image = axes.imshow(
        usage_NxE.T, cmap="Blues", vmin=0, vmax=highest, aspect="auto", interpolation="none"
    )
    for (layer, expert), value in np.ndenumerate(usage_NxE):
        axes.text(
            layer,
            expert,
            f"{value:.2f}",
            ha="center",
            va="center",
            fontsize=SMALL - 0.5,
            color="white" if value > 0.6 * highest else INK,
        )
    _layer_ticks(axes, layers)
    axes.set_yticks(range(e), [f"expert {i}" for i in range(e)], fontsize=SMALL)
    axes.tick_params(length=0)
    _colourbar(axes, image, f"mean weight (uniform is {1 / e:.2f})")
    return figure


@styled
def entropies(entropy_TxN: np.ndarray, information_N: np.ndarray, layers: Sequence[str]) -> Figure:
    """For each layer, the entropy of each task's route and its dependence on the task."""
    n = entropy_TxN.shape[1]
    figure, axes = plots.canvas(max(3.4, 0.42 * n), 2.3)
    offsets = np.linspace(-0.22, 0.22, len(entropy_TxN))
    for layer in range(n):
        dots = axes.scatter(
            layer + offsets,
            entropy_TxN[:, layer],
            s=7,
            color=plots.PALETTE[5],
            alpha=0.6,
            linewidths=0,
        )
    (mean,) = axes.plot(
        range(n), entropy_TxN.mean(0), color=plots.PALETTE[0], marker="o", markersize=4
    )
    (information,) = axes.plot(
        range(n), information_N, color=plots.PALETTE[1], marker="s", markersize=4
    )
    axes.set_ylim(-0.03, 1.05)
    axes.set_xlim(-0.6, n - 0.4)
    _layer_ticks(axes, layers)
    axes.grid(axis="y", color="#eeeeee")
    axes.set_axisbelow(True)
    axes.set_ylabel("share of log E")
    axes.legend(
        [dots, mean, information],
        ["entropy of one task's route", "mean entropy", "dependence on the task"],
        loc="lower left",
        bbox_to_anchor=(0, 1.02),
        borderaxespad=0,
        ncols=3,
        fontsize=SMALL + 1,
        handletextpad=0.4,
        columnspacing=1.2,
    )
    return figure


def _columns_width(shape: tuple[int, int, int]) -> float:
    columns = shape[1] * shape[2]
    return float(np.clip(0.22 * columns, 2.0, max(8.0, 0.045 * columns)))


def _layer_columns(axes: Axes, layers: Sequence[str], experts: int) -> None:
    """Labels columns layer.expert on top; separates layers, and encoder from decoder."""
    columns = len(layers) * experts
    axes.set_xlim(-0.5, columns - 0.5)
    for i in range(1, len(layers)):
        new_stack = _stack(layers[i]) != _stack(layers[i - 1])
        axes.axvline(
            i * experts - 0.5,
            color=INK if new_stack else FAINT,
            linewidth=1.4 if new_stack else 0.6,
        )
    column = axes.figure.get_size_inches()[0] * axes.get_position().width / columns
    if column >= 0.1:  # room for the experts' numbers
        labels = [str(e) for _ in layers for e in range(experts)]
        axes.set_xticks(range(columns), labels, fontsize=SMALL - 1)
        axes.set_xlabel("expert", fontsize=SMALL)
    else:
        axes.set_xticks([])
        axes.set_xlabel(f"experts 0 to {experts - 1} of each layer", fontsize=SMALL)
    axes.tick_params(axis="x", length=0, pad=1)
    rotate = column * experts < 0.06 + max(plots.text_width(layer) for layer in layers)
    for i, layer in enumerate(layers):
        axes.annotate(
            layer,
            ((i + 0.5) * experts - 0.5, 1),
            xycoords=("data", "axes fraction"),
            xytext=(0, 3),
            textcoords="offset points",
            fontsize=SMALL,
            ha="center",
            va="bottom",
            rotation=90 if rotate else 0,
        )


def _layer_ticks(axes: Axes, layers: Sequence[str]) -> None:
    axes.set_xticks(
        range(len(layers)), layers, rotation=60, ha="right", rotation_mode="anchor", fontsize=SMALL
    )
    axes.tick_params(axis="x", length=0)


def _stack(layer: str) -> str:
    return layer.rpartition(".")[0]


def _colourbar(axes: Axes, image, label: str) -> None:
    """A small horizontal bar below the left corner of the axes."""
    figure = axes.figure
    box, (width, height) = axes.get_position(), figure.get_size_inches()
    below = 0.34 if axes.get_xlabel() else 0.16
    if any(tick.get_text() for tick in axes.get_xticklabels()) and not axes.get_xlabel():
        below = 0.75
    bar = figure.add_axes(
        (box.x0, box.y0 - (below + 0.1) / height, min(1.8, box.width * width) / width, 0.1 / height)
    )
    figure.colorbar(image, cax=bar, orientation="horizontal")
    bar.tick_params(labelsize=SMALL - 0.5, length=2)
    bar.set_xlabel(label, fontsize=NORMAL - 1.5, loc="left", labelpad=1)
    bar.xaxis.get_label().set_x(0)
