"""The optimizer state of one rank: parameters in the flat state, and the memory of all tiers.

The flat state has the parameters one after another, each beginning at a multiple of `ALIGNMENT`. The plan
cuts it into subgroups, which `StateStore` keeps in their tiers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_s2.offload.adam import State
from megatron_s2.offload.host_memory import HostMemory, HostSlice
from megatron_s2.offload.nvme import NvmeTier
from megatron_s2.offload.plan import ALIGNMENT, HOST_BYTES, TIERS, OffloadPlan, Subgroup
from megatron_s2.offload.queues import Buffer


@dataclass(frozen=True)
class Parameter:
    """A model parameter, or the part of one that this rank updates, in the flat state."""

    start: int  # first element in the flat state, a multiple of `ALIGNMENT`
    weights: torch.Tensor  # [n], contiguous, of any float dtype of at most 4 bytes; a step writes them
    group: int = 0  # index of the parameter group

    @property
    def stop(self) -> int:
        """End of the elements."""
        return self.start + self.weights.numel()

    @property
    def end(self) -> int:
        """End of the padding that follows the elements."""
        return _aligned(self.stop)


class ParameterSlice(NamedTuple):
    """A parameter's elements within a subgroup. Positions count from the subgroup's first element."""

    parameter: int  # index
    offset: int  # of the first element in the parameter
    start: int
    stop: int
    end: int  # of the padding that follows the elements
    weights: torch.Tensor  # [stop - start]
    group: int

    def weights_in(self, gradient: torch.Tensor) -> torch.Tensor:
        """View of the memory of the subgroup's gradient, float32 `[size]`, as weights `[stop - start]`."""
        return gradient[self.start : self.end].view(self.weights.dtype)[: self.stop - self.start]


def lay_out(weights: Sequence[torch.Tensor], groups: Sequence[int]) -> tuple[list[Parameter], int]:
    """Returns parameters one after another in the flat state, and the number of elements of the state,
    padding included."""
    starts, elements = aligned_starts([x.numel() for x in weights])
    return [Parameter(*one) for one in zip(starts, weights, groups)], elements


def slices_of(subgroup: Subgroup, parameters: Sequence[Parameter]) -> list[ParameterSlice]:
    """Returns the slices of the parameters that lie in a subgroup."""
    slices = []
    for n, p in enumerate(parameters):
        start, end = max(p.start, subgroup.start), min(p.end, subgroup.stop)
        if start < end:
            stop = min(p.stop, end)
            weights = p.weights[start - p.start : stop - p.start]
            positions = (x - subgroup.start for x in (start, stop, end))
            slices.append(ParameterSlice(n, start - p.start, *positions, weights, p.group))
    return slices


def check_layout(plan: OffloadPlan, parameters: Sequence[Parameter], device: torch.device) -> None:
    """Raises ValueError where parameters and plan do not fit."""
    end = 0
    for n, p in enumerate(parameters):
        x = p.weights
        if p.start % ALIGNMENT or p.start < end:
            raise ValueError(f"parameter {n} at {p.start}: must begin at a multiple of {ALIGNMENT} >= {end}")
        if x.device.type != device.type or not x.is_contiguous() or x.dim() != 1 or x.element_size() > 4:
            raise ValueError(f"parameter {n}: weights must be flat, contiguous, on {device}, <= 4 bytes each")
        end = p.end
    if not end or plan.elements != end:
        raise ValueError(f"plan of {plan.elements} elements: parameters have {end}, padding included")


