"""An optimizer step simulated event by event.

- Each queue does one operation at a time: of those that are ready, the first in the plan's order. An
  operation is ready when its predecessors are done and it has what it needs: a GPU buffer set (from upload to
  download), a ring slot (from NVMe read to NVMe write). Subgroups resident on the GPU are updated while the
  GPU has nothing else to do.
- Host DRAM is shared: while the running operations ask for more than its rate, all those that use it slow
  down by the same factor.
- Gradients are flushed before the update begins, at the pace of backward where they leave during backward.
- Starting an operation costs nothing, and the clip coefficient is known when backward ends.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_s2.offload.model import (
    CPU_UPDATE_TRAFFIC,
    LIMIT_NAMES,
    Load,
    Rates,
    best_fraction,
    exposed,
    flush_seconds,
)
from megatron_s2.offload.plan import GRADIENT_BYTES, STATE_BYTES, WEIGHT_BYTES, OffloadPlan, Subgroup
from megatron_s2.offload.trace import QUEUES, Event


@dataclass(frozen=True)
class Simulation:
    """A simulated step; times in seconds.

    Its timeline begins with backward where its duration is known, else with what follows it.
    """

    plan: OffloadPlan
    events: tuple[Event, ...]  # in the order of their starts
    flush_seconds: float  # to copy the gradients of the CPU's share to the host
    exposed_seconds: float  # the part of that after backward
    update_seconds: float
    busy: dict[str, float]  # used share of the rates of queues and DRAM in the update

    @property
    def step_seconds(self) -> float:
        """From the end of backward to the end of the update."""
        return self.exposed_seconds + self.update_seconds

    @property
    def bottleneck(self) -> str:
        """The busiest queue of the update, or DRAM, and its share."""
        busiest = max(self.busy, key=self.busy.get)
        return f"{LIMIT_NAMES[busiest]}, busy {self.busy[busiest]:.0%}"


def simulate(
    plan: OffloadPlan,
    rates: Rates,
    backward_seconds: float | None = None,
    flush_in_backward: bool = True,
    step: int = 0,
) -> Simulation:
    """Simulates step number `step` of a plan.

    Args:
        backward_seconds: duration of the last micro-batch's backward; None where it is long enough to hide
            the flush of gradients.
        flush_in_backward: whether gradients leave for the host during backward or after it.

    Raises:
        ValueError: the time is negative, or there are subgroups on NVMe and no rates for it.
    """
    flush = flush_seconds(rates, Load.of(plan), _fraction_of_host(plan))
    late = exposed(flush, backward_seconds) if flush_in_backward else flush
    backward = backward_seconds or 0.0
    before = []
    if backward_seconds:
        before.append(Event("gpu", "backward", 0.0, backward))
    if late or backward:
        before += _flush_events(plan, backward, late, flush, flush_in_backward)

    operations = _operations(plan, rates, step)
    seconds = _run(operations, _pools(plan), rates.dram)
    begin = backward + late
    events = [Event(op.queue, op.name, begin + op.start, begin + op.end) for op in operations]
    busy: dict[str, float] = dict.fromkeys(QUEUES, 0.0)
    for op in sorted(operations, key=lambda one: one.end):
        busy[op.queue] += op.seconds
    busy = {queue: of_queue / seconds for queue, of_queue in busy.items() if of_queue}
    if rates.dram is not None:
        busy["dram"] = sum(op.dram for op in operations) / rates.dram / seconds
    events = tuple(sorted(before + events, key=lambda event: event.start))
    return Simulation(plan, events, flush, late, seconds, busy)


def auto_plan(plan: OffloadPlan, rates: Rates) -> OffloadPlan:
    """Returns the plan with the fraction whose simulated update is shortest, among the model's best fraction,
    to the subgroup below and above it, and everything on one side.

    Raises:
        ValueError: there are subgroups on NVMe and no rates for it.
    """
    streamed = len(plan.streamed)
    if not streamed:
        return plan
    best = best_fraction(rates, Load.of(plan)) * streamed
    counts = dict.fromkeys((round(best), math.floor(best), math.ceil(best), 0, streamed))
    plans = [plan.with_fraction(count / streamed) for count in counts]
    return min(plans, key=lambda one: simulate(one, rates).update_seconds)


@dataclass(eq=False)
class _Operation:
    """An operation of one queue."""

    index: int  # in the plan's order
    queue: str
    name: str
    seconds: float  # at full speed
    dram: float  # bytes of DRAM traffic
    after: tuple[_Operation, ...] = ()  # operations that come before
    takes: str | None = None  # pool of which it takes a slot before its start
    frees: str | None = None  # pool of which it frees a slot at its end
    low_priority: bool = False  # waits while the queue has other operations
    start: float = 0.0
    end: float = 0.0

    def __lt__(self, other: _Operation) -> bool:
        return (self.low_priority, self.index) < (other.low_priority, other.index)


def _pools(plan: OffloadPlan) -> dict[str, int]:
    """Free slots when the update begins; the ring is full of what the previous step left."""
    on_nvme = sum(s.tier == "nvme" for s in plan.subgroups)
    return {"buffers": plan.buffer_sets, "ring": plan.ring_slots - min(plan.ring_slots, on_nvme)}


def _operations(plan: OffloadPlan, rates: Rates, step: int) -> list[_Operation]:
    operations: list[_Operation] = []
    in_ring = plan.ring_slots

    def add(queue: str, what: str, subgroup: Subgroup, amount: float, dram: float, *after, **slots):
        rate = getattr(rates, queue)
        if rate is None:
            raise ValueError("nvme_read and nvme_write: must be given where state lies on NVMe")
        name = f"{what} {subgroup.index}"
        operations.append(_Operation(len(operations), queue, name, amount / rate, dram, after, **slots))
        return operations[-1]

    for subgroup in plan.order(step):
        size = subgroup.size
        state, weights, gradients = STATE_BYTES * size, WEIGHT_BYTES * size, GRADIENT_BYTES * size
        if subgroup.tier == "gpu":
            add("gpu", "update", subgroup, size, 0, low_priority=True)
            continue
        there: tuple[_Operation, ...] = ()
        if subgroup.tier == "nvme":
            if in_ring:
                in_ring -= 1
            else:
                there = (add("nvme_read", "state", subgroup, state, state, takes="ring"),)
        if subgroup.device == "gpu":
            up = add("h2d", "state", subgroup, state, state, *there, takes="buffers")
            updated = add("gpu", "update", subgroup, size, 0, up)
            done = add("d2h", "state", subgroup, state, state, updated, frees="buffers")
        else:
            if subgroup.tier == "nvme":
                there = (add("d2h", "gradients", subgroup, gradients, gradients, *there),)
            updated = add("cpu", "update", subgroup, size, CPU_UPDATE_TRAFFIC * size, *there)
            done = add("h2d", "weights", subgroup, weights, weights, updated)
        if subgroup.tier == "nvme":
            add("nvme_write", "state", subgroup, state, state, done, frees="ring")
    return operations


def _run(operations: Sequence[_Operation], free: dict[str, int], dram: float | None) -> float:
    """Sets the start and the end of each operation, and returns the end of the last one.

    Args:
        free: number of free slots of each pool.
        dram: rate of host DRAM, bytes/s; None for no limit.
    """
    ready: dict[str, list[_Operation]] = {queue: [] for queue in QUEUES}  # heaps
    without_slot: dict[str, list[_Operation]] = {pool: [] for pool in free}
    followers: dict[_Operation, list[_Operation]] = {op: [] for op in operations}
    missing = {op: len(op.after) for op in operations}
    left: dict[_Operation, float] = {}  # seconds at full speed that each running operation still needs
    now = 0.0

    def admit(op: _Operation) -> None:
        """Assigns a slot to an operation whose predecessors are done, or queues it for one."""
        if op.takes and not free[op.takes]:
            heapq.heappush(without_slot[op.takes], op)
            return
        if op.takes:
            free[op.takes] -= 1
        heapq.heappush(ready[op.queue], op)

    for op in operations:
        for earlier in op.after:
            followers[earlier].append(op)
        if not op.after:
            admit(op)
    while True:
        for queue in set(QUEUES) - {op.queue for op in left}:
            if ready[queue]:
                op = heapq.heappop(ready[queue])
                op.start, left[op] = now, op.seconds
        if not left:
            return now
        asked = sum(op.dram / op.seconds for op in left)
        slowed = 1.0 if dram is None or asked <= dram else dram / asked
        until = {op: seconds / (slowed if op.dram else 1.0) for op, seconds in left.items()}
        passed = min(until.values())
        now += passed
        for op, seconds in until.items():
            if seconds > passed * (1 + 1e-12):
                left[op] -= passed * (slowed if op.dram else 1.0)
                continue
            del left[op]
            op.end = now
            if op.frees:
                free[op.frees] += 1
                if without_slot[op.frees]:
                    admit(heapq.heappop(without_slot[op.frees]))
            for follower in followers[op]:
                missing[follower] -= 1
                if not missing[follower]:
                    admit(follower)


def _fraction_of_host(plan: OffloadPlan) -> float:
    """Share of the parameters of tier `host` that the GPU updates."""
    on_gpu = sum(s.size for s in plan.subgroups if s.tier == "host" and s.device == "gpu")
    return on_gpu / plan.tiers.host if plan.tiers.host else 0.0


def _flush_events(
    plan: OffloadPlan, backward: float, late: float, flush: float, in_backward: bool
) -> list[Event]:
    """The flush as one event per subgroup: evenly during backward and what it exposes, or after it."""
    sent = [s for s in plan.subgroups if s.tier == "host" and s.device == "cpu"]
    begin, until = (0.0, backward + late) if in_backward else (backward, backward + flush)
    whole = sum(s.size for s in sent)
    events, done = [], 0
    for subgroup in sent:
        start = begin + (until - begin) * done / whole
        done += subgroup.size
        events.append(
            Event("d2h", f"gradients {subgroup.index}", start, start + flush * subgroup.size / whole)
        )
    return events
