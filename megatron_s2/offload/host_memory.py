"""Host memory of exact size, pinned where there is a GPU, and how much of it the system has available.

The memory is mapped from the system and registered with CUDA (`cudaHostRegister`), since PyTorch's
`pin_memory` rounds each allocation up to a power of two. A mapping begins at a page and is zero. Processes
that fork later, such as workers of a data loader, do not inherit it: the next update would copy each page
that they share, which takes the memory twice, and a running transfer could end in the wrong copy (open(2)
about O_DIRECT).

Pages are huge where the system has such. They are on the NUMA node of the threads that write them first: for
pinned memory, threads on any cores that this process may use. As in PyTorch's allocator, several threads
fault the pages in and one call registers them: clearing takes the time, and copies cross any border.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_s2.offload.adam import State
from megatron_s2.offload.plan import GB

FAULTING_THREADS = 16  # of a rank: more do not clear memory faster


class HostSlice(NamedTuple):
    """Views of one subgroup's state and gradient on the host, float32 `[elements]` each."""

    state: State
    gradient: torch.Tensor


class HostMemory:
    """Zeroed, page-aligned host memory, freed by `close()`.

    Args:
        size: bytes, at least 1.
        pinned: whether CUDA copies to and from it without staging.

    Raises:
        RuntimeError: the system does not have the memory, or does not let it be pinned.
    """

    def __init__(self, size: int, pinned: bool = False) -> None:
        try:
            self._memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        except OSError as error:
            raise RuntimeError(f"host memory: {size / GB:.3f} GB cannot be mapped: {error}") from error
        self._memory.madvise(mmap.MADV_DONTFORK)
        with suppress(OSError):  # a kernel without huge pages
            self._memory.madvise(mmap.MADV_HUGEPAGE)
        self.size = size
        self.bytes = torch.frombuffer(self._memory, dtype=torch.uint8)  # [size]
        self._pinned = pinned
        if pinned:
            fault_in(self.bytes)
        if pinned and (code := int(torch.cuda.cudart().cudaHostRegister(self.address, size, 0))):
            raise RuntimeError(
                f"host memory: {size / GB:.3f} GB cannot be pinned, CUDA error {code}; raise the limit of "
                "locked memory (ulimit -l)"
            )

    @property
    def address(self) -> int:
        """Address of the first byte."""
        return self.bytes.data_ptr()

    def view(self) -> memoryview:
        """View for the system calls that read and write files."""
        return memoryview(self._memory)

    def close(self) -> None:
        """Unpins the memory and frees it; the system gets it back when the last view is gone."""
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self.address)
            self._pinned = False
        self.bytes, self._memory = self.bytes.new_empty(0), None


def fault_in(memory: torch.Tensor) -> None:
    """Lets the system back zeroed memory, uint8 `[n]`, with pages now, by several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(min(len(os.sched_getaffinity(0)), FAULTING_THREADS))
    try:
        memory[:: mmap.PAGESIZE].zero_()
    finally:
        torch.set_num_threads(before)


def check_available(size: int, local_world_size: int, available: int) -> None:
    """Raises ValueError where this node does not have `size` bytes for each of its ranks.

    Args:
        available: bytes that all ranks together can allocate, see `available_bytes`.
    """
    if size * local_world_size > available:
        ranks = f" for each of {local_world_size} ranks" if local_world_size > 1 else ""
        raise ValueError(
            f"host memory: the buffers and ring of the optimizer state take {size / GB:.3f} GB{ranks}, "
            f"and this machine has {available / GB:.3f} GB left; raise --s2-offload-gpu-budget-gb, or lower "
            "--s2-offload-host-budget-gb and name a directory with --s2-offload-nvme-dir"
        )


def available_bytes() -> int:
    """Number of bytes that this process can allocate without swapping and within its control groups."""
    fields = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    available = int(fields["MemAvailable"].split()[0]) * 1024
    try:
        groups = Path("/proc/self/cgroup").read_text()
    except FileNotFoundError:
        return available
    return min([available, *_left_in_groups(groups, Path("/sys/fs/cgroup"))])


def _left_in_groups(groups: str, root: Path) -> Iterator[int]:
    """Bytes left in each control group of this process, and in those above it, that has a limit.

    Args:
        groups: content of /proc/self/cgroup. A path that does not exist belongs to another namespace; the
            groups above it count nevertheless.
        root: where control groups are mounted: version 2, or version 1 with its `memory` controller in a
            folder.
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
