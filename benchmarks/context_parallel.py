"""Context-parallel S2 attention on ranks of this machine: counted bytes and time of each schedule."""

from __future__ import annotations

import os
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks import display
from benchmarks.benchmark import Benchmark, Row, WrongResultError
from benchmarks.cases import DTYPES, Case, Shape, describe_shape
from benchmarks.environment import code_hash
from benchmarks.exactness import Reference, compared_rows
from benchmarks.local_ranks import LocalRanks
from benchmarks.measure import OtherLoad, interleaved_times, summary
from benchmarks.options import add_integers, add_names, require_positive
from benchmarks.results import newest_match
from megatron_s2 import S2Pattern
from megatron_s2.kernels.compare import Results
from megatron_s2.parallel.collectives import ContextParallelGroup
from megatron_s2.parallel.context_parallel_attention import context_parallel_attention
from megatron_s2.parallel.cost import AttentionCall, ExchangeBytes, exchange_bytes, pair_counts
from megatron_s2.parallel.layout import Zigzag

SHAPES = {
    "s2": Shape(S2Pattern(4, 64, 8, 16), batch=1, heads=8, head_dim=64, dtype="float32"),
    "dense": Shape(S2Pattern(4, 64, 8, 1), batch=1, heads=8, head_dim=64, dtype="float32"),
}
SCHEDULES = ("gather", "a2a")
MEGATRON = ("ring", "all_gather")
NOTE = (
    "Ranks of one machine share its cores and its memory: the times say what a schedule costs there, and "
    "measure no network. The bytes are exact, and the same on any network."
)
_QUERIES = 256
_CODE = ("megatron_s2/parallel/*.py", "benchmarks/context_parallel.py", "benchmarks/local_ranks.py")


def add_arguments(parser: ArgumentParser) -> None:
    text = "context-parallel ranks, a process each, on cuda a GPU each (default: 2,4)"
    add_integers(parser, "--ranks", "numbers of ranks, such as 2,4", text, [2, 4])
    text = "tokens over all ranks (default: %(default)s)"
    parser.add_argument("--seq-length", type=int, default=8192, metavar="N", help=text)
    text = f"any of {', '.join(SCHEDULES)} (default: both)"
    schedules = list(SCHEDULES)
    parser.add_argument("--schedules", type=_schedules, default=schedules, metavar="NAME,NAME", help=text)
    add_names(parser, "--cases", SHAPES, "shapes and patterns (default: all)", list(SHAPES))
    parser.add_argument("--repeats", type=int, default=5, help="timed runs (default: %(default)s)")


def _schedules(text: str) -> list[str]:
    names = text.split(",")
    if unknown := [name for name in names if name not in SCHEDULES]:
        raise ArgumentTypeError(f"{unknown[0]}: must be of {', '.join(SCHEDULES)}")
    return [name for name in SCHEDULES if name in names]


def require_options(args: Namespace) -> None:
    """Raises ValueError if an option is out of range, before any rank starts."""
    require_positive(repeats=args.repeats, seq_length=args.seq_length)
    heads = min(SHAPES[name].heads for name in args.cases)
    for ranks in args.ranks:
        if ranks < 2:
            raise ValueError(f"--ranks {ranks}: must be >= 2, one rank exchanges nothing")
        if args.seq_length % (2 * ranks):
            raise ValueError(
                f"--seq-length {args.seq_length}: must be a multiple of {2 * ranks} for --ranks {ranks}"
            )
        if "a2a" in args.schedules and ranks > heads:
            raise ValueError(
                f"--ranks {ranks}: must be at most {heads}, the query heads, for --schedules a2a"
            )
        if args.device == "cuda" and ranks > (gpus := torch.cuda.device_count()):
            raise ValueError(
                f"--ranks {ranks}: must be at most {gpus} with --device cuda, a GPU for each rank; "
                "--device cpu needs none"
            )


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Yields the rows of one number of ranks and one case after another.

    The schedules of a case are timed in turns, and all again if the rows of one are not stored.
    """
    require_options(args)
    cases = {name: Case(SHAPES[name], args.seq_length, args.device) for name in args.cases}
    code, references = code_hash(_CODE), {}
    for count in args.ranks:
        threads = max(1, args.threads // count)
        settings = {
            name: {
                "ranks": count,
                "case": name,
                **case.row(),
                "threads_per_rank": threads,
                "parallel_code": code,
            }
            for name, case in cases.items()
        }
        missing = {
            name: setting
            for name, setting in settings.items()
            if not all(newest_match(stored, setting | {"schedule": x}) for x in args.schedules)
        }
        if not missing:
            continue
        with LocalRanks(count, args.device, threads) as ranks:
            for name, setting in missing.items():
                references[name] = references.get(name) or reference_of(cases[name])
                rows = measure(ranks, cases[name], references[name], args.schedules, args.repeats)
                yield from (setting | row for row in rows)


def measure(
    ranks: LocalRanks, case: Case, reference: Reference, schedules: list[str], repeats: int
) -> Iterator[Row]:
    """Checks results and bytes of every schedule, then times all of them, and yields their rows."""
    counted = {schedule: checked_bytes(ranks, case, reference, schedule) for schedule in schedules}
    with OtherLoad() as load:
        timed = ranks.call(timed_runs, case, schedules, repeats)
    own_seconds = sum(cpu_seconds for _, cpu_seconds in timed)
    pattern, call = case.pattern, attention_call(case, ranks.count)
    for schedule in schedules:
        slowest = np.max([seconds[schedule] for seconds, _ in timed], axis=0)
        yield {
            "schedule": schedule,
            "compared_queries": len(reference.rows),
            "bytes": [vars(rank_bytes) for rank_bytes in counted[schedule]],
            "predicted_bytes": [vars(x) for x in predicted_bytes(schedule, case, ranks.count)],
            "megatron_bytes": {name: vars(exchange_bytes(name, pattern, call, rank=0)) for name in MEGATRON},
            "imbalance": pair_counts(schedule, pattern, call).imbalance,
            "other_cpus": load.cpus(own_seconds),
            "seconds": summary(slowest),
            "note": NOTE,
        }


def attention_call(case: Case, ranks: int) -> AttentionCall:
    shape = case.shape
    return AttentionCall(
        ranks=ranks,
        tokens=case.seq_length,
        batch=shape.batch,
        query_heads=shape.heads,
        head_dim=shape.head_dim,
        v_head_dim=shape.head_dim,
        element_size=DTYPES[shape.dtype].itemsize,
    )


def predicted_bytes(schedule: str, case: Case, ranks: int) -> list[ExchangeBytes]:
    """Returns the planner's prediction for every rank."""
    call = attention_call(case, ranks)
    return [exchange_bytes(schedule, case.pattern, call, rank) for rank in range(ranks)]


