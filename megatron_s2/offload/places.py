"""Where a rank's optimizer state lies, what is in each place, and access to it between steps."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from megatron_s2.offload.adam import State
from megatron_s2.offload.arena import Arena
from megatron_s2.offload.nvme import NvmeTier
from megatron_s2.offload.plan import OffloadPlan, Subgroup
from megatron_s2.offload.queues import Buffer


class Places:
    """The memory of all tiers and the buffers that tasks take it by.

    State of subgroup i after v steps is `(i, v)` in the content of a buffer.

    Args:
        plan: what lies where.
        device: of tier `gpu` and of the buffer sets.
        arena: tier `host`.
        tier: tier `nvme`, None without.

    Attributes:
        version: steps so far.
        sets: room on the device for the state of one subgroup each.
        homes: of each subgroup, where its state lies between steps; of tier `nvme` the record.
        gradients: of each subgroup of tier `host`, those on the host.
        set_buffers, slots, slot_gradients: the buffer sets, and the ring's slots.

    Raises:
        ValueError: the tier is of other subgroups.
    """

    def __init__(self, plan: OffloadPlan, device: torch.device, arena: Arena, tier: NvmeTier | None) -> None:
        on_nvme = [s for s in plan.subgroups if s.tier == "nvme"]
        if [s.size for s in on_nvme] != list(tier.sizes if tier else ()):
            raise ValueError(f"tier: must be of the plan's {len(on_nvme)} subgroups of tier nvme")
        self._arena, self.tier = arena, tier
        self._number = {s.index: j for j, s in enumerate(on_nvme)}
        self._resident = {
            s.index: State(*torch.zeros(3, s.size, device=device)) for s in plan.subgroups if s.tier == "gpu"
        }
        self.sets = [
            State(*torch.empty(3, plan.slot_elements, device=device)) for _ in range(plan.buffer_sets)
        ]
        self.version = 0
        self.homes = {s.index: Buffer(f"state {s.index}", (s.index, 0)) for s in plan.subgroups}
        self.gradients = {s.index: Buffer(f"gradients {s.index}") for s in plan.subgroups if s.tier == "host"}
        self.set_buffers = [Buffer(f"buffer set {n}") for n in range(plan.buffer_sets)]
        slots = range(tier.slots if tier else 0)
        self.slots = [Buffer(f"ring slot {n}") for n in slots]
        self.slot_gradients = [Buffer(f"gradients of ring slot {n}") for n in slots]
        self._unsaved: set[int] = set()  # subgroups that were changed in their slots since they were stored

    def number(self, subgroup: Subgroup) -> int:
        """Of a subgroup of tier `nvme`, its place within the tier."""
        return self._number[subgroup.index]

    def slot(self, subgroup: Subgroup) -> int:
        """Of a subgroup of tier `nvme`, the slot it uses."""
        return self.tier.slot_of(self.number(subgroup))

    def state(self, subgroup: Subgroup) -> State:
        """Where it lies between steps, of tier `nvme` in its slot."""
        if subgroup.tier == "gpu":
            return self._resident[subgroup.index]
        if subgroup.tier == "nvme":
            return self.tier.slice_of(self.number(subgroup)).state
        return self._arena[subgroup.index].state

    def gradient(self, subgroup: Subgroup) -> torch.Tensor:
        """Room for its gradient on the host, float32 `[size]`; of tier `nvme` in its slot."""
        if subgroup.tier == "nvme":
            return self.tier.slice_of(self.number(subgroup)).gradient
        return self._arena[subgroup.index].gradient

    def stretches(
        self, plan: OffloadPlan, name: str, start: int, stop: int, changes: bool = False
    ) -> Iterator[tuple[torch.Tensor, int, int]]:
        """Views of the state with their elements, subgroup by subgroup; each is valid until the next is asked
        for.

        Raises:
            ValueError: no such name or elements.
            TierError: state on NVMe cannot be had.
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
                self._hold(subgroup)
                if changes:
                    self._unsaved.add(subgroup.index)
            place = getattr(self.state(subgroup), name)
            yield place[a - subgroup.start : b - subgroup.start], a, b

    def save_changes(self) -> None:
        """Store what `stretches` gave out for changes.

        Raises:
            TierError: it cannot be stored.
        """
        for index in sorted(self._unsaved):
            self._save(index)

    def torn(self) -> list[int]:
        """Subgroups whose state or weights a step that failed may have changed."""
        homes = {index for index, home in self.homes.items() if home.content != (index, self.version)}
        return sorted(homes.union(*(self._torn_in(slot) for slot in self.slots)))

    def forget_step(self) -> None:
        """Gradients that have arrived are of no use any more, nor is what a step that failed left in the
        ring."""
        for buffer in (*self.gradients.values(), *self.slot_gradients, *self.set_buffers):
            buffer.content = None
        for slot in self.slots:
            if slot.content is not None and slot.content[0] in ("half", "away"):
                slot.content = None

    def _torn_in(self, slot: Buffer) -> set[int]:
        """A download that is missing may follow an update that has written weights; an upload cannot."""
        if slot.content is None:
            return set()
        half = slot.content[0] == "half"
        content = slot.content[1] if half else slot.content
        index, version = content[-2:]
        whole = version == self.version and (half or content[0] != "away")
        return set() if whole else {index}

    def close(self) -> None:
        """Let go of all memory and of the files."""
        self._arena.close()
        if self.tier:
            self.tier.close()
        self._resident.clear()
        self.sets.clear()

    def _hold(self, subgroup: Subgroup) -> None:
        """Have it in its slot, and on NVMe what was there."""
        slot, wanted = self.slots[self.slot(subgroup)], (subgroup.index, self.version)
        if slot.content == wanted:
            return
        if slot.content is not None and slot.content[0] in self._unsaved:
            self._save(slot.content[0])
        slot.content = None
        self.tier.load(self.number(subgroup))
        slot.content = wanted

    def _save(self, index: int) -> None:
        self.tier.store(self._number[index])
        self._unsaved.discard(index)
