"""An optimizer step played event by event, under our schedule and those of others.

- Each queue does one operation at a time: of those that are ready the first in the plan's order. Ready are
  those whose predecessors are done and that hold what they need: a GPU buffer set (from upload to download),
  a ring slot (from NVMe read to NVMe write). What is resident on the GPU is updated while the GPU has nothing
  else to do.
- Host DRAM is shared: while the operations under way ask for more than it moves, all those that touch it slow
  down by the same factor.
- Gradients are flushed before the update begins, at the pace of backward where they go during backward.
- Operations cost nothing to start, and the clip coefficient is known when backward ends.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from megatron_s2.offload.model import (
    LIMIT_NAMES,
    Load,
    Rates,
    best_fraction,
    cpu_update_traffic,
    exposed,
    flush_seconds,
)
from megatron_s2.offload.plan import (
    BUFFER_SETS,
    GRADIENT_BYTES,
    RING_SLOTS,
    STATE_BYTES,
    SUBGROUP_SIZE,
    WEIGHT_BYTES,
    OffloadPlan,
    Subgroup,
    every,
    make_plan,
)
from megatron_s2.offload.trace import QUEUES, Event

OURS = "interleaved"
STRIDES = (2, 3, 4)
SCHEDULES = (OURS, "zero_offload", "twinflow", *(f"dos_k{k}" for k in STRIDES), "streaming")


@dataclass(frozen=True)
class Simulation:
    """One step, played; times in seconds.

    Args:
        plan: what was played.
        events: in the order of their starts. The timeline begins with backward where its time is known, else
            with what follows it.
        exposed_seconds: flushing gradients after backward.
        update_seconds: what follows.
        busy: what each queue that was used, and DRAM where it has a rate, did in the update, as a share of
            what its rate allows.
    """

    plan: OffloadPlan
    events: tuple[Event, ...]
    flush_seconds: float
    exposed_seconds: float
    update_seconds: float
    busy: dict[str, float]

    @property
    def step_seconds(self) -> float:
        """From the end of backward to the end of the update."""
        return self.exposed_seconds + self.update_seconds

    @property
    def bottleneck(self) -> str:
        """What was busiest during the update, and its share."""
        busiest = max(self.busy, key=self.busy.get)
        return f"{LIMIT_NAMES[busiest]}, busy {self.busy[busiest]:.0%}"


def simulate(
    plan: OffloadPlan,
    rates: Rates,
    backward_seconds: float | None = None,
    flush_in_backward: bool = True,
    step: int = 0,
) -> Simulation:
    """Play step number `step` of a plan.

    Args:
        backward_seconds: of the last micro-batch; None if it is long enough to hide the flush of gradients.
        flush_in_backward: whether gradients go to the host during backward or after it.

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

    run = _Run(_operations(plan, rates, step), _pools(plan), rates.dram)
    run.play()
    begin = backward + late
    events = [Event(op.queue, op.name, begin + op.start, begin + op.end) for op in run.operations]
    busy = {queue: run.busy[queue] / run.now for queue in QUEUES if run.busy[queue]}
    if rates.dram is not None:
        busy["dram"] = run.dram_bytes / rates.dram / run.now
    events = tuple(sorted(before + events, key=lambda event: event.start))
    return Simulation(plan, events, flush, late, run.now, busy)


def auto_plan(plan: OffloadPlan, rates: Rates) -> OffloadPlan:
    """The plan with the fraction whose update is shortest: of the model's best, to the subgroup below and
    above it, and of all on one side, the one that is fastest when played.

    Raises:
        ValueError: there are subgroups on NVMe and no rates for it.
    """
    streamed = sum(s.tier != "gpu" for s in plan.subgroups)
    if not streamed:
        return plan
    best = best_fraction(rates, Load.of(plan)) * streamed
    counts = dict.fromkeys((round(best), math.floor(best), math.ceil(best), 0, streamed))
    plans = [plan.with_fraction(count / streamed) for count in counts]
    return min(plans, key=lambda one: simulate(one, rates).update_seconds)


