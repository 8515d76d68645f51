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
        loss: loss over dense in nats per token.
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
    """Returns a table with a line for each point."""
    rows = [("", "pattern", "budget", "loss over dense", "needles' loss", "found")]
    for point in points:
        needles = "-" if point.needles is None else f"{point.needles:.3f}"
        found = "-" if point.found is None else f"{point.found:.0%}"
        rows.append((point.series, point.name, f"{point.cost:.3f}", f"{point.loss:+.4f}", needles, found))
    return "\n".join(aligned(rows, left=(0, 1)))


def draw_frontier(points: Sequence[Point], path: str | Path, xlabel: str) -> None:
    """Draws loss over dense against cost, a curve for each series; where needles were asked for, a second
    panel with the share found.

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
    series = list(dict.fromkeys(point.series for point in points))
    for name, style in zip(series, _STYLES * len(series)):
        curve = sorted((p for p in points if p.series == name), key=lambda p: p.cost)
        line = "-" if len(curve) > 1 else ""
        panels[0].plot([p.cost for p in curve], [p.loss for p in curve], line, label=name, **style)
        asked = [p for p in curve if p.found is not None]
        if asked:
            panels[1].plot([p.cost for p in asked], [100 * p.found for p in asked], line, label=name, **style)
    panels[0].set_ylabel("loss over dense, nats per token")
    if has_needles:
        panels[1].set_ylabel("needles found, %")
        panels[1].set_ylim(-4, 104)
    for axes in panels:
        axes.set_xlabel(xlabel)
        axes.set_xlim(left=0)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        if axes.get_legend_handles_labels()[0]:
            axes.legend(fontsize=8, frameon=False)
    draw_title(figure, "What patterns cost", 0.2, 0.12)
    save_figure(figure, path)
