"""Budgets against losses of patterns: a table and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_s2.report.figure import Colour, draw_title, new_figure, save_figure
from megatron_s2.report.table import aligned

_STYLES = (
    {"color": Colour.NAVY, "marker": "o"},
    {"color": Colour.ORANGE, "marker": "s"},
    {"color": Colour.GREEN, "marker": "^"},
    {"color": Colour.PURPLE, "marker": "D"},
)


class Point(NamedTuple):
    """A pattern, or one that is only predicted.

    Args:
        series: what the patterns of a curve have in common.
        name: the pattern.
        cost: share of dense attention.
        loss: loss over dense or divergence from dense, in nats per token.
        needles: loss of the needles' answers in nats per token; None if not known.
        found: share of needles found; None if not known.
    """

    series: str
    name: str
    cost: float
    loss: float
    needles: float | None = None
    found: float | None = None


def frontier_table(points: Sequence[Point]) -> str:
    """Returns a table with a line for each point, `loss` being the divergence from dense."""
    rows = [("", "pattern", "budget", "from dense", "needles' loss", "found")]
    for point in points:
        needles = "-" if point.needles is None else f"{point.needles:.3f}"
        found = "-" if point.found is None else f"{point.found:.0%}"
        rows.append((point.series, point.name, f"{point.cost:.3f}", f"{point.loss:.4f}", needles, found))
    return "\n".join(aligned(rows, left=(0, 1)))


def draw_frontier(points: Sequence[Point], path: str | Path, xlabel: str, ylabel: str) -> None:
    """Draws losses against costs, points named where they have names, else a curve for each series;
    where needles were asked for, a second panel with the share found. The series `dense` is a dotted line.

    Raises:
        ValueError: `path` has another suffix than PNG or SVG.
        ImportError: matplotlib is not installed.
    """
    has_needles = any(point.found is not None for point in points)
    figure = new_figure(10 if has_needles else 5.6, 4.2)
    panels = [figure.add_axes((0.075, 0.14, 0.40, 0.72)), figure.add_axes((0.56, 0.14, 0.40, 0.72))]
    if not has_needles:
        figure.delaxes(panels.pop())
        panels[0].set_position((0.14, 0.14, 0.82, 0.72))
    by_series: dict[str, list[Point]] = {}
    for point in sorted(points, key=lambda point: point.cost):
        by_series.setdefault(point.series, []).append(point)
    for point in by_series.pop("dense", []):
        panels[0].axhline(point.loss, color=Colour.GREY, linestyle=":", label="dense")
        if point.found is not None:
            panels[1].axhline(100 * point.found, color=Colour.GREY, linestyle=":", label="dense")
    labels: dict = {axes: [] for axes in panels}
    for (name, series), style in zip(by_series.items(), _STYLES * len(by_series)):
        asked = [point for point in series if point.found is not None]
        heights = [point.loss for point in series], [100 * point.found for point in asked]
        for axes, shown, values in zip(panels, (series, asked), heights):
            if not shown:
                continue
            is_curve = len(shown) > 1 and not any(point.name for point in shown)
            costs = [point.cost for point in shown]
            axes.plot(costs, values, linestyle="-" if is_curve else "none", label=name, **style)
            labels[axes] += [(point.cost, value, point.name) for point, value in zip(shown, values)]
    panels[0].set_ylabel(ylabel)
    if has_needles:
        panels[1].set_ylabel("needles found, %")
        panels[1].set_ylim(-4, 104)
    for axes in panels:
        axes.set_xlabel(xlabel)
        axes.set_xlim(0, 1.2 * max(point.cost for point in points if point.series != "dense"))
        _draw_labels(axes, labels[axes])
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    draw_title(figure, "What patterns cost", 0.2, 0.12)
    save_figure(figure, path)


def _draw_labels(axes, labels: Sequence[tuple[float, float, str]]) -> None:
    """Writes names beside their points; those of points that are close have one label."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    together: list[list[tuple[float, float, str]]] = []
    for x, y, name in sorted(labels):
        for others in together:
            if abs(x - others[0][0]) < 0.03 * (right - left) and abs(y - others[0][1]) < 0.03 * (
                top - bottom
            ):
                others.append((x, y, name))
                break
        else:
            together.append([(x, y, name)])
    for some in together:
        x, y, _ = some[-1]
        is_right = x > left + 0.7 * (right - left)
        place = {"xytext": (-5, 3) if is_right else (5, 3), "ha": "right" if is_right else "left"}
        turned = {"rotation": -25 if is_right else 25, "rotation_mode": "anchor"}
        names = ", ".join(dict.fromkeys(name for *_, name in some if name))
        axes.annotate(names, (x, y), textcoords="offset points", fontsize=7, **place, **turned)
