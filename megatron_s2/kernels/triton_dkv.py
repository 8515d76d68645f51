"""Backward pass in Triton over key columns: dK and dV, two kernels and their launches.

A key is seen by two sets of rows. Each set has its kernel, and together they visit every pair once:

    window  the rows whose window holds the key: a run of at most `window` blocks
    shard   if the key's block is in the head's shard, every later row up to the end of the sequence. Such
            columns are long and few, so their rows are cut into splits of `span` rows, one program each. The
            window kernel adds up their float32 parts in order: without atomics, two runs give equal bits.
            With CSR these are the rows in the list of the tile's block (a tile lies in one), cut evenly

A program sums over all query heads of its KV head, so it reads K and V once. Through tensor descriptors a
tile of rows that would reach beyond its document begins earlier; without, it is masked."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_s2.kernels.triton_args import CallLayout, KernelArgs, Launch, Layout, strides
from megatron_s2.kernels.triton_common import (
    LOG2_E,
    first_at_least,
    in_shard,
    key_program,
    list_bounds,
    listed_token,
    load_box,
    load_tile,
    shard_block,
    shard_count,
    shard_token,
)


@triton.jit
def _load_rows(p, m_m, MASKED: tl.constexpr):
    if MASKED:
        return tl.load(p, mask=m_m, other=0.0)
    return tl.load(p)


@triton.jit
def _add_dkv(
    dk, dv, b_k, b_v, b_q, b_do, p_lse2, p_delta, m_m, mask, scale,
    MASKED: tl.constexpr, GRAD_K: tl.constexpr, GRAD_V: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Adds what query rows [BM] contribute to dK [BN, BD], without softmax scale, and dV [BN, BDV]."""
    qk = tl.dot(b_k, tl.trans(b_q), input_precision=PREC)  # [BN, BM]
    # lse, in base 2, and delta are loaded where they are used: between the products there are no registers
    # for them.
    lse = _load_rows(p_lse2, m_m, MASKED)  # [BM]
    p = tl.exp2(qk * scale - lse[None, :])
    if MASKED:
        p = tl.where(mask, p, 0.0)
    if GRAD_V:
        dv = tl.dot(p.to(b_do.dtype), b_do, dv, input_precision=PREC)
    if GRAD_K:
        dp = tl.dot(b_v, tl.trans(b_do), input_precision=PREC)  # [BN, BM]
        delta = _load_rows(p_delta, m_m, MASKED)  # [BM]
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(b_q.dtype), b_q, dk, input_precision=PREC)
    return dk, dv


