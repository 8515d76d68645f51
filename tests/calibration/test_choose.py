"""choose() finds the best of all plans within a budget."""

from itertools import product

import numpy as np
import pytest

from megatron_s2.calibration.candidates import Candidates, Choice, cost_of
from megatron_s2.calibration.choose import choose


def few(layers: int = 2, heads: int = 2) -> Candidates:
    return Candidates(layers, heads, 256, 16, windows=(1, 3), sinks=(0, 1), strides=(0, 4))


def every_plan(candidates: Candidates):
    strides = list(product((1, *candidates.strides), repeat=candidates.num_kv_heads))
    choices = [Choice(*c) for c in product(candidates.windows, candidates.sinks, strides)]
    return product(choices, repeat=candidates.num_layers)


def total(values: np.ndarray, candidates: Candidates, plan) -> float:
    return np.take_along_axis(values, candidates.places(plan)[..., None], 2).sum()


@pytest.mark.parametrize("of", ["kv", "flops"])
@pytest.mark.parametrize("budget", [0.2, 0.35, 0.7, 1.0])
def test_the_chosen_plan_is_the_best_of_all(of, budget):
    candidates = few()
    costs = candidates.costs(of)
    plans = list(every_plan(candidates))
    within = [plan for plan in plans if total(costs, candidates, plan) <= budget * costs[..., 0].size]
    for seed in range(3):
        effects = np.random.default_rng(seed).normal(size=costs.shape)
        chosen = choose(candidates, effects, costs, budget)
        assert total(costs, candidates, chosen) <= budget * costs[..., 0].size
        best = min(total(effects, candidates, plan) for plan in within)
        assert total(effects, candidates, chosen) == pytest.approx(best)


def test_a_budget_below_the_cheapest_plan_is_refused():
    candidates = few()
    with pytest.raises(ValueError, match=r"^--budget 0.05: must be more than 0.0625, what the cheapest"):
        choose(candidates, np.zeros((2, 2, 9)), candidates.costs("kv"), 0.05)


def test_settings_of_a_plan_cost_what_its_candidates_cost():
    candidates = few(layers=3, heads=3)
    plan = (Choice(3, 1, (0, 1, 4)), Choice(1, 0, (1, 1, 1)), Choice(1, 0, (4, 4, 0)))
    settings = candidates.settings(plan)
    assert [settings.is_dense(n) for n in (1, 2, 3)] == [False, True, False]
    assert settings.pattern(1).strides == (0, 1, 4)
    for of in ("kv", "flops"):
        cost = total(candidates.costs(of), candidates, plan) / 9
        # In a layer with a dense head, that head has the layer's window and sinks, which change nothing.
        assert cost_of(settings, 256, of) == pytest.approx(cost)


def test_masks_are_those_of_the_settings():
    candidates = few(layers=3, heads=3)
    plan = (Choice(3, 1, (0, 1, 4)), Choice(1, 0, (1, 1, 1)), Choice(1, 0, (4, 4, 0)))
    places = candidates.places(plan)
    for row in (0, 5, 15):
        masks = np.take_along_axis(candidates.masks(row), places[..., None, None], 2)[:, :, 0]
        for layer in range(3):
            pattern = candidates.settings(plan).pattern(layer + 1)
            for head in range(3):
                assert np.flatnonzero(masks[layer, head]).tolist() == pattern.row_blocks(head, row)
