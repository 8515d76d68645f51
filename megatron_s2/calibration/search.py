"""The search for the plan that loses least within a budget.

1. *Starts*: uniform plans within the budget are measured.
2. *Path*: effects of all candidates at mixtures between the window-only start and the dense model, averaged
   along the path. Their gradients add up to the difference between its ends (integrated gradients,
   Sundararajan, Taly & Yan 2017). So an effect is taken while the other heads are sparse, too, and what
   heads do together counts.
3. *Moves*: `choose` finds the best plan by these effects within the budget, exactly; it is measured, with
   the effects there, and kept if the objective falls. Effects are then averaged with those, which say what
   of the change was good and what was not, and the next proposal follows: with a penalty for each changed
   head, so that it changes fewer heads after each one that was rejected.

Everything is in a `State`, which is saved after each step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from random import Random
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from megatron_s2.calibration.candidates import WINDOW_ONLY, Candidates, Choice, Plan
from megatron_s2.calibration.choose import choose
from megatron_s2.calibration.objective import Objective, Value

# Shares of the dense model at which gradients are taken, and their weights in the integral: the middles and
# lengths of intervals that grow, because most is lost close to the sparse end.
_PATH = ((0.03, 0.06), (0.13, 0.14), (0.325, 0.25), (0.725, 0.55))
# One of every _SHARE texts and needles is in a gradient of the path.
_SHARE = 2
# Strides of uniform plans that are measured, besides window-only: the largest ones.
_STRIDES = 2


@dataclass
class State:
    """How far a search is; what a `--resume` file holds.

    Args:
        setting: what the search was started with; a file is continued only by the same.
        dense: value of the dense model.
        starts: uniform plans that were measured, with their values.
        points: points of the path that are done.
        effects: averaged effects, `[layers][heads][candidates]`.
        best: the best plan measured.
        moves: proposals measured.
        reach: number of heads that the next proposal may change.
    """

    setting: dict
    dense: dict | None = None
    starts: list = field(default_factory=list)
    points: int = 0
    effects: list | None = None
    best: list | None = None
    moves: int = 0
    reach: int = 0

    @classmethod
    def open(cls, path: Path | None, setting: dict) -> State:
        """Returns the state in a file, or a new one if there is none.

        Raises:
            ValueError: the file is not of a search with this setting.
        """
        setting = json.loads(json.dumps(setting))
        if path is None or not path.exists():
            return cls(setting)
        try:
            state = cls(**json.loads(path.read_text(encoding="utf-8")))
        except (ValueError, TypeError):
            raise ValueError(
                f"--resume {path}: is not the state of a calibration; give another file"
            ) from None
        for name in sorted(setting.keys() | state.setting.keys()):
            if state.setting.get(name) != setting.get(name):
                raise ValueError(
                    f"--resume {path}: was begun with {name} {state.setting.get(name)}, not "
                    f"{setting.get(name)}; give another file"
                )
        return state

    def save(self, path: Path | None) -> None:
        """Writes the state; None does nothing."""
        if path is not None:
            partial = path.with_name(f"{path.name}.partial")
            partial.write_text(json.dumps(asdict(self)), encoding="utf-8")
            partial.replace(path)


class Found(NamedTuple):
    """The result of a search.

    Args:
        plan: the best plan.
        value: its losses, with the keys and values that belong to it.
        dense: losses of the dense model.
        starts: uniform plans and their losses, with the keys and values of the dense model.
        effects: of the candidates at the plan, `[layers, heads, candidates]`.
    """

    plan: Plan
    value: Value
    dense: Value
    starts: list[tuple[Plan, Value]]
    effects: Tensor


@dataclass
class Search:
    """A search for the best plan.

    Args:
        objective: what is made small.
        candidates: what is chosen from.
        costs: `[layers, heads, candidates]`, as `Candidates.costs`.
        budget: largest mean cost.
        state: where to begin; changed in place.
        resume: file that the state is written to; None for none.
        seed: of the probes that gradients of the path are taken on.
        log: called with each status line.
    """

    objective: Objective
    candidates: Candidates
    costs: np.ndarray
    budget: float
    state: State
    resume: Path | None
    seed: int
    log: Callable[[str], None]

    def run(self, moves: int) -> Found:
        """Returns the best plan found with `moves` proposals.

        Raises:
            ValueError: the budget is below the cheapest plan.
        """
        state, starts = self.state, self._starts()
        if state.best is None:
            self.objective.refresh(None)
            if state.dense is None:
                state.dense = asdict(self._measured("dense", self._dense))
            for plan in starts[len(state.starts) :]:
                state.starts.append([_entries(plan), asdict(self._measured("uniform", plan))])
                state.save(self.resume)
            while state.points < len(_PATH):
                self._go(starts[0])
            best, _ = min(state.starts, key=lambda start: start[1]["total"])
            state.best, state.reach = best, self.costs[..., 0].size
            state.save(self.resume)
        value, effects = self._improve(moves)
        measured = [(_plan(entries), Value(**value)) for entries, value in state.starts]
        return Found(_plan(state.best), value, Value(**state.dense), measured, effects)

    @property
    def _dense(self) -> Plan:
        return (Choice(1, 0, (1,) * self.candidates.num_kv_heads),) * self.candidates.num_layers

    def _measured(self, name: str, plan: Plan) -> Value:
        value = self.objective.value(plan)
        self.log(f"{name}: {value}")
        return value

    def _starts(self) -> list[Plan]:
        """Returns uniform plans that fit the budget, with the largest window that does: window-only first. If
        none does, the cheapest plan of all."""
        candidates = self.candidates
        heads, layers = candidates.num_kv_heads, candidates.num_layers
        plans = []
        for stride in (WINDOW_ONLY, *sorted(candidates.strides)[-_STRIDES:]):
            for window in sorted(candidates.windows, reverse=True):
                plan = (Choice(window, max(candidates.sinks), (stride,) * heads),) * layers
                if stride in candidates.strides and self._cost(plan) <= self.budget and plan not in plans:
                    plans.append(plan)
                    break
        return plans or [choose(candidates, self.costs, self.costs, self.budget)]

    def _cost(self, plan: Plan) -> float:
        return np.take_along_axis(self.costs, self.candidates.places(plan)[..., None], 2).mean()

    def _go(self, sparse: Plan) -> None:
        """Takes the gradient at the next point of the path from a plan to the dense model."""
        state = self.state
        share, weight = _PATH[state.points]
        ends = self.objective.corner(sparse), self.objective.corner(self._dense)
        random = Random(f"{self.seed} {state.points}")
        value, effects = self.objective.effects(torch.lerp(*ends, share), random, _SHARE)
        self.log(f"{share:.0%} dense: {value}")
        effects = weight * effects
        if state.effects is not None:
            effects += torch.tensor(state.effects)
        state.effects = effects.tolist()
        state.points += 1
        state.save(self.resume)

    def _improve(self, moves: int) -> tuple[Value, Tensor]:
        """Measures proposals until there were `moves` or none of one head is left; returns value and effects
        at the best plan.

        Keys and values are those of the plan at the beginning, and of the best one in the end. If that is no
        better then, the plan at the beginning is kept.
        """
        state, tried = self.state, set()
        first = _plan(state.best)
        at_first = current, _ = self._look(first)
        while state.moves < moves and state.reach >= 1:
            plan, effects = _plan(state.best), torch.tensor(state.effects)
            proposal = self._proposal(plan, effects, state.reach)
            if proposal in tried or proposal == plan:
                state.reach //= 2
                continue
            tried.add(proposal)
            value, there = self.objective.effects(self.objective.corner(proposal))
            is_better = value.total < current.total
            changed = int((self.candidates.places(plan) != self.candidates.places(proposal)).sum())
            self.log(f"move of {changed} heads: {value}{', accepted' if is_better else ''}")
            state.moves += 1
            state.effects = torch.lerp(effects, there, 0.5).tolist()
            if is_better:
                state.best, current = _entries(proposal), value
            else:
                state.reach //= 2
            state.save(self.resume)
        if _plan(state.best) == first:
            return at_first
        at_last = self._look(_plan(state.best))
        if at_last[0].total < at_first[0].total:
            return at_last
        state.best = _entries(first)
        state.save(self.resume)
        return at_first

    def _look(self, plan: Plan) -> tuple[Value, Tensor]:
        """Returns value and effects at a plan, with the keys and values that belong to it."""
        self.objective.refresh(self.candidates.settings(plan))
        value, effects = self.objective.effects(self.objective.corner(plan))
        self.log(f"best: {value}")
        return value, effects

    def _proposal(self, plan: Plan, effects: Tensor, reach: int) -> Plan:
        """Returns the best plan by some effects that changes at most `reach` heads, found by bisection of a
        penalty for each."""
        places = self.candidates.places(plan)
        effects = effects.double().numpy()
        stay = np.take_along_axis(effects, places[..., None], 2)

        def penalised(penalty: float) -> tuple[Plan, int]:
            others = effects + penalty
            np.put_along_axis(others, places[..., None], stay, 2)
            proposal = choose(self.candidates, others, self.costs, self.budget)
            return proposal, int((self.candidates.places(proposal) != places).sum())

        best, changed = penalised(0.0)
        if changed <= reach:
            return best
        best, low, high = plan, 0.0, float(np.ptp(effects, axis=2).max()) * self.costs[..., 0].size
        for _ in range(24):
            penalty = (low + high) / 2
            proposal, changed = penalised(penalty)
            if changed > reach:
                low = penalty
            else:
                high, best = penalty, proposal
        return best


def _entries(plan: Plan) -> list:
    """Returns a plan as JSON."""
    return [[choice.local_blocks, choice.sink_blocks, list(choice.strides)] for choice in plan]


def _plan(entries: list) -> Plan:
    return tuple(Choice(window, sinks, tuple(strides)) for window, sinks, strides in entries)
