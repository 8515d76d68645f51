"""S2 attention on a GPU: the Triton kernels as torch custom operators with autograd around them.

The operators take the pattern as integers, and a mask also as lists on the device, so that `torch.compile`,
activation checkpointing and the FLOP counter see one opaque call whose shapes and cost they know. They are
registered on import, for PyTorch's FLOP counter to know them; the first call imports the kernels.
"""

from __future__ import annotations

from typing import Literal
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_s2.kernels.tuning import Tuning, tuning_for
from megatron_s2.pattern.block_pattern import AttentionFlops, BlockPattern, attention_flops
from megatron_s2.pattern.mask_pattern import BlockMaskPattern
from megatron_s2.pattern.s2_pattern import S2Pattern

_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
_MAX_HEAD_DIM = 256
_INTERPRETED_CAPABILITY = 9  # whose tiles Triton's interpreter runs


def triton_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    softmax_scale: float,
    sink_logits: Tensor | None,
    documents: list[tuple[int, int]],
    q_start: int,
    tuning: Tuning | Literal["autotune"] | None = None,
) -> tuple[Tensor, Tensor]:
    """S2 attention on a GPU; arguments and results as in `reference_attention`, and how kernels are cut.

    Raises:
        ValueError: device, dtype, head_dim or kind of pattern that the kernels do not take.
    """
    require_supported(q, v)
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    sink_logits = None if sink_logits is None else sink_logits.contiguous()
    if tuning == "autotune":
        code = []
    else:
        head_dim = max(q.shape[-1], v.shape[-1])
        code = (tuning or tuning_for(capability_of(q.device), head_dim, q.element_size())).encode()
    packed = documents != [(0, q.shape[1])]
    cuts = [edge for document in documents for edge in document] if packed else []
    if isinstance(pattern, S2Pattern):
        lists, pairs = (None, None), 0
    else:
        lists, pairs = _lists_of(pattern, q.device), _mask_pairs(pattern, documents, q_start)
    return torch.ops.megatron_s2.attention_forward(
        q, k, v, sink_logits, *lists, shape_of(pattern), pairs, softmax_scale, cuts, q_start, code
    )


def require_supported(q: Tensor, v: Tensor) -> None:
    """Raises ValueError for device, dtype or head_dim that the kernels do not take."""
    if q.dtype not in _DTYPES:
        raise ValueError(
            f"q {q.dtype}: must be float16, bfloat16 or float32 with backend triton; use backend torch"
        )
    for name, x in (("q", q), ("v", v)):
        if x.shape[-1] > _MAX_HEAD_DIM:
            raise ValueError(
                f"{name} {tuple(x.shape)}: must have at most {_MAX_HEAD_DIM} as head_dim "
                "with backend triton; use backend torch"
            )
    from megatron_s2.kernels.triton_launch import INTERPRETED

    if not q.is_cuda and not INTERPRETED:
        raise ValueError(f"q on {q.device}: must be on a CUDA device with backend triton; use backend torch")


