"""Attention of a sequence slice by the Triton kernels."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from megatron_s2.kernels.slice import SequenceSlice
from megatron_s2.kernels.triton_args import KernelArgs
from megatron_s2.kernels.triton_dkv import launch_dkv_shard, launch_dkv_window
from megatron_s2.kernels.triton_dq import launch_delta, launch_dq
from megatron_s2.kernels.triton_forward import launch_forward
from megatron_s2.kernels.triton_pattern import KernelPattern
from megatron_s2.kernels.triton_support import capability_of, require_supported
from megatron_s2.kernels.tuning import tuning_for


@dataclass(frozen=True)
class TritonSlice(SequenceSlice):
    """`SequenceSlice` in Triton; float16, bfloat16 and float32.

    Raises:
        ValueError: the kernels do not support the device, the dtype or a head_dim.
    """

    _cache: dict[str, tuple[Tensor, Tensor]] = field(
        default_factory=dict, init=False, compare=False, repr=False
    )

    def forward(self, source: str, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor) -> None:
        if self._has_keys(source):
            args = self._kernel_args(source, q, k, v)
            launch_forward(args, out, lse, source=source, resume=source == "shard")

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
        if not self._has_keys(source):
            return
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        args = self._kernel_args(source, q, k, v)
        lse2, delta = self._row_sums(dout, out, lse)
        launch_dq(args, dout, lse2, delta, dq, source=source, resume=True)
        if source == "window":
            window = [x.new_empty(x.shape) for x in (dk, dv)]
            launch_dkv_window(args, dout, lse2, delta, *window)
            for grad, part in zip((dk, dv), window):
                grad += part
        else:
            for grad, parts in zip((dk, dv), launch_dkv_shard(args, dout, lse2, delta)):
                for (start, _), part in zip(
                    self.shards, parts[:, :, :, 0].split(args.layout.shard_tokens, 2)
                ):
                    for split in part:  # one by one: their sum would take memory
                        grad[:, start : start + split.shape[1]] += split

    def _row_sums(self, dout: Tensor, out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        """lse in base 2 and delta of both sources, computed once: they depend on the merged results."""
        if "row sums" not in self._cache:
            lse2, delta = (lse.new_empty(lse.shape) for _ in range(2))
            launch_delta(dout, out, lse, delta, lse2)
            self._cache["row sums"] = lse2, delta
        return self._cache["row sums"]

    def _has_keys(self, source: str) -> bool:
        return source == "window" or any(start < stop for start, stop in self.shards)

    def _kernel_args(self, source: str, q: Tensor, k: Tensor, v: Tensor) -> KernelArgs:
        require_supported(q, v)
        q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
        shard = {}
        if source == "shard":
            # An empty window tells the launches the number of KV heads.
            k, v = (x[:, :, None] for x in (k, v))
            shard = {"k_shard": k, "v_shard": v, "shard_starts": tuple(start for start, _ in self.shards)}
            k, v = (x[:, :0].expand(-1, -1, self.pattern.num_kv_heads, -1) for x in (k, v))
        head_dim = max(q.shape[-1], v.shape[-1])
        tuning = tuning_for(capability_of(q.device), head_dim, q.element_size(), passes=True)
        return KernelArgs(
            q, k, v, KernelPattern.of(self.pattern), self.scale, q_start=self.q_start, tuning=tuning,
            **shard, keys_start=self.keys_start,
        )  # fmt: skip
