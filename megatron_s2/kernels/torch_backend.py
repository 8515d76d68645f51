"""S2 attention in plain PyTorch: blocked, linear memory, forward and backward.

What a query sees is cut into calls that need (almost) no mask, planned by `plan_head`:

    Causal    queries and keys over the same tokens: where the window still reaches the sequence's start,
              dense heads, and ragged ends
    Band      full rows with a full window: one batched call, row i against its `local_blocks` key blocks
              through an overlapping view of K/V, masked in the diagonal block alone
    Past      queries against keys they see all of. Between two consecutive blocks of the shard every row
              sees the same *prefix* of it, so a segment of `vert_stride` rows is one call without a mask
    Gathered  the same for one row of an arbitrary mask, its blocks picked by index

Each call is one flash attention over its keys; results merge by log-sum-exp. The backward of a flash kernel
needs only the *merged* output and log-sum-exp to give the part of the gradient that its keys contribute, so
backward runs the same calls and adds up. Nothing is kept but q, k, v, out and lse, and no array grows with
the square of the sequence.

Queries of a GQA group lie next to each other (`[tokens, group, head_dim]`), so for calls without a causal
mask the group folds into the rows and K/V are read once for all of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_s2.pattern import BlockPattern, S2Pattern

# ---------------------------------------------------------------------------------------------------------
# Plan: pure integers. Positions are tokens from the start of the document; shard keys count in the shard.


@dataclass(frozen=True)
class Causal:
    """Queries and keys `start` .. `stop`-1, causal."""

    start: int
    stop: int


@dataclass(frozen=True)
class Band:
    """Full query blocks `first` .. `last`-1, each against the window that ends with it."""

    first: int
    last: int


@dataclass(frozen=True)
class Past:
    """Queries `start` .. `stop`-1 against all of keys `keys_start` .. `keys_stop`-1 of a source."""

    start: int
    stop: int
    source: str  # "window" or "shard"
    keys_start: int
    keys_stop: int


@dataclass(frozen=True)
class Gathered:
    """Queries `start` .. `stop`-1 (of one row) against all of some key blocks."""

    start: int
    stop: int
    blocks: tuple[int, ...]


Call = Causal | Band | Past | Gathered


def plan_head(pattern: BlockPattern, head: int, q_start: int, q_stop: int) -> list[Call]:
    """The attention calls of KV head `head` for the queries at positions `q_start` .. `q_stop`-1.

    Every visible (query, key) pair is in exactly one call, and every query is in a Causal or a Band call
    before any other.
    """
    if not isinstance(pattern, S2Pattern):
        return list(_plan_rows(pattern, head, q_start, q_stop))
    if pattern.is_dense(head):
        return list(_plan_start(q_start, q_stop))
    return [*_plan_window(pattern, q_start, q_stop), *_plan_shard(pattern, head, q_start, q_stop)]


def _plan_start(q_start: int, q_stop: int, keys_start: int = 0) -> Iterator[Call]:
    """Queries that see every key from `keys_start` up to themselves."""
    yield Causal(q_start, q_stop)
    if q_start > keys_start:
        yield Past(q_start, q_stop, "window", keys_start, q_start)


def _plan_window(pattern: S2Pattern, q_start: int, q_stop: int) -> Iterator[Call]:
    B, L = pattern.block_size, pattern.local_blocks
    # Rows below L see all of their past.
    if q_start < L * B:
        yield from _plan_start(q_start, min(q_stop, L * B))
    start = max(q_start, L * B)
    first, last = -(-start // B), q_stop // B
    ragged = [(start, min(first * B, q_stop)), (max(last * B, start), q_stop)]
    for a, b in dict.fromkeys(ragged):
        if a < b:
            yield from _plan_start(a, b, (a // B - L + 1) * B)
    if first < last:
        yield Band(first, last)


def _plan_shard(pattern: S2Pattern, head: int, q_start: int, q_stop: int) -> Iterator[Call]:
    B, L = pattern.block_size, pattern.local_blocks
    prefix = max(1, pattern.shard_prefix(head, q_start // B))
    last = pattern.shard_prefix(head, (q_stop - 1) // B)
    firsts = [(pattern.shard_block(head, n - 1) + L) * B for n in range(prefix, last + 2)]
    for n, (a, b) in enumerate(pairwise(firsts), prefix):
        yield Past(max(a, q_start), min(b, q_stop), "shard", 0, n * B)


def _plan_rows(pattern: BlockPattern, head: int, q_start: int, q_stop: int) -> Iterator[Call]:
    B = pattern.block_size
    for row in range(q_start // B, -(-q_stop // B)):
        start, stop = max(q_start, row * B), min(q_stop, (row + 1) * B)
        yield from _plan_start(start, stop, row * B)
        if blocks := pattern.row_blocks(head, row)[:-1]:
            yield Gathered(start, stop, tuple(blocks))


# ---------------------------------------------------------------------------------------------------------
# One flash attention, q [N, heads, rows, dim], k and v [N, heads, keys, dim]; `mask` is additive.
# N, heads and strides are free (K/V may be expanded or overlapping views).


def _flash_forward(q, k, v, scale, causal=False, mask=None) -> tuple[Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, causal, attn_mask=mask, scale=scale
        )
    out, lse = q.new_empty(*q.shape), q.new_empty(q.shape[:-1])
    for rows in _row_chunks(q, k):
        scores = _scores(q, k, scale, causal, mask, rows)
        lse[:, :, rows] = scores.logsumexp(-1)
        out[:, :, rows] = (scores - lse[:, :, rows, None]).exp() @ v
    return out, lse


def _flash_backward(dout, q, k, v, out, lse, scale, causal=False, mask=None) -> tuple[Tensor, Tensor, Tensor]:
    if q.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            dout, q, k, v, out, lse, 0.0, causal, attn_mask=mask, scale=scale
        )
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    delta = (dout * out).sum(-1, keepdim=True)
    for rows in _row_chunks(q, k):
        p = (_scores(q, k, scale, causal, mask, rows) - lse[:, :, rows, None]).exp()
        ds = p * (dout[:, :, rows] @ v.transpose(-1, -2) - delta[:, :, rows]) * scale
        dq[:, :, rows] = ds @ k
        dk += ds.transpose(-1, -2) @ q[:, :, rows]
        dv += p.transpose(-1, -2) @ dout[:, :, rows]
    return dq, dk, dv


def _row_chunks(q: Tensor, k: Tensor, elements: int = 1 << 26) -> Iterator[slice]:
    """Row ranges whose score matrices stay below `elements`."""
    rows = max(1, elements // (q.shape[0] * q.shape[1] * k.shape[2]))
    return (slice(a, min(a + rows, q.shape[2])) for a in range(0, q.shape[2], rows))


def _scores(q: Tensor, k: Tensor, scale: float, causal: bool, mask: Tensor | None, rows: slice) -> Tensor:
    scores = q[:, :, rows] @ k.transpose(-1, -2) * scale
    if mask is not None:
        scores = scores + mask[:, :, rows]
    if causal:
        later = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = scores.masked_fill(later[rows], float("-inf"))
    return scores


# ---------------------------------------------------------------------------------------------------------
# The calls of one plan over the two sources. N runs over batch x KV heads of equal pattern.


@dataclass
class Sources:
    """Keys and values that a head reads (or, in backward, their gradients).

    Args:
        k, v: the window source `[N, tokens, dim]`, contiguous, from position `start` on.
        k_shard, v_shard: the shard source `[N, blocks * block_size, dim]`, contiguous.
        start: position of the window source's first token.
    """

    k: Tensor
    v: Tensor
    k_shard: Tensor
    v_shard: Tensor
    start: int = 0

    def zeros_like(self) -> Sources:
        return Sources(*map(torch.zeros_like, (self.k, self.v, self.k_shard, self.v_shard)), self.start)

    def pair(self, source: str) -> tuple[Tensor, Tensor, int]:
        return (self.k, self.v, self.start) if source == "window" else (self.k_shard, self.v_shard, 0)


def forward_calls(
    q: Tensor, sources: Sources, calls: list[Call], pattern: BlockPattern, scale: float, q_start: int
) -> tuple[Tensor, Tensor]:
    """Attention of q `[N, queries, group, dim]` (contiguous) over the two sources.

    Returns:
        out `[N, queries, group, dim]` and lse `[N, queries, group]` over all keys of all calls.
    """
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:-1])
    for call in calls:
        if isinstance(call, Causal):
            t = slice(call.start - q_start, call.stop - q_start)
            o, logsum = _flash_forward(_by_head(q[:, t]), *_causal_keys(call, sources, q), scale, causal=True)
            out[:, t], lse[:, t] = o.transpose(1, 2), logsum.transpose(1, 2)
        elif isinstance(call, Band):
            B = pattern.block_size
            t = slice(call.first * B - q_start, call.last * B - q_start)
            rows = call.last - call.first
            mask = _band_mask(pattern, q)
            k, v = (_windows(x, call, pattern, sources.start) for x in (sources.k, sources.v))
            o, logsum = _flash_forward(_folded(q[:, t], rows), k, v, scale, mask=mask)
            out[:, t], lse[:, t] = o.reshape(out[:, t].shape), logsum.reshape(lse[:, t].shape)
        else:
            t = slice(call.start - q_start, call.stop - q_start)
            k, v = (x[:, None] for x in _past_keys(call, sources, pattern))
            o, logsum = _flash_forward(_folded(q[:, t], 1), k, v, scale)
            _merge(out[:, t], lse[:, t], o.reshape(out[:, t].shape), logsum.reshape(lse[:, t].shape))
    return out, lse


def backward_calls(
    dout: Tensor,
    q: Tensor,
    sources: Sources,
    out: Tensor,
    lse: Tensor,
    calls: list[Call],
    pattern: BlockPattern,
    scale: float,
    q_start: int,
) -> tuple[Tensor, Sources]:
    """Gradients of `forward_calls` from its merged `out` and `lse`: dq, and the sources' gradients."""
    dq, grads = torch.zeros_like(q), sources.zeros_like()
    for call in calls:
        if isinstance(call, Causal):
            t = slice(call.start - q_start, call.stop - q_start)
            q_side = [_by_head(x[:, t]) for x in (dout, q, out)]
            dq_part, *dkv = _causal_backward(
                *q_side, _by_head(lse[:, t]), *_causal_keys(call, sources, q), scale
            )
            dq[:, t] += dq_part.transpose(1, 2)
            keys = slice(call.start - sources.start, call.stop - sources.start)
            for grad, part in zip((grads.k, grads.v), dkv):
                grad[:, keys] += part.sum(1)
        elif isinstance(call, Band):
            _band_backward(dout, q, sources, out, lse, call, pattern, scale, q_start, dq, grads)
        else:
            t = slice(call.start - q_start, call.stop - q_start)
            # Any equal cut of the rows will do: more heads for the kernel to spread over threads.
            pieces = q.shape[2]
            k, v = (x[:, None].expand(-1, pieces, -1, -1) for x in _past_keys(call, sources, pattern))
            q_side = [_folded(x[:, t], pieces) for x in (dout, q, out)]
            dq_part, *dkv = _flash_backward(
                q_side[0], q_side[1], k, v, q_side[2], _folded(lse[:, t], pieces), scale
            )
            dq[:, t] += dq_part.reshape(dq[:, t].shape)
            _add_past(call, grads, [part.sum(1) for part in dkv], pattern)
    return dq, grads


