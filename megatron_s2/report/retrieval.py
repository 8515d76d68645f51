"""Needles found by several patterns: a table, and a heat map of length and depth for each pattern."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from megatron_s2.report.figure import Colour, draw_title, new_figure, save_figure
from megatron_s2.report.table import aligned

# Log-probability, in nats per token, at which the colours of the heat map end.
_LOWEST = -4.0
_CELL, _GAP, _LEFT, _TOP, _BOTTOM = 0.42, 0.35, 0.75, 1.0, 0.35


class Asked(NamedTuple):
    """One needle and what a pattern made of it.

    Args:
        pattern: name of the pattern.
        kind: kind of the needle.
        length: tokens of the text.
        depth: place of the needle, as a share of the text.
        found: whether greedy decoding gives the answer.
        log_prob: mean log-probability of the tokens of the answer, in nats.
    """

    pattern: str
    kind: str
    length: int
    depth: float
    found: bool
    log_prob: float


def retrieval_table(asked: Sequence[Asked], kept: dict[str, float]) -> str:
    """Returns a table with a line for each pattern: needles found, of each kind and of all, and the mean
    log-probability of their answers.

    Args:
        kept: share of the keys and values that the last token sees, by pattern.
    """
    kinds = list(dict.fromkeys(needle.kind for needle in asked))
    rows = [("pattern", "keys and values", *kinds, "found", "log-probability")]
    for name, share in kept.items():
        needles = [needle for needle in asked if needle.pattern == name]
        of_kinds = ([needle for needle in needles if needle.kind == kind] for kind in kinds)
        log_prob = sum(needle.log_prob for needle in needles) / len(needles)
        rows.append((name, f"{share:.1%}", *map(_found, of_kinds), _found(needles), f"{log_prob:.3f}"))
    return "\n".join(aligned(rows))


def _found(needles: Sequence[Asked]) -> str:
    return f"{sum(needle.found for needle in needles)} of {len(needles)}"


def draw_retrieval(asked: Sequence[Asked], path: str | Path) -> None:
    """Draws a heat map for each pattern: columns are depths, rows lengths, colours mean log-probabilities of
    answers; each cell says how many needles were found.

    Raises:
        ValueError: `path` has another suffix than PNG or SVG.
        ImportError: matplotlib is not installed.
    """
    import numpy as np

    names = _distinct(needle.pattern for needle in asked)
    depths = sorted({needle.depth for needle in asked})
    lengths = sorted({needle.length for needle in asked})
    panel_width, panel_height = len(depths) * _CELL, len(lengths) * _CELL
    width = max(6.0, _LEFT + panel_width + 0.3)
    height = _TOP + len(names) * (panel_height + _GAP) + _BOTTOM
    figure = new_figure(width, height)
    for index, name in enumerate(names):
        bottom = height - _TOP - index * (panel_height + _GAP) - panel_height
        axes = figure.add_axes((_LEFT / width, bottom / height, panel_width / width, panel_height / height))
        values = np.full((len(lengths), len(depths)), np.nan)
        for row, length in enumerate(lengths):
            for column, depth in enumerate(depths):
                cell = [n for n in asked if (n.pattern, n.length, n.depth) == (name, length, depth)]
                if not cell:
                    continue
                values[row, column] = sum(n.log_prob for n in cell) / len(cell)
                dark = values[row, column] < 0.6 * _LOWEST
                text = f"{sum(n.found for n in cell)}/{len(cell)}"
                colour = "white" if dark else Colour.NAVY
                axes.text(column, row, text, ha="center", va="center", fontsize=7.5, color=colour)
        image = axes.imshow(values, cmap=_colours(), vmin=_LOWEST, vmax=0, aspect="auto")
        axes.set_title(name, fontsize=9, loc="left", pad=3)
        axes.set_yticks(range(len(lengths)), [str(length) for length in lengths], fontsize=8)
        is_last = index == len(names) - 1
        axes.set_xticks(range(len(depths)), [f"{depth:g}" for depth in depths] if is_last else [], fontsize=8)
        for edge in range(1, len(depths)):
            axes.axvline(edge - 0.5, color="white", linewidth=0.8)
        for edge in range(1, len(lengths)):
            axes.axhline(edge - 0.5, color="white", linewidth=0.8)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    axes.set_xlabel("depth of the needle", fontsize=8)
    draw_title(figure, "Needles found, and log-probability of their answers", 0.2, 0.15)
    bar_axes = figure.add_axes((0.35 / width, 1 - 0.52 / height, 2.2 / width, 0.1 / height))
    bar = figure.colorbar(image, cax=bar_axes, orientation="horizontal", ticks=[_LOWEST, _LOWEST / 2, 0])
    bar.ax.set_xticklabels([f"≤ {_LOWEST:g}", f"{_LOWEST / 2:g}", "0 nats"], fontsize=7.5)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    save_figure(figure, path)


def _distinct[T](values: Iterable[T]) -> list[T]:
    return list(dict.fromkeys(values))


def _colours():
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("log-probability", [Colour.RED, Colour.ORANGE, "#d5ead9"])
