"""Dense masked S2 attention, written from the definition; tests compare every other backend with it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from megatron_s2.kernels.numerics import compute_dtype
from megatron_s2.pattern import BlockPattern


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    softmax_scale: float,
    sink_logits: Tensor | None,
    documents: Sequence[tuple[int, int]],
    q_start: int,
) -> tuple[Tensor, Tensor]:
    """S2 attention through a full score matrix, in `compute_dtype`.

    Args:
        q: `[batch, seq_q, heads, head_dim]`.
        k: `[batch, seq_k, kv_heads, head_dim]`.
        v: `[batch, seq_k, kv_heads, v_head_dim]`.
        pattern: block visibility, restarting at each document.
        softmax_scale: factor on the scores.
        sink_logits: `[heads]` or None.
        documents: token range (start, stop) of each packed document.
        q_start: position of the first query; 0 if there are several documents.

    Returns:
        out `[batch, seq_q, heads, v_head_dim]` in the dtype of q, and lse `[batch, heads, seq_q]`.
    """
    dtype = compute_dtype(q.dtype)
    out, lse = masked_attention(
        *(x.to(dtype) for x in (q, k, v)),
        visible_tokens(pattern, q.shape[1], k.shape[1], documents, q_start).to(q.device),
        softmax_scale,
        None if sink_logits is None else sink_logits.to(dtype),
    )
    return out.to(q.dtype), lse


def visible_tokens(
    pattern: BlockPattern, seq_q: int, seq_k: int, documents: Sequence[tuple[int, int]], q_start: int
) -> Tensor:
    """Returns bool `[kv_heads, seq_q, seq_k]`: which keys each query sees."""
    visible = torch.zeros(pattern.num_kv_heads, seq_q, seq_k, dtype=torch.bool)
    for start, stop in documents:
        length = stop - start + q_start
        blocks = pattern.block_mask(pattern.num_blocks(length))
        tokens = blocks.repeat_interleave(pattern.block_size, 1).repeat_interleave(pattern.block_size, 2)
        causal = torch.ones(length, length, dtype=torch.bool).tril()
        visible[:, start:stop, start : start + length] = (tokens[:, :length, :length] & causal)[:, q_start:]
    return visible


def masked_attention(
    q: Tensor, k: Tensor, v: Tensor, visible: Tensor, softmax_scale: float, sink_logits: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Masked softmax attention in the dtype of its inputs; shapes as in `reference_attention`."""
    group = q.shape[2] // k.shape[2]
    k, v, visible = (
        k.repeat_interleave(group, 2),
        v.repeat_interleave(group, 2),
        visible.repeat_interleave(group, 0),
    )
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * softmax_scale
    scores = scores.masked_fill(~visible, float("-inf"))
    if sink_logits is not None:
        sinks = sink_logits[None, :, None, None].expand(*scores.shape[:3], 1)
        lse = torch.cat([scores, sinks], -1).logsumexp(-1)
    else:
        lse = scores.logsumexp(-1)
    return torch.einsum("bhqk,bkhd->bqhd", (scores - lse[..., None]).exp(), v), lse
