"""Optimizer offload in training: step time and peak memory of ours, of Megatron's and of none."""

from __future__ import annotations

import math
import re
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks import display
from benchmarks.benchmark import WRONG, Benchmark, Row, WrongResultError, require_none_wrong
from benchmarks.environment import code_hash, package_version
from benchmarks.measure import summary
from benchmarks.offload_cases import CASES, NONE, Case, Model, add_model_arguments, flags, model_of
from benchmarks.options import add_integers, add_names, require_positive
from benchmarks.results import newest_match
from benchmarks.training_process import Training, train
from megatron_s2.offload.plan import GB

WARM_UP = 3
# Relative difference that mean losses of so many tokens may have: the rounding of 16-bit logits averages out.
LOSS_TOLERANCE, TOLERANCE_TOKENS = 1e-4, 1024
NOTES = {
    "cpu": "Without a GPU a thread plays its part, on the same cores and in the same memory: the times say "
    "what a schedule costs there, not what a GPU would gain.",
    "cuda": "One rank on one GPU, which has all cores and the links to itself.",
}
SHARE = r"the GPU updates ([\d.]+)% of"  # in the plan that a run prints
OFFLOAD_CODE = (
    "megatron_s2/pretrain.py",
    "megatron_s2/training/*.py",
    "megatron_s2/offload/*.py",
    "benchmarks/offload.py",
    "benchmarks/offload_cases.py",
    "benchmarks/training_process.py",
)
_PACKAGES = ("megatron-core", "transformer-engine")


def add_arguments(parser: ArgumentParser) -> None:
    text = (
        "s2-F is ours with the fraction F on the GPU; with -flush, gradients leave during backward. "
        f"{NONE.name} always runs: the losses of the others are compared with its losses (default: all)"
    )
    add_names(parser, "--cases", CASES, text, list(CASES))
    text = "micro-batches of a step (default: 1,4,16)"
    add_integers(parser, "--accumulation", "numbers of micro-batches, such as 1,4", text, [1, 4, 16])
    text = (
        f"GB (10**9 bytes) that PyTorch may take of the GPU (default: no limit); {NONE.name} may take all, "
        "and its peak says whether it would fit"
    )
    parser.add_argument("--gpu-memory-gb", type=float, metavar="X", help=text)
    text = "timed steps, and as many again for the optimizer's part (default: %(default)s)"
    parser.add_argument("--repeats", type=int, default=5, help=text)
    add_model_arguments(parser)


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Yields the rows of one accumulation after another, each case in a fresh process.

    The case without offload is first: the losses of the others are compared with its losses. Times of a case
    with wrong losses are stored as `unproven_seconds`, which no table shows.
    """
    model, rows = model_of(args), []
    require_positive(repeats=args.repeats, accumulation=min(args.accumulation))
    if args.gpu_memory_gb is not None:
        if args.device != "cuda":
            raise ValueError(f"--gpu-memory-gb {args.gpu_memory_gb:g}: must not be set with --device cpu")
        if not 0 < args.gpu_memory_gb < math.inf:
            raise ValueError(f"--gpu-memory-gb {args.gpu_memory_gb:g}: must be > 0")
    for accumulation in args.accumulation:
        control = first_of_ours = None
        for case in CASES.values():
            if case.name not in args.cases and case is not NONE:
                continue
            setting = _setting(case, model, accumulation, args)
            known = newest_match(stored, setting)
            row = known or setting | measure(case, model, accumulation, args)
            if row["not_measured"] is None:
                try:
                    require_same_losses(row, control, first_of_ours if case.is_ours else None)
                except WrongResultError as error:
                    row = row | {"not_measured": f"{WRONG}{error}", "unproven_seconds": row["seconds"]}
                    row["seconds"] = None
                else:
                    control = control or row
                    first_of_ours = first_of_ours or (row if case.is_ours else None)
            rows.append(row)
            if row is not known:
                yield row
    require_none_wrong(rows)


def _setting(case: Case, model: Model, accumulation: int, args: Namespace) -> Row:
    """What a stored row must have in common with a new one to be used in its place."""
    return {
        "case": case.name,
        "fraction": case.fraction,
        "flush": case.flush,
        "accumulation": accumulation,
        "device": args.device,
        "model": vars(model),
        "gpu_memory_gb": args.gpu_memory_gb,
        "flags": flags(case, model, accumulation, args.threads),
        "warm_up": WARM_UP,
        "repeats": args.repeats,
        "packages": {name: package_version(name) for name in _PACKAGES},
        "offload_code": code_hash(OFFLOAD_CODE),
    }


def measure(case: Case, model: Model, accumulation: int, args: Namespace) -> Row:
    """Trains a case and returns the fields of its row that `_setting` does not have."""
    command = flags(case, model, accumulation, args.threads)
    limit = None if args.gpu_memory_gb is None or case is NONE else int(args.gpu_memory_gb * GB)
    training = train(command, WARM_UP, args.repeats, args.device, args.threads, gpu_memory=limit)
    row = results(training)
    if training.status and not case.may_be_refused:
        where = f"{case.name} at accumulation {accumulation}"
        row["not_measured"] = f"{WRONG}{where} ended with status {training.status}: {training.failure}"
    has_share = case.is_ours and not training.status
    return {
        **row,
        "gpu_share": round(printed(SHARE, training) / 100, 3) if has_share else None,
        "other_cpus": training.other_cpus,
        "note": NOTES[args.device],
    }


def results(training: Training) -> Row:
    """Returns what a row says of a training."""
    failed = training.status != 0
    return {
        "not_measured": training.failure if failed else None,
        "parameters": None if failed else int(printed(r"number of parameters on .*: (\d+)", training)),
        "losses": list(training.losses),
        "seconds": None if failed else summary(np.array(training.step_seconds)),
        "optimizer_seconds": None if failed else summary(np.array(training.optimizer_seconds)),
        "host_peak_bytes": training.host_peak_bytes,
        "gpu_peak_bytes": training.gpu_peak_bytes,
    }


def printed(pattern: str, training: Training) -> float:
    """Returns the number that a pattern's group matches in the output of a training."""
    found = re.search(pattern, training.output)
    if found is None:
        raise WrongResultError(f"a training printed nothing like {pattern!r}")
    return float(found[1])


