"""Targets on one GPU, each a ratio that must be reached, and the verdict of the stored rows on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks import display, offload, training_step
from benchmarks.benchmark import Row
from benchmarks.cases import DEFAULT_LENGTHS, DEFAULT_SHAPES, PASSES, SHAPES, Case, shape_name
from benchmarks.decode import DEFAULT_SHAPES as DECODE_SHAPES
from benchmarks.decode import closed_form_bytes
from benchmarks.implementations import IMPLEMENTATIONS

LONG = 131072

Rows = dict[str, list[Row]]
"""Rows of one machine by benchmark."""


@dataclass(frozen=True)
class Point:
    """A ratio at one place."""

    where: str
    ratio: float | None  # None if it is not measured
    bound: (
        float | None
    )  # ratio at equal efficiency, by the work that is left out; None if there is no formula
    least: float  # required ratio


@dataclass(frozen=True)
class Target:
    """A ratio that must be reached at several points; `points` computes them from the rows of a GPU."""

    name: str
    points: Callable[[Rows], list[Point]]

    def line(self, rows: Rows) -> str:
        """Returns a line of the page's table: the weakest measured point, its bound, the verdict on all."""
        points = self.points(rows)
        measured = [point for point in points if point.ratio is not None]
        if not measured:
            beyond = all(point.bound and point.bound < point.least for point in points)
            note = "; the target exceeds the bound" if beyond else ""
            return f"| {self.name} | not measured | {_bounds(points)} | not measured{note} |"
        weakest = min(measured, key=lambda point: point.ratio / point.least)
        ratio = f"{weakest.ratio:.2f}x at {weakest.where}"
        return f"| {self.name} | {ratio} | {_bounds([weakest])} | {_verdict(points, weakest)} |"


def _bounds(points: Sequence[Point]) -> str:
    """Formats the range of the points' bounds."""
    bounds = sorted(point.bound for point in points if point.bound)
    ends = dict.fromkeys(f"{bound:.2f}x" for bound in (*bounds[:1], *bounds[-1:]))
    return " to ".join(ends) or "no formula"


def _verdict(points: Sequence[Point], weakest: Point) -> str:
    """Says whether a target is met, by how much it is missed, and where it is not measured."""
    absent = [point.where for point in points if point.ratio is None]
    text = f"met where measured ({len(points) - len(absent)} of {len(points)})" if absent else "met"
    if weakest.ratio < weakest.least:
        share = 1 - weakest.ratio / weakest.least
        text = f"missed by {share:.1%} at {weakest.where}, where {weakest.least:.2f}x is required"
        if weakest.bound and weakest.bound < weakest.least:
            text += f"; the bound is {weakest.bound:.2f}x"
    return text + (f"; not measured at {', '.join(absent)}" if absent else "")


def _attention(
    over: str, shapes: Sequence[str], lengths: Sequence[int], share: float = 0.0, least: float = 1.0
) -> Callable[[Rows], list[Point]]:
    """Forward and backward of our attention over another: at least `share` of the bound by FLOPs, and at
    least `least`."""

    def point(newest: dict, shape: str, tokens: int) -> Point:
        ours, other = (newest.get((shape, tokens, name)) for name in ("s2-triton", over))
        case = Case(SHAPES[shape], tokens, "cuda")
        patterns = (IMPLEMENTATIONS[over].pattern(case), case.pattern)
        flops, our_flops = (case.flops(pattern)[PASSES[1]] for pattern in patterns)
        bound = flops / our_flops
        where = f"{tokens} ({shape})"
        return Point(where, display.speedup(ours, other), bound, max(least, share * bound))

    def points(rows: Rows) -> list[Point]:
        newest = {
            (shape_name(row), row["seq_length"], row["implementation"]): row
            for row in rows.get("attention", [])
            if row.get("device") == "cuda" and row["pass"] == PASSES[1] and row["seconds"]
        }
        return [point(newest, shape, tokens) for shape in shapes for tokens in lengths]

    return points


def _step(rows: Rows) -> list[Point]:
    """A training step of S2 over a dense one."""
    model = training_step.MODELS["cuda"]
    groups = training_step.by_model(rows.get("step", []))
    newest = next((x for x in groups if display.any_row(x)["model"] == vars(model)), {})
    flops = {case: training_step.step_flops(model, case, LONG) for case in training_step.CASES}
    return [
        Point(
            where=f"{LONG} ({case})",
            ratio=display.speedup(newest.get((LONG, case)), newest.get((LONG, "dense"))),
            bound=sum(flops["dense"].values()) / sum(flops[case].values()),
            least=6,
        )
        for case in ("s2-first-two-dense", "s2")
    ]


def _decoded(rows: Rows) -> dict[str, Row]:
    """Returns the newest rows of decoding on a GPU at the long context, by implementation."""
    return {
        row["implementation"]: row
        for row in rows.get("decode", [])
        if row["device"] == "cuda" and row["seq_length"] == LONG and row["seconds_per_token"]
    }


def _decode(rows: Rows) -> list[Point]:
    """Attention of a decoded token over the faster of the dense ones."""
    ours, *dense = (_decoded(rows).get(name) for name in ("s2-cache", "sdpa", "sdpa-grouped"))
    ratio = None
    if ours and all(dense):
        ratio = min(display.speedup(ours, row, "seconds_per_token") for row in dense)
    case = Case(DECODE_SHAPES["cuda"], LONG, "cuda")
    small, full = (closed_form_bytes(case, sparse, LONG) for sparse in (True, False))
    return [Point(str(LONG), ratio, full / small, 10)]


def _decode_memory(rows: Rows) -> list[Point]:
    """Bytes of the small cache by formula over those that are kept."""
    ours = _decoded(rows).get("s2-cache")
    ratio = ours["closed_form_bytes"] / ours["cache_bytes"]["kept"] if ours else None
    return [Point(str(LONG), ratio, 1.0, 1)]


def _offload(peers: Sequence[str], least: float) -> Callable[[Rows], list[Point]]:
    """A step of ours, with the fraction that the model chooses, over the fastest of `peers`."""

    def points(rows: Rows) -> list[Point]:
        limited = [row for row in rows.get("offload", []) if row["device"] == "cuda" and row["gpu_memory_gb"]]
        found = []
        for newest in offload.by_setting(limited):
            for accumulation in offload.accumulations(newest):
                ours = newest.get((accumulation, "s2-auto-flush"))
                ratios = [display.speedup(ours, newest.get((accumulation, peer))) for peer in peers]
                limit = display.any_row(newest)["gpu_memory_gb"]
                where = f"accumulation {accumulation} in {limit:g} GB"
                found.append(Point(where, min(ratios) if all(ratios) else None, None, least))
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
