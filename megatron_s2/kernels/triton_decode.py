"""Decoding in Triton: attention of one token of each sequence to a KV cache. Two kernels and their launch.

The KV cache keeps the entries of a KV head side by side, so a token reads all of them, in order:

    s2_decode_kernel_split  one program per sequence, KV head and split of the head's keys. The query heads of
                            the KV head are the rows of its tile, so keys and values are read once and never
                            expanded. It writes attention over these keys and its log-sum-exp
    s2_decode_kernel_merge  one program per sequence and query head. It merges the splits in order, and the
                            sink logit

Each key and value that the token sees is read once, in the dtype of the cache: `cache_bytes`, 8 to 34 MB per
layer at 128K tokens, which take about 10 microseconds. Between the kernels, head_dim + 1 float32 numbers per
query head and split are written and read. With 4 query heads per KV head, 256 keys per split and 16 bits that
is 3% of the cache's bytes, and it need not leave the L2 cache.

One program per head would leave most of the chip idle. The length of a split follows from the capacity of the
cache, not from the number of entries in use nor from the chip. It therefore stays the same from token to
token, and without atomics the same cache gives the same bits on every chip. A split that begins beyond the
entries in use ends at once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_s2.kernels.triton_args import compile_args, padded, strides
from megatron_s2.kernels.triton_common import LOG2_E
from megatron_s2.kernels.triton_support import require_supported
from megatron_s2.kernels.tuning import Tiles

_PROGRAMS = 256  # programs of the split kernel, about twice the multiprocessors of today's chips
_SHORTEST_SPLIT = 256  # keys
_TILE_BYTES = 16384  # bytes of the keys of a tile
_MOST_KEYS = 128  # most keys of a tile; a split is a multiple of it
_MERGED_SPLITS = 32  # splits that the merge kernel reads at a time


# ---------------------------------------------------------------------------------------------------------
# Kernels.


@triton.jit(do_not_specialize=["s_lb", "s_lh", "first_head"])
def s2_decode_kernel_split(
    p_q, p_k, p_v, p_kept, p_part, p_lse, s_qb, s_qh, s_kb, s_kh, s_kt, s_vb, s_vh, s_vt, s_pb, s_ph, s_ps,
    s_lb, s_lh, first_head, span, scale,
    HKV: tl.constexpr, HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """part `[batch, heads, splits, D]` and lse `[batch, heads, splits]` (base 2) of HEADS KV heads."""
    i_b, i_r, i_s = tl.program_id(0) // HEADS, tl.program_id(0) % HEADS, tl.program_id(1)
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
    # The first tile has a key that every row sees, so that no row stays at minus infinity.
    m_i = tl.full([BM], float("-inf"), tl.float32)
    l_i = tl.zeros([BM], tl.float32)
    acc = tl.zeros([BM, BD], tl.float32)
    for i_n in range(start, stop, BN):
        o_n = i_n + tl.arange(0, BN)
        m_n = o_n < stop
        t = o_n.to(tl.int64)[:, None]
        m_t = m_n[:, None] & m_d[None, :]
        b_k = tl.load(p_k + t * s_kt + o_d, mask=m_t, other=0.0)  # [BN, BD]
        b_v = tl.load(p_v + t * s_vt + o_d, mask=m_t, other=0.0)  # [BN, BD]
        qk = tl.dot(b_q, tl.trans(b_k), input_precision=PREC) * scale  # [BM, BN]
        qk = tl.where(m_n[None, :], qk, float("-inf"))
        m_new = tl.maximum(m_i, tl.max(qk, 1))
        p = tl.exp2(qk - m_new[:, None])
        alpha = tl.exp2(m_i - m_new)
        acc = acc * alpha[:, None] + tl.dot(p.to(b_v.dtype), b_v, input_precision=PREC)
        l_i = l_i * alpha + tl.sum(p, 1)
        m_i = m_new

    p_part += o_b * s_pb + o_h[:, None] * s_ph + i_s * s_ps + o_d
    tl.store(p_part, acc / l_i[:, None], mask=m_q)
    tl.store(p_lse + o_b * s_lb + o_h * s_lh + i_s, m_i + tl.log2(l_i), mask=m_m)


@triton.jit(do_not_specialize=["s_lb", "s_lh"])
def s2_decode_kernel_merge(
    p_part, p_lse, p_kept, p_sink, p_out, s_pb, s_ph, s_ps, s_lb, s_lh, s_ob, s_oh, span,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, BS: tl.constexpr,
    HAS_SINK: tl.constexpr,
):  # fmt: skip
    """out `[batch, H, D]` from all splits of each query head; zeros for a sequence without entries."""
    i_b, i_h = tl.program_id(0) // H, tl.program_id(0) % H
    o_b, o_h = i_b.to(tl.int64), i_h.to(tl.int64)
    splits = (tl.load(p_kept + i_b * (H // GROUP) + i_h // GROUP) + span - 1) // span
    p_part += o_b * s_pb + o_h * s_ph
    p_lse += o_b * s_lb + o_h * s_lh
    o_d = tl.arange(0, BD)
    m_d = o_d < D

    m_i = -float("inf")
    l_i = 0.0
    if HAS_SINK:
        m_i = tl.load(p_sink + i_h).to(tl.float32) * LOG2_E
        l_i = 1.0
    acc = tl.zeros([BD], tl.float32)
    for i_s in range(0, splits, BS):
        o_s = i_s + tl.arange(0, BS)
        m_s = o_s < splits
        b_lse = tl.load(p_lse + o_s, mask=m_s, other=float("-inf"))  # [BS]
        b_part = tl.load(p_part + o_s[:, None] * s_ps + o_d, mask=m_s[:, None] & m_d, other=0.0)  # [BS, BD]
        m_new = tl.maximum(m_i, tl.max(b_lse, 0))
        p = tl.exp2(b_lse - m_new)
        alpha = tl.exp2(m_i - m_new)
        acc = acc * alpha + tl.sum(p[:, None] * b_part, 0)
        l_i = l_i * alpha + tl.sum(p, 0)
        m_i = m_new

    b_o = acc / tl.where(splits > 0, l_i, 1.0)
    tl.store(p_out + o_b * s_ob + o_h * s_oh + o_d, b_o.to(p_out.dtype.element_ty), mask=m_d)


# ---------------------------------------------------------------------------------------------------------
# Tiles and splits.


def decode_tiles(head_dim: int, group: int, element_size: int) -> Tiles:
    """Returns the tiles of the split kernel, for any chip: `group` query heads and 16 KiB of keys.

    At that size a multiprocessor holds several programs, each with loads in flight. float32 is multiplied
    without tensor cores and would spill registers with four warps.
    """
    keys = _TILE_BYTES // (padded(head_dim) * element_size)
    warps = 8 if element_size > 2 else 4
    return Tiles(rows=padded(group), keys=min(_MOST_KEYS, keys), warps=warps, stages=3)


def split_span(capacities: Sequence[int], batch: int) -> int:
    """Returns the number of keys of a split that makes about `_PROGRAMS` splits in all.

    Args:
        capacities: per KV head, the most keys that it may hold.
        batch: number of sequences.
    """
    keys = -(-batch * sum(capacities) // _PROGRAMS)
    return max(_SHORTEST_SPLIT, -(-keys // _MOST_KEYS) * _MOST_KEYS)


# ---------------------------------------------------------------------------------------------------------
# Launch.


def decode_attention(
    q: Tensor,
    storages: Sequence[tuple[Tensor, Tensor]],
    kept: Tensor,
    softmax_scale: float,
    sink_logits: Tensor | None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of one token of each sequence to the entries of its KV heads, without gradients.

    Args:
        q: `[batch, heads, head_dim]`; float16, bfloat16 or float32.
        storages: keys and values of consecutive KV heads, `[batch, kv_heads, capacity, head_dim]`; together
            all KV heads, in order.
        kept: number of entries of each sequence and KV head, int32 `[batch, kv_heads]`, contiguous. What lies
            behind them in a storage may be anything. The output of a head without entries is zero.
        softmax_scale: factor on the scores.
        sink_logits: `[heads]`, a logit per query head that joins the softmax with no value.
        return_lse: whether to return the log-sum-exp, too.

    Returns:
        `[batch, heads, head_dim]` in the dtype of `q`. With `return_lse` also the natural-log log-sum-exp of
        the keys, without the sink, `[batch, heads]` float32: minus infinity for a head without entries.

    Raises:
        ValueError: the kernels do not support the device, the dtype or the head_dim.
    """
    require_supported(q, q)
    batch, heads, head_dim = q.shape
    kv_heads = kept.shape[1]
    group = heads // kv_heads
    q = q if q.stride(-1) == 1 else q.contiguous()
    capacities = [k.shape[2] for k, _ in storages for _ in range(k.shape[1])]
    span = split_span(capacities, batch)
    splits = -(-max(capacities) // span)
    part = q.new_empty(batch, heads, splits, head_dim, dtype=torch.float32)
    lse = q.new_empty(batch, heads, splits, dtype=torch.float32)
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    tiles = decode_tiles(head_dim, group, q.element_size())
    shared = {
        "p_part": part, **strides("p", part, "bhs"), "p_lse": lse, **strides("l", lse, "bh"), "p_kept": kept,
        "span": span, "GROUP": group, "D": head_dim, "BD": padded(head_dim),
    }  # fmt: skip
    with torch.cuda.device_of(q):
        first = 0
        for k, v in storages:
            s2_decode_kernel_split[(batch * k.shape[1], -(-k.shape[2] // span))](
                **shared, p_q=q, **strides("q", q, "bh"), p_k=k, **strides("k", k, "bht"),
                p_v=v, **strides("v", v, "bht"), first_head=first, scale=softmax_scale * LOG2_E.value,
                HKV=kv_heads, HEADS=k.shape[1], BM=tiles.rows, BN=tiles.keys, **compile_args(q.dtype, tiles),
            )  # fmt: skip
            first += k.shape[1]
        s2_decode_kernel_merge[(batch * heads,)](
            **shared, p_sink=None if sink_logits is None else sink_logits.contiguous(), p_out=out,
            **strides("o", out, "bh"), H=heads, BS=_MERGED_SPLITS, HAS_SINK=sink_logits is not None,
            enable_fp_fusion=True,
        )  # fmt: skip
    if not return_lse:
        return out
    used = (kept.repeat_interleave(group, 1, output_size=heads) + span - 1) // span
    unused = torch.arange(splits, device=q.device) >= used[..., None]
    return out, (lse * math.log(2)).masked_fill_(unused, float("-inf")).logsumexp(-1)