def compare(
    elements: int,
    rates: Rates,
    *,
    fraction: float | None = None,
    backward_seconds: float | None = None,
    subgroup_size: int = SUBGROUP_SIZE,
    gpu_budget: int = 0,
    host_budget: int | None = None,
    gradient_bytes: int = GRADIENT_BYTES,
    buffer_sets: int = BUFFER_SETS,
    ring_slots: int = RING_SLOTS,
) -> dict[str, Simulation]:
    """The same step under each of `SCHEDULES`.

    interleaved: ours, the fraction given or the one that the model finds best.
    zero_offload: all on the CPU; gradients are flushed after backward; weights return while the next subgroup
        is updated. Nothing is resident on the GPU; without NVMe it is granted what host memory that takes.
    twinflow: a static share resident on the GPU, as large as our budget and buffer sets together; the rest as
        zero_offload.
    dos_k2, ...: Deep Optimizer States with stride k: the GPU updates every k-th streamed subgroup. Otherwise
        as ours, gradient flush, residents and buffers included, so that only the fraction differs.
    streaming: every subgroup goes through the GPU.

    Args:
        elements: parameters of the rank.
        fraction: of ours; None for the best.
        backward_seconds: as in `simulate`. The rest: as in `make_plan`.

    Raises:
        ValueError: as `make_plan` and `simulate`.
    """
    settings = {
        "subgroup_size": subgroup_size,
        "host_budget": host_budget,
        "nvme": rates.nvme_read is not None and rates.nvme_write is not None,
        "gradient_bytes": gradient_bytes,
        "buffer_sets": buffer_sets,
        "ring_slots": ring_slots,
    }
    base = make_plan(elements, gpu_budget=gpu_budget, **settings)
    ours = auto_plan(base, rates) if fraction is None else base.with_fraction(fraction)
    streamed = sum(s.tier != "gpu" for s in base.subgroups)
    same_memory = gpu_budget + STATE_BYTES * base.buffer_sets * base.slot_elements
    plans = {
        OURS: ours,
        "zero_offload": make_plan(elements, **settings | ({} if settings["nvme"] else {"host_budget": None})),
        "twinflow": make_plan(elements, gpu_budget=same_memory, **settings),
        **{f"dos_k{k}": base.with_devices(every(streamed, k)) for k in STRIDES},
        "streaming": base.with_fraction(1),
    }
    late = ("zero_offload", "twinflow")
    return {
        name: simulate(plans[name], rates, backward_seconds, flush_in_backward=name not in late)
        for name in SCHEDULES
    }


@dataclass
class _Operation:
    """Something to do: `seconds` of a queue and `dram` bytes, after others, with a slot of a pool."""

    queue: str
    name: str
    seconds: float
    dram: float
    after: tuple[int, ...] = ()
    takes: str | None = None
    gives: str | None = None
    in_gaps: bool = False
    start: float = 0.0
    end: float = 0.0


def _pools(plan: OffloadPlan) -> dict[str, int]:
    """Slots that are free when the update begins: the ring is full of what the step before left."""
    on_nvme = sum(s.tier == "nvme" for s in plan.subgroups)
    return {
        "buffers": plan.buffer_sets,
        "ring": plan.ring_slots - min(plan.ring_slots, on_nvme),
    }