@triton.jit
def _add_masked_rows(
    dk, dv, b_k, b_v, p_q, p_do, d_q, d_do, p_lse2, p_delta, p_list, s_qt, s_qh, s_dot, s_doh, s_lh, low,
    inner, right, high, q_start, end, doc, i_b, i_h0, block, key, o_d, o_dv, m_d, m_dv, group, window, scale,
    BD: tl.constexpr, BDV: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, GRAD_K: tl.constexpr,
    GRAD_V: tl.constexpr, DESC: tl.constexpr, CSR: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Adds rows [low, inner) and [right, high) of heads i_h0 .. i_h0+group-1, which may miss some of the
    keys: those in or beyond their window, by `block` [BN] and, in the window kernel, `key` [BN]."""
    before = (inner - low + BM - 1) // BM
    tiles = tl.maximum(before + (high - right + BM - 1) // BM, 1)
    # One loop over heads and tiles: two nested loops spill what the pipeline of the inner one starts with.
    for i in range(group * (before + (high - right + BM - 1) // BM)):
        i_h, i_m = i_h0 + i // tiles, i % tiles
        h = i_h.to(tl.int64)
        start = tl.where(i_m < before, low + i_m * BM, right + (i_m - before) * BM)
        stop = tl.where(i_m < before, inner, high)
        if DESC and CSR:  # the last block of the list, cut by the end of the document
            start = listed_token(start, True, p_list, BLOCK)
            stop = end
        first = start
        if DESC:
            # A box that would reach beyond the document begins earlier: it has at least BM tokens.
            first = tl.minimum(start, end - BM)
            token = first - q_start + doc.to(tl.int32)
            b_q = load_box(d_q, i_b, i_h, token, BM, BD)  # [BM, BD]
            b_do = load_box(d_do, i_b, i_h, token, BM, BDV)  # [BM, BDV]
        pos = first + tl.arange(0, BM)
        m_m = (pos >= start) & (pos < stop)
        if CSR and not DESC:
            pos = listed_token(pos, m_m, p_list, BLOCK)
        mask = m_m[None, :]
        if key is not None:  # rows that are none see no key: a single comparison
            mask = key[:, None] <= tl.where(m_m, pos, -1)[None, :]
        if block is not None:
            distance = pos[None, :] // BLOCK - block[:, None]
            mask &= distance >= window if key is None else distance < window
        o_m = pos - q_start
        if not DESC:
            t = o_m.to(tl.int64)
            b_q = load_tile(p_q + h * s_qh, t, s_qt, o_d, m_m, m_d)  # [BM, BD]
            b_do = load_tile(p_do + h * s_doh, t, s_dot, o_dv, m_m, m_dv)  # [BM, BDV]
        dk, dv = _add_dkv(
            dk,
            dv,
            b_k,
            b_v,
            b_q,
            b_do,
            p_lse2 + h * s_lh + o_m,
            p_delta + h * s_lh + o_m,
            m_m,
            mask,
            scale,
            True,
            GRAD_K,
            GRAD_V,
            PREC,
        )
    return dk, dv


@triton.jit
def _add_whole_rows(
    dk, dv, b_k, b_v, p_q, p_do, d_q, d_do, p_lse2, p_delta, p_list, s_qt, s_qh, s_dot, s_doh, s_lh, inner,
    right, q_start, doc, i_b, i_h0, o_d, o_dv, m_d, m_dv, group, scale,
    BD: tl.constexpr, BDV: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, GRAD_K: tl.constexpr,
    GRAD_V: tl.constexpr, DESC: tl.constexpr, CSR: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Adds rows [inner, right) of heads i_h0 .. i_h0+group-1, which see all keys; whole tiles of BM."""
    # With descriptors rows count from the first token of the tensors.
    shift = 0
    if DESC:
        shift = doc.to(tl.int32) - q_start
        p_lse2 -= doc
        p_delta -= doc
    start = inner
    stop = right
    if not CSR:
        start += shift
        stop += shift
    n = start
    i_h = i_h0
    for _ in range(group * ((right - inner) // BM)):
        h = i_h.to(tl.int64)
        if DESC:
            token = n
            if CSR:
                token = listed_token(n, True, p_list, BLOCK) + shift
            o_m = token + tl.arange(0, BM)
            b_q = load_box(d_q, i_b, i_h, token, BM, BD)  # [BM, BD]
            b_do = load_box(d_do, i_b, i_h, token, BM, BDV)  # [BM, BDV]
        else:
            o_m = n + tl.arange(0, BM)
            if CSR:
                o_m = listed_token(o_m, tl.arange(0, BM) >= 0, p_list, BLOCK)
            o_m -= q_start
            t = o_m.to(tl.int64)
            b_q = tl.load(p_q + h * s_qh + t[:, None] * s_qt + o_d, mask=m_d[None, :], other=0.0)
            b_do = tl.load(p_do + h * s_doh + t[:, None] * s_dot + o_dv, mask=m_dv[None, :], other=0.0)
        dk, dv = _add_dkv(
            dk, dv, b_k, b_v, b_q, b_do, p_lse2 + h * s_lh + o_m, p_delta + h * s_lh + o_m, None, None, scale,
            False, GRAD_K, GRAD_V, PREC,
        )  # fmt: skip
        # The next tile, or the first one of the next head.
        n += BM
        i_h = tl.where(n < stop, i_h, i_h + 1)
        n = tl.where(n < stop, n, start)
    return dk, dv


@triton.jit
def s2_bwd_kernel_dkv_shard(
    p_q, p_ks, p_vs, p_do, d_q, d_do, p_lse2, p_delta, p_dks, p_dvs, p_heads, p_starts, p_list, p_tiles, s_qb,
    s_qt, s_qh, s_ksb, s_kst, s_ksh, s_vsb, s_vst, s_vsh, s_dob, s_dot, s_doh, s_lb, s_lh, s_dkss, s_dksb,
    s_dkst, s_dksh, s_dvss, s_dvsb, s_dvst, s_dvsh, seq_q, q_start, window, sinks, scale, span, group,
    num_blocks,
    HKV: tl.constexpr, D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GRAD_K: tl.constexpr, GRAD_V: tl.constexpr,
    DESC: tl.constexpr, COMPACT: tl.constexpr, CSR: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Parts of dK and dV of BN shard tokens from one split of the rows: `[split, batch, token, HKV, dim]`, or
    with COMPACT `[split, batch, token, 1, dim]`, the shards of the heads one after another. GRAD_K and GRAD_V
    say which of the two are computed."""
    # The longest come first: late rows are seen by all columns, and early columns see the most rows.
    splits = tl.num_programs(1) // HKV
    i_n, i_s, i_b = tl.program_id(0), splits - 1 - tl.program_id(1) // HKV, tl.program_id(2)
    i_g = (tl.program_id(1) % HKV).to(tl.int64)
    i_n, doc, seq_q, offset = key_program(i_n, p_tiles, seq_q, PACKED)
    first, stride = tl.load(p_heads + 4 * i_g), tl.load(p_heads + 4 * i_g + 1)
    end = q_start + seq_q
    tokens = shard_count(tl.maximum(0, (end - 1) // BLOCK - window + 1), first, stride, sinks) * BLOCK
    if i_n * BN >= tokens:
        return
    split = q_start + i_s * span
    # Parts that no row adds to are neither written nor read, but those of a list or of a compact source.
    if not CSR and not COMPACT:
        seen = (shard_block(i_n * BN // BLOCK, first, stride, sinks) + window) * BLOCK
        if seen >= split + span:
            return
    o_b = i_b.to(tl.int64)
    p_q += o_b * s_qb + doc * s_qt
    p_do += o_b * s_dob + doc * s_dot
    p_lse2 += o_b * s_lb + doc
    p_delta += o_b * s_lb + doc
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
    block = None
    if BN > BLOCK and not CSR:  # a tile of one block lies as a whole in or beyond the window of a row
        block = shard_block(index // BLOCK, first, stride, sinks)
    t = shard_token(index, first, stride, sinks, BLOCK, COMPACT).to(tl.int64)
    b_k = load_tile(p_ks, t, s_kst, o_d, m_n, m_d)  # [BN, BD]
    b_v = load_tile(p_vs, t, s_vst, o_dv, m_n, m_dv)  # [BN, BDV]
    dk = tl.zeros([BN, BD], tl.float32)
    dv = tl.zeros([BN, BDV], tl.float32)

    if CSR:
        begin, stop = list_bounds(p_starts, i_g, i_n * BN // BLOCK, num_blocks)
        begin = first_at_least(p_list, begin, stop, q_start // BLOCK)
        stop = first_at_least(p_list, begin, stop, (end - 1) // BLOCK + 1)
        share = (stop - begin + splits - 1) // splits
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
        high = tl.minimum(end, split + span)
        low = tl.maximum(split, (shard_block(i_n * BN // BLOCK, first, stride, sinks) + window) * BLOCK)
        last = tl.minimum(i_n * BN + BN, tokens) - 1
        full = (shard_block(last // BLOCK, first, stride, sinks) + window) * BLOCK
        high = tl.maximum(low, high)
        inner = tl.minimum(high, low + (tl.maximum(full - low, 0) + BM - 1) // BM * BM)
    right = inner + (high - inner) // BM * BM
    dk, dv = _add_whole_rows(
        dk, dv, b_k, b_v, p_q, p_do, d_q, d_do, p_lse2, p_delta, p_list, s_qt, s_qh, s_dot, s_doh, s_lh,
        inner, right, q_start, doc, i_b, (i_g * group).to(tl.int32), o_d, o_dv, m_d, m_dv, group, scale,
        BD, BDV, BLOCK, BM, GRAD_K, GRAD_V, DESC, CSR, PREC,
    )  # fmt: skip
    dk, dv = _add_masked_rows(
        dk, dv, b_k, b_v, p_q, p_do, d_q, d_do, p_lse2, p_delta, p_list, s_qt, s_qh, s_dot, s_doh, s_lh, low,
        inner, right, high, q_start, end, doc, i_b, (i_g * group).to(tl.int32), block, None, o_d, o_dv, m_d,
        m_dv, group, window, scale, BD, BDV, BLOCK, BM, GRAD_K, GRAD_V, DESC, CSR, PREC,
    )  # fmt: skip

    o_t = (offset + index)[:, None]
    if GRAD_K:
        p_dks += i_s.to(tl.int64) * s_dkss + o_b * s_dksb
        if not COMPACT:
            p_dks += i_g * s_dksh
        tl.store(p_dks + o_t * s_dkst + o_d, dk * (scale / LOG2_E), mask=m_n[:, None] & m_d)
    if GRAD_V:
        p_dvs += i_s.to(tl.int64) * s_dvss + o_b * s_dvsb
        if not COMPACT:
            p_dvs += i_g * s_dvsh
        tl.store(p_dvs + o_t * s_dvst + o_dv, dv, mask=m_n[:, None] & m_dv)


@triton.jit
def s2_bwd_kernel_dkv_window(
    p_q, p_k, p_v, p_do, d_q, d_do, p_lse2, p_delta, p_dk, p_dv, p_dks, p_dvs, p_heads, p_tiles, s_qb, s_qt,
    s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_dob, s_dot, s_doh, s_lb, s_lh, s_dkb, s_dkt, s_dkh, s_dvb,
    s_dvt, s_dvh, s_dkss, s_dksb, s_dkst, s_dksh, s_dvss, s_dvsb, s_dvst, s_dvsh, seq_q, seq_k, q_start,
    k_start, window, sinks, scale, splits, span, group,
    D: tl.constexpr, DV: tl.constexpr, BD: tl.constexpr, BDV: tl.constexpr,
    BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, GRAD_K: tl.constexpr, GRAD_V: tl.constexpr,
    DESC: tl.constexpr, ADD_SHARD: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dK and dV `[batch, seq_k, kv_heads, dim]` of BN window keys, to which the parts of the shard are added.
    GRAD_K and GRAD_V say which of the two are computed."""
    i_g, i_b = tl.program_id(1).to(tl.int64), tl.program_id(2)
    i_n, doc, seq_q, offset = key_program(tl.program_id(0), p_tiles, seq_q, PACKED)
    if PACKED:
        seq_k = seq_q
    first, stride = tl.load(p_heads + 4 * i_g), tl.load(p_heads + 4 * i_g + 1)
    o_b = i_b.to(tl.int64)
    p_q += o_b * s_qb + doc * s_qt
    p_do += o_b * s_dob + doc * s_dot
    p_lse2 += o_b * s_lb + doc
    p_delta += o_b * s_lb + doc
    p_k += o_b * s_kb + doc * s_kt + i_g * s_kh
    p_v += o_b * s_vb + doc * s_vt + i_g * s_vh

    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    m_d, m_dv = o_d < D, o_dv < DV
    o_n = i_n * BN + tl.arange(0, BN)
    o_n64 = o_n.to(tl.int64)
    m_n = o_n < seq_k
    key = k_start + o_n
    block = key // BLOCK
    b_k = load_tile(p_k, o_n64, s_kt, o_d, m_n, m_d)  # [BN, BD]
    b_v = load_tile(p_v, o_n64, s_vt, o_dv, m_n, m_dv)  # [BN, BDV]
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
    edge = None
    if BN > BLOCK:  # keys of one block are left by the windows of the same rows, which begin at `high`
        edge = block
    dk, dv = _add_masked_rows(
        dk, dv, b_k, b_v, p_q, p_do, d_q, d_do, p_lse2, p_delta, None, s_qt, s_qh, s_dot, s_doh, s_lh, low,
        inner, right, high, q_start, end, doc, i_b, (i_g * group).to(tl.int32), edge, key, o_d, o_dv, m_d,
        m_dv, group, window, scale, BD, BDV, BLOCK, BM, GRAD_K, GRAD_V, DESC, False, PREC,
    )  # fmt: skip
    dk, dv = _add_whole_rows(
        dk, dv, b_k, b_v, p_q, p_do, d_q, d_do, p_lse2, p_delta, None, s_qt, s_qh, s_dot, s_doh, s_lh, inner,
        right, q_start, doc, i_b, (i_g * group).to(tl.int32), o_d, o_dv, m_d, m_dv, group, scale,
        BD, BDV, BLOCK, BM, GRAD_K, GRAD_V, DESC, False, PREC,
    )  # fmt: skip
    dk *= scale / LOG2_E

    if ADD_SHARD:
        tokens = shard_count(tl.maximum(0, (end - 1) // BLOCK - window + 1), first, stride, sinks) * BLOCK
        n = tl.where(block < sinks, block, sinks + (block - first) // stride)
        index = n * BLOCK + key % BLOCK
        m_s = m_n & in_shard(block, first, stride, sinks) & (block * BLOCK < end) & (index < tokens)
        o_t = offset + index
        # The rows beyond the windows begin in this split; before it nothing was written.
        split = tl.maximum((block + window) * BLOCK - q_start, 0) // span  # [BN]
        begin = tl.min(tl.where(m_s, split, splits), 0)
        p_dks += o_b * s_dksb + i_g * s_dksh + begin.to(tl.int64) * s_dkss
        p_dvs += o_b * s_dvsb + i_g * s_dvsh + begin.to(tl.int64) * s_dvss
        for i_s in range(begin, splits):
            m_w = m_s & (split <= i_s)
            if GRAD_K:
                dk += load_tile(p_dks, o_t, s_dkst, o_d, m_w, m_d)
            if GRAD_V:
                dv += load_tile(p_dvs, o_t, s_dvst, o_dv, m_w, m_dv)
            p_dks += s_dkss
            p_dvs += s_dvss

    if GRAD_K:
        p_dk += o_b * s_dkb + doc * s_dkt + i_g * s_dkh + o_n64[:, None] * s_dkt + o_d
        tl.store(p_dk, dk.to(p_dk.dtype.element_ty), mask=m_n[:, None] & m_d)
    if GRAD_V:
        p_dv += o_b * s_dvb + doc * s_dvt + i_g * s_dvh + o_n64[:, None] * s_dvt + o_dv
        tl.store(p_dv, dv.to(p_dv.dtype.element_ty), mask=m_n[:, None] & m_dv)


def launch_dkv(args: KernelArgs, dout: Tensor, lse2: Tensor, delta: Tensor, dk: Tensor, dv: Tensor) -> None:
    """Writes `dk` and `dv` of a call whose shard is read from k and v."""
    launch_dkv_window(args, dout, lse2, delta, dk, dv, launch_dkv_shard(args, dout, lse2, delta))


def launch_dkv_shard(args: KernelArgs, dout: Tensor, lse2: Tensor, delta: Tensor) -> list[Tensor]:
    """Returns the parts of dK and dV that come through the shard, in float32, one per split of the rows.
    Where the shard is read from k and v, parts to which no row adds are not written.

    Their shape is `[splits, batch, tokens, kv_heads, head_dim]`. For a compact shard source it is
    `[splits, batch, tokens, 1, head_dim]`, the `args.shard_tokens` of the KV heads one after another.
    """
    parts = [args.q.new_empty(x.shape, dtype=torch.float32) for x in args.layout.shard_parts]
    dks, dvs = parts
    tensors = {
        "p_q": args.q, **args.shard, **args.lists(of_keys=True), "p_do": dout, "p_lse2": lse2,
        "p_delta": delta, "p_dks": dks, "p_dvs": dvs,
    }  # fmt: skip
    options = Layout.of(dout), Layout.of(lse2)
    with torch.cuda.device_of(args.q):
        for grid, arguments in args.launches(_shard_launches, tensors, *options):
            s2_bwd_kernel_dkv_shard[grid](**arguments)
    return parts


def _shard_launches(call: CallLayout, dout: Layout, lse2: Layout) -> list[Launch]:
    (splits, span), (dks, dvs), launches = call.shard_splits, call.shard_parts, []
    for part, boxes, box_args in call.row_launches(dout):
        programs = part.shard_key_programs(call.pattern, call.q_start, call.tiles("dkv").keys)
        for gradients in call.dkv_passes if programs.count else ():
            constants = {
                **call.query_args, **call.shard_args, **call.list_args, **call.pattern_args, **box_args,
                **gradients, **strides("do", dout), **strides("l", lse2, "bh"), **strides("dks", dks, "sbth"),
                **strides("dvs", dvs, "sbth"), "span": span, "group": call.group, "HKV": call.kv_heads,
                **programs.arguments(), **call.tile_args("dkv"),
            }  # fmt: skip
            grid = programs.count, splits * call.kv_heads, call.batch
            launches.append(Launch(grid, constants, call.tables(programs), boxes))
    return launches


def launch_dkv_window(
    args: KernelArgs,
    dout: Tensor,
    lse2: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    parts: list[Tensor] | None = None,
) -> None:
    """Writes `dk` and `dv` of the window source.

    Args:
        parts: what `launch_dkv_shard` returned, to be added where the shard is read from k and v.
    """
    dks, dvs = parts or (None, None)
    tensors = {
        "p_q": args.q, **args.window, "p_do": dout, "p_lse2": lse2, "p_delta": delta, "p_dk": dk, "p_dv": dv,
        "p_dks": dks, "p_dvs": dvs,
    }  # fmt: skip
    options = Layout.of(dout), Layout.of(lse2), Layout.of(dk), Layout.of(dv), parts is not None
    with torch.cuda.device_of(args.q):
        for grid, arguments in args.launches(_window_launches, tensors, *options):
            s2_bwd_kernel_dkv_window[grid](**arguments)


def _window_launches(
    call: CallLayout,
    dout: Layout,
    lse2: Layout,
    dk: Layout,
    dv: Layout,
    add_shard: bool,
) -> list[Launch]:
    seq_k, launches = call.k.shape[1], []
    dks, dvs = call.shard_parts if add_shard else (None, None)
    splits, span = call.shard_splits if add_shard else (0, 1)
    if call.num_blocks:  # the rows of a list are split otherwise
        span = 1 << 30
    for part, boxes, box_args in call.row_launches(dout):
        programs = part.key_programs(call.pattern, call.q_start, call.tiles("dkv").keys, seq_k)
        for gradients in call.dkv_passes:
            constants = {
                **call.query_args, **call.window_args, **call.pattern_args, **box_args, **gradients,
                **strides("do", dout), **strides("l", lse2, "bh"), **strides("dk", dk), **strides("dv", dv),
                **strides("dks", dks, "sbth"), **strides("dvs", dvs, "sbth"), "seq_k": seq_k,
                "splits": splits, "span": span, "ADD_SHARD": add_shard, "group": call.group,
                **programs.arguments(), **call.tile_args("dkv"),
            }  # fmt: skip
            grid = programs.count, call.kv_heads, call.batch
            launches.append(Launch(grid, constants, call.tables(programs), boxes))
    return launches
