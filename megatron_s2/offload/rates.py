"""The rates of this machine, measured while everything works at once, and remembered in a file.

Copies and CPU updates share host memory, so that rates measured one by one could not be had together. Each
queue works in a thread of its own for a short, common time. Without a GPU its queues are threads as well,
which copy and update in host memory: what the executor does there. NVMe directories are not measured here.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import statistics
import tempfile
import threading
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from megatron_s2.offload.model import Rates

if TYPE_CHECKING:
    import torch

MEASURED_SECONDS = 0.5
MEASURED_ELEMENTS = 2**22  # 64 MiB of state and gradient for each queue: far more than caches hold
DRIFT = 0.25
DRIFT_STEPS = 5


@dataclass(frozen=True)
class Machine:
    """What rates depend on.

    Args:
        cpu: name of the CPU.
        cores: CPUs that this process may use.
        gpu: name of the GPU, None without one.
        torch: its version.
        threads: of one rank's CPU updates.
        ranks: ranks of this node, which share its memory.
    """

    cpu: str
    cores: int
    gpu: str | None
    torch: str
    threads: int
    ranks: int

    @classmethod
    def here(cls, threads: int, ranks: int = 1) -> Machine:
        """This one."""
        import torch

        gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
        return cls(_cpu_name(), len(os.sched_getaffinity(0)), gpu, str(torch.__version__), threads, ranks)

    @property
    def file_name(self) -> str:
        """Differs where the machine does."""
        text = json.dumps(asdict(self), sort_keys=True)
        return f"offload-{hashlib.sha256(text.encode()).hexdigest()[:20]}.json"


def rates_of(
    machine: Machine,
    folder: Path | None = None,
    again: bool = False,
    measure: Callable[[int], Rates] | None = None,
) -> Rates:
    """The rates of this machine: those remembered in `folder`, else measured now and remembered.

    A file that cannot be read or written is a warning, and the rates are measured, or not remembered.

    Args:
        machine: `Machine.here(…)`.
        folder: by default $MEGATRON_S2_CACHE, else megatron_s2 in $XDG_CACHE_HOME or ~/.cache.
        again: measure whatever is remembered, such as after a drift.
        measure: called with the number of threads; `measure_rates` by default.
    """
    path = (folder or _cache_folder()) / machine.file_name
    remembered = None if again else _read(path)
    if remembered is not None:
        return remembered
    rates = (measure or measure_rates)(machine.threads)
    _write(path, machine, rates)
    return rates


def drifted(predicted_seconds: float, measured_seconds: Sequence[float]) -> bool:
    """Whether the latest steps say that rates should be measured again: the median of the last `DRIFT_STEPS`
    is off by more than `DRIFT` of the prediction. Fewer steps say nothing.

    Raises:
        ValueError: the prediction is not positive.
    """
    if not predicted_seconds > 0:
        raise ValueError(f"predicted_seconds {predicted_seconds}: must be positive")
    if len(measured_seconds) < DRIFT_STEPS:
        return False
    median = statistics.median(measured_seconds[-DRIFT_STEPS:])
    return abs(median - predicted_seconds) > DRIFT * predicted_seconds


def measure_rates(
    threads: int, seconds: float = MEASURED_SECONDS, elements: int = MEASURED_ELEMENTS
) -> Rates:
    """Let all queues work at once for some seconds, and count what each gets done.

    Args:
        threads: of PyTorch, for CPU updates (and copies, where there is no GPU).
        seconds: how long.
        elements: parameters of one update; a copy moves as many float32.

    Raises:
        ValueError: an argument is not positive.
    """
    for name, value in (("threads", threads), ("seconds", seconds), ("elements", elements)):
        if not value > 0:
            raise ValueError(f"{name} {value}: must be positive")
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        work = {
            "cpu": (_updates(torch.device("cpu"), elements), elements),
            "gpu": (_updates(device, elements), elements),
            "h2d": (_copies(device, elements, up=True), 4 * elements),
            "d2h": (_copies(device, elements, up=False), 4 * elements),
        }
        return Rates(**_at_once(work, seconds))
    finally:
        torch.set_num_threads(before)


def _at_once(work: dict[str, tuple[Callable[[], object], int]], seconds: float) -> dict[str, float]:
    """Amounts per second of functions that are called over and over in threads of their own, with what one
    call does."""
    for once, _ in work.values():
        once()
    start = threading.Barrier(len(work))

    def rate(once: Callable[[], object], amount: int) -> float:
        start.wait()
        began, calls = time.perf_counter(), 0
        while (passed := time.perf_counter() - began) < seconds:
            once()
            calls += 1
        return calls * amount / max(passed, seconds)

    with ThreadPoolExecutor(len(work)) as threads:
        try:
            running = {name: threads.submit(rate, *what) for name, what in work.items()}
            return {name: future.result() for name, future in running.items()}
        except BaseException:
            start.abort()  # or those that have begun wait for ever for those that an interruption left out
            raise


def _updates(device: torch.device, elements: int) -> Callable[[], object]:
    """An update of `elements` parameters and of their 16-bit weights."""
    import torch

    master, gradient, exp_avg, exp_avg_sq = (torch.full((elements,), 1e-3, device=device) for _ in range(4))
    weights = torch.empty(elements, dtype=torch.bfloat16, device=device)
    step = torch.ones((), device=device)

    def once() -> None:
        torch._fused_adamw_(
            *([master], [gradient], [exp_avg], [exp_avg_sq], [], [step]),
            lr=1e-5,
            beta1=0.9,
            beta2=0.95,
            weight_decay=0.0,
            eps=1e-8,
            amsgrad=False,
            maximize=False,
        )
        weights.copy_(master)

    return _on_stream(once, device)


def _copies(device: torch.device, elements: int, up: bool) -> Callable[[], object]:
    """A copy of `elements` float32 from pinned host memory to the device, or back."""
    import torch

    on_host = torch.zeros(elements, pin_memory=device.type == "cuda")
    on_device = torch.zeros(elements, device=device)
    source, target = (on_host, on_device) if up else (on_device, on_host)
    return _on_stream(lambda: target.copy_(source, non_blocking=True), device)


def _on_stream(once: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """`once` on a stream of its own, to its end."""
    if device.type != "cuda":
        return once
    import torch

    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))

    def on_stream() -> None:
        # A new thread is on GPU 0, and going back there from a stream would begin a context on it.
        with torch.cuda.device(stream.device), torch.cuda.stream(stream):
            once()
        stream.synchronize()

    return on_stream


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _cache_folder() -> Path:
    if given := os.environ.get("MEGATRON_S2_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_s2"


def _read(path: Path) -> Rates | None:
    try:
        return Rates(**json.loads(path.read_text(encoding="utf-8"))["rates"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        warnings.warn(f"offload: {path} is not used, rates are measured again: {error!r}", stacklevel=3)
        return None


def _write(path: Path, machine: Machine, rates: Rates) -> None:
    """Whole or not at all: under another name, then renamed."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, suffix=".tmp", delete=False
        ) as file:
            json.dump({"machine": asdict(machine), "rates": asdict(rates)}, file)
        os.replace(file.name, path)
    except OSError as error:
        warnings.warn(f"offload: {path} cannot be written, rates are not kept: {error}", stacklevel=3)
