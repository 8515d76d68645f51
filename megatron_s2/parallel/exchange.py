"""The collectives of context parallelism: started early, awaited late, bytes counted, lost peers named."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

_SECONDS_TO_ANSWER = 5.0


class PeerLostError(RuntimeError):
    """A rank of the group did not take part in an exchange; the message names it."""


@dataclass
class Traffic:
    """Bytes that this rank exchanged with other ranks, by layer number; what a rank sends to itself is none.

    `predicted` is what the planner said the same attention calls would receive, before they began.
    """

    received: dict[int, int] = field(default_factory=dict)
    sent: dict[int, int] = field(default_factory=dict)
    predicted: dict[int, int] = field(default_factory=dict)

    def add(self, layer: int, received: int, sent: int) -> None:
        self.received[layer] = self.received.get(layer, 0) + received
        self.sent[layer] = self.sent.get(layer, 0) + sent

    def predict(self, layer: int, count: int) -> None:
        self.predicted[layer] = self.predicted.get(layer, 0) + count

    def __str__(self) -> str:
        received, sent, predicted = (
            f"{sum(counts.values()) / 2**20:.2f} MiB" for counts in (self.received, self.sent, self.predicted)
        )
        return (
            f"S2 context parallelism, this step and rank: {received} received (predicted {predicted}), "
            f"{sent} sent"
        )

    def clear(self) -> None:
        for counts in (self.received, self.sent, self.predicted):
            counts.clear()


@dataclass(frozen=True)
class Exchange:
    """The context-parallel group of one layer.

    Args:
        group: the ranks.
        layer: number of the layer, for counters and messages.
        traffic: where bytes are counted.
    """

    group: dist.ProcessGroup
    layer: int = 0
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def ranks(self) -> int:
        return self.group.size()

    @property
    def rank(self) -> int:
        return self.group.rank()

    def all_gather(self, part: Tensor) -> Pending:
        """Starts to bring every rank's `part` `[n, …]` (of one size) to all: `[ranks * n, …]`."""
        part = part.contiguous()
        result = part.new_empty(self.ranks * part.shape[0], *part.shape[1:])
        others = (self.ranks - 1) * _bytes(part)
        self.traffic.add(self.layer, received=others, sent=others)
        with _naming_lost_peers(self.group, self.layer):
            work = dist.all_gather_into_tensor(result, part, group=self.group, async_op=True)
        return Pending(self, work, result, part)

    def all_to_all(self, parts: Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending:
        """Starts to send `send[r]` rows of `parts` `[sum(send), …]` to each rank r, and to receive
        `receive[r]` from it: `[sum(receive), …]`."""
        parts = parts.contiguous()
        result = parts.new_empty(sum(receive), *parts.shape[1:])
        row = _bytes(parts[:1]) if len(parts) else _bytes(result[:1])
        mine = self.rank
        self.traffic.add(
            self.layer, received=(sum(receive) - receive[mine]) * row, sent=(sum(send) - send[mine]) * row
        )
        with _naming_lost_peers(self.group, self.layer):
            work = dist.all_to_all_single(
                result, parts, list(receive), list(send), group=self.group, async_op=True
            )
        return Pending(self, work, result, parts)


@dataclass(frozen=True)
class Pending:
    """A collective under way. `_sent` is kept alive until it has ended."""

    _exchange: Exchange
    _work: dist.Work
    _result: Tensor
    _sent: Tensor

    def wait(self) -> Tensor:
        """The result. On a GPU the current stream waits, not the process.

        Raises:
            PeerLostError: a rank did not take part within the group's timeout.
        """
        with _naming_lost_peers(self._exchange.group, self._exchange.layer):
            self._work.wait()
        return self._result


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


@contextmanager
def _naming_lost_peers(group: dist.ProcessGroup, layer: int) -> Iterator[None]:
    """Turns a failed collective into an error that names the ranks which do not answer any more.

    gloo says only that some address hung up, or that time ran out. NCCL's watchdog ends the process itself.
    """
    try:
        yield
    except RuntimeError as error:
        lost = _roll_call(group)
        who = f"rank {lost[0]}" if len(lost) == 1 else f"ranks {', '.join(map(str, lost))}" if lost else None
        raise PeerLostError(
            f"{who or 'a rank that still answers'} did not complete the context-parallel exchange of layer "
            f"{layer} (group {dist.get_process_group_ranks(group)}): {str(error).splitlines()[0]}"
        ) from error


def _roll_call(group: dist.ProcessGroup) -> list[int]:
    """Global ranks of the group that do not answer in the store all ranks share, each waiting for the others.

    When a collective fails on one rank, it fails on all others that live.
    """
    ranks = dist.get_process_group_ranks(group)
    key = f"megatron_s2/roll_call/{'-'.join(map(str, ranks))}"
    silent = [rank for rank in ranks if rank != dist.get_rank()]
    deadline = time.monotonic() + _SECONDS_TO_ANSWER
    with suppress(RuntimeError):  # the store may be gone with the rank that kept it
        store = dist.distributed_c10d._get_default_store()
        store.set(f"{key}/{dist.get_rank()}", "here")
        while silent and time.monotonic() < deadline:
            silent = [rank for rank in silent if not store.check([f"{key}/{rank}"])]
            time.sleep(0.05)
    return silent
