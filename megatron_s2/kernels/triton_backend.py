"""S2 attention on a GPU: the Triton kernels as torch custom operators with autograd around them.

The operators take the pattern as integers, so that `torch.compile`, activation checkpointing and the FLOP
counter see one opaque call whose shapes and cost they know.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
import triton
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from megatron_s2.kernels.triton_columns import s2_bwd_kernel_dkv_shard, s2_bwd_kernel_dkv_window
from megatron_s2.kernels.triton_rows import s2_bwd_kernel_delta, s2_row_kernel
from megatron_s2.kernels.triton_tiles import LOG2_E
from megatron_s2.kernels.tuning import Tiles, Tuning, tuning_for
from megatron_s2.pattern import AttentionFlops, BlockPattern, S2Pattern, attention_flops

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
    tuning: Tuning | None = None,
) -> tuple[Tensor, Tensor]:
    """S2 attention on a GPU; arguments and results as in `reference_attention`, and how kernels are cut.

    Raises:
        ValueError: device, dtype, head_dim or kind of pattern that the kernels do not take.
    """
    if not q.is_cuda and not triton.knobs.runtime.interpret:
        raise ValueError(f"q on {q.device}: must be on a CUDA device with backend triton; use backend torch")
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
    if not isinstance(pattern, S2Pattern):
        raise ValueError(
            f"pattern {type(pattern).__name__}: must be an S2Pattern with backend triton; use backend torch"
        )
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    sink_logits = None if sink_logits is None else sink_logits.contiguous()
    capability = torch.cuda.get_device_capability(q.device)[0] if q.is_cuda else _INTERPRETED_CAPABILITY
    tuning = tuning or tuning_for(capability, max(q.shape[-1], v.shape[-1]), q.element_size())
    packed = documents != [(0, q.shape[1])]
    cuts = [edge for document in documents for edge in document] if packed else []
    return torch.ops.megatron_s2.attention_forward(
        q, k, v, sink_logits, _shape_of(pattern), softmax_scale, cuts, q_start, tuning.encode()
    )


def _shape_of(pattern: S2Pattern) -> list[int]:
    """The pattern for the operators: block, window, sinks; for each head first strided block and stride."""
    heads = [x for g in range(pattern.num_kv_heads) for x in (pattern.first_strided(g), pattern.strides[g])]
    return [pattern.block_size, pattern.local_blocks, pattern.sink_blocks, *heads]


# ---------------------------------------------------------------------------------------------------------
# Launches.


@lru_cache(maxsize=256)
def _on_device(values: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device).view(-1, width)


@dataclass(frozen=True)
class _Work:
    """One call, unpacked: what every launch needs."""

    q: Tensor
    k: Tensor
    v: Tensor
    shape: list[int]
    scale: float
    cuts: list[int]
    q_start: int
    tuning: Tuning

    @property
    def documents(self) -> list[tuple[int, int]]:
        """(start, length) of each document."""
        if not self.cuts:
            return [(0, self.q.shape[1])]
        return [(a, b - a) for a, b in zip(self.cuts[::2], self.cuts[1::2])]

    @property
    def heads(self) -> Tensor:
        return _on_device(tuple(self.shape[3:]), 2, self.q.device)

    def table(self, rows: list[tuple[int, ...]]) -> Tensor | None:
        """Which document, and which tile of it, each program computes; None where there is one document."""
        if not self.cuts:
            return None
        return _on_device(tuple(x for row in rows for x in row), len(rows[0]), self.q.device)

    def shard_tokens(self, length: int) -> int:
        """Tokens of the largest head's shard that some row of a document sees beyond its window."""
        block, window, sinks = self.shape[:3]
        before = max(0, (self.q_start + length - 1) // block - window + 1)
        return block * max(
            min(before, sinks) + max(0, -(-(before - first) // stride))
            for first, stride in zip(self.shape[3::2], self.shape[4::2])
        )

    def constants(self, tiles: Tiles) -> dict:
        """What all kernels are specialised for."""
        D, DV = self.q.shape[-1], self.v.shape[-1]
        return {
            "D": D,
            "DV": DV,
            "BD": max(16, triton.next_power_of_2(D)),
            "BDV": max(16, triton.next_power_of_2(DV)),
            "BLOCK": self.shape[0],
            "BM": tiles.rows,
            "BN": tiles.keys,
            "COMPACT": False,
            "PACKED": bool(self.cuts),
            "PREC": "ieee" if self.q.dtype == torch.float32 else "tf32",
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            "enable_fp_fusion": True,
        }


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def _rows(
    work: _Work, tiles: Tiles, out: Tensor, lse: Tensor, sinks: Tensor | None, dout=None, delta=None
) -> None:
    q, k, v = work.q, work.k, work.v
    count = [
        -(-(work.q_start + length) // tiles.rows) - work.q_start // tiles.rows for _, length in work.documents
    ]
    table = [(start, length, i) for (start, length), n in zip(work.documents, count) for i in range(n)]
    s2_row_kernel[(len(table), q.shape[0] * q.shape[2])](
        q, k, v, k, v, dout, out, lse, delta, sinks, work.heads, work.table(table),
        *_strides(q, k, v, k, v, q if dout is None else dout, out), lse.stride(0), lse.stride(1),
        q.shape[1], work.q_start, 0, work.shape[1], work.shape[2], work.scale * LOG2_E.value,
        H=q.shape[2], GROUP=q.shape[2] // k.shape[2], DQ=dout is not None, HAS_SINK=sinks is not None,
        **work.constants(tiles),
    )  # fmt: skip


def _columns(work: _Work, dout: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor) -> None:
    q, k, v = work.q, work.k, work.v
    batch, kv_heads = k.shape[0], k.shape[2]
    tiles = work.tuning.dkv
    shard, window, room = [], [], 0
    for start, length in work.documents:
        tokens = work.shard_tokens(length)
        shard += [(start, length, i, room) for i in range(-(-tokens // tiles.keys))]
        keys = length if work.cuts else k.shape[1]
        window += [(start, length, i, room) for i in range(-(-keys // tiles.keys))]
        room += tokens
    longest = max(length for _, length in work.documents)
    splits = work.tuning.splits(len(shard) * batch * kv_heads, longest) if shard else 0
    parts = [
        q.new_empty(max(splits, 1), batch, max(room, 1), kv_heads, x.shape[-1], dtype=torch.float32)
        for x in (k, v)
    ]
    part_strides = [stride for part in parts for stride in part.stride()[:4]]
    constants = work.constants(tiles) | {"HKV": kv_heads}
    group = q.shape[2] // kv_heads
    pattern = (work.shape[1], work.shape[2], work.scale * LOG2_E.value)
    if shard:
        s2_bwd_kernel_dkv_shard[(len(shard), splits, batch * kv_heads)](
            q, k, v, dout, lse, delta, *parts, work.heads, work.table(shard),
            *_strides(q, k, v, dout), lse.stride(0), lse.stride(1), *part_strides,
            q.shape[1], work.q_start, *pattern, -(-longest // splits), group, **constants,
        )  # fmt: skip
    del constants["COMPACT"]
    s2_bwd_kernel_dkv_window[(len(window), batch * kv_heads)](
        q, k, v, dout, lse, delta, dk, dv, *parts, work.heads, work.table(window),
        *_strides(q, k, v, dout), lse.stride(0), lse.stride(1), *_strides(dk, dv), *part_strides,
        q.shape[1], k.shape[1], work.q_start, 0, *pattern, splits, group, ADD_SHARD=True, **constants,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# Operators.


@torch.library.custom_op("megatron_s2::attention_forward", mutates_args=())
def attention_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    sink_logits: Tensor | None,
    shape: list[int],
    scale: float,
    cuts: list[int],
    q_start: int,
    tuning: list[int],
) -> tuple[Tensor, Tensor]:
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=torch.float32)
    if out.numel():
        work = _Work(q, k, v, shape, scale, cuts, q_start, Tuning.decode(tuning))
        _rows(work, work.tuning.forward, out, lse, sink_logits)
    return out, lse


@attention_forward.register_fake
def _(q, k, v, sink_logits, shape, scale, cuts, q_start, tuning):
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
    shape: list[int],
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
    dout = dout if dout.stride(-1) == 1 else dout.contiguous()
    _delta(dout, out, dlse, delta)
    work = _Work(q, k, v, shape, scale, cuts, q_start, Tuning.decode(tuning))
    _rows(work, work.tuning.dq, dq, lse, None, dout, delta)
    _columns(work, dout, lse, delta, dk, dv)
    return dq, dk, dv, delta


@attention_backward.register_fake
def _(dout, dlse, q, k, v, out, lse, shape, scale, cuts, q_start, tuning):
    return tuple(torch.empty_like(x) for x in (q, k, v, lse))


def _delta(dout: Tensor, out: Tensor, dlse: Tensor | None, delta: Tensor) -> None:
    batch, seq, heads, dim = out.shape
    dlse = dlse if dlse is None else dlse.contiguous()
    rows = 64
    s2_bwd_kernel_delta[(-(-seq // rows), batch * heads)](
        dout, out, dlse, delta, *_strides(dout, out), seq,
        H=heads, DV=dim, BDV=max(16, triton.next_power_of_2(dim)), BM=rows, HAS_DLSE=dlse is not None,
        enable_fp_fusion=True,
    )  # fmt: skip


def _save(ctx, inputs, output) -> None:
    q, k, v, sink_logits, ctx.shape, ctx.scale, ctx.cuts, ctx.q_start, ctx.tuning = inputs
    ctx.save_for_backward(q, k, v, sink_logits, *output)
    ctx.set_materialize_grads(False)


def _backward(ctx, dout, dlse):
    q, k, v, sink_logits, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    dq, dk, dv, delta = torch.ops.megatron_s2.attention_backward(
        dout, dlse, q, k, v, out, lse, ctx.shape, ctx.scale, ctx.cuts, ctx.q_start, ctx.tuning
    )
    dsinks = None
    if sink_logits is not None:
        # The sink has no value, so its dP is 0: dS = P (0 - delta).
        sink_p = torch.exp(sink_logits.float()[None, :, None] - lse)
        dsinks = -(sink_p * delta).sum((0, 2)).to(sink_logits.dtype)
    return dq, dk, dv, dsinks, None, None, None, None, None


attention_forward.register_autograd(_backward, setup_context=_save)


# ---------------------------------------------------------------------------------------------------------
# FLOPs, on visible pairs: what `torch.utils.flop_counter` gets, with tensors given as their shapes.


def _flops(q, k, v, shape: list[int], cuts: list[int], q_start: int) -> AttentionFlops:
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
    lengths = [b - a for a, b in zip(cuts[::2], cuts[1::2])] if cuts else [q_start + q[1]]
    before = sum(pattern.visible_pairs(q_start))
    pairs = sum(sum(pattern.visible_pairs(length)) - before for length in lengths)
    return attention_flops(q[0] * (q[2] // k[2]) * pairs, q[-1], v[-1])


@register_flop_formula(torch.ops.megatron_s2.attention_forward)
def _forward_flops(q, k, v, sink_logits, shape, scale, cuts, q_start, tuning, out_shape) -> int:
    return _flops(q, k, v, shape, cuts, q_start).forward


@register_flop_formula(torch.ops.megatron_s2.attention_backward)
def _backward_flops(dout, dlse, q, k, v, out, lse, shape, scale, cuts, q_start, tuning, out_shape) -> int:
    return _flops(q, k, v, shape, cuts, q_start).backward
