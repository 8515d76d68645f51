"""Moving heads between ranks: from all heads of some tokens to some heads of all tokens, and back.

The two directions are each other's transpose, so each is the other's backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_s2.kernels.numerics import compute_dtype
from megatron_s2.parallel.assignment import HeadPlan
from megatron_s2.parallel.exchange import Exchange
from megatron_s2.parallel.layout import Zigzag

Ranges = Sequence[Sequence[tuple[int, int]]]  # [ranks][…] (start, stop) of the heads that a rank computes


class ToHeads(torch.autograd.Function):
    """q, k, v `[batch, local_tokens, heads, head_dim]` to `[batch, tokens, own heads, head_dim]`.

    Query heads come as in `plan.query_heads(rank)`, KV heads as in `plan.kv_heads(rank)`.
    """

    @staticmethod
    def forward(ctx, q, k, v, plan: HeadPlan, zigzag: Zigzag, exchange: Exchange):
        ctx.rest = plan, zigzag, exchange, [x.shape[2] for x in (q, k, v)]
        return tuple(_to_heads([q, k, v], _q_k_v(plan), zigzag, exchange))

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv):
        plan, zigzag, exchange, heads = ctx.rest
        grads = _from_heads([dq, dk, dv], _q_k_v(plan), heads, zigzag, exchange)
        return *grads, None, None, None


class FromHeads(torch.autograd.Function):
    """out `[batch, tokens, own query heads, head_dim]` to `[batch, local_tokens, heads, head_dim]`."""

    @staticmethod
    def forward(ctx, out, plan: HeadPlan, zigzag: Zigzag, exchange: Exchange):
        ctx.rest = plan, zigzag, exchange
        heads = sum(stop - start for ranges in _query_ranges(plan) for start, stop in ranges)
        return _from_heads([out], [_query_ranges(plan)], [heads], zigzag, exchange)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        plan, zigzag, exchange = ctx.rest
        return _to_heads([dout], [_query_ranges(plan)], zigzag, exchange)[0], None, None, None


def _query_ranges(plan: HeadPlan) -> Ranges:
    return [[(share.start, share.stop) for share in shares] for shares in plan.shares]


def _q_k_v(plan: HeadPlan) -> list[Ranges]:
    kv = [[(share.kv_head, share.kv_head + 1) for share in shares] for shares in plan.shares]
    return [_query_ranges(plan), kv, kv]


def _count(ranges: Sequence[tuple[int, int]]) -> int:
    return sum(stop - start for start, stop in ranges)


def _to_heads(
    tensors: Sequence[Tensor], ranges: Sequence[Ranges], zigzag: Zigzag, exchange: Exchange
) -> list[Tensor]:
    """Sends each rank its heads of this rank's tokens: `[batch, tokens, own heads, head_dim]` for each."""
    parts, send = [], []
    for rank in range(exchange.ranks):
        mine = [
            x[:, :, start:stop].flatten()
            for x, by_rank in zip(tensors, ranges)
            for start, stop in by_rank[rank]
        ]
        parts += mine
        send.append(sum(part.numel() for part in mine))
    shapes = [
        [(x.shape[0], x.shape[1], stop - start, x.shape[3]) for start, stop in by_rank[exchange.rank]]
        for x, by_rank in zip(tensors, ranges)
    ]
    sizes = [torch.Size(shape).numel() for kind in shapes for shape in kind]
    received = exchange.all_to_all(torch.cat(parts), send, [sum(sizes)] * exchange.ranks).wait()
    pieces = iter(received.view(exchange.ranks, -1).split(sizes, 1))
    return [
        _in_sequence(torch.cat([next(pieces).unflatten(1, shape) for shape in kind], 3), zigzag)
        for kind in shapes
    ]


def _from_heads(
    tensors: Sequence[Tensor],
    ranges: Sequence[Ranges],
    heads: Sequence[int],
    zigzag: Zigzag,
    exchange: Exchange,
) -> list[Tensor]:
    """Sends each rank its tokens of the heads here: `[batch, local_tokens, heads, head_dim]` for each.

    What several ranks send for one head is added in float32 (float64), rank after rank.
    """
    batch, mine = tensors[0].shape[0], exchange.rank
    by_rank = [_by_rank(x, zigzag) for x in tensors]
    parts = torch.cat([x.flatten(1) for x in by_rank], 1)  # [ranks, elements for that rank]
    local = batch * zigzag.local_tokens
    counts = [
        [local * _count(kind[rank]) * x.shape[-1] for kind, x in zip(ranges, tensors)]
        for rank in range(exchange.ranks)
    ]
    received = exchange.all_to_all(
        parts.flatten(), [sum(counts[mine])] * exchange.ranks, [sum(count) for count in counts]
    ).wait()
    pieces = iter(received.split([count for rank in counts for count in rank]))
    totals = [
        x.new_zeros(batch, zigzag.local_tokens, n, x.shape[-1], dtype=compute_dtype(x.dtype))
        for x, n in zip(tensors, heads)
    ]
    for rank in range(exchange.ranks):
        for total, kind in zip(totals, ranges):
            part = next(pieces).view(batch, zigzag.local_tokens, -1, total.shape[-1])
            edges = [0]
            for start, stop in kind[rank]:
                edges.append(edges[-1] + stop - start)
            for (start, stop), (a, b) in zip(kind[rank], pairwise(edges)):
                total[:, :, start:stop] += part[:, :, a:b]
    return [total.to(x.dtype) for total, x in zip(totals, tensors)]


def _in_sequence(x: Tensor, zigzag: Zigzag) -> Tensor:
    """`[ranks, batch, local_tokens, …]` in the order of the sequence: `[batch, tokens, …]`."""
    chunks = x.unflatten(2, (2, zigzag.chunk)).transpose(0, 1).flatten(1, 2)  # [batch, ranks * 2, chunk, …]
    return torch.cat([chunks[:, place] for place in zigzag.chunk_places()], 1)


def _by_rank(x: Tensor, zigzag: Zigzag) -> Tensor:
    """`[batch, tokens, …]` as `[ranks, batch, local_tokens, …]`."""
    chunks = x.unflatten(1, (2 * zigzag.ranks, zigzag.chunk))
    last = 2 * zigzag.ranks - 1
    return torch.stack([torch.cat([chunks[:, r], chunks[:, last - r]], 1) for r in range(zigzag.ranks)])
