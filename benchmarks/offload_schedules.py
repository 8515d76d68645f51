"""Other schedules of optimizer offload simulated beside ours, and the table and JSON of
`scripts/plan_offload.py`.

Needs neither torch nor a GPU. Each peer is reduced to its idea and has the same links and GPU memory as ours.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from megatron_s2.offload.model import Load, Prediction, Rates, predict
from megatron_s2.offload.plan import (
    BUFFER_SETS,
    RING_SLOTS,
    STATE_BYTES,
    SUBGROUP_SIZE,
    make_plan,
)
from megatron_s2.offload.simulator import Simulation, auto_plan, simulate
from megatron_s2.report.table import aligned

OURS = "interleaved"
STRIDES = (2, 3, 4)
SCHEDULES = (OURS, "zero_offload", "twinflow", *(f"dos_k{k}" for k in STRIDES), "streaming")
_FLUSHED_AFTER_BACKWARD = ("zero_offload", "twinflow")
_HEADINGS = (
    ("schedule", ""),
    ("updated", "on GPU"),
    ("flush,", "exposed s"),
    ("update", "s"),
    ("step", "s"),
    ("step,", "x ours"),
    ("busiest in", "the update"),
)


def compare(
    elements: int,
    rates: Rates,
    *,
    fraction: float | None = None,
    backward_seconds: float | None = None,
    subgroup_size: int = SUBGROUP_SIZE,
    gpu_budget: int = 0,
    host_budget: int | None = None,
    buffer_sets: int = BUFFER_SETS,
    ring_slots: int = RING_SLOTS,
) -> dict[str, Simulation]:
    """Simulates the same step under each of `SCHEDULES`.

    interleaved: ours, with the given fraction or the one that the model finds best.
    zero_offload: the CPU updates everything; gradients are flushed after backward; weights return while the
        next subgroup is updated. Nothing is resident on the GPU; without NVMe it may use as much host memory
        as that takes.
    twinflow: a static share resident on the GPU, as large as our budget and buffer sets together; the rest as
        zero_offload.
    dos_k2, ...: Deep Optimizer States with stride k: the GPU updates every k-th streamed subgroup. Otherwise
        as ours, gradient flush, residents and buffers included, so only the fraction differs.
    streaming: every subgroup goes through the GPU.

    Args:
        elements: number of parameters of the rank.
        fraction: fraction of ours; None for the best.
        backward_seconds: as in `simulate`. The others: as in `make_plan`.

    Raises:
        ValueError: as `make_plan` and `simulate`.
    """
    settings = {
        "subgroup_size": subgroup_size,
        "host_budget": host_budget,
        "nvme": rates.nvme_read is not None and rates.nvme_write is not None,
        "buffer_sets": buffer_sets,
        "ring_slots": ring_slots,
    }
    base = make_plan(elements, gpu_budget=gpu_budget, **settings)
    streamed = len(base.streamed)
    same_memory = gpu_budget + STATE_BYTES * base.buffer_sets * base.slot_elements
    plans = {
        OURS: auto_plan(base, rates) if fraction is None else base.with_fraction(fraction),
        "zero_offload": make_plan(elements, **settings | ({} if settings["nvme"] else {"host_budget": None})),
        "twinflow": make_plan(elements, gpu_budget=same_memory, **settings),
        **{f"dos_k{k}": base.with_devices(every(streamed, k)) for k in STRIDES},
        "streaming": base.with_fraction(1),
    }
    return {
        name: simulate(
            plans[name], rates, backward_seconds, flush_in_backward=name not in _FLUSHED_AFTER_BACKWARD
        )
        for name in SCHEDULES
    }


def every(length: int, stride: int) -> list[bool]:
    """Returns `length` booleans of which the last of every `stride` is True.

    Raises:
        ValueError: the stride is not positive.
    """
    if stride < 1:
        raise ValueError(f"stride {stride}: must be >= 1")
    return [i % stride == stride - 1 for i in range(length)]


def table(simulations: Mapping[str, Simulation], rates: Rates, backward_seconds: float | None = None) -> str:
    """Returns every schedule beside ours as text, with the model's prediction for ours and its gain."""
    ours = simulations[OURS]
    rows = [*zip(*_HEADINGS), *(_row(name, one, ours) for name, one in simulations.items())]
    return "\n".join(
        [
            str(ours.plan),
            _rates_text(rates, backward_seconds),
            "",
            *aligned(rows, left=(0, len(_HEADINGS) - 1)),
            "",
            f"{OURS}, by the model: {_prediction(ours, rates, backward_seconds).bottleneck}",
            _gain(ours, simulations["zero_offload"]),
        ]
    )


