"""The user's choices about optimizer offload."""

from __future__ import annotations

from dataclasses import dataclass

from megatron_s2.offload.plan import SUBGROUP_SIZE


@dataclass(frozen=True)
class OffloadSettings:
    """The user's choices about optimizer offload."""

    gpu_fraction: float | None = None  # of the streamed state that the GPU updates; None: the model's best
    subgroup_size: int = SUBGROUP_SIZE  # elements
    gpu_budget: int = 0  # bytes of one rank
    host_budget: int | None = None  # bytes of one rank; None: no limit
    nvme_dirs: tuple[str, ...] = ()  # one file of state in each; none without an NVMe tier
    cpu_threads: int | None = None  # of one rank's CPU updates; None: its share of the node's cores
    gpu_adam: str = "triton"  # kernel of the GPU's updates, or transformer_engine, or apex
    trace: str | None = None  # file for the timeline of a step
