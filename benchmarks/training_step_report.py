"""Table and picture of the training step benchmark, from its rows alone."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.benchmark import Row

CHECK = "check"  # the case of a row that says what the check found; it has no times
_SETTING = ("device", "model")
_LOOKS = {
    "dense": {"color": "#333333", "marker": "s", "linestyle": "--"},
    "s2-first-two-dense": {"color": "#5b9bd5", "marker": "^"},
    "s2": {"color": "#12355b", "marker": "o"},
}
_WHAT = (
    "TFLOP/s: of the FLOPs really done, recomputation included. bound: the FLOPs of dense over those of the "
    "case. dense: every layer through SDPA's flash kernel."
)

Newest = dict[tuple[int, str], Row]
"""The newest row of each (length, case) of one model."""


def by_model(rows: list[Row]) -> list[Newest]:
    """A measurement is not replaced by a later failure to measure."""
    models: dict[str, Newest] = {}
    for row in (row for row in rows if row["case"] != CHECK):
        newest = models.setdefault(json.dumps([row[key] for key in _SETTING]), {})
        key = row["seq_length"], row["case"]
        if row["seconds"] or key not in newest or not newest[key]["seconds"]:
            newest[key] = row
    return [dict(sorted(newest.items(), key=lambda item: item[0][0])) for newest in models.values()]


def speedup(newest: Newest, row: Row) -> float | None:
    """How many times faster a case is than dense at its length; None where either is not measured."""
    dense = newest.get((row["seq_length"], "dense"))
    if not (row["seconds"] and dense and dense["seconds"]):
        return None
    return dense["seconds"]["median"] / row["seconds"]["median"]


def peak_bytes(row: Row) -> int | None:
    """Of the device that was measured."""
    return row["gpu_peak_bytes" if row["device"] == "cuda" else "host_peak_bytes"]


def _describe(row: Row) -> str:
    m = row["model"]
    return (
        f"{m['num_layers']} layers, hidden {m['hidden_size']}, {m['num_attention_heads']} heads, "
        f"{m['num_query_groups']} KV groups, bf16, full recomputation; block {m['block_size']}, "
        f"window {m['local_blocks']}, stride {m['vert_stride']}; {row['device']}"
    )


def table(rows: list[Row]) -> str:
    lines = []
    for newest in by_model(rows):
        lines += [
            _describe(next(iter(newest.values()))),
            f"{'tokens':>8} {'':<19} {'step':>12} {'p20':>12} {'p80':>12} {'tokens/s':>10} {'TFLOP/s':>9} "
            f"{'over dense':>10} {'bound':>7} {'peak':>11}",
        ]
        lines += [f"{tokens:>8} {case:<19} {_cells(newest, row)}" for (tokens, case), row in newest.items()]
        for row in newest.values():
            if (others := row["other_cpus"]) and others > 0.1:
                lines.append(f"{row['case']}, {row['seq_length']} tokens: others kept {others} cores busy")
    return "\n".join([*lines, _WHAT])


def _cells(newest: Newest, row: Row) -> str:
    if row["seconds"] is None:
        return f"not measured: {row['not_measured']}"
    median = row["seconds"]["median"]
    ratio, peak = speedup(newest, row), peak_bytes(row)
    return " ".join(
        [
            *(f"{1e3 * row['seconds'][key]:>9.1f} ms" for key in ("median", "p20", "p80")),
            f"{row['seq_length'] / median:>10.0f}",
            f"{sum(row['flops'].values()) / median / 1e12:>9.3f}",
            f"{'-' if ratio is None else f'{ratio:.2f}x':>10}",
            f"{row['speedup_bound']:>6.2f}x",
            f"{'-' if peak is None else f'{peak / 2**20:.0f} MiB':>11}",
        ]
    )


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """A picture for each model: tokens per second and the speed-up over dense, by length. The dotted lines
    are the ratios of FLOPs."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    paths = []
    for newest in by_model(rows):
        measured = [row for row in newest.values() if row["seconds"]]
        if not measured:
            continue
        figure, (rate, ratio) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
        for case, look in _LOOKS.items():
            of_case = [row for row in measured if row["case"] == case]
            if not of_case:
                continue
            tokens = [row["seq_length"] for row in of_case]
            rates = [n / row["seconds"]["median"] for n, row in zip(tokens, of_case)]
            rate.plot(tokens, rates, label=case, **look)
            ratios = [(n, x) for n, row in zip(tokens, of_case) if (x := speedup(newest, row)) is not None]
            if case != "dense" and ratios:
                ratio.plot(*zip(*ratios), label=case, **look)
                bounds = [row["speedup_bound"] for row in of_case]
                dotted = {**look, "linestyle": ":", "marker": "."}
                ratio.plot(tokens, bounds, label=f"{case}: ratio of FLOPs", **dotted)
        rate.set(ylabel="tokens per second")
        ratio.set(ylabel="speed-up over dense")
        lengths = sorted({row["seq_length"] for row in measured})
        for axis in (rate, ratio):
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
            axis.set_xscale("log", base=2)
            axis.set_xticks(lengths, map(str, lengths))
            axis.set_xlabel("tokens")
            axis.grid(alpha=0.3)
            if axis.get_legend_handles_labels()[0]:
                axis.legend()
        figure.suptitle(f"{directory.name}\n{_describe(measured[0])}", fontsize=8)
        paths.append(directory / ("step.png" if not paths else f"step-{len(paths) + 1}.png"))
        figure.savefig(paths[-1], dpi=100)
        plt.close(figure)
    return paths
