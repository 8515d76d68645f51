"""Simulated optimizer steps as text and as JSON: the output of `scripts/plan_offload.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from megatron_s2.offload.model import Load, Prediction, Rates, predict
from megatron_s2.offload.simulator import OURS, Simulation
from megatron_s2.report.table import aligned

_HEADINGS = (
    ("schedule", ""),
    ("updated", "on GPU"),
    ("flush,", "exposed s"),
    ("update", "s"),
    ("step", "s"),
    ("step,", "x ours"),
    ("busiest in", "the update"),
)


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
