"""An optimizer's executor in training: built from the settings, timed, and planned again after a drift."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Sequence

import torch

from megatron_s2.offload.adam import AdamWSettings, fused_update, update_on_gpu
from megatron_s2.offload.executor import Executor
from megatron_s2.offload.host_memory import check_available
from megatron_s2.offload.model import Rates
from megatron_s2.offload.node import Node
from megatron_s2.offload.plan import OffloadPlan, make_plan
from megatron_s2.offload.queues import default_backend
from megatron_s2.offload.rates import DRIFT_STEPS, drifted, usual_step
from megatron_s2.offload.rounding import rounding_note
from megatron_s2.offload.settings import OffloadSettings
from megatron_s2.offload.simulator import Simulation, auto_plan, simulate
from megatron_s2.offload.state import Parameter
from megatron_s2.offload.trace import of_update, shifted, write_trace


class OffloadError(ValueError):
    """The settings do not fit this node or model, such as a budget that is too small for the state."""


class Session:
    """An optimizer's executor. Its masters are set from the model's weights.

    Args:
        settings: the user's choices.
        rank: global rank of this process.
        node: the ranks of this node.
        threads: number of threads of CPU updates.
        log: function called with each status line.
        parameters: the parameters in the flat state.
        elements: elements of the flat state, padding included.
        share: share of this rank's parameters, and so of its budgets.
        available: bytes of host memory that this node can give to all its ranks.
        rates: rates of this rank, for an automatic fraction and for predictions; None without either.
        shares: sizes of the directories' files relative to one another; None for equal ones.
        late_reason: why gradients leave after backward; None where they leave during backward.
        traced: whether this session writes the user's trace.

    Raises:
        OffloadError: the settings do not fit this node or model.
        TierError: a directory has not enough space.
    """

    def __init__(
        self,
        settings: OffloadSettings,
        rank: int,
        node: Node,
        threads: int,
        log: Callable[[str], object],
        parameters: Sequence[Parameter],
        elements: int,
        share: float,
        available: int,
        rates: Rates | None,
        shares: Sequence[float] | None,
        late_reason: str | None,
        traced: bool,
    ) -> None:
        self._settings, self._rank, self._log, self._rates = settings, rank, log, rates
        self._late_reason = late_reason
        self._trace = settings.trace if traced else None
        self._seconds: list[float] = []  # of the latest steps
        self._usual: float | None = None
        try:
            plan = self._plan(elements, share)
            check_available(plan.host_bytes, node.ranks, available)
            update = update_on_gpu if settings.gpu_adam == "triton" else fused_update(settings.gpu_adam)
            self.executor = Executor(
                plan, parameters, default_backend(), settings.nvme_dirs, shares, threads, update
            )
        except ValueError as error:
            of_share = f" (for {share:.0%} of this rank's parameters)" if share < 1 else ""
            raise OffloadError(f"{error}{of_share}") from error
        self._predicted = self._predict()
        if rank == 0:
            self._report()
        self.executor.set_masters()

    def step(self, settings: Sequence[AdamWSettings], gradient_scale: float) -> None:
        """Runs a step of the executor, and takes its time."""
        begin = time.perf_counter()
        self.executor.step(settings, gradient_scale)
        self._seconds.append(time.perf_counter() - begin)
        step = settings[0].step
        if self._trace and step & (step - 1) == 0:  # a power of two
            self._write_trace(self._trace)

    def drifted(self) -> bool:
        """Returns whether the steps since the last call take longer or less long than they used to."""
        seconds, self._seconds = self._seconds, []
        if len(seconds) < DRIFT_STEPS:
            return False
        if self._usual is None:
            self._usual = usual_step(seconds)
        return drifted(self._usual, seconds)

    def replan(self, rates: Rates) -> None:
        """Lets the GPU update the best fraction at new rates."""
        self._rates, self._usual = rates, None
        self.executor.plan = auto_plan(self.executor.plan, rates)
        self._predicted = self._predict()
        self._log(
            f"megatron-s2: rank {self._rank}: optimizer steps drifted; rates measured again, the GPU "
            f"now updates {self.executor.plan.fraction:.1%}"
        )

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Returns a copy of state, see `Executor.read`. With an NVMe tier it is in a nameless file there,
        since a checkpoint copies all state, which may not fit into memory."""
        out = None
        if self.executor.plan.tiers.nvme and stop > start:
            directory = self._settings.nvme_dirs[0]
            with tempfile.NamedTemporaryFile(dir=directory) as file:
                try:  # writing to a hole that cannot be filled would end the process
                    os.posix_fallocate(file.fileno(), 0, 4 * (stop - start))
                except OSError as error:
                    raise OffloadError(
                        f"--s2-offload-nvme-dir {directory}: has not enough space for the copy of the "
                        f"state that a checkpoint takes: {error.strerror}"
                    ) from error
                out = torch.from_file(file.name, shared=True, size=stop - start)
        return self.executor.read(name, start, stop, out)

    def close(self) -> None:
        """Ends the executor's threads, and frees all memory and the files on NVMe."""
        self.executor.close()

    def _plan(self, elements: int, share: float) -> OffloadPlan:
        settings = self._settings
        plan = make_plan(
            elements,
            settings.gpu_fraction or 0.0,
            subgroup_size=settings.subgroup_size,
            gpu_budget=int(settings.gpu_budget * share),
            host_budget=None if settings.host_budget is None else int(settings.host_budget * share),
            nvme=bool(settings.nvme_dirs),
        )
        return auto_plan(plan, self._rates) if settings.gpu_fraction is None else plan

    def _predict(self) -> Simulation | None:
        if self._rates is None:
            return None
        return simulate(self.executor.plan, self._rates, flush_in_backward=self._late_reason is None)

    def _report(self) -> None:
        when = f"after backward ({self._late_reason})" if self._late_reason else "during backward"
        lines = [f"optimizer offload of rank 0: {self.executor.plan}", f"  gradients leave {when}"]
        if self._predicted is not None:
            lines.append(
                f"  predicted: {self._predicted.step_seconds:.4g} s a step beyond backward, "
                f"{self._predicted.bottleneck}"
            )
        self._log("\n".join(lines))
        on_gpu = torch.cuda.is_available() and self._settings.gpu_adam == "triton"
        if on_gpu and (note := rounding_note(torch.device("cuda", torch.cuda.current_device()))):
            self._log(note)

    def _write_trace(self, path: str) -> None:
        measured, predicted = self.executor.events, self._predicted.events
        begins = [min(event.start for event in of_update(events)) for events in (measured, predicted)]
        predicted = shifted(predicted, begins[0] - begins[1])
        try:
            write_trace(path, {"predicted": predicted, "measured": measured})
        except OSError as error:
            self._log(f"megatron-s2: --s2-offload-trace {path}: not written: {error}")
