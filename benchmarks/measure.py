"""Time and memory of functions, such that a noisy machine does less harm."""

import multiprocessing
import os
import re
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch


def interleaved_times[Name](
    runs: dict[Name, Callable[[], Iterable[object]]], repeats: int
) -> dict[Name, np.ndarray]:
    """Seconds that each of several functions takes to each of its stages, `[repeats, stages]`.

    A function is a generator that yields after every stage; times count from its start. The functions take
    turns, so that a drift of the machine meets all of them alike, after one untimed call each.
    """
    for run in runs.values():
        _stages(run)
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(_stages(run))
    return {name: np.array(seconds) for name, seconds in times.items()}


def _stages(run: Callable[[], Iterable[object]]) -> list[float]:
    start = time.perf_counter()
    return [time.perf_counter() - start for _ in run()]


@dataclass
class Company:
    """What else the machine did while a block ran.

    `cpus`: how many cores others kept busy on average, 0 on a machine of one's own; None where the system
    does not tell (Linux does, through /proc).
    """

    cpus: float | None = None

    def __enter__(self) -> "Company":
        self._start = time.perf_counter(), _busy_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        (start, before), after = self._start, _busy_seconds()
        if before is not None:
            self.cpus = round(max(0.0, (after - before) / (time.perf_counter() - start)), 2)


def _busy_seconds() -> float | None:
    """CPU seconds of all processes but this one, since some moment."""
    if not _STAT.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, _STAT.read_text().split()[1:11])
    own = os.times()
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own.user - own.system


_STAT = Path("/proc/stat")


def summary(seconds: np.ndarray) -> dict:
    """Median and spread of repeated measurements, as rows have them."""
    p20, median, p80 = np.percentile(seconds, (20, 50, 80)).tolist()
    return {"median": median, "p20": p20, "p80": p80, "repeats": len(seconds)}


def peak_memory[Arguments](
    prepare: Callable[[Arguments], Callable[[], object]], arguments: Arguments
) -> int | None:
    """Bytes of resident memory that a function adds at its peak to what was there when it began.

    Args:
        prepare: `prepare(arguments)` allocates the inputs and returns the function; called in a fresh
            process, so it must be importable by name.

    Returns:
        None where the system does not tell (Linux does, through /proc).
    """
    if not _CLEAR_PEAK.exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_peak_memory_here, prepare, arguments).result()


_CLEAR_PEAK = Path("/proc/self/clear_refs")


def _peak_memory_here(prepare, arguments) -> int:
    run = prepare(arguments)
    _CLEAR_PEAK.write_text("5")  # sets VmHWM, the peak, to what is resident now
    before = _status_bytes("VmRSS")
    run()
    return _status_bytes("VmHWM") - before


def _status_bytes(field: str) -> int:
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"^{field}:\s+(\d+) kB", status, re.MULTILINE)[1])


_LONG, _MOST_LONG = 1.0, 3


def cuda_times(run: Callable[[], object], repeats: int) -> np.ndarray:
    """Seconds of about `repeats` runs, of more where they are short, by CUDA events (triton's do_bench).

    The L2 cache is emptied before each. Runs of more than a second are too dear for do_bench's own estimates,
    and their caches matter less: three at most are timed by the wall. `run` must have run before.
    """
    from triton.testing import do_bench

    def seconds() -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        return time.perf_counter() - start

    first = seconds()
    if first > _LONG:
        return np.array([first, *(seconds() for _ in range(min(repeats, _MOST_LONG) - 1))])
    milliseconds = 1000 * first
    times = do_bench(run, warmup=25, rep=max(100, (repeats + 0.5) * milliseconds), return_mode="all")
    return np.array(times) / 1000


def cuda_peak_memory(run: Callable[[], object]) -> int:
    """Bytes of device memory that a function adds at its peak to what was there when it began."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def kernel_times(run: Callable[[], object], device: str) -> list[dict]:
    """What a run spends its time in, by torch.profiler: name, calls and seconds of each kernel, on the CPU of
    each operation without those it calls; longest first. `run` must have run before."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    found = [
        {"name": event.key, "calls": event.count, "seconds": getattr(event, field) / 1e6}
        for event in profiler.key_averages()
    ]
    return sorted((one for one in found if one["seconds"] > 0), key=lambda one: -one["seconds"])
