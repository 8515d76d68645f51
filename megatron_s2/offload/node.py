"""The ranks of one node: the cores of each, and an exchange of values between them."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import torch.distributed as dist


@dataclass(frozen=True)
class Node:
    """The ranks of one node, in ascending order.

    Args:
        index: position of this rank among them.
        cores: the cores that each of them may use.
        exchange: function that all of them call with a value each, and that returns all values to each.
    """

    index: int
    cores: tuple[frozenset[int], ...]
    exchange: Callable[[object], list]

    @classmethod
    def detect(cls) -> Node:
        """Returns the node of this process. All ranks of the job call it together; one that is alone needs no
        process group."""
        cores = frozenset(os.sched_getaffinity(0))
        if not dist.is_initialized() or dist.get_world_size() == 1:
            return cls(0, (cores,), lambda value: [value])
        machine = Path("/proc/sys/kernel/random/boot_id").read_text()  # the same in all its containers
        everywhere = _gather((machine, cores), dist.get_world_size())
        ranks_of: dict[str, list[int]] = {}
        for rank, (of_rank, _) in enumerate(everywhere):
            ranks_of.setdefault(of_rank, []).append(rank)
        # All ranks make the groups of all nodes: with `use_local_synchronization` torch 2.11 hangs if ranks
        # are in different numbers of groups. Gloo: NCCL would take memory of the GPU for a few values.
        groups = {one: dist.new_group(ranks, backend="gloo") for one, ranks in ranks_of.items()}
        ranks, group = ranks_of[machine], groups[machine]
        return cls(
            ranks.index(dist.get_rank()),
            tuple(everywhere[rank][1] for rank in ranks),
            lambda value: _gather(value, len(ranks), group),
        )

    @property
    def ranks(self) -> int:
        """Number of ranks."""
        return len(self.cores)

    @property
    def own_cores(self) -> int:
        """Number of cores for the threads of this rank."""
        return share_of_cores(self.cores, self.index)

    def wait(self) -> None:
        """Waits until all ranks of the node have called it."""
        self.exchange(None)


def share_of_cores(cores: Sequence[frozenset[int]], index: int) -> int:
    """Returns the number of cores that one of several ranks may keep busy, at least 1: a core that k of them
    may use counts 1/k. So ranks that a launcher bound to cores of their own have all of these, and ranks that
    may use the same cores divide them.

    Args:
        cores: the cores that each rank may use.
        index: which rank.
    """
    share = sum(Fraction(1, sum(core in others for others in cores)) for core in cores[index])
    return max(int(share), 1)


def _gather(value: object, ranks: int, group: dist.ProcessGroup | None = None) -> list:
    values: list = [None] * ranks
    dist.all_gather_object(values, value, group=group)
    return values
