"""The rates of this machine: measured with all queues of all its ranks at work, and kept in a cache file.

Copies and CPU updates share host memory, so rates measured one by one could not be reached together. Each
queue works in a thread of its own for the same short time, on all ranks of the node at once; the slowest rank
counts, since all wait for it in each step. Without a GPU its queues are threads too, which copy and update in
host memory, as the executor does there. NVMe directories are measured in `nvme.py`.
"""

from __future__ import annotations

import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from megatron_s2.cache_file import cache_file_name, cache_folder, read_cache_file, write_cache_file
from megatron_s2.offload.adam import AdamWSettings, State, update_on_cpu, update_on_gpu
from megatron_s2.offload.model import Rates
from megatron_s2.offload.node import Node
from megatron_s2.offload.queues import Task, ThreadBackend, default_backend

MEASURED_SECONDS = 0.5
MEASURED_ELEMENTS = 2**22  # 64 MiB of state and gradient for each queue: far more than caches hold
DRIFT = 0.25
DRIFT_STEPS = 5
_WHAT = "offload"


@dataclass(frozen=True)
class Hardware:
    """What rates depend on."""

    cpu: str  # name of the CPU
    cores: int  # that this process may use
    gpu: str | None  # name of the GPU, None without one
    torch: str  # version of PyTorch
    threads: int  # of one rank's CPU updates
    local_world_size: int  # ranks on this node, which share its memory

    @classmethod
    def detect(cls, threads: int, local_world_size: int = 1) -> Hardware:
        """The hardware of this process."""
        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        cores = len(os.sched_getaffinity(0))
        return cls(_cpu_name(), cores, gpu, str(torch.__version__), threads, local_world_size)

    @property
    def file_name(self) -> str:
        """Name of the cache file, which differs where the hardware does."""
        return cache_file_name(_WHAT, asdict(self))


def cached_rates(hardware: Hardware, node: Node, remeasure: bool = False) -> Rates:
    """Returns the rates in the cache file of this hardware, or measures and keeps them. All ranks of the node
    call it together; the first one reads and writes the file.

    Args:
        hardware: `Hardware.detect(…)`.
        remeasure: whether to measure whatever the file says, as after a drift.
    """
    path, first = cache_folder() / hardware.file_name, node.index == 0
    cached = None
    if first and not remeasure:
        cached = read_cache_file(path, lambda content: Rates(**content["rates"]), _WHAT)
    if (cached := node.exchange(cached)[0]) is not None:
        return cached
    rates = slowest(node.exchange(measure_rates(hardware.threads, ready=node.wait)))
    if first:
        write_cache_file(path, {"hardware": asdict(hardware), "rates": asdict(rates)}, _WHAT)
    return rates


def slowest(of_ranks: Sequence[Rates]) -> Rates:
    """Returns the lowest of each rate that the ranks have."""
    columns = {name: [getattr(rates, name) for rates in of_ranks] for name in asdict(of_ranks[0])}
    return Rates(**{name: None if None in column else min(column) for name, column in columns.items()})


def drifted(usual_seconds: float, measured_seconds: Sequence[float]) -> bool:
    """Returns whether the median of the last steps is off `usual_seconds` by more than `DRIFT` of it."""
    return abs(usual_step(measured_seconds) - usual_seconds) > DRIFT * usual_seconds


def usual_step(measured_seconds: Sequence[float]) -> float:
    """Returns the median duration of the last `DRIFT_STEPS` steps."""
    return statistics.median(measured_seconds[-DRIFT_STEPS:])


def measure_rates(
    threads: int,
    seconds: float = MEASURED_SECONDS,
    elements: int = MEASURED_ELEMENTS,
    ready: Callable[[], object] = lambda: None,
) -> Rates:
    """Measures what each queue gets done while all of them work.

    Args:
        threads: number of PyTorch's threads for CPU updates (and copies, where there is no GPU).
        seconds: duration of the measurement.
        elements: parameters of one update, a multiple of `ALIGNMENT`; a copy has as many float32 values.
        ready: called when all is allocated and warm, and returns when the measurement may begin.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        backend = default_backend()
        work = {
            "cpu": (_updates(torch.device("cpu"), elements), elements),
            "gpu": (_updates(backend.device, elements), elements),
            "h2d": (_copies(backend.device, elements, up=True), 4 * elements),
            "d2h": (_copies(backend.device, elements, up=False), 4 * elements),
        }
        backend.wait(backend.mark())  # for the tensors' first values
        return Rates(**_measure_together(work, backend, seconds, ready))
    finally:
        torch.set_num_threads(before)


def _measure_together(
    work: dict[str, tuple[Callable[[], object], int]],
    backend: ThreadBackend,
    seconds: float,
    ready: Callable[[], object],
) -> dict[str, float]:
    """Returns amounts per second of functions that are called repeatedly, each in a thread of its own.

    Args:
        work: by queue, its function with the amount of one call.
        backend, ready: where the functions run, and as for `measure_rates`.
    """

    def run(queue: str, once: Callable[[], object]) -> None:
        with backend.context(Task(queue, "measurement", once, (), (False, 0))):
            once()

    for queue, (once, _) in work.items():
        run(queue, once)  # warm-up
    ready()
    start = threading.Barrier(len(work))

    def rate(queue: str, once: Callable[[], object], amount: int) -> float:
        start.wait()
        began, calls = time.perf_counter(), 0
        while (passed := time.perf_counter() - began) < seconds:
            run(queue, once)
            calls += 1
        return calls * amount / max(passed, seconds)

    with ThreadPoolExecutor(len(work)) as threads:
        try:
            running = {queue: threads.submit(rate, queue, *what) for queue, what in work.items()}
            return {queue: future.result() for queue, future in running.items()}
        except BaseException:
            start.abort()  # else threads that have begun would wait forever for those that were not started
            raise


def _updates(device: torch.device, elements: int) -> Callable[[], object]:
    """Returns a function that updates `elements` parameters and their 16-bit weights."""
    *state, gradient = (torch.full((elements,), 1e-3, device=device) for _ in range(4))
    weights = torch.empty(elements, dtype=torch.bfloat16, device=device)
    update = update_on_cpu if device.type == "cpu" else update_on_gpu
    return lambda: update(State(*state), gradient, weights, AdamWSettings(lr=1e-5))


def _copies(device: torch.device, elements: int, up: bool) -> Callable[[], object]:
    """Returns a function that copies `elements` float32 from pinned host memory to the device, or back."""
    on_host = torch.zeros(elements, pin_memory=device.type == "cuda")
    on_device = torch.zeros(elements, device=device)
    source, target = (on_host, on_device) if up else (on_device, on_host)
    return lambda: target.copy_(source, non_blocking=True)


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
