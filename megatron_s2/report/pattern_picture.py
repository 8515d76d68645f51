"""Pictures of patterns: what each KV head of a layer sees, and what the heads see together; and how much each
head of a whole model sees.

Needs matplotlib (the extra `megatron-s2[plot]`), imported when the first picture is drawn.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from megatron_s2.pattern import BlockPattern, S2Pattern, S2Settings
from megatron_s2.pattern.block_pattern import dense_pairs
from megatron_s2.report.figure import Colour, draw_cells, draw_legend, draw_title, new_figure, save_figure

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

_MAX_HEAD_PANELS = 8
_MAX_GRID_BLOCKS = 64  # with more blocks the lines between them would hide them

# Inches.
_GAP = 0.14
_TITLED_GAP = 0.34
_LEFT, _RIGHT, _TOP, _BOTTOM = 0.62, 0.62, 0.82, 0.86
_BETWEEN_HEADS_AND_UNION = 0.5
_MODEL_RIGHT, _MODEL_BOTTOM = 1.25, 1.05  # beside and below the layers of a model


class _Kind(NamedTuple):
    """A kind of block, with its label and colour in the picture."""

    label: str
    colour: str


_UNSEEN = _Kind("not seen by this head", Colour.PALE)
_STRIDED = _Kind("strided", Colour.ORANGE)
_SINK = _Kind("sink", Colour.GREEN)
_WINDOW = _Kind("window", Colour.BLUE)
_DIAGONAL = _Kind("diagonal, causal inside", Colour.NAVY)
_SEEN = _Kind("seen", Colour.BLUE)
_KINDS = (_DIAGONAL, _WINDOW, _SEEN, _SINK, _STRIDED, _UNSEEN)  # in the order of the legend
_LOST = _Kind("seen by no head", Colour.RED)
_FUTURE_COLOUR = "#ffffff"
_FEW_TO_ALL_HEADS = ("#fbd5a0", "#7fb2dd", Colour.NAVY)


def draw_pattern(
    pattern: BlockPattern,
    path: str | Path | None = None,
    num_blocks: int = 32,
    title: str | None = None,
    num_layers: int = 1,
    head_name: str = "KV head",
) -> Figure:
    """Draws the first `num_blocks` blocks of `pattern`, and returns the figure.

    The picture has one panel per head (with more than eight heads, the first seven and the last), and one
    with the number of heads that see each block, counted over `num_layers` consecutive layers from
    the pattern's layer on.

    Args:
        path: PNG or SVG file to write, by its suffix; None to write no file.
        head_name: what a head of the pattern is: a KV head or a query head.

    Raises:
        ValueError: another suffix; `num_blocks` or `num_layers` is not positive; or `num_layers` is more than
            1 for a pattern that is not an `S2Pattern`.
        ImportError: matplotlib is not installed.
    """
    if num_blocks < 1:
        raise ValueError(f"num_blocks {num_blocks}: must be >= 1")
    if num_layers < 1:
        raise ValueError(f"num_layers {num_layers}: must be >= 1")
    if num_layers > 1 and not isinstance(pattern, S2Pattern):
        raise ValueError(f"num_layers {num_layers}: must be 1 for a {type(pattern).__name__}")
    heads = _heads_to_show(pattern.num_kv_heads)
    rows = 1 if len(heads) <= 2 else 2
    columns = -(-len(heads) // rows)
    side = 3.4 if rows == 1 else 1.5
    union_side = rows * side + (rows - 1) * _TITLED_GAP
    heads_width = columns * side + (columns - 1) * _GAP
    union_left = _LEFT + heads_width + _BETWEEN_HEADS_AND_UNION
    width = union_left + union_side + _RIGHT
    height = _TOP + union_side + _BOTTOM
    figure = new_figure(width, height)

    def square(left: float, bottom: float, size: float) -> Axes:
        return figure.add_axes((left / width, bottom / height, size / width, size / height))

    shown: set[int] = set()
    for panel, head in enumerate(heads):
        row, column = divmod(panel, columns)
        axes = square(_LEFT + column * (side + _GAP), _BOTTOM + (rows - 1 - row) * (side + _TITLED_GAP), side)
        cells = _cells_of_head(pattern, head, num_blocks)
        _draw_head(axes, cells, _head_title(pattern, head, head_name))
        _label_blocks(axes, num_blocks, x=panel + columns >= len(heads), y=column == 0)
        shown.update(cells[cells >= 0].tolist())

    counts = _heads_that_see(pattern, num_blocks, num_layers)
    axes = square(union_left, _BOTTOM, union_side)
    bar_axes = figure.add_axes(
        ((union_left + union_side + 0.1) / width, _BOTTOM / height, 0.13 / width, union_side / height)
    )
    _draw_union(axes, bar_axes, counts, _union_title(pattern, num_layers, head_name))
    _label_blocks(axes, num_blocks, x=True, y=False)

    draw_title(figure, title or _default_title(pattern), _LEFT, 0.16)
    if len(heads) < pattern.num_kv_heads:
        figure.text(
            _LEFT / width,
            1 - 0.4 / height,
            f"shown: {head_name}s 0 to {heads[-2]} and {heads[-1]} of {pattern.num_kv_heads}",
            fontsize=9,
            va="top",
        )
    entries = _legend(shown, some_lost=bool((counts == 0).any()))
    draw_legend(figure, entries, _LEFT, 0.1, handlelength=1, handleheight=1)
    if path is not None:
        save_figure(figure, path)
    return figure


def draw_model(settings: S2Settings, path: str | Path | None = None, num_blocks: int = 128) -> Figure:
    """Draws what each KV head of each layer of a model sees, and returns the figure.

    Rows are layers, columns KV heads, or query heads where patterns are given for them; the last column is
    the mean of the layer. Colours are the shares of all
    query-key pairs of `num_blocks` blocks that a head sees; each cell names the head's stride (1 is dense, 0
    window-only).

    Args:
        path: PNG or SVG file to write, by its suffix; None to write no file.

    Raises:
        ValueError: another suffix, or `num_blocks` is not positive.
        ImportError: matplotlib is not installed.
    """
    import numpy as np

    if num_blocks < 1:
        raise ValueError(f"num_blocks {num_blocks}: must be >= 1")
    layers, heads = settings.num_layers, settings.pattern_heads or settings.num_kv_heads
    head_name = "KV head" if settings.pattern_heads is None else "query head"
    tokens = num_blocks * settings.block_size
    stored = [settings.pattern(n) for n in range(1, layers + 1)]
    patterns = [_for_each(heads, pattern) for pattern in stored]
    shares = np.array([pattern.visible_pairs(tokens) for pattern in patterns]) / dense_pairs(tokens)

    cell_width, cell_height = max(0.34, min(0.8, 4.8 / heads)), 0.24
    widths = heads * cell_width, 0.62
    top = 0.75
    width = _LEFT + widths[0] + 0.1 + widths[1] + _MODEL_RIGHT
    height = top + layers * cell_height + _MODEL_BOTTOM
    figure = new_figure(width, height)
    panels = [(_LEFT, widths[0], shares), (_LEFT + widths[0] + 0.1, widths[1], shares.mean(1, keepdims=True))]
    for left, panel_width, values in panels:
        box = left / width, _MODEL_BOTTOM / height, panel_width / width, layers * cell_height / height
        axes = figure.add_axes(box)
        image = axes.imshow(values, cmap=_share_colours(), vmin=0, vmax=1, aspect="auto")
        for x in np.arange(values.shape[1] - 1) + 0.5:
            axes.axvline(x, color="white", linewidth=0.8)
        for y in np.arange(layers - 1) + 0.5:
            axes.axhline(y, color="white", linewidth=0.8)
        axes.tick_params(length=0, labelsize=8)
        for spine in axes.spines.values():
            spine.set_visible(False)
        is_mean = values is not shares
        axes.set_yticks(range(layers), [] if is_mean else [str(n + 1) for n in range(layers)])
        axes.set_xticks(range(values.shape[1]), ["mean"] if is_mean else [str(g) for g in range(heads)])
        for layer, pattern in enumerate(patterns):
            for head in range(values.shape[1]):
                share = values[layer, head]
                text = f"{share:.0%}" if is_mean else _stride_text(pattern, head, cell_width < 0.6)
                colour = "white" if share > 0.65 else _DIAGONAL.colour
                axes.text(head, layer, text, ha="center", va="center", fontsize=7.5, color=colour)
            if is_mean:
                axes.text(0.62, layer, _layer_text(settings, layer + 1), va="center", fontsize=7.5)
        if not is_mean:
            axes.set_xlabel(head_name, fontsize=9)
            axes.set_ylabel("layer", fontsize=9)
    bar_axes = figure.add_axes((_LEFT / width, 0.42 / height, widths[0] / width, 0.1 / height))
    bar = figure.colorbar(image, cax=bar_axes, orientation="horizontal", ticks=[0, 0.25, 0.5, 0.75, 1])
    bar.ax.set_xticklabels(["0%", "25%", "50%", "75%", "100%"], fontsize=7.5)
    bar.ax.tick_params(length=0)
    bar.outline.set_visible(False)
    bar.set_label(f"of the query-key pairs of {tokens} tokens", fontsize=8)

    draw_title(figure, f"{layers} layers of {heads} {head_name}s", _LEFT, 0.14)
    dense = layers * settings.num_kv_heads * tokens
    kept = sum(sum(pattern.kv_tokens(tokens)) for pattern in stored) / dense
    figure.text(
        _LEFT / width,
        1 - 0.4 / height,
        f"{shares.mean():.1%} of dense pairs, {kept:.1%} of dense keys and values",
        fontsize=9,
        va="top",
    )
    if path is not None:
        save_figure(figure, path)
    return figure


def _for_each(heads: int, pattern: S2Pattern) -> S2Pattern:
    """The same pattern with `heads` heads, a multiple of those that it has."""
    return pattern.select_heads([head * pattern.num_kv_heads // heads for head in range(heads)])


def _share_colours():
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("share", (Colour.PALE, "#7fb2dd", Colour.NAVY))


def _stride_text(pattern: S2Pattern, head: int, is_narrow: bool) -> str:
    if pattern.is_dense(head):
        return "1" if is_narrow else "dense"
    if pattern.is_window_only(head):
        return "0" if is_narrow else "window"
    return str(pattern.strides[head])


def _layer_text(settings: S2Settings, layer: int) -> str:
    if settings.is_dense(layer):
        return "dense layer"
    pattern = settings.pattern(layer)
    sinks = f", sinks {pattern.sink_blocks}" if pattern.sink_blocks else ""
    return f"window {pattern.local_blocks}{sinks}"


def _heads_to_show(num_kv_heads: int) -> list[int]:
    if num_kv_heads <= _MAX_HEAD_PANELS:
        return list(range(num_kv_heads))
    return [*range(_MAX_HEAD_PANELS - 1), num_kv_heads - 1]  # dense heads are the last ones


def _cells_of_head(pattern: BlockPattern, head: int, num_blocks: int) -> np.ndarray:
    """`[query, key]`, the index in `_KINDS` of the kind of each block, -1 in the future."""
    import numpy as np

    is_s2 = isinstance(pattern, S2Pattern)
    cells = np.full((num_blocks, num_blocks), -1)
    for row in range(num_blocks):
        cells[row, :row] = _KINDS.index(_UNSEEN)
        visible = np.array(pattern.row_blocks(head, row))
        cells[row, visible] = _KINDS.index(_STRIDED if is_s2 else _SEEN)
        if is_s2:
            cells[row, visible[visible < pattern.sink_blocks]] = _KINDS.index(_SINK)
            cells[row, visible[visible > row - pattern.local_blocks]] = _KINDS.index(_WINDOW)
        cells[row, row] = _KINDS.index(_DIAGONAL)
    return cells


def _heads_that_see(pattern: BlockPattern, num_blocks: int, num_layers: int) -> np.ndarray:
    """`[query, key]`, the number of heads in `num_layers` layers that see each block, -1 in the future."""
    import numpy as np

    counts = np.tril(np.ones((num_blocks, num_blocks), dtype=int)) - 1
    layers = [pattern]
    if isinstance(pattern, S2Pattern):
        layers += [pattern.for_layer(pattern.layer + later) for later in range(1, num_layers)]
    for layer in layers:
        for head in range(layer.num_kv_heads):
            for row in range(num_blocks):
                counts[row, layer.row_blocks(head, row)] += 1
    return counts


def _draw_head(axes: Axes, cells: np.ndarray, title: str) -> None:
    draw_cells(axes, cells, [_FUTURE_COLOUR, *(kind.colour for kind in _KINDS)], _grid(len(cells)))
    axes.set_title(title, fontsize=9, pad=4)
    past = cells >= 0
    _write_share(axes, seen=past & (cells != _KINDS.index(_UNSEEN)), past=past, fontsize=9)


def _draw_union(axes: Axes, bar_axes: Axes, counts: np.ndarray, title: str) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import BoundaryNorm, LinearSegmentedColormap, ListedColormap

    heads = int(counts.max())
    few_to_all = LinearSegmentedColormap.from_list("heads", _FEW_TO_ALL_HEADS)
    # The exponent below 1 keeps one head and two heads apart when there are many.
    colours = [few_to_all((n / max(heads - 1, 1)) ** 0.6) for n in range(heads)]
    draw_cells(axes, counts, [_FUTURE_COLOUR, _LOST.colour, *colours], _grid(len(counts)))
    axes.set_title(title, fontsize=10, pad=5)
    _write_share(axes, seen=counts > 0, past=counts >= 0, fontsize=12)

    edges = [n + 0.5 for n in range(heads + 1)]
    scale = ScalarMappable(BoundaryNorm(edges, heads), ListedColormap(colours))
    step = -(-heads // 8)
    bar = axes.figure.colorbar(
        scale, cax=bar_axes, ticks=[1, *range(2 * step - step % 2, heads, step), heads]
    )
    bar.set_label("heads that see the block", fontsize=9)
    bar.ax.tick_params(labelsize=8, length=0)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def _grid(num_blocks: int) -> float:
    return 0.5 if num_blocks <= _MAX_GRID_BLOCKS else 0


def _label_blocks(axes: Axes, num_blocks: int, x: bool, y: bool) -> None:
    step = 1
    while num_blocks > 5 * step:
        step *= 2
    ticks = range(0, num_blocks, step)
    axes.set_xticks(ticks, [str(tick) if x else "" for tick in ticks], fontsize=8)
    axes.set_yticks(ticks, [str(tick) if y else "" for tick in ticks], fontsize=8)
    if x:
        axes.set_xlabel("key block", fontsize=8.5, labelpad=2)
    if y:
        axes.set_ylabel("query block", fontsize=8.5, labelpad=2)


def _write_share(axes: Axes, seen: np.ndarray, past: np.ndarray, fontsize: float) -> None:
    percent = 100 * int(seen.sum()) // int(past.sum())  # rounded down, so that 100 means all
    axes.text(
        0.97,
        0.96,
        f"{percent}% of the past",
        transform=axes.transAxes,
        ha="right",
        va="top",
        fontsize=fontsize,
        color=_DIAGONAL.colour,
        weight="bold",
    )


def _legend(shown: set[int], some_lost: bool) -> list[Patch]:
    from matplotlib.patches import Patch

    kinds = [_KINDS[index] for index in sorted(shown)] + [_LOST] * some_lost
    return [Patch(facecolor=kind.colour, label=kind.label) for kind in kinds]


def _head_title(pattern: BlockPattern, head: int, head_name: str) -> str:
    title = f"{head_name} {head}"
    if not isinstance(pattern, S2Pattern):
        return title
    if pattern.is_dense(head):
        return f"{title}, dense"
    if pattern.is_window_only(head):
        return f"{title}, window only"
    return f"{title}, phase {pattern.head_phases[head]}"


def _union_title(pattern: BlockPattern, num_layers: int, head_name: str) -> str:
    heads = (
        f"the one {head_name}" if pattern.num_kv_heads == 1 else f"all {pattern.num_kv_heads} {head_name}s"
    )
    if num_layers == 1:
        return f"{heads} together"
    return f"{heads} of layers {pattern.layer} to {pattern.layer + num_layers - 1} together"


def _default_title(pattern: BlockPattern) -> str:
    if not isinstance(pattern, S2Pattern):
        return f"Block mask, {pattern.block_size} tokens per block"
    strides = sorted({stride for stride in pattern.strides if stride > 1} or {*pattern.strides} & {1})
    # The titles of the heads say which are window-only.
    named = [*map(str, strides), *(["none"] if 0 in pattern.strides else [])]
    parts = [
        f"block {pattern.block_size} tokens",
        f"window {pattern.local_blocks} blocks",
        f"stride {' and '.join(named)}",
    ]
    if pattern.sink_blocks:
        parts.append(f"{pattern.sink_blocks} sink block{'s' if pattern.sink_blocks > 1 else ''}")
    dense = pattern.strides.count(1)
    if 0 < dense < pattern.num_kv_heads:
        parts.append(f"{dense} dense head{'s' if dense > 1 else ''}")
    return "S2 pattern: " + ", ".join(parts)
