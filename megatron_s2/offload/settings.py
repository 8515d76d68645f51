"""The user's choices about optimizer offload."""

from __future__ import annotations

import os
from dataclasses import dataclass

from megatron_s2.offload.plan import SUBGROUP_SIZE


@dataclass(frozen=True)
class OffloadSettings:
    """The user's choices about optimizer offload.

    Args:
        gpu_fraction: share of the streamed state that the GPU updates; None for the model's best.
        subgroup_size: elements of a subgroup.
        gpu_budget, host_budget: bytes of one rank; None for no limit.
        nvme_dirs: directories with a file of state each; none without an NVMe tier.
        cpu_threads: number of threads of one rank's CPU updates; None for this rank's share of the cores.
        gpu_adam: kernel of the GPU's updates: `triton`, `transformer_engine` or `apex`.
        trace: file for the timeline of a step.
    """

    gpu_fraction: float | None = None
    subgroup_size: int = SUBGROUP_SIZE
    gpu_budget: int = 0
    host_budget: int | None = None
    nvme_dirs: tuple[str, ...] = ()
    cpu_threads: int | None = None
    gpu_adam: str = "triton"
    trace: str | None = None

    def threads(self, local_world_size: int) -> int:
        """Number of threads of one of `local_world_size` ranks on this node."""
        return self.cpu_threads or max(len(os.sched_getaffinity(0)) // local_world_size, 1)
