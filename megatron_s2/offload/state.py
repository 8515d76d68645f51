"""The optimizer state of one rank: parameters in the flat state, and the memory of all tiers.

The flat state holds the parameters one after another, each from a multiple of `ALIGNMENT` on. The plan cuts
it into subgroups, which `StateStore` keeps in their tiers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from megatron_s2.offload.adam import State
from megatron_s2.offload.host_memory import HostMemory, HostSlice, check_available
from megatron_s2.offload.nvme import NvmeTier
from megatron_s2.offload.plan import ALIGNMENT, OffloadPlan, Subgroup
from megatron_s2.offload.queues import Buffer

_ARRAYS = (*State._fields, "gradient")


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
    """A parameter's elements within a subgroup, in flat coordinates."""

    parameter: int  # index
    offset: int  # of its first element in the parameter
    start: int
    stop: int
    end: int  # from stop on, padding
    weights: torch.Tensor  # [stop - start]
    group: int

    def weights_in(self, gradient: torch.Tensor) -> torch.Tensor:
        """View of a gradient's memory, float32 `[end - start]`, as weights `[stop - start]`."""
        return gradient.view(self.weights.dtype)[: self.stop - self.start]


def lay_out(weights: Sequence[torch.Tensor], groups: Sequence[int]) -> tuple[list[Parameter], int]:
    """Returns parameters one after another in the flat state, and the elements of that, padding included."""
    starts, elements = aligned_starts([x.numel() for x in weights])
    return [Parameter(*one) for one in zip(starts, weights, groups)], elements


def slices_of(subgroup: Subgroup, parameters: Sequence[Parameter]) -> list[ParameterSlice]:
    """Returns the slices of the parameters that lie in a subgroup."""
    slices = []
    for n, p in enumerate(parameters):
        a, end = max(p.start, subgroup.start), min(p.end, subgroup.stop)
        if a < end:
            offset, stop = a - p.start, min(p.stop, end)
            weights = p.weights[offset : stop - p.start]
            slices.append(ParameterSlice(n, offset, a, stop, end, weights, p.group))
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
    """Returns where stretches of so many elements begin, each at a multiple of `ALIGNMENT`, and the end of
    the last one's padding."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += _aligned(size)
    return starts, end


def _aligned(elements: int) -> int:
    return -(-elements // ALIGNMENT) * ALIGNMENT


class HostBuffer:
    """State and gradients of the subgroups of tier `host`: four flat arrays, one after another.

    Args:
        plan: the plan of the subgroups.
        pinned: as for `HostMemory`.
        local_world_size, available: as for `check_available`.

    Raises:
        ValueError: the node has not enough memory.
        RuntimeError: as `HostMemory`.
    """

    def __init__(
        self,
        plan: OffloadPlan,
        pinned: bool = False,
        local_world_size: int = 1,
        available: int | None = None,
    ) -> None:
        subgroups = [s for s in plan.subgroups if s.tier == "host"]
        starts, total = aligned_starts([s.size for s in subgroups])
        self.size = 4 * len(_ARRAYS) * total
        check_available(self.size, "buffers", local_world_size, available)
        self._memory = HostMemory(self.size, pinned) if total else None
        self._slices: dict[int, HostSlice] = {}
        if self._memory is not None:
            arrays = self._memory.bytes.view(torch.float32).view(len(_ARRAYS), total)
            for s, start in zip(subgroups, starts):
                *state, gradient = arrays[:, start : start + s.size]
                self._slices[s.index] = HostSlice(State(*state), gradient)

    def __getitem__(self, index: int) -> HostSlice:
        """Views of subgroup `index`."""
        return self._slices[index]

    def close(self) -> None:
        """Drops the memory and the views of it."""
        self._slices.clear()
        if self._memory is not None:
            self._memory.close()
            self._memory = None


@dataclass(frozen=True)
class SubgroupMemory:
    """Where a subgroup's state is, and the buffers by which tasks use that memory."""

    home: Buffer  # of the state between steps: in memory, or in a record of tier nvme
    state_buffer: Buffer  # of `state`: the home's, or the ring slot's
    state: State  # what an update changes in place, or what moves to the GPU and back
    gradient: torch.Tensor | None = None  # [size], on the host; None in tier gpu
    gradient_buffer: Buffer | None = None
    record: int | None = None  # index in tier nvme
    slot: int | None = None  # index of the ring slot


