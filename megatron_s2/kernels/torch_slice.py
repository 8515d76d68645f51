"""Attention of a sequence slice by the torch backend."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_s2.kernels.slice import SequenceSlice
from megatron_s2.kernels.torch_calls import BackwardTensors, ForwardTensors, Plan, Sources, blocks_of, fitted
from megatron_s2.kernels.torch_native import run_backward, run_forward
from megatron_s2.kernels.torch_plan import equal_heads, plan_shard, plan_window


@dataclass(frozen=True)
class TorchSlice(SequenceSlice):
    """`SequenceSlice` in PyTorch, on any device and in any dtype."""

    def forward(self, source: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        parts = []
        for kv_heads, plan in self._plans(source):
            heads = self._query_heads(kv_heads, q)
            sources = self._sources(source, kv_heads, k, v, lse.dtype)
            q_h, out_h = (_by_head(x, heads) for x in (q, out))
            parts.append(ForwardTensors(plan, q_h, sources, out_h, lse[:, heads]))
        run_forward(parts)

    def backward(
        self,
        source: str,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
    ) -> None:
        parts = []
        for kv_heads, plan in self._plans(source):
            heads = self._query_heads(kv_heads, q)
            sources = self._sources(source, kv_heads, k, v, lse.dtype)
            grads = self._both(self._keys(source, kv_heads, dk, dv), source)
            dout_h, q_h, out_h, dq_h = (_by_head(x, heads) for x in (dout, q, out, dq))
            parts.append(BackwardTensors(plan, dout_h, q_h, sources, out_h, lse[:, heads], dq_h, grads))
        run_backward(parts)

    def _plans(self, source: str) -> Iterator[tuple[range, Plan]]:
        """Each range of equal KV heads that reads the source, and its plan."""
        plan_calls = plan_window if source == "window" else plan_shard
        for kv_heads in equal_heads(self.pattern):
            calls = plan_calls(self.pattern, kv_heads.start, self.q_start, self.q_stop)
            if calls:
                yield kv_heads, Plan(calls, self.pattern, self.scale, self.q_start)

    def _query_heads(self, kv_heads: range, q: Tensor) -> slice:
        group = q.shape[2] // self.pattern.num_kv_heads
        return slice(kv_heads.start * group, kv_heads.stop * group)

    def _start(self, source: str) -> int:
        return self.keys_start if source == "window" else 0

    def _sources(self, source: str, kv_heads: range, k: Tensor, v: Tensor, dtype: torch.dtype) -> Sources:
        width = max(k.shape[-1], v.shape[-1])
        keys = tuple(fitted(x, width, dtype) for x in self._keys(source, kv_heads, k, v))
        return self._both(keys, source)

    def _both(self, keys: tuple[Tensor, ...], source: str) -> Sources:
        """Returns keys and values, or their gradients, as both sources; the plan's calls read one."""
        blocks = (blocks_of(x, self.pattern.block_size) for x in keys)
        return Sources(*keys, *blocks, self._start(source))

    def _keys(self, source: str, kv_heads: range, *tensors: Tensor) -> tuple[Tensor, ...]:
        """The KV heads' part of each tensor, `[batch, kv_heads, tokens, head_dim]`."""
        if source == "window":
            return tuple(_by_head(x, slice(kv_heads.start, kv_heads.stop)) for x in tensors)
        start, stop = self.shards[kv_heads.start][0], self.shards[kv_heads.stop - 1][1]
        return tuple(x[:, start:stop].unflatten(1, (len(kv_heads), -1)) for x in tensors)


def _by_head(x: Tensor, heads: slice) -> Tensor:
    """Some heads of `[batch, tokens, heads, …]` as `[batch, heads, tokens, …]`."""
    return x[:, :, heads].transpose(1, 2)
