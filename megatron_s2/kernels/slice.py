"""The contract of attention of consecutive queries whose window and shard are two separate tensors."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from megatron_s2.pattern import S2Pattern


@dataclass(frozen=True)
class SequenceSlice(ABC):
    """Queries at positions `q_start` .. `q_stop`-1 of one document, all heads, and where their keys are.

    Window and shard are read in a pass each, because context parallelism receives them at different times.
    The `source` of a pass is "window" or "shard". Its keys and values are `[batch, tokens, kv_heads,
    head_dim]` for the window and `[batch, tokens, head_dim]` for the shard, the shards of the KV heads one
    after another. Queries, `out` and their gradients are `[batch, queries, heads, head_dim]`, `lse` is
    `[batch, heads, queries]`. `out`, `lse` and all gradients are float32 (float64 for float64 inputs).

    Args:
        pattern: pattern of the KV heads.
        scale: factor on the scores.
        q_start, q_stop: positions of the queries.
        keys_start: position of the window's first key.
        shards: per KV head, start and stop of its shard in the shard source.
    """

    pattern: S2Pattern
    scale: float
    q_start: int
    q_stop: int
    keys_start: int
    shards: Sequence[tuple[int, int]]

    @abstractmethod
    def forward(self, source: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Writes attention over the window to `out` and `lse`; merges attention over the shard into them."""

    @abstractmethod
    def backward(
        self,
        source: str,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        """Adds the gradients through one source to `dq`, `dk`, `dv`; `out` and `lse` are the merged ones."""
