"""The search for the plan that loses least within a budget.

1. *Frank-Wolfe* (Frank & Wolfe 1956) over mixtures of candidates: each step takes the gradient of the
   objective at the mixture, on a part of the probes, averages it with earlier ones (Mokhtari, Hassani &
   Karbasi 2020), finds the plan that is best by that gradient within the budget, exactly (`choose`), and
   moves the mixture towards it. Effects are thus taken where other heads are sparse already, and what
   heads do together counts, which the effect of each alone does not show.
2. The plans that the last steps chose are measured on all probes; the best is where the rest begins.
3. *Moves*: the gradient at the plan says what each change would do; `choose` finds the best changes, with
   a penalty for each changed head that starts small and grows. A proposal is accepted only if the
   measured objective falls. Before and after, keys and values are computed anew with the plan.

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

from megatron_s2.calibration.candidates import Candidates, Choice, Plan
from megatron_s2.calibration.choose import choose
from megatron_s2.calibration.objective import Objective, Value

# One of every _SHARE texts and needles is in the gradient of a Frank-Wolfe step.
_SHARE = 4
# Plans of the last steps that are measured.
_MEASURED = 3
# Heads that the first proposal may change, as a share of all; each rejected one halves it.
_FIRST_MOVE = 0.2


@dataclass
class State:
    """How far a search is; what a `--resume` file holds.

    Args:
        setting: what the search was started with; a file is continued only by the same.
        steps: Frank-Wolfe steps done.
        alpha, gradient: mixture and averaged gradient, `[layers][heads][candidates]`.
        plans: distinct plans that steps chose, oldest first.
        dense: value of the dense model.
        best: the best plan measured.
        moves: proposals measured.
        reach: heads that the next proposal may change.
    """

    setting: dict
    steps: int = 0
    alpha: list | None = None
    gradient: list | None = None
    plans: list = field(default_factory=list)
    dense: dict | None = None
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
        for name in setting.keys() | state.setting.keys():
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
        gradient: gradient of the objective at the plan, `[layers, heads, candidates]`.
    """

    plan: Plan
    value: Value
    dense: Value
    gradient: Tensor


