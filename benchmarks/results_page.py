"""docs/results.md from the stored rows: what was to be reached on a GPU, what was measured, what bounds it.

`python -m benchmarks.results_page` writes it anew.
"""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import offload_report, training_step_report
from benchmarks.benchmark import Row
from benchmarks.cases import DEFAULT_LENGTHS, DEFAULT_SHAPES, PASSES, SHAPES, Case, shape_name
from benchmarks.decode import DEFAULT_SHAPES as DECODE_SHAPES
from benchmarks.decode import closed_form_bytes
from benchmarks.environment import ROOT
from benchmarks.implementations import IMPLEMENTATIONS
from benchmarks.record import DRAWING
from benchmarks.registry import BENCHMARKS
from benchmarks.results import read_rows
from benchmarks.training_step import MODELS, step_flops

RESULTS, PAGE = ROOT / "benchmarks" / "results", ROOT / "docs" / "results.md"
LONG = 131072
_INTRO = """\
# Measured results

Written by `python -m benchmarks.results_page` from the rows in [benchmarks/results]({results}); no
measurement here is an estimate. `bash scripts/gpu_record.sh` measures on a GPU and writes this page anew.
"""
_BOUNDS = """\
Each ratio stands beside its bound, by formula: of attention and of a step the ratio of exact FLOPs (dense
over ours; of a step with all products and recomputation), of decoding the ratio of the bytes of both caches.
It is what leaving work out gives at equal efficiency.
"""
_NO_GPU = "**No GPU has been measured yet**: there are no rows of one.\n"

Rows = dict[str, list[Row]]
"""The rows of one machine by benchmark."""


@dataclass(frozen=True)
class Point:
    """A ratio at one place, its bound, and what it must be.

    Args:
        where: length, case.
        ratio: measured; None where it is not.
        bound: what leaving work out gives at equal efficiency; None where no formula says it.
        least: what is to be reached.
    """

    where: str
    ratio: float | None
    bound: float | None
    least: float


@dataclass(frozen=True)
class Target:
    """Something that must be reached everywhere it is looked at.

    Args:
        name: as on the page.
        points: from the rows of one GPU; one without a ratio where nothing is measured.
    """

    name: str
    points: Callable[[Rows], list[Point]]


# ---------------------------------------------------------------------------------------------------------
# targets


def _attention(
    over: str, shapes: Sequence[str], lengths: Sequence[int], share: float = 0.0, least: float = 1.0
) -> Callable[[Rows], list[Point]]:
    """Forward and backward of ours over another: at least `share` of the FLOP bound, and at least `least`."""

    def points(rows: Rows) -> list[Point]:
        newest = {}
        for row in rows.get("attention", []):
            if row.get("device") == "cuda" and row["pass"] == PASSES[1] and row["seconds"]:
                newest[shape_name(row), row["seq_length"], row["implementation"]] = row["seconds"]["median"]
        found = []
        for shape in shapes:
            for tokens in lengths:
                ours, other = (newest.get((shape, tokens, name)) for name in ("s2-triton", over))
                case, sparse = Case(SHAPES[shape], tokens, "cuda"), IMPLEMENTATIONS[over].pattern
                flops = [case.flops(pattern)[PASSES[1]] for pattern in (sparse(case), case.pattern)]
                bound = flops[0] / flops[1]
                ratio = other / ours if ours and other else None
                found.append(Point(f"{tokens} ({shape})", ratio, bound, max(least, share * bound)))
        return found

    return points


def _step(rows: Rows) -> list[Point]:
    model = MODELS["cuda"]
    models = training_step_report.by_model(rows.get("step", []))
    ours = [newest for newest in models if next(iter(newest.values()))["model"] == vars(model)]
    dense, found = sum(step_flops(model, "dense", LONG).values()), []
    for case in ("s2-first-two-dense", "s2"):
        row = next((newest[LONG, case] for newest in ours if (LONG, case) in newest), None)
        ratio = training_step_report.speedup(ours[0], row) if row else None
        bound = dense / sum(step_flops(model, case, LONG).values())
        found.append(Point(f"{LONG} ({case})", ratio, bound, 6))
    return found


def _decoded(rows: Rows) -> dict[str, Row]:
    """The newest rows at the long context on a GPU, by implementation."""
    of_gpu = [
        row
        for row in rows.get("decode", [])
        if row["device"] == "cuda" and row["seq_length"] == LONG and row["seconds_per_token"]
    ]
    return {row["implementation"]: row for row in of_gpu}


