"""The Triton kernel of the AdamW update; `adam.py` states its order of operations."""

import triton
import triton.language as tl


@triton.jit
def adamw_kernel(
    p_master,
    p_exp_avg,
    p_exp_avg_sq,
    p_gradient,
    p_weights,
    size,
    gradient_scale,
    decay,
    mean_weight,
    beta2,
    square_weight,
    root_correction,
    eps,
    minus_step_size,
    SCALED: tl.constexpr,
    DECAYED: tl.constexpr,
    FROM_MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program updates BLOCK elements. Launch with enable_fp_fusion=False: each fma is written out."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)  # [BLOCK]
    mask = o < size
    b_master = tl.load(p_master + o, mask=mask, other=0.0)
    b_mean = tl.load(p_exp_avg + o, mask=mask, other=0.0)
    b_square = tl.load(p_exp_avg_sq + o, mask=mask, other=0.0)
    b_gradient = tl.load(p_gradient + o, mask=mask, other=0.0).to(tl.float32)

    if SCALED:
        b_gradient = tl.div_rn(b_gradient, tl.full([BLOCK], gradient_scale, tl.float32))
    if DECAYED:
        b_master = b_master * decay
    b_base = b_mean if FROM_MEAN else b_gradient
    b_mean = tl.fma(tl.full([BLOCK], mean_weight, tl.float32), b_gradient - b_mean, b_base)
    b_square = tl.fma(b_gradient * square_weight, b_gradient, b_square * beta2)
    b_root = tl.div_rn(tl.sqrt_rn(b_square), tl.full([BLOCK], root_correction, tl.float32))
    b_master = b_master + tl.div_rn(b_mean * minus_step_size, b_root + eps)

    tl.store(p_master + o, b_master, mask=mask)
    tl.store(p_exp_avg + o, b_mean, mask=mask)
    tl.store(p_exp_avg_sq + o, b_square, mask=mask)
    tl.store(p_weights + o, b_master.to(p_weights.dtype.element_ty), mask=mask)
