"""S2 attention over context-parallel ranks, each of which stores two chunks of the sequence (zigzag).

`gather`: queries stay; an all-gather brings the keys and values of the shards, and neighbours send halos for
the windows, which are computed while the all-gather runs. `a2a`: each rank computes some heads over the whole
sequence. Both are exact, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import groupby

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_s2.kernels import s2_attention
from megatron_s2.kernels.backends import choose_backend, slice_class
from megatron_s2.kernels.numerics import compute_dtype, merge_sink, sink_gradient
from megatron_s2.kernels.slice import SequenceSlice
from megatron_s2.parallel.collectives import ContextParallelGroup
from megatron_s2.parallel.cost import AttentionCall, ExchangeBytes, exchange_bytes, plan_heads
from megatron_s2.parallel.gather_plan import Documents, GatherPlan, Range, plan_gather
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
) -> Tensor:
    """Causal S2 attention over a sequence whose tokens are spread over the ranks of a group (zigzag).

    Args:
        q: queries of this rank `[batch, local_tokens, heads, head_dim]`: chunks r and 2P-1-r of the sequence.
        k: keys of this rank `[batch, local_tokens, kv_heads, head_dim]`.
        v: values of this rank `[batch, local_tokens, kv_heads, v_head_dim]`.
        pattern: pattern of these KV heads.
        group: context-parallel group of the layer.
        schedule: `gather` or `a2a`.
        softmax_scale, sink_logits, backend: as in `s2_attention`.
        documents: (start, stop) of each packed document in the whole sequence, at which the pattern restarts.

    Returns:
        `[batch, local_tokens, heads, v_head_dim]` in the dtype of `q`, differentiable.

    Raises:
        ValueError: an argument does not fit the others; the message starts with its name.
        PeerLostError: another rank of the group died or does not answer.
    """
    if schedule not in ("gather", "a2a"):
        raise ValueError(f"schedule {schedule!r}: must be gather or a2a")
    call = AttentionCall(
        ranks=group.ranks,
        tokens=q.shape[1] * group.ranks,
        batch=q.shape[0],
        query_heads=q.shape[2],
        head_dim=q.shape[3],
        v_head_dim=v.shape[3],
        element_size=q.element_size(),
    )
    zigzag = call.zigzag
    documents = documents or ((0, zigzag.tokens),)
    if documents[-1][1] != zigzag.tokens:
        raise ValueError(f"documents {documents[-1:]}: must end at the sequence's {zigzag.tokens} tokens")
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    plan = plan_gather(pattern, zigzag, group.rank, documents) if schedule == "gather" else None
    if plan is None or len(documents) == 1:
        predicted = exchange_bytes(schedule, pattern, call, group.rank)
    else:
        predicted = _packed_bytes(plan, pattern.num_kv_heads, call)
    group.traffic.predict(group.layer, predicted.forward_received)
    if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
        group.traffic.predict(group.layer, predicted.backward_received)
    if plan is not None:
        make_slice = partial(slice_class(choose_backend(backend, q, v)), pattern, scale)
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
    @staticmethod
    def forward(ctx, q, k, v, sink_logits, plan, make_slice, group):
        shards = ShardExchange(group, plan, q.device)
        halo = shards.start_halo(k, v)
        gathered = shards.start_gather(k, v)
        compute = compute_dtype(q.dtype)
        out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=compute)
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=compute)

        halo = shards.unpack_halo(halo.wait())
        windows = shards.windows(k, v, halo)
        for part, (a, b), kv in _slices(plan, make_slice, windows):
            part.forward("window", q[:, a:b], *kv, out[:, a:b], lse[:, :, a:b])
        shard = shards.unpack_shard(gathered.wait())
        shard_kv = shard.split([k.shape[-1], v.shape[-1]], -1)
        for part, (a, b), _ in _slices(plan, make_slice, windows):
            part.forward("shard", q[:, a:b], *shard_kv, out[:, a:b], lse[:, :, a:b])

        if sink_logits is not None:
            lse = merge_sink(out, lse, sink_logits)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sink_logits, out, lse, halo, shard)
        ctx.make_slice, ctx.shards = make_slice, shards
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, sink_logits, out, lse, halo, shard = ctx.saved_tensors
        make_slice, shards = ctx.make_slice, ctx.shards
        plan = shards.plan
        compute, dims = lse.dtype, [k.shape[-1], v.shape[-1]]
        dq = torch.zeros_like(q, dtype=compute)

        windows = shards.windows(k, v, halo)
        dshard = torch.zeros_like(shard, dtype=compute)
        shard_kv, dshard_kv = shard.split(dims, -1), dshard.split(dims, -1)
        slices = list(_slices(plan, make_slice, windows))
        for part, (a, b), _ in slices:
            inputs = dout[:, a:b], q[:, a:b], *shard_kv, out[:, a:b], lse[:, :, a:b]
            part.backward("shard", *inputs, dq[:, a:b], *dshard_kv)
        shard_grads = shards.start_shard_return(dshard.to(k.dtype))

        dwindows = [[torch.zeros_like(x, dtype=compute) for x in kv] for kv in windows]
        for (part, (a, b), kv), (_, _, dkv) in zip(slices, _slices(plan, make_slice, dwindows)):
            inputs = dout[:, a:b], q[:, a:b], *kv, out[:, a:b], lse[:, :, a:b]
            part.backward("window", *inputs, dq[:, a:b], *dkv)
        halo_grads = shards.start_halo_return(dwindows, k.dtype)

        dk, dv = (torch.cat(chunks, 1) for chunks in zip(*shards.without_halos(dwindows)))
        shards.add_halo(halo_grads.wait(), dk, dv)
        shards.add_shard(shard_grads.wait(), dk, dv)
        dsinks = None
        if sink_logits is not None:
            delta = (dout.to(compute) * out).sum(-1).transpose(1, 2)
            dsinks = sink_gradient(sink_logits, lse, delta)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None, None, None


def _slices(
    plan: GatherPlan, make_slice: Callable, windows: Sequence[KeysValues]
) -> Iterator[tuple[SequenceSlice, Range, KeysValues]]:
    """Yields each slice of the plan in the backend's form, the range of its queries, and its window."""
    for s in plan.slices:
        yield (
            make_slice(s.q_start, s.q_stop, s.keys_start, plan.shards[s.document]),
            (s.start, s.stop),
            [x[:, slice(*s.keys)] for x in windows[s.chunk]],
        )


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
