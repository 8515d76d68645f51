"""Host memory of the optimizer state: flat arrays of exact size, pinned where there is a GPU, built once.

The memory is mapped from the system and registered with CUDA (`cudaHostRegister`), since PyTorch's
`pin_memory` rounds each allocation up to a power of two. A mapping begins at a page and is zero. Processes
that fork later, such as workers of a data loader, do not get it: a page they shared would be copied at the
next update, which takes the memory twice, and a transfer on its way could end in the wrong copy (open(2)
about O_DIRECT).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_s2.offload.adam import State
from megatron_s2.offload.plan import ALIGNMENT, GB, OffloadPlan

_NAMES = ("master", "exp_avg", "exp_avg_sq", "gradient")


class HostMemory:
    """Zeroed, page-aligned host memory that leaves with `close()`.

    Args:
        size: bytes, at least 1.
        pinned: whether CUDA copies to and from it without staging.

    Raises:
        ValueError: the size is not positive.
        RuntimeError: the system has no such memory, or does not let it be pinned.
    """

    def __init__(self, size: int, pinned: bool = False) -> None:
        if size < 1:
            raise ValueError(f"size {size}: must be >= 1")
        try:
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise RuntimeError(f"host memory: {size / GB:.3f} GB cannot be mapped: {error}") from error
        self._memory.madvise(mmap.MADV_DONTFORK)
        self.size = size
        self.bytes = torch.frombuffer(self._memory, dtype=torch.uint8)  # [size]
        self._pinned = pinned
        if pinned and (code := int(torch.cuda.cudart().cudaHostRegister(self.address, size, 0))):
            raise RuntimeError(
                f"host memory: {size / GB:.3f} GB cannot be pinned, CUDA error {code}; raise the limit of "
                "locked memory (ulimit -l)"
            )

    @property
    def address(self) -> int:
        """Where it begins."""
        return self.bytes.data_ptr()

    def view(self) -> memoryview:
        """For the system calls that read and write files."""
        return memoryview(self._memory)

    def close(self) -> None:
        """Unpin it and let go of it. It is returned to the system with the last view."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.address)
            self._pinned = False
        self.bytes, self._memory = self.bytes.new_empty(0), None


class HostSlice(NamedTuple):
    """Views of one subgroup's part of an arena: float32, `[elements]` each."""

    state: State
    gradient: torch.Tensor


class Arena:
    """State and gradients of the subgroups of tier `host`, four flat arrays behind one another.

    Subgroups lie in the arrays as in the plan, without what other tiers hold.

    Args:
        plan: whose subgroups of tier `host`; its gradients must have 4 bytes.
        pinned: as for `HostMemory`.
        ranks: that allocate the same on this machine.
        available: bytes that this machine can give; asked of the system by default.

    Raises:
        ValueError: the gradients have other than 4 bytes, or the machine has less memory than that takes.
        RuntimeError: as `HostMemory`.
    """

    def __init__(
        self, plan: OffloadPlan, pinned: bool = False, ranks: int = 1, available: int | None = None
    ) -> None:
        if plan.gradient_bytes != 4:
            raise ValueError(f"gradient_bytes {plan.gradient_bytes}: must be 4, the CPU updates in float32")
        starts, total = aligned_starts([s.size for s in plan.subgroups if s.tier == "host"])
        self.size = 4 * len(_NAMES) * total
        check_available(self.size, "arenas", ranks, available)
        self._memory = HostMemory(self.size, pinned) if total else None
        self._slices: dict[int, HostSlice] = {}
        if self._memory is None:
            return
        arrays = self._memory.bytes.view(torch.float32).view(len(_NAMES), total)
        for subgroup, start in zip((s for s in plan.subgroups if s.tier == "host"), starts):
            *state, gradient = arrays[:, start : start + subgroup.size]
            self._slices[subgroup.index] = HostSlice(State(*state), gradient)

    def __getitem__(self, index: int) -> HostSlice:
        """The views of subgroup `index`."""
        return self._slices[index]

    def close(self) -> None:
        """Let go of the memory, views included."""
        self._slices.clear()
        if self._memory is not None:
            self._memory.close()
            self._memory = None


def aligned_starts(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Where stretches of so many elements begin when each begins at a multiple of `ALIGNMENT`, and where the
    last one ends, padded to one."""
    starts, end = [], 0
    for size in sizes:
        starts.append(end)
        end += -(-size // ALIGNMENT) * ALIGNMENT
    return starts, end


def check_available(size: int, what: str, ranks: int = 1, available: int | None = None) -> None:
    """Raise ValueError where this machine cannot give `size` bytes to each of its ranks."""
    if available is None:
        available = available_bytes()
    if size * ranks > available:
        of_ranks = f" for each of {ranks} ranks" if ranks > 1 else ""
        raise ValueError(
            f"host memory: the {what} of the optimizer state take {size / GB:.3f} GB{of_ranks}, and this "
            f"machine has {available / GB:.3f} GB left; raise --s2-offload-gpu-budget-gb, or lower "
            "--s2-offload-host-budget-gb and name a directory with --s2-offload-nvme-dir"
        )


def available_bytes() -> int:
    """What the system can give without swapping, and this process's control groups may still take."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except FileNotFoundError:
        return available
    return min([available, *_left_in_groups(groups, Path("/sys/fs/cgroup"))])


def _left_in_groups(groups: str, root: Path) -> Iterator[int]:
    """Bytes left in each control group above this process that has a limit.

    Args:
        groups: /proc/self/cgroup. A path that is not there is that of another namespace; the groups above it
            are looked at nevertheless.
        root: where they are mounted: version 2, or version 1 with its `memory` controller in a folder.
    """
    for line in groups.splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            top, limit, used = root, "memory.max", ("anon", "shmem", "kernel")
        elif "memory" in controllers.split(","):
            top, limit, used = root / "memory", "memory.limit_in_bytes", ("total_rss", "total_shmem")
        else:
            continue
        lowest = top / path.lstrip("/")
        for group in (lowest, *lowest.parents):
            if not group.is_relative_to(top):
                break
            try:
                most = (group / limit).read_text().strip()
                stat = dict(one.split() for one in (group / "memory.stat").read_text().splitlines())
            except FileNotFoundError:
                continue
            if most != "max":
                yield int(most) - sum(int(stat.get(name, 0)) for name in used)
