"""S2 attention against dense causal attention and others: forward and backward on the same inputs."""

from __future__ import annotations

import gc
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from triton import TritonError

from benchmarks import attention_report
from benchmarks.benchmark import WRONG, Benchmark, Row, WrongResultError, require_none_wrong
from benchmarks.cases import (
    DEFAULT_LENGTHS,
    DEFAULT_SHAPES,
    DTYPES,
    PASSES,
    SHAPES,
    Case,
    Shape,
    shape_name,
)
from benchmarks.exactness import check
from benchmarks.implementations import IMPLEMENTATIONS, Attention, Implementation, names_on
from benchmarks.measure import Company, cuda_peak_memory, cuda_times, interleaved_times, peak_memory, summary

OUT_OF_MEMORY = "out of memory"
_FAILED = "failed: "
_BROKEN = "CUDA error"  # after it the process can do nothing on the GPU
# What kernels raise that were written for another PyTorch, Triton or GPU.
_ERRORS = (
    AssertionError,
    AttributeError,
    ImportError,
    RuntimeError,
    TypeError,
    TritonError,
    WrongResultError,
)

_SHAPE_FLAGS = ("batch", "heads", "head_dim", "dtype")
_PATTERN_FLAGS = {
    "kv_heads": "num_kv_heads",
    "block_size": "block_size",
    "local_blocks": "local_blocks",
    "vert_stride": "vert_stride",
    "sink_blocks": "sink_blocks",
}


def add_arguments(parser: ArgumentParser) -> None:
    parser.add_argument(
        "--cases",
        nargs="+",
        choices=SHAPES,
        metavar="NAME",
        help=f"fixed shapes and patterns: {', '.join(SHAPES)} (default: cpu; on cuda grouped and dkernel)",
    )
    parser.add_argument(
        "--seq-lengths",
        type=_lengths,
        metavar="N,N,…",
        help="tokens (default: 4096,16384; on cuda every power of two from 4096 to 262144)",
    )
    parser.add_argument(
        "--implementations",
        nargs="+",
        choices=IMPLEMENTATIONS,
        metavar="NAME",
        help=f"of {', '.join(IMPLEMENTATIONS)} (default: all that the device can have)",
    )
    parser.add_argument(
        "--dense-up-to",
        type=int,
        metavar="TOKENS",
        help="leave dense attention out, as not measured, beyond this length",
    )
    parser.add_argument("--repeats", type=int, default=7, help="timed runs, at least (default: %(default)s)")
    own = parser.add_argument_group("a shape of your own, in place of what the case has")
    for flag in (*_SHAPE_FLAGS, *_PATTERN_FLAGS):
        kind = {"choices": DTYPES} if flag == "dtype" else {"type": int, "metavar": "N"}
        own.add_argument(f"--{flag.replace('_', '-')}", **kind)


