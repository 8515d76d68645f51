"""Backward pass in Triton over key columns: dK and dV, two kernels and their launches.

A key is seen by two sets of rows. Each set has its kernel, and together they visit every pair once:

    window  the rows whose window holds the key: a run of at most `window` blocks
    shard   if the key's block is in the head's shard, every later row up to the end of the sequence. Such
            columns are long and few, so their rows are cut into splits of `span` rows, one program each. The
            window kernel adds up their float32 parts in order: without atomics, two runs give equal bits.
            With CSR these are the rows in the list of the tile's block (a tile lies in one), cut evenly

A program sums over all query heads of its KV head, so it reads K and V once.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_s2.kernels.triton_args import KernelArgs, strides
from megatron_s2.kernels.triton_common import (
    LOG2_E,
    first_at_least,
    in_shard,
    key_program,
    list_bounds,
    listed_token,
    shard_block,
    shard_count,
    shard_token,
)


@triton.jit
def _add_dkv(
    dk, dv, b_k, b_v, p_q, p_do, p_lse, p_delta, s_qt, s_dot, o_m, m_m, m_d, m_dv, mask, scale, o_d, o_dv,
    MASKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Adds what query rows o_m [BM] contribute to dK [BN, BD], without softmax scale, and dV [BN, BDV]."""
    t = o_m.to(tl.int64)[:, None]
    b_q = tl.load(p_q + t * s_qt + o_d, mask=m_m[:, None] & m_d, other=0.0)  # [BM, BD]
    b_do = tl.load(p_do + t * s_dot + o_dv, mask=m_m[:, None] & m_dv, other=0.0)  # [BM, BDV]
    lse = tl.load(p_lse + o_m, mask=m_m, other=float("inf")) * LOG2_E  # [BM]
    delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)  # [BM]
    qk = tl.dot(b_k, tl.trans(b_q), input_precision=PREC) * scale  # [BN, BM]
    p = tl.exp2(qk - lse[None, :])
    if MASKED:
        p = tl.where(mask, p, 0.0)
    dv += tl.dot(p.to(b_do.dtype), b_do, input_precision=PREC)
    dp = tl.dot(b_v, tl.trans(b_do), input_precision=PREC)  # [BN, BM]
    ds = p * (dp - delta[None, :])
    dk += tl.dot(ds.to(b_q.dtype), b_q, input_precision=PREC)
    return dk, dv


