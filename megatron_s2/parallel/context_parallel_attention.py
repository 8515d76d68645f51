"""S2 attention over context-parallel ranks, each of which stores two chunks of the sequence (zigzag).

`gather`: queries stay; an all-gather brings the keys and values of the shards, and neighbours send halos for
the windows, which are computed while the all-gather runs. `a2a`: each rank computes some heads over the whole
sequence. Both are exact, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_s2.kernels import s2_attention
from megatron_s2.kernels.backends import choose_backend, slice_class
from megatron_s2.kernels.numerics import compute_dtype, merge_sink, sink_gradient
from megatron_s2.kernels.query_heads import repeated_for
from megatron_s2.kernels.slice import SequenceSlice
from megatron_s2.parallel.collectives import ContextParallelGroup
from megatron_s2.parallel.cost import AttentionCall, ExchangeBytes, exchange_bytes, plan_heads
from megatron_s2.parallel.gather_plan import (
    GROUP_TOKENS,
    Documents,
    GatherPlan,
    HeadGroup,
    QuerySlice,
    plan_gather,
)
from megatron_s2.parallel.head_exchange import FromHeads, ToHeads
from megatron_s2.parallel.head_plan import HeadPlan
from megatron_s2.parallel.layout import Zigzag
from megatron_s2.parallel.shard_exchange import KeysValues, ShardExchange
from megatron_s2.pattern import S2Pattern


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: S2Pattern,
    group: ContextParallelGroup,
    schedule: str,
    softmax_scale: float | None = None,
    sink_logits: Tensor | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
    group_tokens: int = GROUP_TOKENS,
) -> Tensor:
    """Causal S2 attention over a sequence whose tokens are spread over the ranks of a group (zigzag).

    Args:
        q: queries of this rank `[batch, local_tokens, heads, head_dim]`: chunks r and 2P-1-r of the sequence.
        k: keys of this rank `[batch, local_tokens, kv_heads, head_dim]`.
        v: values of this rank `[batch, local_tokens, kv_heads, v_head_dim]`.
        pattern: pattern of these KV heads; or of the query heads, whose keys and values are then exchanged as
            if they were not shared.
        group: context-parallel group of the layer.
        schedule: `gather` or `a2a`.
        softmax_scale, sink_logits, backend: as in `s2_attention`.
        documents: (start, stop) of each packed document in the whole sequence, at which the pattern restarts.
        group_tokens: shard tokens, summed over KV heads, that `gather` moves at a time (`head_groups`); the
            same on all ranks.

    Returns:
        `[batch, local_tokens, heads, v_head_dim]` in the dtype of `q`, differentiable.

    Raises:
        ValueError: an argument does not fit the others; the message starts with its name.
        PeerLostError: another rank of the group died or does not answer.
    """
    if schedule not in ("gather", "a2a"):
        raise ValueError(f"schedule {schedule!r}: must be gather or a2a")
    kv_heads = k.shape[2]
    k, v = repeated_for(pattern, q, k, v)
    call = AttentionCall(
        ranks=group.ranks,
        tokens=q.shape[1] * group.ranks,
        batch=q.shape[0],
        query_heads=q.shape[2],
        head_dim=q.shape[3],
        v_head_dim=v.shape[3],
        element_size=q.element_size(),
        group_tokens=group_tokens,
        kv_group=k.shape[2] // kv_heads,
    )
    zigzag = call.zigzag
    documents = documents or ((0, zigzag.tokens),)
    if documents[-1][1] != zigzag.tokens:
        raise ValueError(f"documents {documents[-1:]}: must end at the sequence's {zigzag.tokens} tokens")
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    plan = None
    if schedule == "gather":
        plan = plan_gather(pattern, zigzag, group.rank, documents, group_tokens)
    if plan is None or len(documents) == 1:
        predicted = exchange_bytes(schedule, pattern, call, group.rank)
    else:
        predicted = _packed_bytes(plan, pattern.num_kv_heads, call)
    group.traffic.predict(group.layer, predicted.forward_received)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        group.traffic.predict(group.layer, predicted.backward_received)
    if plan is not None:
        backend_slice = slice_class(choose_backend(backend, q, v))

        def make_slice(of_heads: S2Pattern, *positions) -> SequenceSlice:
            return backend_slice(of_heads, scale, *positions)

        return _GatherAttention.apply(q, k, v, sink_logits, plan, make_slice, group)
    heads = plan_heads(pattern, call)
    return _attend_by_head(q, k, v, pattern, scale, sink_logits, documents, backend, heads, zigzag, group)


def _packed_bytes(plan: GatherPlan, kv_heads: int, call: AttentionCall) -> ExchangeBytes:
    """`exchange_bytes` of the gather schedule for a plan with several documents."""
    unit = plan.unit * call.key_value_bytes
    gathered = (call.ranks - 1) * plan.width * unit
    received, sent = (
        gathered + (sum(counts) - counts[plan.rank]) * kv_heads * unit
        for counts in (plan.recv_counts, plan.send_counts)
    )
    return ExchangeBytes(received, sent, backward_received=sent, backward_sent=received)


# ---------------------------------------------------------------------------------------------------------
# gather


class _GatherAttention(torch.autograd.Function):
    """Gathers the shards of one group of heads after another, and returns their gradients in the same way, so
    that the memory of the messages and gradients is that of one group."""

    @staticmethod
    def forward(ctx, q, k, v, sink_logits, plan, make_slice, group):
        shards = ShardExchange(group, plan, q.device)
        halo = shards.start_halo(k, v)
        gathering = shards.start_gather(0, k, v)
        compute, dims = compute_dtype(q.dtype), [k.shape[-1], v.shape[-1]]
        out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=compute)
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=compute)

        halo = shards.unpack_halo(halo.wait())
        windows, gathered = shards.windows(k, v, halo), []
        for n, heads in enumerate(_by_group(plan, make_slice, q.shape[2] // k.shape[2])):
            heads.forward("window", q, windows, out, lse)
            gathered.append(shards.unpack_shard(n, gathering.wait()))
            # The next group arrives while attention over this one is computed.
            gathering = shards.start_gather(n + 1, k, v) if n + 1 < len(plan.groups) else None
            heads.forward("shard", q, gathered[n].split(dims, -1), out, lse)

        if sink_logits is not None:
            lse = merge_sink(out, lse, sink_logits)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sink_logits, out, lse, halo, *gathered)
        ctx.make_slice, ctx.shards = make_slice, shards
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, sink_logits, out, lse, halo, *gathered = ctx.saved_tensors
        shards, compute = ctx.shards, lse.dtype
        dq = torch.zeros_like(q, dtype=compute)
        query_side = dout, q, out, lse, dq
        windows = shards.windows(k, v, halo)
        dwindows = [[torch.zeros_like(x, dtype=compute) for x in kv] for kv in windows]
        totals = []
        for n, heads in enumerate(_by_group(shards.plan, ctx.make_slice, q.shape[2] // k.shape[2])):
            packed = _shard_gradients(heads, shards, n, query_side, gathered[n], k.shape[-1])
            returning = shards.start_shard_return(n, packed)
            heads.backward("window", *query_side, windows, dwindows)
            totals.append(shards.summed(n, returning.wait(), compute))
            del packed, returning  # before the next group's
        halo_grads = shards.start_halo_return(dwindows, k.dtype)

        dk, dv = (torch.cat(chunks, 1) for chunks in zip(*shards.without_halos(dwindows)))
        shards.add_halo(halo_grads.wait(), dk, dv)
        for n, total in enumerate(totals):
            shards.add_shard(n, total, dk, dv)
        dsinks = None
        if sink_logits is not None:
            delta = (dout.to(compute) * out).sum(-1).transpose(1, 2)
            dsinks = sink_gradient(sink_logits, lse, delta)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None, None, None


def _shard_gradients(
    heads: _GroupSlices,
    shards: ShardExchange,
    group: int,
    query_side: Sequence[Tensor],
    gathered: Tensor,
    head_dim: int,
) -> Tensor:
    """Returns the gradients of the gathered shards of a group as they are sent; adds to dq.

    The float32 gradients are freed before they are sent.
    """
    dims = [head_dim, gathered.shape[-1] - head_dim]
    dshard = torch.zeros_like(gathered, dtype=query_side[-1].dtype)
    heads.backward("shard", *query_side, gathered.split(dims, -1), dshard.split(dims, -1))
    return shards.pack_shard_gradients(group, dshard, gathered.dtype)


class _GroupSlices:
    """Attention of one group of heads: the slices of the plan in the backend's form.

    Query-side tensors are those of all heads. Keys and values, and their gradients, are the windows of both
    chunks with all heads, or the gathered shards of the group.
    """

    def __init__(self, plan: GatherPlan, group: HeadGroup, make_slice: Callable, query_heads: int) -> None:
        self._heads = slice(*(g * query_heads for g in group.heads))
        self._kv_heads = slice(*group.heads)
        self._slices = [
            (s, make_slice(group.pattern, s.q_start, s.q_stop, s.keys_start, group.shards(s.document)))
            for s in plan.slices
        ]

    def forward(self, source: str, q: Tensor, kv: Sequence, out: Tensor, lse: Tensor) -> None:
        h = self._heads
        for s, attend in self._slices:
            t = slice(s.start, s.stop)
            attend.forward(source, q[:, t, h], *self._keys(source, s, kv), out[:, t, h], lse[:, h, t])

    def backward(
        self,
        source: str,
        dout: Tensor,
        q: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        kv: Sequence,
        dkv: Sequence,
    ) -> None:
        h = self._heads
        for s, attend in self._slices:
            t = slice(s.start, s.stop)
            k, v = self._keys(source, s, kv)
            dk, dv = self._keys(source, s, dkv)
            attend.backward(
                source, dout[:, t, h], q[:, t, h], k, v, out[:, t, h], lse[:, h, t], dq[:, t, h], dk, dv
            )

    def _keys(self, source: str, s: QuerySlice, kv: Sequence) -> KeysValues:
        if source == "shard":
            return kv
        return [x[:, slice(*s.keys), self._kv_heads] for x in kv[s.chunk]]


def _by_group(plan: GatherPlan, make_slice: Callable, query_heads: int) -> Iterator[_GroupSlices]:
    """Yields the slices of each group of heads; `query_heads` is the number of them for a KV head."""
    return (_GroupSlices(plan, group, make_slice, query_heads) for group in plan.groups)


# ---------------------------------------------------------------------------------------------------------
# a2a


def _attend_by_head(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: S2Pattern,
    scale: float,
    sink_logits: Tensor | None,
    documents: Documents,
    backend: str,
    heads: HeadPlan,
    zigzag: Zigzag,
    group: ContextParallelGroup,
) -> Tensor:
    q, k, v = ToHeads.apply(q, k, v, heads, zigzag, group)
    batch, boundaries = q.shape[0], None
    if len(documents) > 1:
        boundaries = [b * zigzag.tokens + stop for b in range(batch) for _, stop in documents]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    outs, first, kv_first = [], 0, 0
    # All shares have the same number of query heads unless groups were split.
    for size, equal in groupby(heads.shares[group.rank], key=lambda share: share.stop - share.start):
        shares = list(equal)
        stop, kv_stop = first + size * len(shares), kv_first + len(shares)
        sinks = None
        if sink_logits is not None:
            sinks = torch.cat([sink_logits[share.start : share.stop] for share in shares])
        outs.append(
            s2_attention(
                q[..., first:stop, :],
                k[..., kv_first:kv_stop, :],
                v[..., kv_first:kv_stop, :],
                pattern.select_heads([share.kv_head for share in shares]),
                softmax_scale=scale,
                sink_logits=sinks,
                cu_seqlens=boundaries and [0, *boundaries],
                return_lse=False,
                backend=backend,
            )
        )
        first, kv_first = stop, kv_stop
    out = torch.cat(outs, -2)
    return FromHeads.apply(out.unflatten(0, (batch, -1)) if boundaries else out, heads, zigzag, group)
