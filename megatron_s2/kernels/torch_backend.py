"""S2 attention in plain PyTorch: blocked, linear memory, forward and backward.

What a query sees is cut into calls that need (almost) no mask (`torch_plan`). A Band reads its keys through
an overlapping view of K/V, masked in the diagonal block alone.

Each call is one flash attention over its keys; results merge by log-sum-exp. The backward of a flash kernel
needs only the *merged* output and log-sum-exp to give the part of the gradient that its keys contribute, so
backward runs the same calls and adds up. Nothing is kept but q, k, v, out and lse, and no array grows with
the square of the sequence.

Calls work on views of the tensors that came in, and copy at most a slice of them: beside gradients, backward
allocates little. K/V are never expanded to the query heads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_s2.kernels.torch_plan import (
    Band,
    Call,
    Causal,
    Gathered,
    Past,
    equal_runs,
    plan_head,
)
from megatron_s2.pattern.block_pattern import BlockPattern
from megatron_s2.pattern.s2_pattern import S2Pattern

# ---------------------------------------------------------------------------------------------------------
# One flash attention, q [batch, heads, rows, dim], k and v [batch, kv_heads, keys, dim], any strides (K/V may
# be overlapping views); query head h reads KV head h // (heads / kv_heads). `mask` is additive.

_MAX_SCORES = 1 << 24  # elements of one score matrix where PyTorch has no flash kernel to call


def _flash_forward(q, k, v, scale, causal=False, mask=None) -> tuple[Tensor, Tensor]:
    forward = _cpu_forward if q.device.type == "cpu" else _matmul_forward
    return forward(q, k, v, scale, causal, mask)


def _flash_backward(dout, q, k, v, out, lse, scale, causal=False, mask=None) -> tuple[Tensor, Tensor, Tensor]:
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
    k, v = (_spread(x, q.shape[1]) for x in (k, v))
    for rows in _row_chunks(q, k):
        scores = _scores(q, k, scale, causal, mask, rows)
        lse[:, :, rows] = scores.logsumexp(-1)
        out[:, :, rows] = (scores - lse[:, :, rows, None]).exp() @ v
    return out, lse


def _matmul_backward(dout, q, k, v, out, lse, scale, causal, mask):
    kv_heads = k.shape[1]
    k, v = (_spread(x, q.shape[1]) for x in (k, v))
    dq, dk, dv = q.new_empty(q.shape), k.new_zeros(k.shape), v.new_zeros(v.shape)
    for rows in _row_chunks(q, k):
        do = dout[:, :, rows]
        delta = (do * out[:, :, rows]).sum(-1, keepdim=True)
        p = (_scores(q, k, scale, causal, mask, rows) - lse[:, :, rows, None]).exp()
        ds = p * (do @ v.transpose(-1, -2) - delta) * scale
        dq[:, :, rows] = ds @ k
        dk += ds.transpose(-1, -2) @ q[:, :, rows]
        dv += p.transpose(-1, -2) @ do
    return dq, _collected(dk, kv_heads), _collected(dv, kv_heads)


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


def _spread(x: Tensor, heads: int) -> Tensor:
    """K or V with each KV head repeated for `heads` query heads; a view where x has one KV head."""
    return x[:, :, None].expand(-1, -1, heads // x.shape[1], -1, -1).flatten(1, 2)


def _collected(grad: Tensor, kv_heads: int) -> Tensor:
    """The gradient of x from that of `_spread(x, heads)`."""
    return grad.unflatten(1, (kv_heads, -1)).sum(2)


# ---------------------------------------------------------------------------------------------------------
# The calls of one plan over the two sources, for KV heads of equal pattern. Query-side tensors are
# [batch, heads, queries, dim] (lse without dim) of any strides and may have less than K's dim and precision.

_MAX_WINDOW_ELEMENTS = 1 << 18  # of K in one Band call: windows overlap, so their gradients take memory
_MIN_BACKWARD_HEADS = 4  # PyTorch's backward gives each thread whole heads


@dataclass
class Sources:
    """Keys and values that a run of equal heads reads (or, in backward, their gradients).

    Args:
        k, v: the window source `[batch, kv_heads, tokens, dim]`, any strides, from position `start` on.
        k_shard, v_shard: the shard source `[batch, kv_heads, blocks * block_size, dim]`, any strides.
        start: position of the window source's first token.
    """

    k: Tensor
    v: Tensor
    k_shard: Tensor
    v_shard: Tensor
    start: int = 0

    def pair(self, source: str) -> tuple[Tensor, Tensor, int]:
        return (self.k, self.v, self.start) if source == "window" else (self.k_shard, self.v_shard, 0)


@dataclass(frozen=True)
class Plan:
    """What a run of equal heads computes: `calls` of `plan_head`, for queries that begin at `q_start`."""

    calls: list[Call]
    pattern: BlockPattern
    scale: float
    q_start: int

    def queries(self, start: int, stop: int) -> slice:
        """Where positions start .. stop-1 lie in the query-side tensors."""
        return slice(start - self.q_start, stop - self.q_start)


def forward_calls(plan: Plan, q: Tensor, sources: Sources, out: Tensor, lse: Tensor) -> None:
    """Writes attention over the keys of all calls to `out` and `lse`, both in the precision of K."""
    for call in plan.calls:
        if isinstance(call, Causal):
            t = plan.queries(call.start, call.stop)
            k, v = _causal_keys(call, sources)
            o, logsum = _flash_forward(_queries(q, t, sources), k, v, plan.scale, causal=True)
            out[:, :, t], lse[:, :, t] = o[..., : out.shape[-1]], logsum
        elif isinstance(call, Band):
            mask, fold = _band_mask(plan, q, sources), _band_fold(plan, sources)
            for part, t in _band_parts(call, plan, sources):
                k, v = _windows(part, plan, sources)
                o, logsum = _flash_forward(fold(_queries(q, t, sources)), k, v, plan.scale, mask=mask)
                out[:, :, t], lse[:, :, t] = fold(o)[..., : out.shape[-1]], fold(logsum)
        else:
            t = plan.queries(call.start, call.stop)
            o, logsum = _flash_forward(_queries(q, t, sources), *_past_keys(call, plan, sources), plan.scale)
            _merge(out[:, :, t], lse[:, :, t], o[..., : out.shape[-1]], logsum)


def backward_calls(
    plan: Plan,
    dout: Tensor,
    q: Tensor,
    sources: Sources,
    out: Tensor,
    lse: Tensor,
    dq: Tensor,
    grads: Sources,
) -> None:
    """Adds the gradients of `forward_calls`, given its merged `out` and `lse`, to `dq` and `grads`."""
    for call in plan.calls:
        if isinstance(call, Causal):
            t = plan.queries(call.start, call.stop)
            dout_t, q_t, out_t = (_queries(x, t, sources) for x in (dout, q, out))
            k, v = _causal_keys(call, sources)
            dq_t, *dkv = _flash_backward(dout_t, q_t, k, v, out_t, lse[:, :, t], plan.scale, causal=True)
            _add(dq[:, :, t], dq_t)
            for grad, part in zip(_causal_keys(call, grads), dkv):
                _add(grad, part)
        elif isinstance(call, Band):
            mask, fold = _band_mask(plan, q, sources), _band_fold(plan, sources)
            for part, t in _band_parts(call, plan, sources):
                dout_t, q_t, out_t = (fold(_queries(x, t, sources)) for x in (dout, q, out))
                k, v = _windows(part, plan, sources)
                dq_t, *dkv = _flash_backward(
                    dout_t, q_t, k, v, out_t, fold(lse[:, :, t]), plan.scale, mask=mask
                )
                _add(dq[:, :, t], fold(dq_t))
                _add_windows(part, plan, grads, dkv)
        else:
            t = plan.queries(call.start, call.stop)
            cut = _query_cut(q, t)
            dout_t, q_t, out_t = (cut(_queries(x, t, sources)) for x in (dout, q, out))
            k, v = (_spread(x, q_t.shape[1]) for x in _past_keys(call, plan, sources))
            dq_t, *dkv = _flash_backward(dout_t, q_t, k, v, out_t, cut(lse[:, :, t]), plan.scale)
            _add(dq[:, :, t], dq_t.reshape(*q.shape[:2], -1, dq_t.shape[-1]))
            _add_past(call, plan, grads, [_collected(part, sources.k.shape[1]) for part in dkv])


def _queries(x: Tensor, t: slice, sources: Sources) -> Tensor:
    return fitted(x[:, :, t], sources.k.shape[-1], sources.k.dtype)


def fitted(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """x in this width and precision, the elements of a token side by side (the CPU kernel assumes it)."""
    x = _padded(x.to(dtype), width)
    return x if x.stride(-1) == 1 else x.contiguous()


def _padded(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if width > x.shape[-1] else x


def _add(total: Tensor, part: Tensor) -> None:
    """Adds a part that may be wider by padding."""
    total += part[..., : total.shape[-1]]


def _merge(out: Tensor, lse: Tensor, more: Tensor, more_lse: Tensor) -> None:
    """Folds attention over further keys into (out, lse), in place.

    The weights exp(lse_i - logaddexp(lse, more_lse)) are the two values of a sigmoid.
    """
    out.lerp_(more, torch.sigmoid(more_lse - lse)[..., None])
    torch.logaddexp(lse, more_lse, out=lse)


def _causal_keys(call: Causal, sources: Sources) -> tuple[Tensor, Tensor]:
    keys = slice(call.start - sources.start, call.stop - sources.start)
    return sources.k[:, :, keys], sources.v[:, :, keys]


# Band: each row of a KV head becomes a KV head of its own, with its window as keys and the row's queries of
# the whole group as rows.


def _band_parts(call: Band, plan: Plan, sources: Sources) -> Iterator[tuple[Band, slice]]:
    """The rows in parts of bounded size, each with its place in the query-side tensors."""
    B = plan.pattern.block_size
    batch, kv_heads, _, dim = sources.k.shape
    most = max(1, _MAX_WINDOW_ELEMENTS // (batch * kv_heads * plan.pattern.local_blocks * B * dim))
    for first in range(call.first, call.last, most):
        last = min(first + most, call.last)
        yield Band(first, last), plan.queries(first * B, last * B)


def _band_fold(plan: Plan, sources: Sources) -> Callable[[Tensor], Tensor]:
    """`[batch, kv_heads * group, rows * B, …]` to `[batch, kv_heads * rows, group * B, …]`, and back."""

    def fold(x: Tensor) -> Tensor:
        x = x.unflatten(1, (sources.k.shape[1], -1)).unflatten(3, (-1, plan.pattern.block_size))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    return fold


def _windows(part: Band, plan: Plan, sources: Sources) -> Iterator[Tensor]:
    """K and V as overlapping windows `[batch, kv_heads * rows, local_blocks * B, dim]`."""
    B, L = plan.pattern.block_size, plan.pattern.local_blocks
    first, last = ((row - L + 1) * B - sources.start for row in (part.first, part.last))
    for x in (sources.k, sources.v):
        windows = x[:, :, first : last + (L - 1) * B].unfold(2, L * B, B)
        yield windows.transpose(-1, -2).flatten(1, 2)


def _add_windows(part: Band, plan: Plan, grads: Sources, parts: list[Tensor]) -> None:
    B, L = plan.pattern.block_size, plan.pattern.local_blocks
    rows = part.last - part.first
    for grad, windows in zip((grads.k, grads.v), parts):
        windows = windows.unflatten(1, (-1, rows)).unflatten(3, (L, B))
        for w in range(L):
            start = (part.first - L + 1 + w) * B - grads.start
            _add(grad[:, :, start : start + rows * B], windows[:, :, :, w].flatten(2, 3))


def _band_mask(plan: Plan, q: Tensor, sources: Sources) -> Tensor:
    """Additive `[1, 1, group * B, local_blocks * B]`: minus infinity above the last block's diagonal."""
    B, L = plan.pattern.block_size, plan.pattern.local_blocks
    mask = sources.k.new_full((B, L * B), float("-inf")).triu((L - 1) * B + 1)
    return mask.repeat(q.shape[1] // sources.k.shape[1], 1)[None, None]


# Past and Gathered.


def _past_keys(call: Past | Gathered, plan: Plan, sources: Sources) -> Iterable[Tensor]:
    if isinstance(call, Gathered):
        B = plan.pattern.block_size
        return (_blocks(x, B)[:, :, list(call.blocks)].flatten(2, 3) for x in (sources.k, sources.v))
    k, v, start = sources.pair(call.source)
    keys = slice(call.keys_start - start, call.keys_stop - start)
    return k[:, :, keys], v[:, :, keys]


def _add_past(call: Past | Gathered, plan: Plan, grads: Sources, parts: list[Tensor]) -> None:
    if isinstance(call, Gathered):
        for grad, part in zip((grads.k, grads.v), parts):
            _add_blocks(grad, call.blocks, part, plan.pattern.block_size)
    else:
        for grad, part in zip(_past_keys(call, plan, grads), parts):
            _add(grad, part)


def _query_cut(q: Tensor, t: slice) -> Callable[[Tensor], Tensor]:
    """Cuts `[batch, heads, rows, …]` into `[batch, heads * pieces, rows / pieces, …]`."""
    batch, heads = q.shape[:2]
    pieces = max(1, math.gcd(t.stop - t.start, _MIN_BACKWARD_HEADS) // (batch * heads))
    return lambda x: x.unflatten(2, (pieces, -1)).flatten(1, 2)


def _blocks(x: Tensor, block_size: int) -> Tensor:
    """`[batch, kv_heads, tokens, dim]` as `[…, full blocks, block_size, dim]`, a view without the tail."""
    blocks = x.shape[2] // block_size
    return x[:, :, : blocks * block_size].unflatten(2, (blocks, block_size))


def _add_blocks(x: Tensor, blocks: Sequence[int], values: Tensor, block_size: int) -> None:
    """Adds values `[batch, kv_heads, len(blocks) * block_size, dim]` to blocks of x."""
    index = torch.tensor(blocks, device=x.device)
    values = values[..., : x.shape[-1]].unflatten(2, (len(blocks), block_size))
    _blocks(x, block_size).index_add_(2, index, values)


# ---------------------------------------------------------------------------------------------------------
# The whole op: documents x runs of equal heads, with autograd around it.


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


class _Part:
    """One document and one run of equal heads, as views of the whole tensors."""

    def __init__(self, q, k, pattern, heads: range, document: tuple[int, int], scale: float, q_start: int):
        start, stop = document
        group, last = q.shape[2] // k.shape[2], q_start + stop - start
        self._kv_heads = slice(heads.start, heads.stop)
        self._heads = slice(heads.start * group, heads.stop * group)
        self._queries, self._keys = slice(start, stop), slice(start, stop + q_start)
        self.plan = Plan(plan_head(pattern, heads.start, q_start, last), pattern, scale, q_start)
        self._shard = []
        if isinstance(pattern, S2Pattern) and not pattern.is_dense(heads.start):
            size = pattern.shard_prefix(heads.start, (last - 1) // pattern.block_size)
            self._shard = [pattern.shard_block(heads.start, n) for n in range(size)]

    def query_side(self, x: Tensor) -> Tensor:
        """`[batch, seq, heads, dim]` as `[batch, heads, queries, dim]`."""
        return x[:, self._queries, self._heads].transpose(1, 2)

    def lse(self, x: Tensor) -> Tensor:
        return x[:, self._heads, self._queries]

    def _window(self, x: Tensor) -> Tensor:
        return x[:, self._keys, self._kv_heads].transpose(1, 2)

    def sources(self, k: Tensor, v: Tensor, width: int, compute: torch.dtype) -> Sources:
        k, v = (fitted(self._window(x), width, compute) for x in (k, v))
        B = self.plan.pattern.block_size
        return Sources(k, v, *(_blocks(x, B)[:, :, self._shard].flatten(2, 3) for x in (k, v)))

    def gradients(self, dk: Tensor, dv: Tensor) -> Sources:
        """Where to add the sources' gradients: views of dk and dv, zeros for the shard (see `add_shard`)."""
        dk, dv = self._window(dk), self._window(dv)
        size = len(self._shard) * self.plan.pattern.block_size
        return Sources(dk, dv, *(x.new_zeros(*x.shape[:2], size, x.shape[3]) for x in (dk, dv)))

    def add_shard(self, grads: Sources) -> None:
        """Adds the gradients of the shard to those of the tokens it was picked from."""
        if self._shard:
            B = self.plan.pattern.block_size
            _add_blocks(grads.k, self._shard, grads.k_shard, B)
            _add_blocks(grads.v, self._shard, grads.v_shard, B)


def _parts(q, k, pattern, scale, documents, q_start) -> Iterator[_Part]:
    for document in documents if q.numel() else ():
        for heads in equal_runs(pattern):
            yield _Part(q, k, pattern, heads, document, scale, q_start)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sink_logits, pattern, scale, documents, q_start):
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        width = max(q.shape[-1], v.shape[-1])
        out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=compute)
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=compute)
        for part in _parts(q, k, pattern, scale, documents, q_start):
            sources = part.sources(k, v, width, compute)
            forward_calls(part.plan, part.query_side(q), sources, part.query_side(out), part.lse(lse))
        if sink_logits is not None:
            total = torch.logaddexp(lse, sink_logits.to(compute)[None, :, None])
            out *= torch.exp(lse - total).transpose(1, 2)[..., None]
            lse = total
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sink_logits, out, lse)
        ctx.rest = pattern, scale, documents, q_start
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, sink_logits, out, lse = ctx.saved_tensors
        pattern, scale, documents, q_start = ctx.rest
        compute, width = lse.dtype, max(q.shape[-1], v.shape[-1])
        if dout is None:
            dout = torch.zeros_like(out)
        if dlse is not None:
            # Softmax backward subtracts delta = sum(dout * out) from dP; a gradient of lse makes that
            # delta - dlse. One more column, 1 in dout and -dlse in out, turns the kernel's own sum into it
            # (V is zero there).
            dout = torch.cat([_padded(dout, width), torch.ones_like(dout[..., :1])], -1)
            out = torch.cat([_padded(out.to(compute), width), -dlse.transpose(1, 2)[..., None]], -1)
            width += 1
        dq, dk, dv = (torch.zeros_like(x, dtype=compute) for x in (q, k, v))
        for part in _parts(q, k, pattern, scale, documents, q_start):
            sources, grads = part.sources(k, v, width, compute), part.gradients(dk, dv)
            query_side = [part.query_side(x) for x in (dout, q, out, dq)]
            backward_calls(
                part.plan, *query_side[:2], sources, query_side[2], part.lse(lse), query_side[3], grads
            )
            part.add_shard(grads)
        dsinks = None
        if sink_logits is not None and ctx.needs_input_grad[3]:
            # The sink has no value, so its dP is 0: dS = P (0 - delta).
            delta = (dout.to(compute) * out).sum(-1).transpose(1, 2)  # [batch, heads, seq]
            sink_p = torch.exp(sink_logits.to(compute)[None, :, None] - lse)
            dsinks = -(sink_p * delta).sum((0, 2)).to(sink_logits.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None, None, None, None
