"""The calls of a plan (`torch_plan`) in Python, on any device.

Each call is one flash attention over its keys, and results merge by log-sum-exp. Given the *merged* output
and log-sum-exp, the backward of a flash kernel computes exactly the gradients that its keys contribute.
Backward therefore runs the same calls and adds up their gradients. It needs q, k, v, out and lse alone, and
no tensor grows with the square of the sequence.

Calls work on views of the inputs and copy at most a slice of them, so backward allocates little beside the
gradients. K and V are never expanded to the query heads. Band calls read their keys through an overlapping
view of K and V.

`torch_tasks.cpp` is the same in C++ for the CPU, and faster: keep the two alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_s2.kernels.numerics import merge_parts
from megatron_s2.kernels.torch_flash import flash_backward, flash_forward
from megatron_s2.kernels.torch_plan import Band, Call, Causal, Gathered, Past
from megatron_s2.pattern import BlockPattern

# Query-side tensors are [batch, heads, queries, dim] (lse without dim), any strides; their dim may be smaller
# than that of K and their precision lower.

_MAX_WINDOW_ELEMENTS = 1 << 18  # elements of K in one Band call: gradients of overlapping windows take memory


@dataclass
class Sources:
    """Keys and values that equal heads read, or in backward their gradients.

    Args:
        k, v: window source `[batch, kv_heads, tokens, dim]`, any strides.
        k_shard, v_shard: shard source `[batch, kv_heads, blocks, block_size, dim]`, any strides.
        start: position of the first token of the window source.
    """

    k: Tensor
    v: Tensor
    k_shard: Tensor
    v_shard: Tensor
    start: int = 0


@dataclass(frozen=True)
class Plan:
    """Calls of equal heads (`plan_head`), for queries that begin at position `q_start`."""

    calls: list[Call]
    pattern: BlockPattern
    scale: float
    q_start: int

    def queries(self, start: int, stop: int) -> slice:
        """Returns the indices of positions start .. stop-1 in the query-side tensors."""
        return slice(start - self.q_start, stop - self.q_start)


class ForwardTensors(NamedTuple):
    """Queries, keys and values of one plan, and the results to write, `out` and `lse` in the dtype of K."""

    plan: Plan
    q: Tensor
    sources: Sources
    out: Tensor
    lse: Tensor


class BackwardTensors(NamedTuple):
    """What backward of one plan reads, with merged `out` and `lse`, and the gradients that it adds to."""

    plan: Plan
    dout: Tensor
    q: Tensor
    sources: Sources
    out: Tensor
    lse: Tensor
    dq: Tensor
    grads: Sources


def forward_calls(tensors: ForwardTensors) -> None:
    """Writes attention over the keys of all calls to `out` and `lse`."""
    plan, q, sources, out, lse = tensors
    for call in plan.calls:
        if isinstance(call, Causal):
            t = plan.queries(call.start, call.stop)
            k, v = _causal_keys(call, sources)
            o, logsum = flash_forward(_queries(q, t, sources), k, v, plan.scale, causal=True)
            out[:, :, t], lse[:, :, t] = o[..., : out.shape[-1]], logsum
        elif isinstance(call, Band):
            mask, fold = _band_mask(plan, q, sources), _band_fold(plan, sources)
            for part, t in _band_parts(call, plan, sources):
                k, v = _windows(part, plan, sources)
                o, logsum = flash_forward(fold(_queries(q, t, sources)), k, v, plan.scale, mask=mask)
                out[:, :, t], lse[:, :, t] = fold(o)[..., : out.shape[-1]], fold(logsum)
        else:
            t = plan.queries(call.start, call.stop)
            o, logsum = flash_forward(_queries(q, t, sources), *_past_keys(call, plan, sources), plan.scale)
            merge_parts(out[:, :, t], lse[:, :, t], o[..., : out.shape[-1]], logsum)


def backward_calls(tensors: BackwardTensors) -> None:
    """Adds the gradients of `forward_calls` to `dq` and `grads`."""
    plan, dout, q, sources, out, lse, dq, grads = tensors
    for call in plan.calls:
        if isinstance(call, Causal):
            t = plan.queries(call.start, call.stop)
            dout_t, q_t, out_t = (_queries(x, t, sources) for x in (dout, q, out))
            k, v = _causal_keys(call, sources)
            dq_t, *dkv = flash_backward(dout_t, q_t, k, v, out_t, lse[:, :, t], plan.scale, causal=True)
            _add(dq[:, :, t], dq_t)
            for grad, part in zip(_causal_keys(call, grads), dkv):
                _add(grad, part)
        elif isinstance(call, Band):
            mask, fold = _band_mask(plan, q, sources), _band_fold(plan, sources)
            for part, t in _band_parts(call, plan, sources):
                dout_t, q_t, out_t = (fold(_queries(x, t, sources)) for x in (dout, q, out))
                k, v = _windows(part, plan, sources)
                dq_t, *dkv = flash_backward(
                    dout_t, q_t, k, v, out_t, fold(lse[:, :, t]), plan.scale, mask=mask
                )
                _add(dq[:, :, t], fold(dq_t))
                _add_windows(part, plan, grads, dkv)
        else:
            t = plan.queries(call.start, call.stop)
            dout_t, q_t, out_t = (_queries(x, t, sources) for x in (dout, q, out))
            k, v = _past_keys(call, plan, sources)
            dq_t, *dkv = flash_backward(dout_t, q_t, k, v, out_t, lse[:, :, t], plan.scale)
            _add(dq[:, :, t], dq_t)
            _add_past(call, plan, grads, dkv)


def _queries(x: Tensor, t: slice, sources: Sources) -> Tensor:
    return fitted(x[:, :, t], sources.k.shape[-1], sources.k.dtype)


def fitted(x: Tensor, width: int, dtype: torch.dtype) -> Tensor:
    """Returns x with dim `width` and this dtype, and stride 1 in dim, which PyTorch's CPU kernel assumes."""
    x = padded(x.to(dtype), width)
    return x if x.stride(-1) == 1 else x.contiguous()


