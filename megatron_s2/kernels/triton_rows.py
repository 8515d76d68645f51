"""Triton kernels over query rows: the forward pass and dQ, which read the same keys in the same order.

One program computes one tile of BM queries of one query head. Its keys come in two runs of tiles:

    shard   the blocks of the head's shard before the window of the tile's first row. Every row sees them:
            no mask. With CSR, the blocks in the list of the tile's row: the tile lies in one block
    window  contiguous keys, from that window's first block to the tile's last query. A mask where the rows of
            the tile differ (blocks that later rows' windows have left, which only a shard block survives)
            and on the diagonal; none between

so a tile may span several sparse blocks, and a key tile several small shard blocks.

Where window and shard come from different places at different times, each has a pass of its own (SHARD or
WINDOW is off), which goes on from what the other left (RESUME). Then each row reads its own window from the
one and all that is older from the other.
"""

import triton
import triton.language as tl

from megatron_s2.kernels.triton_tiles import (
    LN_2,
    LOG2_E,
    list_bounds,
    listed_token,
    shard_block,
    shard_count,
    shard_token,
    window_run_visible,
)


@triton.jit
def _attend(acc, top, total, b_q, b_k, b_v, mask, scale, MASKED: tl.constexpr, PREC: tl.constexpr):
    """Forward: takes one key tile into the running softmax (base 2), acc [BM, BDV], top and total [BM]."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PREC) * scale  # [BM, BN]
    if MASKED:
        b_s = tl.where(mask, b_s, float("-inf"))
    new = tl.maximum(top, tl.max(b_s, 1))
    # A row that has seen nothing yet stays at minus infinity; 0 stands in, for inf - inf would be NaN.
    safe = tl.where(new == float("-inf"), 0.0, new)
    b_p = tl.exp2(b_s - safe[:, None])
    alpha = tl.exp2(top - safe)
    acc = acc * alpha[:, None] + tl.dot(b_p.to(b_v.dtype), b_v, input_precision=PREC)
    return acc, new, total * alpha + tl.sum(b_p, 1)


@triton.jit
def _differentiate(
    dq, b_lse, b_delta, b_q, b_do, b_k, b_v, mask, scale, MASKED: tl.constexpr, PREC: tl.constexpr
):
    """Backward: adds one key tile's part to dQ [BM, BD] (but for the softmax scale)."""
    b_s = tl.dot(b_q, tl.trans(b_k), input_precision=PREC) * scale  # [BM, BN]
    b_p = tl.exp2(b_s - b_lse[:, None])
    if MASKED:
        b_p = tl.where(mask, b_p, 0.0)
    b_dp = tl.dot(b_do, tl.trans(b_v), input_precision=PREC)  # [BM, BN]
    b_ds = b_p * (b_dp - b_delta[:, None])
    return dq + tl.dot(b_ds.to(b_k.dtype), b_k, input_precision=PREC)


