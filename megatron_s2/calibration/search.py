"""The search for the plan that loses least within a budget.

1. *Path*: effects of all candidates at mixtures between a window-only plan and the dense model, averaged
   along the path. Their gradients add up to the difference between its ends (integrated gradients,
   Sundararajan, Taly & Yan 2017). So an effect is taken while the other heads are sparse, too, and what
   heads do together counts.
2. *Starts*: uniform plans within the budget are measured.
3. *Proposals*: `choose` finds the best plan by effects within the budget, exactly. Those along the whole path
   propose one, and so do those along its denser parts alone: where heads recall a needle together, the
   effect of each shows only while the others still do. All are measured.
4. *Moves*: plans like the best proposal are sampled, by effects that are off by random factors, another one
   for each text and needle. The effects there, averaged with those so far, are of plans within the budget
   instead of mixtures, and of many instead of one. They propose the next plan. The best one that was
   measured is kept.

The rows that are measured see keys and values of earlier tokens. Along the path these are the dense model's,
then those of the first plan proposed, then, before every third move, those of the best plan so far, which is
measured again with them.

Everything is in a `State`, which is saved after each step.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
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
# Strides of uniform plans that are measured, besides window-only: the largest ones.
_STRIDES = 2
# Standard deviation of the logarithm of the factors on the effects of a head, and on those of a candidate.
_HEAD_NOISE, _CANDIDATE_NOISE = 0.4, 0.2
# Smallest weight of the latest effects in the average.
_LATEST = 0.25
# Moves between two plans whose keys and values of earlier tokens are used.
_MOVES_PER_CONTEXT = 3


@dataclass
class State:
    """How far a search is; what a `--resume` file holds.

    Args:
        setting: what the search was started with; a file is continued only by the same.
        dense: value of the dense model.
        path: weighted effects at the points of the path that are done, each `[layers][heads][candidates]`.
        context: the plan whose keys and values of earlier tokens are used; None for the dense model.
        starts: uniform plans that were measured, with their values.
        proposals: values of the plans that the last n points of the path propose, n counted down.
        effects: those that proposed the best of these, later averaged.
        best, value: the best plan measured, and its value.
        moves: later proposals measured.
    """

    setting: dict
    dense: dict | None = None
    path: list = field(default_factory=list)
    context: list | None = None
    starts: list = field(default_factory=list)
    proposals: list = field(default_factory=list)
    effects: list | None = None
    best: list | None = None
    value: dict | None = None
    moves: int = 0

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
        starts: uniform plans and their losses, with the keys and values of the first plan proposed.
        effects: averaged effects of the candidates, `[layers, heads, candidates]`.
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
        seed: of the plans that are sampled.
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
        if len(state.path) < len(_PATH):
            self.objective.refresh(None)
            if state.dense is None:
                state.dense = asdict(self._measured("dense", self._dense))
            while len(state.path) < len(_PATH):
                self._go(starts[0])
        path = torch.tensor(state.path)
        self._set_context(state.context or _entries(self._choose(path.sum(0))))
        for plan in starts[len(state.starts) :]:
            value = self._keep_better("uniform", plan)
            state.starts.append([_entries(plan), asdict(value)])
            state.save(self.resume)
        for first in range(len(state.proposals), len(_PATH)):
            effects = path[first:].sum(0)
            value = self._keep_better("proposal", self._choose(effects))
            if value.total <= min(state.proposals, default=value.total):
                state.effects = effects.tolist()
            state.proposals.append(value.total)
            state.save(self.resume)
        while state.moves < moves:
            if state.moves % _MOVES_PER_CONTEXT == 0:
                self._measure_best_in_its_context()
            self._move()
        self._measure_best_in_its_context()
        measured = [(_plan(entries), Value(**start)) for entries, start in state.starts]
        return Found(
            _plan(state.best),
            Value(**state.value),
            Value(**state.dense),
            measured,
            torch.tensor(state.effects),
        )

    def _set_context(self, plan: list) -> None:
        self.objective.refresh(self.candidates.settings(_plan(plan)))
        self.state.context = plan

    def _measure_best_in_its_context(self) -> None:
        state = self.state
        if state.context != state.best:
            self._set_context(state.best)
            state.value = asdict(self._measured("best so far", _plan(state.best)))
            state.save(self.resume)

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
        return plans or [self._choose(torch.from_numpy(self.costs))]

    def _cost(self, plan: Plan) -> float:
        return np.take_along_axis(self.costs, self.candidates.places(plan)[..., None], 2).mean()

    def _go(self, sparse: Plan) -> None:
        """Takes the gradient at the next point of the path from a plan to the dense model."""
        state = self.state
        share, weight = _PATH[len(state.path)]
        ends = self.objective.corner(sparse), self.objective.corner(self._dense)
        value, effects = self.objective.effects(torch.lerp(*ends, share))
        self.log(f"{share:.0%} dense: {value}")
        state.path.append((weight * effects).tolist())
        state.save(self.resume)

    def _move(self) -> None:
        """Averages effects with those of plans like the best one by them, and measures the new best one."""
        state, effects = self.state, torch.tensor(self.state.effects)
        random = np.random.default_rng([self.seed, state.moves])
        value, there = self.objective.effects(lambda: self._sample(effects, random))
        self.log(f"plans like it: {value}")
        effects.lerp_(there, max(_LATEST, 1 / (state.moves + 2)))
        self._keep_better(f"move {state.moves + 1}", self._choose(effects))
        state.effects = effects.tolist()
        state.moves += 1
        state.save(self.resume)

    def _keep_better(self, name: str, plan: Plan) -> Value:
        """Measures a plan, and keeps it if none was better; returns its value."""
        state, value = self.state, self._measured(name, plan)
        if state.value is None or value.total < state.value["total"]:
            state.best, state.value = _entries(plan), asdict(value)
        return value

    def _sample(self, effects: Tensor, random: np.random.Generator) -> Tensor:
        """Returns the mixture that is the best plan by effects with random factors.

        The factors are on what a candidate is worse than the best one of its head.
        """
        worse = effects - effects.amin(2, keepdim=True)
        of_head = random.normal(scale=_HEAD_NOISE, size=(*worse.shape[:2], 1))
        of_candidate = random.normal(scale=_CANDIDATE_NOISE, size=worse.shape)
        return self.objective.corner(self._choose(worse * torch.from_numpy(of_head + of_candidate).exp()))

    def _choose(self, effects: Tensor) -> Plan:
        """Returns the best plan by some effects."""
        return choose(self.candidates, effects.double().numpy(), self.costs, self.budget)


def _entries(plan: Plan) -> list:
    """Returns a plan as JSON."""
    return [[choice.local_blocks, choice.sink_blocks, list(choice.strides)] for choice in plan]


def _plan(entries: list) -> Plan:
    return tuple(Choice(window, sinks, tuple(strides)) for window, sinks, strides in entries)
