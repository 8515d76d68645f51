"""The plan: where each part of a rank's optimizer state is stored, which device updates it, in which order.

A rank's state is flat: three float32 values per parameter (master weight, exp_avg, exp_avg_sq), cut into
equal subgroups. A subgroup's *tier* is where its state is stored between steps; its *device* is what updates
it. Tiers follow from memory budgets alone, so memory is the same at every fraction; devices follow from the
fraction. Both are spread evenly. Plain values: neither torch nor a GPU is needed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

STATE_BYTES = 12  # of a parameter: master weight, exp_avg and exp_avg_sq in float32
WEIGHT_BYTES = 2  # of a parameter's model weight, bfloat16 or float16
GRADIENT_BYTES = 4  # of a parameter's gradient on the host, float32
HOST_BYTES = STATE_BYTES + GRADIENT_BYTES  # of a parameter of tier host
ALIGNMENT = 64  # elements; 256 bytes of float32, a multiple of what copies, AVX-512 and bfloat16 tiles want

TIERS = ("gpu", "host", "nvme")

# 96 MiB of state, 2 ms at 50 GB/s: long against the start of a copy or a kernel (some 10 us) and of a Python
# call, short against a step, so that filling and draining the pipeline cost little; two sets on the GPU take
# 192 MiB.
SUBGROUP_SIZE = 2**23
BUFFER_SETS = 2
RING_SLOTS = 4
GB = 10**9


class TierSizes(NamedTuple):
    """Number of parameters whose state is in each tier."""

    gpu: int
    host: int
    nvme: int

    @property
    def streamed(self) -> int:
        """Number of parameters whose state does not stay on the GPU."""
        return self.host + self.nvme


@dataclass(frozen=True)
class Subgroup:
    """Elements `start` to `stop` of the rank's flat state."""

    index: int
    start: int  # a multiple of `ALIGNMENT`
    stop: int
    tier: str  # where the state is stored between steps: gpu, host or nvme
    device: str  # what updates it: cpu or gpu; gpu in tier gpu

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.stop - self.start


