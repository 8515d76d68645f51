"""Table and pictures of the offload benchmark, from its rows alone."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.benchmark import Row

# Without the fractions of ours: drawn as horizontal lines.
PEERS = {
    "none": {"label": "no offload", "color": "#333333", "linestyle": ":"},
    "hybrid": {"label": "HybridDeviceOptimizer", "color": "#3c9d6b", "linestyle": "--"},
    "hybrid-overlap": {"label": "HybridDeviceOptimizer, overlap", "color": "#3c9d6b", "linestyle": "-."},
}
_FLUSH = {
    True: {"label": "ours, flush in backward", "color": "#12355b", "marker": "o"},
    False: {"label": "ours, flush after backward", "color": "#f28c28", "marker": "s"},
}
_WHAT = (
    "step: a whole iteration. optimizer: Megatron's timer of that name in iterations of their own, gradients "
    "being where they are needed when it starts. flush gain: the step with gradients flushed after backward "
    "over that with them flushed during it, at the same fraction."
)
_SETTING = ("device", "model", "gpu_memory_gb", "warm_up", "repeats")

Newest = dict[tuple[int, str], Row]
"""The newest row of each (accumulation, case) of one setting, in the order of measurement."""


def by_setting(rows: list[Row]) -> list[Newest]:
    settings: dict[str, Newest] = {}
    for row in rows:
        newest = settings.setdefault(json.dumps([row[key] for key in _SETTING]), {})
        newest[row["accumulation"], row["case"]] = row
    return list(settings.values())


def median(row: Row | None) -> float | None:
    return row["seconds"]["median"] if row and row["seconds"] else None


def _measured(newest: Newest, accumulation: int, flush: bool) -> dict[float | str, Row]:
    """Ours by asked fraction."""
    return {
        row["fraction"]: row
        for (n, _), row in newest.items()
        if n == accumulation and row["flush"] is flush and median(row)
    }


def flush_gain(newest: Newest, row: Row) -> float | None:
    """How many times shorter a step of ours is because gradients leave during backward and not after it, at
    one share of the GPU; None where it does not flush then, or the other is not measured."""
    late = _measured(newest, row["accumulation"], flush=False).get(row["fraction"])
    if not (row["flush"] and median(row) and late and late["gpu_share"] == row["gpu_share"]):
        return None
    return median(late) / median(row)


def interleaving_gain(newest: Newest, accumulation: int) -> str | None:
    """The best fraction against all on the CPU and all on the GPU, with gradients flushed during backward in
    each, as a line; None where one of them is not measured."""
    rows = _measured(newest, accumulation, flush=True)
    if not {0, 1} <= set(rows):
        return None
    best = min(rows.values(), key=median)
    share = "" if best["fraction"] != "auto" else f" ({best['gpu_share']:.1%})"
    over = {one: median(rows[one]) / median(best) for one in (0, 1)}
    return (
        f"accumulation {accumulation}, interleaving, flush in backward: best fraction "
        f"{best['fraction']}{share}, {over[0]:.2f}x over 0, {over[1]:.2f}x over 1"
    )


def _describe(newest: Newest) -> str:
    row = next(row for row in newest.values())
    model = row["model"]
    counted = next((row["parameters"] for row in newest.values() if row["parameters"]), None)
    size = f"{counted / 1e6:.1f}M parameters, " if counted else ""
    return (
        f"{size}hidden {model['hidden_size']}, {model['num_layers']} layers, {model['seq_length']} tokens a "
        f"micro-batch, subgroups of {model['subgroup_size']}, {row['device']}{_budget(newest)}"
    )


def _budget(newest: Newest) -> str:
    """The GPU memory that was allowed, and what a training without offload takes."""
    limit = next(iter(newest.values()))["gpu_memory_gb"]
    if limit is None:
        return ""
    peaks = [row["gpu_peak_bytes"] for row in newest.values() if row["case"] == "none" and median(row)]
    needs = f"; without offload it takes {max(peaks) / 1e9:.1f} GB" if peaks else ""
    return f", {limit:g} GB of its memory{needs}"


def table(rows: list[Row]) -> str:
    lines = []
    for newest in by_setting(rows):
        header = (("step", "p20", "p80", "optimizer"), ("flush gain", "GPU share", "host peak", "GPU peak"))
        lines += [
            _describe(newest),
            f"{'accumulation':<12} {'':<16} "
            + " ".join(f"{word:>11}" for word in header[0])
            + " ".join(f" {word:>10}" for word in header[1]),
        ]
        accumulations = sorted({n for n, _ in newest})
        for accumulation in accumulations:
            of_it = [row for (n, _), row in newest.items() if n == accumulation]
            lines += [f"{accumulation:>12} {row['case']:<16} {_cells(newest, row)}" for row in of_it]
        lines += filter(None, (interleaving_gain(newest, n) for n in accumulations))
        for row in newest.values():
            if (others := row["other_cpus"]) and others > 0.1:
                lines.append(
                    f"{row['case']}, accumulation {row['accumulation']}, {row['date']}: others kept {others} "
                    "cores busy"
                )
    return "\n".join([*lines, _WHAT, *dict.fromkeys(row["note"] for row in rows)])


def _cells(newest: Newest, row: Row) -> str:
    if row["seconds"] is None:
        return f"not measured: {row['not_measured']}"
    times = [*(row["seconds"][key] for key in ("median", "p20", "p80")), row["optimizer_seconds"]["median"]]
    gain, share = flush_gain(newest, row), row["gpu_share"]
    peaks = (row["host_peak_bytes"], row["gpu_peak_bytes"])
    return " ".join(
        [
            *(f"{1e3 * seconds:>8.1f} ms" for seconds in times),
            f"{'-' if gain is None else f'{gain:.2f}x':>10}",
            f"{'-' if share is None else f'{share:.1%}':>11}",
            *(f"{'-' if peak is None else f'{peak / 2**20:.0f} MiB':>11}" for peak in peaks),
        ]
    )


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """A picture for each setting: step time over the share of updates that the GPU does, a plot for each
    accumulation; peers are horizontal lines. Bars are p20 to p80."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths = []
    for newest in by_setting(rows):
        accumulations = sorted({n for (n, _), row in newest.items() if median(row)})
        if not accumulations:
            continue
        size = 1.5 + 3.6 * len(accumulations), 4.2
        figure, axes = plt.subplots(1, len(accumulations), figsize=size, squeeze=False, layout="constrained")
        for axis, accumulation in zip(axes[0], accumulations):
            _draw(axis, newest, accumulation)
        figure.suptitle(f"{directory.name}\n{_describe(newest)}", fontsize=8)
        handles = {
            label: handle
            for axis in axes[0]
            for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
        figure.legend(handles.values(), handles, loc="outside lower center", ncols=3, fontsize=8)
        paths.append(directory / ("offload.png" if not paths else f"offload-{len(paths) + 1}.png"))
        figure.savefig(paths[-1], dpi=100)
        plt.close(figure)
    return paths


def _draw(axis, newest: Newest, accumulation: int) -> None:
    for name, look in PEERS.items():
        row = newest.get((accumulation, name))
        if median(row):
            axis.axhline(1e3 * median(row), **look)
    for flush, look in _FLUSH.items():
        ours = _measured(newest, accumulation, flush)
        if auto := ours.pop("auto", None):
            star = {**look, "marker": "*", "label": f"{look['label']}, auto"}
            axis.plot(
                auto["gpu_share"], 1e3 * median(auto), markersize=12, linestyle="none", zorder=3, **star
            )
        if ours:
            points = sorted((row["gpu_share"], *_milliseconds(row)) for row in ours.values())
            shares, medians, below, above = zip(*points)
            axis.errorbar(shares, medians, yerr=(below, above), capsize=3, **look)
    axis.set(
        xlabel="share of updates on the GPU",
        ylabel="ms a step",
        title=f"accumulation {accumulation}",
        xlim=(-0.05, 1.05),
    )
    axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    axis.grid(alpha=0.3)


def _milliseconds(row: Row) -> tuple[float, float, float]:
    """Median, and how far the spread reaches below and above it."""
    seconds = row["seconds"]
    middle = seconds["median"]
    return 1e3 * middle, 1e3 * (middle - seconds["p20"]), 1e3 * (seconds["p80"] - middle)