def _causal_backward(dout, q, out, lse, k, v, scale):
    return _flash_backward(dout, q, k, v, out, lse, scale, causal=True)


def _band_backward(dout, q, sources, out, lse, call, pattern, scale, q_start, dq, grads) -> None:
    """Rows in chunks whose window gradients together are no larger than K: windows overlap L-fold."""
    B, L = pattern.block_size, pattern.local_blocks
    mask = _band_mask(pattern, q)
    step = max(1, sources.k.shape[1] // (B * L))
    for first in range(call.first, call.last, step):
        part = Band(first, min(first + step, call.last))
        rows = part.last - part.first
        t = slice(part.first * B - q_start, part.last * B - q_start)
        k, v = (_windows(x, part, pattern, sources.start) for x in (sources.k, sources.v))
        q_side = [_folded(x[:, t], rows) for x in (dout, q, out)]
        dq_part, *dkv = _flash_backward(
            q_side[0], q_side[1], k, v, q_side[2], _folded(lse[:, t], rows), scale, mask=mask
        )
        dq[:, t] += dq_part.reshape(dq[:, t].shape)
        for grad, windows in zip((grads.k, grads.v), dkv):
            windows = windows.unflatten(2, (L, B))
            for w in range(L):
                start = (part.first - L + 1 + w) * B - sources.start
                grad[:, start : start + rows * B] += windows[:, :, w].flatten(1, 2)


def _by_head(x: Tensor) -> Tensor:
    """`[N, queries, group, ...]` as `[N, group, queries, ...]`, a view."""
    return x.transpose(1, 2)


def _folded(x: Tensor, heads: int) -> Tensor:
    """`[N, queries, group, ...]` as `[N, heads, queries * group / heads, ...]`, a view."""
    return x.flatten(1, 2).unflatten(1, (heads, -1))


def _causal_keys(call: Causal, sources: Sources, q: Tensor) -> tuple[Tensor, Tensor]:
    keys = slice(call.start - sources.start, call.stop - sources.start)
    return tuple(x[:, None, keys].expand(-1, q.shape[2], -1, -1) for x in (sources.k, sources.v))


def _windows(x: Tensor, call: Band, pattern: S2Pattern, start: int) -> Tensor:
    """K or V `[N, tokens, dim]` as the overlapping windows of rows, `[N, rows, local_blocks * B, dim]`."""
    B, L = pattern.block_size, pattern.local_blocks
    N, _, dim = x.shape
    first_token = (call.first - L + 1) * B - start
    return x.as_strided(
        (N, call.last - call.first, L * B, dim),
        (x.stride(0), B * dim, dim, 1),
        x.storage_offset() + first_token * dim,
    )


def _band_mask(pattern: S2Pattern, q: Tensor) -> Tensor:
    """Additive `[1, 1, B * group, local_blocks * B]`: minus infinity above the diagonal of the last block."""
    B, L, group = pattern.block_size, pattern.local_blocks, q.shape[2]
    mask = q.new_zeros(B, L * B)
    mask[:, (L - 1) * B :] = q.new_full((B, B), float("-inf")).triu(1)
    return mask.repeat_interleave(group, 0)[None, None]


def _past_keys(call: Past | Gathered, sources: Sources, pattern: BlockPattern) -> tuple[Tensor, Tensor]:
    if isinstance(call, Gathered):
        blocks = list(call.blocks)
        return tuple(_blocks(x, pattern.block_size)[:, blocks].flatten(1, 2) for x in (sources.k, sources.v))
    k, v, start = sources.pair(call.source)
    keys = slice(call.keys_start - start, call.keys_stop - start)
    return k[:, keys], v[:, keys]


def _add_past(call: Past | Gathered, grads: Sources, parts: list[Tensor], pattern: BlockPattern) -> None:
    if isinstance(call, Gathered):
        for grad, part in zip((grads.k, grads.v), parts):
            _add_blocks(grad, list(call.blocks), part, pattern.block_size)
        return
    k, v, start = grads.pair(call.source)
    keys = slice(call.keys_start - start, call.keys_stop - start)
    k[:, keys] += parts[0]
    v[:, keys] += parts[1]


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """`[N, tokens, dim]` as `[N, full blocks, block_size, dim]`, a view without the ragged tail."""
    blocks = x.shape[1] // block_size
    return x[:, : blocks * block_size].unflatten(1, (blocks, block_size))


def _add_blocks(x: Tensor, blocks: list[int], values: Tensor, block_size: int) -> None:
    """Adds values `[N, len(blocks) * block_size, dim]` to blocks of x."""
    index = torch.tensor(blocks, device=x.device)
    _blocks(x, block_size).index_add_(1, index, values.unflatten(1, (len(blocks), block_size)))


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Folds attention over further keys into (out, lse), in place.

    The weights exp(lse_i - logaddexp(lse, more_lse)) are the two values of a sigmoid.
    """
    out.lerp_(more, torch.sigmoid(more_lse - lse)[..., None])
    torch.logaddexp(lse, more_lse, out=lse)


# ---------------------------------------------------------------------------------------------------------
# The whole op: documents x groups of heads with equal pattern, with autograd around it.


def equal_heads(pattern: BlockPattern) -> list[list[int]]:
    """KV heads grouped by equal pattern: a group is computed as one batch."""
    if not isinstance(pattern, S2Pattern):
        return [[g] for g in range(pattern.num_kv_heads)]
    groups: dict[tuple[int, int], list[int]] = {}
    for g in range(pattern.num_kv_heads):
        groups.setdefault((pattern.strides[g], pattern.head_phases[g]), []).append(g)
    return list(groups.values())


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    softmax_scale: float,
    sink_logits: Tensor | None,
    documents: list[tuple[int, int]],
    q_start: int,
) -> tuple[Tensor, Tensor]:
    """S2 attention with linear memory; arguments and results as in `reference_attention`.

    Computes in float32 (float64 for float64 inputs) whatever the inputs are.
    """
    return _BlockedAttention.apply(q, k, v, sink_logits, pattern, softmax_scale, documents, q_start)


class _Slice:
    """One document and one group of equal heads: picks tensors out of the whole and puts results back."""

    def __init__(self, pattern, heads: list[int], document: tuple[int, int], q_start: int, group: int):
        start, stop = document
        self.heads, self.group, self.q_start = heads, group, q_start
        self.queries = slice(start, stop)
        self.keys = slice(start, stop + q_start)
        self.calls = plan_head(pattern, heads[0], q_start, q_start + stop - start)
        self.shard = []
        if isinstance(pattern, S2Pattern) and not pattern.is_dense(heads[0]):
            size = pattern.shard_prefix(heads[0], (q_start + stop - start - 1) // pattern.block_size)
            self.shard = [pattern.shard_block(heads[0], n) for n in range(size)]

    def pick_q(self, x: Tensor, width: int, compute: torch.dtype) -> Tensor:
        """`[batch, seq, heads, dim]` to contiguous `[N, queries, group, width]`, zero-padded."""
        x = x[:, self.queries].unflatten(2, (-1, self.group))[:, :, self.heads]
        return _padded(x.transpose(1, 2).to(compute), width).flatten(0, 1).contiguous()

    def pick_lse(self, x: Tensor) -> Tensor:
        """`[batch, heads, seq]` to contiguous `[N, queries, group]`."""
        x = x[:, :, self.queries].unflatten(1, (-1, self.group))[:, self.heads]
        return x.transpose(2, 3).flatten(0, 1).contiguous()

    def pick_sources(
        self, k: Tensor, v: Tensor, width: int, compute: torch.dtype, block_size: int
    ) -> Sources:
        k, v = (
            _padded(x[:, self.keys, self.heads].transpose(1, 2).to(compute), width).flatten(0, 1).contiguous()
            for x in (k, v)
        )
        shards = (_blocks(x, block_size)[:, self.shard].flatten(1, 2) for x in (k, v))
        return Sources(k, v, *shards)

    def put_q(self, whole: Tensor, part: Tensor) -> None:
        view = whole[:, self.queries].unflatten(2, (-1, self.group))
        part = part[..., : whole.shape[-1]].unflatten(0, (-1, len(self.heads)))
        view[:, :, self.heads] = part.transpose(1, 2).to(whole.dtype)

    def put_lse(self, whole: Tensor, part: Tensor) -> None:
        view = whole[:, :, self.queries].unflatten(1, (-1, self.group))
        view[:, self.heads] = part.unflatten(0, (-1, len(self.heads))).transpose(2, 3)

    def put_sources(self, dk: Tensor, dv: Tensor, grads: Sources, block_size: int) -> None:
        for whole, window, shard in ((dk, grads.k, grads.k_shard), (dv, grads.v, grads.v_shard)):
            if self.shard:
                _add_blocks(window, self.shard, shard, block_size)
            part = window[..., : whole.shape[-1]].unflatten(0, (-1, len(self.heads)))
            whole[:, self.keys, self.heads] = part.transpose(1, 2).to(whole.dtype)


def _padded(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if width > x.shape[-1] else x


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def _slices(q, k, pattern, documents, q_start) -> Iterator[_Slice]:
        group = q.shape[2] // k.shape[2]
        for document in documents:
            for heads in equal_heads(pattern):
                yield _Slice(pattern, heads, document, q_start, group)

    @staticmethod
    def forward(ctx, q, k, v, sink_logits, pattern, scale, documents, q_start):
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        width = max(q.shape[-1], v.shape[-1])
        out = q.new_empty(*q.shape[:-1], v.shape[-1])
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=compute)
        for part in _BlockedAttention._slices(q, k, pattern, documents, q_start):
            sources = part.pick_sources(k, v, width, compute, pattern.block_size)
            o, logsum = forward_calls(
                part.pick_q(q, width, compute), sources, part.calls, pattern, scale, part.q_start
            )
            if sink_logits is not None:
                sinks = sink_logits.to(compute).unflatten(0, (-1, part.group))[part.heads]
                sinks = sinks.repeat(q.shape[0], 1)[:, None]  # [N, 1, group]
                total = torch.logaddexp(logsum, sinks)
                o *= torch.exp(logsum - total)[..., None]
                logsum = total
            part.put_q(out, o)
            part.put_lse(lse, logsum)
        ctx.save_for_backward(q, k, v, sink_logits, out, lse)
        ctx.pattern, ctx.scale, ctx.documents, ctx.q_start = pattern, scale, documents, q_start
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, sink_logits, out, lse = ctx.saved_tensors
        if dout is None:
            dout = torch.zeros_like(out)
        width = max(q.shape[-1], v.shape[-1])
        if dlse is not None:
            # Softmax backward subtracts delta = sum(dout * out) from dP; a gradient of lse makes that
            # delta - dlse. One more column, 1 in dout and -dlse in out, turns the kernel's own sum into it
            # (V is zero there).
            dout = torch.cat([_padded(dout, width), torch.ones_like(dout[..., :1])], -1)
            out = torch.cat([_padded(out.to(lse.dtype), width), -dlse.transpose(1, 2)[..., None]], -1)
            width += 1
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for part in _BlockedAttention._slices(q, k, ctx.pattern, ctx.documents, ctx.q_start):
            dq_part, grads = backward_calls(
                part.pick_q(dout, width, lse.dtype),
                part.pick_q(q, width, lse.dtype),
                part.pick_sources(k, v, width, lse.dtype, ctx.pattern.block_size),
                part.pick_q(out, width, lse.dtype),
                part.pick_lse(lse),
                part.calls,
                ctx.pattern,
                ctx.scale,
                part.q_start,
            )
            part.put_q(dq, dq_part)
            part.put_sources(dk, dv, grads, ctx.pattern.block_size)
        dsinks = None
        if sink_logits is not None and ctx.needs_input_grad[3]:
            # The sink has no value, so its dP is 0: dS = P (0 - delta).
            delta = (dout.to(lse.dtype) * out).sum(-1).transpose(1, 2)  # [batch, heads, seq]
            sink_p = torch.exp(sink_logits.to(lse.dtype)[None, :, None] - lse)
            dsinks = -(sink_p * delta).sum((0, 2)).to(sink_logits.dtype)
        return dq, dk, dv, dsinks, None, None, None, None
