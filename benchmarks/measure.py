"""Time and memory of functions, measured so that noise of the machine does least harm."""

import multiprocessing
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch

_STAT = Path("/proc/stat")
_CLEAR_PEAK = Path("/proc/self/clear_refs")
_LONG, _MOST_LONG_RUNS = 1.0, 3  # seconds from which a run on CUDA is long; how many of these are timed


def interleaved_times[Name](
    runs: dict[Name, Callable[[], Iterable[object]]],
    repeats: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[Name, np.ndarray]:
    """Measures several functions in turns, so that a drift of the machine affects all of them alike.

    Each is a generator that yields at the end of each of its stages, and runs once untimed first.

    Returns:
        Seconds from the start to the end of each stage, `[repeats, stages]`, by name.
    """
    for run in runs.values():
        _stage_times(run, clock)
    times = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            times[name].append(_stage_times(run, clock))
    return {name: np.array(seconds) for name, seconds in times.items()}


def _stage_times(run: Callable[[], Iterable[object]], clock: Callable[[], float]) -> list[float]:
    start = clock()
    return [clock() - start for _ in run()]


def summary(seconds: np.ndarray) -> dict:
    """Returns median and spread of repeated measurements, as rows store them."""
    p20, median, p80 = np.percentile(seconds, (20, 50, 80)).tolist()
    return {"median": median, "p20": p20, "p80": p80, "repeats": len(seconds)}


class BusyLoops:
    """Context manager that runs other processes meanwhile, which never stop computing."""

    def __init__(self, count: int):
        self._count = count
        self._loops = ExitStack()

    def __enter__(self) -> None:
        with ExitStack() as loops:
            for _ in range(self._count):
                process = subprocess.Popen([sys.executable, "-c", "while True: pass"])
                loops.callback(process.wait)
                loops.callback(process.kill)
            self._loops = loops.pop_all()

    def __exit__(self, *_: object) -> None:
        self._loops.close()


class OtherLoad:
    """Context manager that measures how busy other processes keep the machine meanwhile."""

    def __enter__(self) -> "OtherLoad":
        self._start, self._busy = time.perf_counter(), _other_cpu_seconds()
        return self

    def __exit__(self, *_: object) -> None:
        self._seconds = time.perf_counter() - self._start
        if self._busy is not None:
            self._busy = _other_cpu_seconds() - self._busy

    def cpus(self, own_seconds: float = 0.0) -> float | None:
        """Returns the number of cores that other processes kept busy on average; None where the system does
        not say (Linux does, in /proc). `own_seconds` is the CPU time of children that still run."""
        return None if self._busy is None else round(max(0.0, (self._busy - own_seconds) / self._seconds), 2)


def _other_cpu_seconds() -> float | None:
    """CPU seconds since boot of all processes but this one and its children that have ended."""
    if not _STAT.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(int, _STAT.read_text().split()[1:11])
    own = os.times()
    own_seconds = own.user + own.system + own.children_user + own.children_system
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK") - own_seconds


def peak_memory[Arguments](
    prepare: Callable[[Arguments], Callable[[], object]], arguments: Arguments
) -> int | None:
    """Returns the bytes of resident memory that a function adds at its peak; None where the system does not
    say (Linux does, in /proc). `prepare(arguments)` allocates its inputs and returns it, in a fresh process,
    so `prepare` must be importable by name."""
    if not _CLEAR_PEAK.exists():
        return None
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
        return fresh.submit(_peak_memory_here, prepare, arguments).result()


def _peak_memory_here(prepare, arguments) -> int:
    run = prepare(arguments)
    _CLEAR_PEAK.write_text("5")  # sets VmHWM, the peak, to what is resident now
    before = status_bytes("VmRSS")
    run()
    return status_bytes("VmHWM") - before


def status_bytes(field: str) -> int | None:
    """Returns a field of /proc/self/status, such as VmHWM, in bytes; None where the system has none."""
    status = Path("/proc/self/status")
    text = status.read_text() if status.exists() else ""
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else None


def cuda_times(run: Callable[[], object], repeats: int) -> np.ndarray:
    """Returns the seconds of about `repeats` runs, of more short ones; `run` must have run before.

    They are measured with CUDA events by `triton.testing.do_bench`, which clears the L2 cache before each.
    Runs of more than a second are too long for its estimates, and the cache matters less to them: three at
    most are measured, by the wall clock.
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
        return np.array([first, *(seconds() for _ in range(min(repeats, _MOST_LONG_RUNS) - 1))])
    milliseconds = 1000 * first
    times = do_bench(run, warmup=25, rep=max(100, (repeats + 0.5) * milliseconds), return_mode="all")
    return np.array(times) / 1000


def cuda_peak_memory(run: Callable[[], object]) -> int:
    """Returns the bytes of device memory that a function adds at its peak."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def kernel_times(run: Callable[[], object], device: str) -> list[dict]:
    """Returns name, calls and seconds of each kernel of a run by torch.profiler, longest first; `run` must
    have run before. On the CPU, operations take the place of kernels, without those that they call."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = device == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    with profile(activities=[activity]) as profiler:
        run()
        if on_gpu:
            torch.cuda.synchronize()
    field = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    kernels = [
        {"name": event.key, "calls": event.count, "seconds": getattr(event, field) / 1e6}
        for event in profiler.key_averages()
    ]
    return sorted(
        (kernel for kernel in kernels if kernel["seconds"] > 0), key=lambda kernel: -kernel["seconds"]
    )