@triton.jit
def s2_bwd_kernel_dkv_shard(
    p_q, p_ks, p_vs, p_do, p_lse, p_delta, p_dks, p_dvs, p_heads, p_starts, p_list, p_tiles, s_qb, s_qt, s_qh,
    s_ksb, s_kst, s_ksh, s_vsb, s_vst, s_vsh, s_dob, s_dot, s_doh, s_lb, s_lh, s_dkss, s_dksb, s_dkst, s_dksh,
    s_dvss, s_dvsb, s_dvst, s_dvsh, seq_q, q_start, window, sinks, scale, span, group, num_blocks,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, COMPACT: tl.constexpr, CSR: tl.constexpr,
    PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Parts of dK and dV of BN shard tokens from one split of the rows: `[split, batch, token, HKV, dim]`, or
    with COMPACT `[split, batch, token, 1, dim]`, the shards of the heads one after another."""
    i_n, i_s = tl.program_id(0), tl.program_id(1)
    i_b, i_g = tl.program_id(2) // HKV, (tl.program_id(2) % HKV).to(tl.int64)
    i_n, doc, seq_q, offset = key_program(i_n, p_tiles, seq_q, PACKED)
    first, stride = tl.load(p_heads + 4 * i_g), tl.load(p_heads + 4 * i_g + 1)
    end = q_start + seq_q
    tokens = shard_count(tl.maximum(0, (end - 1) // BLOCK - window + 1), first, stride, sinks) * BLOCK
    if i_n * BN >= tokens:
        return
    o_b = i_b.to(tl.int64)
    p_q += o_b * s_qb + doc * s_qt + i_g * group * s_qh
    p_do += o_b * s_dob + doc * s_dot + i_g * group * s_doh
    p_lse += o_b * s_lb + i_g * group * s_lh + doc
    p_delta += o_b * s_lb + i_g * group * s_lh + doc
    if COMPACT:
        shard_start = tl.load(p_heads + 4 * i_g + 2).to(tl.int64)
        offset = tl.load(p_heads + 4 * i_g + 3).to(tl.int64)
        p_ks += o_b * s_ksb + shard_start * s_kst
        p_vs += o_b * s_vsb + shard_start * s_vst
    else:
        p_ks += o_b * s_ksb + doc * s_kst + i_g * s_ksh
        p_vs += o_b * s_vsb + doc * s_vst + i_g * s_vsh

    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    m_d, m_dv = o_d < D, o_dv < DV
    index = i_n * BN + tl.arange(0, BN)
    m_n = index < tokens
    block = shard_block(index // BLOCK, first, stride, sinks)
    t = shard_token(index, first, stride, sinks, BLOCK, COMPACT).to(tl.int64)[:, None]
    b_k = tl.load(p_ks + t * s_kst + o_d, mask=m_n[:, None] & m_d, other=0.0)  # [BN, BD]
    b_v = tl.load(p_vs + t * s_vst + o_dv, mask=m_n[:, None] & m_dv, other=0.0)  # [BN, BDV]
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)

    if CSR:
        begin, stop = list_bounds(p_starts, i_g, i_n * BN // BLOCK, num_blocks)
        begin = first_at_least(p_list, begin, stop, q_start // BLOCK)
        stop = first_at_least(p_list, begin, stop, (end - 1) // BLOCK + 1)
        share = (stop - begin + tl.num_programs(1) - 1) // tl.num_programs(1)
        begin += i_s * share
        stop = tl.minimum(stop, begin + share)
        # Rows count in tokens of the list from here on, without those before q_start and past the end.
        row0 = tl.load(p_list + begin, mask=begin < stop, other=0)
        row1 = tl.load(p_list + stop - 1, mask=begin < stop, other=0)
        p_list += begin
        low = tl.maximum(0, q_start - row0 * BLOCK)
        high = (stop - begin).to(tl.int32) * BLOCK - tl.maximum(0, (row1 + 1) * BLOCK - end)
        high = tl.where(begin < stop, high, low)
        inner = low
    else:
        # Rows [low, inner) see some keys of the tile, [inner, high) see all of them.
        split = q_start + i_s * span
        high = tl.minimum(end, split + span)
        low = tl.maximum(split, (shard_block(i_n * BN // BLOCK, first, stride, sinks) + window) * BLOCK)
        last = tl.minimum(i_n * BN + BN, tokens) - 1
        full = (shard_block(last // BLOCK, first, stride, sinks) + window) * BLOCK
        high = tl.maximum(low, high)
        inner = tl.minimum(high, low + (tl.maximum(full - low, 0) + BM - 1) // BM * BM)
    # One loop over heads and tiles: two nested loops spill what the pipeline of the inner one starts with.
    n_masked = (inner - low + BM - 1) // BM
    for i in range(group * n_masked):
        i_h = (i // tl.maximum(n_masked, 1)).to(tl.int64)
        pos = low + i % tl.maximum(n_masked, 1) * BM + tl.arange(0, BM)
        mask = pos[None, :] // BLOCK - block[:, None] >= window
        dk, dv = _add_dkv(
            dk, dv, b_k, b_v, p_q + i_h * s_qh, p_do + i_h * s_doh, p_lse + i_h * s_lh, p_delta + i_h * s_lh,
            s_qt, s_dot, pos - q_start, pos < high, m_d, m_dv, mask, scale, o_d, o_dv, True, PREC,
        )  # fmt: skip
    n_full = (high - inner + BM - 1) // BM
    for i in range(group * n_full):
        i_h = (i // tl.maximum(n_full, 1)).to(tl.int64)
        pos = inner + i % tl.maximum(n_full, 1) * BM + tl.arange(0, BM)
        m_m = pos < high
        if CSR:
            pos = listed_token(pos, m_m, p_list, BLOCK)
        dk, dv = _add_dkv(
            dk, dv, b_k, b_v, p_q + i_h * s_qh, p_do + i_h * s_doh, p_lse + i_h * s_lh, p_delta + i_h * s_lh,
            s_qt, s_dot, pos - q_start, m_m, m_d, m_dv, None, scale, o_d, o_dv, False, PREC,
        )  # fmt: skip

    o_t = (offset + index)[:, None]
    p_dks += i_s.to(tl.int64) * s_dkss + o_b * s_dksb
    p_dvs += i_s.to(tl.int64) * s_dvss + o_b * s_dvsb
    if not COMPACT:
        p_dks += i_g * s_dksh
        p_dvs += i_g * s_dvsh
    tl.store(p_dks + o_t * s_dkst + o_d, dk * (scale / LOG2_E), mask=m_n[:, None] & m_d)
    tl.store(p_dvs + o_t * s_dvst + o_dv, dv, mask=m_n[:, None] & m_dv)


@triton.jit
def s2_bwd_kernel_dkv_window(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv, p_dks, p_dvs, p_heads, p_tiles, s_qb, s_qt, s_qh, s_kb,
    s_kt, s_kh, s_vb, s_vt, s_vh, s_dob, s_dot, s_doh, s_lb, s_lh, s_dkb, s_dkt, s_dkh, s_dvb, s_dvt, s_dvh,
    s_dkss, s_dksb, s_dkst, s_dksh, s_dvss, s_dvsb, s_dvst, s_dvsh, seq_q, seq_k, q_start, k_start, window,
    sinks, scale, splits, group, HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ADD_SHARD: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dK and dV `[batch, seq_k, HKV, dim]` of BN window keys, to which the parts of the shard are added."""
    i_n = tl.program_id(0)
    i_b, i_g = tl.program_id(1) // HKV, (tl.program_id(1) % HKV).to(tl.int64)
    i_n, doc, seq_q, offset = key_program(i_n, p_tiles, seq_q, PACKED)
    if PACKED:
        seq_k = seq_q
    first, stride = tl.load(p_heads + 4 * i_g), tl.load(p_heads + 4 * i_g + 1)
    o_b = i_b.to(tl.int64)
    p_q += o_b * s_qb + doc * s_qt + i_g * group * s_qh
    p_do += o_b * s_dob + doc * s_dot + i_g * group * s_doh
    p_lse += o_b * s_lb + i_g * group * s_lh + doc
    p_delta += o_b * s_lb + i_g * group * s_lh + doc
    p_k += o_b * s_kb + doc * s_kt + i_g * s_kh
    p_v += o_b * s_vb + doc * s_vt + i_g * s_vh

    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    m_d, m_dv = o_d < D, o_dv < DV
    o_n = i_n * BN + tl.arange(0, BN)
    o_n64 = o_n.to(tl.int64)[:, None]
    m_n = o_n < seq_k
    key = k_start + o_n
    block = key // BLOCK
    b_k = tl.load(p_k + o_n64 * s_kt + o_d, mask=m_n[:, None] & m_d, other=0.0)  # [BN, BD]
    b_v = tl.load(p_v + o_n64 * s_vt + o_dv, mask=m_n[:, None] & m_dv, other=0.0)  # [BN, BDV]
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)

    # Rows [low, inner) hold the diagonal, rows [inner, right) see all keys of the tile, and the windows of
    # rows [right, high) leave the tile.
    key0 = k_start + i_n * BN
    key1 = k_start + tl.minimum(i_n * BN + BN, seq_k)
    end = q_start + seq_q
    low = tl.maximum(key0, q_start)
    high = tl.maximum(low, tl.minimum(((key1 - 1) // BLOCK + window) * BLOCK, end))
    inner = tl.minimum(high, low + (tl.maximum(key1 - low, 0) + BM - 1) // BM * BM)
    right = inner + tl.maximum(0, tl.minimum((key0 // BLOCK + window) * BLOCK, high) - inner) // BM * BM
    # One loop over heads and tiles, as in the shard kernel.
    before = (inner - low + BM - 1) // BM
    n_masked = before + (high - right + BM - 1) // BM
    for i in range(group * n_masked):
        i_h, i_m = (i // tl.maximum(n_masked, 1)).to(tl.int64), i % tl.maximum(n_masked, 1)
        pos = tl.where(i_m < before, low + i_m * BM, right + (i_m - before) * BM) + tl.arange(0, BM)
        m_m = pos < tl.where(i_m < before, inner, high)
        mask = (key[:, None] <= pos[None, :]) & (pos[None, :] // BLOCK - block[:, None] < window)
        dk, dv = _add_dkv(
            dk, dv, b_k, b_v, p_q + i_h * s_qh, p_do + i_h * s_doh, p_lse + i_h * s_lh, p_delta + i_h * s_lh,
            s_qt, s_dot, pos - q_start, m_m, m_d, m_dv, mask, scale, o_d, o_dv, True, PREC,
        )  # fmt: skip
    n_full = (right - inner) // BM
    for i in range(group * n_full):
        i_h = (i // tl.maximum(n_full, 1)).to(tl.int64)
        pos = inner + i % tl.maximum(n_full, 1) * BM + tl.arange(0, BM)
        dk, dv = _add_dkv(
            dk, dv, b_k, b_v, p_q + i_h * s_qh, p_do + i_h * s_doh, p_lse + i_h * s_lh, p_delta + i_h * s_lh,
            s_qt, s_dot, pos - q_start, pos < end, m_d, m_dv, None, scale, o_d, o_dv, False, PREC,
        )  # fmt: skip
    dk *= scale / LOG2_E

    if ADD_SHARD:
        tokens = shard_count(tl.maximum(0, (end - 1) // BLOCK - window + 1), first, stride, sinks) * BLOCK
        n = tl.where(block < sinks, block, sinks + (block - first) // stride)
        index = n * BLOCK + key % BLOCK
        m_s = m_n & in_shard(block, first, stride, sinks) & (block * BLOCK < end) & (index < tokens)
        o_t = (offset + index)[:, None]
        p_dks += o_b * s_dksb + i_g * s_dksh
        p_dvs += o_b * s_dvsb + i_g * s_dvsh
        for _ in range(splits):
            dk += tl.load(p_dks + o_t * s_dkst + o_d, mask=m_s[:, None] & m_d, other=0.0)
            dv += tl.load(p_dvs + o_t * s_dvst + o_dv, mask=m_s[:, None] & m_dv, other=0.0)
            p_dks += s_dkss
            p_dvs += s_dvss

    p_dk += o_b * s_dkb + doc * s_dkt + i_g * s_dkh
    p_dv += o_b * s_dvb + doc * s_dvt + i_g * s_dvh
    tl.store(p_dk + o_n64 * s_dkt + o_d, dk.to(p_dk.dtype.element_ty), mask=m_n[:, None] & m_d)
    tl.store(p_dv + o_n64 * s_dvt + o_dv, dv.to(p_dv.dtype.element_ty), mask=m_n[:, None] & m_dv)


def launch_dkv(args: KernelArgs, dout: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Writes `dk` and `dv` of a call whose shard is read from k and v."""
    launch_dkv_window(args, dout, lse, delta, dk, dv, launch_dkv_shard(args, dout, lse, delta))


def launch_dkv_shard(args: KernelArgs, dout: Tensor, lse: Tensor, delta: Tensor) -> list[Tensor]:
    """Returns the parts of dK and dV that come through the shard, in float32, one per split of the rows.

    Their shape is `[splits, batch, tokens, kv_heads, head_dim]`. For a compact shard source it is
    `[splits, batch, tokens, 1, head_dim]`, the `args.shard_tokens` of the KV heads one after another.
    """
    batch, _, kv_heads, _ = args.k.shape
    tiles = args.tiles("dkv")
    programs, tokens = args.shard_key_programs(tiles.keys)
    longest = max(length for _, length in args.documents)
    splits = args.tuning.splits(len(programs) * batch * kv_heads, longest) if programs else 0
    shape = [tokens, kv_heads] if args.k_shard is None else [sum(args.shard_tokens), 1]
    dks, dvs = (
        args.q.new_empty(splits, batch, *shape, x.shape[-1], dtype=torch.float32) for x in (args.k, args.v)
    )
    if programs:
        s2_bwd_kernel_dkv_shard[(len(programs), splits, batch * kv_heads)](
            **args.query_args, **args.shard_args, **args.list_args(of_keys=True), **args.pattern_args,
            p_do=dout, **strides("do", dout), p_lse=lse, p_delta=delta, **strides("l", lse, "bh"),
            p_dks=dks, p_dvs=dvs, **strides("dks", dks, "sbth"), **strides("dvs", dvs, "sbth"),
            span=-(-longest // splits), group=args.group, HKV=kv_heads,
            **args.program_args(programs), **args.tile_args(tiles),
        )  # fmt: skip
    return [dks, dvs]


def launch_dkv_window(
    args: KernelArgs,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    parts: list[Tensor] | None = None,
) -> None:
    """Writes `dk` and `dv` of the window source.

    Args:
        parts: what `launch_dkv_shard` returned, to be added where the shard is read from k and v.
    """
    batch, seq_k, kv_heads, _ = args.k.shape
    tiles = args.tiles("dkv")
    programs = args.key_programs(tiles.keys)
    dks, dvs = parts or (None, None)
    s2_bwd_kernel_dkv_window[(len(programs), batch * kv_heads)](
        **args.query_args, **args.window_args, **args.pattern_args, seq_k=seq_k,
        p_do=dout, **strides("do", dout), p_lse=lse, p_delta=delta, **strides("l", lse, "bh"),
        p_dk=dk, p_dv=dv, **strides("dk", dk), **strides("dv", dv),
        p_dks=dks, p_dvs=dvs, **strides("dks", dks, "sbth"), **strides("dvs", dvs, "sbth"),
        splits=0 if dks is None else dks.shape[0], ADD_SHARD=dks is not None, group=args.group, HKV=kv_heads,
        **args.program_args(programs), **args.tile_args(tiles),
    )  # fmt: skip
