"""One optimizer step over a plan: gradients, state and weights on their ways, updates on both sides.

During backward `flush` sends the gradients of the CPU's share to the host. `step` then lets the queues work
off the plan's subgroups: the CPU updates its share in place and sends 16-bit weights to the GPU; the GPU's
share travels up, is updated, and travels down through a few buffer sets; state on NVMe passes through the
ring on either way. Residents on the GPU are updated there and move nowhere.

An update is elementwise and every path does the same operations (`adam.py`), so that neither plan, order nor
subgroup size changes a bit.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import torch

from megatron_s2.offload.adam import (
    CHUNK,
    AdamW,
    State,
    check_gradient_scale,
    update_on_cpu,
    update_on_gpu,
)
from megatron_s2.offload.arena import Arena
from megatron_s2.offload.flat import Gradients, Parameter, Piece, Run, check_layout, runs_of
from megatron_s2.offload.nvme import NvmeTier
from megatron_s2.offload.places import Places
from megatron_s2.offload.plan import OffloadPlan, Subgroup
from megatron_s2.offload.queues import (
    IN_TURN,
    LAST,
    ON_DEVICE,
    Awaited,
    Backend,
    Buffer,
    Queues,
    Task,
    Use,
)
from megatron_s2.offload.trace import Event


class Executor:
    """Holds a rank's optimizer state and updates it. New state is zero: see `set_masters` and `write`.

    Methods may be called from any thread; all but `flush` return when what they began is done.

    Args:
        plan: what lies where and who updates it; as many elements as `lay_out` says.
        parameters: in the order of their starts, without overlap.
        backend: where the queues work.
        arena: for the plan's subgroups of tier `host`.
        tier: for those of tier `nvme`, in order; None without.
        cpu_threads: of one CPU update.
        gpu_update: on a GPU; by default the Triton kernel, which rounds as the CPU does.

    Raises:
        ValueError: plan, parameters and tier do not fit.
    """

    def __init__(
        self,
        plan: OffloadPlan,
        parameters: Sequence[Parameter],
        backend: Backend,
        arena: Arena,
        tier: NvmeTier | None = None,
        cpu_threads: int = 1,
        gpu_update: Callable[..., None] = update_on_gpu,
    ) -> None:
        check_layout(plan, parameters, backend.device)
        self._plan, self._backend, self._gpu_update = plan, backend, gpu_update
        self._places = Places(plan, backend.device, arena, tier)
        self._parameters = [replace(p, weights=p.weights.detach()) for p in parameters if p.weights.numel()]
        self._runs = {s.index: runs_of(s, self._parameters) for s in plan.subgroups}
        self._flushed = Gradients(self._parameters, backend.device, backend.wait)
        self._flushes: dict[int, list[Task]] = {}  # of subgroups that the CPU updates
        self._broken: str | None = None
        self._lock = threading.RLock()
        workers = dict.fromkeys(("h2d", "d2h", "cpu", "gpu"), 1)
        if tier:
            workers |= dict.fromkeys(("nvme_read", "nvme_write"), tier.directories)
        self._queues = Queues(workers, backend, {"cpu": cpu_threads})

    @property
    def plan(self) -> OffloadPlan:
        """What the next step follows. May be replaced between steps by one that differs in its devices only;
        otherwise, or with gradients flushed, that is a ValueError."""
        return self._plan

    @plan.setter
    def plan(self, plan: OffloadPlan) -> None:
        with self._lock:
            if _layout_of(plan) != _layout_of(self._plan):
                raise ValueError("plan: must differ from the one before in devices only")
            if self._flushed:
                raise ValueError("plan: cannot change between a flush of gradients and its step")
            self._plan = plan

    @property
    def events(self) -> list[Event]:
        """The timeline of the latest step, from its first flush."""
        return self._queues.events()

    def flush(self, start: int, stop: int, source: torch.Tensor, after: Awaited | None = None) -> None:
        """Take the final gradients of elements `start` to `stop`; they travel while the caller goes on.

        Each element of every parameter once per step, in any order and pieces. Errors of the copy come out of
        `step` or `skip`.

        Args:
            start, stop: within one parameter.
            source: `[stop - start]` on the backend's device, of any float dtype, finished on the current
                stream, or at the end of `after`. Must stay as it is from then until `step` or `skip` has
                returned.
            after: what finishes the source.

        Raises:
            ValueError: elements outside of parameters, or flushed before, or another number of gradients, or
                not contiguous ones with `after`.
            RuntimeError: an earlier step broke the state.
        """
        with self._lock:
            self._check_whole()
            if after is not None and not source.is_contiguous():
                raise ValueError(f"flush of elements {start} to {stop}: must be contiguous with `after`")
            source = source.detach().reshape(-1)
            mark = self._backend.mark(after)
            first_of_step = not self._flushed
            piece = self._flushed.add(start, stop, source, mark)
            if first_of_step:
                self._queues.restart_clock()
            for subgroup in self._subgroups(start, stop):
                if subgroup.tier == "host" and subgroup.device == "cpu":
                    self._send(subgroup, piece)

    def step(self, settings: Sequence[AdamW], gradient_scale: float = 1.0) -> None:
        """Update everything from the flushed gradients.

        Args:
            settings: of each group, with the number of this step.
            gradient_scale: what gradients are divided by: the loss scale over the clip coefficient.

        Raises:
            ValueError: settings are missing, the scale is out of range or gradients were not flushed; nothing
                happened.
            RuntimeError: an earlier step broke the state.
            Exception: what failed in a queue, once all queues are at rest. A note says whether the state is
                whole (the step did not happen) or in pieces; then nothing but `close` works any more.
        """
        with self._lock:
            self._check_whole()
            check_gradient_scale(gradient_scale)
            groups = 1 + max(p.group for p in self._parameters)
            if len(settings) < groups:
                raise ValueError(f"settings of {len(settings)} groups: parameters have {groups}")
            self._flushed.check_complete()
            try:
                self._places.save_changes()
                self._submit(_Step(tuple(settings), gradient_scale, self._backend.mark(), self._places))
                self._queues.join()
            except BaseException as error:
                self._queues.abandon(error)
                self._after_failure(error)
                raise
            self._places.version += 1
            self._forget_gradients()

    def skip(self) -> None:
        """Forget the flushed gradients; the state stays as it is.

        Raises:
            Exception: what failed in a flush.
        """
        with self._lock:
            try:
                self._queues.join()
            finally:
                self._forget_gradients()

    def read(self, name: str, start: int, stop: int, out: torch.Tensor | None = None) -> torch.Tensor:
        """A copy of `master`, `exp_avg` or `exp_avg_sq`, elements `start` to `stop`: float32 on the CPU, in
        `out` where that is given.

        Raises:
            ValueError: no such name or elements.
            RuntimeError: an earlier step broke the state, or it cannot be read.
        """
        out = torch.empty(max(stop - start, 0)) if out is None else out
        with self._lock:
            self._check_whole()
            for place, a, b in self._places.stretches(self._plan, name, start, stop):
                out[a - start : b - start].copy_(place)
        return out

    def write(self, name: str, start: int, values: torch.Tensor) -> None:
        """Replace elements of `master`, `exp_avg` or `exp_avg_sq` from `start` on.

        Args:
            values: `[n]` of any float dtype, on any device.

        Raises:
            ValueError, RuntimeError: as `read`.
        """
        values = values.detach().reshape(-1)
        with self._lock:
            self._check_whole()
            stop = start + values.numel()
            for place, a, b in self._places.stretches(self._plan, name, start, stop, changes=True):
                place.copy_(values[a - start : b - start])

    def set_masters(self) -> None:
        """Masters from the model's weights, as at the beginning."""
        for p in self._parameters:
            self.write("master", p.start, p.weights)

    def set_weights(self) -> None:
        """The model's weights from the masters, as after loading."""
        for p in self._parameters:
            p.weights.copy_(self.read("master", p.start, p.stop))

    def close(self) -> None:
        """End the queues, let go of all memory and of the files on NVMe."""
        self._queues.close()
        self._places.close()
        self._flushed.clear()

    def _subgroups(self, start: int, stop: int) -> tuple[Subgroup, ...]:
        """Those that hold elements `start` to `stop`."""
        first, last = start // self._plan.subgroup_size, (stop - 1) // self._plan.subgroup_size
        return self._plan.subgroups[first : last + 1]

    # Gradients

    def _send(self, subgroup: Subgroup, piece: Piece) -> None:
        """Gradients of one piece to the arena, after those that were sent there before."""
        index = subgroup.index
        sent = self._flushes.setdefault(index, [])
        start, stop = max(piece.start, subgroup.start), min(piece.stop, subgroup.stop)
        target = self._places.gradient(subgroup)[start - subgroup.start : stop - subgroup.start]
        source = piece.source[start - piece.start : stop - piece.start]
        task = self._queues.submit(
            "d2h",
            f"gradients {index}",
            partial(self._after, piece.mark, partial(target.copy_, source, non_blocking=True)),
            after=sent[-1:],
            uses=[Use(self._places.gradients[index], _sent(len(sent)), _sent(len(sent) + 1))],
        )
        sent.append(task)

    def _forget_gradients(self) -> None:
        self._flushed.clear()
        self._flushes = {}
        self._places.forget_step()

    # The step

    def _submit(self, step: _Step) -> None:
        """All tasks of a step, in the plan's order."""
        for subgroup in self._plan.order(step.version):
            if subgroup.tier == "gpu":
                update = partial(self._update_there, self._places.state(subgroup), subgroup, step)
                uses = [Use(self._places.homes[subgroup.index], step.old(subgroup), step.new(subgroup))]
                self._do(step, "gpu", "update", subgroup, update, uses=uses, urgency=LAST)
                continue
            there = self._bring(step, subgroup) if subgroup.tier == "nvme" else []
            through = self._through_gpu if subgroup.device == "gpu" else self._through_cpu
            done = through(step, subgroup, there)
            if subgroup.tier == "nvme":
                self._put_back(step, subgroup, done)

    def _do(
        self,
        step: _Step,
        queue: str,
        what: str,
        subgroup: Subgroup,
        run: Callable[[], object],
        *,
        after: Sequence[Task] = (),
        uses: Sequence[Use],
        urgency: int = IN_TURN,
    ) -> Task:
        """Submit a task about a subgroup; on the device it comes after what the caller of `step` began."""
        if queue in ON_DEVICE:
            run = partial(self._after, step.mark, run)
        name = f"{what} {subgroup.index}"
        return self._queues.submit(queue, name, run, after=after, uses=uses, urgency=urgency)

    def _home(self, subgroup: Subgroup) -> Buffer:
        """From which updates take its state."""
        if subgroup.tier == "nvme":
            return self._places.slots[self._places.slot(subgroup)]
        return self._places.homes[subgroup.index]

    def _through_gpu(self, step: _Step, subgroup: Subgroup, there: Sequence[Task]) -> Task:
        """Up, updated and down again, by the buffer set whose turn it is."""
        n = step.on_gpu % len(self._places.sets)
        step.on_gpu += 1
        old, new = step.old(subgroup), step.new(subgroup)
        home, buffer = self._home(subgroup), self._places.set_buffers[n]
        on_host, on_gpu = self._places.state(subgroup), self._places.sets[n].cut(0, subgroup.size)
        up = self._do(
            *(step, "h2d", "state", subgroup, partial(_copy, on_gpu, on_host)),
            after=[*there, *step.set_given.get(n, [])],
            uses=[Use(home, old, ("away", *old)), Use(buffer, None, old)],
        )
        updated = self._do(
            *(step, "gpu", "update", subgroup, partial(self._update_there, on_gpu, subgroup, step)),
            after=[up],
            uses=[Use(buffer, old, new)],
        )
        down = self._do(
            *(step, "d2h", "state", subgroup, partial(_copy, on_host, on_gpu)),
            after=[updated],
            uses=[Use(buffer, new, None), Use(home, ("away", *old), new)],
        )
        step.set_given[n] = [down]
        return down

    def _through_cpu(self, step: _Step, subgroup: Subgroup, there: Sequence[Task]) -> Task:
        """Updated where it is; its weights go up. Gradients of tier `nvme` come down only now."""
        gradient, weights = self._places.gradient(subgroup), ("weights", subgroup.index)
        if subgroup.tier == "nvme":
            slot = self._places.slot(subgroup)
            buffer, filled = self._places.slot_gradients[slot], ("gradients", subgroup.index)
            gather = partial(self._flushed.gather, subgroup.start, subgroup.stop, gradient)
            came = self._do(
                *(step, "d2h", "gradients", subgroup, gather),
                after=[*there, *step.slot_gradient_given.get(slot, [])],
                uses=[Use(buffer, None, filled)],
            )
            there = [*there, came]
        else:
            sent = self._flushes.get(subgroup.index, [])
            buffer, filled = self._places.gradients[subgroup.index], _sent(len(sent))
            there = sent[-1:]
        updated = self._do(
            *(step, "cpu", "update", subgroup, partial(self._update_here, subgroup, gradient, step)),
            after=there,
            uses=[
                Use(self._home(subgroup), step.old(subgroup), step.new(subgroup)),
                Use(buffer, filled, weights),
            ],
        )
        sent = self._do(
            *(step, "h2d", "weights", subgroup, partial(self._send_weights, subgroup, gradient)),
            after=[updated],
            uses=[Use(buffer, weights, None)],
        )
        if subgroup.tier == "nvme":
            step.slot_gradient_given[slot] = [sent]
        return updated

    def _bring(self, step: _Step, subgroup: Subgroup) -> list[Task]:
        """From NVMe into its slot, if it is not there yet."""
        slot, old = self._places.slot(subgroup), step.old(subgroup)
        before, step.in_slot[slot] = step.in_slot[slot], old
        if before == old:
            return []
        load = partial(self._places.tier.load, self._places.number(subgroup))
        uses = [
            Use(self._places.homes[subgroup.index], old, old),
            Use(self._places.slots[slot], before, old),
        ]
        after = step.slot_given.get(slot, [])
        return [self._do(step, "nvme_read", "state", subgroup, load, after=after, uses=uses)]

    def _put_back(self, step: _Step, subgroup: Subgroup, done: Task) -> None:
        """From its slot to NVMe; it stays there until another one comes."""
        slot, old, new = self._places.slot(subgroup), step.old(subgroup), step.new(subgroup)
        store = partial(self._places.tier.store, self._places.number(subgroup))
        uses = [
            Use(self._places.slots[slot], new, new),
            Use(self._places.homes[subgroup.index], old, new),
        ]
        written = self._do(step, "nvme_write", "state", subgroup, store, after=[done], uses=uses)
        step.slot_given[slot], step.in_slot[slot] = [written], new

    # What tasks do

    def _after(self, mark: object, run: Callable[[], object]) -> None:
        self._backend.wait(mark)
        run()

    def _update_here(self, subgroup: Subgroup, gradient: torch.Tensor, step: _Step) -> None:
        state = self._places.state(subgroup)
        for run in self._runs[subgroup.index]:
            a, b = run.start - subgroup.start, run.end - subgroup.start
            gradient[run.stop - subgroup.start : b].zero_()
            weights = run.in_place_of(gradient[a:b])
            settings = step.settings[run.group]
            update_on_cpu(state.cut(a, b), gradient[a:b], weights, settings, step.gradient_scale)

    def _send_weights(self, subgroup: Subgroup, gradient: torch.Tensor) -> None:
        for run in self._runs[subgroup.index]:
            a, b = run.start - subgroup.start, run.end - subgroup.start
            run.weights.copy_(run.in_place_of(gradient[a:b]), non_blocking=True)

    def _update_there(self, state: State, subgroup: Subgroup, step: _Step) -> None:
        """On the backend's device, state there; gradients are where backward left them."""
        for run in self._runs[subgroup.index]:
            if self._backend.device.type == "cpu":
                self._update_copies(state, subgroup, run, step)
                continue
            for a, b, source, _ in self._flushed.parts(run.start, run.stop):
                part = state.cut(a - subgroup.start, b - subgroup.start)
                weights = run.weights[a - run.start : b - run.start]
                self._gpu_update(part, source, weights, step.settings[run.group], step.gradient_scale)

    def _update_copies(self, state: State, subgroup: Subgroup, run: Run, step: _Step) -> None:
        """By the CPU's update, which overwrites gradients: so on copies of them."""
        for start in range(run.start, run.end, CHUNK):
            stop = min(start + CHUNK, run.end)
            gradient = torch.empty(stop - start)
            self._flushed.gather(start, stop, gradient)
            part = state.cut(start - subgroup.start, stop - subgroup.start)
            weights = run.weights[start - run.start : stop - run.start]
            update_on_cpu(part, gradient, weights, step.settings[run.group], step.gradient_scale)

    # Failure

    def _check_whole(self) -> None:
        if self._broken:
            raise RuntimeError(self._broken)

    def _after_failure(self, error: BaseException) -> None:
        """Find out whether the state is whole; where it is, forget the step."""
        if torn := self._places.torn():
            self._broken = (
                f"optimizer state: a step failed with {len(torn)} of {len(self._runs)} subgroups changed "
                f"(first {torn[0]}); resume from the last checkpoint"
            )
            error.add_note(self._broken)
            return
        error.add_note("optimizer state: is whole, as before this step")
        self._forget_gradients()


