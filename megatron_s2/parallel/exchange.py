"""The collectives of context parallelism: started early, awaited late, bytes counted, lost peers named."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Thread

import torch
import torch.distributed as dist
from torch import Tensor

_SECONDS_TO_ANSWER = 5.0
_SECONDS_BETWEEN_LOOKS = 0.5


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
            f"S2 context parallelism, this step and rank, all layers: {received} received "
            f"(predicted {predicted}), {sent} sent"
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
        with _naming_lost_peers(self):
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
        with _naming_lost_peers(self):
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
        with _naming_lost_peers(self._exchange):
            self._work.wait()
        return self._result


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


@contextmanager
def _naming_lost_peers(exchange: Exchange) -> Iterator[None]:
    """Turns a failed collective into an error that names the ranks at fault.

    gloo says only that some address hung up, or that time ran out. NCCL fails elsewhere: its watchdog ends
    the process, with a message of its own, and the launcher says which rank ended first.
    """
    attendance = _attendance()
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError as error:
        group = exchange.group
        raise PeerLostError(
            f"{attendance.blame(dist.get_process_group_ranks(group))} the context-parallel exchange of layer "
            f"{exchange.layer} (group {dist.get_process_group_ranks(group)}): {str(error).splitlines()[0]}"
        ) from error
    attendance.exchanges += 1


class _Attendance:
    """Answers for this process when a rank asks who is still there, from a thread of its own.

    So a rank that waits in a collective, or comes late to it, is told from one that died or hangs. The first
    rank whose exchange fails finds the culprit; the others, which may fail only because that one has ended,
    repeat its verdict.
    """

    _KEY = "megatron_s2/attendance"

    def __init__(self, store: dist.Store, rank: int) -> None:
        self.exchanges = 0  # completed
        self._store = store
        self._rank = rank
        Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        with suppress(RuntimeError):  # the store ends with the rank that keeps it
            while not self._store.check([f"{self._KEY}/asked"]):
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            self._store.set(f"{self._KEY}/{self._rank}", str(self.exchanges))

    def blame(self, ranks: Sequence[int]) -> str:
        """`rank 3 did not complete`: who does not answer; if all do, who has completed fewest exchanges."""
        with suppress(RuntimeError):
            verdict = f"{self._KEY}/verdict/{'-'.join(map(str, ranks))}"
            self._store.set(f"{self._KEY}/asked", "")
            if self._store.add(f"{verdict}/judges", 1) == 1:
                self._store.set(verdict, self._judge(ranks))
            # Not a waiting `get`: it would keep the store from the thread that answers.
            deadline = time.monotonic() + 2 * _SECONDS_TO_ANSWER
            while not self._store.check([verdict]) and time.monotonic() < deadline:
                time.sleep(_SECONDS_BETWEEN_LOOKS)
            if self._store.check([verdict]):
                return self._store.get(verdict).decode()
        return "a rank that cannot be named any more did not complete"

    def _judge(self, ranks: Sequence[int]) -> str:
        silent = list(ranks)
        deadline = time.monotonic() + _SECONDS_TO_ANSWER
        while silent and time.monotonic() < deadline:
            silent = [rank for rank in silent if not self._store.check([f"{self._KEY}/{rank}"])]
            time.sleep(0.05)
        if silent:
            return f"{_named(silent)} did not complete"
        done = {rank: int(self._store.get(f"{self._KEY}/{rank}")) for rank in ranks}
        last = [rank for rank in ranks if done[rank] == min(done.values())]
        return f"{_named(last)} answered but did not come in time to complete"


def _named(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {', '.join(map(str, ranks))}"


@lru_cache(maxsize=1)
def _attendance() -> _Attendance:
    return _Attendance(dist.distributed_c10d._get_default_store(), dist.get_rank())