def _decode(rows: Rows) -> list[Point]:
    """Ours over the faster of the dense ones."""
    ours, *dense = (_decoded(rows).get(name) for name in ("s2-cache", "sdpa", "sdpa-grouped"))
    ratio = None
    if ours and all(dense):
        fastest = min(row["seconds_per_token"]["median"] for row in dense)
        ratio = fastest / ours["seconds_per_token"]["median"]
    case = Case(DECODE_SHAPES["cuda"], LONG, "cuda")
    kept, all_kept = (closed_form_bytes(case, sparse, LONG) for sparse in (True, False))
    return [Point(str(LONG), ratio, all_kept / kept, 10)]


def _decode_memory(rows: Rows) -> list[Point]:
    """The formula's bytes over those that are kept."""
    ours = _decoded(rows).get("s2-cache")
    ratio = ours["closed_form_bytes"] / ours["cache_bytes"]["kept"] if ours else None
    return [Point(str(LONG), ratio, 1.0, 1)]


def _offload(peers: Sequence[str], least: float) -> Callable[[Rows], list[Point]]:
    """Ours, with the fraction that the model chooses, over the fastest of `peers`, where all are measured."""

    def points(rows: Rows) -> list[Point]:
        found = []
        of_gpu = [row for row in rows.get("offload", []) if row["device"] == "cuda" and row["gpu_memory_gb"]]
        for newest in offload_report.by_setting(of_gpu):
            for accumulation in sorted({n for n, _ in newest}):
                times = [
                    offload_report.median(newest.get((accumulation, name)))
                    for name in ("s2-auto-flush", *peers)
                ]
                ratio = min(times[1:]) / times[0] if all(times) else None
                limit = next(iter(newest.values()))["gpu_memory_gb"]
                where = f"accumulation {accumulation} in {limit:g} GB"
                found.append(Point(where, ratio, None, least))
        return found or [Point("a state that does not fit beside the model", None, None, least)]

    return points


_FROM_16K = [n for n in DEFAULT_LENGTHS["cuda"] if n >= 16384]
_SHAPES = DEFAULT_SHAPES["cuda"]
TARGETS = (
    Target(
        "attention forward + backward over SDPA flash: at least the FLOP bound",
        _attention("sdpa-flash", _SHAPES, _FROM_16K, share=1.0),
    ),
    Target(
        "attention forward + backward over cuDNN: at least 0.6 of the FLOP bound",
        _attention("sdpa-cudnn", _SHAPES, _FROM_16K, share=0.6),
    ),
    Target(
        "attention forward + backward over FlexAttention on the identical mask: faster",
        _attention("flex", _SHAPES, _FROM_16K),
    ),
    Target(
        f"attention forward + backward at {LONG}, block 64, window 8, stride 64, over SDPA flash: 25.3x",
        _attention("sdpa-flash", ["stride-64"], [LONG], least=25.3),
    ),
    Target(f"training step of the 1.3B model at {LONG} over dense: 6x", _step),
    Target(f"a decoded token's attention at {LONG} over dense: 10x", _decode),
    Target(f"bytes of the cache at {LONG}: those of the formula", _decode_memory),
    Target("step with offload over HybridDeviceOptimizer: 2.5x", _offload(["hybrid"], 2.5)),
    Target(
        "step with offload over the best of its overlapped form, pure streaming and stride 2: 1.3x",
        _offload(["hybrid-overlap", "s2-1-flush", "s2-0.5-flush"], 1.3),
    ),
)


def target_line(target: Target, rows: Rows) -> str:
    """A line of the table: the weakest place that is measured, its bound, and the verdict on all."""
    points = target.points(rows)
    measured = [point for point in points if point.ratio is not None]
    if not measured:
        beyond = all(point.bound and point.bound < point.least for point in points)
        note = "; more is asked than leaving work out gives" if beyond else ""
        return f"| {target.name} | not measured | {bounds(points)} | not measured{note} |"
    weakest = min(measured, key=lambda point: point.ratio / point.least)
    shown = f"{weakest.ratio:.2f}x at {weakest.where}"
    return f"| {target.name} | {shown} | {bounds([weakest])} | {verdict(points)} |"


def bounds(points: Sequence[Point]) -> str:
    """The bounds of some places, as one text."""
    found = sorted(
        {f"{point.bound:.2f}x": point.bound for point in points if point.bound}.items(), key=_second
    )
    return " to ".join(dict.fromkeys((found[0][0], found[-1][0]))) if found else "no formula"


