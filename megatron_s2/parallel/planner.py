"""Which schedule a layer's attention takes under context parallelism: by predicted time, with its reasons.

The bytes and FLOPs are exact (`cost.py`). The time is a model:

- A link carries both directions at once: the larger of what a rank receives and sends counts. Bytes within
  the node and bytes between nodes go one after the other, and messages cost nothing but their bytes.
- Context-parallel neighbours are `tensor_parallel` ranks apart, so that a node holds `gpus_per_node /
  tensor_parallel` of them. In an all-gather each of a node's n ranks fetches 1/n of what other nodes have,
  and the node shares it out. In an all-to-all each rank fetches all of its own.
- gather: halo + max(shard all-gather, window attention) + shard attention. Backward, shard gradients go as
  an all-to-all while the windows' gradients are computed: the same sum with that transfer.
- a2a: heads out + attention + outputs back, nothing at the same time; backward alike.
- ring: max(bytes round the ring, attention), at the pace of its slowest link. all_gather: all-gather +
  attention. Backward both move keys and values again and their gradients besides, and both are granted the
  same sparse attention as ours, balanced by zigzag.
- A step lasts as long as its slowest rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from megatron_s2.parallel.cost import (
    SCHEDULES,
    AttentionCall,
    ExchangeBytes,
    Transfers,
    exchange_bytes,
    key_value_tokens,
    query_tokens,
    transfers,
    work,
)
from megatron_s2.pattern import S2Pattern, S2Settings
from megatron_s2.pattern.block_pattern import attention_flops

__all__ = [
    "OURS",
    "SCHEDULES",
    "AttentionCall",
    "Choice",
    "Cluster",
    "ExchangeBytes",
    "LayerGroup",
    "LayerPlan",
    "ModelPlan",
    "SchedulePlan",
    "Spread",
    "choose",
    "exchange_bytes",
    "mib_text",
    "plan_layer",
    "plan_model",
    "time_text",
]

OURS = ("gather", "a2a")
_LSE_BYTES = 4


@dataclass(frozen=True)
class Cluster:
    """Rates of the machines. The defaults are those of DGX H100 data sheets, at half the chip's peak.

    Args:
        gpus_per_node: GPUs that share the fast link.
        intra_gigabytes_per_s: of one GPU to its node, in each direction, 10**9 bytes/s (NVLink 4: 450).
        inter_gigabytes_per_s: of one GPU to other nodes, in each direction, 10**9 bytes/s (one 400 Gbit/s
            adapter per GPU: 50).
        chip_tflops: peak of one GPU in 10**12 FLOP/s (H100 SXM, dense bf16: 989).
        efficiency: share of that peak which attention reaches, up to 1.

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
        """Context-parallel ranks of one group on one node."""
        return max(1, self.gpus_per_node // tensor_parallel)

    def compute_seconds(self, flops: np.ndarray) -> np.ndarray:
        """Seconds for FLOPs."""
        return flops / (self.chip_tflops * 1e12 * self.efficiency)

    def link_seconds(self, intra: np.ndarray | float, inter: np.ndarray | float) -> np.ndarray:
        """Seconds for bytes within the node and bytes between nodes, one after the other."""
        return intra / (self.intra_gigabytes_per_s * 1e9) + inter / (self.inter_gigabytes_per_s * 1e9)


class Spread(NamedTuple):
    """The least and the most of any rank."""

    least: float
    most: float

    @classmethod
    def of(cls, values: np.ndarray) -> Spread:
        return cls(np.min(values).item(), np.max(values).item())


@dataclass(frozen=True)
class SchedulePlan:
    """One schedule for one layer.

    Args:
        received_forward, received_backward: bytes from other ranks.
        flops: of attention, forward and backward.
        imbalance: largest visible pairs of a rank over their mean.
        key_value_bytes: most keys and values that a rank holds while it attends; in `gather` and `a2a` they
            stay for the backward.
        activation_bytes: most that stays for the backward besides: queries, outputs and log-sum-exps.
        forward_seconds, backward_seconds: predicted, of the slowest rank.
    """

    schedule: str
    received_forward: Spread
    received_backward: Spread
    flops: Spread
    imbalance: float
    key_value_bytes: int
    activation_bytes: int
    forward_seconds: float
    backward_seconds: float

    @property
    def seconds(self) -> float:
        """Predicted time of forward and backward."""
        return self.forward_seconds + self.backward_seconds


class Choice(NamedTuple):
    """The schedule a layer takes, and why, in one sentence."""

    schedule: str
    why: str


@dataclass(frozen=True)
class LayerPlan:
    """All schedules for one layer.

    Args:
        pattern: pattern of one tensor-parallel rank.
        schedules: by name, None where the schedule cannot be had.
        choice: what is taken.
    """

    pattern: S2Pattern
    call: AttentionCall
    schedules: dict[str, SchedulePlan | None]
    choice: Choice

    @property
    def chosen(self) -> SchedulePlan:
        return self.schedules[self.choice.schedule]

    def __str__(self) -> str:
        most = self.chosen.received_forward.most
        return f"{self.choice.schedule} ({mib_text(most)} received in the forward): {self.choice.why}"


def plan_layer(
    pattern: S2Pattern,
    call: AttentionCall,
    cluster: Cluster | None = None,
    tensor_parallel: int = 1,
    schedule: str = "auto",
) -> LayerPlan:
    """Every schedule for one attention call, and the one that is taken.

    Args:
        pattern: pattern of the KV heads of one tensor-parallel rank.
        call: its shapes.
        cluster: rates, `Cluster()` by default.
        tensor_parallel: ranks between two context-parallel neighbours.
        schedule: `gather` or `a2a` to have that, `auto` for the faster of the two.

    Raises:
        ValueError: the shapes do not fit, or `a2a` was asked for and there are fewer query heads than ranks.
    """
    cluster = cluster or Cluster()
    schedules = {name: _plan_schedule(name, pattern, call, cluster, tensor_parallel) for name in SCHEDULES}
    return LayerPlan(pattern, call, schedules, _choose(schedule, schedules, call, tensor_parallel))


@lru_cache(maxsize=1024)
def choose(
    schedule: str,
    pattern: S2Pattern,
    call: AttentionCall,
    cluster: Cluster | None = None,
    tensor_parallel: int = 1,
) -> Choice:
    """The schedule for `--s2-cp-schedule schedule`. Arguments and errors as in `plan_layer`."""
    return plan_layer(pattern, call, cluster, tensor_parallel, schedule).choice


def _choose(
    asked: str, plans: dict[str, SchedulePlan | None], call: AttentionCall, tensor_parallel: int
) -> Choice:
    if asked not in ("auto", *OURS):
        raise ValueError(f"--s2-cp-schedule {asked}: must be one of auto, {', '.join(OURS)}")
    gather, a2a = (plans[name] for name in OURS)
    if a2a is None:
        if asked == "a2a":
            raise ValueError(
                f"--s2-cp-schedule a2a: must be auto or gather where --context-parallel-size {call.ranks} is "
                f"larger than the {call.query_heads} query heads of a tensor-parallel rank "
                f"(--num-attention-heads {call.query_heads * tensor_parallel} over "
                f"--tensor-model-parallel-size {tensor_parallel})"
            )
        few = (
            f"a2a cannot give {call.query_heads} query heads of a tensor-parallel rank to {call.ranks} ranks"
        )
        return Choice("gather", few if asked == "auto" else f"as asked; {few}")
    name = asked if asked in OURS else min(OURS, key=lambda name: plans[name].seconds)
    mine, other = plans[name], gather if name == "a2a" else a2a
    prediction = (
        f"{time_text(mine.seconds)} predicted for forward and backward against {time_text(other.seconds)} "
        f"of {other.schedule}, which receives {mib_text(other.received_forward.most)}"
    )
    return Choice(name, prediction if asked == "auto" else f"as asked; {prediction}")


def time_text(seconds: float) -> str:
    """Three digits of s, ms or us, for people."""
    unit, scale = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    value = seconds * scale
    return (f"{value:.0f}" if value >= 100 else f"{value:#.3g}") + f" {unit}"


def mib_text(count: float) -> str:
    """Bytes in MiB, for people."""
    return f"{count / 2**20:.1f} MiB"


@lru_cache(maxsize=1024)
def _plan_schedule(
    schedule: str, pattern: S2Pattern, call: AttentionCall, cluster: Cluster, tensor_parallel: int
) -> SchedulePlan | None:
    if schedule == "a2a" and call.query_heads < call.ranks:
        return None
    done = work(schedule, pattern, call)
    moved = transfers(schedule, pattern, call, cluster.node_ranks(tensor_parallel))
    received, returned = (
        (call.ranks - 1) * moved.gathered + way.sum(axis=0) for way in (moved.received, moved.sent)
    )
    if schedule not in OURS:
        returned = 2 * received
    flops, window_flops = (
        np.array(attention_flops(pairs.astype(float), call.head_dim, call.v_head_dim))
        for pairs in (done.pairs, done.window)
    )  # [forward and backward, ranks]
    queries = query_tokens(schedule, pattern, call)
    per_query = (call.head_dim + call.v_head_dim) * call.element_size + _LSE_BYTES
    keys = key_value_tokens(schedule, pattern, call)
    forward, backward = (
        float(
            _seconds(
                schedule, call, cluster, tensor_parallel, moved, flops[way], window_flops[way], way
            ).max()
        )
        for way in (0, 1)
    )
    return SchedulePlan(
        schedule=schedule,
        received_forward=Spread.of(received),
        received_backward=Spread.of(returned),
        flops=Spread.of(flops.sum(axis=0)),
        imbalance=done.imbalance,
        key_value_bytes=int(keys.max()) * call.key_value_bytes,
        activation_bytes=int(queries.max()) * call.batch * per_query,
        forward_seconds=forward,
        backward_seconds=backward,
    )


def _seconds(
    schedule: str,
    call: AttentionCall,
    cluster: Cluster,
    tensor_parallel: int,
    moved: Transfers,
    flops: np.ndarray,
    window_flops: np.ndarray,
    backward: int,
) -> np.ndarray:
    """`[ranks]`, predicted seconds of the forward or the backward: see the top of the file."""
    P, size = call.ranks, cluster.node_ranks(tensor_parallel)
    first = np.arange(P) // size * size
    near = np.minimum(first + size, P) - first  # ranks on a rank's node, itself included
    attention = cluster.compute_seconds(flops)
    between = cluster.link_seconds(*np.maximum(moved.received, moved.sent))
    shared = cluster.link_seconds((near - 1) * P * moved.gathered / near, (P - near) * moved.gathered / near)
    if schedule == "a2a":
        return between + attention
    if schedule == "gather":
        alone = cluster.link_seconds((near - 1) * moved.gathered, (P - near) * moved.gathered)
        window = cluster.compute_seconds(window_flops)
        return between + np.maximum(alone if backward else shared, window) + attention - window
    again = 2 if backward else 1
    if schedule == "all_gather":
        return again * shared + attention
    around = again * (P - 1) * moved.gathered
    ring = cluster.link_seconds(0, around) if size < P else cluster.link_seconds(around, 0)
    return np.maximum(ring, attention)


@dataclass(frozen=True)
class LayerGroup:
    """Layers (numbered from 1) that have the same plan: that of their slowest tensor-parallel rank."""

    layers: tuple[int, ...]
    dense: bool
    plan: LayerPlan


@dataclass(frozen=True)
class ModelPlan:
    """The plan of every layer, equal ones together, in the order of their first layers."""

    settings: S2Settings
    groups: tuple[LayerGroup, ...]
    cluster: Cluster
    tensor_parallel: int

    @property
    def call(self) -> AttentionCall:
        """The shapes, which all layers share."""
        return self.groups[0].plan.call

    def seconds(self, schedule: str | None = None) -> float | None:
        """Predicted attention time of all layers, forward and backward: as chosen, or of one schedule for
        all; None where a layer cannot have that one."""
        plans = [(g, g.plan.schedules[schedule] if schedule else g.plan.chosen) for g in self.groups]
        if any(plan is None for _, plan in plans):
            return None
        return sum(len(group.layers) * plan.seconds for group, plan in plans)


def plan_model(
    settings: S2Settings,
    *,
    seq_length: int,
    num_attention_heads: int,
    head_dim: int,
    context_parallel: int,
    tensor_parallel: int = 1,
    micro_batch: int = 1,
    element_size: int = 2,
    schedule: str = "auto",
    cluster: Cluster | None = None,
) -> ModelPlan:
    """The plan of each layer of a model, for sequences of one document each.

    Raises:
        ValueError: the message starts with the flag that does not fit.
    """
    cluster = cluster or Cluster()
    for flag, value in (
        ("--num-layers", settings.num_layers),
        ("--seq-length", seq_length),
        ("--num-attention-heads", num_attention_heads),
        ("--kv-channels", head_dim),
        ("--context-parallel-size", context_parallel),
        ("--tensor-model-parallel-size", tensor_parallel),
        ("--micro-batch-size", micro_batch),
        ("--bytes-per-element", element_size),
    ):
        if value < 1:
            raise ValueError(f"{flag} {value}: must be >= 1")
    for flag, value, unit, why in (
        ("--num-attention-heads", num_attention_heads, settings.num_kv_heads, "--num-query-groups"),
        ("--num-attention-heads", num_attention_heads, tensor_parallel, "--tensor-model-parallel-size"),
        ("--seq-length", seq_length, 2 * context_parallel, "2 x --context-parallel-size"),
    ):
        if value % unit:
            raise ValueError(f"{flag} {value}: must be a multiple of {unit} ({why})")
    kv_heads = settings.num_kv_heads
    if kv_heads % tensor_parallel and tensor_parallel % kv_heads:
        raise ValueError(
            f"--num-query-groups {kv_heads}: must be a multiple or a divisor of {tensor_parallel} "
            "(--tensor-model-parallel-size)"
        )
    call = AttentionCall(
        ranks=context_parallel,
        tokens=seq_length,
        batch=micro_batch,
        query_heads=num_attention_heads // tensor_parallel,
        head_dim=head_dim,
        v_head_dim=head_dim,
        element_size=element_size,
    )
    alike: dict[tuple, tuple[LayerPlan, list[int]]] = {}
    for layer in range(1, settings.num_layers + 1):
        pattern = settings.pattern(layer)
        slices = (pattern.tp_slice(rank, tensor_parallel) for rank in range(tensor_parallel))
        plans = [
            plan_layer(part, call, cluster, tensor_parallel, schedule)
            for part in dict.fromkeys(part.for_layer(0) for part in slices)
        ]
        slowest = max(plans, key=lambda plan: plan.chosen.seconds)
        key = settings.is_dense(layer), *slowest.schedules.values()
        alike.setdefault(key, (slowest, []))[1].append(layer)
    groups = (LayerGroup(tuple(layers), key[0], plan) for key, (plan, layers) in alike.items())
    return ModelPlan(settings, tuple(groups), cluster, tensor_parallel)