@dataclass(frozen=True)
class OffloadPlan:
    """All subgroups of a rank and the buffers that they pass through. Made by `make_plan`."""

    subgroup_size: int  # elements of each subgroup but the last
    subgroups: tuple[Subgroup, ...]  # in the order of their elements
    buffer_sets: int = BUFFER_SETS  # subgroups whose state fits on the GPU while they are updated
    ring_slots: int = RING_SLOTS  # subgroups of tier nvme whose state and gradients fit on the host

    @property
    def elements(self) -> int:
        """Number of parameters of the rank."""
        return self.subgroups[-1].stop

    @property
    def streamed(self) -> list[Subgroup]:
        """Subgroups whose state does not stay on the GPU."""
        return [s for s in self.subgroups if s.tier != "gpu"]

    @property
    def slot_elements(self) -> int:
        """Elements of one buffer set or ring slot: those of the largest streamed subgroup."""
        return max((s.size for s in self.streamed), default=0)

    @property
    def tiers(self) -> TierSizes:
        """Number of parameters in each tier."""
        return TierSizes(*(sum(s.size for s in self.subgroups if s.tier == tier) for tier in TIERS))

    @property
    def fraction(self) -> float:
        """Share of the streamed parameters (those not resident on the GPU) that the GPU updates."""
        on_gpu = sum(s.size for s in self.streamed if s.device == "gpu")
        return on_gpu / self.tiers.streamed if self.tiers.streamed else 0.0

    @property
    def gpu_bytes(self) -> int:
        """GPU memory of resident subgroups and buffer sets, used or not. Gradients and weights on the GPU are
        the model's own."""
        return STATE_BYTES * (self.tiers.gpu + self.buffer_sets * self.slot_elements)

    @property
    def host_bytes(self) -> int:
        """Host memory of tier `host`, state and gradients, and of the ring of tier `nvme`.

        Every subgroup of tier `host` has memory for its gradients, so a change of fraction changes no buffer.
        Gradients of tier `nvme` come down to the ring while the step runs. The 16-bit weights that the CPU
        has updated wait for their transfer in the memory of the gradient, which is no longer needed.
        """
        ring = self.ring_slots * self.slot_elements if self.tiers.nvme else 0
        return HOST_BYTES * (self.tiers.host + ring)

    @property
    def nvme_bytes(self) -> int:
        """Bytes of state on NVMe."""
        return STATE_BYTES * self.tiers.nvme

    def order(self, step: int) -> tuple[Subgroup, ...]:
        """The subgroups in the order of step `step`: ascending in even steps, descending in odd ones, so a
        step begins with what the previous one left in the ring."""
        return self.subgroups if step % 2 == 0 else self.subgroups[::-1]

    def with_fraction(self, fraction: float) -> OffloadPlan:
        """Returns a plan with the same tiers and buffers and the devices of another fraction, to the nearest
        subgroup.

        Raises:
            ValueError: the fraction is not between 0 and 1.
        """
        check_fraction(fraction)
        streamed = len(self.streamed)
        return self.with_devices(spread(streamed, math.floor(fraction * streamed + 0.5)))

    def with_devices(self, on_gpu: Sequence[bool]) -> OffloadPlan:
        """Returns a plan with the same tiers and buffers and other devices.

        Args:
            on_gpu: whether the GPU updates each streamed subgroup.

        Raises:
            ValueError: `on_gpu` does not have one entry per streamed subgroup.
        """
        streamed = self.streamed
        if len(on_gpu) != len(streamed):
            raise ValueError(f"on_gpu has {len(on_gpu)} entries: must have {len(streamed)}, one per subgroup")
        device = {s.index: "gpu" if gpu else "cpu" for s, gpu in zip(streamed, on_gpu)}
        return replace(
            self, subgroups=tuple(replace(s, device=device.get(s.index, "gpu")) for s in self.subgroups)
        )

    def __str__(self) -> str:
        """The tiers, the devices and the memory, in lines."""
        lines = [
            f"{self.elements} parameters in {_count(len(self.subgroups), 'subgroup')} of "
            f"{self.subgroup_size}; the GPU updates {self.fraction:.1%} of those not resident on it"
        ]
        for tier in TIERS:
            of_tier = [s for s in self.subgroups if s.tier == tier]
            if of_tier:
                on_gpu = sum(s.device == "gpu" for s in of_tier)
                state = STATE_BYTES * sum(s.size for s in of_tier)
                lines.append(
                    f"  {tier:<4}  {_count(len(of_tier), 'subgroup')}, {state / GB:.3f} GB of state; "
                    f"{on_gpu} updated on the GPU, {len(of_tier) - on_gpu} on the CPU"
                )
        memory = (
            f"  memory: {self.gpu_bytes / GB:.3f} GB on the GPU, {self.host_bytes / GB:.3f} GB on the host"
        )
        if self.nvme_bytes:
            memory += f", {self.nvme_bytes / GB:.3f} GB on NVMe"
        return "\n".join([*lines, memory])


