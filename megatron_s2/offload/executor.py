"""The executor: one optimizer step over a plan, on the CPU and on the GPU at once.

During backward `flush` begins to copy the gradients of the CPU's share to the host. `step` submits the tasks
of each subgroup, in the plan's order, to one queue per kind of operation:

    tier    device   tasks
    host    cpu      d2h gradients (in backward) -> cpu update -> h2d weights
    host    gpu      h2d state -> gpu update -> d2h state, through a buffer set on the GPU
    gpu     gpu      gpu update
    nvme    either   nvme_read state -> as on the host, in a ring slot -> nvme_write state

The order of tasks follows from the buffers that they name (`queues.py`): a subgroup's state between steps,
its gradient on the host (in whose memory updated weights wait for their transfer), a buffer set, a ring slot
and the slot's gradient, which is copied to the host only during the step. Weights and gradients on the device
need no buffer: each element belongs to one subgroup, which writes the weight once and only reads the
gradient.

Every path does the elementwise operations that `adam.py` states, so where CPU and GPU round alike neither
plan nor order changes a bit.
"""

from __future__ import annotations

import itertools
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_s2.offload.adam import (
    AdamWSettings,
    State,
    check_gradient_scale,
    update_on_cpu,
    update_on_gpu,
)
from megatron_s2.offload.plan import OffloadPlan, Subgroup
from megatron_s2.offload.queues import ON_DEVICE, Access, Awaitable, Buffer, Queues, ThreadBackend
from megatron_s2.offload.state import (
    Parameter,
    ParameterSlice,
    StateStore,
    SubgroupMemory,
    check_layout,
    slices_of,
)
from megatron_s2.offload.trace import Event


