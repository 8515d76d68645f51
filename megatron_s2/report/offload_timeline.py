"""Pictures of timelines of the optimizer step: one panel each, one row per queue, all to the same scale.

Needs matplotlib (the extra `megatron-s2[plot]`), imported when the first picture is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_s2.offload.trace import QUEUE_NAMES, QUEUES, Event, bottleneck
from megatron_s2.report.figure import Colour, draw_legend, draw_title, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

_COLOURS = {
    "update": Colour.BLUE,
    "state": Colour.ORANGE,
    "weights": Colour.GREEN,
    "gradients": Colour.PURPLE,
    "backward": "#c9d3df",
}
_ROW, _TITLE, _WIDTH, _LEFT, _RIGHT = 0.19, 0.4, 9.6, 1.05, 0.15  # inches
_LABELS = {"state": "state", "update": "update", "weights": "16-bit weights", "gradients": "gradients"}
_MAX_EDGED_BARS = 250  # number of bars of mean width across the picture; edges would hide narrower bars
_SEAM = 1e-6  # largest gap between bars that touch, as a share of a bar's width


def draw_timelines(
    timelines: Mapping[str, Sequence[Event]],
    path: str | Path,
    title: str | None = None,
    captions: Mapping[str, str] | None = None,
) -> None:
    """Draws timelines below one another to `path`, a PNG or an SVG by its suffix.

    Args:
        captions: text behind the name of a timeline; by default its bottleneck.

    Raises:
        ValueError: another suffix, or there are no events.
        ImportError: matplotlib is not installed.
    """
    save_figure(timelines_figure(timelines, title, captions), path)


def timelines_figure(
    timelines: Mapping[str, Sequence[Event]],
    title: str | None = None,
    captions: Mapping[str, str] | None = None,
) -> Figure:
    """Returns the figure that `draw_timelines` writes."""
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
        draw_title(figure, title, _LEFT, 0.12)
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
    draw_legend(figure, _legend(timelines), _LEFT, 0.08)
    return figure


def kind_of(event: Event) -> str:
    """The kind of an event: its name without the subgroup."""
    return event.name.split(maxsplit=1)[0] if event.name else ""


def _draw_panel(axes: Axes, events: Sequence[Event], queues: list[str], longest: float) -> None:
    for row, queue in enumerate(queues):
        for kind in dict.fromkeys(kind_of(event) for event in events if event.queue == queue):
            bars = [
                (event.start, event.end - event.start)
                for event in events
                if event.queue == queue and kind_of(event) == kind
            ]
            wide = sum(width for _, width in bars) / len(bars) * _MAX_EDGED_BARS > longest
            edge = {"edgecolor": "white", "linewidth": 0.4} if wide else {"linewidth": 0}
            colour = _COLOURS.get(kind, Colour.GREY)
            # Snapping to pixels would make bars narrower than a pixel vanish or grow.
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
    """Joins bars (start, width) that touch, so that no seams are drawn between them."""
    joined: list[tuple[float, float]] = []
    for start, width in sorted(bars):
        if joined and start <= sum(joined[-1]) + _SEAM * width:
            start, width = joined[-1][0], start + width - joined[-1][0]
            joined.pop()
        joined.append((start, width))
    return joined


def _legend(timelines: Mapping[str, Sequence[Event]]) -> list[Patch]:
    from matplotlib.patches import Patch

    kinds = {kind_of(event) for events in timelines.values() for event in events}
    shown = [kind for kind in _COLOURS if kind in kinds] + sorted(kinds - set(_COLOURS))
    return [Patch(facecolor=_COLOURS.get(kind, Colour.GREY), label=_LABELS.get(kind, kind)) for kind in shown]