def reference_of(case: Case) -> Reference:
    *inputs, dout = case.inputs()
    rows = compared_rows(case.seq_length, _QUERIES)
    return Reference.of(inputs, dout[:, rows], case.pattern, rows)


def checked_bytes(ranks: LocalRanks, case: Case, reference: Reference, schedule: str) -> list[ExchangeBytes]:
    """Runs a schedule once, forward and backward, and returns the bytes that each rank counted.

    Raises:
        WrongResultError: results are not those of one rank, or bytes are not those that were predicted.
    """
    parts = ranks.call(run_once, case, schedule, reference.rows)
    where = f"{schedule} on {ranks.count} ranks at {case.seq_length} tokens"
    got = joined([results for results, _ in parts], case.seq_length)
    got["out"] = got["out"][:, reference.rows]
    try:
        reference.require({name: x.to(case.device) for name, x in got.items()})
    except AssertionError as error:
        raise WrongResultError(f"{where}: {error}") from error
    counted = [rank_bytes for _, rank_bytes in parts]
    for rank, (count, predicted) in enumerate(zip(counted, predicted_bytes(schedule, case, ranks.count))):
        if count != predicted:
            raise WrongResultError(f"{where}: rank {rank} counted {count}, predicted are {predicted}")
    return counted


def joined(parts: list[Results], tokens: int) -> Results:
    """Joins the results of all ranks, `[batch, local seq, ...]`, to those of the whole sequence."""
    zigzag = Zigzag(len(parts), tokens)
    order = torch.cat([torch.as_tensor(zigzag.positions(rank)) for rank in range(len(parts))])
    rows = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    return {name: torch.empty_like(x).index_copy_(1, order, x) for name, x in rows.items()}


# Functions that run on each rank.


def _local_inputs(case: Case, rows: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """Returns this rank's q, k and v, which require gradients, and its part of the output's gradient, which
    is 0 outside of `rows` if these are given."""
    zigzag = Zigzag(dist.get_world_size(), case.seq_length)
    positions = torch.as_tensor(zigzag.positions(dist.get_rank()), device=case.device)
    *inputs, dout = case.inputs()
    if rows is not None:
        rows = rows.to(case.device)
        dout = torch.zeros_like(dout).index_copy_(1, rows, dout[:, rows])
    return [x.detach()[:, positions].requires_grad_() for x in inputs], dout[:, positions]


def run_once(case: Case, schedule: str, rows: Tensor) -> tuple[Results, ExchangeBytes]:
    """Returns this rank's part of the results of a loss that depends on `rows` only, and the bytes it
    counted."""
    group = ContextParallelGroup(dist.group.WORLD)
    inputs, dout = _local_inputs(case, rows)
    traffic = group.traffic
    out = context_parallel_attention(*inputs, case.pattern, group, schedule)
    received, sent = traffic.received[group.layer], traffic.sent[group.layer]
    gradients = torch.autograd.grad(out, inputs, dout)
    results = {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients))}
    counted = ExchangeBytes(
        forward_received=received,
        forward_sent=sent,
        backward_received=traffic.received[group.layer] - received,
        backward_sent=traffic.sent[group.layer] - sent,
    )
    return {name: x.cpu() for name, x in results.items()}, counted