def require_same_losses(row: Row, control: Row | None, first_of_ours: Row | None) -> None:
    """Checks that the losses of a row are finite, are those of `control` within the rounding of 16-bit
    logits, and are exactly those of `first_of_ours`.

    Args:
        control: row of the case without offload; None in that row's own check only.
        first_of_ours: first row of our offload, if `row` is a later one.

    Raises:
        WrongResultError: they are not; the message says at which step, and by how much.
    """
    where = f"{row['case']} at accumulation {row['accumulation']}"
    losses = row["losses"]
    steps = row["warm_up"] + 2 * row["repeats"]
    if len(losses) != steps or not all(map(math.isfinite, losses)):
        raise WrongResultError(f"{where}: must have {steps} finite losses, has {losses}")
    if control is None and row["case"] != NONE.name:
        raise WrongResultError(f"{where}: {NONE.name} has no losses to compare with")
    tokens = row["accumulation"] * row["model"]["seq_length"]
    rounding = LOSS_TOLERANCE * max(1.0, math.sqrt(TOLERANCE_TOKENS / tokens))
    for other, tolerance in ((control, rounding), (first_of_ours, 0.0)):
        for step, (got, expected) in enumerate(zip(losses, other["losses"] if other else ()), 1):
            if abs(got - expected) > tolerance * abs(expected):
                raise WrongResultError(
                    f"{where}: the loss of step {step} is {got:.9g}, that of {other['case']} {expected:.9g}; "
                    f"they may differ by {tolerance:.3g} of it"
                )


# Tables and pictures.

_TITLES = ("step", "p20", "p80", "optimizer", "flush gain", "GPU share", "host peak", "GPU peak")
_COLUMNS = display.columns(("accumulation", "", *_TITLES), ">12 <16" + " >11" * len(_TITLES))
_LEGEND = (
    "step: a whole iteration. optimizer: Megatron's timer of that name, in separate iterations; gradients "
    "are where they are needed when it starts. flush gain: the step with gradients flushed after backward "
    "over the step with gradients flushed during it, at the same fraction."
)
_PEER_STYLES = {
    "none": {"label": "no offload", "color": "#333333", "linestyle": ":"},
    "hybrid": {"label": "HybridDeviceOptimizer", "color": "#3c9d6b", "linestyle": "--"},
    "hybrid-overlap": {"label": "HybridDeviceOptimizer, overlap", "color": "#3c9d6b", "linestyle": "-."},
}
_OUR_STYLES = {
    True: {"label": "ours, flush in backward", "color": "#12355b", "marker": "o"},
    False: {"label": "ours, flush after backward", "color": "#f28c28", "marker": "s"},
}


def by_setting(rows: list[Row]) -> list[display.Newest]:
    """Returns the newest row of each (accumulation, case), for each setting."""
    setting = ("device", "model", "gpu_memory_gb", "warm_up", "repeats")
    return display.newest_rows(rows, setting, ("accumulation", "case"))


def accumulations(newest: display.Newest) -> list[int]:
    return list(dict.fromkeys(accumulation for accumulation, _ in newest))


def _by_fraction(newest: display.Newest, accumulation: int, flush: bool) -> dict[float | str, Row]:
    """Returns the measured rows of our offload by requested fraction."""
    rows = [row for (n, _), row in newest.items() if n == accumulation and row["flush"] is flush]
    return {row["fraction"]: row for row in rows if row["seconds"]}


def flush_gain(newest: display.Newest, row: Row) -> float | None:
    """Returns how many times shorter a step of ours is with gradients flushed during backward than after it,
    at the same share of the GPU; None unless the row flushes during backward and both are measured."""
    late = _by_fraction(newest, row["accumulation"], flush=False).get(row["fraction"])
    if not (row["flush"] and late and late["gpu_share"] == row["gpu_share"]):
        return None
    return display.speedup(row, late)


