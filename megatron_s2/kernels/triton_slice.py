"""S2 attention of consecutive queries whose window and shard come from two places, in Triton kernels.

What `torch_pieces` is in PyTorch: the same methods with the same tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from megatron_s2.kernels.triton_backend import capability_of, require_supported, shape_of
from megatron_s2.kernels.triton_launch import (
    KernelArgs,
    launch_delta,
    launch_rows,
    launch_shard_columns,
    launch_window_columns,
)
from megatron_s2.kernels.tuning import tuning_for
from megatron_s2.pattern.s2_pattern import S2Pattern


@dataclass(frozen=True)
class TritonSlice:
    """Queries `q_start` .. `q_stop`-1 of one document, all heads; all else as in `TorchSlice`."""

    pattern: S2Pattern
    scale: float
    q_start: int
    q_stop: int
    keys_start: int
    shards: Sequence[tuple[int, int]]
    _kept: dict[str, Tensor] = field(default_factory=dict, init=False, compare=False, repr=False)

    def forward(self, source: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        """Writes attention over the window to `out` and `lse`; merges that over the shard into them."""
        if self._reads(source):
            work = self._work(source, q, k, v)
            launch_rows(work, "forward", out, lse, None, source=source, resume=source == "shard")

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
        if not self._reads(source):
            return
        dout, lse = dout if dout.stride(-1) == 1 else dout.contiguous(), lse.contiguous()
        work = self._work(source, q, k, v)
        delta = self._delta(dout, out, lse)
        launch_rows(work, "dq", dq, lse, None, dout, delta, source=source, resume=True)
        if source == "window":
            window = [x.new_empty(x.shape) for x in (dk, dv)]
            launch_window_columns(work, dout, lse, delta, *window)
            for grad, part in zip((dk, dv), window):
                grad += part
        else:
            parts = launch_shard_columns(work, dout, lse, delta)
            for grad, of_heads in zip((dk, dv), (part.split(work.seen, 2) for part in parts)):
                for (start, _), part in zip(self.shards, of_heads):
                    grad[:, start : start + part.shape[2]] += part.sum(0)

    def _delta(self, dout: Tensor, out: Tensor, lse: Tensor) -> Tensor:
        """What softmax backward takes from dP: for both sources the same."""
        if "delta" not in self._kept:
            self._kept["delta"] = torch.empty_like(lse)
            launch_delta(dout, out, None, self._kept["delta"])
        return self._kept["delta"]

    def _reads(self, source: str) -> bool:
        return source == "window" or any(start < stop for start, stop in self.shards)

    def _work(self, source: str, q: Tensor, k: Tensor, v: Tensor) -> KernelArgs:
        require_supported(q, v)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        shard = {}
        if source == "shard":
            # The kernels ask the window for the number of KV heads, and read none of it.
            k, v = (x[:, :, None] for x in (k, v))
            shard = {"k_shard": k, "v_shard": v, "places": tuple(start for start, _ in self.shards)}
            heads = self.pattern.num_kv_heads
            k, v = (x[:, :0].expand(-1, -1, heads, -1) for x in (k, v))
        head_dim = max(q.shape[-1], v.shape[-1])
        tuning = tuning_for(capability_of(q.device), head_dim, q.element_size(), passes=True)
        return KernelArgs(
            q, k, v, shape_of(self.pattern), self.scale, [], self.q_start, tuning,
            **shard, k_start=self.keys_start,
        )  # fmt: skip