@dataclass
class Search:
    """A search for the best plan.

    Args:
        objective: what is made small.
        candidates: what is chosen from.
        costs: `[layers, heads, candidates]`, as `Candidates.costs`.
        budget: largest mean cost.
        state: where to begin; changed in place.
        resume: file that the state is written to.
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

    def run(self, steps: int, moves: int) -> Found:
        """Returns the best plan found by `steps` Frank-Wolfe steps and `moves` proposals."""
        state, dense = self.state, self._dense
        if state.best is None:
            self.objective.refresh(None)
            if state.dense is None:
                value = self.objective.value(dense)
                self.log(f"dense: {value}")
                state.dense = asdict(value)
            while state.steps < steps:
                self._step()
            measured = [(self.objective.value(plan), plan) for plan in map(_plan, state.plans[-_MEASURED:])]
            for value, _ in measured:
                self.log(f"plan: {value}")
            _, plan = min(measured, key=lambda item: item[0].total)
            state.best = _entries(plan)
            state.reach = max(1, round(_FIRST_MOVE * self.costs[..., 0].size))
            state.save(self.resume)
        value, gradient = self._improve(moves)
        return Found(_plan(state.best), value, Value(**state.dense), gradient)

    @property
    def _dense(self) -> Plan:
        return (Choice(1, 0, (1,) * self.candidates.num_kv_heads),) * self.candidates.num_layers

    def _step(self) -> None:
        state = self.state
        alpha = self.objective.corner(self._dense) if state.alpha is None else torch.tensor(state.alpha)
        random = Random(f"{self.seed} {state.steps}")
        value, gradient = self.objective.gradient(alpha.to(self.objective.device), random, _SHARE)
        alpha, gradient = alpha.cpu(), gradient.cpu()
        if state.gradient is not None:
            weight = max(0.3, (state.steps + 1) ** (-2 / 3))
            gradient = torch.lerp(torch.tensor(state.gradient), gradient, weight)
        plan = self._choose(gradient)
        corner = self.objective.corner(plan).cpu()
        gap = float((gradient * (alpha - corner)).sum())
        self.log(f"step {state.steps + 1}: {value}, gap {gap:.3f}")
        alpha += min(0.5, 2 / (state.steps + 2)) * (corner - alpha)
        state.alpha, state.gradient = alpha.tolist(), gradient.tolist()
        if _entries(plan) in state.plans:
            state.plans.remove(_entries(plan))
        state.plans.append(_entries(plan))
        state.steps += 1
        state.save(self.resume)

    def _improve(self, moves: int) -> tuple[Value, Tensor]:
        """Tries proposals until `moves` have been measured or none of one head is better; returns value and
        gradient at the best plan.

        Keys and values are those of the plan at the beginning, and of the best one in the end. If that is no
        better then, the plan at the beginning is kept.
        """
        state, tried = self.state, set()
        first = _plan(state.best)
        at_first = current, gradient = self._look(first, refresh=True)
        while state.moves < moves and state.reach >= 1:
            plan = _plan(state.best)
            proposal = self._proposal(plan, gradient, state.reach)
            if proposal in tried or proposal == plan:
                state.reach //= 2
                continue
            tried.add(proposal)
            value = self.objective.value(proposal)
            is_better = value.total < current.total
            changed = int((self.candidates.places(plan) != self.candidates.places(proposal)).sum())
            self.log(f"move of {changed} heads: {value}{', accepted' if is_better else ''}")
            state.moves += 1
            if is_better:
                state.best = _entries(proposal)
                tried.clear()
            else:
                state.reach //= 2
            state.save(self.resume)
            if is_better and state.moves < moves:
                current, gradient = self._look(proposal, refresh=False)
        if _plan(state.best) == first:
            return at_first
        at_last = self._look(_plan(state.best), refresh=True)
        if at_last[0].total < at_first[0].total:
            return at_last
        state.best = _entries(first)
        state.save(self.resume)
        return at_first

    def _look(self, plan: Plan, refresh: bool) -> tuple[Value, Tensor]:
        """Returns value and gradient at a plan, if `refresh` with the keys and values that belong to it."""
        if refresh:
            self.objective.refresh(self.candidates.settings(plan))
        value, gradient = self.objective.gradient(self.objective.corner(plan))
        self.log(f"best: {value}")
        return value, gradient.cpu()

    def _proposal(self, plan: Plan, gradient: Tensor, reach: int) -> Plan:
        """Returns the best plan by the gradient that changes about `reach` heads at most."""
        places = self.candidates.places(plan)
        effects = gradient.double().numpy()
        stay = np.take_along_axis(effects, places[..., None], 2)
        low, high = 0.0, float((stay - effects.min(2, keepdims=True)).max()) + 1e-9
        best = plan
        for _ in range(16):  # bisection of the penalty of a changed head
            penalty = (low + high) / 2
            others = effects + penalty
            np.put_along_axis(others, places[..., None], stay, 2)
            proposal = choose(self.candidates, others, self.costs, self.budget)
            changed = int((self.candidates.places(proposal) != places).sum())
            if changed > reach:
                low = penalty
            else:
                high = penalty
                best = proposal
        return best

    def _choose(self, gradient: Tensor) -> Plan:
        return choose(self.candidates, gradient.double().numpy(), self.costs, self.budget)


def _entries(plan: Plan) -> list:
    """Returns a plan as JSON."""
    return [[choice.local_blocks, choice.sink_blocks, list(choice.strides)] for choice in plan]


def _plan(entries: list) -> Plan:
    return tuple(Choice(window, sinks, tuple(strides)) for window, sinks, strides in entries)