def interleaving_gain(newest: display.Newest, accumulation: int) -> str | None:
    """Returns a line that compares the best fraction with all updates on the CPU and all on the GPU, with
    gradients flushed during backward; None unless both are measured."""
    rows = _by_fraction(newest, accumulation, flush=True)
    if not {0, 1} <= set(rows):
        return None
    best = min(rows.values(), key=display.median)
    share = "" if best["fraction"] != "auto" else f" ({best['gpu_share']:.1%})"
    return (
        f"accumulation {accumulation}, interleaving, flush in backward: best fraction "
        f"{best['fraction']}{share}, {display.speedup(best, rows[0]):.2f}x over 0, "
        f"{display.speedup(best, rows[1]):.2f}x over 1"
    )


def _describe(newest: display.Newest) -> str:
    row, rows = display.any_row(newest), newest.values()
    model, limit = row["model"], row["gpu_memory_gb"]
    parameters = next((row["parameters"] for row in rows if row["parameters"]), None)
    text = f"{parameters / 1e6:.1f}M parameters, " if parameters else ""
    text += (
        f"hidden {model['hidden_size']}, {model['num_layers']} layers, {model['seq_length']} tokens a "
        f"micro-batch, subgroups of {model['subgroup_size']}, {row['device']}"
    )
    if limit is not None:
        text += f", {limit:g} GB of its memory"
        peaks = [row["gpu_peak_bytes"] for row in rows if row["case"] == NONE.name and row["seconds"]]
        text += f"; without offload it takes {max(peaks) / 1e9:.1f} GB" if peaks else ""
    return text


def table(rows: list[Row]) -> str:
    lines = []
    for newest in by_setting(rows):
        cells = [[*key, *_cells(newest, row)] for key, row in newest.items()]
        lines += [_describe(newest), *display.format_table(_COLUMNS, cells)]
        lines += filter(None, (interleaving_gain(newest, n) for n in accumulations(newest)))
        lines += display.load_notes(
            newest.values(), lambda row: f"{row['case']}, accumulation {row['accumulation']}, {row['date']}"
        )
    return "\n".join([*lines, _LEGEND, *dict.fromkeys(row["note"] for row in rows)])


def _cells(newest: display.Newest, row: Row) -> list[str]:
    if row["seconds"] is None:
        return [display.reason(row)]
    return [
        *display.milliseconds(row["seconds"]),
        f"{1e3 * row['optimizer_seconds']['median']:.1f} ms",
        display.cell(flush_gain(newest, row), "{:.2f}x"),
        display.cell(row["gpu_share"], "{:.1%}"),
        display.mebibytes(row["host_peak_bytes"]),
        display.mebibytes(row["gpu_peak_bytes"]),
    ]


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """Draws a picture for each setting: step time over the share of updates on the GPU, a panel for each
    accumulation. Cases without that share are horizontal lines; bars are p20 to p80."""
    paths = []
    for newest in by_setting(rows):
        measured = {key: row for key, row in newest.items() if row["seconds"]}
        if not measured:
            continue
        counts = accumulations(measured)
        paths.append(display.picture_path(directory, "offload", len(paths)))
        size, title = (1.5 + 3.6 * len(counts), 4.2), f"{directory.name}\n{_describe(newest)}"
        with display.picture(paths[-1], size, (1, len(counts)), title) as axes:
            for axis, accumulation in zip(axes[0], counts):
                _draw(axis, measured, accumulation)
            handles = {}
            for axis in axes[0]:
                handles |= {label: handle for handle, label in zip(*axis.get_legend_handles_labels())}
            axes[0, 0].figure.legend(
                handles.values(), handles, loc="outside lower center", ncols=3, fontsize=8
            )
    return paths


def _draw(axis, newest: display.Newest, accumulation: int) -> None:
    for name, style in _PEER_STYLES.items():
        if seconds := display.median(newest.get((accumulation, name))):
            axis.axhline(1e3 * seconds, **style)
    for flush, style in _OUR_STYLES.items():
        ours = _by_fraction(newest, accumulation, flush)
        if auto := ours.pop("auto", None):
            star = {**style, "marker": "*", "label": f"{style['label']}, auto"}
            time = 1e3 * display.median(auto)
            axis.plot(auto["gpu_share"], time, markersize=12, linestyle="none", zorder=3, **star)
        if ours:
            points = sorted((row["gpu_share"], *_milliseconds(row["seconds"])) for row in ours.values())
            shares, medians, below, above = zip(*points)
            axis.errorbar(shares, medians, yerr=(below, above), capsize=3, **style)
    axis.set(
        xlabel="share of updates on the GPU",
        ylabel="ms a step",
        title=f"accumulation {accumulation}",
        xlim=(-0.05, 1.05),
    )
    axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
    axis.grid(alpha=0.3)


def _milliseconds(seconds: dict) -> tuple[float, float, float]:
    """Returns the median, and how far the spread reaches below and above it."""
    median = seconds["median"]
    return 1e3 * median, 1e3 * (median - seconds["p20"]), 1e3 * (seconds["p80"] - median)


BENCHMARK = Benchmark(
    name="offload", help=__doc__, add_arguments=add_arguments, run=run, table=table, plot=plot
)
