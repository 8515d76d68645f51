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
from megatron_s2.offload.plan import OffloadPlan, Subgroup
from megatron_s2.offload.queues import FIRST, LAST, Backend, Buffer, Queues, Task, Use
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
    ) -> None:
        check_layout(plan, parameters, backend.device)
        on_nvme = [s for s in plan.subgroups if s.tier == "nvme"]
        if [s.size for s in on_nvme] != list(tier.sizes if tier else ()):
            raise ValueError(f"tier: must be of the plan's {len(on_nvme)} subgroups of tier nvme")
        self._plan, self._backend, self._arena, self._tier = plan, backend, arena, tier
        self._parameters = [p for p in parameters if p.weights.numel()]
        self._runs = {s.index: runs_of(s, self._parameters) for s in plan.subgroups}
        self._number = {s.index: j for j, s in enumerate(on_nvme)}  # of a subgroup within its tier

        device = backend.device
        self._resident = {
            s.index: State(*torch.zeros(3, s.size, device=device)) for s in plan.subgroups if s.tier == "gpu"
        }
        self._sets = [
            State(*torch.empty(3, plan.slot_elements, device=device)) for _ in range(plan.buffer_sets)
        ]
        # What is in each place, so that queues find out if somebody is there too early. State of subgroup i
        # after v steps is (i, v).
        self._version = 0
        self._homes = {s.index: Buffer(f"state {s.index}", (s.index, 0)) for s in plan.subgroups}
        self._gradients = {
            s.index: Buffer(f"gradients {s.index}") for s in plan.subgroups if s.tier == "host"
        }
        self._set_buffers = [Buffer(f"buffer set {n}") for n in range(plan.buffer_sets)]
        slots = range(tier.slots if tier else 0)
        self._slots = [Buffer(f"ring slot {n}") for n in slots]
        self._slot_gradients = [Buffer(f"gradients of ring slot {n}") for n in slots]
        self._unsaved: set[int] = set()  # subgroups that `write` changed in their slots

        self._flushed = Gradients(self._parameters, device)
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
            if _places(plan) != _places(self._plan):
                raise ValueError("plan: must differ from the one before in devices only")
            if self._flushed:
                raise ValueError("plan: cannot change between a flush of gradients and its step")
            self._plan = plan

    @property
    def events(self) -> list[Event]:
        """The timeline of the latest step, from its first flush."""
        return self._queues.events()

    def flush(self, start: int, stop: int, source: torch.Tensor) -> None:
        """Take the final gradients of elements `start` to `stop`; they travel while the caller goes on.

        Each element of every parameter once per step, in any order and pieces. Errors of the copy come out of
        `step` or `skip`.

        Args:
            start, stop: within one parameter.
            source: `[stop - start]` on the backend's device, of any float dtype, finished on the current
                stream. Must stay as it is until `step` or `skip` has returned.

        Raises:
            ValueError: elements outside of parameters, or flushed before, or another number of gradients.
            RuntimeError: an earlier step broke the state.
        """
        with self._lock:
            self._check_whole()
            first_of_step = not self._flushed
            piece = self._flushed.add(start, stop, source)
            if first_of_step:
                self._queues.restart_clock()
            mark = self._backend.mark()
            first, last = start // self._plan.subgroup_size, (stop - 1) // self._plan.subgroup_size
            for subgroup in self._plan.subgroups[first : last + 1]:
                if subgroup.tier == "host" and subgroup.device == "cpu":
                    self._send(subgroup, piece, mark)

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
                self._save_written()
                self._submit(settings, gradient_scale, self._backend.mark())
                self._queues.join()
            except BaseException as error:
                self._queues.abandon(error)
                self._after_failure(error)
                raise
            self._version += 1
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

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """A copy of `master`, `exp_avg` or `exp_avg_sq`, elements `start` to `stop`: float32 on the CPU.

        Raises:
            ValueError: no such name or elements.
            RuntimeError: an earlier step broke the state, or it cannot be read.
        """
        out = torch.empty(max(stop - start, 0))
        with self._lock:
            for place, a, b in self._stretches(name, start, stop):
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
            for place, a, b in self._stretches(name, start, start + values.numel(), changes=True):
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
        """End the queues, let go of all memory and remove the files on NVMe."""
        self._queues.close()
        self._arena.close()
        if self._tier:
            self._tier.close()
        self._resident.clear()
        self._sets.clear()
        self._flushed.clear()

    # Gradients

    def _send(self, subgroup: Subgroup, piece: Piece, mark: object) -> None:
        """Gradients of one piece to the arena, after those that were sent there before."""
        index = subgroup.index
        sent = self._flushes.setdefault(index, [])
        start, stop = max(piece.start, subgroup.start), min(piece.stop, subgroup.stop)
        target = self._arena[index].gradient[start - subgroup.start : stop - subgroup.start]
        source = piece.source[start - piece.start : stop - piece.start]
        before = ("gradients", len(sent)) if sent else None
        task = self._queues.submit(
            "d2h",
            f"gradients {index}",
            partial(self._after, mark, partial(target.copy_, source, non_blocking=True)),
            after=sent[-1:],
            uses=[Use(self._gradients[index], before, ("gradients", len(sent) + 1))],
        )
        sent.append(task)

    def _forget_gradients(self) -> None:
        self._flushed.clear()
        self._flushes = {}
        for buffer in (*self._gradients.values(), *self._slot_gradients, *self._set_buffers):
            buffer.content = None

    # The step

    def _submit(self, settings: Sequence[AdamW], scale: float, mark: object) -> None:
        """All tasks of a step, in the plan's order."""
        version = self._version
        self._in_slot = [buffer.content for buffer in self._slots]
        self._slot_given: list[list[Task]] = [[] for _ in self._slots]
        self._slot_gradient_given: list[list[Task]] = [[] for _ in self._slots]
        set_given: list[list[Task]] = [[] for _ in self._sets]
        on_gpu = 0

        def submit(queue: str, name: str, run: Callable[[], object], **others: object) -> Task:
            return self._queues.submit(queue, name, partial(self._after, mark, run), **others)

        for subgroup in self._plan.order(version):
            i, old, new = subgroup.index, (subgroup.index, version), (subgroup.index, version + 1)
            if subgroup.tier == "gpu":
                update = partial(self._update_there, self._resident[i], subgroup, settings, scale)
                submit("gpu", f"update {i}", update, uses=[Use(self._homes[i], old, new)], urgency=LAST)
                continue
            home, there = self._homes[i], []
            if subgroup.tier == "nvme":
                home = self._slots[self._tier.slot_of(self._number[i])]
                there = self._bring(subgroup, submit)
            if subgroup.device == "gpu":
                n = on_gpu % len(self._sets)
                on_gpu += 1
                done = self._through_gpu(subgroup, home, n, [*there, *set_given[n]], settings, scale, submit)
                set_given[n] = [done]
            else:
                done = self._through_cpu(subgroup, home, there, settings, scale, submit)
            if subgroup.tier == "nvme":
                self._put_back(subgroup, done, submit)

    def _through_gpu(self, subgroup, home, n, after, settings, scale, submit) -> Task:
        """Up, updated and down again, by buffer set n."""
        i, old, new = subgroup.index, (subgroup.index, self._version), (subgroup.index, self._version + 1)
        host, there, buffer = self._state(subgroup), self._sets[n].cut(0, subgroup.size), self._set_buffers[n]
        up = submit(
            "h2d",
            f"state {i}",
            partial(_copy, there, host),
            after=after,
            uses=[Use(home, old, ("away", *old)), Use(buffer, None, old)],
        )
        updated = submit(
            "gpu",
            f"update {i}",
            partial(self._update_there, there, subgroup, settings, scale),
            after=[up],
            uses=[Use(buffer, old, new)],
        )
        return submit(
            "d2h",
            f"state {i}",
            partial(_copy, host, there),
            after=[updated],
            uses=[Use(buffer, new, None), Use(home, ("away", *old), new)],
        )

    def _through_cpu(self, subgroup, home, there, settings, scale, submit) -> Task:
        """Updated where it is; its weights go up. Gradients of tier `nvme` come down only now."""
        i, old, new = subgroup.index, (subgroup.index, self._version), (subgroup.index, self._version + 1)
        if subgroup.tier == "nvme":
            slot = self._tier.slot_of(self._number[i])
            gradient = self._tier.slice_of(self._number[i]).gradient
            buffer, filled = self._slot_gradients[slot], ("gradients", i)
            came = submit(
                "d2h",
                f"gradients {i}",
                partial(self._flushed.gather, subgroup.start, subgroup.stop, gradient),
                after=[*there, *self._slot_gradient_given[slot]],
                uses=[Use(buffer, None, filled)],
            )
            after = [*there, came]
        else:
            gradient = self._arena[i].gradient
            after = self._flushes.get(i, [])[-1:]
            buffer, filled = self._gradients[i], ("gradients", len(self._flushes[i])) if after else None
        updated = submit(
            "cpu",
            f"update {i}",
            partial(self._update_here, subgroup, gradient, settings, scale),
            after=after,
            uses=[Use(home, old, new), Use(buffer, filled, ("weights", i))],
        )
        sent = submit(
            "h2d",
            f"weights {i}",
            partial(self._send_weights, subgroup, gradient),
            after=[updated],
            uses=[Use(buffer, ("weights", i), None)],
            urgency=FIRST,
        )
        if subgroup.tier == "nvme":
            self._slot_gradient_given[slot] = [sent]
        return updated

    def _bring(self, subgroup: Subgroup, submit: Callable[..., Task]) -> list[Task]:
        """From NVMe into its slot, if it is not there yet."""
        i, j = subgroup.index, self._number[subgroup.index]
        slot, old = self._tier.slot_of(j), (subgroup.index, self._version)
        before, self._in_slot[slot] = self._in_slot[slot], old
        if before == old:
            return []
        uses = [Use(self._homes[i], old, old), Use(self._slots[slot], before, old)]
        load = partial(self._tier.load, j)
        return [submit("nvme_read", f"state {i}", load, after=self._slot_given[slot], uses=uses)]

    def _put_back(self, subgroup: Subgroup, done: Task, submit: Callable[..., Task]) -> None:
        """From its slot to NVMe; it stays there until another one comes."""
        i, j = subgroup.index, self._number[subgroup.index]
        slot, old, new = self._tier.slot_of(j), (i, self._version), (i, self._version + 1)
        uses = [Use(self._slots[slot], new, new), Use(self._homes[i], old, new)]
        store = partial(self._tier.store, j)
        self._slot_given[slot] = [submit("nvme_write", f"state {i}", store, after=[done], uses=uses)]
        self._in_slot[slot] = new

    # What tasks do

    def _after(self, mark: object, run: Callable[[], object]) -> None:
        self._backend.wait(mark)
        run()

    def _update_here(self, subgroup: Subgroup, gradient: torch.Tensor, settings, scale: float) -> None:
        state = self._state(subgroup)
        for run in self._runs[subgroup.index]:
            a, b = run.start - subgroup.start, run.end - subgroup.start
            gradient[run.stop - subgroup.start : b].zero_()
            weights = run.in_place_of(gradient[a:b])
            update_on_cpu(state.cut(a, b), gradient[a:b], weights, settings[run.group], scale)

    def _send_weights(self, subgroup: Subgroup, gradient: torch.Tensor) -> None:
        for run in self._runs[subgroup.index]:
            a, b = run.start - subgroup.start, run.end - subgroup.start
            run.weights.copy_(run.in_place_of(gradient[a:b]), non_blocking=True)

    def _update_there(self, state: State, subgroup: Subgroup, settings, scale: float) -> None:
        """On the backend's device, state there; gradients are where backward left them."""
        for run in self._runs[subgroup.index]:
            if self._backend.device.type == "cpu":
                self._update_copies(state, subgroup, run, settings[run.group], scale)
                continue
            for a, b, source in self._flushed.parts(run.start, run.stop):
                part = state.cut(a - subgroup.start, b - subgroup.start)
                weights = run.weights[a - run.start : b - run.start]
                update_on_gpu(part, source, weights, settings[run.group], scale)

    def _update_copies(self, state: State, subgroup: Subgroup, run: Run, settings: AdamW, scale: float):
        """By the CPU's update, which overwrites gradients: so on copies of them."""
        for start in range(run.start, run.end, CHUNK):
            stop = min(start + CHUNK, run.end)
            gradient = torch.empty(stop - start)
            self._flushed.gather(start, stop, gradient)
            part = state.cut(start - subgroup.start, stop - subgroup.start)
            weights = run.weights[start - run.start : stop - run.start]
            update_on_cpu(part, gradient, weights, settings, scale)

    # State at rest

    def _state(self, subgroup: Subgroup) -> State:
        """Where it lies between steps, for `nvme` in its slot."""
        if subgroup.tier == "gpu":
            return self._resident[subgroup.index]
        if subgroup.tier == "nvme":
            return self._tier.slice_of(self._number[subgroup.index]).state
        return self._arena[subgroup.index].state

    def _stretches(self, name: str, start: int, stop: int, changes: bool = False):
        """Views of the state, with their elements, subgroup by subgroup."""
        self._check_whole()
        if name not in State._fields or not 0 <= start <= stop <= self._plan.elements:
            raise ValueError(
                f"{name} {start} to {stop}: must be of {', '.join(State._fields)} and in the state"
            )
        for subgroup in self._plan.subgroups[start // self._plan.subgroup_size :]:
            a, b = max(start, subgroup.start), min(stop, subgroup.stop)
            if a >= b:
                break
            if subgroup.tier == "nvme":
                self._hold(subgroup)
                if changes:
                    self._unsaved.add(subgroup.index)
            place = getattr(self._state(subgroup), name)
            yield place[a - subgroup.start : b - subgroup.start], a, b

    def _hold(self, subgroup: Subgroup) -> None:
        """Have it in its slot, and what was there on NVMe."""
        slot = self._slots[self._tier.slot_of(self._number[subgroup.index])]
        wanted = (subgroup.index, self._version)
        if slot.content == wanted:
            return
        if slot.content is not None and slot.content[0] in self._unsaved:
            self._save(slot.content[0])
        slot.content = None
        self._tier.load(self._number[subgroup.index])
        slot.content = wanted

    def _save_written(self) -> None:
        for index in sorted(self._unsaved):
            self._save(index)

    def _save(self, index: int) -> None:
        self._tier.store(self._number[index])
        self._unsaved.discard(index)

    # Failure

    def _check_whole(self) -> None:
        if self._broken:
            raise RuntimeError(self._broken)

    def _after_failure(self, error: BaseException) -> None:
        """Find out whether the state is whole; where it is, forget the step."""
        version = self._version
        homes = {index for index, home in self._homes.items() if home.content != (index, version)}
        slots = {
            s.content[0] for s in self._slots if isinstance(s.content, tuple) and s.content[-1] == version + 1
        }
        if torn := sorted(homes | slots):
            self._broken = (
                f"optimizer state: a step failed with {len(torn)} of {len(self._homes)} subgroups changed "
                f"(first {torn[0]}); resume from the last checkpoint"
            )
            error.add_note(self._broken)
            return
        error.add_note("optimizer state: is whole, as before this step")
        self._forget_gradients()
        for slot in self._slots:
            if not isinstance(slot.content, tuple) or slot.content[0] == "away":
                slot.content = None


def _copy(target: State, source: State) -> None:
    for to, x in zip(target, source):
        to.copy_(x, non_blocking=True)


def _places(plan: OffloadPlan) -> tuple:
    """What buffers follow from."""
    where = tuple((s.start, s.stop, s.tier) for s in plan.subgroups)
    return where, plan.gradient_bytes, plan.buffer_sets, plan.ring_slots
