"""Context-parallel S2 attention on ranks of this machine: counted bytes and time of each schedule."""

from __future__ import annotations

import hashlib
import os
import signal
import tempfile
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from functools import partial

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from benchmarks import context_parallel_report
from benchmarks.benchmark import Benchmark, Row, WrongResultError
from benchmarks.cases import DTYPES, Case, Shape
from benchmarks.context_parallel_report import MEGATRON, NOTE, SCHEDULES
from benchmarks.environment import ROOT
from benchmarks.exactness import visible_keys
from benchmarks.measure import Company, interleaved_times, summary
from megatron_s2 import S2Pattern, s2_attention
from megatron_s2.kernels.compare import Results, attention_results, require_as_exact_as_plain
from megatron_s2.kernels.reference import masked_attention
from megatron_s2.parallel.context_parallel_attention import context_parallel_attention
from megatron_s2.parallel.cost import AttentionCall, ExchangeBytes, attention_work, exchange_bytes
from megatron_s2.parallel.exchange import Exchange
from megatron_s2.parallel.layout import Zigzag

SHAPES = {
    "s2": Shape(S2Pattern(4, 64, 8, 16), batch=1, heads=8, head_dim=64, dtype="float32"),
    "dense": Shape(S2Pattern(4, 64, 8, 1), batch=1, heads=8, head_dim=64, dtype="float32"),
}
_QUERIES = 256
_CODE = ("megatron_s2/parallel/*.py", "benchmarks/context_parallel.py")


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--ranks",
        type=_numbers,
        default=[2, 4],
        metavar="P,P,…",
        help="context-parallel ranks, a process each (on cuda a GPU each); default 2,4",
    )
    parser.add_argument(
        "--seq-length",
        type=int,
        default=8192,
        metavar="N",
        help="tokens over all ranks (default %(default)s)",
    )
    parser.add_argument(
        "--schedules",
        type=_schedules,
        default=list(SCHEDULES),
        metavar="NAME,NAME",
        help=f"of {', '.join(SCHEDULES)} (default: both)",
    )
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=SHAPES,
        default=list(SHAPES),
        metavar="NAME",
        help=f"fixed shapes and patterns: {', '.join(SHAPES)} (default: all)",
    )
    parser.add_argument("--repeats", type=int, default=5, help="timed runs (default: %(default)s)")


def _numbers(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"{text}: must be numbers of ranks, such as 2,4") from None


def _schedules(text: str) -> list[str]:
    names = text.split(",")
    if wrong := [name for name in names if name not in SCHEDULES]:
        raise ArgumentTypeError(f"{wrong[0]}: must be of {', '.join(SCHEDULES)}")
    return [name for name in SCHEDULES if name in names]


