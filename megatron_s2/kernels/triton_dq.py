"""Backward pass in Triton over query rows: dQ, and delta on the way to it or, for passes over one source, in
a kernel of its own.

dQ reads the same keys in the same order as the forward kernel (`triton_forward`), with the same tiles of BM
rows.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatron_s2.kernels.triton_args import CallLayout, KernelArgs, Launch, Layout, padded, strides
from megatron_s2.kernels.triton_common import (
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

_DELTA_ROWS = 64  # query rows of a program of the delta kernel


@triton.jit
def _row_sums(b_do, b_o, p_lse, p_dlse, p_lse2, p_delta, o_row, m_m):
    """Returns lse in base 2 [BM], and delta [BM] = rowsum(dout * out) - dlse, which softmax backward
    subtracts from dP; writes both."""
    lse = tl.load(p_lse + o_row, mask=m_m, other=0.0) * LOG2_E
    delta = tl.sum(b_do.to(tl.float32) * b_o.to(tl.float32), 1)
    if p_dlse is not None:
        delta -= tl.load(p_dlse + o_row, mask=m_m, other=0.0)
    tl.store(p_lse2 + o_row, lse, mask=m_m)
    tl.store(p_delta + o_row, delta, mask=m_m)
    return lse, delta


@triton.jit
def s2_bwd_kernel_delta(
    p_do, p_o, p_lse, p_delta, p_lse2, s_dob, s_dot, s_doh, s_ob, s_ot, s_oh, seq,
    DV: tl.constexpr, BDV: tl.constexpr, BM: tl.constexpr,
):  # fmt: skip
    """What `_row_sums` writes, `[batch, heads, seq]`."""
    i_h, o_b = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    o_m, o_dv = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, BDV)
    m_m = o_m < seq
    mask = m_m[:, None] & (o_dv < DV)
    o_m64 = o_m.to(tl.int64)[:, None]
    b_do = tl.load(p_do + o_b * s_dob + i_h * s_doh + o_m64 * s_dot + o_dv, mask=mask, other=0.0)  # [BM, BDV]
    b_o = tl.load(p_o + o_b * s_ob + i_h * s_oh + o_m64 * s_ot + o_dv, mask=mask, other=0.0)  # [BM, BDV]
    o_row = (o_b * tl.num_programs(1) + i_h) * seq + o_m
    _row_sums(b_do, b_o, p_lse, None, p_lse2, p_delta, o_row, m_m)


def launch_delta(dout: Tensor, out: Tensor, lse: Tensor, delta: Tensor, lse2: Tensor) -> None:
    """Writes `delta` and `lse2`, lse in base 2: contiguous `[batch, heads, seq]`, of dout and out
    `[batch, seq, heads, v_head_dim]`, for two launches of `launch_dq` that have a source each."""
    batch, seq, heads, dim = out.shape
    with torch.cuda.device_of(out):
        s2_bwd_kernel_delta[(-(-seq // _DELTA_ROWS), heads, batch)](
            p_do=dout, **strides("do", dout), p_o=out, **strides("o", out), p_delta=delta, p_lse2=lse2,
            p_lse=lse.contiguous(), seq=seq, DV=dim, BDV=padded(dim), BM=_DELTA_ROWS, enable_fp_fusion=True,
        )  # fmt: skip


@triton.jit
def _add_dq(
    dq, lse, delta, b_q, b_do, b_k, b_v, mask, scale, MASKED: tl.constexpr, PREC: tl.constexpr
):  # fmt: skip
    """Adds what one tile of keys contributes to dQ [BM, BD], without the softmax scale. lse is in base 2."""
    qk = tl.dot(b_q, tl.trans(b_k), input_precision=PREC)  # [BM, BN]
    p = tl.exp2(qk * scale - lse[:, None])
    if MASKED:
        p = tl.where(mask, p, 0.0)
    dp = tl.dot(b_do, tl.trans(b_v), input_precision=PREC)  # [BM, BN]
    ds = p * (dp - delta[:, None])
    return tl.dot(ds.to(b_k.dtype), b_k, dq, input_precision=PREC)


@triton.jit
def _add_dq_boxes(
    dq, lse, delta, b_q, b_do, d_k, d_v, i_b, i_h, tiles, in_shard, shard_start, window_start, p_list, first,
    stride, sinks, scale, BD: tl.constexpr, BDV: tl.constexpr, BLOCK: tl.constexpr, BN: tl.constexpr,
    COMPACT: tl.constexpr, CSR: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """Adds `tiles` tiles of keys that all rows see, through tensor descriptors; `whole_tile` says which."""
    entry = list_entry(0, in_shard, p_list, BLOCK, BN, CSR)
    for i in range(tiles):
        t = whole_tile(
            i, entry, in_shard, shard_start, window_start, first, stride, sinks, BLOCK, BN, COMPACT, CSR
        )
        entry = list_entry(i + 1, in_shard, p_list, BLOCK, BN, CSR)
        b_k, b_v = load_box(d_k, i_b, i_h, t, BN, BD), load_box(d_v, i_b, i_h, t, BN, BDV)
        dq = _add_dq(dq, lse, delta, b_q, b_do, b_k, b_v, None, scale, False, PREC)
    return dq


@triton.jit
def s2_bwd_kernel_dq(
    p_q, p_k, p_v, p_ks, p_vs, d_q, d_do, d_k, d_v, d_ks, d_vs, p_do, p_o, p_dq, p_prev, p_lse, p_dlse,
    p_lse2, p_delta, p_heads, p_starts, p_list, p_tiles, s_qb, s_qt, s_qh, s_kb, s_kt, s_kh, s_vb, s_vt,
    s_vh, s_ksb, s_kst, s_ksh, s_vsb, s_vst, s_vsh, s_dob, s_dot, s_doh, s_ob, s_ot, s_oh, s_dqb, s_dqt,
    s_dqh, s_lb, s_lh, seq_q, q_start, k_start, window, sinks, scale, num_blocks,
    GROUP: tl.constexpr, PACK: tl.constexpr, D: tl.constexpr, DV: tl.constexpr,
    BD: tl.constexpr, BDV: tl.constexpr, BLOCK: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SHARD: tl.constexpr, WINDOW: tl.constexpr, RESUME: tl.constexpr, DESC: tl.constexpr,
    COMPACT: tl.constexpr, CSR: tl.constexpr, PACKED: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dQ `[batch, seq_q, heads, D]`. With RESUME p_prev is p_dq. With p_o, the output, lse2 and delta are
    written, otherwise read."""
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
    p_do += o_b * s_dob + doc * s_dot + i_h * s_doh
    p_dq += o_b * s_dqb + doc * s_dqt + i_h * s_dqh

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
    o_row = o_b * s_lb + (i_h + o_h) * s_lh + doc + o_m64
    o_dq = (o_h * s_dqh + o_m64 * s_dqt)[:, None] + o_d
    o_q = (o_h * s_qh + o_m64 * s_qt)[:, None] + o_d
    o_do = (o_h * s_doh + o_m64 * s_dot)[:, None] + o_dv
    if d_q is not None:
        row = tile - q_start + doc.to(tl.int32)
        b_q = load_heads(d_q, i_b, i_h.to(tl.int32), row, BM, BD)  # [BM, BD]
        b_do = load_heads(d_do, i_b, i_h.to(tl.int32), row, BM, BDV)  # [BM, BDV]
    else:
        b_q = tl.load(p_q + o_q, mask=m_m[:, None] & m_d, other=0.0)  # [BM, BD]
        b_do = tl.load(p_do + o_do, mask=m_m[:, None] & m_dv, other=0.0)  # [BM, BDV]
    if p_o is not None:
        p_o += o_b * s_ob + doc * s_ot + i_h * s_oh + (o_h * s_oh + o_m64 * s_ot)[:, None] + o_dv
        b_o = tl.load(p_o, mask=m_m[:, None] & m_dv, other=0.0)  # [BM, BDV]
        lse, delta = _row_sums(b_do, b_o, p_lse, p_dlse, p_lse2, p_delta, o_row, m_m)
    else:
        lse = tl.load(p_lse2 + o_row, mask=m_m, other=0.0)  # [BM]
        delta = tl.load(p_delta + o_row, mask=m_m, other=0.0)  # [BM]
    dq = tl.zeros([BM, BD], tl.float32)
    if RESUME:
        p_prev += o_b * s_dqb + doc * s_dqt + i_h * s_dqh
        dq = tl.load(p_prev + o_dq, mask=m_m[:, None] & m_d, other=0.0)
        dq *= LOG2_E / scale

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
        # The masked tiles on both sides of the whole ones, in one loop.
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
            dq = _add_dq(dq, lse, delta, b_q, b_do, b_k, b_v, mask, scale, True, PREC)
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
            dq = _add_dq(dq, lse, delta, b_q, b_do, b_k, b_v, mask, scale, True, PREC)

    if DESC:
        in_shard = whole // BN
        in_window = (inner - left) // BN
        shard_start = (shard_start + doc).to(tl.int32)
        window_start = left + doc.to(tl.int32) - k_start
        if SHARD and COMPACT:
            dq = _add_dq_boxes(
                dq, lse, delta, b_q, b_do, d_ks, d_vs, i_b, i_gs.to(tl.int32), in_shard, in_shard,
                shard_start, window_start, p_list, first, stride, sinks, scale, BD, BDV, BLOCK, BN, COMPACT,
                CSR, PREC,
            )  # fmt: skip
            in_shard = 0
        if WINDOW or not COMPACT:
            dq = _add_dq_boxes(
                dq, lse, delta, b_q, b_do, d_k, d_v, i_b, i_g.to(tl.int32), in_shard + in_window,
                in_shard, shard_start, window_start, p_list, first, stride, sinks, scale, BD, BDV, BLOCK, BN,
                COMPACT, CSR, PREC,
            )  # fmt: skip
    else:
        for i_n in range(0, whole, BN):
            t = shard_tile(i_n, p_list, first, stride, sinks, BLOCK, BN, COMPACT, CSR)
            m_n = t >= 0
            b_k, b_v = load_tile(p_ks, t, s_kst, o_d, m_n, m_d), load_tile(p_vs, t, s_vst, o_dv, m_n, m_dv)
            dq = _add_dq(dq, lse, delta, b_q, b_do, b_k, b_v, None, scale, False, PREC)
        for i_n in range(left, inner, BN):
            t = (i_n + tl.arange(0, BN)).to(tl.int64)
            m_n = t >= 0
            b_k, b_v = load_tile(p_k, t, s_kt, o_d, m_n, m_d), load_tile(p_v, t, s_vt, o_dv, m_n, m_dv)
            dq = _add_dq(dq, lse, delta, b_q, b_do, b_k, b_v, None, scale, False, PREC)

    b_dq = dq * (scale / LOG2_E)
    tl.store(p_dq + o_dq, b_dq.to(p_dq.dtype.element_ty), mask=m_m[:, None] & m_d)


