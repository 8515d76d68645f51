"""One attention implementation at one case: what is checked, timed, left out or found wrong."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import torch
from triton import TritonError

from benchmarks.benchmark import WRONG, Row, WrongResultError
from benchmarks.cases import PASSES, Case, shape_name
from benchmarks.exactness import check
from benchmarks.implementations import IMPLEMENTATIONS, Attention, Implementation
from benchmarks.measure import (
    BusyLoops,
    OtherLoad,
    cuda_peak_memory,
    cuda_times,
    interleaved_times,
    peak_memory,
    summary,
)

OUT_OF_MEMORY = "out of memory"
_FAILED = "failed: "
_GPU_LOST = "CUDA error"  # after it this process can do nothing more on the GPU
# Kernels written for another PyTorch, Triton or GPU raise any of these.
_ERRORS = (
    AssertionError,
    AttributeError,
    ImportError,
    RuntimeError,
    TypeError,
    TritonError,
    WrongResultError,
)


class Trial:
    """The measurement of one implementation at one case.

    Args:
        implementation, case: what is measured.
        dense_up_to: length in tokens beyond which dense attention is not measured; None for no limit.

    Attributes:
        reasons: why a pass is not measured, by pass.
        failure: the last failure, as in `reasons`.
        lost_gpu: whether that failure leaves this process without a GPU.
    """

    def __init__(self, implementation: Implementation, case: Case, dense_up_to: int | None = None):
        self.implementation = implementation
        self.case = case
        self.seconds: dict[str, dict] = {}
        self.peaks: dict[str, int | None] = {}
        self.setup_seconds: float | None = None
        self.checked_at: int | None = None
        self.other_cpus: float | None = None
        self.failure: str | None = None
        self.lost_gpu = False
        if dense_up_to is not None and case.seq_length > dense_up_to and not implementation.sparse:
            self.reasons = dict.fromkeys(PASSES, f"longer than --dense-up-to {dense_up_to}")
        else:
            reasons = {name: implementation.unavailable(case, name) for name in PASSES}
            self.reasons = {name: reason for name, reason in reasons.items() if reason}

    @property
    def passes(self) -> list[str]:
        """The passes that can be measured, as far as is known."""
        return [name for name in PASSES if name not in self.reasons]

    def stored(self, rows: Sequence[Row]) -> list[Row]:
        """Returns the newest row of each pass, of those that a new run would only repeat."""
        setting = {
            "implementation": self.implementation.name,
            "busy_loops": self.case.busy_loops,
            **self.case.row(),
        }
        matching = [row for row in rows if setting.items() <= row.items() and self._is_final(row)]
        return list({row["pass"]: row for row in matching}.values())

    def _is_final(self, row: Row) -> bool:
        reason = row["not_measured"]
        known = (None, OUT_OF_MEMORY, self.reasons.get(row["pass"]))
        return reason in known or reason.startswith((_FAILED, WRONG))

    @contextmanager
    def attempt(self, passes: Sequence[str]) -> Iterator[None]:
        """Makes a failure of the block, or lack of memory, the reason why passes are not measured."""
        try:
            yield
        except _ERRORS as error:
            text = " ".join(str(error).split())[:200]
            if not isinstance(error, WrongResultError):
                where = f"{self.implementation.name} at {self.case.seq_length} tokens"
                text = f"{where}: {type(error).__name__}: {text}"
            self.failure = f"{WRONG if self.implementation.ours else _FAILED}{text}"
            self.lost_gpu = self.lost_gpu or _GPU_LOST in text
            is_full = isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)
            self.reasons |= dict.fromkeys(passes, OUT_OF_MEMORY if is_full else self.failure)

    def check(self) -> None:
        """Checks the results, before anything is timed."""
        if self.passes:
            with self.attempt(self.passes):
                self.checked_at = check(self.implementation, self.case)

    def prepare(self) -> Attention:
        """Prepares the attention and measures how long that takes."""
        start = time.perf_counter()
        attention = self.implementation.prepare(self.case)
        if self.case.device == "cuda":
            torch.cuda.synchronize()
        self.setup_seconds = time.perf_counter() - start
        return attention

    def rows(self, passes: Sequence[str] = PASSES) -> Iterator[Row]:
        case = self.case
        flops = case.flops(self.implementation.pattern(case))
        dense = case.flops(replace(case.pattern, vert_stride=1, phases=None))
        for name in passes:
            yield {
                "implementation": self.implementation.name,
                "pass": name,
                "case": shape_name(case.row()),
                **case.row(),
                "busy_loops": case.busy_loops,
                "not_measured": self.reasons.get(name),
                "checked_at": self.checked_at,
                "other_cpus": self.other_cpus,
                "seconds": self.seconds.get(name),
                "setup_seconds": self.setup_seconds,
                "flops": flops[name],
                "dense_flops": dense[name],
                "speedup_bound": dense[name] / flops[name],
                "input_bytes": case.input_bytes(),
                "peak_bytes_above_inputs": self.peaks.get(name),
            }


def passes_of(attention: Attention, case: Case) -> dict[str, Callable[[], object]]:
    """Returns a function that runs each pass once, on inputs that are allocated here."""
    *inputs, dout = case.inputs()
    return {
        PASSES[0]: lambda: attention(*inputs),
        PASSES[1]: lambda: torch.autograd.grad(attention(*inputs), inputs, dout),
    }


def measure_on_cpu(trials: Sequence[Trial], case: Case, repeats: int) -> Iterator[Row]:
    """Checks all trials of a case, then times them in turns, and yields the rows of all."""
    for trial in trials:
        trial.check()
    measured = [trial for trial in trials if trial.passes]
    *inputs, dout = case.inputs()

    def stages(attention: Attention, passes: list[str]) -> Iterator[None]:
        out = attention(*inputs)
        yield
        if PASSES[1] in passes:
            torch.autograd.grad(out, inputs, dout)
            yield

    runs = {trial.implementation.name: partial(stages, trial.prepare(), trial.passes) for trial in measured}
    with BusyLoops(case.busy_loops), OtherLoad() as load:
        times = interleaved_times(runs, repeats)
    for trial in measured:
        name = trial.implementation.name
        trial.other_cpus = load.cpus()
        trial.seconds = dict(zip(trial.passes, map(summary, times[name].T)))
        if PASSES[1] in trial.passes and not case.busy_loops:
            trial.peaks[PASSES[1]] = peak_memory(prepare_for_memory, (name, case, torch.get_num_threads()))
    for trial in trials:
        yield from trial.rows()


def prepare_for_memory(arguments: tuple[str, Case, int]) -> Callable[[], object]:
    """Returns forward and backward of an implementation, with its code loaded and its inputs allocated.

    Args:
        arguments: name of the implementation, case, number of threads.
    """
    name, case, threads = arguments
    torch.set_num_threads(threads)
    p, prepare = case.pattern, IMPLEMENTATIONS[name].prepare
    all_code = (p.local_blocks + max(p.strides) + 1) * p.block_size  # tokens from which shards are seen
    short = replace(case, seq_length=min(all_code, case.seq_length))
    passes_of(prepare(short), short)[PASSES[1]]()
    return passes_of(prepare(case), case)[PASSES[1]]


def measure_on_cuda(trial: Trial, passes: Sequence[str], repeats: int) -> Iterator[Row]:
    """Checks a trial, then times some passes, and yields the row of each before it times the next."""
    trial.check()
    runs = None
    for name in passes:
        if name in trial.passes:
            if trial.lost_gpu:
                return
            with trial.attempt([name]):
                runs = runs or passes_of(trial.prepare(), trial.case)
                runs[name]()  # compiles
                trial.peaks[name] = cuda_peak_memory(runs[name])
                trial.seconds[name] = summary(cuda_times(runs[name], repeats))
        yield from trial.rows([name])
    runs = None
    if not trial.lost_gpu:
        gc.collect()
        torch.cuda.empty_cache()
