"""Annealing from dense attention to S2: a pattern that narrows in stages while a dense model trains on.

A target whose largest stride is v has K = ceil(log2 v) stages before it, of equal length. In stage k (from 0)
each head has stride 2^k, or its target stride where that is smaller, and a window 2^(K-k) times the target's.
Stage 0 is dense. Phases are the target's modulo the stride, so with strides that are powers of two each stage
sees a subset of what the previous stage saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING

from megatron_s2.pattern.s2_pattern import S2Pattern
from megatron_s2.pattern.settings import S2Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike


@lru_cache(maxsize=1024)
def stages(target: S2Pattern) -> tuple[S2Pattern, ...]:
    """The patterns of all stages, from dense to `target`."""
    before = (max(target.strides) - 1).bit_length()
    narrowing = []
    for k in range(before):
        strides = tuple(min(2**k, stride) for stride in target.strides)
        narrowing.append(
            replace(
                target,
                local_blocks=target.local_blocks * 2 ** (before - k),
                vert_stride=strides,
                phases=tuple(phase % stride for phase, stride in zip(target.head_phases, strides)),
                layer=0,
                warn_lost=False,
            )
        )
    return (*narrowing, target)


@dataclass(frozen=True)
class Annealing:
    """The annealing schedule of a run, and the stage that the run is in.

    Args:
        settings: S2 settings of the target.
        steps: number of training steps until the target is reached.
        iteration: function that returns the number of training steps completed so far.

    Raises:
        ValueError: `steps` is not positive, or the target is dense.
    """

    settings: S2Settings
    steps: int
    iteration: Callable[[], int]

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--s2-anneal-steps {self.steps}: must be >= 1")
        if self._last == 0:
            raise ValueError(f"--s2-anneal-steps {self.steps}: the pattern is dense already (stride 1)")

    def current[T](self, by_stage: Sequence[T]) -> T:
        """Returns the item of the current stage; a dense layer has a single stage."""
        return by_stage[min(self._stage, len(by_stage) - 1)]

    def mean_pairs(self, lengths: ArrayLike) -> np.ndarray:
        """`S2Settings.mean_pairs` of the current stage."""
        return self.settings.mean_pairs_of(_narrowed(self.settings, self._stage), lengths)

    def progress(self) -> str | None:
        """Describes how far the current stage is from the target; None once the target is reached."""
        if self._stage == self._last:
            return None
        pattern, target = self._patterns[self._stage], self._patterns[-1]
        return (
            f"step {self.iteration()} of --s2-anneal-steps {self.steps}: attention has stride "
            f"{max(pattern.strides)} and window {pattern.local_blocks}, not yet {max(target.strides)} and "
            f"{target.local_blocks}"
        )

    def __str__(self) -> str:
        """The stages and the step at which each begins."""
        return "; ".join(
            f"stride {max(pattern.strides)}, window {pattern.local_blocks} from step "
            f"{-(-stage * self.steps // self._last)}"
            for stage, pattern in enumerate(self._patterns)
        )

    @property
    def _patterns(self) -> tuple[S2Pattern, ...]:
        return stages(self.settings.first_pattern)

    @property
    def _last(self) -> int:
        return len(self._patterns) - 1

    @property
    def _stage(self) -> int:
        return min(self.iteration() * self._last // self.steps, self._last)


@lru_cache(maxsize=64)
def _narrowed(settings: S2Settings, stage: int) -> list[tuple[S2Pattern, int]]:
    """The distinct patterns of the S2 layers in a stage, each with the number of layers that have it."""
    return [(stages(pattern)[stage], layers) for pattern, layers in settings.distinct_patterns]
