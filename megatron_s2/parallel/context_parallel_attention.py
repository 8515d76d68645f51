"""S2 attention over context-parallel ranks, each of which holds two chunks of the sequence (zigzag).

`gather`: K and V of the shards come to the queries by one all-gather, those of the windows as halos; the
windows are computed while the shards are under way. `a2a`: each rank computes some heads over the whole
sequence. Both are exact, forward and backward.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import lru_cache, partial
from itertools import groupby

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_s2.kernels import s2_attention
from megatron_s2.kernels.interface import choose_backend
from megatron_s2.kernels.torch_slice import TorchSlice
from megatron_s2.parallel.assignment import Documents, GatherPlan, HeadPlan, plan_gather
from megatron_s2.parallel.cost import AttentionCall, ExchangeBytes, exchange_bytes, head_plan
from megatron_s2.parallel.exchange import Exchange
from megatron_s2.parallel.heads import FromHeads, ToHeads
from megatron_s2.parallel.layout import Zigzag
from megatron_s2.pattern import S2Pattern


def context_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: S2Pattern,
    exchange: Exchange,
    schedule: str,
    softmax_scale: float | None = None,
    sink_logits: Tensor | None = None,
    documents: Documents | None = None,
    backend: str = "auto",
) -> Tensor:
    """Causal S2 attention of a sequence that is spread over the ranks of a group in zigzag order.

    Args:
        q: this rank's queries `[batch, local_tokens, heads, head_dim]`: chunks r and 2P-1-r of the sequence.
        k, v: its keys and values, `[batch, local_tokens, kv_heads, head_dim]`, with a head_dim each.
        pattern: pattern of these KV heads.
        exchange: the group.
        schedule: `gather` or `a2a`.
        softmax_scale, sink_logits, backend: as in `s2_attention`.
        documents: (start, stop) of each packed document in the whole sequence; the pattern restarts at each.

    Returns:
        `[batch, local_tokens, heads, v_head_dim]` in the dtype of `q`, differentiable.

    Raises:
        ValueError: an argument does not fit the others; the message starts with its name.
        PeerLostError: another rank of the group died or does not answer.
    """
    if schedule not in ("gather", "a2a"):
        raise ValueError(f"schedule {schedule!r}: must be gather or a2a")
    call = call_of(q, v, exchange.ranks)
    zigzag = call.zigzag
    documents = documents or ((0, zigzag.tokens),)
    if documents[-1][1] != zigzag.tokens:
        raise ValueError(f"documents {documents[-1:]}: must end at the sequence's {zigzag.tokens} tokens")
    scale = 1 / math.sqrt(q.shape[-1]) if softmax_scale is None else softmax_scale
    plan = plan_gather(pattern, zigzag, exchange.rank, documents) if schedule == "gather" else None
    if plan is None or len(documents) == 1:
        moved = exchange_bytes(schedule, pattern, call, exchange.rank)
    else:
        moved = _packed_bytes(plan, pattern.num_kv_heads, call)
    has_backward = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    exchange.traffic.predict(
        exchange.layer, moved.forward_received + (moved.backward_received if has_backward else 0)
    )
    if plan is not None:
        piece = _kind_of_piece(choose_backend(q, v) if backend == "auto" else backend)
        part = partial(piece, pattern, scale)
        return _GatherAttention.apply(q, k, v, sink_logits, plan, part, exchange)
    heads = head_plan(pattern, call)
    return _attend_by_head(q, k, v, pattern, scale, sink_logits, documents, backend, heads, zigzag, exchange)


def _kind_of_piece(backend: str) -> type:
    if backend == "torch":
        return TorchSlice
    if backend == "triton":
        from megatron_s2.kernels.triton_slice import TritonSlice

        return TritonSlice
    raise ValueError(f"backend {backend!r}: must be auto, torch or triton with schedule gather")


def call_of(q: Tensor, v: Tensor, ranks: int) -> AttentionCall:
    """The shapes of a call, as the planner takes them: q and v are this rank's."""
    return AttentionCall(
        ranks=ranks,
        tokens=q.shape[1] * ranks,
        batch=q.shape[0],
        query_heads=q.shape[2],
        head_dim=q.shape[3],
        v_head_dim=v.shape[3],
        element_size=q.element_size(),
    )


