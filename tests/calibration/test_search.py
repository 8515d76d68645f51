"""The search on a tiny model: it keeps the budget, gets no worse, and goes on where it was interrupted."""

import json

import numpy as np
import pytest
import torch
from tiny_llama import tiny_llama

from megatron_s2.calibration.candidates import Candidates, Choice, cost_of
from megatron_s2.calibration.layered_model import LayeredModel
from megatron_s2.calibration.needles import Needle
from megatron_s2.calibration.objective import Objective
from megatron_s2.calibration.search import _PATH, Search, State

TOKENS, BUDGET = 256, 0.45


@pytest.fixture(scope="module")
def model():
    return LayeredModel(tiny_llama(vocab_size=31, layers=2, initializer_range=0.1))


@pytest.fixture(scope="module")
def candidates():
    return Candidates(2, 2, TOKENS, 16, windows=(1, 2, 4), sinks=(0, 1), strides=(0, 4))


@pytest.fixture(scope="module")
def objective(model, candidates):
    random = np.random.default_rng(0)
    first, second, third = torch.from_numpy(random.integers(0, 31, (3, TOKENS + 1)))
    needle = Needle("code", 0.1, third, answer=3, question=4)
    return Objective(model, candidates, [first, second], [[needle]], 0.5, rows=32)


def search(objective, candidates, path=None, setting=None, log=lambda line: None) -> Search:
    state = State.open(path, setting or {"budget": BUDGET})
    return Search(objective, candidates, candidates.costs("kv"), BUDGET, state, path, 0, log)


def test_a_search_keeps_the_budget_and_the_best_plan(objective, candidates):
    lines = []
    found = search(objective, candidates, log=lines.append).run(moves=5)
    assert {choice.strides for plan, _ in found.starts for choice in plan} == {(0, 0), (4, 4)}
    assert found.dense.text < 1e-5
    assert found.dense.total == found.dense.text + 0.5 * found.dense.needles
    assert found.effects.shape == (2, 2, len(candidates.all))
    assert cost_of(candidates.settings(found.plan), TOKENS, "kv") <= BUDGET
    measured = [line for line in lines if line.startswith(("uniform", "proposal", "move"))]
    assert len(measured) == len(found.starts) + len(_PATH) + 5
    lowest = min(float(line.rpartition(" ")[2]) for line in measured)
    # Both with the keys and values that belong to it, which differ.
    assert found.value.total == pytest.approx(lowest, rel=0.1)
    objective.refresh(candidates.settings(found.plan))
    assert objective.value(found.plan) == found.value


def test_the_best_plan_is_measured_with_its_own_keys_and_values_before_every_third_move(
    objective, candidates, monkeypatch
):
    contexts, moves, original = [], [], objective.refresh
    monkeypatch.setattr(
        objective, "refresh", lambda plan: contexts.append((len(moves), plan)) or original(plan)
    )
    found = search(objective, candidates, log=lambda line: line.startswith("move") and moves.append(line))
    kept = []
    monkeypatch.setattr(found, "_move", lambda: kept.append(found.state.best) or Search._move(found))
    result = found.run(moves=7)
    assert contexts[0] == (0, None), "the path"
    of_moves = dict(contexts[2:])
    assert of_moves.keys() <= {0, 3, 6, 7}
    for number, plan in of_moves.items():
        best = kept[number] if number < 7 else found.state.best
        assert plan == candidates.settings(tuple(Choice(w, s, tuple(v)) for w, s, v in best))
    assert contexts[-1][1] == candidates.settings(result.plan)


def test_effects_along_the_path_add_up_to_what_lies_between_its_ends(objective, candidates, monkeypatch):
    monkeypatch.setattr("megatron_s2.calibration.objective._CURVATURE", 0)
    found = search(objective, candidates)
    start, dense = found._starts()[0], (Choice(1, 0, (1, 1)),) * 2
    objective.refresh(None)
    while len(found.state.path) < len(_PATH):
        found._go(start)
    step = objective.corner(dense) - objective.corner(start)
    total = float((torch.tensor(found.state.path).sum(0) * step).sum())
    between = objective.value(dense).total - objective.value(start).total
    assert total == pytest.approx(between, rel=0.2)


def test_an_interrupted_search_ends_where_another_does(objective, candidates, tmp_path):
    whole = search(objective, candidates).run(moves=3).plan
    path = tmp_path / "state.json"
    for last in ("32% dense", "uniform", "proposal", "move 2", "plans like it"):

        def stop(line, last=last):
            if line.startswith(last):
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            search(objective, candidates, path, log=stop).run(moves=3)
    assert len(json.loads(path.read_text())["path"]) == len(_PATH)
    assert search(objective, candidates, path).run(moves=3).plan == whole


def test_the_state_of_another_search_is_refused(objective, candidates, tmp_path):
    path = tmp_path / "state.json"
    search(objective, candidates, path).run(moves=0)
    with pytest.raises(ValueError, match=r"^--resume .*: was begun with budget 0.45, not 0.5; give another"):
        State.open(path, {"budget": 0.5})
    path.write_text("[]")
    with pytest.raises(ValueError, match=r"^--resume .*: is not the state of a calibration"):
        State.open(path, {"budget": 0.5})


def test_sampled_plans_keep_the_budget_and_differ(objective, candidates):
    found, random = search(objective, candidates), np.random.default_rng(2)
    effects = torch.from_numpy(random.normal(size=(2, 2, len(candidates.all))))
    sampled = [found._sample(effects, random) for _ in range(10)]
    assert len({tuple(alpha.argmax(-1).flatten().tolist()) for alpha in sampled}) > 2
    costs = torch.from_numpy(found.costs)
    assert all(alpha.unique().tolist() == [0, 1] for alpha in sampled)
    assert all(float((alpha * costs).sum(-1).mean()) <= BUDGET for alpha in sampled)


def test_each_text_and_needle_may_have_another_mixture(objective, candidates):
    objective.refresh(None)
    plans = [(Choice(2, 1, (0, 0)),) * 2, (Choice(1, 0, (4, 4)),) * 2]
    corners = [objective.corner(plan) for plan in plans]
    same = [objective.effects(corner)[1] for corner in corners]
    one_by_one = iter([corners[0]] * 2 + [corners[1]] * 3)
    _, effects = objective.effects(lambda: next(one_by_one))
    assert next(one_by_one, None) is None, "two texts with two probes, and a needle"
    assert not any(torch.allclose(effects, other) for other in same)
