"""The exchange of the a2a schedule: from all heads of some tokens to some heads of all tokens, and back.

Each direction is the transpose of the other, and therefore its backward.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_s2.kernels.numerics import compute_dtype
from megatron_s2.parallel.collectives import ContextParallelGroup
from megatron_s2.parallel.gather_plan import Range
from megatron_s2.parallel.head_plan import HeadPlan
from megatron_s2.parallel.layout import Zigzag

HeadRanges = Sequence[Sequence[Range]]  # [ranks][…], the heads that each rank computes


class ToHeads(torch.autograd.Function):
    """Maps q, k, v from `[batch, local_tokens, heads, head_dim]` to `[batch, tokens, local_heads, head_dim]`.

    Query heads are in the order of `plan.query_heads(rank)`, KV heads in that of `plan.kv_heads(rank)`.
    """

    @staticmethod
    def forward(ctx, q, k, v, plan: HeadPlan, zigzag: Zigzag, group: ContextParallelGroup):
        ctx.rest = plan, zigzag, group, [x.shape[2] for x in (q, k, v)]
        return tuple(_to_heads([q, k, v], _qkv_ranges(plan), zigzag, group))

    @staticmethod
    @once_differentiable
    def backward(ctx, dq, dk, dv):
        plan, zigzag, group, heads = ctx.rest
        grads = _from_heads([dq, dk, dv], _qkv_ranges(plan), heads, zigzag, group)
        return *grads, None, None, None


class FromHeads(torch.autograd.Function):
    """Maps out from `[batch, tokens, local_heads, head_dim]` to `[batch, local_tokens, heads, head_dim]`."""

    @staticmethod
    def forward(ctx, out, plan: HeadPlan, zigzag: Zigzag, group: ContextParallelGroup):
        ctx.rest = plan, zigzag, group
        heads = sum(stop - start for ranges in _query_ranges(plan) for start, stop in ranges)
        return _from_heads([out], [_query_ranges(plan)], [heads], zigzag, group)[0]

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        plan, zigzag, group = ctx.rest
        return _to_heads([dout], [_query_ranges(plan)], zigzag, group)[0], None, None, None


def _query_ranges(plan: HeadPlan) -> HeadRanges:
    return [[(share.start, share.stop) for share in shares] for shares in plan.shares]


def _qkv_ranges(plan: HeadPlan) -> list[HeadRanges]:
    kv = [[(share.kv_head, share.kv_head + 1) for share in shares] for shares in plan.shares]
    return [_query_ranges(plan), kv, kv]


def _count(ranges: Sequence[Range]) -> int:
    return sum(stop - start for start, stop in ranges)


def _to_heads(
    tensors: Sequence[Tensor], ranges: Sequence[HeadRanges], zigzag: Zigzag, group: ContextParallelGroup
) -> list[Tensor]:
    """Sends each rank its heads of the local tokens: `[batch, tokens, local_heads, head_dim]` for each."""
    parts, send = [], []
    for rank in range(group.ranks):
        for_rank = [
            x[:, :, start:stop].flatten()
            for x, by_rank in zip(tensors, ranges)
            for start, stop in by_rank[rank]
        ]
        parts += for_rank
        send.append(sum(part.numel() for part in for_rank))
    shapes = [
        [(x.shape[0], x.shape[1], stop - start, x.shape[3]) for start, stop in by_rank[group.rank]]
        for x, by_rank in zip(tensors, ranges)
    ]
    sizes = [torch.Size(shape).numel() for of_tensor in shapes for shape in of_tensor]
    received = group.all_to_all(torch.cat(parts), send, [sum(sizes)] * group.ranks).wait()
    heads = iter(received.view(group.ranks, -1).split(sizes, 1))
    return [
        _in_sequence(torch.cat([next(heads).unflatten(1, shape) for shape in of_tensor], 3), zigzag)
        for of_tensor in shapes
    ]


def _from_heads(
    tensors: Sequence[Tensor],
    ranges: Sequence[HeadRanges],
    heads: Sequence[int],
    zigzag: Zigzag,
    group: ContextParallelGroup,
) -> list[Tensor]:
    """Sends each rank its tokens of the local heads: `[batch, local_tokens, heads, head_dim]` for each.

    Values of one head that come from several ranks are added in float32 (float64 for float64 tensors), in
    the order of the ranks.
    """
    batch = tensors[0].shape[0]
    parts = torch.cat([_by_rank(x, zigzag).flatten(1) for x in tensors], 1)  # [ranks, elements for the rank]
    local = batch * zigzag.local_tokens
    counts = [
        [local * _count(by_rank[rank]) * x.shape[-1] for by_rank, x in zip(ranges, tensors)]
        for rank in range(group.ranks)
    ]
    send = [sum(counts[group.rank])] * group.ranks
    received = group.all_to_all(parts.flatten(), send, [sum(count) for count in counts]).wait()
    received_parts = iter(received.split([count for of_rank in counts for count in of_rank]))
    totals = [
        x.new_zeros(batch, zigzag.local_tokens, count, x.shape[-1], dtype=compute_dtype(x.dtype))
        for x, count in zip(tensors, heads)
    ]
    for rank in range(group.ranks):
        for total, by_rank in zip(totals, ranges):
            part = next(received_parts).view(batch, zigzag.local_tokens, -1, total.shape[-1])
            widths = [stop - start for start, stop in by_rank[rank]]
            for (start, stop), heads_of_range in zip(by_rank[rank], part.split(widths, 2)):
                total[:, :, start:stop] += heads_of_range
    return [total.to(x.dtype) for total, x in zip(totals, tensors)]


def _in_sequence(x: Tensor, zigzag: Zigzag) -> Tensor:
    """Reorders `[ranks, batch, local_tokens, …]` to the sequence `[batch, tokens, …]`."""
    chunks = x.unflatten(2, (2, zigzag.chunk)).transpose(0, 1).flatten(1, 2)  # [batch, ranks * 2, chunk, …]
    return torch.cat([chunks[:, index] for index in zigzag.chunk_order()], 1)


def _by_rank(x: Tensor, zigzag: Zigzag) -> Tensor:
    """Reorders the sequence `[batch, tokens, …]` to `[ranks, batch, local_tokens, …]`."""
    chunks = x.unflatten(1, (2 * zigzag.ranks, zigzag.chunk))
    last = 2 * zigzag.ranks - 1
    return torch.stack([torch.cat([chunks[:, r], chunks[:, last - r]], 1) for r in range(zigzag.ranks)])