def _packed_bytes(plan: GatherPlan, kv_heads: int, call: AttentionCall) -> ExchangeBytes:
    """What `exchange_bytes` is for one document per sequence, of a plan for several."""
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
    def forward(ctx, q, k, v, sink_logits, plan, part, exchange):
        moved = _Moved(exchange, _indices(plan, q.device))
        halo = moved.start_halo(k, v)
        gathered = moved.start_gather(k, v)
        compute = torch.float64 if q.dtype == torch.float64 else torch.float32
        out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=compute)
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=compute)

        halo = moved.unpack_halo(halo.wait())
        windows = moved.windows(k, v, halo)
        for piece, (a, b), kv in _pieces(plan, part, windows):
            piece.forward("window", q[:, a:b], *kv, out[:, a:b], lse[:, :, a:b])
        shard = moved.unpack_shard(gathered.wait())
        shard_kv = shard.split([k.shape[-1], v.shape[-1]], -1)
        for piece, (a, b), _ in _pieces(plan, part, windows):
            piece.forward("shard", q[:, a:b], *shard_kv, out[:, a:b], lse[:, :, a:b])

        if sink_logits is not None:
            total = torch.logaddexp(lse, sink_logits.to(compute)[None, :, None])
            out *= torch.exp(lse - total).transpose(1, 2)[..., None]
            lse = total
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sink_logits, out, lse, halo, shard)
        ctx.rest = part, moved
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx, dout):
        q, k, v, sink_logits, out, lse, halo, shard = ctx.saved_tensors
        part, moved = ctx.rest
        plan = moved.plan
        compute, dims = lse.dtype, [k.shape[-1], v.shape[-1]]
        dq = torch.zeros_like(q, dtype=compute)

        windows = moved.windows(k, v, halo)
        dshard = torch.zeros_like(shard, dtype=compute)
        shard_kv, dshard_kv = shard.split(dims, -1), dshard.split(dims, -1)
        pieces = list(_pieces(plan, part, windows))
        for piece, (a, b), _ in pieces:
            query_side = dout[:, a:b], q[:, a:b], *shard_kv, out[:, a:b], lse[:, :, a:b]
            piece.backward("shard", *query_side, dq[:, a:b], *dshard_kv)
        shard_back = moved.return_shard(dshard.to(k.dtype))

        dwindows = [[torch.zeros_like(x, dtype=compute) for x in kv] for kv in windows]
        for (piece, (a, b), kv), (_, _, dkv) in zip(pieces, _pieces(plan, part, dwindows)):
            query_side = dout[:, a:b], q[:, a:b], *kv, out[:, a:b], lse[:, :, a:b]
            piece.backward("window", *query_side, dq[:, a:b], *dkv)
        halo_back = moved.return_halo(dwindows, k.dtype)

        dk, dv = (torch.cat(both, 1) for both in zip(*moved.chunks_of(dwindows)))
        moved.add_halo(halo_back.wait(), dk, dv)
        moved.add_shard(shard_back.wait(), dk, dv)
        dsinks = None
        if sink_logits is not None:
            # The sink has no value, so its dP is 0: dS = P (0 - delta).
            delta = (dout.to(compute) * out).sum(-1).transpose(1, 2)
            sink_p = torch.exp(sink_logits.to(compute)[None, :, None] - lse)
            dsinks = -(sink_p * delta).sum((0, 2)).to(sink_logits.dtype)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None, None, None


def _pieces(plan: GatherPlan, part: Callable, windows):
    """Each piece (`part` makes it), its queries, and its keys and values among those of its chunk."""
    for p in plan.pieces:
        shards = [(shard.start, shard.stop) for shard in plan.shards[p.document]]
        yield (
            part(p.q_start, p.q_stop, p.keys_start, shards),
            (p.start, p.stop),
            [x[:, slice(*p.keys)] for x in windows[p.chunk]],
        )


@dataclass(frozen=True)
class _Indices:
    """A plan with its indices on the device."""

    plan: GatherPlan
    pack_units: Tensor
    pack_heads: Tensor
    unpack: Tensor
    send_units: Tensor
    halo_unpack: Tensor


@lru_cache(maxsize=64)
def _indices(plan: GatherPlan, device: torch.device) -> _Indices:
    # As many as there are plans: those of packed documents never come again, and a backward holds its own.
    names = [field.name for field in fields(_Indices)][1:]
    return _Indices(plan, *(torch.as_tensor(getattr(plan, name), device=device) for name in names))