def make_plan(
    elements: int,
    fraction: float = 0.0,
    *,
    subgroup_size: int = SUBGROUP_SIZE,
    gpu_budget: int = 0,
    host_budget: int | None = None,
    nvme: bool = False,
    buffer_sets: int = BUFFER_SETS,
    ring_slots: int = RING_SLOTS,
) -> OffloadPlan:
    """Cuts a rank's state into subgroups and assigns their tiers: the GPU as far as its budget reaches, then
    the host, then NVMe.

    Args:
        elements: number of parameters of the rank.
        fraction: share of the streamed subgroups (those not resident on the GPU) that the GPU updates.
        subgroup_size: elements of a subgroup, a multiple of `ALIGNMENT`.
        gpu_budget: bytes of state that may stay on the GPU, in addition to the buffer sets.
        host_budget: limit of `OffloadPlan.host_bytes`; None for no limit.
        nvme: whether there is an NVMe tier for what the host budget does not hold.
        buffer_sets, ring_slots: as in `OffloadPlan`.

    Raises:
        ValueError: an argument is out of range, or the host budget cannot hold the state (without NVMe) or
            the ring (with it). The message names the flag, what is needed and what to do.
    """
    check_fraction(fraction)
    if elements < 1:
        raise ValueError(f"elements {elements}: must be >= 1")
    if subgroup_size < ALIGNMENT or subgroup_size % ALIGNMENT:
        raise ValueError(f"--s2-offload-subgroup-size {subgroup_size}: must be a multiple of {ALIGNMENT}")
    for name, value in (("buffer_sets", buffer_sets), ("ring_slots", ring_slots)):
        if value < 1:
            raise ValueError(f"{name} {value}: must be >= 1")
    if gpu_budget < 0:
        raise ValueError(f"--s2-offload-gpu-budget-gb {gpu_budget / GB:g}: must be >= 0")

    edges = [*range(0, elements, subgroup_size), elements]
    count = len(edges) - 1
    largest = edges[1]
    if gpu_budget >= STATE_BYTES * elements:
        resident = count
    else:
        resident = min(gpu_budget // (STATE_BYTES * largest), count - 1)
    is_resident = spread(count, resident)
    streamed = [i for i in range(count) if not is_resident[i]]
    on_host = _subgroups_on_host([edges[i + 1] - edges[i] for i in streamed], host_budget, nvme, ring_slots)
    tier = {i: "host" if host else "nvme" for i, host in zip(streamed, spread(len(streamed), on_host))}
    subgroups = tuple(Subgroup(i, edges[i], edges[i + 1], tier.get(i, "gpu"), "gpu") for i in range(count))
    plan = OffloadPlan(subgroup_size, subgroups, buffer_sets, ring_slots)
    return plan.with_fraction(fraction)


def spread(length: int, count: int) -> list[bool]:
    """Returns `length` booleans of which `count` are True, as evenly as integers allow and beginning with a
    True where there is one (Bresenham): of any n neighbours, floor or ceil of n * count / length are True.

    Raises:
        ValueError: count is not between 0 and length.
    """
    if not 0 <= count <= length:
        raise ValueError(f"count {count}: must be between 0 and {length}")
    return [i * count % length < count for i in range(length)]


def check_fraction(fraction: float) -> None:
    """Raises ValueError where `fraction` is not between 0 and 1."""
    if not 0 <= fraction <= 1:
        raise ValueError(f"--s2-offload-gpu-fraction {fraction}: must be between 0 and 1")


def _subgroups_on_host(sizes: Sequence[int], budget: int | None, nvme: bool, ring_slots: int) -> int:
    """Returns how many of the streamed subgroups, of `sizes` elements, have their state on the host."""
    if budget is None or not sizes:
        return len(sizes)
    largest, needed = max(sizes), HOST_BYTES * sum(sizes)
    if needed <= budget:
        return len(sizes)
    flag = f"--s2-offload-host-budget-gb {budget / GB:g}"
    if not nvme:
        raise ValueError(
            f"{flag}: the host must hold {needed / GB:.3f} GB ({sum(sizes)} parameters of {HOST_BYTES} "
            "bytes); raise it, raise --s2-offload-gpu-budget-gb, or name a directory with "
            "--s2-offload-nvme-dir"
        )
    ring = HOST_BYTES * ring_slots * largest
    if ring > budget:
        raise ValueError(
            f"{flag}: a ring of {ring_slots} subgroups of {largest} parameters takes {ring / GB:.3f} GB; "
            "raise it, or lower --s2-offload-subgroup-size"
        )
    return min((budget - ring) // (HOST_BYTES * largest), len(sizes) - 1)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
