"""The performance model of an optimizer step: from rates to the best fraction, times and the bottleneck.

Of P parameters the GPU updates a fraction g. The CPU's share sends 2 bytes of weights per parameter to the
GPU; the GPU's share moves its 12 bytes of state up and down. All of that overlaps, so the update lasts as
long as the slowest of

    CPU            P (1-g) / Uc
    host to GPU    P (2 (1-g) + 12 g) / Bh
    GPU to host    P 12 g / Bd
    GPU            P g / Ug
    buffer sets    P g (12/Bh + 1/Ug + 12/Bd) / sets      a set is in use from upload to download
    host DRAM      P (32 (1-g) + 24 g) / D                every byte moved or updated passes through it

Parameters resident on the GPU add to its line only. Those on NVMe are read and written once per step, with
lines of their own, and pass through DRAM twice more. Each line is linear in g, so the best g lies where two
lines cross, or at 0 or 1, and is found exactly. Gradients of the CPU's share go to the host during backward:
that time is a separate term.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations

from megatron_s2.offload.plan import (
    BUFFER_SETS,
    GRADIENT_BYTES,
    STATE_BYTES,
    WEIGHT_BYTES,
    OffloadPlan,
    check_fraction,
)
from megatron_s2.offload.trace import QUEUE_NAMES

LIMIT_NAMES = {**QUEUE_NAMES, "buffers": "GPU buffer sets", "dram": "host DRAM"}
# DRAM traffic of one parameter's update on the CPU, which reads state and gradient and writes state and the
# 16-bit weight; bytes.
CPU_UPDATE_TRAFFIC = 2 * STATE_BYTES + GRADIENT_BYTES + WEIGHT_BYTES
_TIE = 1e-9  # relative difference below which two fractions are equally good


@dataclass(frozen=True)
class Rates:
    """Rates that the queues of one rank reach while all of them work.

    Raises:
        ValueError: a rate is not a positive number; the message starts with its name.
    """

    cpu: float  # updates, parameters/s
    gpu: float
    h2d: float  # transfers from host to GPU, bytes/s
    d2h: float
    dram: float | None = None  # reads and writes of host memory, bytes/s; None: the others contain its limit
    nvme_read: float | None = None  # all directories together, bytes/s; None without an NVMe tier
    nvme_write: float | None = None

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name} {value}: must be a positive number")


@dataclass(frozen=True)
class Load:
    """What a step has to update, whatever the fraction."""

    host: int  # parameters in each tier
    gpu: int = 0
    nvme: int = 0
    buffer_sets: int = BUFFER_SETS  # as in `OffloadPlan`
    reused: int = 0  # parameters of tier nvme that are still in memory from the previous step

    @classmethod
    def of(cls, plan: OffloadPlan) -> Load:
        """The load of a plan."""
        tiers = plan.tiers
        reused = min(plan.ring_slots * plan.slot_elements, tiers.nvme)
        return cls(tiers.host, tiers.gpu, tiers.nvme, plan.buffer_sets, reused)


@dataclass(frozen=True)
class Prediction:
    """The predicted times of a step, in seconds."""

    fraction: float  # share of the streamed parameters that the GPU updates
    limits: Mapping[str, float]  # what each of `LIMIT_NAMES` needs; the update lasts as long as the longest
    flush_seconds: float  # to copy the gradients of the CPU's share to the host
    exposed_seconds: float  # the part of that which backward does not hide

    @property
    def update_seconds(self) -> float:
        """Duration of the interleaved update."""
        return max(self.limits.values())

    @property
    def step_seconds(self) -> float:
        """From the end of backward to the end of the update."""
        return self.exposed_seconds + self.update_seconds

    @property
    def bottleneck(self) -> str:
        """What limits the update and what comes next, in one line."""
        first, second = sorted(self.limits, key=self.limits.get, reverse=True)[:2]
        return (
            f"{LIMIT_NAMES[first]} limits the update to {self.limits[first]:.4g} s, "
            f"then {LIMIT_NAMES[second]} with {self.limits[second]:.4g} s"
        )


def predict(rates: Rates, load: Load, fraction: float, backward_seconds: float | None = None) -> Prediction:
    """Predicts a step in which the GPU updates `fraction` of the streamed parameters of each tier.

    Filling and draining the pipeline is not included: its share vanishes with many subgroups.

    Args:
        backward_seconds: duration of the last micro-batch's backward, which hides the flush of gradients;
            None for one that hides all of it.

    Raises:
        ValueError: the fraction is not between 0 and 1, the time is negative, or there are parameters on NVMe
            and no rates for it.
    """
    check_fraction(fraction)
    flush = flush_seconds(rates, load, fraction)
    return Prediction(fraction, limits(rates, load, fraction), flush, exposed(flush, backward_seconds))


def limits(rates: Rates, load: Load, fraction: float) -> dict[str, float]:
    """Returns the seconds that each of `LIMIT_NAMES` needs for the update; without a rate, no entry.

    Raises:
        ValueError: there are parameters on NVMe and no rates for it.
    """
    on_gpu = fraction * (load.host + load.nvme)
    on_cpu = (1 - fraction) * (load.host + load.nvme)
    late_gradients = GRADIENT_BYTES * (1 - fraction) * load.nvme
    up_down = STATE_BYTES / rates.h2d + 1 / rates.gpu + STATE_BYTES / rates.d2h
    seconds = {
        "h2d": (WEIGHT_BYTES * on_cpu + STATE_BYTES * on_gpu) / rates.h2d,
        "d2h": (STATE_BYTES * on_gpu + late_gradients) / rates.d2h,
        "cpu": on_cpu / rates.cpu,
        "gpu": (load.gpu + on_gpu) / rates.gpu,
        "buffers": on_gpu * up_down / load.buffer_sets,
    }
    if load.nvme:
        if rates.nvme_read is None or rates.nvme_write is None:
            raise ValueError("nvme_read and nvme_write: must be given where state lies on NVMe")
        seconds["nvme_read"] = STATE_BYTES * (load.nvme - load.reused) / rates.nvme_read
        seconds["nvme_write"] = STATE_BYTES * load.nvme / rates.nvme_write
    if rates.dram is not None:
        traffic = (CPU_UPDATE_TRAFFIC + WEIGHT_BYTES) * on_cpu + 2 * STATE_BYTES * on_gpu
        traffic += STATE_BYTES * (2 * load.nvme - load.reused) + late_gradients
        seconds["dram"] = traffic / rates.dram
    return seconds


def flush_seconds(rates: Rates, load: Load, fraction: float) -> float:
    """Seconds to copy the gradients of the CPU's share of tier `host` to the host. Those of tier `nvme` have
    no memory there before the update and are copied during it."""
    size = GRADIENT_BYTES * (1 - fraction) * load.host
    return size / min(rates.d2h, rates.dram or math.inf)


def exposed(flush: float, backward_seconds: float | None) -> float:
    """Seconds of a flush that a backward does not hide; None stands for one that is long enough.

    Raises:
        ValueError: the backward is negative.
    """
    if backward_seconds is None:
        return 0.0
    if not backward_seconds >= 0:
        raise ValueError(f"backward_seconds {backward_seconds}: must be >= 0")
    return max(0.0, flush - backward_seconds)


def best_fraction(rates: Rates, load: Load) -> float:
    """Returns the fraction whose update is shortest; the middle one where a range is equally good.

    DRAM only decides between that fraction and leaving everything to one side. Its line holds where both
    sides work the whole time or one does nothing; elsewhere one slows the other and then works on alone.

    Raises:
        ValueError: there are parameters on NVMe and no rates for it.
    """
    at_zero, at_one = limits(rates, load, 0.0), limits(rates, load, 1.0)
    lines = [(at_zero[name], at_one[name] - at_zero[name]) for name in at_zero if name != "dram"]
    crossings = {0.0, 1.0}
    for (base, slope), (other, other_slope) in combinations(lines, 2):
        if slope != other_slope and 0 < (crossing := (other - base) / (slope - other_slope)) < 1:
            crossings.add(crossing)
    seconds = {g: max(base + slope * g for base, slope in lines) for g in crossings}
    least = min(seconds.values())
    best = [g for g in crossings if seconds[g] <= least * (1 + _TIE)]
    balanced = (min(best) + max(best)) / 2
    return min((balanced, 0.0, 1.0), key=lambda g: max(limits(rates, load, g).values()))