def timed_runs(case: Case, schedules: list[str], repeats: int) -> tuple[dict[str, np.ndarray], float]:
    """Returns this rank's seconds of forward and backward by schedule, `[repeats]`, and its CPU seconds."""
    inputs, dout = _local_inputs(case)

    def stages(schedule: str) -> Iterator[None]:
        dist.barrier()
        yield
        out = context_parallel_attention(
            *inputs, case.pattern, ContextParallelGroup(dist.group.WORLD), schedule
        )
        torch.autograd.grad(out, inputs, dout)
        if case.device == "cuda":
            torch.cuda.synchronize()
        yield

    before = os.times()
    times = interleaved_times({schedule: partial(stages, schedule) for schedule in schedules}, repeats)
    after = os.times()
    cpu_seconds = after.user + after.system - before.user - before.system
    return {schedule: seconds[:, 1] - seconds[:, 0] for schedule, seconds in times.items()}, cpu_seconds


# Tables and pictures.

_SETTING = ("case", "seq_length", "batch", "heads", "kv_heads", "head_dim", "dtype", "device", "pattern")
_COLUMNS = display.columns(
    ("ranks", "", "forward", "backward", "work max/mean", "median", "p20", "p80"),
    ">5 <10 >9 >9 >14 >11 >11 >11",
)
_DIRECTIONS = ("forward", "backward")
_STYLES = {
    "gather": {"label": "gather, counted", "color": "#12355b", "marker": "o"},
    "a2a": {"label": "a2a, counted", "color": "#f28c28", "marker": "s"},
    "ring": {"label": "Megatron's ring, by formula", "color": "#3c9d6b", "marker": "^"},
    "all_gather": {"label": "Megatron's all-gather, by formula", "color": "#333333", "marker": "x"},
}
_STYLES["ring"] |= {"markersize": 11, "linewidth": 6, "alpha": 0.4}  # seen behind the all-gather
_STYLES["all_gather"] |= {"linestyle": ":"}


def _describe(row: Row) -> str:
    return f"{row['case']}: {row['seq_length']} tokens, {describe_shape(row)}"


def _received(row: Row, schedule: str) -> list[float]:
    """Returns the MiB that the busiest rank receives forward and backward: counted for the row's schedule, by
    formula for one of Megatron's."""
    counts = [row["megatron_bytes"][schedule]] if schedule in MEGATRON else row["bytes"]
    return [max(count[f"{direction}_received"] for count in counts) / 2**20 for direction in _DIRECTIONS]


def table(rows: list[Row]) -> str:
    lines = ["MiB that the busiest rank receives; time of forward and backward on the slowest rank"]
    for newest in display.newest_rows(rows, _SETTING, ("ranks", "schedule")):
        cells = []
        for ranks in dict.fromkeys(ranks for ranks, _ in newest):
            measured = {name: newest[ranks, name] for name in SCHEDULES if (ranks, name) in newest}
            for name, row in measured.items():
                times = display.milliseconds(row["seconds"])
                cells.append([ranks, name, *_mebibytes(row, name), f"{row['imbalance']:.3f}", *times])
            for name in MEGATRON:
                row = next(iter(measured.values()))
                cells.append([ranks, name, *_mebibytes(row, name), f"{'by formula, not run':>29}"])
        lines += [_describe(display.any_row(newest)), *display.format_table(_COLUMNS, cells)]
    lines += display.load_notes(rows, lambda row: f"{row['case']}, {row['ranks']} ranks, {row['date']}")
    return "\n".join([*lines, NOTE])


def _mebibytes(row: Row, schedule: str) -> list[str]:
    return [f"{size:.2f}" for size in _received(row, schedule)]


def plot(rows: list[Row], directory: Path) -> list[Path]:
    """Draws one picture: bytes received by the busiest rank over the number of ranks, a panel per shape."""
    shapes = display.newest_rows(rows, _SETTING, ("ranks", "schedule"))
    path = directory / "context-parallel.png"
    with display.picture(path, (5.5 * len(shapes), 4.2), (1, len(shapes))) as axes:
        for axis, newest in zip(axes[0], shapes):
            for schedule in (*SCHEDULES, *MEGATRON):
                points = {
                    ranks: sum(_received(row, schedule))
                    for (ranks, name), row in newest.items()
                    if schedule in (name, *MEGATRON)
                }
                if points:
                    axis.plot(*zip(*points.items()), **_STYLES[schedule])
            ranks = sorted({ranks for ranks, _ in newest})
            axis.set_xticks(ranks, map(str, ranks))
            axis.set(xlabel="ranks", ylabel="MiB received, forward and backward")
            axis.set_ylim(0, 1.1 * axis.get_ylim()[1])
            axis.set_title(_describe(display.any_row(newest)).replace("; ", "\n"), fontsize=8)
            axis.grid(alpha=0.3)
            axis.legend(fontsize=8)
    return [path]


BENCHMARK = Benchmark(
    name="context-parallel", help=__doc__, add_arguments=add_arguments, run=run, table=table, plot=plot
)
