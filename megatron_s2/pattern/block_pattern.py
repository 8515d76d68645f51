"""The base class of causal block patterns: pairs, FLOPs and bytes from counts of visible blocks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import torch


def require(ok: bool, name: str, value: object, allowed: str) -> None:
    """Raises ValueError `name value: must be allowed` unless `ok`."""
    if not ok:
        raise ValueError(f"{name} {value}: must be {allowed}")


class AttentionFlops(NamedTuple):
    """FLOPs of attention over the visible query-key pairs, forward and backward."""

    forward: int
    backward: int


def _require_seq_len(seq_len: int) -> None:
    require(seq_len >= 0, "seq_len", seq_len, ">= 0")


def dense_pairs(seq_len: int) -> int:
    """Query-key pairs of causal attention over `seq_len` tokens, per head."""
    return seq_len * (seq_len + 1) // 2


def attention_flops(pairs: int, head_dim: int, v_head_dim: int | None = None) -> AttentionFlops:
    """FLOPs of attention over `pairs` query-key pairs.

    The forward has two matrix products, QK and PV. The backward has five: QK again, dP = dO V, dV = P dO,
    dQ = dS K and dK = dS Q. A multiply-add counts as two FLOPs; softmax is not counted, as is usual.
    """
    v_head_dim = head_dim if v_head_dim is None else v_head_dim
    return AttentionFlops(
        forward=2 * pairs * (head_dim + v_head_dim),
        backward=2 * pairs * (3 * head_dim + 2 * v_head_dim),
    )


class BlockPattern(ABC):
    """A causal block-sparse attention pattern: for each KV head, the key blocks that each query block sees.

    Blocks are numbered from 0 at the start of the sequence, or of the document in packed sequences. All
    query heads of a GQA group share the pattern of their KV head. The diagonal block is always visible.

    A pattern may have a head for each *query* head instead, where those of a group see different blocks. All
    that it says of KV heads is then said of query heads, as if each had keys and values of its own. That is
    how such a pattern is computed (`s2_attention`), stored (`KVCache`) and exchanged: keys and values are
    repeated for the query heads of their group.
    """

    num_kv_heads: int
    block_size: int

    @abstractmethod
    def row_blocks(self, head: int, row: int) -> list[int]:
        """Key blocks that query block `row` of KV head `head` sees, in ascending order; the last is `row`."""

    @abstractmethod
    def column_rows(self, head: int, block: int, num_blocks: int) -> Sequence[int]:
        """Query blocks among the first `num_blocks` that see key block `block`, in ascending order."""

    @abstractmethod
    def visible_blocks(self, head: int, row: int) -> int:
        """Number of key blocks that query block `row` of KV head `head` sees, including the diagonal."""

    @abstractmethod
    def _past_blocks(self, head: int, num_rows: int) -> int:
        """Number of visible key blocks before the diagonal, summed over query blocks 0 .. num_rows-1."""

    @abstractmethod
    def slice_heads(self, start: int, stop: int) -> BlockPattern:
        """Returns the pattern of KV heads `start` .. `stop`-1."""

    @abstractmethod
    def block_mask(self, num_blocks: int) -> torch.Tensor:
        """The whole pattern as a bool tensor `[num_kv_heads, num_blocks, num_blocks]` (query, key).

        For plots and tests only: its size is quadratic in the sequence length.
        """

    def num_blocks(self, seq_len: int) -> int:
        """Number of blocks that `seq_len` tokens occupy; the last one may be partly filled."""
        return -(-seq_len // self.block_size)

    def visible_pairs(self, seq_len: int) -> tuple[int, ...]:
        """Exact number of visible query-key token pairs per KV head, for one query head of its group.

        Each full row of B queries sees all keys of its past blocks. A last row of r < B tokens sees its past
        blocks with r queries. The diagonal block adds a triangle.
        """
        _require_seq_len(seq_len)
        B = self.block_size
        rows, tail = divmod(seq_len, B)
        triangles = rows * (B * (B + 1) // 2) + tail * (tail + 1) // 2
        return tuple(
            B * B * self._past_blocks(g, rows)
            + (B * tail * (self.visible_blocks(g, rows) - 1) if tail else 0)
            + triangles
            for g in range(self.num_kv_heads)
        )

    def flops(
        self, seq_len: int, num_query_heads: int, head_dim: int, v_head_dim: int | None = None
    ) -> AttentionFlops:
        """FLOPs of attention over one sequence of `seq_len` tokens, with `num_query_heads` query heads.

        Raises:
            ValueError: `num_query_heads` is not a multiple of the pattern's KV heads.
        """
        require(
            num_query_heads >= 1 and num_query_heads % self.num_kv_heads == 0,
            "num_query_heads",
            num_query_heads,
            f"a multiple of the pattern's {self.num_kv_heads} KV heads",
        )
        group = num_query_heads // self.num_kv_heads
        return attention_flops(group * sum(self.visible_pairs(seq_len)), head_dim, v_head_dim)

    def kv_tokens(self, seq_len: int) -> tuple[int, ...]:
        """Number of keys per KV head that the last of `seq_len` tokens sees.

        For an S2 pattern this is all that generation must keep: shard and window instead of `seq_len` keys.
        """
        _require_seq_len(seq_len)
        if seq_len == 0:
            return (0,) * self.num_kv_heads
        row = self.num_blocks(seq_len) - 1
        diagonal = seq_len - row * self.block_size
        return tuple(
            (self.visible_blocks(g, row) - 1) * self.block_size + diagonal for g in range(self.num_kv_heads)
        )

    def kv_bytes(self, seq_len: int, head_dim: int, bytes_per_element: int) -> int:
        """Bytes of the keys and values that the last of `seq_len` tokens sees, over all KV heads."""
        return 2 * head_dim * bytes_per_element * sum(self.kv_tokens(seq_len))

    def tp_slice(self, rank: int, size: int) -> BlockPattern:
        """Returns the part of this global pattern that tensor-parallel rank `rank` of `size` computes.

        With fewer KV heads than ranks, `size / num_kv_heads` neighbouring ranks hold the same KV head, as
        in Megatron. The model is therefore the same at every tensor-parallel size.

        Raises:
            ValueError: neither of KV heads and ranks divides the other, or `rank` is not below `size`.
        """
        H = self.num_kv_heads
        require(
            size >= 1 and (H % size == 0 or size % H == 0),
            "size",
            size,
            f"a divisor or a multiple of {H} KV heads",
        )
        require(0 <= rank < size, "rank", rank, f"between 0 and {size - 1}")
        if size > H:
            head = rank * H // size
            return self.slice_heads(head, head + 1)
        return self.slice_heads(rank * H // size, (rank + 1) * H // size)
