"""A context-parallel plan as text and as JSON: the output of `scripts/plan.py`."""

from __future__ import annotations

from dataclasses import asdict

from megatron_s2.parallel.cost import SCHEDULES
from megatron_s2.parallel.planner import LayerGroup, ModelPlan, time_text
from megatron_s2.parallel.time_model import SchedulePlan, Spread
from megatron_s2.report.startup_table import ranges
from megatron_s2.report.table import aligned

_HEADINGS = (
    ("schedule", ""),
    ("received", "forward, MiB"),
    ("by a rank", "backward, MiB"),
    ("TFLOP", "of a rank"),
    ("work", "max/mean"),
    ("keys, values", "held, MiB"),
    ("queries, out", "kept, MiB"),
    ("backward", "peak, MiB"),
    ("predicted", "forward"),
    ("time", "backward"),
)


def table(plan: ModelPlan) -> str:
    """Returns the plan as text: every schedule of each group of layers, the one chosen, and the reason."""
    call, cluster = plan.call, plan.cluster
    kv_heads = plan.groups[0].plan.pattern.num_kv_heads // call.kv_group
    lines = [
        f"{call.ranks} context-parallel ranks, {call.tokens} tokens, micro-batch {call.batch}; "
        f"{call.query_heads} query and {kv_heads} KV heads of {call.head_dim} per rank, "
        f"{call.element_size} bytes per element",
        f"predicted for nodes of {cluster.gpus_per_node} GPUs ({cluster.node_ranks(plan.tensor_parallel)} "
        f"context-parallel ranks of a group), {cluster.intra_gigabytes_per_s:g} GB/s within a node, "
        f"{cluster.inter_gigabytes_per_s:g} GB/s between nodes, {cluster.chip_tflops:g} TFLOP/s at "
        f"{cluster.efficiency:.0%}",
    ]
    if plan.tensor_parallel > 1:
        lines.append(f"of {plan.tensor_parallel} tensor-parallel ranks the slowest")
    for group in plan.groups:
        lines += ["", *_group_lines(plan, group)]
    return "\n".join([*lines, "", _totals(plan)])


def _group_lines(plan: ModelPlan, group: LayerGroup) -> list[str]:
    pattern = "dense" if group.dense else plan.settings.pattern(group.layers[0]).describe()
    chosen = group.plan.choice
    rows = [
        *zip(*_HEADINGS),
        *(_row(name, group.plan.schedules[name], name == chosen.schedule) for name in SCHEDULES),
    ]
    return [
        f"layers {ranges(group.layers)}: {pattern}",
        *aligned(rows, indent="  "),
        f"  {chosen.schedule}: {chosen.why}",
    ]


def _row(name: str, plan: SchedulePlan | None, chosen: bool) -> list[str]:
    title = f"{name} *" if chosen else name
    if plan is None:
        return [title, *["-"] * (len(_HEADINGS) - 1)]
    return [
        title,
        _spread(plan.received_forward, 2**20, 1),
        _spread(plan.received_backward, 2**20, 1),
        _spread(plan.flops, 1e12, 2),
        f"{plan.imbalance:.3f}",
        f"{plan.key_value_bytes / 2**20:.1f}",
        f"{plan.activation_bytes / 2**20:.1f}",
        "-" if plan.backward_bytes is None else f"{plan.backward_bytes / 2**20:.1f}",
        time_text(plan.forward_seconds),
        time_text(plan.backward_seconds),
    ]


def _spread(spread: Spread, unit: float, digits: int) -> str:
    least, most = (f"{value / unit:.{digits}f}" for value in spread)
    return most if least == most else f"{least}-{most}"


def _totals(plan: ModelPlan) -> str:
    one_for_all = {name: plan.seconds(name) for name in SCHEDULES}
    others = ", ".join(
        f"{name} {'not possible' if seconds is None else time_text(seconds)}"
        for name, seconds in one_for_all.items()
    )
    return (
        f"attention of all {plan.settings.num_layers} layers, forward and backward: "
        f"{time_text(plan.seconds())} predicted as chosen (*); with one schedule for all: {others}"
    )


def as_json(plan: ModelPlan) -> dict:
    """Returns the plan as JSON values, with one entry of `layers` for each layer, in order.

    Bytes and FLOPs are those of the rank that has most, unless they are given as `least` and `most`. A
    schedule that is not possible is null.
    """
    layers = [
        {
            "layer": layer,
            "dense": group.dense,
            "schedule": group.plan.choice.schedule,
            "why": group.plan.choice.why,
            "imbalance": group.plan.chosen.imbalance,
            "bytes_received_forward": {
                name: None if one is None else one.received_forward.most
                for name, one in group.plan.schedules.items()
            },
            "schedules": {name: _schedule_json(one) for name, one in group.plan.schedules.items()},
        }
        for group in plan.groups
        for layer in group.layers
    ]
    return {
        "call": asdict(plan.call),
        "tensor_parallel": plan.tensor_parallel,
        "cluster": asdict(plan.cluster),
        "layers": sorted(layers, key=lambda entry: entry["layer"]),
        "predicted_seconds": {
            "chosen": plan.seconds(),
            **{name: plan.seconds(name) for name in SCHEDULES},
        },
    }


def _schedule_json(plan: SchedulePlan | None) -> dict | None:
    if plan is None:
        return None
    fields = {name: getattr(plan, name) for name in plan.__dataclass_fields__ if name != "schedule"}
    return {name: value._asdict() if isinstance(value, Spread) else value for name, value in fields.items()}
