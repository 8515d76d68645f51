"""The exchange of the gather schedule: packs, sends, unpacks and returns shards and halos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from megatron_s2.parallel.collectives import ContextParallelGroup, Pending
from megatron_s2.parallel.gather_plan import GatherPlan

KeysValues = Sequence[Tensor]  # keys and values of a chunk, or their gradients


@dataclass(frozen=True)
class _Indices:
    """The index arrays of a `GatherPlan` as tensors on the device."""

    pack_units: Tensor
    pack_heads: Tensor
    unpack: Tensor
    send_units: Tensor
    halo_unpack: Tensor


@lru_cache(maxsize=64)
def _indices(plan: GatherPlan, device: torch.device) -> _Indices:
    # As many as `plan_gather` caches: plans of packed documents do not recur, and a backward keeps its own.
    names = [field.name for field in fields(_Indices)]
    return _Indices(*(torch.as_tensor(getattr(plan, name), device=device) for name in names))


class ShardExchange:
    """Moves the keys and values of one attention call, and their gradients, between the ranks.

    Keys and values travel side by side, `head_dim + v_head_dim` elements per token and KV head. A message
    has one row per unit: `[units, batch, tokens of a unit, …]`.

    Args:
        group: context-parallel group of the layer.
        plan: index plan of this rank.
        device: device of the tensors.
    """

    def __init__(self, group: ContextParallelGroup, plan: GatherPlan, device: torch.device) -> None:
        self.plan = plan
        self._group = group
        self._indices = _indices(plan, device)

    # Halos: all KV heads of some tokens.

    def start_halo(self, k: Tensor, v: Tensor) -> Pending:
        """Starts to group the halos of `k` and `v` `[batch, local_tokens, kv_heads, …]`."""
        units = self._indices.send_units
        rows = [self._by_unit(x).transpose(0, 1)[units] for x in (k, v)]
        return self._group.all_to_all(torch.cat(rows, -1), self.plan.send_counts, self.plan.recv_counts)

    def unpack_halo(self, received: Tensor) -> Tensor:
        """Returns the halos of both chunks `[batch, tokens, kv_heads, head_dim + v_head_dim]`."""
        return received[self._indices.halo_unpack].transpose(0, 1).flatten(1, 2)

    def windows(self, k: Tensor, v: Tensor, halo: Tensor) -> list[KeysValues]:
        """Returns keys and values of each chunk with its halo before them."""
        halos = halo.split(self._halo_tokens(), 1)
        chunks = zip(*(x.chunk(2, 1) for x in (k, v)))
        return [
            [torch.cat(pair, 1) for pair in zip(h.split([k.shape[-1], v.shape[-1]], -1), kv)]
            for h, kv in zip(halos, chunks)
        ]

    def without_halos(self, windows: Sequence[KeysValues]) -> list[KeysValues]:
        """Returns the part of each window that belongs to its chunk."""
        return [[x[:, tokens:] for x in kv] for tokens, kv in zip(self._halo_tokens(), windows)]

    def start_halo_return(self, dwindows: Sequence[KeysValues], dtype: torch.dtype) -> Pending:
        """Starts to send the gradients of the halos to the ranks that own them, in `dtype`."""
        halos = [
            torch.cat([x[:, :tokens] for x in dkv], -1) for tokens, dkv in zip(self._halo_tokens(), dwindows)
        ]
        rows = self._by_unit(torch.cat(halos, 1)).transpose(0, 1).to(dtype)
        packed = torch.empty_like(rows, memory_format=torch.contiguous_format)
        packed[self._indices.halo_unpack] = rows
        return self._group.all_to_all(packed, self.plan.recv_counts, self.plan.send_counts)

    def add_halo(self, returned: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Adds the halo gradients that other ranks returned to `dk` and `dv`, in the order of the ranks."""
        dims = [dk.shape[-1], dv.shape[-1]]
        parts = (x.split(self.plan.send_parts) for x in (returned, self._indices.send_units))
        for rows, units in zip(*parts):
            for grad, part in zip((dk, dv), rows.split(dims, -1)):
                self._by_unit(grad)[:, units] += part.transpose(0, 1)

    # Shards: one KV head of some tokens.

    def start_gather(self, k: Tensor, v: Tensor) -> Pending:
        """Starts to gather the shards of all heads from `k` and `v` `[batch, local_tokens, kv_heads, …]`."""
        units, heads = self._indices.pack_units, self._indices.pack_heads
        rows = torch.cat([self._by_unit(x)[:, units, :, heads] for x in (k, v)], -1)
        padding = self.plan.width - len(rows)
        return self._group.all_gather(torch.nn.functional.pad(rows, (0, 0) * 3 + (0, padding)))

    def unpack_shard(self, gathered: Tensor) -> Tensor:
        """Returns the shards of all heads, one after another, `[batch, tokens, head_dim + v_head_dim]`."""
        return gathered[self._indices.unpack].transpose(0, 1).flatten(1, 2)

    def start_shard_return(self, dshard: Tensor) -> Pending:
        """Starts to send the gradients of the shards to the ranks that own them.

        With the sum in `add_shard` this is a reduce-scatter that rounds once and adds in a fixed order.
        """
        rows = self._by_unit(dshard).transpose(0, 1)
        width, ranks = self.plan.width, self._group.ranks
        padded = rows.new_zeros(ranks * width, *rows.shape[1:])
        padded[self._indices.unpack] = rows
        return self._group.all_to_all(padded, [width] * ranks, [width] * ranks)

    def add_shard(self, returned: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Adds the shard gradients that all ranks returned to `dk` and `dv`."""
        units, heads = self._indices.pack_units, self._indices.pack_heads
        total = returned.unflatten(0, (self._group.ranks, -1))[:, : len(units)].sum(0, dtype=dk.dtype)
        for grad, part in zip((dk, dv), total.split([dk.shape[-1], dv.shape[-1]], -1)):
            self._by_unit(grad)[:, units, :, heads] += part

    def _by_unit(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.plan.unit))

    def _halo_tokens(self) -> list[int]:
        return [units * self.plan.unit for units in self.plan.halo]
