"""The tier of state on NVMe: one file per directory, read and written past the page cache by several threads.

A record is what one subgroup has, one after another: master, exp_avg, exp_avg_sq (float32), padding, and a
seal with its subgroup and generation; records begin at multiples of 4096 bytes. Records pass through a ring
of slots in host memory. Subgroup j of the tier always uses slot j modulo their number, so that any so many
neighbours fit at once, up or down, and a step that goes the other way finds what the one before it left.

The files are scratch: only checkpoints hold state that outlives a run. They have no names, so that their
space is free again however the process ends. (The idea of NVMe as a tier beside an active CPU and GPU: Fuyou,
arXiv 2403.06504.)
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
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch

from megatron_s2.offload.adam import State
from megatron_s2.offload.arena import HostMemory, HostSlice
from megatron_s2.offload.plan import ALIGNMENT, GB, STATE_BYTES

MAGIC = b"megatron-s2 state"
PAGE = 4096
PIECE = 2**23  # of one read or write: several under way keep a drive busy
THREADS = 4  # per directory
_SEAL = struct.Struct("<17sQQ")
_HALF = -1  # generation of a record that is neither old nor new
_FLAG = "--s2-offload-nvme-dir"


class TierError(RuntimeError):
    """The tier cannot take or return state; checkpoints are not affected."""


@dataclass(frozen=True)
class Bandwidth:
    """Of a directory, bytes/s."""

    read: float
    write: float


class NvmeTier:
    """Records on disk and the ring they pass through.

    `load` and `store` may be called from several threads for different subgroups.

    Args:
        directories: one file in each.
        sizes: elements of each subgroup of the tier, multiples of `ALIGNMENT`.
        slots: of the ring.
        shares: how much each directory takes, relative to the others; its measured bandwidth.
        pinned: the ring, as for `HostMemory`.

    Raises:
        ValueError: an argument is out of range, or a directory is not there or takes no files.
        TierError: a directory has no room.
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
        if slots < 1:
            raise ValueError(f"slots {slots}: must be >= 1")
        if not sizes or any(size < ALIGNMENT or size % ALIGNMENT for size in sizes):
            raise ValueError(f"sizes {sizes}: must be multiples of {ALIGNMENT}")
        self.sizes = tuple(sizes)
        self.slots = min(slots, len(sizes))
        self.placement = distribute(sizes, shares)
        self._offsets, ends = [], [0] * len(directories)
        for size, where in zip(sizes, self.placement):
            self._offsets.append(ends[where])
            ends[where] += _record_bytes(size)
        self._generations: list[int | None] = [None] * len(sizes)
        self._files: list[_File] = []
        self._threads = ThreadPoolExecutor(THREADS * len(directories), thread_name_prefix="offload-nvme")
        try:
            for directory, end in zip(directories, ends):
                self._files.append(_File(Path(directory), end))
            largest = max(sizes)
            self._gradients = _record_bytes(largest)  # where they begin in a slot
            self._slot_bytes = self._gradients + _whole_pages(4 * largest)
            self._ring = HostMemory(self.slots * self._slot_bytes, pinned)
        except BaseException:
            self._close_files()
            raise
        self.host_bytes = self._ring.size

    def slot_of(self, j: int) -> int:
        """Which slot subgroup j of the tier uses."""
        return j % self.slots

    def slice_of(self, j: int) -> HostSlice:
        """Views of its slot: state and gradient, float32 `[sizes[j]]` each; what is in them, the caller
        knows."""
        size, base = self.sizes[j], self.slot_of(j) * self._slot_bytes
        floats = self._ring.bytes[base : base + self._slot_bytes].view(torch.float32)
        state = State(*floats[: 3 * size].view(3, size))
        begin = self._gradients // 4
        return HostSlice(state, floats[begin : begin + size])

    def load(self, j: int) -> None:
        """Read its record into its slot; zeros where none was written yet.

        Raises:
            TierError: the file was truncated or changed by others, or cannot be read.
        """
        slot = self._slot(j)
        generation = self._generations[j]
        if generation is None:
            torch.frombuffer(slot, dtype=torch.uint8).zero_()
            return
        file = self._files[self.placement[j]]
        if generation == _HALF:
            raise TierError(f"{file}: the record at {self._offsets[j]} was written half")
        self._at_once(file.read, slot, self._offsets[j])
        if bytes(slot[-_SEAL.size :]) != _SEAL.pack(MAGIC, j, generation):
            raise TierError(
                f"{file}: the record at {self._offsets[j]} is not the one that was written "
                "there; another program changed the file. Resume from the last checkpoint"
            )

    def store(self, j: int) -> None:
        """Write its slot to its record.

        Raises:
            TierError: the disk is full, or the file cannot be written.
        """
        slot = self._slot(j)
        generation = max(self._generations[j] or 0, 0) + 1
        slot[-_SEAL.size :] = _SEAL.pack(MAGIC, j, generation)
        self._generations[j] = _HALF
        self._at_once(self._files[self.placement[j]].write, slot, self._offsets[j])
        self._generations[j] = generation

    def close(self) -> None:
        """Give the files' space back and let go of the ring."""
        self._close_files()
        self._ring.close()

    def _close_files(self) -> None:
        self._threads.shutdown()
        for file in self._files:
            file.close()
        self._files = []

    def _slot(self, j: int) -> memoryview:
        """The bytes of its slot that go to its record."""
        base = self.slot_of(j) * self._slot_bytes
        return self._ring.view()[base : base + _record_bytes(self.sizes[j])]

    def _at_once(self, move: Callable[[memoryview, int], None], memory: memoryview, offset: int) -> None:
        """In pieces, several under way; all have ended when it returns."""
        pieces = [
            self._threads.submit(move, memory[a : a + PIECE], offset + a)
            for a in range(0, len(memory), PIECE)
        ]
        try:
            errors = [error for piece in pieces if (error := piece.exception()) is not None]
        finally:
            wait(pieces)  # an interruption leaves none on its way into a slot that others use next
        if errors:
            raise errors[0]