def require_options(args: Namespace) -> None:
    """Refuses what cannot be run, before any rank starts.

    Raises:
        ValueError: naming the flag whose value does not fit.
    """
    if args.repeats < 1:
        raise ValueError(f"--repeats {args.repeats}: must be >= 1")
    if args.seq_length < 1:
        raise ValueError(f"--seq-length {args.seq_length}: must be >= 1")
    for ranks in args.ranks:
        if ranks < 2:
            raise ValueError(f"--ranks {ranks}: must be >= 2, one rank exchanges nothing")
        if args.seq_length % (2 * ranks):
            raise ValueError(
                f"--seq-length {args.seq_length}: must be a multiple of {2 * ranks} for --ranks {ranks}"
            )
        heads = min(SHAPES[name].heads for name in args.cases)
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
    """Rows of one number of ranks and one case at a time: its schedules are timed in turns.

    What is stored of some of the schedules only is therefore measured again with the others.
    """
    require_options(args)
    cases = {name: Case(SHAPES[name], args.seq_length, args.device) for name in args.cases}
    references = {}
    for count in args.ranks:
        threads = max(1, args.threads // count)
        shared = {
            name: {
                "ranks": count,
                "case": name,
                **case.row(),
                "threads_per_rank": threads,
                "parallel_code": parallel_code(),
            }
            for name, case in cases.items()
        }
        missing = [name for name in cases if not _all_stored(shared[name], args.schedules, stored)]
        if not missing:
            continue
        with LocalRanks(count, args.device, threads) as ranks:
            for name in missing:
                references[name] = references.get(name) or Reference.of(cases[name])
                rows = measure(ranks, cases[name], references[name], args.schedules, args.repeats)
                yield from (shared[name] | row for row in rows)


def _all_stored(shared: Row, schedules: list[str], stored: list[Row]) -> bool:
    found = {row["schedule"] for row in stored if all(row.get(key) == value for key, value in shared.items())}
    return found >= set(schedules)


def parallel_code() -> str:
    """A hash of the measured code that `environment.commit` does not count: that of context parallelism."""
    files = sorted(path for pattern in _CODE for path in ROOT.glob(pattern))
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()[:16]


# ---------------------------------------------------------------------------------------------------------
# ranks


class LocalRanks:
    """Processes of this machine that make up one process group: gloo, on CUDA NCCL with a GPU each.

    They end with the block, however that ends, and by themselves when this process is gone.
    """

    def __init__(self, count: int, device: str, threads: int) -> None:
        self.count = count
        self._device = device
        self._threads = threads
        self._processes: list[mp.Process] = []
        self._pipes = []

    def __enter__(self) -> LocalRanks:
        context = mp.get_context("spawn")
        self._directory = tempfile.TemporaryDirectory()
        for rank in range(self.count):
            here, there = context.Pipe()
            setup = rank, self.count, self._device, self._threads, f"{self._directory.name}/store"
            process = context.Process(target=_serve, args=(there, *setup), daemon=True)
            process.start()
            there.close()
            self._processes.append(process)
            self._pipes.append(here)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        self._directory.cleanup()

    def call(self, function: Callable, *arguments) -> list:
        """`function(*arguments)` on every rank: what each returned, in order.

        Raises:
            RuntimeError: a rank raised, which it says on stderr, or died; the message names it.
        """
        results = []
        for pipe in self._pipes:
            pipe.send((function, arguments))
        for rank, pipe in enumerate(self._pipes):
            try:
                results.append(pipe.recv())
            except (EOFError, ConnectionResetError):
                raise RuntimeError(f"local rank {rank} ended before its work was done") from None
        return results


def _serve(pipe, rank: int, ranks: int, device: str, threads: int, store: str) -> None:
    # Ctrl-C goes to all processes: the first one ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(threads)
    if device == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if device == "cuda" else "gloo",
        store=dist.FileStore(store, ranks),
        rank=rank,
        world_size=ranks,
        timeout=timedelta(minutes=10),
    )
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        pipe.send(function(*arguments))


# ---------------------------------------------------------------------------------------------------------
# what is measured