def _operations(plan: OffloadPlan, rates: Rates, step: int) -> list[_Operation]:
    operations: list[_Operation] = []
    in_ring = plan.ring_slots

    def add(
        queue: str, what: str, subgroup: Subgroup, amount: float, dram: float, *after: int, **slots
    ) -> int:
        rate = getattr(rates, queue)
        if rate is None:
            raise ValueError("nvme_read and nvme_write: must be given where state lies on NVMe")
        operations.append(
            _Operation(queue, f"{what} {subgroup.index}", amount / rate, dram, tuple(after), **slots)
        )
        return len(operations) - 1

    for subgroup in plan.order(step):
        size = subgroup.size
        state, weights, gradients = STATE_BYTES * size, WEIGHT_BYTES * size, plan.gradient_bytes * size
        if subgroup.tier == "gpu":
            add("gpu", "update", subgroup, size, 0, in_gaps=True)
            continue
        there: tuple[int, ...] = ()
        if subgroup.tier == "nvme":
            if in_ring:
                in_ring -= 1
            else:
                there = (add("nvme_read", "state", subgroup, state, state, takes="ring"),)
        if subgroup.device == "gpu":
            up = add("h2d", "state", subgroup, state, state, *there, takes="buffers")
            updated = add("gpu", "update", subgroup, size, 0, up)
            done = add("d2h", "state", subgroup, state, state, updated, gives="buffers")
        else:
            if subgroup.tier == "nvme":
                there = (add("d2h", "gradients", subgroup, gradients, gradients, *there),)
            traffic = cpu_update_traffic(plan.gradient_bytes) * size
            updated = add("cpu", "update", subgroup, size, traffic, *there)
            done = add("h2d", "weights", subgroup, weights, weights, updated)
        if subgroup.tier == "nvme":
            add("nvme_write", "state", subgroup, state, state, done, gives="ring")
    return operations


@dataclass
class _Run:
    """Plays operations on their queues."""

    operations: Sequence[_Operation]
    free: dict[str, int]
    dram: float | None
    now: float = 0.0
    dram_bytes: float = 0.0
    busy: dict[str, float] = field(default_factory=lambda: dict.fromkeys(QUEUES, 0.0))

    def play(self) -> None:
        operations = self.operations
        self._ready: dict[str, list[tuple[bool, int]]] = {queue: [] for queue in QUEUES}
        self._without_slot: dict[str, list[int]] = {pool: [] for pool in self.free}
        missing = [len(op.after) for op in operations]
        followers: list[list[int]] = [[] for _ in operations]
        for index, op in enumerate(operations):
            for earlier in op.after:
                followers[earlier].append(index)
            if not op.after:
                self._admit(index)

        left: dict[int, float] = {}  # seconds at full speed that each operation under way still needs
        while True:
            self._start(left)
            if not left:
                break
            for index in self._advance(left):
                op = operations[index]
                op.end = self.now
                self.busy[op.queue] += op.seconds
                self.dram_bytes += op.dram
                if op.gives:
                    self._give(op.gives)
                for follower in followers[index]:
                    missing[follower] -= 1
                    if not missing[follower]:
                        self._admit(follower)

    def _admit(self, index: int) -> None:
        """What it waited for is done: it takes its slot, or waits for one."""
        op = self.operations[index]
        if op.takes:
            if not self.free[op.takes]:
                heapq.heappush(self._without_slot[op.takes], index)
                return
            self.free[op.takes] -= 1
        heapq.heappush(self._ready[op.queue], (op.in_gaps, index))

    def _give(self, pool: str) -> None:
        self.free[pool] += 1
        if self._without_slot[pool]:
            self._admit(heapq.heappop(self._without_slot[pool]))

    def _start(self, left: dict[int, float]) -> None:
        idle = set(QUEUES) - {self.operations[index].queue for index in left}
        for queue in idle:
            if self._ready[queue]:
                _, index = heapq.heappop(self._ready[queue])
                self.operations[index].start = self.now
                left[index] = self.operations[index].seconds

    def _advance(self, left: dict[int, float]) -> list[int]:
        """To the next end; which operations ended."""
        speeds = self._speeds(left)
        until = {index: seconds / speeds[index] for index, seconds in left.items()}
        passed = min(until.values())
        self.now += passed
        ended = [index for index, seconds in until.items() if seconds <= passed * (1 + 1e-12)]
        for index in ended:
            del left[index]
        for index in left:
            left[index] -= passed * speeds[index]
        return ended

    def _speeds(self, left: dict[int, float]) -> dict[int, float]:
        """Of the operations under way, 1 where DRAM gives all they ask for."""
        asked = sum(self.operations[index].dram / self.operations[index].seconds for index in left)
        slowed = 1.0 if self.dram is None or asked <= self.dram else self.dram / asked
        return {index: slowed if self.operations[index].dram else 1.0 for index in left}


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
