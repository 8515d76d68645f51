"""Calibration from start to end: texts and needles from a dataset, the search, and what it reached."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random

import torch

from megatron_s2.calibration.candidates import Candidates, Choice, cost_of
from megatron_s2.calibration.choose import choose
from megatron_s2.calibration.needles import CALIBRATED_KINDS, Needle, hide_needles
from megatron_s2.calibration.objective import Objective, Value
from megatron_s2.calibration.search import Search, State
from megatron_s2.calibration.source import Source
from megatron_s2.errors import flag_name
from megatron_s2.generation.evaluation import windows
from megatron_s2.pattern import S2Settings
from megatron_s2.report.frontier import Point

# Needles hidden in one text, whose keys and values are computed once for all of them: one of each kind,
# because small models take one code for another.
_NEEDLES_PER_TEXT = len(CALIBRATED_KINDS)
# Budgets of the predicted frontier, as multiples of the given one.
_FRONTIER = (0.6, 0.8, 1.0, 1.25, 1.5, 2.0)
_COST_NAMES = {"kv": "keys and values", "flops": "query-key pairs"}


@dataclass(frozen=True)
class Settings:
    """What is calibrated, on what.

    Args:
        data_path: prefix of an indexed dataset of the model's tokens.
        seq_length: tokens of a text.
        budget: largest cost, as a share of dense attention.
        of: `kv` or `flops`, as in `Candidates.costs`.
        samples: number of texts, two probes in each.
        needles: number of needles.
        needle_weight: weight of the needles' loss against that of the texts.
        moves: as in `Search.run`.
        block_size: tokens per block.
        seed: of texts and needles.

    Raises:
        ValueError: a field is out of range; the message starts with its flag.
    """

    data_path: str
    seq_length: int
    budget: float
    of: str
    samples: int
    needles: int
    needle_weight: float
    moves: int
    block_size: int
    seed: int

    def __post_init__(self) -> None:
        for name, smallest in (("samples", 1), ("needles", 0), ("moves", 0)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{flag_name(name)} {getattr(self, name)}: must be >= {smallest}")
        if not 0 < self.budget <= 1:
            raise ValueError(f"--budget {self.budget}: must be more than 0 and at most 1")
        if self.needle_weight < 0:
            raise ValueError(f"--needle-weight {self.needle_weight}: must be >= 0")
        size = self.block_size
        if size < 16 or size & (size - 1):
            raise ValueError(f"--block-size {size}: must be a power of two >= 16")
        if self.seq_length < 8 * size:
            raise ValueError(f"--seq-length {self.seq_length}: must be at least 8 blocks, {8 * size}")

    @property
    def cost_name(self) -> str:
        return _COST_NAMES[self.of]


@dataclass(frozen=True)
class Calibration:
    """What was found.

    Args:
        settings: the pattern.
        summary: one line about it.
        made_with: how it was made, for the pattern file.
        points: the pattern, uniform ones, and the frontier that the last gradient predicts.
    """

    settings: S2Settings
    summary: str
    made_with: dict
    points: list[Point]


def calibrate(
    source: Source, settings: Settings, resume: Path | None, log: Callable[[str], None]
) -> Calibration:
    """Finds the pattern of a dense model that loses least within a budget.

    Args:
        resume: file that keeps the state of the search, and from which it goes on; None for none.
        log: called with each status line.

    Raises:
        ValueError: the model is not dense, the dataset does not fit, the budget is too small, or the file is
            of another search.
    """
    if source.settings is not None:
        raise ValueError(f"{source.flag}: was trained with a pattern of its own; calibrate a dense model")
    model = source.model
    candidates = candidates_for(
        model.num_layers, model.num_kv_heads, settings.seq_length, settings.block_size
    )
    costs = candidates.costs(settings.of)
    texts, needles = _samples(source, settings)
    objective = Objective(model, candidates, texts, needles, settings.needle_weight, settings.block_size)
    # The number of moves may be raised between two runs.
    setting = {name: value for name, value in asdict(settings).items() if name != "moves"}
    state = State.open(resume, setting | {"model": [model.num_layers, model.num_kv_heads, model.vocab_size]})
    search = Search(objective, candidates, costs, settings.budget, state, resume, settings.seed, log)
    found = search.run(settings.moves)
    plan, value, at_dense = found.plan, found.value, found.dense
    chosen = candidates.settings(plan)
    cost = cost_of(chosen, settings.seq_length, settings.of)

    def point(series: str, name: str, cost: float, value: Value) -> Point:
        asked = (value.needles, value.found) if needles else (None, None)
        return Point(series, name, cost, value.text, *asked)

    points = [point("calibrated", "", cost, value), point("dense", "", 1.0, at_dense)]
    for start, measured in found.starts:
        other_cost = cost_of(candidates.settings(start), settings.seq_length, settings.of)
        points.append(point("uniform", _uniform_name(start[0]), other_cost, measured))
    effects = found.effects.double().numpy()
    for factor in _FRONTIER:
        budget = settings.budget * factor
        try:
            other = choose(candidates, effects, costs, budget)
        except ValueError:  # too small
            continue
        change = float((found.effects * (objective.corner(other).cpu() - objective.corner(plan).cpu())).sum())
        other_cost = cost_of(candidates.settings(other), settings.seq_length, settings.of)
        points.append(Point("predicted (text and needles)", "", other_cost, value.text + change))
    summary = (
        f"{cost:.3f} of dense {settings.cost_name} at {settings.seq_length} tokens; on sampled rows "
        f"predictions diverge from dense by {value.text:.4f} nats"
    )
    if needles:
        summary += f"; needles found {value.found:.0%}, of dense {at_dense.found:.0%}"
    return Calibration(chosen, summary, {"tool": "scripts/calibrate.py", **asdict(settings)}, points)


def candidates_for(num_layers: int, num_kv_heads: int, seq_length: int, block_size: int) -> Candidates:
    """Returns the candidates at a length: windows up to a quarter of it, strides up to half of it."""
    blocks = seq_length // block_size
    windows = [size for n in range(20) for size in (2**n, 3 * 2**n) if size <= max(1, blocks // 4)]
    strides = [2**n for n in range(1, 20) if 2**n <= blocks // 2]
    return Candidates(
        num_layers,
        num_kv_heads,
        seq_length,
        block_size,
        windows=tuple(sorted(windows)),
        sinks=(0, 1),
        strides=(0, *strides),
    )


def _uniform_name(choice: Choice) -> str:
    return f"w{choice.local_blocks} v{choice.strides[0]} s{choice.sink_blocks}"


def _samples(source: Source, settings: Settings) -> tuple[list[torch.Tensor], list[list[Needle]]]:
    """Returns the texts, and needles in others, a few in each."""
    groups = -(-settings.needles // _NEEDLES_PER_TEXT)
    count = settings.samples + groups
    batches = windows(settings.data_path, settings.seq_length, count, seed=settings.seed)
    texts = [text for [text] in batches]
    random = Random(settings.seed)
    depths = [(n + random.random()) / settings.needles for n in range(settings.needles)]
    random.shuffle(depths)
    places = [(CALIBRATED_KINDS[n % _NEEDLES_PER_TEXT], depth) for n, depth in enumerate(depths)]
    needles = [
        hide_needles(
            source.required_tokenizer(),
            text,
            places[group * _NEEDLES_PER_TEXT : (group + 1) * _NEEDLES_PER_TEXT],
            random,
        )
        for group, text in enumerate(texts[settings.samples :])
    ]
    return texts[: settings.samples], needles
