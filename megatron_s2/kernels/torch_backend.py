"""S2 attention in PyTorch with linear memory, forward and backward.

The visible keys of the queries are split into calls that need hardly any mask (`torch_plan`): only Band calls
have one, in the diagonal block. On the CPU all calls of all heads and documents run as one parallel region in
C++ (`torch_native`) where there is a compiler; else one after the other from Python (`torch_calls`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_s2.kernels.numerics import compute_dtype, merge_sink, sink_gradient
from megatron_s2.kernels.torch_calls import (
    BackwardTensors,
    ForwardTensors,
    Plan,
    Sources,
    add_blocks,
    blocks_of,
    fitted,
    padded,
)
from megatron_s2.kernels.torch_native import product_dtype, run_backward, run_forward
from megatron_s2.kernels.torch_plan import equal_heads, plan_head
from megatron_s2.pattern import BlockPattern, S2Pattern


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    pattern: BlockPattern,
    softmax_scale: float,
    sink_logits: Tensor | None,
    documents: Sequence[tuple[int, int]],
    q_start: int,
) -> tuple[Tensor, Tensor]:
    """S2 attention with linear memory, summed in `compute_dtype`; arguments and results as in
    `reference_attention`."""
    return _BlockedAttention.apply(q, k, v, sink_logits, pattern, softmax_scale, documents, q_start)


class _EqualHeads:
    """Equal KV heads in one document, as views of the whole tensors."""

    def __init__(self, q, k, pattern, heads: range, document: tuple[int, int], scale: float, q_start: int):
        start, stop = document
        group, last = q.shape[2] // k.shape[2], q_start + stop - start
        self._kv_heads = slice(heads.start, heads.stop)
        self._heads = slice(heads.start * group, heads.stop * group)
        self._queries, self._keys = slice(start, stop), slice(start, stop + q_start)
        self.plan = Plan(plan_head(pattern, heads.start, q_start, last), pattern, scale, q_start)
        shard = []
        if isinstance(pattern, S2Pattern) and not pattern.is_dense(heads.start):
            size = pattern.shard_prefix(heads.start, (last - 1) // pattern.block_size)
            shard = [pattern.shard_block(heads.start, n) for n in range(size)]
        # With sinks the blocks may be unevenly spaced: they are copied.
        spacing = shard[1] - shard[0] if len(shard) > 1 else 1
        even = slice(shard[0], shard[-1] + 1, spacing) if shard else slice(0)
        self._is_view = shard == list(range(*even.indices(last)))
        self._index = even if self._is_view else shard

    def query_side(self, x: Tensor) -> Tensor:
        """Views `[batch, seq, heads, dim]` as `[batch, heads, queries, dim]`."""
        return x[:, self._queries, self._heads].transpose(1, 2)

    def lse(self, x: Tensor) -> Tensor:
        return x[:, self._heads, self._queries]

    def _window(self, x: Tensor) -> Tensor:
        return x[:, self._keys, self._kv_heads].transpose(1, 2)

    def sources(self, k: Tensor, v: Tensor, width: int, dtype: torch.dtype) -> Sources:
        k, v = (fitted(self._window(x), width, dtype) for x in (k, v))
        return Sources(k, v, *(self._blocks(x)[:, :, self._index] for x in (k, v)))

    def gradients(self, dk: Tensor, dv: Tensor) -> Sources:
        """Returns the tensors to which the gradients of `sources` are added: views of dk and dv and, for a
        shard that is no view, zeros that `add_shard` adds to dk and dv."""
        dk, dv = self._window(dk), self._window(dv)
        shards = (self._blocks(x)[:, :, self._index] for x in (dk, dv))
        return Sources(dk, dv, *(x if self._is_view else torch.zeros_like(x) for x in shards))

    def add_shard(self, grads: Sources) -> None:
        """Adds the gradients of a shard that is no view to the gradients of its tokens in dk and dv."""
        if not self._is_view:
            for grad, shard in ((grads.k, grads.k_shard), (grads.v, grads.v_shard)):
                add_blocks(grad, self._index, shard.flatten(2, 3), self.plan.pattern.block_size)

    def _blocks(self, x: Tensor) -> Tensor:
        return blocks_of(x, self.plan.pattern.block_size)


def _parts(q, k, pattern, scale, documents, q_start) -> Iterator[_EqualHeads]:
    for document in documents if q.numel() else ():
        for heads in equal_heads(pattern):
            yield _EqualHeads(q, k, pattern, heads, document, scale, q_start)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sink_logits, pattern, scale, documents, q_start):
        dtype = compute_dtype(q.dtype)
        width, keys_dtype = max(q.shape[-1], v.shape[-1]), product_dtype(k, pattern)
        out = q.new_empty(*q.shape[:-1], v.shape[-1], dtype=dtype)
        lse = q.new_empty(q.shape[0], q.shape[2], q.shape[1], dtype=dtype)
        run_forward(
            ForwardTensors(
                part.plan,
                part.query_side(q),
                part.sources(k, v, width, keys_dtype),
                part.query_side(out),
                part.lse(lse),
            )
            for part in _parts(q, k, pattern, scale, documents, q_start)
        )
        if sink_logits is not None:
            lse = merge_sink(out, lse, sink_logits)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, k, v, sink_logits, out, lse)
        ctx.constants = pattern, scale, documents, q_start
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        q, k, v, sink_logits, out, lse = ctx.saved_tensors
        pattern, scale, documents, q_start = ctx.constants
        dtype, width = lse.dtype, max(q.shape[-1], v.shape[-1])
        keys_dtype = product_dtype(k, pattern, backward=True)
        if dout is None:
            dout = torch.zeros_like(out)
        if dlse is not None:
            # Softmax backward subtracts delta = sum(dout * out) from dP. With a gradient of lse it subtracts
            # delta - dlse: a further column, 1 in dout, -dlse in out and 0 in V, makes the kernel do that.
            dout = torch.cat([padded(dout, width), torch.ones_like(dout[..., :1])], -1)
            out = torch.cat([padded(out.to(dtype), width), -dlse.transpose(1, 2)[..., None]], -1)
            width, keys_dtype = width + 1, dtype
        dq, dk, dv = (torch.zeros_like(x, dtype=dtype) for x in (q, k, v))
        parts = list(_parts(q, k, pattern, scale, documents, q_start))
        grads = [part.gradients(dk, dv) for part in parts]
        run_backward(
            BackwardTensors(
                part.plan,
                part.query_side(dout),
                part.query_side(q),
                part.sources(k, v, width, keys_dtype),
                part.query_side(out),
                part.lse(lse),
                part.query_side(dq),
                of_keys,
            )
            for part, of_keys in zip(parts, grads)
        )
        for part, of_keys in zip(parts, grads):
            part.add_shard(of_keys)
        dsinks = None
        if sink_logits is not None and ctx.needs_input_grad[3]:
            delta = (dout.to(dtype) * out).sum(-1).transpose(1, 2)  # [batch, heads, seq]
            dsinks = sink_gradient(sink_logits, lse, delta)
        return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks, None, None, None, None