def verdict(points: Sequence[Point]) -> str:
    """Met, or by how much not and what forbids it; and how much of it is measured."""
    missed = [point for point in points if point.ratio is not None and point.ratio < point.least]
    absent = [point.where for point in points if point.ratio is None]
    text = f"met where measured ({len(points) - len(absent)} of {len(points)})" if absent else "met"
    if missed:
        worst = min(missed, key=lambda point: point.ratio / point.least)
        share = 1 - worst.ratio / worst.least
        text = f"missed by {share:.1%} at {worst.where}, where {worst.least:.2f}x was to be reached"
        if worst.bound and worst.bound < worst.least:
            text += f"; leaving work out gives {worst.bound:.2f}x at equal efficiency"
    return text + (f"; not measured at {', '.join(absent)}" if absent else "")


def _second(item: tuple[str, float]) -> float:
    return item[1]


# ---------------------------------------------------------------------------------------------------------
# the page


def page(results: Path, link: str) -> str:
    """The whole page, from the rows in a directory and nothing else.

    Args:
        link: the directory, as the page's links name it.
    """
    machines: dict[str, Rows] = {}
    for name in (*BENCHMARKS, "record"):
        for machine, rows in read_rows(results, name).items():
            # What draws and writes has no result, and its rows come after the page.
            if rows := [row for row in rows if row.get("stage") not in DRAWING]:
                machines.setdefault(machine.name, {})[name] = rows
    gpus = {name: rows for name, rows in machines.items() if _gpu(rows)}
    parts = [_INTRO.format(results=link), "## Targets on one GPU (H200 class)\n", _BOUNDS]
    if not gpus:
        parts += [_NO_GPU, _targets({})]
    for rows in gpus.values():
        parts += [f"### {_gpu(rows)}\n", _targets(rows)]
    for name in (*gpus, *(name for name in sorted(machines) if name not in gpus)):
        pictures = sorted((results / name).glob("*.png"))
        parts += _machine(name, machines[name])
        parts += [f"![{picture.stem}]({link}/{name}/{picture.name})\n" for picture in pictures]
    return "\n".join(parts).rstrip() + "\n"


def _gpu(rows: Rows) -> str | None:
    """Its name, where rows were measured on one."""
    return next((row["machine"].get("gpu") for of_one in rows.values() for row in of_one), None)


def _targets(rows: Rows) -> str:
    lines = ["| target | measured, where weakest | bound | verdict |", "|---|---|---|---|"]
    return "\n".join([*lines, *(target_line(target, rows) for target in TARGETS)]) + "\n"


def _where_from(rows: Rows) -> str:
    """Versions and commits of a machine's rows, one line for each that differs."""
    found = {}
    for name, of_one in rows.items():
        for row in of_one:
            versions = ", ".join(
                f"{package} {version}" for package, version in row["versions"].items() if version
            )
            commit, dirty = row["commit"]["hash"], row["commit"]["dirty"]
            text = (
                f"{versions}; commit {commit[:9] if commit else 'unknown'}{' and changes' if dirty else ''}"
            )
            found.setdefault(text, []).append(name)
    return "\n".join(f"- {', '.join(dict.fromkeys(names))}: {text}" for text, names in found.items()) + "\n"


def _machine(name: str, rows: Rows) -> list[str]:
    """The tables of a machine's rows, as the benchmarks print them."""
    gpu, machine = _gpu(rows), next(iter(rows.values()))[0]["machine"]
    kind = (
        gpu or f"{machine['cpu']}, {machine['cores']} cores. No GPU: nothing below says anything about one."
    )
    parts = [f"## {name}\n", f"{kind}\n", _where_from(rows)]
    for benchmark, of_one in rows.items():
        table = _stages(of_one) if benchmark == "record" else BENCHMARKS[benchmark].table(of_one)
        parts += [f"### {benchmark}, on {name}\n", f"```text\n{table}\n```\n"]
    return parts


def _stages(rows: list[Row]) -> str:
    """What became of each stage last."""
    newest = {row["stage"]: row for row in rows}
    return "\n".join(
        f"{name:<20} {row['result']:<13} {row['seconds']:>7.1f} s  {row['reason'] or ''}".rstrip()
        for name, row in newest.items()
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="directory of the rows")
    parser.add_argument("--page", type=Path, default=PAGE, help="file to write (default: docs/results.md)")
    args = parser.parse_args(argv)
    link = os.path.relpath(args.results, args.page.parent)
    args.page.write_text(page(args.results, link), encoding="utf-8")
    print(args.page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