def aligned_starts(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Returns where arrays of `sizes` elements begin, one after another, each at a multiple of `ALIGNMENT`,
    and the end of the last one's padding."""
    ends = [0, *itertools.accumulate(_aligned(size) for size in sizes)]
    return ends[:-1], ends[-1]


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


def allocate_on_host(
    subgroups: Sequence[Subgroup], pinned: bool = False
) -> tuple[HostMemory | None, list[HostSlice]]:
    """Allocates state and gradients of subgroups: four flat arrays, one after another.

    Args:
        pinned: as for `HostMemory`.

    Returns:
        The memory, None without subgroups, and the views of each subgroup.

    Raises:
        RuntimeError: as `HostMemory`.
    """
    starts, total = aligned_starts([s.size for s in subgroups])
    if not total:
        return None, []
    memory = HostMemory(HOST_BYTES * total, pinned)
    arrays = memory.bytes.view(torch.float32).view(4, total)
    views = (arrays[:, start : start + s.size] for s, start in zip(subgroups, starts))
    return memory, [HostSlice(State(*state), gradient) for *state, gradient in views]


@dataclass(frozen=True)
class SubgroupMemory:
    """A subgroup's memory, and the buffers by which tasks use it."""

    storage: Buffer  # the state between steps: memory, or a record of tier nvme
    state_buffer: Buffer  # memory of `state`: the storage, or a ring slot
    state: State  # what an update changes in place, or what moves to the GPU and back
    gradient: torch.Tensor | None = None  # [size], on the host; None in tier gpu
    gradient_buffer: Buffer | None = None
    record: int | None = None  # index in tier nvme


class StateStore:
    """The memory of all tiers, by subgroup.

    A buffer with the state of subgroup i after v steps has the content `(i, v)`, or `("on gpu", i, v)` while
    a buffer set has that state.

    Args:
        plan: the tier of each subgroup.
        device: device of tier `gpu` and of the buffer sets.
        directories, shares: as for `NvmeTier`, for a plan with subgroups of tier `nvme`.

    Attributes:
        version: number of steps so far.
        sets: memory on the device for the state of one subgroup, and its buffer, for each buffer set.
        tier: tier `nvme`, None without one.
        slots: buffers of the ring's slots.

    Raises:
        ValueError, TierError: as `NvmeTier`.
        RuntimeError: as `HostMemory`.
    """

    def __init__(
        self,
        plan: OffloadPlan,
        device: torch.device,
        directories: Sequence[str | Path] = (),
        shares: Sequence[float] | None = None,
    ) -> None:
        pinned = device.type == "cuda"
        tiers = {tier: [s for s in plan.subgroups if s.tier == tier] for tier in TIERS}
        self.version = 0
        self.sets = [
            (State(*torch.empty(3, plan.slot_elements, device=device)), Buffer(f"buffer set {n}"))
            for n in range(plan.buffer_sets)
        ]
        self._host, on_host = allocate_on_host(tiers["host"], pinned)
        sizes = [s.size for s in tiers["nvme"]]
        self.tier = NvmeTier(directories, sizes, plan.ring_slots, shares, pinned) if sizes else None
        self.slots = [Buffer(f"ring slot {n}") for n in range(self.tier.slots if sizes else 0)]
        slot_gradients = [Buffer(f"gradients of {slot.name}") for slot in self.slots]
        storage = [Buffer(f"state {s.index}", (s.index, 0)) for s in plan.subgroups]
        self._memory: dict[int, SubgroupMemory] = {}
        for i, size in ((s.index, s.size) for s in tiers["gpu"]):
            state = State(*torch.zeros(3, size, device=device))
            self._memory[i] = SubgroupMemory(storage[i], storage[i], state)
        for s, views in zip(tiers["host"], on_host):
            i = s.index
            self._memory[i] = SubgroupMemory(storage[i], storage[i], *views, Buffer(f"gradients {i}"))
        for record, s in enumerate(tiers["nvme"]):
            slot = self.tier.slot_of(record)
            own = (*self.tier.slice_of(record), slot_gradients[slot], record)
            self._memory[s.index] = SubgroupMemory(storage[s.index], self.slots[slot], *own)
        self._unsaved: set[int] = set()  # subgroups whose ring slot was modified since it was stored

    def __getitem__(self, subgroup: Subgroup) -> SubgroupMemory:
        return self._memory[subgroup.index]

    def views(
        self, plan: OffloadPlan, name: str, start: int, stop: int, modify: bool = False
    ) -> Iterator[tuple[torch.Tensor, int, int]]:
        """Yields views of elements of `master`, `exp_avg` or `exp_avg_sq`, each with its first element and
        its end. A view is valid until the next one is asked for.

        Args:
            modify: whether the caller writes the views.

        Raises:
            ValueError: no such name or elements.
            TierError: state on NVMe cannot be read, or what was modified before cannot be stored.
        """
        if name not in State._fields or not 0 <= start <= stop <= plan.elements:
            raise ValueError(
                f"{name} {start} to {stop}: must be of {', '.join(State._fields)} and in the state"
            )
        for subgroup in plan.subgroups[start // plan.subgroup_size :]:
            a, b = max(start, subgroup.start), min(stop, subgroup.stop)
            if a >= b:
                break
            if subgroup.tier == "nvme":
                self._load(subgroup)
                if modify:
                    self._unsaved.add(subgroup.index)
            yield getattr(self[subgroup].state, name)[a - subgroup.start : b - subgroup.start], a, b

    def save_changes(self) -> None:
        """Stores what was modified through `views`.

        Raises:
            TierError: it cannot be stored.
        """
        for index in sorted(self._unsaved):
            self._save(index)

    def end_step(self) -> None:
        """Resets the buffers after a step, or after one that failed before it changed any state."""
        for _, buffer in self.sets:
            buffer.content = None
        for index, memory in self._memory.items():
            memory.storage.content = (index, self.version)
            if memory.gradient_buffer:
                memory.gradient_buffer.content = None
        for slot in self.slots:
            if slot.content is not None and slot.content[0] == "on gpu":
                slot.content = None

    def close(self) -> None:
        """Frees all memory and deletes the files."""
        self._memory.clear()
        self.sets.clear()
        for memory in (self._host, self.tier):
            if memory is not None:
                memory.close()

    def _load(self, subgroup: Subgroup) -> None:
        """Reads a subgroup's state into its ring slot, unless the slot has it."""
        memory, content = self[subgroup], (subgroup.index, self.version)
        slot = memory.state_buffer
        if slot.content == content:
            return
        if slot.content is not None and slot.content[0] in self._unsaved:
            self._save(slot.content[0])
        slot.content = None
        self.tier.load(memory.record)
        slot.content = content

    def _save(self, index: int) -> None:
        self.tier.store(self._memory[index].record)
        self._unsaved.discard(index)
