"""The time model of context parallelism: predicted time of one schedule for one attention call.

Bytes and FLOPs are exact (`cost.py`); times are predicted:

- A link carries both directions at once, so the larger of the bytes received and sent counts. Transfers
  within a node and between nodes follow one another, and a message costs nothing but its bytes.
- Context-parallel neighbours are `tensor_parallel` ranks apart, so a node holds `gpus_per_node /
  tensor_parallel` of them. In an all-gather each of the n ranks on a node fetches 1/n of the data of other
  nodes and passes it on within the node. In an all-to-all each rank fetches all of its data.
- gather: halo + max(shard all-gather, window attention) + shard attention. In the backward the all-to-all of
  the shard gradients takes the place of the all-gather.
- a2a: exchange of heads + attention + exchange of outputs, without overlap; the same in the backward.
- ring: max(bytes round the ring over its slowest link, attention). all_gather: all-gather + attention. In the
  backward both move keys and values again, and their gradients. Both are assumed to compute the same sparse
  attention, balanced by zigzag.
- A step takes as long as its slowest rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megatron_s2.parallel.cost import (
    AttentionCall,
    Transfers,
    gather_backward_bytes,
    key_value_tokens,
    pair_counts,
    query_tokens,
    transfers,
)
from megatron_s2.pattern import S2Pattern
from megatron_s2.pattern.block_pattern import attention_flops

S2_SCHEDULES = ("gather", "a2a")
_LSE_BYTES = 4


@dataclass(frozen=True)
class Cluster:
    """Rates of the cluster. The defaults are from the DGX H100 data sheet, at half the peak of the chip.

    Args:
        gpus_per_node: number of GPUs that share the fast link.
        intra_gigabytes_per_s: rate between a GPU and its node, in each direction, in 10**9 bytes/s (NVLink 4:
            450).
        inter_gigabytes_per_s: rate between a GPU and other nodes, in each direction, in 10**9 bytes/s (one
            400 Gbit/s adapter per GPU: 50).
        chip_tflops: peak rate of a GPU in 10**12 FLOP/s (H100 SXM, dense bf16: 989).
        efficiency: share of the peak that attention reaches, at most 1.

    Raises:
        ValueError: a rate is not positive; the message starts with its name.
    """

    gpus_per_node: int = 8
    intra_gigabytes_per_s: float = 450.0
    inter_gigabytes_per_s: float = 50.0
    chip_tflops: float = 989.0
    efficiency: float = 0.5

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not value > 0:
                raise ValueError(f"{name} {value}: must be positive")
        if self.efficiency > 1:
            raise ValueError(f"efficiency {self.efficiency}: must be at most 1")

    def node_ranks(self, tensor_parallel: int) -> int:
        """Number of context-parallel ranks of one group on a node."""
        return max(1, self.gpus_per_node // tensor_parallel)

    def compute_seconds(self, flops: np.ndarray) -> np.ndarray:
        """Seconds that the FLOPs take."""
        return flops / (self.chip_tflops * 1e12 * self.efficiency)

    def link_seconds(self, intra: np.ndarray | float, inter: np.ndarray | float) -> np.ndarray:
        """Seconds that bytes within the node and then bytes between nodes take."""
        return intra / (self.intra_gigabytes_per_s * 1e9) + inter / (self.inter_gigabytes_per_s * 1e9)


class Spread(NamedTuple):
    """The smallest and the largest value of any rank."""

    least: float
    most: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        return cls(np.min(values).item(), np.max(values).item())


@dataclass(frozen=True)
class SchedulePlan:
    """The cost of one schedule for one layer.

    Args:
        schedule: one of `SCHEDULES`.
        received_forward, received_backward: bytes received from other ranks.
        flops: FLOPs of attention, forward and backward.
        imbalance: largest number of visible pairs of a rank divided by the mean.
        key_value_bytes: largest size of the keys and values that a rank stores while it computes attention;
            `gather` and `a2a` keep them for the backward.
        activation_bytes: largest size of the queries, outputs and log-sum-exps that a rank keeps for the
            backward.
        backward_bytes: most that a rank stores during the backward beside both; known for `gather`.
        forward_seconds, backward_seconds: predicted time of the slowest rank.
    """

    schedule: str
    received_forward: Spread
    received_backward: Spread
    flops: Spread
    imbalance: float
    key_value_bytes: int
    activation_bytes: int
    backward_bytes: int | None
    forward_seconds: float
    backward_seconds: float

    @property
    def seconds(self) -> float:
        """Predicted time of forward and backward."""
        return self.forward_seconds + self.backward_seconds


@lru_cache(maxsize=1024)
def plan_schedule(
    schedule: str, pattern: S2Pattern, call: AttentionCall, cluster: Cluster, tensor_parallel: int
) -> SchedulePlan | None:
    """Returns the cost of one schedule, or None for `a2a` with fewer query heads than ranks.

    Arguments are those of `plan_layer`, errors those of `exchange_bytes`.
    """
    if schedule == "a2a" and call.query_heads < call.ranks:
        return None
    counts = pair_counts(schedule, pattern, call)
    transferred = transfers(schedule, pattern, call, cluster.node_ranks(tensor_parallel))
    received, sent = (
        (call.ranks - 1) * transferred.gathered + count.sum(axis=0)
        for count in (transferred.received, transferred.sent)
    )
    flops, window_flops = (
        np.array(attention_flops(pairs.astype(float), call.head_dim, call.v_head_dim))
        for pairs in (counts.pairs, counts.window_pairs)
    )  # [forward and backward, ranks]
    queries = query_tokens(schedule, pattern, call)
    per_query = (call.head_dim + call.v_head_dim) * call.element_size + _LSE_BYTES
    keys = key_value_tokens(schedule, pattern, call)
    forward, backward = (
        _seconds(schedule, call, cluster, tensor_parallel, transferred, *direction).max().item()
        for direction in zip(flops, window_flops, (False, True))
    )
    return SchedulePlan(
        schedule=schedule,
        received_forward=Spread.of(received),
        received_backward=Spread.of(sent if schedule in S2_SCHEDULES else 2 * received),
        flops=Spread.of(flops.sum(axis=0)),
        imbalance=counts.imbalance,
        key_value_bytes=int(keys.max()) * call.key_value_bytes,
        activation_bytes=int(queries.max()) * call.batch * per_query,
        backward_bytes=int(gather_backward_bytes(pattern, call).max()) if schedule == "gather" else None,
        forward_seconds=forward,
        backward_seconds=backward,
    )


def _seconds(
    schedule: str,
    call: AttentionCall,
    cluster: Cluster,
    tensor_parallel: int,
    transferred: Transfers,
    flops: np.ndarray,
    window_flops: np.ndarray,
    backward: bool,
) -> np.ndarray:
    """`[ranks]`, predicted seconds of the forward or the backward, by the model at the top of the file."""
    P, size, gathered = call.ranks, cluster.node_ranks(tensor_parallel), transferred.gathered
    first = np.arange(P) // size * size
    local = np.minimum(first + size, P) - first  # ranks on the node of each rank, including itself
    attention = cluster.compute_seconds(flops)
    point_to_point = cluster.link_seconds(*np.maximum(transferred.received, transferred.sent))
    all_gather = cluster.link_seconds((local - 1) * P * gathered / local, (P - local) * gathered / local)
    if schedule == "a2a":
        return point_to_point + attention
    if schedule == "gather":
        all_to_all = cluster.link_seconds((local - 1) * gathered, (P - local) * gathered)
        window = cluster.compute_seconds(window_flops)
        shards = all_to_all if backward else all_gather
        return point_to_point + np.maximum(shards, window) + attention - window
    times = 2 if backward else 1
    if schedule == "all_gather":
        return times * all_gather + attention
    ring_bytes = times * (P - 1) * gathered
    ring = cluster.link_seconds(0, ring_bytes) if size < P else cluster.link_seconds(ring_bytes, 0)
    return np.maximum(ring, attention)