class _Moved:
    """Packs, sends, unpacks and returns what a plan moves.

    Keys and values travel side by side, `head_dim + v_head_dim` elements for a token of a KV head. Rows of a
    message are units: `[units, batch, tokens of a unit, …]`.
    """

    def __init__(self, exchange: Exchange, indices: _Indices) -> None:
        self.plan = indices.plan
        self._exchange = exchange
        self._indices = indices

    def _by_unit(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.plan.unit))

    # Halos: all KV heads of some tokens.

    def start_halo(self, k: Tensor, v: Tensor):
        units = self._indices.send_units
        rows = [self._by_unit(x).transpose(0, 1)[units] for x in (k, v)]
        return self._exchange.all_to_all(torch.cat(rows, -1), self.plan.send_counts, self.plan.recv_counts)

    def unpack_halo(self, received: Tensor) -> Tensor:
        """`[batch, tokens, kv_heads, head_dim + v_head_dim]`: the halos of both chunks."""
        return received[self._indices.halo_unpack].transpose(0, 1).flatten(1, 2)

    def windows(self, k: Tensor, v: Tensor, halo: Tensor) -> list[tuple[Tensor, Tensor]]:
        """For both chunks, its keys and values with the halo before them."""
        halos = halo.split([units * self.plan.unit for units in self.plan.halo], 1)
        halves = [x.chunk(2, 1) for x in (k, v)]
        return [
            tuple(torch.cat(pair, 1) for pair in zip(h.split([k.shape[-1], v.shape[-1]], -1), kv))
            for h, kv in zip(halos, zip(*halves))
        ]

    def chunks_of(self, windows):
        """The windows without their halos."""
        return [[x[:, units * self.plan.unit :] for x in kv] for units, kv in zip(self.plan.halo, windows)]

    def return_halo(self, dwindows, dtype: torch.dtype):
        units = [count * self.plan.unit for count in self.plan.halo]
        halos = [torch.cat([x[:, :n] for x in kv], -1) for n, kv in zip(units, dwindows)]
        rows = self._by_unit(torch.cat(halos, 1)).transpose(0, 1).to(dtype)
        received = torch.empty_like(rows, memory_format=torch.contiguous_format)
        received[self._indices.halo_unpack] = rows
        return self._exchange.all_to_all(received, self.plan.recv_counts, self.plan.send_counts)

    def add_halo(self, returned: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Adds what each rank computed for the tokens it was sent, rank after rank."""
        dims = [dk.shape[-1], dv.shape[-1]]
        parts = (x.split(self.plan.send_parts) for x in (returned, self._indices.send_units))
        for rows, units in zip(*parts):
            for grad, part in zip((dk, dv), rows.split(dims, -1)):
                self._by_unit(grad)[:, units] += part.transpose(0, 1)

    # Shards: single KV heads of some tokens.

    def start_gather(self, k: Tensor, v: Tensor):
        units, heads = self._indices.pack_units, self._indices.pack_heads
        rows = torch.cat([self._by_unit(x)[:, units, :, heads] for x in (k, v)], -1)
        padding = self.plan.width - len(rows)
        return self._exchange.all_gather(torch.nn.functional.pad(rows, (0, 0) * 3 + (0, padding)))

    def unpack_shard(self, gathered: Tensor) -> Tensor:
        """`[batch, tokens, head_dim + v_head_dim]`: the shards of all heads."""
        return gathered[self._indices.unpack].transpose(0, 1).flatten(1, 2)

    def return_shard(self, dshard: Tensor):
        """Sends every rank the gradients of the shard blocks it gave.

        With the sum in `add_shard` a reduce-scatter that rounds once and adds in a fixed order.
        """
        rows = self._by_unit(dshard).transpose(0, 1)
        width, ranks = self.plan.width, self._exchange.ranks
        padded = rows.new_zeros(ranks * width, *rows.shape[1:])
        padded[self._indices.unpack] = rows
        return self._exchange.all_to_all(padded, [width] * ranks, [width] * ranks)

    def add_shard(self, returned: Tensor, dk: Tensor, dv: Tensor) -> None:
        units, heads = self._indices.pack_units, self._indices.pack_heads
        total = returned.unflatten(0, (self._exchange.ranks, -1))[:, : len(units)].sum(0, dtype=dk.dtype)
        for grad, part in zip((dk, dv), total.split([dk.shape[-1], dv.shape[-1]], -1)):
            self._by_unit(grad)[:, units, :, heads] += part


# ---------------------------------------------------------------------------------------------------------
# a2a


def _attend_by_head(
    q, k, v, pattern, scale, sink_logits, documents, backend, heads: HeadPlan, zigzag: Zigzag, exchange
) -> Tensor:
    q, k, v = ToHeads.apply(q, k, v, heads, zigzag, exchange)
    batch, boundaries = q.shape[0], None
    if len(documents) > 1:
        boundaries = [b * zigzag.tokens + stop for b in range(batch) for _, stop in documents]
        q, k, v = (x.flatten(0, 1) for x in (q, k, v))
    outs, first, kv_first = [], 0, 0
    # A rank's shares have as many query heads each, but where groups were cut apart.
    for size, alike in groupby(heads.shares[exchange.rank], key=lambda share: share.stop - share.start):
        shares = list(alike)
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
    return FromHeads.apply(out.unflatten(0, (batch, -1)) if boundaries else out, heads, zigzag, exchange)
