"""Triton kernels over key columns: dK and dV.

A key is seen by two sets of rows, and each has its kernel; together they see every pair once:

    window  the rows whose window reaches the key: a run of at most `window` blocks
    shard   if the key's block is in the head's shard, every row after those: up to the end of the sequence.
            Such columns are long and few, so their rows are cut into `SPLITS` spans, one program each, whose
            float32 parts the window kernel adds up in order. No atomics: two runs give equal bits.
            With CSR, the rows in the list of the tile's block (it lies in one), cut evenly

All query heads of the group are summed inside a program; K and V are read once for them.
"""

import triton
import triton.language as tl

from megatron_s2.kernels.triton_tiles import (
    LOG2_E,
    first_at_least,
    in_shard,
    list_bounds,
    listed_token,
    shard_block,
    shard_count,
    shard_token,
)


@triton.jit
def _column_tile(
    dk, dv, b_k, b_v, p_q, p_do, p_lse, p_delta, s_qt, s_dot, o_m, m_m, m_d, m_dv, mask, scale, o_d, o_dv,
    MASKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Adds what the query rows o_m [BM] contribute to dK [BN, BD] (but for the scale) and dV [BN, BDV]."""
    t = o_m.to(tl.int64)[:, None]
    b_q = tl.load(p_q + t * s_qt + o_d, mask=m_m[:, None] & m_d, other=0.0)  # [BM, BD]
    b_do = tl.load(p_do + t * s_dot + o_dv, mask=m_m[:, None] & m_dv, other=0.0)  # [BM, BDV]
    b_lse = tl.load(p_lse + o_m, mask=m_m, other=float("inf")) * LOG2_E
    b_delta = tl.load(p_delta + o_m, mask=m_m, other=0.0)
    b_s = tl.dot(b_k, tl.trans(b_q), input_precision=PREC) * scale  # [BN, BM]
    b_p = tl.exp2(b_s - b_lse[None, :])
    if MASKED:
        b_p = tl.where(mask, b_p, 0.0)
    dv += tl.dot(b_p.to(b_do.dtype), b_do, input_precision=PREC)
    b_dp = tl.dot(b_v, tl.trans(b_do), input_precision=PREC)  # [BN, BM]
    b_ds = b_p * (b_dp - b_delta[None, :])
    dk += tl.dot(b_ds.to(b_q.dtype), b_q, input_precision=PREC)
    return dk, dv


@triton.jit
def s2_bwd_kernel_dkv_shard(
    p_q, p_ks, p_vs, p_do, p_lse, p_delta, p_dks, p_dvs, p_heads, p_starts, p_list, p_tiles, s_qb, s_qt, s_qh,
    s_ksb, s_kst, s_ksh, s_vsb, s_vst, s_vsh, s_dob, s_dot, s_doh, s_lb, s_lh, s_pks, s_pkb, s_pkt, s_pkh,
    s_pvs, s_pvb, s_pvt, s_pvh, seq_q, q_start, window, sinks, scale, span, group, num_blocks,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, COMPACT: tl.constexpr, CSR: tl.constexpr,
    PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """One span of rows of one tile of BN shard tokens: parts of dK, dV `[split, batch, token, HKV, dim]`, or
    with COMPACT `[split, batch, token, dim]` with the heads' tokens one after another."""
    i_n, i_s = tl.program_id(0), tl.program_id(1)
    i_b, i_g = tl.program_id(2) // HKV, (tl.program_id(2) % HKV).to(tl.int64)
    doc = tl.zeros((), dtype=tl.int64)
    room = tl.zeros((), dtype=tl.int64)
    if PACKED:
        doc = tl.load(p_tiles + 4 * i_n).to(tl.int64)
        seq_q = tl.load(p_tiles + 4 * i_n + 1)
        room = tl.load(p_tiles + 4 * i_n + 3).to(tl.int64)
        i_n = tl.load(p_tiles + 4 * i_n + 2)
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
        place = tl.load(p_heads + 4 * i_g + 2).to(tl.int64)
        room = tl.load(p_heads + 4 * i_g + 3).to(tl.int64)
        p_ks += o_b * s_ksb + place * s_kst
        p_vs += o_b * s_vsb + place * s_vst
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
        begin, past = list_bounds(p_starts, i_g, i_n * BN // BLOCK, num_blocks)
        begin = first_at_least(p_list, begin, past, q_start // BLOCK)
        past = first_at_least(p_list, begin, past, (end - 1) // BLOCK + 1)
        share = (past - begin + tl.num_programs(1) - 1) // tl.num_programs(1)
        begin += i_s * share
        past = tl.minimum(past, begin + share)
        # Count in the list's tokens, but for those of its rows before q_start and past the end.
        row0 = tl.load(p_list + begin, mask=begin < past, other=0)
        row1 = tl.load(p_list + past - 1, mask=begin < past, other=0)
        p_list += begin
        low = tl.maximum(0, q_start - row0 * BLOCK)
        high = (past - begin).to(tl.int32) * BLOCK - tl.maximum(0, (row1 + 1) * BLOCK - end)
        high = tl.where(begin < past, high, low)
        some = low
    else:
        cut = q_start + i_s * span
        high = tl.minimum(end, cut + span)
        low = tl.maximum(cut, (shard_block(i_n * BN // BLOCK, first, stride, sinks) + window) * BLOCK)
        last = tl.minimum(i_n * BN + BN, tokens) - 1
        all_see = (shard_block(last // BLOCK, first, stride, sinks) + window) * BLOCK
        high = tl.maximum(low, high)
        some = tl.minimum(high, low + (tl.maximum(all_see - low, 0) + BM - 1) // BM * BM)
    # One loop over heads and tiles, not two: what the pipeline of an inner loop keeps for its start spills.
    n_some = (some - low + BM - 1) // BM
    for i in range(group * n_some):
        i_h = (i // tl.maximum(n_some, 1)).to(tl.int64)
        pos = low + i % tl.maximum(n_some, 1) * BM + tl.arange(0, BM)
        mask = pos[None, :] // BLOCK - block[:, None] >= window
        dk, dv = _column_tile(
            dk, dv, b_k, b_v, p_q + i_h * s_qh, p_do + i_h * s_doh, p_lse + i_h * s_lh, p_delta + i_h * s_lh,
            s_qt, s_dot, pos - q_start, pos < high, m_d, m_dv, mask, scale, o_d, o_dv, True, PREC,
        )  # fmt: skip
    n_all = (high - some + BM - 1) // BM
    for i in range(group * n_all):
        i_h = (i // tl.maximum(n_all, 1)).to(tl.int64)
        pos = some + i % tl.maximum(n_all, 1) * BM + tl.arange(0, BM)
        m_m = pos < high
        if CSR:
            pos = listed_token(pos, m_m, p_list, BLOCK)
        dk, dv = _column_tile(
            dk, dv, b_k, b_v, p_q + i_h * s_qh, p_do + i_h * s_doh, p_lse + i_h * s_lh, p_delta + i_h * s_lh,
            s_qt, s_dot, pos - q_start, m_m, m_d, m_dv, None, scale, o_d, o_dv, False, PREC,
        )  # fmt: skip

    o_t = (room + index)[:, None]
    p_dks += i_s.to(tl.int64) * s_pks + o_b * s_pkb
    p_dvs += i_s.to(tl.int64) * s_pvs + o_b * s_pvb
    if not COMPACT:
        p_dks += i_g * s_pkh
        p_dvs += i_g * s_pvh
    tl.store(p_dks + o_t * s_pkt + o_d, dk * (scale / LOG2_E), mask=m_n[:, None] & m_d)
    tl.store(p_dvs + o_t * s_pvt + o_dv, dv, mask=m_n[:, None] & m_dv)


@triton.jit
def s2_bwd_kernel_dkv_window(
    p_q, p_k, p_v, p_do, p_lse, p_delta, p_dk, p_dv, p_dks, p_dvs, p_heads, p_tiles, s_qb, s_qt, s_qh, s_kb,
    s_kt, s_kh, s_vb, s_vt, s_vh, s_dob, s_dot, s_doh, s_lb, s_lh, s_gkb, s_gkt, s_gkh, s_gvb, s_gvt, s_gvh,
    s_pks, s_pkb, s_pkt, s_pkh, s_pvs, s_pvb, s_pvt, s_pvh, seq_q, seq_k, q_start, k_start, window, sinks,
    scale, splits, group, HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    ADD_SHARD: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dK, dV `[batch, seq_k, HKV, dim]` of a tile of BN window keys, the parts of the shard added."""
    i_n = tl.program_id(0)
    i_b, i_g = tl.program_id(1) // HKV, (tl.program_id(1) % HKV).to(tl.int64)
    doc = tl.zeros((), dtype=tl.int64)
    room = tl.zeros((), dtype=tl.int64)
    if PACKED:
        doc = tl.load(p_tiles + 4 * i_n).to(tl.int64)
        seq_q = tl.load(p_tiles + 4 * i_n + 1)
        seq_k = seq_q
        room = tl.load(p_tiles + 4 * i_n + 3).to(tl.int64)
        i_n = tl.load(p_tiles + 4 * i_n + 2)
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

    # Rows [low, inner) hold the diagonal, [inner, right) see all of the tile, [right, high) leave it behind.
    key0 = k_start + i_n * BN
    key1 = k_start + tl.minimum(i_n * BN + BN, seq_k)
    end = q_start + seq_q
    low = tl.maximum(key0, q_start)
    high = tl.maximum(low, tl.minimum(((key1 - 1) // BLOCK + window) * BLOCK, end))
    inner = tl.minimum(high, low + (tl.maximum(key1 - low, 0) + BM - 1) // BM * BM)
    right = inner + tl.maximum(0, tl.minimum((key0 // BLOCK + window) * BLOCK, high) - inner) // BM * BM
    # One loop over heads and tiles, as in the shard kernel.
    before = (inner - low + BM - 1) // BM
    n_some = before + (high - right + BM - 1) // BM
    for i in range(group * n_some):
        i_h, i_m = (i // tl.maximum(n_some, 1)).to(tl.int64), i % tl.maximum(n_some, 1)
        pos = tl.where(i_m < before, low + i_m * BM, right + (i_m - before) * BM) + tl.arange(0, BM)
        m_m = pos < tl.where(i_m < before, inner, high)
        mask = (key[:, None] <= pos[None, :]) & (pos[None, :] // BLOCK - block[:, None] < window)
        dk, dv = _column_tile(
            dk, dv, b_k, b_v, p_q + i_h * s_qh, p_do + i_h * s_doh, p_lse + i_h * s_lh, p_delta + i_h * s_lh,
            s_qt, s_dot, pos - q_start, m_m, m_d, m_dv, mask, scale, o_d, o_dv, True, PREC,
        )  # fmt: skip
    n_all = (right - inner) // BM
    for i in range(group * n_all):
        i_h = (i // tl.maximum(n_all, 1)).to(tl.int64)
        pos = inner + i % tl.maximum(n_all, 1) * BM + tl.arange(0, BM)
        dk, dv = _column_tile(
            dk, dv, b_k, b_v, p_q + i_h * s_qh, p_do + i_h * s_doh, p_lse + i_h * s_lh, p_delta + i_h * s_lh,
            s_qt, s_dot, pos - q_start, pos < end, m_d, m_dv, None, scale, o_d, o_dv, False, PREC,
        )  # fmt: skip
    dk *= scale / LOG2_E

    if ADD_SHARD:
        tokens = shard_count(tl.maximum(0, (end - 1) // BLOCK - window + 1), first, stride, sinks) * BLOCK
        n = tl.where(block < sinks, block, sinks + (block - first) // stride)
        index = n * BLOCK + key % BLOCK
        m_s = m_n & in_shard(block, first, stride, sinks) & (block * BLOCK < end) & (index < tokens)
        o_t = (room + index)[:, None]
        p_dks += o_b * s_pkb + i_g * s_pkh
        p_dvs += o_b * s_pvb + i_g * s_pvh
        for _ in range(splits):
            dk += tl.load(p_dks + o_t * s_pkt + o_d, mask=m_s[:, None] & m_d, other=0.0)
            dv += tl.load(p_dvs + o_t * s_pvt + o_dv, mask=m_s[:, None] & m_dv, other=0.0)
            p_dks += s_pks
            p_dvs += s_pvs

    p_dk += o_b * s_gkb + doc * s_gkt + i_g * s_gkh
    p_dv += o_b * s_gvb + doc * s_gvt + i_g * s_gvh
    tl.store(p_dk + o_n64 * s_gkt + o_d, dk.to(p_dk.dtype.element_ty), mask=m_n[:, None] & m_d)
    tl.store(p_dv + o_n64 * s_gvt + o_dv, dv.to(p_dv.dtype.element_ty), mask=m_n[:, None] & m_dv)
