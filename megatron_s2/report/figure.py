"""Helpers of all pictures: colours, an empty figure, title, cells, legend, and writing the file.

Needs matplotlib (the extra `megatron-s2[plot]`), imported when the first figure is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_s2.data.output import check_file_writable

if TYPE_CHECKING:
    import numpy as np
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SUFFIXES = (".png", ".svg")

_DPI = 150


class Colour:
    NAVY, BLUE, ORANGE, GREEN = "#12355b", "#5b9bd5", "#f28c28", "#3c9d6b"
    PURPLE, RED, GREY, PALE = "#b05bb5", "#d62839", "#8a8a8a", "#e9edf2"


def new_figure(width: float, height: float, layout: str | None = None) -> Figure:
    """Returns an empty white figure of `width` x `height` inches; `layout` as in matplotlib's `Figure`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("drawing needs matplotlib: python -m pip install 'megatron-s2[plot]'") from error
    return Figure(figsize=(width, height), facecolor="white", layout=layout)


def check_suffix(path: str | Path, name: str = "path") -> None:
    """Raises ValueError `name path: must end in …` unless a figure can be saved to `path`."""
    if Path(path).suffix.lower() not in SUFFIXES:
        raise ValueError(f"{name} {path}: must end in {' or '.join(SUFFIXES)}")


def check_picture(flag: str, path: str | Path) -> None:
    """Checks, before any work is done, that a figure can be drawn and saved to `path`.

    Raises:
        ValueError: naming `flag`: another suffix, or a file that cannot be written.
        ImportError: matplotlib is not installed.
    """
    check_suffix(path, flag)
    check_file_writable(flag, path)
    new_figure(1, 1)


def save_figure(figure: Figure, path: str | Path) -> None:
    """Writes a figure as PNG or SVG, by the suffix of `path`, into a directory that is made if need be.

    Equal figures give equal bytes.

    Raises:
        ValueError: another suffix.
    """
    check_suffix(path)
    import matplotlib

    metadata = {"Date": None} if Path(path).suffix.lower() == ".svg" else None
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    with matplotlib.rc_context({"svg.hashsalt": "megatron-s2"}):
        figure.savefig(path, dpi=_DPI, metadata=metadata)


def draw_title(figure: Figure, text: str, left: float, top: float) -> None:
    """Draws the title of a figure, `left` inches from the left edge and `top` inches below the upper edge."""
    x, y = left / figure.get_figwidth(), 1 - top / figure.get_figheight()
    figure.text(x, y, text, fontsize=11.5, weight="bold", va="top")


def draw_cells(
    axes: Axes, cells: np.ndarray, colours: Sequence, grid: float = 0, aspect: str = "equal"
) -> None:
    """Draws a matrix of integers as coloured cells without axes: -1 in `colours[0]`, 0 in `colours[1]`, ….

    Args:
        grid: width of the white lines between cells in points, 0 for none.
        aspect: `equal` for square cells, `auto` to fill `axes`.
    """
    from matplotlib.colors import BoundaryNorm, ListedColormap

    norm = BoundaryNorm([index - 1.5 for index in range(len(colours) + 1)], len(colours))
    axes.imshow(cells, cmap=ListedColormap(colours), norm=norm, interpolation="nearest", aspect=aspect)
    if grid:
        rows, columns = cells.shape
        axes.set_xticks([edge - 0.5 for edge in range(1, columns)], minor=True)
        axes.set_yticks([edge - 0.5 for edge in range(1, rows)], minor=True)
        axes.grid(which="minor", color="white", linewidth=grid)
    axes.tick_params(which="both", length=0)
    axes.spines[:].set_visible(False)


def draw_legend(
    figure: Figure,
    entries: Sequence[Artist],
    left: float,
    bottom: float,
    handlelength: float = 1.2,
    handleheight: float | None = None,
    columnspacing: float = 1.4,
) -> None:
    """Draws a legend of one row whose lower left corner is at `left`, `bottom` inches."""
    figure.legend(
        handles=entries,
        loc="lower left",
        bbox_to_anchor=(left / figure.get_figwidth(), bottom / figure.get_figheight()),
        borderaxespad=0,
        borderpad=0,
        ncols=len(entries),
        frameon=False,
        fontsize=9,
        handlelength=handlelength,
        handleheight=handleheight,
        columnspacing=columnspacing,
    )
