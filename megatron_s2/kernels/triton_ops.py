"""The Triton kernels as torch custom operators: forward and backward, autograd and FLOP counts.

The operators take the pattern as text, and an arbitrary mask as tables on the device, so that
`torch.compile`, activation checkpointing and the FLOP counter see one opaque call of known shapes and cost.
They are registered when this module is imported, because PyTorch's FLOP counter looks them up before the
first call. Triton and the kernels are imported by the first call. `torch.library.custom_op` and
`torch.library.register_autograd` would do the same with more than twice the host time per call.

Arguments in the schema of both operators:

    starts, blocks  `mask_tables` of an arbitrary mask, or None
    pattern         `KernelPattern.code`
    pairs           visible query-key pairs of an arbitrary mask over all documents and KV heads; 0 for an S2
                    pattern, whose pairs follow from `pattern`
    edges           `edges_code` of the packed documents; empty where nothing is packed
    tuning          `Tuning.code`; empty to measure. Measuring happens inside the operator, into which
                    `torch.compile` does not look
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_s2.kernels.numerics import sink_gradient
from megatron_s2.kernels.triton_pattern import KernelPattern, decode_edges
from megatron_s2.kernels.tuning import Tuning
from megatron_s2.pattern.block_pattern import AttentionFlops, attention_flops

if TYPE_CHECKING:
    from megatron_s2.kernels.triton_args import KernelArgs


_LIBRARY = torch.library.Library("megatron_s2", "FRAGMENT")
_MASK_AND_PATTERN = (
    "Tensor? starts, Tensor? blocks, str pattern, SymInt pairs, float scale, str edges, int q_start, "
    "str tuning"
)
_LIBRARY.define(
    f"attention_forward(Tensor q, Tensor k, Tensor v, Tensor? sink_logits, {_MASK_AND_PATTERN}) "
    "-> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_LIBRARY.define(
    "attention_backward(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_MASK_AND_PATTERN}) -> (Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_LIBRARY, "attention_forward", "CompositeExplicitAutograd")
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    starts: Tensor | None,
    blocks: Tensor | None,
    pattern: str,
    pairs: int,
    scale: float,
    edges: str,
    q_start: int,
    tuning: str,
) -> tuple[Tensor, Tensor]:
    """out `[batch, seq, heads, v_head_dim]` and float32 lse `[batch, heads, seq]`."""
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    if out.numel():
        from megatron_s2.kernels.triton_autotune import with_tuning
        from megatron_s2.kernels.triton_forward import launch_forward

        def launch(args: KernelArgs) -> None:
            launch_forward(args, out, lse, sink_logits)

        args = _kernel_args(q, k, v, starts, blocks, pattern, scale, edges, q_start, tuning)
        launch(with_tuning(args, "forward", launch))
    return out, lse


@torch.library.register_fake("megatron_s2::attention_forward", lib=_LIBRARY)
def _(q, k, v, sink_logits, starts, blocks, pattern, pairs, scale, edges, q_start, tuning):
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@torch.library.impl(_LIBRARY, "attention_backward", "CompositeExplicitAutograd")
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    blocks: Tensor | None,
    pattern: str,
    pairs: int,
    scale: float,
    edges: str,
    q_start: int,
    tuning: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv, and delta `[batch, heads, seq]` = rowsum(dout * out) - dlse."""
    dq, delta, lse2 = torch.empty_like(q), torch.empty_like(lse), torch.empty_like(lse)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    if not q.numel():
        return dq, dk.zero_(), dv.zero_(), delta
    from megatron_s2.kernels.triton_autotune import with_tuning
    from megatron_s2.kernels.triton_dkv import launch_dkv
    from megatron_s2.kernels.triton_dq import launch_dq

    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    args = _kernel_args(q, k, v, starts, blocks, pattern, scale, edges, q_start, tuning)
    launches = {
        "dq": lambda args: launch_dq(args, dout, lse2, delta, dq, (out, lse, dlse)),
        "dkv": lambda args: launch_dkv(args, dout, lse2, delta, dk, dv),
    }
    for kernel, launch in launches.items():
        launch(with_tuning(args, kernel, launch))
    return dq, dk, dv, delta