def _lengths(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ArgumentTypeError(f"{text}: must be numbers of tokens, such as 4096,16384") from None


def cases(args: Namespace) -> list[Case]:
    """What to measure, in order.

    Raises:
        ValueError: naming the flag whose value does not fit.
    """
    lengths = args.seq_lengths or DEFAULT_LENGTHS[args.device]
    for flag in ("batch", "heads", "head_dim", "kv_heads", "repeats"):
        if (value := getattr(args, flag)) is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: must be >= 1")
    if min(lengths) < 1:
        raise ValueError(f"--seq-lengths {min(lengths)}: must be >= 1")
    shapes = [_shape(args, SHAPES[name]) for name in args.cases or DEFAULT_SHAPES[args.device]]
    return [Case(shape, length, args.device) for shape in dict.fromkeys(shapes) for length in lengths]


def _shape(args: Namespace, shape: Shape) -> Shape:
    pattern, p = {n: getattr(args, f) for f, n in _PATTERN_FLAGS.items()}, shape.pattern
    pattern = {name: value for name, value in pattern.items() if value is not None}
    own = {name: getattr(args, name) for name in _SHAPE_FLAGS if getattr(args, name) is not None}
    shape = replace(shape, pattern=replace(p, **pattern), **own)
    if shape.heads % shape.pattern.num_kv_heads:
        raise ValueError(
            f"--heads {shape.heads}: must be a multiple of --kv-heads {shape.pattern.num_kv_heads}"
        )
    return shape


def run(args: Namespace, stored: list[Row]) -> Iterator[Row]:
    """Rows of one case and length at a time on the CPU, of one implementation and pass at a time on CUDA.

    What fails or is wrong is stored, too, and not tried again by the same code. On the CPU, whose speed
    drifts, implementations are timed in turns; what is stored of some of them only is therefore measured
    again with the others.

    Raises:
        WrongResultError: when all is measured, because ours was wrong or failed somewhere; or at once,
            because this process has lost the GPU.
    """
    names = args.implementations or names_on(args.device)
    for name in names:
        if args.device not in IMPLEMENTATIONS[name].devices:
            raise ValueError(
                f"--implementations {name}: must be of {', '.join(names_on(args.device))} "
                f"with --device {args.device}"
            )
    names = [name for name in IMPLEMENTATIONS if name in names]
    found = []
    for case in cases(args):
        for group in [names] if args.device == "cpu" else [[name] for name in names]:
            trials = [
                Trial(implementation, case, args.dense_up_to)
                for implementation in map(IMPLEMENTATIONS.get, group)
            ]
            of_it = [row for trial in trials for row in trial.stored(stored)]
            if len(of_it) < len(PASSES) * len(trials):
                for row in measure(trials, case, args.repeats, of_it):
                    found.append(row)
                    yield row
                if any(trial.is_broken for trial in trials):
                    raise WrongResultError(f"{trials[0].failure}; the same command goes on behind it")
            found += of_it
    require_none_wrong(found)


@dataclass
class Trial:
    """One implementation at one case, and what came of it.

    Args:
        implementation, case: what is measured.
        dense_up_to: tokens beyond which dense attention is left out.
    """

    implementation: Implementation
    case: Case
    dense_up_to: int | None = None
    reasons: dict[str, str] = field(init=False)
    seconds: dict[str, dict] = field(init=False, default_factory=dict)
    peaks: dict[str, int | None] = field(init=False, default_factory=dict)
    setup_seconds: float | None = field(init=False, default=None)
    checked_at: int | None = field(init=False, default=None)
    other_cpus: float | None = field(init=False, default=None)
    is_broken: bool = field(init=False, default=False)
    failure: str | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        """Finds out by pass what cannot be measured, and why."""
        too_long = (
            self.dense_up_to is not None
            and self.case.seq_length > self.dense_up_to
            and not self.implementation.sparse
        )
        reasons = {
            which: f"longer than --dense-up-to {self.dense_up_to}"
            if too_long
            else self.implementation.unavailable(self.case, which)
            for which in PASSES
        }
        self.reasons = {which: reason for which, reason in reasons.items() if reason}

    @property
    def passes(self) -> list[str]:
        """What is to be measured."""
        return [which for which in PASSES if which not in self.reasons]

    def stored(self, rows: list[Row]) -> list[Row]:
        """Of some rows the newest of each pass that has all that a new run could find out."""
        found = {
            row["pass"]: row
            for row in rows
            if row["implementation"] == self.implementation.name
            and all(row[key] == value for key, value in self.case.row().items())
            and self._is_final(row)
        }
        return list(found.values())

    def _is_final(self, row: Row) -> bool:
        reason = row["not_measured"]
        known = (None, OUT_OF_MEMORY, self.reasons.get(row["pass"]))
        return reason in known or reason.startswith((_FAILED, WRONG))

    @contextmanager
    def attempt(self, passes: list[str]) -> Iterator[None]:
        """Keeps the reason where memory is too small for some passes, or the implementation fails at them."""
        try:
            yield
        except _ERRORS as error:
            full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            said = " ".join(str(error).split())[:200]
            if not isinstance(error, WrongResultError):
                who = f"{self.implementation.name} at {self.case.seq_length} tokens"
                said = f"{who}: {type(error).__name__}: {said}"
            self.failure = f"{WRONG if self.implementation.ours else _FAILED}{said}"
            self.is_broken = self.is_broken or _BROKEN in said
            self.reasons |= dict.fromkeys(passes, OUT_OF_MEMORY if full else self.failure)

    def rows(self, passes: Sequence[str] = PASSES) -> Iterator[Row]:
        implementation, case = self.implementation, self.case
        flops = case.flops(implementation.pattern(case))
        dense = case.flops(replace(case.pattern, vert_stride=1, phases=None))
        for which in passes:
            yield {
                "implementation": implementation.name,
                "pass": which,
                "case": shape_name(case.row()),
                **case.row(),
                "not_measured": self.reasons.get(which),
                "checked_at": self.checked_at,
                "other_cpus": self.other_cpus,
                "seconds": self.seconds.get(which),
                "setup_seconds": self.setup_seconds,
                "flops": flops[which],
                "dense_flops": dense[which],
                "speedup_bound": dense[which] / flops[which],
                "input_bytes": case.input_bytes(),
                "peak_bytes_above_inputs": self.peaks.get(which),
            }


def measure(trials: list[Trial], case: Case, repeats: int, stored: Sequence[Row] = ()) -> Iterator[Row]:
    """Checks all, then times all, then gives their rows; on CUDA each when it is there, unless stored."""
    for trial in trials:
        if trial.passes:
            with trial.attempt(trial.passes):
                trial.checked_at = check(trial.implementation, case)
    if case.device == "cpu":
        _measure_on_cpu([trial for trial in trials if trial.passes], case, repeats)
        for trial in trials:
            yield from trial.rows()
        return
    for trial in trials:
        there = {row["pass"] for row in stored if row["implementation"] == trial.implementation.name}
        yield from _measured_on_cuda(trial, [which for which in PASSES if which not in there], repeats)
    if not any(trial.is_broken for trial in trials):
        gc.collect()
        torch.cuda.empty_cache()


def _prepared(trial: Trial) -> Attention:
    start = time.perf_counter()
    attention = trial.implementation.prepare(trial.case)
    if trial.case.device == "cuda":
        torch.cuda.synchronize()
    trial.setup_seconds = time.perf_counter() - start
    return attention


def _measure_on_cpu(trials: list[Trial], case: Case, repeats: int) -> None:
    *inputs, dout = case.inputs()

    def stages(attention: Attention, passes: list[str]) -> Iterator[None]:
        out = attention(*inputs)
        yield
        if PASSES[1] in passes:
            torch.autograd.grad(out, inputs, dout)
            yield

    runs = {trial.implementation.name: partial(stages, _prepared(trial), trial.passes) for trial in trials}
    with Company() as company:
        times = interleaved_times(runs, repeats)
    for trial in trials:
        name = trial.implementation.name
        trial.other_cpus = company.cpus
        trial.seconds = dict(zip(trial.passes, map(summary, times[name].T)))
        if PASSES[1] in trial.passes:
            trial.peaks[PASSES[1]] = peak_memory(prepare_for_memory, (name, case, torch.get_num_threads()))


def _measured_on_cuda(trial: Trial, passes: Sequence[str], repeats: int) -> Iterator[Row]:
    runs = None
    for which in passes:
        if which in trial.passes:
            if trial.is_broken:
                return
            with trial.attempt([which]):
                runs = runs or passes_of(_prepared(trial), trial.case)
                runs[which]()  # compiles
                trial.peaks[which] = cuda_peak_memory(runs[which])
                trial.seconds[which] = summary(cuda_times(runs[which], repeats))
        yield from trial.rows([which])


def passes_of(attention: Attention, case: Case) -> dict[str, Callable[[], object]]:
    """What is timed, by pass, its inputs allocated."""
    *inputs, dout = case.inputs()
    return {
        PASSES[0]: lambda: attention(*inputs),
        PASSES[1]: lambda: torch.autograd.grad(attention(*inputs), inputs, dout),
    }


def prepare_for_memory(arguments: tuple[str, Case, int]) -> Callable[[], object]:
    """Forward and backward of one implementation, its code loaded and its inputs allocated."""
    name, case, threads = arguments
    torch.set_num_threads(threads)
    p, prepare = case.pattern, IMPLEMENTATIONS[name].prepare
    all_code = (p.local_blocks + max(p.strides) + 1) * p.block_size  # tokens at which shards are seen
    short = replace(case, seq_length=min(all_code, case.seq_length))
    passes_of(prepare(short), short)[PASSES[1]]()
    return passes_of(prepare(case), case)[PASSES[1]]


BENCHMARK = Benchmark(
    name="attention",
    help=__doc__,
    add_arguments=add_arguments,
    run=run,
    table=attention_report.table,
    plot=attention_report.plot,
    takes_device=True,
)