class _File:
    """A file of records in a directory, without a name, and of its full size at once."""

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
            self._take_room(size)
        except BaseException:
            self.close()
            raise

    def __str__(self) -> str:
        return f"{_FLAG} {self._directory}: the state file"

    def read(self, memory: memoryview, offset: int) -> None:
        """Fill memory from an offset; both are whole pages.

        Raises:
            TierError: the file ends before, or cannot be read.
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
        """Write memory at an offset; both are whole pages.

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

    def _take_room(self, size: int) -> None:
        try:
            os.posix_fallocate(self._descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):
                raise self._failed("cannot be made", size, error) from error
            # The file system cannot, and the C library's way around it writes single bytes, which O_DIRECT
            # refuses: room is then taken record by record.
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
    """A directory for each subgroup, so that each directory needs equally long for all of its own, and
    neighbours lie on different ones where shares allow.

    Raises:
        ValueError: a share is not positive.
    """
    if any(not share > 0 for share in shares):
        raise ValueError(f"shares {list(shares)}: must be positive")
    taken = [0.0] * len(shares)
    placement = []
    for size in sizes:
        where = min(range(len(shares)), key=lambda n: (taken[n] + size) / shares[n])
        taken[where] += size
        placement.append(where)
    return placement


def measure_bandwidth(directory: str | Path, size: int = 2**28) -> Bandwidth:
    """Write and read a file of `size` bytes (whole pages) that is gone afterwards.

    Raises:
        ValueError: there is no such directory, or the size is not a positive multiple of 4096.
        TierError: it has no room.
    """
    if size < PAGE or size % PAGE:
        raise ValueError(f"size {size}: must be a positive multiple of {PAGE}")
    if not Path(directory).is_dir():
        raise ValueError(f"{_FLAG} {directory}: must be a directory")
    memory = HostMemory(min(size, PIECE))
    memory.bytes.fill_(1)
    file = _File(Path(directory), size)
    pieces = range(0, size, PIECE)
    seconds = []
    try:
        with ThreadPoolExecutor(THREADS) as threads:
            for move in (file.write, file.read):
                begin = time.perf_counter()
                list(threads.map(lambda a, move=move: move(memory.view()[: size - a], a), pieces))
                seconds.append(time.perf_counter() - begin)
    finally:
        file.close()
    return Bandwidth(read=size / seconds[1], write=size / seconds[0])


def _record_bytes(size: int) -> int:
    return _whole_pages(STATE_BYTES * size + _SEAL.size)


def _whole_pages(size: int) -> int:
    return -(-size // PAGE) * PAGE