class Executor:
    """A rank's optimizer state, zero at first, and its updates.

    Methods may be called from any thread; all but `flush` return when what they began is done. After a step
    that failed with part of the state updated, all but `skip` and `close` raise RuntimeError.

    Args:
        plan: tier and device of each subgroup; as many elements as `lay_out` returns.
        parameters: the parameters in ascending order of `start`, without overlap.
        backend: where the queues' operations run.
        directories, shares: as for `NvmeTier`, for a plan with subgroups of tier `nvme`.
        cpu_threads: number of threads of one CPU update.
        gpu_update: update on a GPU, by default the Triton kernel.

    Raises:
        ValueError: plan and parameters do not fit.
        ValueError, TierError: as `NvmeTier`.
        RuntimeError: as `HostMemory`.
    """

    def __init__(
        self,
        plan: OffloadPlan,
        parameters: Sequence[Parameter],
        backend: ThreadBackend,
        directories: Sequence[str | Path] = (),
        shares: Sequence[float] | None = None,
        cpu_threads: int = 1,
        gpu_update: Callable[..., None] = update_on_gpu,
    ) -> None:
        check_layout(plan, parameters, backend.device)
        self._plan, self._backend, self._gpu_update = plan, backend, gpu_update
        self._store = StateStore(plan, backend.device, directories, shares)
        self._parameters = [replace(p, weights=p.weights.detach()) for p in parameters]
        self._slices = [slices_of(s, self._parameters) for s in plan.subgroups]  # by subgroup
        self._slices_of: list[list[tuple[int, ParameterSlice]]] = [[] for _ in parameters]  # by parameter
        for subgroup, slices in enumerate(self._slices):
            for one in slices:
                self._slices_of[one.parameter].append((subgroup, one))
        self._gradients: dict[int, _Gradient] = {}  # of the current step, by parameter
        self._slices_sent: Counter[int] = Counter()  # copies of gradients submitted in backward, by subgroup
        self._broken: str | None = None
        self._lock = threading.RLock()
        workers = dict.fromkeys(("h2d", "d2h", "cpu", "gpu"), 1)
        if tier := self._store.tier:
            workers |= dict.fromkeys(("nvme_read", "nvme_write"), tier.directories)
        self._queues = Queues(workers, backend, {"cpu": cpu_threads})

    @property
    def plan(self) -> OffloadPlan:
        """The plan of the next step. Between steps it may be replaced by one that differs in devices only;
        another plan, or flushed gradients, raise ValueError."""
        return self._plan

    @plan.setter
    def plan(self, plan: OffloadPlan) -> None:
        with self._lock:
            if plan.with_fraction(0) != self._plan.with_fraction(0):
                raise ValueError("plan: must differ from the one before in devices only")
            if self._gradients:
                raise ValueError("plan: cannot change between a flush of gradients and its step")
            self._plan = plan

    @property
    def events(self) -> list[Event]:
        """The timeline of the latest step, from its first flush."""
        return self._queues.events()

    def has_gradient(self, index: int) -> bool:
        """Whether parameter `index` was flushed in the current step."""
        return index in self._gradients

    def mark(self) -> Awaitable | None:
        """Returns a mark of what the caller has begun on the device so far, for `flush`."""
        return self._backend.mark()

    def flush(self, index: int, source: torch.Tensor, after: Awaitable | None = None) -> None:
        """Takes the final gradient of parameter `index`, once per step. What the CPU updates of it is copied
        to the host while the caller goes on; `step` or `skip` raises errors of the copy.

        Args:
            source: as many elements as the weights, on the backend's device, of any float dtype; finished on
                the current stream or at the end of `after`, and not changed before `step` or `skip` has
                returned.
            after: what finishes the source: a collective, or a mark that several gradients share.

        Raises:
            ValueError: the parameter was flushed before, or the source has other elements, another device, or
                is not contiguous with `after`.
        """
        elements, device = self._parameters[index].weights.numel(), self._backend.device
        with self._lock:
            self._check_whole()
            if index in self._gradients:
                raise ValueError(f"flush of parameter {index}: was flushed before")
            if source.numel() != elements or source.device.type != device.type:
                raise ValueError(
                    f"flush of parameter {index}: source must have {elements} elements on {device}, not "
                    f"{source.numel()} on {source.device}"
                )
            if after is not None and not source.is_contiguous():
                raise ValueError(f"flush of parameter {index}: must be contiguous with `after`")
            mark = self.mark() if after is None else after
            gradient = _Gradient(source.detach().reshape(-1), mark)
            if not self._gradients:
                self._queues.restart_clock()
            self._gradients[index] = gradient
            for n, one in self._slices_of[index]:
                subgroup = self._plan.subgroups[n]
                if subgroup.tier == "host" and subgroup.device == "cpu":
                    self._send_gradient(subgroup, one)

    def step(self, settings: Sequence[AdamWSettings], gradient_scale: float = 1.0) -> None:
        """Updates everything from the flushed gradients.

        Args:
            settings: settings of this step, by parameter group.
            gradient_scale: what gradients are divided by: the loss scale over the clip coefficient.

        Raises:
            ValueError: settings are missing, the scale is out of range or gradients were not flushed; nothing
                has changed.
            Exception: the error of a queue, once all queues are at rest. A note says whether the state is
                whole (the step did not happen) or torn.
        """
        with self._lock:
            self._check_whole()
            check_gradient_scale(gradient_scale)
            groups = 1 + max(p.group for p in self._parameters)
            if len(settings) < groups:
                raise ValueError(f"settings of {len(settings)} groups: parameters have {groups}")
            missing = [n for n in range(len(self._parameters)) if n not in self._gradients]
            if missing:
                raise ValueError(
                    f"step: gradients of {len(missing)} of {len(self._parameters)} parameters were not "
                    f"flushed, first {missing[0]}"
                )
            step = _Step(tuple(settings), gradient_scale, self.mark(), self._store.version)
            try:
                self._store.save_changes()
                self._submit(step)
                self._queues.join()
            except BaseException as error:
                self._broken = "optimizer state: a step failed and its queues are not at rest"
                self._queues.abandon(error)
                self._after_failure(step, error)
                raise
            self._store.version += 1
            self._forget_gradients()

    def skip(self) -> None:
        """Drops the flushed gradients; the state does not change.

        Raises:
            Exception: the error of a copy of gradients.
        """
        with self._lock:
            try:
                self._queues.join()
            except BaseException as error:
                self._queues.abandon(error)
                raise
            finally:
                self._forget_gradients()

    def read(self, name: str, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """Returns a float32 copy of `master`, `exp_avg` or `exp_avg_sq` on the CPU, in `out` where given.

        Raises:
            ValueError: no such name or elements.
            TierError: state on NVMe cannot be read.
        """
        out = torch.empty(max(stop - start, 0)) if out is None else out
        with self._lock:
            self._check_whole()
            for view, a, b in self._store.views(self._plan, name, start, stop):
                out[a - start : b - start].copy_(view)
        return out

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Overwrites elements of `master`, `exp_avg` or `exp_avg_sq` from `start` on.

        Args:
            values: `[n]` of any float dtype, on any device.

        Raises:
            ValueError, TierError: as `read`.
        """
        values = values.detach().reshape(-1)
        with self._lock:
            self._check_whole()
            stop = start + values.numel()
            for view, a, b in self._store.views(self._plan, name, start, stop, modify=True):
                view.copy_(values[a - start : b - start])

    def set_masters(self) -> None:
        """Sets the masters to the model's weights."""
        for p in self._parameters:
            self.write("master", p.start, p.weights)

    def close(self) -> None:
        """Ends the queues' threads, and frees all memory and the files on NVMe."""
        self._queues.close()
        self._store.close()
        self._gradients.clear()

    # Gradients

    def _send_gradient(self, subgroup: Subgroup, one: ParameterSlice) -> None:
        """Submits the copy of a slice of a gradient to the subgroup's gradient on the host."""
        memory, sent = self._store[subgroup], self._slices_sent[subgroup.index]
        self._slices_sent[subgroup.index] += 1
        access = (memory.gradient_buffer, _gradient_content(sent), _gradient_content(sent + 1))
        copy = partial(self._copy_gradients, [one], memory.gradient)
        self._queues.submit("d2h", f"gradients {subgroup.index}", copy, [access])

    def _gradient_of(self, one: ParameterSlice) -> torch.Tensor:
        """The gradient of a slice where backward left it, for use in a task."""
        source, mark = self._gradients[one.parameter]
        self._backend.wait(mark)
        return source[one.offset : one.offset + one.stop - one.start]

    def _copy_gradients(self, slices: Sequence[ParameterSlice], target: torch.Tensor) -> None:
        for one in slices:
            target[one.start : one.stop].copy_(self._gradient_of(one), non_blocking=True)

    def _forget_gradients(self) -> None:
        self._gradients.clear()
        self._slices_sent.clear()
        self._store.end_step()

    # The step

    def _submit(self, step: _Step) -> None:
        """Submits all tasks of a step, in the plan's order."""
        in_slot = {slot: slot.content for slot in self._store.slots}  # once the tasks so far have ended
        sets = itertools.cycle(self._store.sets)
        for subgroup in self._plan.order(step.version):
            memory, (old, new) = self._store[subgroup], step.contents(subgroup)
            submit = partial(self._submit_task, step, subgroup)
            if subgroup.tier == "gpu":
                update = partial(self._update_on_device, step, subgroup, memory.state)
                submit("gpu", "update", update, (memory.storage, old, new), low_priority=True)
                continue
            if subgroup.tier == "nvme":
                before, in_slot[memory.state_buffer] = in_slot[memory.state_buffer], new
                if before != old:
                    load = partial(self._store.tier.load, memory.record)
                    submit(
                        "nvme_read",
                        "state",
                        load,
                        (memory.storage, old, old),
                        (memory.state_buffer, before, old),
                    )
            if subgroup.device == "gpu":
                self._submit_update_through_gpu(step, subgroup, submit, *next(sets))
            else:
                self._submit_update_on_host(step, subgroup, submit)
            if subgroup.tier == "nvme":
                store = partial(self._store.tier.store, memory.record)
                submit(
                    "nvme_write", "state", store, (memory.state_buffer, new, new), (memory.storage, old, new)
                )

    def _submit_task(
        self,
        step: _Step,
        subgroup: Subgroup,
        queue: str,
        what: str,
        run: Callable[[], object],
        *accesses: Access,
        low_priority: bool = False,
    ) -> None:
        """Submits a task of a subgroup; on the device it comes after what the caller of `step` began."""
        if queue in ON_DEVICE:
            run = partial(self._run_after, step.mark, run)
        self._queues.submit(queue, f"{what} {subgroup.index}", run, accesses, low_priority)

    def _submit_update_through_gpu(
        self, step: _Step, subgroup: Subgroup, submit: Callable[..., None], buffer_set: State, buffer: Buffer
    ) -> None:
        """Submits the upload of the state to a buffer set, its update there and the download."""
        memory, (old, new) = self._store[subgroup], step.contents(subgroup)
        state, on_gpu = buffer_set.cut(0, subgroup.size), ("on gpu", *old)
        upload, download = partial(_copy, state, memory.state), partial(_copy, memory.state, state)
        update = partial(self._update_on_device, step, subgroup, state)
        submit("h2d", "state", upload, (memory.state_buffer, old, on_gpu), (buffer, None, old))
        submit("gpu", "update", update, (buffer, old, new))
        submit("d2h", "state", download, (buffer, new, None), (memory.state_buffer, on_gpu, new))

    def _submit_update_on_host(self, step: _Step, subgroup: Subgroup, submit: Callable[..., None]) -> None:
        """Submits the update of the state in place and the upload of the weights; for tier `nvme` first the
        download of the gradients."""
        memory, (old, new) = self._store[subgroup], step.contents(subgroup)
        buffer, weights = memory.gradient_buffer, ("weights", subgroup.index)
        slices = self._slices[subgroup.index]
        gradients = _gradient_content(self._slices_sent[subgroup.index])
        if subgroup.tier == "nvme":
            gradients = _gradient_content(len(slices))
            gather = partial(self._copy_gradients, slices, memory.gradient)
            submit("d2h", "gradients", gather, (buffer, None, gradients))
        update = partial(self._update_in_place, step, subgroup, memory)
        submit("cpu", "update", update, (memory.state_buffer, old, new), (buffer, gradients, weights))
        upload = partial(self._upload_weights, slices, memory.gradient)
        submit("h2d", "weights", upload, (buffer, weights, None))

    # Functions of tasks

    def _run_after(self, mark: Awaitable | None, run: Callable[[], object]) -> None:
        self._backend.wait(mark)
        run()

    def _update_in_place(self, step: _Step, subgroup: Subgroup, memory: SubgroupMemory) -> None:
        step.updated.add(subgroup.index)
        for one in self._slices[subgroup.index]:
            memory.gradient[one.stop : one.end].zero_()
            state, gradient = memory.state.cut(one.start, one.end), memory.gradient[one.start : one.end]
            weights = one.weights_in(memory.gradient)
            update_on_cpu(state, gradient, weights, step.settings[one.group], step.gradient_scale)

    def _upload_weights(self, slices: Sequence[ParameterSlice], gradient: torch.Tensor) -> None:
        for one in slices:
            one.weights.copy_(one.weights_in(gradient), non_blocking=True)

    def _update_on_device(self, step: _Step, subgroup: Subgroup, state: State) -> None:
        """Updates state on the backend's device by gradients where backward left them."""
        step.updated.add(subgroup.index)
        on_cpu = self._backend.device.type == "cpu"
        update = partial(update_on_cpu, keep_gradient=True) if on_cpu else self._gpu_update
        for one in self._slices[subgroup.index]:
            cut = state.cut(one.start, one.end if on_cpu else one.stop)
            settings = step.settings[one.group]
            update(cut, self._gradient_of(one), one.weights, settings, step.gradient_scale)

    # Failure

    def _check_whole(self) -> None:
        if self._broken:
            raise RuntimeError(self._broken)

    def _after_failure(self, step: _Step, error: BaseException) -> None:
        """Notes whether the state is whole; if so, drops the step."""
        if step.updated:
            self._broken = (
                f"optimizer state: a step failed with {len(step.updated)} of {len(self._slices)} subgroups "
                f"changed (first {min(step.updated)}); resume from the last checkpoint"
            )
            error.add_note(self._broken)
            return
        self._broken = None
        error.add_note("optimizer state: is whole, as before this step")
        self._forget_gradients()


class _Gradient(NamedTuple):
    """A parameter's gradient `[n]`, finished at a mark of the backend or the end of a collective."""

    source: torch.Tensor
    mark: Awaitable | None


@dataclass(frozen=True)
class _Step:
    """What the tasks of a step have in common."""

    settings: tuple[AdamWSettings, ...]
    gradient_scale: float
    mark: Awaitable | None
    version: int  # number of steps before this one
    updated: set[int] = field(default_factory=set)  # subgroups whose update has begun

    def contents(self, subgroup: Subgroup) -> tuple[tuple[int, int], tuple[int, int]]:
        """Contents of a buffer with the subgroup's state before and after the step."""
        return (subgroup.index, self.version), (subgroup.index, self.version + 1)


def _gradient_content(slices: int) -> tuple[str, int] | None:
    """Content of a gradient buffer on the host that has the gradients of so many slices."""
    return ("gradients", slices) if slices else None


def _copy(target: State, source: State) -> None:
    for to, x in zip(target, source):
        to.copy_(x, non_blocking=True)
