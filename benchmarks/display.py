"""Tables and pictures of stored rows: the parts that all benchmarks share."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.benchmark import Row, is_wrong

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from numpy import ndarray

Newest = dict[tuple, Row]
"""The newest row of each measurement of one setting, by the fields that differ."""

PERCENTILES = ("median", "p20", "p80")


def newest_rows(
    rows: Iterable[Row], setting: Sequence[str], key: Sequence[str], seconds: str = "seconds"
) -> list[Newest]:
    """Groups rows by setting and keeps the newest of each measurement.

    A measurement is replaced by a later measurement or a wrong result, but not by a later failure to measure.

    Args:
        rows: rows, oldest first.
        setting: fields that the rows of a group have in common.
        key: fields that tell the measurements of a group apart; a group is sorted by the first.
        seconds: field that is None in a row without a measurement.
    """
    groups: dict[str, Newest] = {}
    for row in rows:
        newest = groups.setdefault(json.dumps([row[name] for name in setting]), {})
        which = tuple(row[name] for name in key)
        if row[seconds] or is_wrong(row) or which not in newest or not newest[which][seconds]:
            newest[which] = row
    return [dict(sorted(newest.items(), key=lambda item: item[0][0])) for newest in groups.values()]


def any_row(newest: Newest) -> Row:
    return next(iter(newest.values()))


def median(row: Row | None, seconds: str = "seconds") -> float | None:
    """Returns the median time of a row in seconds; None if there is no row or no measurement."""
    return row[seconds]["median"] if row and row[seconds] else None


def speedup(row: Row | None, baseline: Row | None, seconds: str = "seconds") -> float | None:
    """Returns how many times faster a row is than another; None unless both are measured."""
    ours, other = median(row, seconds), median(baseline, seconds)
    return other / ours if ours and other else None


def speedup_curve(curve: Iterable[tuple[int, Row]], baselines: Mapping[int, Row]) -> list[tuple[int, float]]:
    """Returns (length, speed-up) for each (length, row) that has a measured baseline at its length."""
    ratios = ((length, speedup(row, baselines.get(length))) for length, row in curve)
    return [(length, ratio) for length, ratio in ratios if ratio is not None]


# Tables.


def columns(titles: Sequence[str], forms: str) -> list[tuple[str, str]]:
    """Returns titles with their formats, which are separated by spaces: `<12 >10`."""
    return list(zip(titles, forms.split(), strict=True))


def format_table(columns: Sequence[tuple[str, str]], rows: Iterable[Sequence[object]]) -> list[str]:
    """Formats titles and rows as lines. The last cell of a row with fewer cells than columns is free text:
    the reason why something is not measured."""
    lines = [" ".join(f"{title:{form}}" for title, form in columns)]
    for cells in rows:
        forms = [form for _, form in columns[: len(cells)]]
        if len(cells) < len(columns):
            forms[-1] = ""
        lines.append(" ".join(f"{cell:{form}}" for cell, form in zip(cells, forms, strict=True)))
    return lines


def cell(value: float | None, form: str) -> str:
    """Formats a number as `form.format(value)`, and None as a dash."""
    return "-" if value is None else form.format(value)


def mebibytes(size: int | None) -> str:
    return cell(None if size is None else size / 2**20, "{:.0f} MiB")


def milliseconds(seconds: dict, digits: int = 1) -> list[str]:
    """Formats median, p20 and p80."""
    return [f"{1e3 * seconds[name]:.{digits}f} ms" for name in PERCENTILES]


def reason(row: Row | None) -> str:
    """Returns the text of a row that is not measured."""
    return "not measured" if row is None else f"not measured: {row['not_measured']}"


def load_notes(rows: Iterable[Row], describe: Callable[[Row], str]) -> list[str]:
    """Returns a line for each row that was measured while other processes kept the machine busy."""
    busy = [row for row in rows if (row.get("other_cpus") or 0) > 0.1]
    notes = (f"{describe(row)}: other processes kept {row['other_cpus']} cores busy" for row in busy)
    return list(dict.fromkeys(notes))


# Pictures.


@contextmanager
def picture(
    path: Path,
    size: tuple[float, float],
    panels: tuple[int, int],
    title: str | None = None,
    fontsize: int = 8,
) -> Iterator[ndarray]:
    """Yields axes `[rows, columns]`, and writes their figure to a PNG at the end of the block.

    Args:
        size: width and height in inches.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(*panels, figsize=size, squeeze=False, layout="constrained")
    if title is not None:
        figure.suptitle(title, fontsize=fontsize)
    try:
        yield axes
        figure.savefig(path, dpi=100)
    finally:
        plt.close(figure)


def picture_path(directory: Path, name: str, index: int) -> Path:
    """Returns `name.png`, `name-2.png` and so on for index 0, 1, ..."""
    return directory / (f"{name}-{index + 1}.png" if index else f"{name}.png")


def plot_times(
    axis: Axes, lengths: Sequence[int], seconds: Sequence[dict], unit: float = 1.0, **style
) -> None:
    """Plots medians over lengths, with a band from p20 to p80; `unit` is that of the axis in seconds."""
    medians, p20, p80 = ([times[name] / unit for times in seconds] for name in PERCENTILES)
    axis.plot(lengths, medians, **style)
    axis.fill_between(lengths, p20, p80, color=style["color"], alpha=0.2)


def scale_by_length(axis: Axes, lengths: Iterable[int], label: str = "tokens") -> None:
    """Makes the x axis one of sequence lengths, with a tick at each, and adds grid and legend."""
    ticks = sorted(set(lengths))
    axis.set_xscale("log", base=2)
    axis.set_xticks(ticks, map(str, ticks))
    axis.set_xlabel(label)
    axis.grid(alpha=0.3)
    if axis.get_legend_handles_labels()[0]:
        axis.legend()