def launch_dq(
    args: KernelArgs,
    dout: Tensor,
    lse2: Tensor,
    delta: Tensor,
    dq: Tensor,
    forward: tuple[Tensor, Tensor, Tensor | None] | None = None,
    source: str | None = None,
    resume: bool = False,
) -> None:
    """Writes `dq` `[batch, seq_q, heads, head_dim]`.

    Args:
        lse2, delta: what `launch_delta` wrote or, with `forward`, what this call writes: contiguous
            `[batch, heads, seq_q]`.
        forward: out, lse and the gradient of lse, which may be None.
        source: "window" or "shard" for what comes through that source alone; None for both.
        resume: add to what is in `dq`.
    """
    if resume and args.scale == 0:  # nothing is added, and the kernel would divide by it
        return
    out, lse, dlse = forward or (None, None, None)
    lse, dlse = (x if x is None else x.contiguous() for x in (lse, dlse))
    tensors = {
        "p_q": args.q, **args.window, **args.shard, **args.lists(), "p_do": dout, "p_o": out, "p_lse": lse,
        "p_dlse": dlse, "p_lse2": lse2, "p_delta": delta, "p_dq": dq, "p_prev": dq if resume else None,
    }  # fmt: skip
    options = Layout.of(dout), Layout.of(out), Layout.of(lse2), Layout.of(dq), source, resume
    with torch.cuda.device_of(args.q):
        for grid, arguments in args.launches(_launches, tensors, *options):
            s2_bwd_kernel_dq[grid](**arguments)


def _launches(
    call: CallLayout,
    dout: Layout,
    out: Layout | None,
    lse2: Layout,
    dq: Layout,
    source: str | None,
    resume: bool,
) -> list[Launch]:
    pack, launches = call.pack("dq"), []
    for part, boxes, box_args in call.source_launches({"d_q": call.q, "d_do": dout}, "dq", source):
        programs = part.query_programs(call.q_start, call.tiles("dq").rows // pack)
        constants = {
            **call.query_args, **call.window_args, **call.shard_args, **call.list_args, **call.pattern_args,
            **box_args, **strides("do", dout), **strides("o", out), **strides("dq", dq),
            **strides("l", lse2, "bh"), "GROUP": call.group, "PACK": pack, "SHARD": source != "window",
            "WINDOW": source != "shard", "RESUME": resume, **programs.arguments(), **call.tile_args("dq"),
        }  # fmt: skip
        grid = programs.count, call.heads // pack, call.batch
        launches.append(Launch(grid, constants, call.tables(programs), boxes))
    return launches
