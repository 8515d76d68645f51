"""The planner of context parallelism: chooses the schedule of each layer by predicted time, with a reason."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from megatron_s2.parallel.cost import SCHEDULES, AttentionCall
from megatron_s2.parallel.time_model import S2_SCHEDULES, Cluster, SchedulePlan, plan_schedule
from megatron_s2.pattern import S2Pattern, S2Settings


class Choice(NamedTuple):
    """The schedule of a layer, and the reason in one sentence."""

    schedule: str
    why: str


@dataclass(frozen=True)
class LayerPlan:
    """All schedules for one layer.

    Args:
        pattern: pattern of the KV heads of one tensor-parallel rank.
        call: shapes of the attention call.
        schedules: plan of each schedule by name, None for a schedule that is not possible.
        choice: the schedule that is chosen.
    """

    pattern: S2Pattern
    call: AttentionCall
    schedules: dict[str, SchedulePlan | None]
    choice: Choice

    @property
    def chosen(self) -> SchedulePlan:
        return self.schedules[self.choice.schedule]

    def __str__(self) -> str:
        received = mib_text(self.chosen.received_forward.most)
        return f"{self.choice.schedule} ({received} received in the forward): {self.choice.why}"


def plan_layer(
    pattern: S2Pattern,
    call: AttentionCall,
    cluster: Cluster | None = None,
    tensor_parallel: int = 1,
    schedule: str = "auto",
) -> LayerPlan:
    """Returns the plan of every schedule for one attention call, and chooses one.

    Args:
        pattern: pattern of the KV heads of one tensor-parallel rank.
        call: shapes of the call.
        cluster: rates, `Cluster()` by default.
        tensor_parallel: tensor-parallel size, the distance between two context-parallel neighbours.
        schedule: `gather` or `a2a` chooses that one, `auto` the faster of the two.

    Raises:
        ValueError: the shapes do not fit, or `schedule` is `a2a` and there are fewer query heads than ranks.
    """
    cluster = cluster or Cluster()
    plans = {name: plan_schedule(name, pattern, call, cluster, tensor_parallel) for name in SCHEDULES}
    return LayerPlan(pattern, call, plans, choose(schedule, pattern, call, cluster, tensor_parallel))


@lru_cache(maxsize=1024)
def choose(
    schedule: str,
    pattern: S2Pattern,
    call: AttentionCall,
    cluster: Cluster | None = None,
    tensor_parallel: int = 1,
) -> Choice:
    """Chooses the schedule for one attention call; arguments and errors as for `plan_layer`.

    The choice does not depend on the batch, because bytes and FLOPs of all schedules are proportional to it.
    """
    if schedule not in ("auto", *S2_SCHEDULES):
        raise ValueError(f"--s2-cp-schedule {schedule}: must be one of auto, {', '.join(S2_SCHEDULES)}")
    cluster = cluster or Cluster()
    plans = {name: plan_schedule(name, pattern, call, cluster, tensor_parallel) for name in S2_SCHEDULES}
    if plans["a2a"] is None:
        if schedule == "a2a":
            raise ValueError(
                f"--s2-cp-schedule a2a: must be auto or gather where --context-parallel-size {call.ranks} is "
                f"larger than the {call.query_heads} query heads of a tensor-parallel rank "
                f"(--num-attention-heads {call.query_heads * tensor_parallel} over "
                f"--tensor-model-parallel-size {tensor_parallel})"
            )
        few = (
            f"a2a cannot give {call.query_heads} query heads of a tensor-parallel rank to {call.ranks} ranks"
        )
        return Choice("gather", few if schedule == "auto" else f"as asked; {few}")
    name = min(S2_SCHEDULES, key=lambda name: plans[name].seconds) if schedule == "auto" else schedule
    chosen, other = plans[name], plans["gather" if name == "a2a" else "a2a"]
    prediction = (
        f"{time_text(chosen.seconds)} predicted for forward and backward against {time_text(other.seconds)} "
        f"of {other.schedule}, which receives {mib_text(other.received_forward.most)}"
    )
    return Choice(name, prediction if schedule == "auto" else f"as asked; {prediction}")


def time_text(seconds: float) -> str:
    """A time as text, with three digits and the unit s, ms or us."""
    unit, scale = ("s", 1) if seconds >= 1 else ("ms", 1e3) if seconds >= 1e-3 else ("us", 1e6)
    value = seconds * scale
    return (f"{value:.0f}" if value >= 100 else f"{value:#.3g}") + f" {unit}"


def mib_text(count: float) -> str:
    """A number of bytes as text, in MiB."""
    return f"{count / 2**20:.1f} MiB"


@dataclass(frozen=True)
class LayerGroup:
    """Layers (numbered from 1) with the same plan, which is the one of their slowest tensor-parallel rank."""

    layers: tuple[int, ...]
    dense: bool
    plan: LayerPlan


@dataclass(frozen=True)
class ModelPlan:
    """The plans of all layers, with layers of equal plan in one group, ordered by their first layers."""

    settings: S2Settings
    groups: tuple[LayerGroup, ...]
    cluster: Cluster
    tensor_parallel: int

    @property
    def call(self) -> AttentionCall:
        """The shapes of the attention calls, which are the same in all layers but for `kv_group`."""
        return self.groups[0].plan.call

    def seconds(self, schedule: str | None = None) -> float | None:
        """Predicted attention time of all layers, forward and backward.

        Args:
            schedule: one schedule for all layers; by default the one chosen for each layer.

        Returns:
            Seconds, or None if the schedule is not possible in some layer.
        """
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
    """Plans all layers of a model, for sequences of one document each.

    Args:
        settings: S2 settings of the model.
        seq_length: tokens per sequence.
        num_attention_heads: number of query heads over all tensor-parallel ranks.
        head_dim: elements per head.
        context_parallel, tensor_parallel: number of ranks.
        micro_batch: sequences per micro-batch.
        element_size: bytes per element.
        schedule, cluster: as in `plan_layer`.

    Raises:
        ValueError: a value does not fit; the message starts with its flag.
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
    settings.check_query_heads(num_attention_heads)
    call = AttentionCall(
        ranks=context_parallel,
        tokens=seq_length,
        batch=micro_batch,
        query_heads=num_attention_heads // tensor_parallel,
        head_dim=head_dim,
        v_head_dim=head_dim,
        element_size=element_size,
    )
    rank_kv_heads = max(1, kv_heads // tensor_parallel)
    equal: dict[tuple, tuple[LayerPlan, list[int]]] = {}
    for layer in range(1, settings.num_layers + 1):
        pattern = settings.pattern(layer)
        slices = (pattern.tp_slice(rank, tensor_parallel) for rank in range(tensor_parallel))
        parts = dict.fromkeys(part.shared_by(rank_kv_heads).for_layer(0) for part in slices)
        plans = [
            plan_layer(
                part,
                replace(call, kv_group=part.num_kv_heads // rank_kv_heads),
                cluster,
                tensor_parallel,
                schedule,
            )
            for part in parts
        ]
        slowest = max(plans, key=lambda plan: plan.chosen.seconds)
        key = settings.is_dense(layer), pattern.describe(), *slowest.schedules.values()
        equal.setdefault(key, (slowest, []))[1].append(layer)
    groups = (LayerGroup(tuple(layers), key[0], plan) for key, (plan, layers) in equal.items())
    return ModelPlan(settings, tuple(groups), cluster, tensor_parallel)