def as_json(
    simulations: Mapping[str, Simulation], rates: Rates, backward_seconds: float | None = None
) -> dict:
    """Returns JSON values: an entry for each schedule, the rates, and the model's prediction for ours."""
    ours = simulations[OURS]
    prediction = _prediction(ours, rates, backward_seconds)
    return {
        "params": ours.plan.elements,
        "rates": asdict(rates),
        "backward_seconds": backward_seconds,
        **{name: _simulation_json(one, ours) for name, one in simulations.items()},
        "predicted": {
            "fraction": prediction.fraction,
            "limits": dict(prediction.limits),
            "flush_seconds": prediction.flush_seconds,
            "exposed_seconds": prediction.exposed_seconds,
            "update_seconds": prediction.update_seconds,
            "step_seconds": prediction.step_seconds,
            "bottleneck": prediction.bottleneck,
        },
    }


def _simulation_json(one: Simulation, ours: Simulation) -> dict:
    return {
        "step_seconds": one.step_seconds,
        "update_seconds": one.update_seconds,
        "flush_seconds": one.flush_seconds,
        "exposed_seconds": one.exposed_seconds,
        "gpu_fraction": _on_gpu(one),
        "ratio_to_interleaved": one.step_seconds / ours.step_seconds,
        "busy": one.busy,
        "bottleneck": one.bottleneck,
        "gpu_bytes": one.plan.gpu_bytes,
        "host_bytes": one.plan.host_bytes,
        "nvme_bytes": one.plan.nvme_bytes,
    }


def _prediction(ours: Simulation, rates: Rates, backward_seconds: float | None) -> Prediction:
    return predict(rates, Load.of(ours.plan), ours.plan.fraction, backward_seconds)


def _on_gpu(one: Simulation) -> float:
    """Share of all parameters that the GPU updates, including those resident on it."""
    return sum(s.size for s in one.plan.subgroups if s.device == "gpu") / one.plan.elements


def _row(name: str, one: Simulation, ours: Simulation) -> list[str]:
    return [
        name,
        f"{_on_gpu(one):.1%}",
        f"{one.exposed_seconds:.3f}",
        f"{one.update_seconds:.3f}",
        f"{one.step_seconds:.3f}",
        f"{one.step_seconds / ours.step_seconds:.2f}",
        one.bottleneck,
    ]


def _rates_text(rates: Rates, backward_seconds: float | None) -> str:
    parts = [
        f"updates CPU {rates.cpu / 1e9:g}, GPU {rates.gpu / 1e9:g} Gparams/s",
        f"host to GPU {rates.h2d / 1e9:g}, back {rates.d2h / 1e9:g} GB/s",
    ]
    if rates.dram is not None:
        parts.append(f"host DRAM {rates.dram / 1e9:g} GB/s")
    if rates.nvme_read is not None and rates.nvme_write is not None:
        parts.append(f"NVMe read {rates.nvme_read / 1e9:g}, write {rates.nvme_write / 1e9:g} GB/s")
    if backward_seconds is None:
        parts.append("backward long enough to hide a flush of gradients")
    else:
        parts.append(f"backward {backward_seconds:g} s")
    return "; ".join(parts)


def _gain(ours: Simulation, zero_offload: Simulation) -> str:
    """The gain of ours over ZeRO-Offload: from interleaving, and from hiding the flush of gradients."""
    ratio = zero_offload.update_seconds / ours.update_seconds
    return (
        f"against zero_offload, by interleaving: update {zero_offload.update_seconds:.3f} -> "
        f"{ours.update_seconds:.3f} s, {ratio:.2f}x\n"
        "against zero_offload, by flushing gradients during backward: "
        f"{zero_offload.exposed_seconds:.3f} -> {ours.exposed_seconds:.3f} s after it"
    )
