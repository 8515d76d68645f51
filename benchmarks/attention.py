"""S2 attention against dense causal attention and others: forward and backward on the same inputs."""

from __future__ import annotations

import gc
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from triton import TritonError

from benchmarks import attention_report
from benchmarks.benchmark import Benchmark, Row, WrongResultError
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
    """Rows of one case and length at a time on the CPU, of one implementation at a time on CUDA.

    On the CPU, whose speed drifts, implementations are timed in turns; what is stored of some of them only is
    therefore measured again with the others.
    """
    names = args.implementations or names_on(args.device)
    for name in names:
        if args.device not in IMPLEMENTATIONS[name].devices:
            raise ValueError(
                f"--implementations {name}: must be of {', '.join(names_on(args.device))} "
                f"with --device {args.device}"
            )
    names = [name for name in IMPLEMENTATIONS if name in names]
    for case in cases(args):
        for group in [names] if args.device == "cpu" else [[name] for name in names]:
            trials = [
                Trial(implementation, case, args.dense_up_to)
                for implementation in map(IMPLEMENTATIONS.get, group)
            ]
            if not all(trial.is_stored(stored) for trial in trials):
                yield from measure(trials, case, args.repeats)


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

    def is_stored(self, rows: list[Row]) -> bool:
        """Whether some rows have all that a new run could find out."""
        found = {
            row["pass"]
            for row in rows
            if row["implementation"] == self.implementation.name
            and all(row[key] == value for key, value in self.case.row().items())
            and row["not_measured"] in (None, OUT_OF_MEMORY, self.reasons.get(row["pass"]))
        }
        return found == set(PASSES)

    @contextmanager
    def attempt(self, passes: list[str]) -> Iterator[None]:
        """Keeps the reason where memory is too small for some passes or another's implementation fails.

        Raises:
            WrongResultError, RuntimeError and the like: ours fails, other than for want of memory.
        """
        try:
            yield
        except _ERRORS as error:
            full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            if self.implementation.ours and not full:
                raise
            said = " ".join(str(error).split())[:200]
            reason = OUT_OF_MEMORY if full else f"{type(error).__name__}: {said}"
            self.reasons |= dict.fromkeys(passes, reason)

    def rows(self) -> Iterator[Row]:
        implementation, case = self.implementation, self.case
        flops = case.flops(implementation.pattern(case))
        dense = case.flops(replace(case.pattern, vert_stride=1, phases=None))
        for which in PASSES:
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


def measure(trials: list[Trial], case: Case, repeats: int) -> Iterator[Row]:
    """Checks all, then times all, then gives their rows."""
    for trial in trials:
        if trial.passes:
            with trial.attempt(trial.passes):
                trial.checked_at = check(trial.implementation, case)
    possible = [trial for trial in trials if trial.passes]
    (_measure_on_cpu if case.device == "cpu" else _measure_on_cuda)(possible, case, repeats)
    for trial in trials:
        yield from trial.rows()
    if case.device == "cuda":
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


def _measure_on_cuda(trials: list[Trial], case: Case, repeats: int) -> None:
    for trial in trials:
        with trial.attempt(trial.passes):
            runs = passes_of(_prepared(trial), case)
            for which in trial.passes:
                with trial.attempt([which]):
                    runs[which]()  # compiles
                    trial.peaks[which] = cuda_peak_memory(runs[which])
                    trial.seconds[which] = summary(cuda_times(runs[which], repeats))


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
