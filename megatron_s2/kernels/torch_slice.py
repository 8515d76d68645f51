"""S2 attention of consecutive queries whose window and shard come from two places, in PyTorch.

Context parallelism gathers both while other work runs, so each source has a pass of its own: the window's
begins a result, the shard's is merged into it by log-sum-exp. In backward each adds its gradients.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_s2.kernels.torch_backend import Plan, Sources, backward_calls, fitted, forward_calls
from megatron_s2.kernels.torch_plan import equal_runs, plan_shard, plan_window
from megatron_s2.pattern.s2_pattern import S2Pattern


@dataclass(frozen=True)
class TorchSlice:
    """Queries `q_start` .. `q_stop`-1 of one document, all heads, and where their keys lie.

    Its methods take `source`, "window" or "shard", and the keys and values of that: for the window
    `[batch, tokens, kv_heads, head_dim]`, for the shards `[batch, tokens, head_dim]`, the heads' one after
    another. Queries are `[batch, queries, heads, head_dim]`, `lse` is `[batch, heads, queries]`. `out`,
    `lse` and all gradients are float32 (float64 for float64 inputs).

    Args:
        keys_start: position of the window's first key.
        shards: (start, stop) of each KV head's shard.
    """

    pattern: S2Pattern
    scale: float
    q_start: int
    q_stop: int
    keys_start: int
    shards: Sequence[tuple[int, int]]

    def forward(self, source: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Writes attention over the window to `out` and `lse`; merges that over the shard into them."""
        for run, plan in self._runs(source):
            heads = self._heads(run, q)
            sources = self._sources(source, run, k, v, lse.dtype)
            forward_calls(plan, _by_head(q, heads), sources, _by_head(out, heads), lse[:, heads])

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
        """Adds the gradients through one source to `dq`, `dk`, `dv`; `out` and `lse` are the merged ones."""
        for run, plan in self._runs(source):
            heads = self._heads(run, q)
            sources = self._sources(source, run, k, v, lse.dtype)
            grads = Sources(*self._keys(source, run, dk, dv) * 2, self._start(source))
            do, q_run, out_run, dq_run = (_by_head(x, heads) for x in (dout, q, out, dq))
            backward_calls(plan, do, q_run, sources, out_run, lse[:, heads], dq_run, grads)

    def _runs(self, source: str) -> Iterator[tuple[range, Plan]]:
        planner = plan_window if source == "window" else plan_shard
        for run in equal_runs(self.pattern):
            calls = planner(self.pattern, run.start, self.q_start, self.q_stop)
            if calls:
                yield run, Plan(calls, self.pattern, self.scale, self.q_start)

    def _heads(self, run: range, q: Tensor) -> slice:
        group = q.shape[2] // self.pattern.num_kv_heads
        return slice(run.start * group, run.stop * group)

    def _start(self, source: str) -> int:
        return self.keys_start if source == "window" else 0

    def _sources(self, source: str, run: range, k: Tensor, v: Tensor, compute: torch.dtype) -> Sources:
        width = max(k.shape[-1], v.shape[-1])
        keys = tuple(fitted(x, width, compute) for x in self._keys(source, run, k, v))
        return Sources(*keys * 2, self._start(source))

    def _keys(self, source: str, run: range, *tensors: Tensor) -> tuple[Tensor, ...]:
        """`[batch, kv_heads, tokens, head_dim]` of a run of equal heads."""
        if source == "window":
            return tuple(_by_head(x, slice(run.start, run.stop)) for x in tensors)
        start, stop = self.shards[run.start][0], self.shards[run.stop - 1][1]
        return tuple(x[:, start:stop].unflatten(1, (len(run), -1)) for x in tensors)


def _by_head(x: Tensor, heads: slice) -> Tensor:
    """`[batch, heads, tokens, …]` of some heads of `[batch, tokens, heads, …]`."""
    return x[:, :, heads].transpose(1, 2)
