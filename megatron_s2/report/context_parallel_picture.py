"""Pictures of context parallelism: the keys that a rank receives, and plans over the number of ranks.

Needs matplotlib (the extra `megatron-s2[plot]`), imported when the first picture is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from megatron_s2.parallel.cost import SCHEDULES, AttentionCall, exchange_bytes, plan_heads
from megatron_s2.parallel.layout import Zigzag
from megatron_s2.parallel.planner import ModelPlan
from megatron_s2.pattern import S2Pattern
from megatron_s2.report.figure import Colour, draw_cells, draw_legend, draw_title, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_RANK_COLOURS = (
    Colour.BLUE,
    Colour.ORANGE,
    Colour.GREEN,
    Colour.PURPLE,
    "#c9a227",
    Colour.RED,
    Colour.NAVY,
    Colour.GREY,
)
_LINES = {
    "gather": (Colour.NAVY, "-", "gather (shards, halos)"),
    "a2a": (Colour.ORANGE, "-", "a2a (heads)"),
    "ring": (Colour.GREEN, "--", "ring"),
    "all_gather": (Colour.GREY, ":", "all_gather (everything)"),
}
_HALO_HATCH = "/////"


def draw_exchange(
    pattern: S2Pattern, path: str | Path | None = None, ranks: int = 4, rank: int = 1, chunk_blocks: int = 8
) -> Figure:
    """Draws the keys and values that one rank receives in each schedule, coloured by the sending rank, and
    returns the figure. There is one query head per KV head.

    Args:
        path: PNG or SVG file to write, by its suffix; None to write no file.
        chunk_blocks: blocks per chunk.

    Raises:
        ValueError: another suffix, more ranks than KV heads or than colours, or `rank` is not below `ranks`.
        ImportError: matplotlib is not installed.
    """
    limit = min(pattern.num_kv_heads, len(_RANK_COLOURS))
    if not 1 <= ranks <= limit:
        raise ValueError(f"ranks {ranks}: must be between 1 and {limit}")
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank}: must be between 0 and {ranks - 1}")
    heads, blocks = pattern.num_kv_heads, 2 * ranks * chunk_blocks
    zigzag = Zigzag(ranks, blocks)
    owner = zigzag.owner(np.arange(blocks))
    call = AttentionCall(ranks, blocks * pattern.block_size, 1, heads, 1, 1, 1)
    strips = [("", ["held by"], owner[None], None)]
    for schedule, title in (
        ("gather", "gather: shards and halos come"),
        ("a2a", "a2a: whole heads come, with their queries"),
        ("all_gather", "ring, all_gather: everything comes"),
    ):
        held, halo = _keys_held(schedule, pattern, call, zigzag, rank)
        received = exchange_bytes(schedule, pattern, call, rank).forward_received / (2 * heads * call.tokens)
        if schedule == "a2a":
            received = (held.sum() - 2 * chunk_blocks * held.any(1).sum()) / held.size
        text = f"{title} ({received:.0%} of keys and values received)"
        strips.append((text, [f"KV head {g}" for g in range(heads)], np.where(held, owner, -1), halo))
    figure = _draw_strips(strips, zigzag, rank)
    if path is not None:
        save_figure(figure, path)
    return figure


def _keys_held(
    schedule: str, pattern: S2Pattern, call: AttentionCall, zigzag: Zigzag, rank: int
) -> tuple[np.ndarray, np.ndarray | None]:
    """`[heads, blocks]`: the key blocks that a rank attends to, and which of them are halo."""
    heads, blocks = pattern.num_kv_heads, zigzag.tokens
    if schedule == "all_gather":
        return np.ones((heads, blocks), dtype=bool), None
    held = np.zeros((heads, blocks), dtype=bool)
    if schedule == "a2a":
        held[plan_heads(pattern, call).kv_heads(rank)] = True
        return held, None
    halo = np.zeros_like(held)
    for start, stop in zigzag.chunks(rank):
        held[:, start:stop] = True
        halo[:, pattern.window_start(start * pattern.block_size) // pattern.block_size : start] = True
    for g in range(heads):
        held[g, [pattern.shard_block(g, n) for n in range(pattern.shard_prefix(g, blocks - 1))]] = True
    halo[:, zigzag.positions(rank)] = False
    return held | halo, halo


def _draw_strips(strips: list, zigzag: Zigzag, rank: int) -> Figure:
    from matplotlib.patches import Patch

    row, gap, left, width = 0.2, 0.42, 0.95, 9.2
    height = sum(row * len(names) + gap for _, names, _, _ in strips) + 0.85
    figure = new_figure(width, height)
    top = height - 0.36
    heading = f"The keys that rank {rank} of {zigzag.ranks} attends to, by who sends them"
    draw_title(figure, heading, left, 0.1)
    for title, names, cells, halo in strips:
        top -= gap
        size = row * len(names)
        axes = figure.add_axes((left / width, (top - size) / height, 1 - (left + 0.2) / width, size / height))
        _draw_strip(axes, names, cells, halo, zigzag, rank)
        if title:
            axes.set_title(title, fontsize=9.5, loc="left", pad=3)
        else:
            _label_chunks(axes, zigzag)
        top -= size
    patches = [Patch(facecolor=_RANK_COLOURS[r], label=f"from rank {r}") for r in range(zigzag.ranks)]
    patches[rank].set_label(f"its own (rank {rank})")
    patches.append(Patch(facecolor="white", edgecolor=Colour.NAVY, hatch=_HALO_HATCH, label="halo"))
    patches.append(Patch(facecolor=Colour.PALE, label="not needed here"))
    draw_legend(figure, patches, left, 0.08, columnspacing=1.3)
    return figure


def _draw_strip(
    axes: Axes, names: list[str], cells: np.ndarray, halo: np.ndarray | None, zigzag: Zigzag, rank: int
) -> None:
    from matplotlib.patches import Rectangle

    draw_cells(axes, cells, [Colour.PALE, *_RANK_COLOURS[: zigzag.ranks]], grid=0.6, aspect="auto")
    axes.set_yticks(range(len(cells)), names, fontsize=8)
    axes.set_xticks([])
    for start, stop in zigzag.chunks(rank):
        corner, size = (start - 0.5, -0.5), (stop - start, len(cells))
        axes.add_patch(Rectangle(corner, *size, fill=False, edgecolor=Colour.NAVY, linewidth=1.6))
    if halo is not None:
        for g, block in zip(*np.nonzero(halo)):
            axes.add_patch(
                Rectangle(
                    (block - 0.5, g - 0.5), 1, 1, fill=False, edgecolor="white", hatch=_HALO_HATCH, lw=0
                )
            )


def _label_chunks(axes: Axes, zigzag: Zigzag) -> None:
    for chunk in range(2 * zigzag.ranks):
        owner = int(zigzag.owner(chunk * zigzag.chunk))
        axes.text(
            (chunk + 0.5) * zigzag.chunk - 0.5,
            -0.75,
            f"chunk {chunk}: rank {owner}",
            fontsize=8,
            ha="center",
            va="bottom",
        )


def plan_sizes(largest: int, seq_length: int) -> list[int]:
    """The context-parallel sizes to draw: `largest`, and the smaller powers of two that fit the sequence.

    Raises:
        ValueError: `largest` is 1; a single rank exchanges nothing.
    """
    if largest < 2:
        raise ValueError(f"--context-parallel-size {largest}: must be at least 2 with --plot")
    powers = [1 << n for n in range(1, largest.bit_length()) if 1 << n < largest]
    return [*(size for size in powers if seq_length % (2 * size) == 0), largest]


def draw_plans(plans: Sequence[ModelPlan], path: str | Path | None = None) -> Figure:
    """Draws bytes and predicted time of every schedule over the number of ranks, and returns the figure.

    Args:
        plans: one plan for each number of ranks.
        path: PNG or SVG file to write, by its suffix; None to write no file.

    Raises:
        ValueError: another suffix.
        ImportError: matplotlib is not installed.
    """
    figure = new_figure(9.6, 4.3)
    from matplotlib.ticker import LogLocator

    sizes = [plan.call.ranks for plan in plans]
    panels = (
        ("received by a rank, forward, mean of the layers (MiB)", 2**20, _received_per_layer),
        ("attention of all layers, forward and backward, predicted (ms)", 1e-3, ModelPlan.seconds),
    )
    for axes, (title, unit, value_of) in zip(figure.subplots(1, 2), panels):
        for schedule in SCHEDULES:
            values = (value_of(plan, schedule) for plan in plans)
            colour, style, label = _LINES[schedule]
            heights = [math.nan if value is None else value / unit for value in values]
            axes.plot(sizes, heights, style, color=colour, label=label, marker="o", markersize=3.5)
        axes.set_title(title, fontsize=9.5, loc="left")
        axes.set_xscale("log", base=2)
        axes.set_yscale("log")
        axes.set_xticks(sizes, [str(size) for size in sizes], fontsize=8)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.tick_params(axis="y", labelsize=8)
        axes.minorticks_off()
        axes.set_xlabel("context-parallel ranks", fontsize=9)
        axes.grid(color=Colour.PALE)
        axes.spines[["top", "right"]].set_visible(False)
    title = f"{plans[-1].call.tokens} tokens, {plans[-1].settings.describe()}"
    figure.suptitle(title, fontsize=11, weight="bold")
    lines = figure.axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc="lower center", ncols=4, frameon=False, fontsize=9)
    figure.subplots_adjust(left=0.07, right=0.98, top=0.84, bottom=0.22, wspace=0.16)
    if path is not None:
        save_figure(figure, path)
    return figure


def _received_per_layer(plan: ModelPlan, schedule: str) -> float | None:
    groups = [(len(group.layers), group.plan.schedules[schedule]) for group in plan.groups]
    if any(one is None for _, one in groups):
        return None
    return sum(layers * one.received_forward.most for layers, one in groups) / plan.settings.num_layers