class StateStore:
    """The memory of all tiers, by subgroup.

    A buffer with the state of subgroup i after v steps has the content `(i, v)`, or `("away", i, v)` while
    that state is on the GPU.

    Args:
        plan: the tier of each subgroup.
        device: device of tier `gpu` and of the buffer sets.
        host: memory of tier `host`.
        tier: tier `nvme`, None without one.

    Attributes:
        version: number of steps so far.
        sets: memory on the device for the state of one subgroup, and its buffer, for each buffer set.
        slots: buffers of the ring's slots.

    Raises:
        ValueError: the tier has other subgroups.
    """

    def __init__(
        self, plan: OffloadPlan, device: torch.device, host: HostBuffer, tier: NvmeTier | None
    ) -> None:
        on_nvme = [s.size for s in plan.subgroups if s.tier == "nvme"]
        if on_nvme != list(tier.sizes if tier else ()):
            raise ValueError(f"tier: must be of the plan's {len(on_nvme)} subgroups of tier nvme")
        self._host, self.tier = host, tier
        self.version = 0
        self.sets = [
            (State(*torch.empty(3, plan.slot_elements, device=device)), Buffer(f"buffer set {n}"))
            for n in range(plan.buffer_sets)
        ]
        self.slots = [Buffer(f"ring slot {n}") for n in range(tier.slots if tier else 0)]
        slot_gradients = [Buffer(f"gradients of {slot.name}") for slot in self.slots]
        self._memory: dict[int, SubgroupMemory] = {}
        records = itertools.count()
        for s in plan.subgroups:
            home = Buffer(f"state {s.index}", (s.index, 0))
            if s.tier == "gpu":
                memory = SubgroupMemory(home, home, State(*torch.zeros(3, s.size, device=device)))
            elif s.tier == "host":
                memory = SubgroupMemory(home, home, *host[s.index], Buffer(f"gradients {s.index}"))
            else:
                slot = tier.slot_of(record := next(records))
                own = (*tier.slice_of(record), slot_gradients[slot], record, slot)
                memory = SubgroupMemory(home, self.slots[slot], *own)
            self._memory[s.index] = memory
        self._unsaved: set[int] = set()  # subgroups that were modified in their slots since they were stored

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

    def torn(self) -> list[int]:
        """Indices of the subgroups whose state or weights a step that failed may have changed."""
        changed = {i for i, memory in self._memory.items() if memory.home.content != (i, self.version)}
        return sorted(changed.union(*(self._torn_in(slot) for slot in self.slots)))

    def forget_step(self) -> None:
        """Forgets the gradients that have arrived, and what a step that failed left in the ring."""
        for buffer in (buffer for _, buffer in self.sets):
            buffer.content = None
        for memory in self._memory.values():
            if memory.gradient_buffer:
                memory.gradient_buffer.content = None
        for slot in self.slots:
            if slot.content is not None and slot.content[0] in ("half", "away"):
                slot.content = None

    def close(self) -> None:
        """Drops all memory and the files."""
        self._memory.clear()
        self.sets.clear()
        self._host.close()
        if self.tier:
            self.tier.close()

    def _torn_in(self, slot: Buffer) -> set[int]:
        """A download that is missing may follow an update that has written weights; an upload cannot."""
        if slot.content is None:
            return set()
        half = slot.content[0] == "half"
        content = slot.content[1] if half else slot.content
        index, version = content[-2:]
        whole = version == self.version and (half or content[0] != "away")
        return set() if whole else {index}

    def _load(self, subgroup: Subgroup) -> None:
        """Lets the slot of a subgroup hold its state, and the file what the slot held."""
        memory, wanted = self[subgroup], (subgroup.index, self.version)
        slot = memory.state_buffer
        if slot.content == wanted:
            return
        if slot.content is not None and slot.content[0] in self._unsaved:
            self._save(slot.content[0])
        slot.content = None
        self.tier.load(memory.record)
        slot.content = wanted

    def _save(self, index: int) -> None:
        self.tier.store(self._memory[index].record)
        self._unsaved.discard(index)