class _Step:
    """What the tasks of a step have in common; while they are submitted, who used shared places last."""

    def __init__(
        self, settings: tuple[AdamW, ...], gradient_scale: float, mark: object, places: Places
    ) -> None:
        self.settings, self.gradient_scale, self.mark = settings, gradient_scale, mark
        self.version = places.version
        self.in_slot = [buffer.content for buffer in places.slots]
        self.slot_given: dict[int, list[Task]] = {}
        self.slot_gradient_given: dict[int, list[Task]] = {}
        self.set_given: dict[int, list[Task]] = {}
        self.on_gpu = 0

    def old(self, subgroup: Subgroup) -> tuple[int, int]:
        """Its state before the step."""
        return subgroup.index, self.version

    def new(self, subgroup: Subgroup) -> tuple[int, int]:
        """Its state after the step."""
        return subgroup.index, self.version + 1


def _sent(count: int) -> tuple[str, int] | None:
    """What is in the gradients of a subgroup after so many pieces."""
    return ("gradients", count) if count else None


def _copy(target: State, source: State) -> None:
    for to, x in zip(target, source):
        to.copy_(x, non_blocking=True)


def _layout_of(plan: OffloadPlan) -> tuple:
    """What buffers follow from."""
    where = tuple((s.start, s.stop, s.tier) for s in plan.subgroups)
    return where, plan.gradient_bytes, plan.buffer_sets, plan.ring_slots
