"""The plan with the smallest sum of effects within a budget: exact, by dynamic programming over the cost.

A plan takes one window and one number of sinks for each layer and one stride for each KV head. Effects and
costs add up over heads, so that

    best(layers 1..n, c) = min over x of best(layers 1..n-1, c - x) + layer(n, x)

where layer(n, x) is the smallest effect of layer n at cost x: over windows and sinks, the same recursion over
its heads. Costs are rounded up to whole units, so that no budget is exceeded; the plan is optimal for the
rounded costs.
"""

from __future__ import annotations

from itertools import groupby

import numpy as np

from megatron_s2.calibration.candidates import Candidates, Choice, Plan

# Units of the whole budget to which costs are rounded.
RESOLUTION = 8192


def choose(candidates: Candidates, effects: np.ndarray, costs: np.ndarray, budget: float) -> Plan:
    """Returns the plan with the smallest sum of effects among those whose mean cost is at most `budget`.

    Args:
        candidates: what is chosen from.
        effects: `[layers, heads, candidates]`, what each candidate does to the loss, in nats.
        costs: `[layers, heads, candidates]`, shares of a dense head, positive.
        budget: mean cost per head, a share of dense attention.

    Raises:
        ValueError: no plan is within the budget.
    """
    heads = candidates.num_layers * candidates.num_kv_heads
    units = np.ceil(costs * (RESOLUTION / (budget * heads)) - 1e-9).astype(np.int64)
    if sum(_least(candidates, layer) for layer in units) > RESOLUTION:
        least = sum(_least(candidates, layer) for layer in costs) / heads
        raise ValueError(f"--budget {budget}: must be more than {least:.4f}, what the cheapest pattern costs")
    best, steps = np.zeros(1), []
    for layer in range(candidates.num_layers):
        table, choices = _layer_table(candidates, effects[layer], units[layer])
        reached = np.flatnonzero(np.isfinite(table))
        best, place = _add(best, table[reached], reached)
        steps.append((reached[place], choices))
    spent, plan = int(np.argmin(best)), []
    for cost_of_layer, choices in reversed(steps):
        cost = int(cost_of_layer[spent])
        plan.append(choices[cost])
        spent -= cost
    return tuple(reversed(plan))


def _configurations(candidates: Candidates) -> list[tuple[int, int, list[int]]]:
    """Returns window, sinks and the positions of the candidates of each: its own and the dense one."""
    sparse = sorted(
        (c.local_blocks, c.sink_blocks, i) for i, c in enumerate(candidates.all) if not c.is_dense
    )
    return [
        (window, sinks, [0, *(place for _, _, place in group)])
        for (window, sinks), group in groupby(sparse, key=lambda item: item[:2])
    ]


def _least(candidates: Candidates, costs: np.ndarray) -> float:
    """Returns the smallest cost of a layer whose heads' candidates cost `costs`, `[heads, candidates]`."""
    return min(costs[:, places].min(1).sum() for _, _, places in _configurations(candidates))


def _layer_table(
    candidates: Candidates, effects: np.ndarray, units: np.ndarray
) -> tuple[np.ndarray, dict[int, Choice]]:
    """Returns the smallest effect of a layer at each cost, and the choice that has it.

    Args:
        effects, units: `[heads, candidates]`.
    """
    table = np.full(min(RESOLUTION, int(units.max(1).sum())) + 1, np.inf)
    choices = {}
    for window, sinks, places in _configurations(candidates):
        best, taken = np.zeros(1), []
        for head in range(candidates.num_kv_heads):
            best, place = _add(best, effects[head, places], units[head, places])
            taken.append(place)
        for cost in np.flatnonzero(best < table[: len(best)]):
            table[cost] = best[cost]
            strides, left = [], int(cost)
            for head in reversed(range(candidates.num_kv_heads)):
                place = places[taken[head][left]]
                strides.append(candidates.all[place].stride)
                left -= int(units[head, place])
            choices[int(cost)] = Choice(window, sinks, tuple(reversed(strides)))
    return table, choices


def _add(best: np.ndarray, effects: np.ndarray, units: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Adds one of some options to the smallest sums at each cost.

    Args:
        best: smallest sum of effects at each cost.
        effects, units: effect and cost of each option.

    Returns:
        The smallest sums at each cost up to `RESOLUTION`, and the option that each has.
    """
    size = min(RESOLUTION, len(best) - 1 + int(units.max())) + 1
    sums, taken = np.full(size, np.inf), np.zeros(size, dtype=np.int64)
    for option, (effect, cost) in enumerate(zip(effects, units)):
        end = min(size, cost + len(best))
        shifted = best[: max(0, end - cost)] + effect
        better = np.flatnonzero(shifted < sums[cost:end]) + cost
        sums[better] = shifted[better - cost]
        taken[better] = option
    return sums, taken
