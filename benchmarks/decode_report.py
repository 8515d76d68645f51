"""Table and picture of the decode benchmark, from its rows alone."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.benchmark import Row

_SHAPE = ("device", "batch", "heads", "kv_heads", "head_dim", "dtype", "pattern")
_LOOKS = {
    "s2-cache": {"color": "#12355b", "marker": "o"},
    "sdpa": {"color": "#f28c28", "marker": "s"},
    "sdpa-grouped": {"color": "#3c9d6b", "marker": "^"},
}

Newest = dict[tuple[int, str], Row]
"""The newest measurement of each (context, implementation) of one shape."""


def by_shape(rows: list[Row]) -> list[Newest]:
    shapes: dict[str, Newest] = {}
    for row in (row for row in rows if row["seconds_per_token"]):
        newest = shapes.setdefault(json.dumps([row[key] for key in _SHAPE]), {})
        newest[row["seq_length"], row["implementation"]] = row
    return [dict(sorted(newest.items(), key=lambda item: item[0][0])) for newest in shapes.values()]


def _describe(row: Row) -> str:
    p = row["pattern"]
    return (
        f"batch {row['batch']}, heads {row['heads']}, KV heads {row['kv_heads']}, "
        f"head_dim {row['head_dim']}, {row['dtype']}; block {p['block_size']}, window {p['local_blocks']}, "
        f"stride {' '.join(map(str, sorted(set(p['vert_stride']))))}; {row['device']}"
    )


def table(rows: list[Row]) -> str:
    lines = []
    for newest in by_shape(rows):
        lines += [
            _describe(next(iter(newest.values()))),
            f"{'context':>8} {'':<13} {'us/token':>10} {'p20':>10} {'p80':>10} {'in kernels':>10} "
            f"{'cache bytes':>12} {'of sdpa':>8}",
        ]
        for (context, name), row in newest.items():
            times = [1e6 * row["seconds_per_token"][which] for which in ("median", "p20", "p80")]
            dense, share = newest.get((context, "sdpa")), "-"
            if dense:
                share = f"{times[0] / (1e6 * dense['seconds_per_token']['median']):.3f}"
            shown = " ".join(f"{time:>10.1f}" for time in times)
            kernels = row.get("kernel_seconds_per_token")
            in_kernels = "-" if kernels is None else f"{1e6 * kernels:.1f}"
            kept = row["cache_bytes"]["kept"]
            lines.append(f"{context:>8} {name:<13} {shown} {in_kernels:>10} {kept:>12} {share:>8}")
        if any(row.get("caches", 1) > 1 for row in newest.values()):
            lines.append(
                "tokens are decoded with several caches in turn, which the GPU's L2 cache cannot hold"
            )
    for row in rows:
        if row.get("not_measured"):
            lines.append(
                f"{row['seq_length']:>8} {row['implementation']:<13} not measured: {row['not_measured']}"
            )
    return "\n".join(lines)


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """A picture for each shape of several contexts: time and cache over the context. One needs none."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths = []
    for newest in by_shape(rows):
        contexts = sorted({context for context, _ in newest})
        if len(contexts) < 2:
            continue
        figure, (time, memory) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for name, look in _LOOKS.items():
            of_it = [row for (_, n), row in newest.items() if n == name]
            if not of_it:
                continue
            tokens = [row["seq_length"] for row in of_it]
            times = {
                which: [1e6 * row["seconds_per_token"][which] for row in of_it]
                for which in ("median", "p20", "p80")
            }
            time.plot(tokens, times["median"], label=name, **look)
            time.fill_between(tokens, times["p20"], times["p80"], color=look["color"], alpha=0.2)
            memory.plot(tokens, [row["cache_bytes"]["kept"] / 2**20 for row in of_it], label=name, **look)
        time.set(ylabel="microseconds per token", yscale="log")
        memory.set(ylabel="MiB of keys and values", yscale="log")
        for axis in (time, memory):
            axis.set_xscale("log", base=2)
            axis.set_xticks(contexts, map(str, contexts))
            axis.set_xlabel("tokens in the cache")
            axis.grid(alpha=0.3)
            axis.legend()
        figure.suptitle(f"{directory.name}\n{_describe(next(iter(newest.values())))}", fontsize=8)
        paths.append(directory / ("decode.png" if not paths else f"decode-{len(paths) + 1}.png"))
        figure.savefig(paths[-1], dpi=100)
        plt.close(figure)
    return paths