def capability_of(device: torch.device) -> int:
    """Major compute capability, whose tiles are used."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else _INTERPRETED_CAPABILITY


def shape_of(pattern: BlockPattern) -> list[int]:
    """The pattern for the operators: block, window, sinks; for each head first strided block and stride.

    A mask is given as dense heads with a window of one block: its lists say what they see beyond.
    """
    if not isinstance(pattern, S2Pattern):
        return [pattern.block_size, 1, 0, *(0, 1) * pattern.num_kv_heads]
    heads = [x for g in range(pattern.num_kv_heads) for x in (pattern.first_strided(g), pattern.strides[g])]
    return [pattern.block_size, pattern.local_blocks, pattern.sink_blocks, *heads]


_LISTS: WeakKeyDictionary[BlockMaskPattern, dict[torch.device, tuple[Tensor, Tensor]]] = WeakKeyDictionary()


def _lists_of(pattern: BlockMaskPattern, device: torch.device) -> tuple[Tensor, Tensor]:
    """`BlockMaskPattern.past_lists` on the device."""
    on_devices = _LISTS.setdefault(pattern, {})
    if device not in on_devices:
        starts, entries = pattern.past_lists()
        on_devices[device] = torch.tensor(starts, device=device), torch.tensor(entries, device=device)
    return on_devices[device]


def _mask_pairs(pattern: BlockMaskPattern, documents: list[tuple[int, int]], q_start: int) -> int:
    """Visible query-key pairs of all documents and KV heads."""
    before = sum(pattern.visible_pairs(q_start))
    return sum(sum(pattern.visible_pairs(q_start + b - a)) - before for a, b in documents)


# ---------------------------------------------------------------------------------------------------------
# Operators.


def _decoded(code: list[int]) -> Tuning | None:
    """None, an empty code, is for autotuning: in the operator, which `torch.compile` does not look into."""
    return Tuning.decode(code) if code else None


@torch.library.custom_op("megatron_s2::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    starts: Tensor | None,
    entries: Tensor | None,
    shape: list[int],
    pairs: int,
    scale: float,
    cuts: list[int],
    q_start: int,
    tuning: list[int],
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    if out.numel():
        from megatron_s2.kernels.triton_launch import KernelArgs, launch_rows

        def launch(work: KernelArgs) -> None:
            launch_rows(work, "forward", out, lse, sink_logits)

        work = KernelArgs(q, k, v, shape, scale, cuts, q_start, _decoded(tuning), starts, entries)
        launch(work.tuned("forward", launch))
    return out, lse


@attention_forward.register_fake
def _(q, k, v, sink_logits, starts, entries, shape, pairs, scale, cuts, q_start, tuning):
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    return out, q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)


@torch.library.custom_op("megatron_s2::attention_backward", mutates_args=())
def attention_backward(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    starts: Tensor | None,
    entries: Tensor | None,
    shape: list[int],
    pairs: int,
    scale: float,
    cuts: list[int],
    q_start: int,
    tuning: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dq, dk, dv and delta `[batch, heads, seq]` = rowsum(dout * out) - dlse."""
    dq, delta = torch.empty_like(q), torch.empty_like(lse)
    dk, dv = torch.empty_like(k), torch.empty_like(v)
    if not q.numel():
        return dq, dk.zero_(), dv.zero_(), delta
    from megatron_s2.kernels.triton_launch import KernelArgs, launch_columns, launch_delta, launch_rows

    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    launch_delta(dout, out, dlse, delta)
    work = KernelArgs(q, k, v, shape, scale, cuts, q_start, _decoded(tuning), starts, entries)
    launches = {
        "dq": lambda w: launch_rows(w, "dq", dq, lse, None, dout, delta),
        "dkv": lambda w: launch_columns(w, dout, lse, delta, dk, dv),
    }
    for kernel, launch in launches.items():
        launch(work.tuned(kernel, launch))
    return dq, dk, dv, delta


@attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, starts, entries, shape, pairs, scale, cuts, q_start, tuning):
    return tuple(torch.empty_like(x) for x in (q, k, v, lse))


def _save(ctx, inputs, output) -> None:
    *tensors, shape, pairs, scale, cuts, q_start, tuning = inputs
    ctx.rest = shape, pairs, scale, cuts, q_start, tuning
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    q, k, v, sink_logits, starts, entries, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, delta = torch.ops.megatron_s2.attention_backward(
        dout, dlse, q, k, v, out, lse, starts, entries, *ctx.rest
    )
    dsinks = None
    if sink_logits is not None:
        # The sink has no value, so its dP is 0: dS = P (0 - delta).
        sink_p = torch.exp(sink_logits.float()[None, :, None] - lse)
        dsinks = -(sink_p * delta).sum((0, 2)).to(sink_logits.dtype)
    return dq, dk, dv, dsinks, *[None] * 8


attention_forward.register_autograd(_backward, setup_context=_save)


# ---------------------------------------------------------------------------------------------------------
# FLOPs, on visible pairs: what `torch.utils.flop_counter` gets, with tensors given as their shapes.


def _flops(q, k, v, shape: list[int], pairs: int, cuts: list[int], q_start: int) -> AttentionFlops:
    pairs = pairs or _s2_pairs(shape, cuts, q_start, q[1])
    return attention_flops(q[0] * (q[2] // k[2]) * pairs, q[-1], v[-1])


def _s2_pairs(shape: list[int], cuts: list[int], q_start: int, queries: int) -> int:
    block, window, sinks = shape[:3]
    firsts, strides = shape[3::2], shape[4::2]
    pattern = S2Pattern(
        num_kv_heads=len(strides),
        block_size=block,
        local_blocks=window,
        vert_stride=tuple(strides),
        sink_blocks=sinks,
        phases=tuple(-first % stride for first, stride in zip(firsts, strides)),
        warn_lost=False,
    )
    lengths = [b - a for a, b in zip(cuts[::2], cuts[1::2])] if cuts else [q_start + queries]
    before = sum(pattern.visible_pairs(q_start))
    return sum(sum(pattern.visible_pairs(length)) - before for length in lengths)


@register_flop_formula(torch.ops.megatron_s2.attention_forward)
def _forward_flops(
    q, k, v, sink_logits, starts, entries, shape, pairs, scale, cuts, q_start, tuning, out_shape
) -> int:
    return _flops(q, k, v, shape, pairs, cuts, q_start).forward


@register_flop_formula(torch.ops.megatron_s2.attention_backward)
def _backward_flops(
    dout, dlse, q, k, v, out, lse, starts, entries, shape, pairs, scale, cuts, q_start, tuning, out_shape
) -> int:
    return _flops(q, k, v, shape, pairs, cuts, q_start).backward
