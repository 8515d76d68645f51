"""Pictures of timelines: one panel each, one row per queue, all to the same scale.

Needs matplotlib (the extra `megatron-s2[plot]`), imported when the first picture is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_s2.offload.trace import QUEUE_NAMES, QUEUES, Event, bottleneck
from megatron_s2.report.pattern_picture import new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOURS = {
    "update": "#5b9bd5",
    "state": "#f28c28",
    "weights": "#3c9d6b",
    "gradients": "#b05bb5",
    "backward": "#c9d3df",
}
_OTHER = "#8a8a8a"
_ROW, _TITLE, _WIDTH, _LEFT, _RIGHT = 0.19, 0.4, 9.6, 1.05, 0.15  # inches
_LABELS = {"state": "state", "update": "update", "weights": "16-bit weights", "gradients": "gradients"}
_NARROWEST_EDGED = 250  # to the width of the picture; in more, edges would hide the events

_SEAM = 1e-6  # of a bar's width, between bars that touch


def draw_timelines(
    timelines: Mapping[str, Sequence[Event]],
    path: str | Path,
    title: str | None = None,
    captions: Mapping[str, str] | None = None,
) -> None:
    """Draw timelines below one another to a PNG or an SVG by its suffix.

    Args:
        captions: behind a timeline's name; which queue is busiest where there is none.

    Raises:
        ValueError: another suffix, or no events.
        ImportError: matplotlib is not installed.
    """
    save_figure(timelines_figure(timelines, title, captions), path)


def timelines_figure(
    timelines: Mapping[str, Sequence[Event]],
    title: str | None = None,
    captions: Mapping[str, str] | None = None,
) -> Figure:
    """The figure that `draw_timelines` writes."""
    timelines = {name: events for name, events in timelines.items() if events}
    if not timelines:
        raise ValueError("there are no events to draw")
    rows = {
        name: [queue for queue in QUEUES if any(event.queue == queue for event in events)]
        for name, events in timelines.items()
    }
    top = 0.26 if title else 0.0
    height = top + sum(_TITLE + _ROW * len(queues) for queues in rows.values()) + 0.72
    figure = new_figure(_WIDTH, height)
    if title:
        figure.text(_LEFT / _WIDTH, 1 - 0.12 / height, title, fontsize=11.5, weight="bold", va="top")
    longest = max(event.end for events in timelines.values() for event in events)
    y = height - top
    for name, events in timelines.items():
        y -= _TITLE + _ROW * len(rows[name])
        axes = figure.add_axes(
            (
                _LEFT / _WIDTH,
                y / height,
                1 - (_LEFT + _RIGHT) / _WIDTH,
                _ROW * len(rows[name]) / height,
            )
        )
        _draw_panel(axes, events, rows[name], longest)
        axes.set_xlim(0, longest)
        axes.set_title(
            f"{name}: {(captions or {}).get(name) or bottleneck(events)}", fontsize=9.5, loc="left", pad=3
        )
        if name == list(timelines)[-1]:
            axes.set_xlabel("seconds", fontsize=9)
        else:
            axes.tick_params(labelbottom=False)
    _draw_legend(figure, timelines)
    return figure


def kind_of(event: Event) -> str:
    """What an event is about, without its subgroup."""
    return event.name.split(maxsplit=1)[0] if event.name else ""


def _draw_panel(axes: Axes, events: Sequence[Event], queues: list[str], longest: float) -> None:
    for row, queue in enumerate(queues):
        for kind in dict.fromkeys(kind_of(event) for event in events if event.queue == queue):
            bars = [
                (event.start, event.end - event.start)
                for event in events
                if event.queue == queue and kind_of(event) == kind
            ]
            wide = sum(width for _, width in bars) / len(bars) * _NARROWEST_EDGED > longest
            edge = {"edgecolor": "white", "linewidth": 0.4} if wide else {"linewidth": 0}
            colour = _COLOURS.get(kind, _OTHER)
            # Not snapped to pixels: bars narrower than one would vanish or grow.
            axes.broken_barh(
                bars if wide else _joined(bars), (row - 0.42, 0.84), facecolor=colour, snap=False, **edge
            )
    axes.set_yticks(range(len(queues)), [QUEUE_NAMES[queue] for queue in queues], fontsize=8)
    axes.set_ylim(len(queues) - 0.5, -0.5)
    axes.tick_params(axis="x", labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.set_facecolor("#f5f7fa")
    axes.spines[:].set_visible(False)


def _joined(bars: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Bars (start, width) with those that touch made one, so that no seams are drawn between them."""
    joined: list[tuple[float, float]] = []
    for start, width in sorted(bars):
        if joined and start <= sum(joined[-1]) + _SEAM * width:
            start, width = joined[-1][0], start + width - joined[-1][0]
            joined.pop()
        joined.append((start, width))
    return joined


def _draw_legend(figure: Figure, timelines: Mapping[str, Sequence[Event]]) -> None:
    from matplotlib.patches import Patch

    kinds = {kind_of(event) for events in timelines.values() for event in events}
    shown = [kind for kind in _COLOURS if kind in kinds] + sorted(kinds - set(_COLOURS))
    figure.legend(
        handles=[
            Patch(facecolor=_COLOURS.get(kind, _OTHER), label=_LABELS.get(kind, kind)) for kind in shown
        ],
        loc="lower left",
        bbox_to_anchor=(_LEFT / _WIDTH, 0.08 / figure.get_figheight()),
        borderaxespad=0,
        borderpad=0,
        ncols=len(shown),
        frameon=False,
        fontsize=9,
        handlelength=1.2,
        columnspacing=1.4,
    )
