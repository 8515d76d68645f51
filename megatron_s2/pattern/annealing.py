"""From dense attention to S2: a pattern that narrows in stages while a dense model is trained on.

With strides up to v there are K = ceil(log2 v) stages before the target, of equal length. In stage k (from 0)
each head's stride is 2^k, or its own where that is smaller, and the window is 2^(K-k) times its own. Stage 0
is dense. Phases are the target's modulo the stride, so that with strides of powers of two each stage sees a
part of what the stage before saw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

from megatron_s2.pattern.block_pattern import dense_pairs
from megatron_s2.pattern.s2_pattern import S2Pattern
from megatron_s2.pattern.settings import S2Settings


@lru_cache(maxsize=1024)
def stages(target: S2Pattern) -> tuple[S2Pattern, ...]:
    """The patterns from dense to `target`, which is the last."""
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
    """Where a run is between dense attention and the target.

    Args:
        settings: the target.
        steps: of training until the target is reached.
        iteration: says how many steps have been taken.

    Raises:
        ValueError: steps are not positive, or the target is dense.
    """

    settings: S2Settings
    steps: int
    iteration: Callable[[], int]

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"--s2-anneal-steps {self.steps}: must be >= 1")
        if len(self._all) == 1:
            raise ValueError(f"--s2-anneal-steps {self.steps}: the pattern is dense already (stride 1)")

    def now(self, patterns: Sequence[S2Pattern]) -> S2Pattern:
        """The one of a layer's `stages` in force; the same stage in all layers."""
        return patterns[min(self._stage, len(patterns) - 1)]

    def mean_pairs(self, seq_len: int) -> float:
        """Query-key pairs of core attention now, mean over layers and heads: as `S2Settings.mean_pairs`."""
        return _mean_pairs(self.settings, self._stage, seq_len)

    def note(self) -> str | None:
        """Says what attention is before the target is reached; None from then on."""
        if self._stage == len(self._all) - 1:
            return None
        now, target = self.now(self._all), self._all[-1]
        return (
            f"step {self.iteration()} of --s2-anneal-steps {self.steps}: attention has stride "
            f"{max(now.strides)} and window {now.local_blocks}, not yet {max(target.strides)} and "
            f"{target.local_blocks}"
        )

    def __str__(self) -> str:
        """The schedule, stage by stage."""
        last = len(self._all) - 1
        begins = [-(-n * self.steps // last) for n in range(len(self._all))]
        parts = [
            f"stride {max(pattern.strides)}, window {pattern.local_blocks} from step {begin}"
            for begin, pattern in zip(begins, self._all)
        ]
        return "; ".join(parts)

    @property
    def _all(self) -> tuple[S2Pattern, ...]:
        return stages(self.settings.first_pattern)

    @property
    def _stage(self) -> int:
        last = len(self._all) - 1
        return min(self.iteration() * last // self.steps, last)


@lru_cache(maxsize=4096)
def _mean_pairs(settings: S2Settings, stage: int, seq_len: int) -> float:
    sparse = sum(
        sum(stages(settings.pattern(layer))[stage].visible_pairs(seq_len)) for layer in settings.sparse_layers
    )
    dense = (settings.num_layers - len(settings.sparse_layers)) * dense_pairs(seq_len)
    return (sparse / settings.num_kv_heads + dense) / settings.num_layers
