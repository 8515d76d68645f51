"""Attention of one token of each sequence to a cache, on a GPU: two kernels, whatever the cache holds.

In the small cache a KV head's keys lie side by side, so that a token reads them all, in order:

    decode_kernel_split   one program per sequence, KV head and split of the head's keys. The query heads of
                          the KV head are the rows of its tile: keys and values are read once, never expanded.
                          It leaves the attention to these keys and their log-sum-exp
    decode_kernel_merge   one program per sequence and query head: its splits in their order, and the sink

Each stored key and value that the token sees is read once, in the cache's dtype: `cache_bytes` is the floor,
8 to 34 MB per layer at 128K tokens, a matter of 10 microseconds. What goes from one kernel to the other is
head_dim + 1 float32 numbers per query head and split, written and read: 3% of the floor with 4 query heads
per KV head, 256 keys per split and 16 bits, and it need not leave the chip's L2 cache.

One program per head would leave most of the chip idle. The splits are cut from what memory is set aside, not
from what of it is in use nor from the chip: their number does not change from token to token, nothing is
reduced by atomics, and the same cache gives the same bits everywhere. A split that begins beyond what is in
use ends at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_s2.kernels.triton_backend import require_supported
from megatron_s2.kernels.triton_tiles import LOG2_E
from megatron_s2.kernels.tuning import Tiles

_PROGRAMS = 256  # about twice the multiprocessors of today's chips
_SHORTEST_SPAN = 256  # keys of a split
_TILE_BYTES = 16384
_MOST_KEYS = 128  # of a tile; whole tiles make a split
_MERGED = 32  # splits that the merging kernel reads at once


# ---------------------------------------------------------------------------------------------------------
# Kernels.


@triton.jit(do_not_specialize=["s_lb", "s_lh", "first_head"])
def decode_kernel_split(
    p_q, p_k, p_v, p_kept, p_part, p_lse, s_qb, s_qh, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_pb, s_ph, s_ps,
    s_lb, s_lh, first_head, span, scale,
    HKV: tl.constexpr, RUN: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """part `[batch, heads, splits, D]`, lse `[batch, heads, splits]` (base 2) of RUN KV heads."""
    i_b, i_r, i_s = tl.program_id(0) // RUN, tl.program_id(0) % RUN, tl.program_id(1)
    i_g = first_head + i_r
    start = i_s * span
    stop = tl.minimum(start + span, tl.load(p_kept + i_b * HKV + i_g))
    if start >= stop:
        return
    o_b, o_r = i_b.to(tl.int64), i_r.to(tl.int64)
    p_k += o_b * s_kb + o_r * s_kh
    p_v += o_b * s_vb + o_r * s_vh

    o_m, o_d = tl.arange(0, BM), tl.arange(0, BD)
    m_m, m_d = o_m < GROUP, o_d < D
    o_h = (i_g * GROUP + o_m).to(tl.int64)
    m_q = m_m[:, None] & m_d[None, :]
    b_q = tl.load(p_q + o_b * s_qb + o_h[:, None] * s_qh + o_d, mask=m_q, other=0.0)  # [BM, BD]
    # The first tile has a key that every row sees: none stays at minus infinity.
    top = tl.full([BM], float("-inf"), tl.float32)
    total = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for i_n in range(start, stop, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < stop
        t = o_n.to(tl.int64)[:, None]
        m_t = m_n[:, None] & m_d[None, :]
        b_k = tl.load(p_k + t * s_kt + o_d, mask=m_t, other=0.0)  # [BN, BD]
        b_v = tl.load(p_v + t * s_vt + o_d, mask=m_t, other=0.0)  # [BN, BD]
        b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PREC) * scale  # [BM, BN]
        b_s = tl.where(m_n[None, :], b_s, float("-inf"))
        new = tl.maximum(top, tl.max(b_s, 1))
        b_p = tl.exp2(b_s - new[:, None])
        alpha = tl.exp2(top - new)
        acc = acc * alpha[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PREC)
        total = total * alpha + tl.sum(b_p, 1)
        top = new

    p_part += o_b * s_pb + o_h[:, None] * s_ph + i_s * s_ps + o_d
    tl.store(p_part, acc / total[:, None], mask=m_q)
    tl.store(p_lse + o_b * s_lb + o_h * s_lh + i_s, top + tl.log2(total), mask=m_m)


@triton.jit(do_not_specialize=["s_lb", "s_lh"])
def decode_kernel_merge(
    p_part, p_lse, p_kept, p_sink, p_out, s_pb, s_ph, s_ps, s_lb, s_lh, s_ob, s_oh, span,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    HAS_SINK: tl.constexpr,
):  # fmt: skip
    """out `[batch, H, D]`: all splits of each query head; zeros for a sequence that keeps nothing."""
    i_b, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    o_b, o_h = i_b.to(tl.int64), i_h.to(tl.int64)
    splits = (tl.load(p_kept + i_b * (H // GROUP) + i_h // GROUP) + span - 1) // span
    p_part += o_b * s_pb + o_h * s_ph
    p_lse += o_b * s_lb + o_h * s_lh
    o_d = tl.arange(0, BD)
    m_d = o_d < D

    top = -float("inf")
    total = 0.0
    if HAS_SINK:
        top = tl.load(p_sink + i_h).to(tl.float32) * LOG2_E
        total = 1.0
    acc = tl.zeros([BD], tl.float32)
    for i_s in range(0, splits, BS):
        o_s = i_s + tl.arange(0, BS)
        m_s = o_s < splits
        b_lse = tl.load(p_lse + o_s, mask=m_s, other=float("-inf"))  # [BS]
        b_part = tl.load(p_part + o_s[:, None] * s_ps + o_d, mask=m_s[:, None] & m_d, other=0.0)  # [BS, BD]
        new = tl.maximum(top, tl.max(b_lse, 0))
        b_p = tl.exp2(b_lse - new)
        alpha = tl.exp2(top - new)
        acc = acc * alpha + tl.sum(b_p[:, None] * b_part, 0)
        total = total * alpha + tl.sum(b_p, 0)
        top = new

    b_o = acc / tl.where(splits > 0, total, 1.0)
    tl.store(p_out + o_b * s_ob + o_h * s_oh + o_d, b_o.to(p_out.dtype.element_ty), mask=m_d)


# ---------------------------------------------------------------------------------------------------------
# How a call is cut.


def decode_tiles(head_dim: int, group: int, element_size: int) -> Tiles:
    """A tile of the splitting kernel, for any chip: a KV head's query heads, and 16 KiB of its keys.

    At that size a multiprocessor holds several programs, each with loads on the way. What is multiplied
    without tensor cores, float32, would spill registers with four warps.
    """
    keys = _TILE_BYTES // (_padded(head_dim) * element_size)
    warps = 8 if element_size > 2 else 4
    return Tiles(rows=_padded(group), keys=min(_MOST_KEYS, keys), warps=warps, stages=3)


def split_span(capacities: Sequence[int], batch: int) -> int:
    """Keys of one split, so that there are about `_PROGRAMS` of them.

    Args:
        capacities: most keys that each KV head may hold.
        batch: sequences.
    """
    return max(_SHORTEST_SPAN, _up(-(-batch * sum(capacities) // _PROGRAMS), _MOST_KEYS))


def _padded(size: int) -> int:
    return max(16, triton.next_power_of_2(size))


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


# ---------------------------------------------------------------------------------------------------------
# Launches.


def decode_attention(
    q: Tensor,
    runs: Sequence[tuple[Tensor, Tensor]],
    kept: Tensor,
    softmax_scale: float,
    sink_logits: Tensor | None,
) -> Tensor:
    """Attention of one token of each sequence to what its KV heads hold. Without gradients.

    Args:
        q: `[batch, heads, head_dim]`; float16, bfloat16 or float32.
        runs: keys and values of some KV heads each, in the order of the heads: `[batch, kv_heads, capacity,
            head_dim]`.
        kept: int32 `[batch, kv_heads]`, contiguous: so many of the first keys are there; of a head that has
            none, zeros come out. What lies behind them may be anything.
        softmax_scale: factor on the scores.
        sink_logits: `[heads]`, a logit per query head that joins the softmax with no value.

    Returns:
        `[batch, heads, head_dim]` in the dtype of `q`.

    Raises:
        ValueError: device, dtype or head_dim that the kernels do not take.
    """
    require_supported(q, q)
    batch, heads, head_dim = q.shape
    kv_heads = kept.shape[1]
    group = heads // kv_heads
    q = q if q.stride(-1) == 1 else q.contiguous()
    capacities = [k.shape[2] for k, _ in runs for _ in range(k.shape[1])]
    span = split_span(capacities, batch)
    splits = -(-max(capacities) // span)
    part = q.new_empty(batch, heads, splits, head_dim, dtype=torch.float32)
    lse = q.new_empty(batch, heads, splits, dtype=torch.float32)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    tiles = decode_tiles(head_dim, group, q.element_size())
    dim = {"D": head_dim, "BD": _padded(head_dim), "enable_fp_fusion": True}
    between = *part.stride()[:3], *lse.stride()[:2]
    first = 0
    for k, v in runs:
        decode_kernel_split[(batch * k.shape[1], -(-k.shape[2] // span))](
            q, k, v, kept, part, lse, *q.stride()[:2], *k.stride()[:3], *v.stride()[:3], *between, first,
            span, softmax_scale * LOG2_E.value, HKV=kv_heads, RUN=k.shape[1], GROUP=group, BM=tiles.rows,
            BN=tiles.keys, PREC="ieee" if q.dtype == torch.float32 else "tf32", num_warps=tiles.warps,
            num_stages=tiles.stages, **dim,
        )  # fmt: skip
        first += k.shape[1]
    decode_kernel_merge[(batch * heads,)](
        part, lse, kept, None if sink_logits is None else sink_logits.contiguous(), out, *between,
        *out.stride()[:2], span, H=heads, GROUP=group, BS=_MERGED, HAS_SINK=sink_logits is not None, **dim,
    )  # fmt: skip
    return out
