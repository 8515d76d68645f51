"""A simulated step for people and for programs: the table and the JSON of `scripts/plan_offload.py`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict

from megatron_s2.offload.model import Load, Prediction, Rates, predict
from megatron_s2.offload.simulator import OURS, Simulation

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
    """Every schedule beside ours, what the model predicts for ours, and where its gain comes from."""
    ours = simulations[OURS]
    rows = [list(column) for column in zip(*_HEADINGS)]
    rows += [_row(name, one, ours) for name, one in simulations.items()]
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        [
            str(ours.plan),
            _rates_text(rates, backward_seconds),
            "",
            *(_aligned(row, widths) for row in rows),
            "",
            f"{OURS}, by the model: {_prediction(ours, rates, backward_seconds).bottleneck}",
            _gain(ours, simulations["zero_offload"]),
        ]
    )


def as_json(
    simulations: Mapping[str, Simulation], rates: Rates, backward_seconds: float | None = None
) -> dict:
    """The same as JSON values: an entry for each schedule, the rates, and the model's prediction for ours."""
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
    """Share of all parameters, residents included."""
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


def _aligned(row: list[str], widths: list[int]) -> str:
    *cells, last = (
        text.rjust(width) if 0 < n < len(row) - 1 else text.ljust(width)
        for n, (text, width) in enumerate(zip(row, widths))
    )
    return "  ".join([*cells, last]).rstrip()


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
    """Interleaving and hiding the flush are two things, and reported apart."""
    ratio = zero_offload.update_seconds / ours.update_seconds
    return (
        f"against zero_offload, by interleaving: update {zero_offload.update_seconds:.3f} -> "
        f"{ours.update_seconds:.3f} s, {ratio:.2f}x\n"
        "against zero_offload, by flushing gradients during backward: "
        f"{zero_offload.exposed_seconds:.3f} -> {ours.exposed_seconds:.3f} s after it"
    )