@triton.jit
def _tile(
    acc, top, total, b_q, b_do, p_k, p_v, m_k, m_d, m_dv, mask, scale, MASKED: tl.constexpr,
    DQ: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    b_k = tl.load(p_k, mask=m_k[:, None] & m_d[None, :], other=0.0)  # [BN, BD]
    b_v = tl.load(p_v, mask=m_k[:, None] & m_dv[None, :], other=0.0)  # [BN, BDV]
    if DQ:
        acc = _differentiate(acc, top, total, b_q, b_do, b_k, b_v, mask, scale, MASKED, PREC)
    else:
        acc, top, total = _attend(acc, top, total, b_q, b_k, b_v, mask, scale, MASKED, PREC)
    return acc, top, total


@triton.jit
def _listed_run(i_n, p_list, BLOCK: tl.constexpr, BN: tl.constexpr):
    """Positions of tokens i_n .. i_n+BN-1 of a list's blocks; inside one block its number is read once."""
    o_n = tl.arange(0, BN)
    if BN <= BLOCK:
        return listed_token(i_n, True, p_list, BLOCK) + o_n
    return listed_token(i_n + o_n, o_n >= 0, p_list, BLOCK)


@triton.jit
def s2_row_kernel(
    p_q, p_k, p_v, p_ks, p_vs, p_do, p_out, p_prev, p_lse, p_delta, p_sink, p_heads, p_starts, p_list,
    p_tiles, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_ksb, s_kst, s_ksh, s_vsb, s_vst, s_vsh,
    s_dob, s_dot, s_doh, s_ob, s_ot, s_oh, s_lb, s_lh, seq_q, q_start, k_start, window, sinks, scale,
    num_blocks,
    H: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr,
    BDV: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, DQ: tl.constexpr,
    HAS_SINK: tl.constexpr, SHARD: tl.constexpr, WINDOW: tl.constexpr, RESUME: tl.constexpr,
    COMPACT: tl.constexpr, CSR: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Forward: out `[batch, seq_q, H, DV]`, lse. With DQ, out is dQ `[batch, seq_q, H, D]`; lse is read."""
    # Late tiles have the most keys: they start first.
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_b, i_h = tl.program_id(1) // H, (tl.program_id(1) % H).to(tl.int64)
    i_g = i_h // GROUP
    doc = tl.zeros((), dtype=tl.int64)
    if PACKED:
        doc = tl.load(p_tiles + 3 * i_m).to(tl.int64)
        seq_q = tl.load(p_tiles + 3 * i_m + 1)
        i_m = tl.load(p_tiles + 3 * i_m + 2)
    first, stride = tl.load(p_heads + 4 * i_g), tl.load(p_heads + 4 * i_g + 1)
    o_b = i_b.to(tl.int64)
    p_q += o_b * s_qb + doc * s_qt + i_h * s_qh
    p_k += o_b * s_kb + (doc - k_start) * s_kt + i_g * s_kh
    p_v += o_b * s_vb + (doc - k_start) * s_vt + i_g * s_vh
    if COMPACT:
        place = tl.load(p_heads + 4 * i_g + 2).to(tl.int64)
        p_ks += o_b * s_ksb + place * s_kst
        p_vs += o_b * s_vsb + place * s_vst
    else:
        p_ks += o_b * s_ksb + doc * s_kst + i_g * s_ksh
        p_vs += o_b * s_vsb + doc * s_vst + i_g * s_vsh
    p_out += o_b * s_ob + doc * s_ot + i_h * s_oh
    p_lse += o_b * s_lb + i_h * s_lh + doc

    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    m_d, m_dv = o_d < D, o_dv < DV
    # Tiles are aligned to absolute positions, so that one of at most BLOCK rows lies in one block.
    tile = (q_start // BM + i_m) * BM
    pos = tile + tl.arange(0, BM)
    o_m = pos - q_start
    o_m64 = o_m.to(tl.int64)[:, None]
    m_m = (o_m >= 0) & (o_m < seq_q)
    b_q = tl.load(p_q + o_m64 * s_qt + o_d, mask=m_m[:, None] & m_d, other=0.0)  # [BM, BD]
    b_do = None
    if DQ:
        p_do += o_b * s_dob + doc * s_dot + i_h * s_doh
        b_do = tl.load(p_do + o_m64 * s_dot + o_dv, mask=m_m[:, None] & m_dv, other=0.0)  # [BM, BDV]
        p_delta += o_b * s_lb + i_h * s_lh + doc
        top = tl.load(p_lse + o_m, mask=m_m, other=0.0) * LOG2_E  # lse and delta stand where the forward
        total = tl.load(p_delta + o_m, mask=m_m, other=0.0)  # has its running maximum and sum
        acc = tl.zeros([BM, BD], tl.float32)
        if RESUME:
            p_prev += o_b * s_ob + doc * s_ot + i_h * s_oh
            acc = tl.load(p_prev + o_m64 * s_ot + o_d, mask=m_m[:, None] & m_d, other=0.0)
            acc *= LOG2_E / scale
    elif RESUME:
        p_prev += o_b * s_ob + doc * s_ot + i_h * s_oh
        top = tl.load(p_lse + o_m, mask=m_m, other=0.0) * LOG2_E
        total = tl.full([BM], 1.0, tl.float32)
        acc = tl.load(p_prev + o_m64 * s_ot + o_dv, mask=m_m[:, None] & m_dv, other=0.0)
    else:
        top = tl.full([BM], float("-inf"), tl.float32)
        total = tl.zeros([BM], tl.float32)
        if HAS_SINK:
            top = tl.zeros([BM], tl.float32) + tl.load(p_sink + i_h).to(tl.float32) * LOG2_E
            total += 1.0
        acc = tl.zeros([BM, BDV], tl.float32)

    start = tl.maximum(tile, q_start)
    stop = tl.minimum(tile + BM, q_start + seq_q)
    row0, row1 = start // BLOCK, (stop - 1) // BLOCK
    low = tl.maximum(0, row0 - window + 1)  # first block of the first row's window

    # Shard tokens [0, seen) come before every row's window, [seen, tokens) only before some rows': those
    # are read from the shard if the window is not.
    seen = 0
    tokens = 0
    if SHARD:
        if CSR:
            begin, past = list_bounds(p_starts, i_g, row0, num_blocks)
            p_list += begin
            seen = (past - begin).to(tl.int32) * BLOCK
        else:
            seen = shard_count(low, first, stride, sinks) * BLOCK
        tokens = seen
        if not WINDOW:
            tokens = shard_count(tl.maximum(0, row1 - window + 1), first, stride, sinks) * BLOCK
    whole = seen // BN * BN
    for i_n in range(0, whole, BN):
        if CSR:
            t = _listed_run(i_n, p_list, BLOCK, BN).to(tl.int64)
        else:
            t = shard_token(i_n + tl.arange(0, BN), first, stride, sinks, BLOCK, COMPACT).to(tl.int64)
        acc, top, total = _tile(
            acc, top, total, b_q, b_do, p_ks + t[:, None] * s_kst + o_d, p_vs + t[:, None] * s_vst + o_dv,
            t >= 0, m_d, m_dv, None, scale, False, DQ, PREC,
        )  # fmt: skip
    if BN > BLOCK or not WINDOW:
        for i_n in tl.range(whole, tokens, BN, num_stages=1):
            index = i_n + tl.arange(0, BN)
            m_k = index < tokens
            if CSR:
                t = listed_token(index, m_k, p_list, BLOCK).to(tl.int64)
            else:
                t = shard_token(index, first, stride, sinks, BLOCK, COMPACT).to(tl.int64)
            mask = m_k[None, :]
            if not WINDOW:
                block = shard_block(index // BLOCK, first, stride, sinks)
                mask = mask & (block[None, :] <= pos[:, None] // BLOCK - window)
            acc, top, total = _tile(
                acc, top, total, b_q, b_do, p_ks + t[:, None] * s_kst + o_d,
                p_vs + t[:, None] * s_vst + o_dv, m_k, m_d, m_dv, mask, scale, True, DQ, PREC,
            )  # fmt: skip

    if WINDOW:
        # The window run: in [low, left) rows differ, in [left, inner) all see all, [inner, stop) is diagonal.
        low = low * BLOCK
        diagonal = row0 * BLOCK
        left = tl.minimum(tl.maximum(low, (row1 - window + 1) * BLOCK), diagonal)
        inner = left + (diagonal - left) // BN * BN
        for i_n in range(left, inner, BN):
            t = (i_n + tl.arange(0, BN)).to(tl.int64)
            acc, top, total = _tile(
                acc, top, total, b_q, b_do, p_k + t[:, None] * s_kt + o_d, p_v + t[:, None] * s_vt + o_dv,
                t >= 0, m_d, m_dv, None, scale, False, DQ, PREC,
            )  # fmt: skip
        before = (left - low + BN - 1) // BN
        after = (stop - inner + BN - 1) // BN
        for i in range(before + after):
            base = tl.where(i < before, low + i * BN, inner + (i - before) * BN)
            end = tl.where(i < before, left, stop)
            key = base + tl.arange(0, BN)
            m_k = key < end
            mask = window_run_visible(pos, key, first, stride, sinks, window, BLOCK, SHARD) & m_k[None, :]
            t = key.to(tl.int64)
            acc, top, total = _tile(
                acc, top, total, b_q, b_do, p_k + t[:, None] * s_kt + o_d, p_v + t[:, None] * s_vt + o_dv,
                m_k, m_d, m_dv, mask, scale, True, DQ, PREC,
            )  # fmt: skip

    if DQ:
        b_dq = acc * (scale / LOG2_E)
        tl.store(p_out + o_m64 * s_ot + o_d, b_dq.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_d)
    else:
        b_o = acc / total[:, None]
        tl.store(p_out + o_m64 * s_ot + o_dv, b_o.to(p_out.dtype.element_ty), mask=m_m[:, None] & m_dv)
        tl.store(p_lse + o_m, (top + tl.log2(total)) * LN_2, mask=m_m)


@triton.jit
def s2_bwd_kernel_delta(
    p_do, p_o, p_dlse, p_delta, s_dob, s_dot, s_doh, s_ob, s_ot, s_oh, seq,
    H: tl.constexpr, DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta `[batch, H, seq]` = rowsum(dout * out) - dlse: what softmax backward takes from dP."""
    i_b, i_h = tl.program_id(1) // H, (tl.program_id(1) % H).to(tl.int64)
    o_b = i_b.to(tl.int64)
    o_m, o_dv = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BDV)
    m_m = o_m < seq
    mask = m_m[:, None] & (o_dv < DV)
    o_m64 = o_m.to(tl.int64)[:, None]
    b_do = tl.load(p_do + o_b * s_dob + i_h * s_doh + o_m64 * s_dot + o_dv, mask=mask, other=0.0)
    b_o = tl.load(p_o + o_b * s_ob + i_h * s_oh + o_m64 * s_ot + o_dv, mask=mask, other=0.0)
    delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    o_row = (o_b * H + i_h) * seq + o_m
    if HAS_DLSE:
        delta -= tl.load(p_dlse + o_row, mask=m_m, other=0.0)
    tl.store(p_delta + o_row, delta, mask=m_m)
