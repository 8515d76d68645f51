"""Table and picture of the context-parallel benchmark, from its rows alone."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.benchmark import Row

SCHEDULES = ("gather", "a2a")
MEGATRON = ("ring", "all_gather")
NOTE = (
    "Ranks of one machine share its cores and its memory: the times say what a schedule costs there and "
    "measure no network. Bytes are exact and the same on any network."
)
_SHAPE = ("case", "seq_length", "batch", "heads", "kv_heads", "head_dim", "dtype", "device", "pattern")


def _by_shape(rows: list[Row]) -> list[list[Row]]:
    """The newest row of each number of ranks and schedule, of one shape after the other."""
    shapes: dict[str, dict[tuple[int, str], Row]] = {}
    for row in rows:
        newest = shapes.setdefault(json.dumps([row[key] for key in _SHAPE]), {})
        newest[row["ranks"], row["schedule"]] = row
    return [
        sorted(newest.values(), key=lambda row: (row["ranks"], SCHEDULES.index(row["schedule"])))
        for newest in shapes.values()
    ]


def _describe(row: Row) -> str:
    p = row["pattern"]
    return (
        f"{row['case']}: {row['seq_length']} tokens, heads {row['heads']}, KV heads {row['kv_heads']}, "
        f"head_dim {row['head_dim']}, {row['dtype']}; block {p['block_size']}, window {p['local_blocks']}, "
        f"stride {' '.join(map(str, sorted(set(p['vert_stride']))))}"
    )


def _received(row: Row, way: str) -> float:
    """MiB that the rank receives which receives most."""
    return max(counted[f"{way}_received"] for counted in row["bytes"]) / 2**20


def _megatron(row: Row, name: str, way: str) -> float:
    return row["megatron_bytes"][name][f"{way}_received"] / 2**20


def table(rows: list[Row]) -> str:
    lines = ["MiB that the rank receives which receives most; time of the slowest rank, forward and backward"]
    for shape in _by_shape(rows):
        lines += [
            _describe(shape[0]),
            f"{'ranks':>5} {'':<10} {'forward':>9} {'backward':>9} {'work max/mean':>14} "
            f"{'median':>11} {'p20':>11} {'p80':>11}",
        ]
        for ranks in dict.fromkeys(row["ranks"] for row in shape):
            these = [row for row in shape if row["ranks"] == ranks]
            for row in these:
                sizes = " ".join(f"{_received(row, way):>9.2f}" for way in ("forward", "backward"))
                times = " ".join(f"{1e3 * row['seconds'][key]:>8.1f} ms" for key in ("median", "p20", "p80"))
                lines.append(f"{ranks:>5} {row['schedule']:<10} {sizes} {row['imbalance']:>14.3f} {times}")
            for name in MEGATRON:
                sizes = " ".join(f"{_megatron(these[0], name, way):>9.2f}" for way in ("forward", "backward"))
                lines.append(f"{ranks:>5} {name:<10} {sizes} {'by formula, not run':>29}")
    for row in rows:
        if (others := row["other_cpus"]) and others > 0.1:
            note = f"{row['case']}, {row['ranks']} ranks, {row['date']}: others kept {others} cores busy"
            lines += [note] if note not in lines else []
    return "\n".join([*lines, NOTE])


_LINES = {
    "gather": {"color": "#12355b", "marker": "o", "label": "gather, counted"},
    "a2a": {"color": "#f28c28", "marker": "s", "label": "a2a, counted"},
    "ring": {
        "color": "#3c9d6b",
        "marker": "^",
        "markersize": 11,
        "linewidth": 6,
        "alpha": 0.4,
        "label": "Megatron's ring, by formula",
    },
    "all_gather": {
        "color": "#333333",
        "marker": "x",
        "linestyle": ":",
        "label": "Megatron's all-gather, by formula",
    },
}


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """One picture: bytes received by the busiest rank over the number of ranks, a plot for each shape."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    shapes = _by_shape(rows)
    size = 5.5 * len(shapes), 4.2
    figure, axes = plt.subplots(1, len(shapes), figsize=size, squeeze=False, layout="constrained")
    for axis, shape in zip(axes[0], shapes):
        for schedule in SCHEDULES:
            points = [
                (row["ranks"], _received(row, "forward") + _received(row, "backward"))
                for row in shape
                if row["schedule"] == schedule
            ]
            if points:
                axis.plot(*zip(*points), **_LINES[schedule])
        for name in MEGATRON:
            points = {
                row["ranks"]: _megatron(row, name, "forward") + _megatron(row, name, "backward")
                for row in shape
            }
            axis.plot(*zip(*points.items()), **_LINES[name])
        ranks = sorted({row["ranks"] for row in shape})
        axis.set_xticks(ranks, map(str, ranks))
        axis.set(xlabel="ranks", ylabel="MiB received, forward and backward")
        axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
        axis.set_title(_describe(shape[0]).replace("; ", "\n"), fontsize=8)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    path = directory / "context-parallel.png"
    figure.savefig(path, dpi=100)
    plt.close(figure)
    return [path]