def padded(x: Tensor, width: int) -> Tensor:
    return F.pad(x, (0, width - x.shape[-1])) if width > x.shape[-1] else x


def _add(total: Tensor, part: Tensor) -> None:
    """Adds a part whose dim may be padded."""
    total += part[..., : total.shape[-1]]


def _causal_keys(call: Causal, sources: Sources) -> tuple[Tensor, Tensor]:
    keys = slice(call.start - sources.start, call.stop - sources.start)
    return sources.k[:, :, keys], sources.v[:, :, keys]


# Band: each row of a KV head becomes a KV head of its own. Its keys are the row's window, its rows the
# queries of the row in all query heads of the group.


def _band_parts(call: Band, plan: Plan, sources: Sources) -> Iterator[tuple[Band, slice]]:
    """Splits a call into parts of bounded size; yields each with the indices of its queries."""
    B = plan.pattern.block_size
    batch, kv_heads, _, dim = sources.k.shape
    most = max(1, _MAX_WINDOW_ELEMENTS // (batch * kv_heads * plan.pattern.local_blocks * B * dim))
    for first in range(call.first, call.last, most):
        last = min(first + most, call.last)
        yield Band(first, last), plan.queries(first * B, last * B)


def _band_fold(plan: Plan, sources: Sources) -> Callable[[Tensor], Tensor]:
    """Returns a function that reshapes `[batch, kv_heads * group, rows * B, …]` to
    `[batch, kv_heads * rows, group * B, …]`, and back."""

    def fold(x: Tensor) -> Tensor:
        x = x.unflatten(1, (sources.k.shape[1], -1)).unflatten(3, (-1, plan.pattern.block_size))
        return x.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    return fold


def _windows(part: Band, plan: Plan, sources: Sources) -> Iterator[Tensor]:
    """Yields K and V as overlapping windows `[batch, kv_heads * rows, local_blocks * B, dim]`."""
    B, L = plan.pattern.block_size, plan.pattern.local_blocks
    first, last = ((row - L + 1) * B - sources.start for row in (part.first, part.last))
    for x in (sources.k, sources.v):
        windows = x[:, :, first : last + (L - 1) * B].unfold(2, L * B, B)
        yield windows.transpose(-1, -2).flatten(1, 2)


def _add_windows(part: Band, plan: Plan, grads: Sources, parts: list[Tensor]) -> None:
    B, L = plan.pattern.block_size, plan.pattern.local_blocks
    rows = part.last - part.first
    for grad, windows in zip((grads.k, grads.v), parts):
        windows = windows.unflatten(1, (-1, rows)).unflatten(3, (L, B))
        for w in range(L):
            start = (part.first - L + 1 + w) * B - grads.start
            _add(grad[:, :, start : start + rows * B], windows[:, :, :, w].flatten(2, 3))


def _band_mask(plan: Plan, q: Tensor, sources: Sources) -> Tensor:
    """Additive `[1, 1, group * B, local_blocks * B]`: minus infinity above the diagonal of the last block."""
    B, L = plan.pattern.block_size, plan.pattern.local_blocks
    mask = sources.k.new_full((B, L * B), float("-inf")).triu((L - 1) * B + 1)
    return mask.repeat(q.shape[1] // sources.k.shape[1], 1)[None, None]


# Past and Gathered.


def _past_keys(call: Past | Gathered, plan: Plan, sources: Sources) -> Iterable[Tensor]:
    if isinstance(call, Gathered):
        B = plan.pattern.block_size
        return (blocks_of(x, B)[:, :, list(call.blocks)].flatten(2, 3) for x in (sources.k, sources.v))
    if call.source == "shard":
        return (x.flatten(2, 3) for x in _shard_blocks(call, plan, sources))
    keys = slice(call.keys_start - sources.start, call.keys_stop - sources.start)
    return sources.k[:, :, keys], sources.v[:, :, keys]


def _shard_blocks(call: Past, plan: Plan, sources: Sources) -> tuple[Tensor, Tensor]:
    B = plan.pattern.block_size
    blocks = slice(call.keys_start // B, call.keys_stop // B)
    return sources.k_shard[:, :, blocks], sources.v_shard[:, :, blocks]


def _add_past(call: Past | Gathered, plan: Plan, grads: Sources, parts: list[Tensor]) -> None:
    if isinstance(call, Gathered):
        for grad, part in zip((grads.k, grads.v), parts):
            add_blocks(grad, call.blocks, part, plan.pattern.block_size)
    elif call.source == "shard":
        for grad, part in zip(_shard_blocks(call, plan, grads), parts):
            _add(grad, part.unflatten(2, grad.shape[2:4]))
    else:
        for grad, part in zip(_past_keys(call, plan, grads), parts):
            _add(grad, part)


def blocks_of(x: Tensor, block_size: int) -> Tensor:
    """Views the full blocks of `[batch, kv_heads, tokens, dim]` as `[…, blocks, block_size, dim]`."""
    blocks = x.shape[2] // block_size
    return x[:, :, : blocks * block_size].unflatten(2, (blocks, block_size))


def add_blocks(x: Tensor, blocks: Sequence[int], values: Tensor, block_size: int) -> None:
    """Adds `values` `[batch, kv_heads, len(blocks) * block_size, dim]` to blocks of x."""
    index = torch.tensor(blocks, device=x.device)
    values = values[..., : x.shape[-1]].unflatten(2, (len(blocks), block_size))
    blocks_of(x, block_size).index_add_(2, index, values)
