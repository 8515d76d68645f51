"""The collectives of context parallelism: asynchronous, with counters of bytes and errors for lost peers."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch.distributed as dist
from torch import Tensor

# Since torch 2.14 the older name warns.
_all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
# Gloo has no exception type for a peer that died or timed out. The message begins with a place in its
# transport; collectives that were pending at the timeout of another one fail with the second message.
_LOST_BY_GLOO = re.compile(r"\[[^] ]*\bgloo/transport/|Application timeout caused pair closure")
# Results of NCCL that blame this process, its device or its arguments, and no peer.
_OWN_FAULT_BY_NCCL = re.compile("nccl(UnhandledCudaError|InternalError|InvalidArgument|InvalidUsage)")


class PeerLostError(RuntimeError):
    """A rank of the group died, or did not answer within the group's timeout; the message names the layer and
    the group."""


@dataclass
class Traffic:
    """Bytes that this rank exchanged with other ranks, by layer number. What a rank sends to itself is not
    counted.

    Args:
        received, sent: counted bytes.
        predicted: bytes that the planner predicts the same attention calls to receive.
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
class ContextParallelGroup:
    """The context-parallel group of one layer.

    Args:
        process_group: process group of the ranks.
        layer: number of the layer, for counters and messages.
        traffic: counters to which the bytes of each collective are added.
    """

    process_group: dist.ProcessGroup
    layer: int = 0
    traffic: Traffic = field(default_factory=Traffic)

    @property
    def ranks(self) -> int:
        return self.process_group.size()

    @property
    def rank(self) -> int:
        return self.process_group.rank()

    def all_gather(self, part: Tensor) -> Pending:
        """Starts an all-gather of `part` `[n, …]`, of the same size on all ranks, to `[ranks * n, …]`.

        With n = 0 no rank waits for another.
        """
        part = part.contiguous()
        if not len(part):
            return self.nothing(part)
        result = part.new_empty(self.ranks * part.shape[0], *part.shape[1:])
        exchanged = (self.ranks - 1) * _bytes(part)
        self.traffic.add(self.layer, received=exchanged, sent=exchanged)
        with _reporting_lost_peers(self):
            work = _all_gather_single(result, part, group=self.process_group, async_op=True)
        return Pending(self, work, result, part)

    def nothing(self, x: Tensor) -> Pending:
        """Returns `x` as the result of a collective that no rank takes part in."""
        return Pending(self, None, x, x)

    def all_to_all(self, parts: Tensor, send: Sequence[int], receive: Sequence[int]) -> Pending:
        """Starts an all-to-all of `parts` `[sum(send), …]` to `[sum(receive), …]`.

        Args:
            send, receive: number of rows sent to and received from each rank.
        """
        parts = parts.contiguous()
        result = parts.new_empty(sum(receive), *parts.shape[1:])
        row = _bytes(parts[:1]) if len(parts) else _bytes(result[:1])
        received, sent = (row * (sum(rows) - rows[self.rank]) for rows in (receive, send))
        self.traffic.add(self.layer, received, sent)
        with _reporting_lost_peers(self):
            work = dist.all_to_all_single(
                result, parts, list(receive), list(send), group=self.process_group, async_op=True
            )
        return Pending(self, work, result, parts)


@dataclass(frozen=True)
class Pending:
    """A collective that has been started. `_sent` keeps its input alive until it is complete."""

    _group: ContextParallelGroup
    _work: dist.Work | None
    _result: Tensor
    _sent: Tensor

    def wait(self) -> Tensor:
        """Returns the result. On a GPU the current stream waits, not the process.

        Raises:
            PeerLostError: a rank of the group died, or did not answer within its timeout.
        """
        if self._work is not None:
            with _reporting_lost_peers(self._group):
                self._work.wait()
        return self._result


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


@contextmanager
def _reporting_lost_peers(group: ContextParallelGroup) -> Iterator[None]:
    """Turns the error of a collective whose peer died or timed out into a PeerLostError; other errors pass
    unchanged.

    With NCCL the watchdog ends the process instead, with a message of its own.
    """
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_peer(error):
            raise
        raise PeerLostError(
            f"context-parallel exchange of layer {group.layer}, group "
            f"{dist.get_process_group_ranks(group.process_group)}: a rank died or did not answer in time: "
            f"{str(error).partition('\n')[0]}"
        ) from error


def _is_lost_peer(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistError):
        return not _OWN_FAULT_BY_NCCL.search(str(error))
    return type(error) is RuntimeError and _LOST_BY_GLOO.match(str(error)) is not None
