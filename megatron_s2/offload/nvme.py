"""The NVMe tier: one file per directory, read and written past the page cache by several threads.

A record stores one subgroup: master, exp_avg and exp_avg_sq (float32), padding, and a trailer with the index
and the generation of the record. Records begin at multiples of 4096 bytes and pass through a ring of slots in
host memory. Record j always uses slot j modulo the number of slots, so as many neighbouring records as there
are slots fit at once, and a step in the opposite direction begins with those that the previous one left.

The files are scratch: only checkpoints hold state that outlives a run. They have no names, so their space is
free again however the process ends. (The idea of NVMe as a tier beside an active CPU and GPU: Fuyou, arXiv
2403.06504.)
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from typing import NamedTuple

import torch

from megatron_s2.offload.adam import State
from megatron_s2.offload.host_memory import HostMemory, HostSlice
from megatron_s2.offload.node import Node
from megatron_s2.offload.plan import GB, GRADIENT_BYTES, STATE_BYTES

MAGIC = b"megatron-s2 state"
PAGE = 4096
TRANSFER_BYTES = 2**23  # of one system call: several at a time keep a drive busy
THREADS = 4  # per directory
_TRAILER = struct.Struct("<17sQQ")
_INCOMPLETE = -1  # generation of a record that a failed write left incomplete
_FLAG = "--s2-offload-nvme-dir"


class TierError(RuntimeError):
    """State cannot be written to the tier or read from it; checkpoints are not affected."""


class Bandwidth(NamedTuple):
    """Bandwidth of a directory, bytes/s."""

    read: float
    write: float


class NvmeTier:
    """Records on NVMe and the ring of host memory that they pass through.

    Several threads may call `load` and `store` for different records.

    Args:
        directories: directories with one file each.
        sizes: elements of each subgroup of the tier, multiples of `ALIGNMENT`.
        slots: number of slots of the ring, at least 1.
        shares: size of each directory's file relative to the others, such as its measured bandwidth.
        pinned: whether the ring is pinned, as for `HostMemory`.

    Raises:
        ValueError: there are no directories, a share is not positive, or no file can be made in a directory.
        TierError: a directory has not enough space.
    """

    def __init__(
        self,
        directories: Sequence[str | Path],
        sizes: Sequence[int],
        slots: int,
        shares: Sequence[float] | None = None,
        pinned: bool = False,
    ) -> None:
        self.directories = len(directories)
        shares = [1.0] * len(directories) if shares is None else shares
        if not directories or len(shares) != len(directories):
            raise ValueError(f"{_FLAG}: must name directories, one for each of {len(shares)} shares")
        self.sizes = tuple(sizes)
        self.slots = min(slots, len(sizes))
        self.placement = distribute(sizes, shares)
        self._offsets, ends = [], [0] * len(directories)
        for size, index in zip(sizes, self.placement):
            self._offsets.append(ends[index])
            ends[index] += _record_bytes(size)
        self._generations: list[int | None] = [None] * len(sizes)
        self._files: list[_File] = []
        self._threads = ThreadPoolExecutor(THREADS * len(directories), thread_name_prefix="offload-nvme")
        try:
            for directory, end in zip(directories, ends):
                self._files.append(_File(Path(directory), end))
            largest = max(sizes)
            self._gradients = _record_bytes(largest)  # offset in a slot
            self._slot_bytes = self._gradients + _whole_pages(GRADIENT_BYTES * largest)
            self._ring = HostMemory(self.slots * self._slot_bytes, pinned)
        except BaseException:
            self._close_files()
            raise

    def slot_of(self, j: int) -> int:
        """Index of the slot that record j uses."""
        return j % self.slots

    def slice_of(self, j: int) -> HostSlice:
        """Views of the slot of record j: state and gradient, float32 `[sizes[j]]` each. The slot may have the
        content of another record."""
        size, base = self.sizes[j], self.slot_of(j) * self._slot_bytes
        floats = self._ring.bytes[base : base + self._slot_bytes].view(torch.float32)
        state = State(*floats[: 3 * size].view(3, size))
        return HostSlice(state, floats[self._gradients // GRADIENT_BYTES :][:size])

    def load(self, j: int) -> None:
        """Reads record j into its slot; zeros where it has not been written yet.

        Raises:
            TierError: the file cannot be read, or another program truncated or changed it.
        """
        slot = self._slot(j)
        generation = self._generations[j]
        if generation is None:
            torch.frombuffer(slot, dtype=torch.uint8).zero_()
            return
        file = self._files[self.placement[j]]
        if generation == _INCOMPLETE:
            raise TierError(f"{file}: the record at {self._offsets[j]} was written half")
        self._transfer(file.read, slot, self._offsets[j])
        if bytes(slot[-_TRAILER.size :]) != _TRAILER.pack(MAGIC, j, generation):
            raise TierError(
                f"{file}: the record at {self._offsets[j]} is not the one that was written "
                "there; another program changed the file. Resume from the last checkpoint"
            )

    def store(self, j: int) -> None:
        """Writes the slot of record j to its record.

        Raises:
            TierError: the disk is full, or the file cannot be written.
        """
        slot = self._slot(j)
        generation = max(self._generations[j] or 0, 0) + 1
        slot[-_TRAILER.size :] = _TRAILER.pack(MAGIC, j, generation)
        self._generations[j] = _INCOMPLETE
        self._transfer(self._files[self.placement[j]].write, slot, self._offsets[j])
        self._generations[j] = generation

    def close(self) -> None:
        """Deletes the files and frees the ring."""
        self._close_files()
        self._ring.close()

    def _close_files(self) -> None:
        self._threads.shutdown()
        for file in self._files:
            file.close()
        self._files = []

    def _slot(self, j: int) -> memoryview:
        """The bytes of the slot of record j that are written to it."""
        base = self.slot_of(j) * self._slot_bytes
        return self._ring.view()[base : base + _record_bytes(self.sizes[j])]

    def _transfer(self, move: Callable[[memoryview, int], None], memory: memoryview, offset: int) -> None:
        """Reads or writes a record in several concurrent transfers, all of which have ended on return."""
        transfers: list[Future[None]] = []
        try:
            for a in range(0, len(memory), TRANSFER_BYTES):
                transfers.append(self._threads.submit(move, memory[a : a + TRANSFER_BYTES], offset + a))
            errors = [error for one in transfers if (error := one.exception()) is not None]
        finally:
            wait(transfers)  # an interruption leaves none running into a slot that others use next
        if errors:
            raise errors[0]


class _File:
    """A nameless file of records in a directory, allocated in full when it is made."""

    def __init__(self, directory: Path, size: int) -> None:
        self._directory = directory
        if not directory.is_dir():
            raise ValueError(f"{_FLAG} {directory}: must be a directory")
        try:
            self._file = tempfile.TemporaryFile(dir=directory, buffering=0)  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise ValueError(f"{self} cannot be made: {error}") from error
        self._descriptor = self._file.fileno()
        try:
            self._bypass_page_cache()
            self._allocate(size)
        except BaseException:
            self.close()
            raise

    def __str__(self) -> str:
        return f"{_FLAG} {self._directory}: the state file"

    def read(self, memory: memoryview, offset: int) -> None:
        """Fills memory from an offset; both are whole pages.

        Raises:
            TierError: the file is too short, or cannot be read.
        """
        while memory:
            try:
                done = os.preadv(self._descriptor, [memory], offset)
            except OSError as error:
                raise self._failed("cannot be read", len(memory), error) from error
            if done == 0 or done % PAGE:
                raise TierError(
                    f"{self} ends at {os.fstat(self._descriptor).st_size} bytes, within a record; "
                    "another program truncated it. Resume from the last checkpoint"
                )
            memory, offset = memory[done:], offset + done

    def write(self, memory: memoryview, offset: int) -> None:
        """Writes memory at an offset; both are whole pages.

        Raises:
            TierError: the disk is full, or the file cannot be written.
        """
        while memory:
            try:
                done = os.pwritev(self._descriptor, [memory], offset)
                if done == 0 or done % PAGE:
                    raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} (wrote {done} bytes)")
            except OSError as error:
                raise self._failed("cannot be written", len(memory), error) from error
            memory, offset = memory[done:], offset + done

    def close(self) -> None:
        self._file.close()

    def _bypass_page_cache(self) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        try:
            fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags | os.O_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            print(
                f"{_FLAG} {self._directory}: its file system refuses O_DIRECT; state goes through the page "
                "cache, which is slower and takes memory beside the budget",
                file=sys.stderr,
                flush=True,
            )

    def _allocate(self, size: int) -> None:
        try:
            os.posix_fallocate(self._descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise self._failed("cannot be made", size, error) from error
            # The file system cannot, and the C library's substitute writes single bytes, which O_DIRECT
            # refuses: space is then allocated record by record.
            os.ftruncate(self._descriptor, size)

    def _failed(self, what: str, size: int, error: OSError) -> TierError:
        if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            disk = os.statvfs(self._directory)
            what += f", the disk is full ({disk.f_bavail * disk.f_frsize / GB:.3f} GB free)"
        return TierError(
            f"{self} {what} ({size} bytes): {error}. Make room or name another directory, and resume from "
            "the last checkpoint"
        )


def distribute(sizes: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Returns the index of a directory for each subgroup, such that all directories take equally long and
    neighbouring subgroups are in different ones where shares allow.

    Raises:
        ValueError: a share is not positive.
    """
    if any(not share > 0 for share in shares):
        raise ValueError(f"shares {list(shares)}: must be positive")
    taken = [0.0] * len(shares)
    placement = []
    for size in sizes:
        index = min(range(len(shares)), key=lambda n: (taken[n] + size) / shares[n])
        taken[index] += size
        placement.append(index)
    return placement


def measure_bandwidth(directory: str | Path, node: Node, size: int = 2**28) -> Bandwidth:
    """Measures the bandwidth that the slowest rank of the node has of a directory while all of them write, or
    read, a file of `size` bytes, a multiple of 4096, which is gone afterwards. They call it together.

    Raises:
        ValueError: there is no such directory.
        TierError: the directory has not enough space.
    """
    file = _File(Path(directory), size)
    offsets = range(0, size, TRANSFER_BYTES)
    seconds = []
    try:
        memory = HostMemory(min(size, TRANSFER_BYTES))
        memory.bytes.fill_(1)
        with ThreadPoolExecutor(THREADS) as threads:
            for move in (file.write, file.read):
                node.wait()
                begin = time.perf_counter()
                list(threads.map(lambda a, move=move: move(memory.view()[: size - a], a), offsets))
                seconds.append(time.perf_counter() - begin)
    finally:
        file.close()
    write, read = (size / max(of_ranks) for of_ranks in zip(*node.exchange(seconds)))
    return Bandwidth(read, write)


def _record_bytes(size: int) -> int:
    return _whole_pages(STATE_BYTES * size + _TRAILER.size)


def _whole_pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
