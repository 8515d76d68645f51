"""Forward pass in Triton: one kernel, and its launch.

One program computes one tile: BM // PACK tokens of PACK query heads of one KV head. Its keys come in three
runs:

    masked  the tiles on the diagonal, and those of the window where the tile's rows differ (of the blocks
            that the windows of later rows have left, those rows see only shard blocks). They come first, so
            that each row has seen a key when the others come
    shard   the blocks of the head's shard before the window of the tile's first row. Every row sees them, so
            they need no mask. With CSR these are the blocks in the list of the tile's row
    window  contiguous keys between these, without a mask. Through tensor descriptors, shard and window of one
            source are one run, two tiles at a time

A tile may span several sparse blocks, and a key tile several small shard blocks.

Where window and shard are read in two passes (SHARD or WINDOW is off), the second merges its result into that
of the first (RESUME). Each row then reads its own window from one source and everything older from the other.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_s2.kernels.triton_args import CallLayout, KernelArgs, Launch, Layout, strides
from megatron_s2.kernels.triton_common import (
    LN_2,
    LOG2_E,
    list_entry,
    load_box,
    load_heads,
    load_tile,
    query_program,
    shard_block,
    shard_run,
    shard_tail_tile,
    shard_tile,
    whole_tile,
    window_mask,
    window_run,
)


@triton.jit
def _attend(acc, m_i, l_i, b_q, b_k, b_v, mask, scale, MASKED: tl.constexpr, PREC: tl.constexpr):
    """Adds one tile of keys to the online softmax: acc [BM, BDV], maximum m_i and sum l_i [BM], in base 2."""
    qk = tl.dot(b_q, tl.trans(b_k), input_precision=PREC)  # [BM, BN]
    if MASKED:
        qk = tl.where(mask, qk, float("-inf"))
    # The scale, which is positive, goes to the maximum and into the exponent: one instruction a score.
    m_new = tl.maximum(m_i, tl.max(qk, 1) * scale)
    safe = m_new
    if MASKED:
        # A row that has seen no key yet stays at minus infinity. 0 replaces it, because inf - inf would be
        # NaN.
        safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(qk * scale - safe[:, None])
    alpha = tl.exp2(m_i - safe)
    acc = tl.dot(p.to(b_v.dtype), b_v, acc * alpha[:, None], input_precision=PREC)
    return acc, m_new, l_i * alpha + tl.sum(p, 1)


@triton.jit
def _attend_pair(acc, m_i, l_i, b_q, b_k, b_v, b_k2, b_v2, scale, PREC: tl.constexpr):
    """Adds two tiles of keys that all rows see, with one maximum and one rescaling; otherwise as
    `_attend`."""
    qk = tl.dot(b_q, tl.trans(b_k), input_precision=PREC)  # [BM, BN]
    qk2 = tl.dot(b_q, tl.trans(b_k2), input_precision=PREC)
    m_new = tl.maximum(m_i, tl.max(tl.maximum(qk, qk2), 1) * scale)
    p = tl.exp2(qk * scale - m_new[:, None])
    p2 = tl.exp2(qk2 * scale - m_new[:, None])
    alpha = tl.exp2(m_i - m_new)
    acc = tl.dot(p.to(b_v.dtype), b_v, acc * alpha[:, None], input_precision=PREC)
    acc = tl.dot(p2.to(b_v.dtype), b_v2, acc, input_precision=PREC)
    return acc, m_new, l_i * alpha + tl.sum(p + p2, 1)


@triton.jit
def _attend_boxes(
    acc, m_i, l_i, b_q, d_k, d_v, i_b, i_h, tiles, in_shard, shard_start, window_start, p_list, first, stride,
    sinks, scale, BD: tl.constexpr, BDV: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
    COMPACT: tl.constexpr, CSR: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Adds `tiles` tiles of keys that all rows see, through tensor descriptors; `whole_tile` says which."""
    single = 0
    if BDV <= 128:  # wider accumulators leave no registers for two tiles of scores
        single = tiles // 2 * 2
        entry = list_entry(0, in_shard, p_list, BLOCK, BN, CSR)
        entry2 = list_entry(1, in_shard, p_list, BLOCK, BN, CSR)
        for i in range(0, single, 2):
            t = whole_tile(
                i, entry, in_shard, shard_start, window_start, first, stride, sinks, BLOCK, BN, COMPACT, CSR
            )
            t2 = whole_tile(
                i + 1,
                entry2,
                in_shard,
                shard_start,
                window_start,
                first,
                stride,
                sinks,
                BLOCK,
                BN,
                COMPACT,
                CSR,
            )
            entry = list_entry(i + 2, in_shard, p_list, BLOCK, BN, CSR)
            entry2 = list_entry(i + 3, in_shard, p_list, BLOCK, BN, CSR)
            b_k, b_k2 = load_box(d_k, i_b, i_h, t, BN, BD), load_box(d_k, i_b, i_h, t2, BN, BD)
            b_v, b_v2 = load_box(d_v, i_b, i_h, t, BN, BDV), load_box(d_v, i_b, i_h, t2, BN, BDV)
            acc, m_i, l_i = _attend_pair(acc, m_i, l_i, b_q, b_k, b_v, b_k2, b_v2, scale, PREC)
    entry = list_entry(single, in_shard, p_list, BLOCK, BN, CSR)
    for i in range(single, tiles):
        t = whole_tile(
            i, entry, in_shard, shard_start, window_start, first, stride, sinks, BLOCK, BN, COMPACT, CSR
        )
        entry = list_entry(i + 1, in_shard, p_list, BLOCK, BN, CSR)
        b_k, b_v = load_box(d_k, i_b, i_h, t, BN, BD), load_box(d_v, i_b, i_h, t, BN, BDV)
        acc, m_i, l_i = _attend(acc, m_i, l_i, b_q, b_k, b_v, None, scale, False, PREC)
    return acc, m_i, l_i


