"""Table and pictures of the attention benchmark, from its rows alone."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.benchmark import Row
from benchmarks.cases import PASSES, shape_name
from benchmarks.implementations import IMPLEMENTATIONS

_SHAPE = ("batch", "heads", "kv_heads", "head_dim", "dtype", "pattern")
_DENSE = [name for name, implementation in IMPLEMENTATIONS.items() if not implementation.sparse]

Newest = dict[tuple[str, int, str], Row]
"""The newest row of each (pass, length, implementation) of one shape."""


def _by_shape(rows: list[Row]) -> list[Newest]:
    """A measurement is not replaced by a later failure to measure: only by a later measurement."""
    shapes: dict[str, Newest] = {}
    for row in rows:
        newest = shapes.setdefault(json.dumps([row[key] for key in _SHAPE]), {})
        key = row["pass"], row["seq_length"], row["implementation"]
        if row["seconds"] or key not in newest or not newest[key]["seconds"]:
            newest[key] = row
    return list(shapes.values())


def _describe(row: Row) -> str:
    p = row["pattern"]
    strides = sorted(set(p["vert_stride"]))
    return (
        f"batch {row['batch']}, heads {row['heads']}, KV heads {row['kv_heads']}, "
        f"head_dim {row['head_dim']}, {row['dtype']}; block {p['block_size']}, window {p['local_blocks']}, "
        f"stride {' '.join(map(str, strides))}, sinks {p['sink_blocks']}"
    )


def _median(row: Row | None) -> float | None:
    return row["seconds"]["median"] if row and row["seconds"] else None


def _speedup(newest: Newest, which: str, tokens: int, name: str, over: str) -> float | None:
    """How many times faster one implementation is than another; None where either is not measured."""
    ours, other = (_median(newest.get((which, tokens, n))) for n in (name, over))
    return other / ours if ours and other else None


def table(rows: list[Row]) -> str:
    lines = []
    for newest in _by_shape(rows):
        any_row = next(iter(newest.values()))
        name = shape_name(any_row)
        names = [n for n in IMPLEMENTATIONS if any(key[2] == n for key in newest)]
        dense = [n for n in names if n in _DENSE]
        lines += [
            f"{name}: {_describe(any_row)}" if name else _describe(any_row),
            f"{'pass':<17} {'tokens':>8} {'':<10} {'median':>12} {'p20':>12} {'p80':>12} {'GFLOP/s':>9} "
            + " ".join(f"{'over ' + n:>15}" for n in dense)
            + f" {'bound':>6} {'peak':>10}",
        ]
        for which, tokens in sorted({key[:2] for key in newest}):
            for n in names:
                row = newest.get((which, tokens, n))
                speedups = [_speedup(newest, which, tokens, n, over) for over in dense]
                lines.append(f"{which:<17} {tokens:>8} {n:<10} {_cells(row, speedups)}")
    for row in rows:
        if row["seconds"] and (others := row.get("other_cpus")) and others > 0.1:
            note = f"{row['seq_length']} tokens, {row['date']}: others kept {others} cores busy meanwhile"
            lines += [note] if note not in lines else []
    return "\n".join(lines)


def _cells(row: Row | None, speedups: list[float | None]) -> str:
    if row is None:
        return "not measured"
    if row["seconds"] is None:
        return f"not measured: {row['not_measured']}"
    times = " ".join(f"{row['seconds'][key] * 1e3:>9.2f} ms" for key in ("median", "p20", "p80"))
    ratios = " ".join(f"{'-' if ratio is None else f'{ratio:.2f}':>15}" for ratio in speedups)
    peak = row["peak_bytes_above_inputs"]
    memory = "-" if peak is None else f"{(row['input_bytes'] + peak) / 2**20:.0f} MiB"
    rate = row["flops"] / row["seconds"]["median"] / 1e9
    return f"{times} {rate:>9.1f} {ratios} {row['speedup_bound']:>6.2f} {memory:>10}"


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """One picture for each shape: time and speed-up over the length, a line of plots for each pass.

    The dotted line is what the pattern's FLOPs allow: the dense time divided by the ratio of FLOPs, and that
    ratio itself.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths, unnamed = [], 0
    for newest in _by_shape(rows):
        if not any(row["seconds"] for row in newest.values()):
            continue
        any_row = next(iter(newest.values()))
        name = shape_name(any_row)
        if name is None:
            unnamed += 1
        names = [n for n in IMPLEMENTATIONS if any(key[2] == n for key in newest)]
        baseline = next((n for n in _DENSE if n in names), None)
        figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
        for which, (time, speedup) in zip(PASSES, axes):
            _draw_pass(newest, which, names, baseline, time, speedup)
        figure.suptitle(f"{directory.name}: {_describe(any_row)}", fontsize=10)
        paths.append(directory / f"attention-{name or f'other-{unnamed}'}.png")
        figure.savefig(paths[-1], dpi=100)
        plt.close(figure)
    return paths


def _draw_pass(newest: Newest, which: str, names: list[str], baseline: str | None, time, speedup) -> None:
    for color, name in ((f"C{list(IMPLEMENTATIONS).index(name)}", name) for name in names):
        curve = sorted(
            (t, row) for (w, t, n), row in newest.items() if (w, n) == (which, name) and _median(row)
        )
        if not curve:
            time.plot([], [], color=color, label=f"{name}: not measured")
            continue
        tokens = [t for t, _ in curve]
        median, p20, p80 = ([row["seconds"][key] for _, row in curve] for key in ("median", "p20", "p80"))
        time.plot(tokens, median, marker="o", color=color, label=name)
        time.fill_between(tokens, p20, p80, color=color, alpha=0.2)
        ratios = [(t, r) for t in tokens if (r := _speedup(newest, which, t, name, baseline)) is not None]
        if ratios and name != baseline:
            speedup.plot(*zip(*ratios), marker="o", color=color, label=name)
    bounds = {
        t: row["speedup_bound"]
        for (w, t, n), row in newest.items()
        if w == which and IMPLEMENTATIONS[n].sparse and row["seconds"]
    }
    look = {"color": "gray", "linestyle": ":", "marker": "."}
    dense = {t: _median(newest.get((which, t, baseline))) for t in bounds}
    best = [(t, seconds / bounds[t]) for t, seconds in sorted(dense.items()) if seconds]
    if best:
        time.plot(*zip(*best), label=f"{baseline} / ratio of FLOPs", **look)
    if bounds:
        speedup.plot(*zip(*sorted(bounds.items())), label="ratio of FLOPs", **look)
    time.set(yscale="log", ylabel="seconds", title=which)
    speedup.set(ylabel=f"speed-up over {baseline}", title=which, ylim=(0, None))
    measured = sorted({t for (_, t, _), row in newest.items() if row["seconds"]})
    for axis in (time, speedup):
        axis.set_xscale("log", base=2)
        axis.set_xticks(measured, map(str, measured))
        axis.set_xlabel("tokens")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend()