def measure(
    ranks: LocalRanks, case: Case, reference: Reference, schedules: list[str], repeats: int
) -> Iterator[Row]:
    """Checks results and bytes of every schedule, then times all, then gives their rows.

    Raises:
        WrongResultError: a schedule computes something else than one rank does, or moves other bytes than
            predicted.
    """
    moved = {schedule: checked_bytes(ranks, case, reference, schedule) for schedule in schedules}
    start = time.perf_counter()
    with Company() as company:
        timed = ranks.call(timed_runs, case, schedules, repeats)
    elapsed = time.perf_counter() - start
    own = sum(cpu_seconds for _, cpu_seconds in timed) / elapsed
    pattern, call = case.pattern, attention_call(case, ranks.count)
    for schedule in schedules:
        slowest = np.max([seconds[schedule] for seconds, _ in timed], axis=0)
        yield {
            "schedule": schedule,
            "compared_queries": len(reference.rows),
            "bytes": [vars(counted) for counted in moved[schedule]],
            "predicted_bytes": [vars(x) for x in predicted_bytes(schedule, case, ranks.count)],
            "megatron_bytes": {name: vars(exchange_bytes(name, pattern, call, rank=0)) for name in MEGATRON},
            "imbalance": attention_work(schedule, pattern, call).imbalance,
            "other_cpus": company.cpus and round(max(0.0, company.cpus - own), 2),
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
    """The planner's prediction for every rank."""
    call = attention_call(case, ranks)
    return [exchange_bytes(schedule, case.pattern, call, rank) for rank in range(ranks)]


def checked_bytes(ranks: LocalRanks, case: Case, reference: Reference, schedule: str) -> list[ExchangeBytes]:
    """Bytes that every rank counted in one forward and backward whose results are right.

    Raises:
        WrongResultError: results or bytes are wrong; says which and by how much.
    """
    parts = ranks.call(one_run, case, schedule, reference.rows)
    who = f"{schedule} on {ranks.count} ranks at {case.seq_length} tokens"
    try:
        reference.require(joined([results for results, _ in parts], case.seq_length))
    except AssertionError as error:
        raise WrongResultError(f"{who}: {error}") from error
    counted = [moved for _, moved in parts]
    for rank, (got, predicted) in enumerate(zip(counted, predicted_bytes(schedule, case, ranks.count))):
        if got != predicted:
            raise WrongResultError(f"{who}: rank {rank} counted {got}, predicted are {predicted}")
    return counted


@dataclass(frozen=True)
class Reference:
    """What one rank computes for the same inputs, by `s2_attention` in float64, and how exact plain PyTorch
    is there. The loss depends on the queries at `rows` only, so that plain PyTorch is affordable."""

    rows: Tensor
    plain: Results
    exact: Results

    @classmethod
    def of(cls, case: Case) -> Reference:
        # Not the first query: it sees one key, so its exact gradient is 0 and all else is rounding.
        rows = torch.linspace(0, case.seq_length - 1, _QUERIES + 1)[1:].round().long().unique()
        visible = visible_keys(case.pattern, rows, case.seq_length).to(case.device)
        *inputs, dout = case.inputs()
        rows = rows.to(case.device)

        def plain(q, k, v, _):
            return masked_attention(q[:, rows], k, v, visible, case.shape.head_dim**-0.5, None)

        def one_rank(q, k, v, _):
            out = s2_attention(q, k, v, case.pattern, return_lse=False)
            return out[:, rows], out.new_empty(0)

        def results(attention, dtype: torch.dtype) -> Results:
            tensors = (x.detach().to(dtype) for x in inputs)
            found = attention_results(attention, *tensors, None, dout[:, rows], None)
            return {name: x.cpu() for name, x in found.items() if name != "lse"}

        exact = results(one_rank, torch.float64)
        return cls(rows.cpu(), results(plain, DTYPES[case.shape.dtype]), exact)

    def require(self, got: Results) -> None:
        """Raises AssertionError where results are further off than the house's rule allows."""
        require_as_exact_as_plain(got | {"out": got["out"][:, self.rows]}, self.plain, self.exact)


def joined(parts: list[Results], tokens: int) -> Results:
    """The results of all ranks as those of one."""
    zigzag = Zigzag(len(parts), tokens)
    order = torch.cat([torch.as_tensor(zigzag.positions(rank)) for rank in range(len(parts))])
    rows = {name: torch.cat([part[name] for part in parts], 1) for name in parts[0]}
    return {name: torch.empty_like(x).index_copy_(1, order, x) for name, x in rows.items()}


# On each rank.


def _local_inputs(case: Case, rows: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """This rank's q, k and v, which need gradients, and the output's gradient: 0 but at `rows`."""
    zigzag = Zigzag(dist.get_world_size(), case.seq_length)
    mine = torch.as_tensor(zigzag.positions(dist.get_rank()), device=case.device)
    *inputs, dout = case.inputs()
    if rows is not None:
        rows = rows.to(case.device)
        dout = torch.zeros_like(dout).index_copy_(1, rows, dout[:, rows])
    return [x.detach()[:, mine].requires_grad_() for x in inputs], dout[:, mine]


def one_run(case: Case, schedule: str, rows: Tensor) -> tuple[Results, ExchangeBytes]:
    """This rank's part of the results and the bytes it counted, when the loss depends on `rows` only."""
    exchange = Exchange(dist.group.WORLD)
    inputs, dout = _local_inputs(case, rows)
    traffic = exchange.traffic
    out = context_parallel_attention(*inputs, case.pattern, exchange, schedule)
    received, sent = traffic.received[exchange.layer], traffic.sent[exchange.layer]
    gradients = torch.autograd.grad(out, inputs, dout)
    results = {"out": out.detach(), **dict(zip(("dq", "dk", "dv"), gradients))}
    moved = ExchangeBytes(
        forward_received=received,
        forward_sent=sent,
        backward_received=traffic.received[exchange.layer] - received,
        backward_sent=traffic.sent[exchange.layer] - sent,
    )
    return {name: x.cpu() for name, x in results.items()}, moved


def timed_runs(case: Case, schedules: list[str], repeats: int) -> tuple[dict[str, np.ndarray], float]:
    """This rank's seconds for forward and backward by schedule, `[repeats]`, and its CPU seconds for all."""
    inputs, dout = _local_inputs(case)

    def stages(schedule: str) -> Iterator[None]:
        dist.barrier()
        yield
        out = context_parallel_attention(*inputs, case.pattern, Exchange(dist.group.WORLD), schedule)
        torch.autograd.grad(out, inputs, dout)
        if case.device == "cuda":
            torch.cuda.synchronize()
        yield

    before = os.times()
    times = interleaved_times({schedule: partial(stages, schedule) for schedule in schedules}, repeats)
    after = os.times()
    used = after.user + after.system - before.user - before.system
    return {schedule: seconds[:, 1] - seconds[:, 0] for schedule, seconds in times.items()}, used


BENCHMARK = Benchmark(
    name="context-parallel",
    help=__doc__,
    add_arguments=add_arguments,
    run=run,
    table=context_parallel_report.table,
    plot=context_parallel_report.plot,
    takes_device=True,
)