@triton.jit
def s2_fwd_kernel(
    p_q, p_k, p_v, p_ks, p_vs, d_q, d_k, d_v, d_ks, d_vs, p_o, p_prev, p_lse, p_sink, p_heads, p_starts,
    p_list, p_tiles, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt, s_vh, s_ksb, s_kst, s_ksh, s_vsb, s_vst,
    s_vsh, s_ob, s_ot, s_oh, s_lb, s_lh, seq_q, q_start, k_start, window, sinks, scale, num_blocks,
    GROUP: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    HAS_SINK: tl.constexpr, SHARD: tl.constexpr, WINDOW: tl.constexpr, RESUME: tl.constexpr,
    DESC: tl.constexpr, COMPACT: tl.constexpr, CSR: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """out `[batch, seq_q, heads, DV]` and lse `[batch, heads, seq_q]`. With RESUME p_prev is p_o."""
    i_m, i_b, i_h, i_g, doc, seq_q = query_program(p_tiles, seq_q, GROUP, PACK, PACKED)
    first, stride = tl.load(p_heads + 4 * i_g), tl.load(p_heads + 4 * i_g + 1)
    shard_start = tl.zeros((), dtype=tl.int64)
    if COMPACT:
        shard_start = tl.load(p_heads + 4 * i_g + 2).to(tl.int64)
    i_gs = tl.zeros((), dtype=tl.int64) if COMPACT else i_g  # head of the shard source
    o_b = i_b.to(tl.int64)
    p_q += o_b * s_qb + doc * s_qt + i_h * s_qh
    p_k += o_b * s_kb + (doc - k_start) * s_kt + i_g * s_kh
    p_v += o_b * s_vb + (doc - k_start) * s_vt + i_g * s_vh
    p_ks += o_b * s_ksb + (doc + shard_start) * s_kst + i_gs * s_ksh
    p_vs += o_b * s_vsb + (doc + shard_start) * s_vst + i_gs * s_vsh
    p_o += o_b * s_ob + doc * s_ot + i_h * s_oh
    p_lse += o_b * s_lb + i_h * s_lh + doc

    o_d, o_dv = tl.arange(0, BD), tl.arange(0, BDV)
    m_d, m_dv = o_d < D, o_dv < DV
    # Tiles are aligned to absolute positions, so that one of at most BLOCK tokens lies in one block.
    BT: tl.constexpr = BM // PACK
    tile = (q_start // BT + i_m) * BT
    pos = tile + tl.arange(0, BM) % BT
    o_h = (tl.arange(0, BM) // BT).to(tl.int64)  # head of each row, from i_h on
    o_m = pos - q_start
    o_m64 = o_m.to(tl.int64)
    m_m = (o_m >= 0) & (o_m < seq_q)
    o_o = (o_h * s_oh + o_m64 * s_ot)[:, None] + o_dv
    p_lse += o_h * s_lh + o_m64
    if DESC:
        row = tile - q_start + doc.to(tl.int32)
        b_q = load_heads(d_q, i_b, i_h.to(tl.int32), row, BM, BD)  # [BM, BD]
    else:
        o_q = (o_h * s_qh + o_m64 * s_qt)[:, None] + o_d
        b_q = tl.load(p_q + o_q, mask=m_m[:, None] & m_d, other=0.0)  # [BM, BD]
    if RESUME:
        p_prev += o_b * s_ob + doc * s_ot + i_h * s_oh
        m_i = tl.load(p_lse, mask=m_m, other=0.0) * LOG2_E
        l_i = tl.full([BM], 1.0, tl.float32)
        acc = tl.load(p_prev + o_o, mask=m_m[:, None] & m_dv, other=0.0)
    else:
        m_i = tl.full([BM], float("-inf"), tl.float32)
        l_i = tl.zeros([BM], tl.float32)
        if HAS_SINK:
            m_i = tl.load(p_sink + i_h + o_h).to(tl.float32) * LOG2_E
            l_i += 1.0
        acc = tl.zeros([BM, BDV], tl.float32)

    start = tl.maximum(tile, q_start)
    stop = tl.minimum(tile + BT, q_start + seq_q)
    row0, row1 = start // BLOCK, (stop - 1) // BLOCK
    low = tl.maximum(0, row0 - window + 1)  # first block of the first row's window

    begin, seen, tokens = shard_run(
        p_starts, i_g, row0, row1, low, first, stride, sinks, window, num_blocks, BLOCK, SHARD, WINDOW, CSR
    )
    if CSR:
        p_list += begin
    whole = seen // BN * BN
    left = 0
    inner = 0
    if WINDOW:
        low, left, inner = window_run(row0, row1, low, window, BLOCK, BN)
        # The masked tiles come first: from then on every row has seen a key, and no maximum is infinite.
        before = (left - low + BN - 1) // BN
        after = (stop - inner + BN - 1) // BN
        for i in range(before + after):
            base = tl.where(i < before, low + i * BN, inner + (i - before) * BN)
            end = tl.where(i < before, left, stop)
            origin = base
            if DESC:
                # A box that would reach beyond the document begins earlier: it has at least BN tokens.
                origin = tl.minimum(base, q_start + seq_q - BN)
            key = origin + tl.arange(0, BN)
            m_n = (key >= base) & (key < end)
            # Keys that are none are seen by no row: a single comparison.
            mask = tl.where(m_n, key, 1 << 30)[None, :] <= pos[:, None]
            if BT > BLOCK:  # rows of one block have the same window
                mask &= window_mask(pos, key, first, stride, sinks, window, BLOCK, SHARD)
            if DESC:
                t = origin + doc.to(tl.int32) - k_start
                b_k = load_box(d_k, i_b, i_g.to(tl.int32), t, BN, BD)  # [BN, BD]
                b_v = load_box(d_v, i_b, i_g.to(tl.int32), t, BN, BDV)  # [BN, BDV]
            else:
                t = key.to(tl.int64)
                b_k = load_tile(p_k, t, s_kt, o_d, m_n, m_d)
                b_v = load_tile(p_v, t, s_vt, o_dv, m_n, m_dv)
            acc, m_i, l_i = _attend(acc, m_i, l_i, b_q, b_k, b_v, mask, scale, True, PREC)
    if SHARD and (BN > BLOCK or not WINDOW):
        for i_n in tl.range(whole, tokens, BN, num_stages=1):
            index = i_n + tl.arange(0, BN)
            m_n = index < tokens
            t = shard_tail_tile(index, m_n, p_list, first, stride, sinks, BLOCK, COMPACT, CSR)
            mask = m_n[None, :]
            if not WINDOW:
                block = shard_block(index // BLOCK, first, stride, sinks)
                mask = mask & (block[None, :] <= pos[:, None] // BLOCK - window)
            b_k, b_v = load_tile(p_ks, t, s_kst, o_d, m_n, m_d), load_tile(p_vs, t, s_vst, o_dv, m_n, m_dv)
            acc, m_i, l_i = _attend(acc, m_i, l_i, b_q, b_k, b_v, mask, scale, True, PREC)

    if DESC:
        in_shard = whole // BN
        in_window = (inner - left) // BN
        shard_start = (shard_start + doc).to(tl.int32)
        window_start = left + doc.to(tl.int32) - k_start
        if SHARD and COMPACT:
            acc, m_i, l_i = _attend_boxes(
                acc, m_i, l_i, b_q, d_ks, d_vs, i_b, i_gs.to(tl.int32), in_shard, in_shard, shard_start,
                window_start, p_list, first, stride, sinks, scale, BD, BDV, BLOCK, BN, COMPACT, CSR, PREC,
            )  # fmt: skip
            in_shard = 0
        if WINDOW or not COMPACT:
            acc, m_i, l_i = _attend_boxes(
                acc, m_i, l_i, b_q, d_k, d_v, i_b, i_g.to(tl.int32), in_shard + in_window, in_shard,
                shard_start, window_start, p_list, first, stride, sinks, scale, BD, BDV, BLOCK, BN, COMPACT,
                CSR, PREC,
            )  # fmt: skip
    else:
        for i_n in range(0, whole, BN):
            t = shard_tile(i_n, p_list, first, stride, sinks, BLOCK, BN, COMPACT, CSR)
            m_n = t >= 0
            b_k, b_v = load_tile(p_ks, t, s_kst, o_d, m_n, m_d), load_tile(p_vs, t, s_vst, o_dv, m_n, m_dv)
            acc, m_i, l_i = _attend(acc, m_i, l_i, b_q, b_k, b_v, None, scale, False, PREC)
        for i_n in range(left, inner, BN):
            t = (i_n + tl.arange(0, BN)).to(tl.int64)
            m_n = t >= 0
            b_k, b_v = load_tile(p_k, t, s_kt, o_d, m_n, m_d), load_tile(p_v, t, s_vt, o_dv, m_n, m_dv)
            acc, m_i, l_i = _attend(acc, m_i, l_i, b_q, b_k, b_v, None, scale, False, PREC)

    b_o = acc * (1 / l_i)[:, None]
    tl.store(p_o + o_o, b_o.to(p_o.dtype.element_ty), mask=m_m[:, None] & m_dv)
    tl.store(p_lse, (m_i + tl.log2(l_i)) * LN_2, mask=m_m)


def launch_forward(
    args: KernelArgs,
    out: Tensor,
    lse: Tensor,
    sink_logits: Tensor | None = None,
    source: str | None = None,
    resume: bool = False,
) -> None:
    """Writes `out` `[batch, seq_q, heads, v_head_dim]` and `lse` `[batch, heads, seq_q]`.

    Args:
        source: "window" or "shard" to read that source alone; None for both.
        resume: merge into what the pass over the other source has written to `out` and `lse`.
    """
    if args.scale <= 0:  # the kernel takes the largest score before it scales it
        args = replace(args, q=-args.q if args.scale else torch.zeros_like(args.q), scale=-args.scale or 1.0)
    tensors = {
        "p_q": args.q, **args.window, **args.shard, **args.lists(), "p_o": out,
        "p_prev": out if resume else None, "p_lse": lse, "p_sink": sink_logits,
    }  # fmt: skip
    options = Layout.of(out), Layout.of(lse), sink_logits is not None, source, resume
    with torch.cuda.device_of(args.q):
        for grid, arguments in args.launches(_launches, tensors, *options):
            s2_fwd_kernel[grid](**arguments)


def _launches(
    call: CallLayout, out: Layout, lse: Layout, has_sink: bool, source: str | None, resume: bool
) -> list[Launch]:
    pack, launches = call.pack("forward"), []
    for part, boxes, box_args in call.source_launches({"d_q": call.q}, "forward", source):
        programs = part.query_programs(call.q_start, call.tiles("forward").rows // pack)
        constants = {
            **call.query_args, **call.window_args, **call.shard_args, **call.list_args, **call.pattern_args,
            **box_args, **strides("o", out), **strides("l", lse, "bh"), "HAS_SINK": has_sink,
            "GROUP": call.group, "PACK": pack, "SHARD": source != "window", "WINDOW": source != "shard",
            "RESUME": resume, **programs.arguments(), **call.tile_args("forward"),
        }  # fmt: skip
        grid = programs.count, call.heads // pack, call.batch
        launches.append(Launch(grid, constants, call.tables(programs), boxes))
    return launches
