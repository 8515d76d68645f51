"""What calibration chooses from: windows, sinks and strides of KV heads, and what each costs."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Literal

import numpy as np

from megatron_s2.pattern import S2Pattern, S2Settings
from megatron_s2.pattern.layer_pattern import LayerPattern

DENSE, WINDOW_ONLY = 1, 0  # strides
Budget = Literal["kv", "flops"]


@dataclass(frozen=True, order=True)
class Candidate:
    """The pattern of one KV head, apart from its phase.

    Args:
        local_blocks, sink_blocks: as in `S2Pattern`; the heads of a layer have them in common, apart from
            dense ones, for which they mean nothing and are 1 and 0.
        stride: distance between strided blocks; 1 for a dense head, 0 for one with window and sinks only.
    """

    local_blocks: int
    sink_blocks: int
    stride: int

    @property
    def is_dense(self) -> bool:
        return self.stride == DENSE


@dataclass(frozen=True)
class Choice:
    """What was chosen for one layer: `local_blocks` and `sink_blocks` of all its heads, a stride for each."""

    local_blocks: int
    sink_blocks: int
    strides: tuple[int, ...]


Plan = tuple[Choice, ...]
"""One choice per layer."""


@dataclass(frozen=True)
class Candidates:
    """The candidates of every KV head of a model, at one sequence length.

    Args:
        num_layers, num_kv_heads: sizes of the model.
        seq_length: number of tokens at which patterns are compared.
        block_size: tokens per block.
        windows, sinks, strides: values to choose from; `strides` without 1, dense heads are always there.
    """

    num_layers: int
    num_kv_heads: int
    seq_length: int
    block_size: int
    windows: tuple[int, ...]
    sinks: tuple[int, ...]
    strides: tuple[int, ...]
    all: tuple[Candidate, ...] = field(init=False)

    def __post_init__(self) -> None:
        sparse = (Candidate(w, s, v) for w in self.windows for s in self.sinks for v in self.strides)
        object.__setattr__(self, "all", (Candidate(1, 0, DENSE), *sparse))

    @cached_property
    def index(self) -> dict[Candidate, int]:
        """Position of each candidate in `all`."""
        return {candidate: place for place, candidate in enumerate(self.all)}

    @cached_property
    def blocks(self) -> int:
        return -(-self.seq_length // self.block_size)

    def phase(self, layer: int, head: int, stride: int) -> int:
        """Phase of a head with a stride: spread over the heads, rotated by the layer, counted from 0."""
        return (head * max(1, stride // self.num_kv_heads) + layer) % stride if stride > 1 else 0

    def head_pattern(self, layer: int, head: int, candidate: Candidate) -> S2Pattern:
        """Returns the pattern of one KV head."""
        phase = self.phase(layer, head, candidate.stride)
        return _head_pattern(self.block_size, candidate, phase)

    def costs(self, of: Budget) -> np.ndarray:
        """Returns what each candidate costs as a share of a dense head, `[layers, heads, candidates]`.

        Args:
            of: `kv` for the keys that the last token sees, which generation keeps; `flops` for pairs of
                query and key.
        """
        count = S2Pattern.kv_tokens if of == "kv" else S2Pattern.visible_pairs

        @cache
        def share(candidate: Candidate, phase: int) -> float:
            [amount] = count(_head_pattern(self.block_size, candidate, phase), self.seq_length)
            [dense] = count(_head_pattern(self.block_size, self.all[0], 0), self.seq_length)
            return amount / dense

        return np.array(
            [
                [
                    [share(c, self.phase(layer, head, c.stride)) for c in self.all]
                    for head in range(self.num_kv_heads)
                ]
                for layer in range(self.num_layers)
            ]
        )

    def masks(self, row: int) -> np.ndarray:
        """Returns the key blocks that query block `row` sees, bool `[layers, heads, candidates, row + 1]`."""
        seen = np.zeros((self.num_layers, self.num_kv_heads, len(self.all), row + 1), dtype=bool)
        for layer in range(self.num_layers):
            for head in range(self.num_kv_heads):
                for place, candidate in enumerate(self.all):
                    seen[layer, head, place, self.head_pattern(layer, head, candidate).row_blocks(0, row)] = (
                        True
                    )
        return seen

    def places(self, plan: Plan) -> np.ndarray:
        """Returns the position in `all` of what a plan has for each head, `[layers, heads]`."""
        return np.array([[self.index[self.candidate(choice, v)] for v in choice.strides] for choice in plan])

    def candidate(self, choice: Choice, stride: int) -> Candidate:
        """Returns the candidate of a head with a stride in a layer with a choice."""
        return self.all[0] if stride == DENSE else Candidate(choice.local_blocks, choice.sink_blocks, stride)

    def settings(self, plan: Plan) -> S2Settings:
        """Returns a plan as settings of the model."""
        layers = []
        for layer, choice in enumerate(plan):
            if set(choice.strides) == {DENSE}:
                layers.append(None)
                continue
            phases = tuple(self.phase(layer, head, stride) for head, stride in enumerate(choice.strides))
            layers.append(LayerPattern(choice.local_blocks, choice.strides, choice.sink_blocks, phases))
        return S2Settings(self.num_layers, self.num_kv_heads, self.block_size, layers=tuple(layers))


@cache
def _head_pattern(block_size: int, candidate: Candidate, phase: int) -> S2Pattern:
    return S2Pattern(
        num_kv_heads=1,
        block_size=block_size,
        local_blocks=candidate.local_blocks,
        vert_stride=candidate.stride,
        sink_blocks=candidate.sink_blocks,
        phases=(phase,),
        warn_lost=False,
    )


def cost_of(settings: S2Settings | None, seq_length: int, of: Budget) -> float:
    """Returns what settings cost at a sequence length as a share of dense attention; None is dense."""
    if settings is None:
        return 1.0
    count = S2Pattern.kv_tokens if of == "kv" else S2Pattern.visible_pairs
    amounts = [sum(count(settings.pattern(n), seq_length)) for n in range(1, settings.num_layers + 1)]
    dense = sum(count(settings.dense_pattern, seq_length))
    return sum(amounts) / (dense * settings.num_layers)