@torch.library.register_fake("megatron_s2::attention_backward", lib=_LIBRARY)
def _(dout, dlse, q, k, v, out, lse, starts, blocks, pattern, pairs, scale, edges, q_start, tuning):
    return tuple(torch.empty_like(x) for x in (q, k, v, lse))


def _kernel_args(q, k, v, starts, blocks, pattern, scale, edges, q_start, tuning) -> KernelArgs:
    from megatron_s2.kernels.triton_args import KernelArgs

    return KernelArgs(
        q, k, v, KernelPattern.decode(pattern), scale, edges=decode_edges(edges), q_start=q_start,
        tuning=Tuning.decode(tuning) if tuning else None,
        mask=None if starts is None else (starts, blocks),
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# Autograd.


def _forward_below(*arguments) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.megatron_s2.attention_forward.default(*arguments)


def _backward_below(*arguments) -> tuple[Tensor, ...]:
    with torch._C._AutoDispatchBelowAutograd():
        return torch.ops.megatron_s2.attention_backward.default(*arguments)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        *tensors, pattern, pairs, scale, edges, q_start, tuning = arguments
        output = _forward_below(*arguments)
        ctx.constants = pattern, pairs, scale, edges, q_start, tuning
        ctx.save_for_backward(*tensors, *output)
        ctx.set_materialize_grads(False)
        return output

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, sink_logits, starts, blocks, out, lse = ctx.saved_tensors
        dout = torch.zeros_like(out) if dout is None else dout
        dq, dk, dv, delta = _gradients(dout, dlse, q, k, v, out, lse, starts, blocks, *ctx.constants)
        dsinks = None if sink_logits is None else sink_gradient(sink_logits, lse, delta)
        return dq, dk, dv, dsinks, *[None] * 8


class _Gradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx, *arguments):
        return _backward_below(*arguments)

    @staticmethod
    def backward(ctx, *grads):
        raise NotImplementedError(
            "backend triton: a gradient of S2 attention has none itself; use backend torch"
        )


def _attention(*arguments) -> tuple[Tensor, ...]:
    return _Attention.apply(*arguments) if torch.is_grad_enabled() else _forward_below(*arguments)


def _gradients(*arguments) -> tuple[Tensor, ...]:
    return _Gradients.apply(*arguments) if torch.is_grad_enabled() else _backward_below(*arguments)


_LIBRARY.impl("attention_forward", _attention, "Autograd")
_LIBRARY.impl("attention_backward", _gradients, "Autograd")


# ---------------------------------------------------------------------------------------------------------
# FLOPs of visible pairs. `torch.utils.flop_counter` passes tensors as their shapes.


def _flops(q, k, v, pattern: str, pairs: int, edges: str, q_start: int) -> AttentionFlops:
    if not pairs:
        s2, edges = KernelPattern.decode(pattern), decode_edges(edges)
        lengths = [b - a for a, b in zip(edges[::2], edges[1::2])]
        unseen = s2.visible_pairs(q_start)
        pairs = sum(s2.visible_pairs(length) - unseen for length in lengths or [q_start + q[1]])
    return attention_flops(q[0] * (q[2] // k[2]) * pairs, q[-1], v[-1])


@register_flop_formula(torch.ops.megatron_s2.attention_forward)
def _forward_flops(
    q, k, v, sink_logits, starts, blocks, pattern, pairs, scale, edges, q_start, tuning, out_shape
) -> int:
    return _flops(q, k, v, pattern, pairs, edges, q_start).forward


@register_flop_formula(torch.ops.megatron_s2.attention_backward)
def _backward_flops(
    dout, dlse, q, k, v, out, lse, starts, blocks, pattern, pairs, scale, edges, q_start, tuning, out_shape
) -> int:
    return _flops(q, k, v, pattern, pairs, edges, q_start).backward
