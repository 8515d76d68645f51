"""One flash attention with its log-sum-exp, and its backward, on any device.

q is `[batch, heads, rows, dim]`; k and v are `[batch, kv_heads, keys, dim]` of any strides and may be
overlapping views. Query head h reads KV head h // (heads / kv_heads). Masks are additive. PyTorch's CPU
kernel returns the log-sum-exp; on other devices scores are computed in chunks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_MAX_SCORES = 1 << 24  # elements of the scores of a chunk of rows


def flash_forward(q, k, v, scale, causal=False, mask=None) -> tuple[Tensor, Tensor]:
    forward = _cpu_forward if q.device.type == "cpu" else _matmul_forward
    return forward(q, k, v, scale, causal, mask)


def flash_backward(dout, q, k, v, out, lse, scale, causal=False, mask=None) -> tuple[Tensor, Tensor, Tensor]:
    backward = _cpu_backward if q.device.type == "cpu" else _matmul_backward
    return backward(dout, q, k, v, out, lse, scale, causal, mask)


def _cpu_forward(q, k, v, scale, causal, mask):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        q, k, v, 0.0, causal, attn_mask=mask, scale=scale
    )


def _cpu_backward(dout, q, k, v, out, lse, scale, causal, mask):
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
        dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
    )


def _matmul_forward(q, k, v, scale, causal, mask):
    out, lse = q.new_empty(q.shape), q.new_empty(q.shape[:-1])
    k, v = (_expand_heads(x, q.shape[1]) for x in (k, v))
    for rows in _row_chunks(q, k):
        scores = _scores(q, k, scale, causal, mask, rows)
        lse[:, :, rows] = scores.logsumexp(-1)
        out[:, :, rows] = (scores - lse[:, :, rows, None]).exp() @ v
    return out, lse


def _matmul_backward(dout, q, k, v, out, lse, scale, causal, mask):
    kv_heads = k.shape[1]
    k, v = (_expand_heads(x, q.shape[1]) for x in (k, v))
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for rows in _row_chunks(q, k):
        do = dout[:, :, rows]
        delta = (do * out[:, :, rows]).sum(-1, keepdim=True)
        p = (_scores(q, k, scale, causal, mask, rows) - lse[:, :, rows, None]).exp()
        ds = p * (do @ v.transpose(-1, -2) - delta) * scale
        dq[:, :, rows] = ds @ k
        dk += ds.transpose(-1, -2) @ q[:, :, rows]
        dv += p.transpose(-1, -2) @ do
    return dq, _sum_heads(dk, kv_heads), _sum_heads(dv, kv_heads)


def _row_chunks(q: Tensor, k: Tensor) -> Iterator[slice]:
    rows = max(1, _MAX_SCORES // (q.shape[0] * q.shape[1] * k.shape[2]))
    return (slice(a, min(a + rows, q.shape[2])) for a in range(0, q.shape[2], rows))


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, mask: Tensor | None, rows: slice) -> Tensor:
    scores = q[:, :, rows] @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores += mask[:, :, rows]
    if causal:
        queries = torch.arange(rows.start, rows.stop, device=q.device)
        keys = torch.arange(k.shape[2], device=q.device)
        scores.masked_fill_(keys > queries[:, None], float("-inf"))
    return scores


def _expand_heads(x: Tensor, heads: int) -> Tensor:
    """Repeats each KV head of K or V for its query heads; a view if x has one KV head."""
    return x[:, :, None].expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)


def _sum_heads(grad: Tensor, kv_heads: int) -> Tensor:
    """Gradient of x from the gradient of `_expand_heads(x, heads)`."""
    return grad.unflatten(1, (kv_heads, -1)).sum(2)
