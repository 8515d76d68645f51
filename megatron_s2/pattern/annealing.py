"""Annealing from dense attention to S2: a pattern that narrows in stages while a dense model trains on.

A model whose largest stride is v has K = ceil(log2 v) stages before its target, of equal length. In stage k
(from 0) each head has stride 2^k, or its target stride where that is smaller, and a window 2^(K-k) times the
target's. Stage 0 is dense. Phases are the target's modulo the stride, so with strides that are powers of two
each stage sees a subset of what the previous stage saw.

A window-only head has stride 2^k in every stage k before the target, where its strided blocks go. Until then
its phase is its index, so that such heads together see more than one alone. With such heads v is at least 16.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING

from megatron_s2.pattern.s2_pattern import S2Pattern
from megatron_s2.pattern.settings import S2Settings

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import ArrayLike


_LEAST_STRIDE_OF_WINDOW_ONLY = 16


def narrowing_stages(pattern: S2Pattern) -> int:
    """Number of stages before the target that `pattern` needs; 0 if it is dense."""
    least = _LEAST_STRIDE_OF_WINDOW_ONLY if 0 in pattern.strides else 1
    return (max(*pattern.strides, least) - 1).bit_length()


@lru_cache(maxsize=1024)
def stages(target: S2Pattern, before: int | None = None) -> tuple[S2Pattern, ...]:
    """The patterns of all stages, from dense to `target`; of a dense target only itself.

    Args:
        before: number of stages before the target; by default as many as it needs.
    """
    needed = narrowing_stages(target)
    before = needed if before is None or not needed else before
    narrowing = []
    for k in range(before):
        strides = tuple(min(2**k, stride or 2**k) for stride in target.strides)
        phases = (phase if v else g for g, (v, phase) in enumerate(zip(target.strides, target.head_phases)))
        narrowing.append(
            replace(
                target,
                local_blocks=target.local_blocks * 2 ** (before - k),
                vert_stride=strides,
                phases=tuple(phase % stride for phase, stride in zip(phases, strides)),
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

    def stages(self, pattern: S2Pattern) -> tuple[S2Pattern, ...]:
        """The stages of the layer that has this pattern in the end; a dense layer has a single one."""
        return stages(pattern, self._last)

    def current[T](self, by_stage: Sequence[T]) -> T:
        """Returns the item of the current stage, of as many as `stages` returns."""
        return by_stage[min(self._stage, len(by_stage) - 1)]

    def mean_pairs(self, lengths: ArrayLike) -> np.ndarray:
        """`S2Settings.mean_pairs` of the current stage."""
        return self.settings.mean_pairs_of(_narrowed(self.settings, self._stage, self._last), lengths)

    def progress(self) -> str | None:
        """Describes how far the current stage is from the target; None once the target is reached."""
        if self._stage == self._last:
            return None
        return (
            f"step {self.iteration()} of --s2-anneal-steps {self.steps}: attention has "
            f"{' and '.join(self._numbers(self._stage))}, not yet {' and '.join(self._numbers(self._last))}"
        )

    def __str__(self) -> str:
        """The stages and the step at which each begins."""
        return "; ".join(
            f"{', '.join(self._numbers(stage))} from step {-(-stage * self.steps // self._last)}"
            for stage in range(self._last + 1)
        )

    def _numbers(self, stage: int) -> tuple[str, str]:
        """The largest stride and window of a stage as text."""
        patterns = [pattern for pattern, _ in _narrowed(self.settings, stage, self._last)]
        largest = max(max(pattern.strides) for pattern in patterns)
        window = max(pattern.local_blocks for pattern in patterns)
        return f"stride {largest}" if largest else "no stride", f"window {window}"

    @cached_property
    def _last(self) -> int:
        """Index of the last stage."""
        return max((narrowing_stages(pattern) for pattern, _ in self.settings.distinct_patterns), default=0)

    @property
    def _stage(self) -> int:
        return min(self.iteration() * self._last // self.steps, self._last)


@lru_cache(maxsize=64)
def _narrowed(settings: S2Settings, stage: int, before: int) -> list[tuple[S2Pattern, int]]:
    """The distinct patterns of the S2 layers in a stage, each with the number of layers that have it."""
    return [
        (stages(pattern, before)[min(stage, narrowing_stages(pattern) and before)], layers)
        for pattern, layers in settings.distinct_patterns
    ]
