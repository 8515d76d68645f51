"""Keys and values for a pattern that has a head for each query head."""

from __future__ import annotations

from torch import Tensor

from megatron_s2.pattern import BlockPattern


def repeated_for(pattern: BlockPattern, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Returns `k` and `v` repeated for the query heads of their groups, if `pattern` has a head for each.

    They are copies, of heads / kv_heads times the size; the backward sums their gradients. A pattern of KV
    heads gets `k` and `v` as they are.

    Args:
        q: `[…, heads, head_dim]`.
        k, v: `[…, kv_heads, head_dim]`.
    """
    heads, kv_heads = q.shape[-2], k.shape[-2]
    if pattern.num_kv_heads != heads or heads % kv_heads or heads == kv_heads:
        return k, v
    return k.repeat_interleave(heads // kv_heads, -2), v.repeat_interleave(heads // kv_heads, -2)
