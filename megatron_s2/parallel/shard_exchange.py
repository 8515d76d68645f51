"""The exchange of the gather schedule: packs, sends, unpacks and returns shards and halos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from megatron_s2.kernels.host_integers import copy_to_device
from megatron_s2.parallel.collectives import ContextParallelGroup, Pending
from megatron_s2.parallel.gather_plan import GatherPlan

KeysValues = Sequence[Tensor]  # keys and values of a chunk, or their gradients


@dataclass(frozen=True)
class _Indices:
    """The indices of a `GatherPlan`, one by one, on the device; those of shards for each group of heads.

    `pack_heads` has the KV head of each of `pack_units`, counted from the first head of all groups.
    """

    send_units: Tensor
    halo_unpack: Tensor
    pack_units: Sequence[Tensor]
    unpack: Sequence[Tensor]
    pack_heads: Sequence[Tensor]


@lru_cache(maxsize=64)
def _indices(plan: GatherPlan, device: torch.device) -> _Indices:
    # As many as `plan_gather` caches: plans of packed documents do not recur, and a backward keeps its own.
    groups = plan.groups
    packs, unpacks = [group.pack for group in groups], [group.unpack for group in groups]
    all_runs = [plan.send, plan.halo_unpack, *packs, *unpacks]
    copies = copy_to_device(
        device,
        *(array for runs in all_runs for array in runs),
        *(group.heads[0] + group.pack_heads for group in groups),
    )
    starts, lengths, heads = (
        *(copies[i : 2 * len(all_runs) : 2] for i in (0, 1)),
        copies[2 * len(all_runs) :],
    )
    send, halo, *shards = (_expand(*runs) for runs in zip(starts, lengths, [r.size for r in all_runs]))
    heads = [x.repeat_interleave(n, output_size=runs.size) for x, n, runs in zip(heads, lengths[2:], packs)]
    return _Indices(send, halo, shards[: len(groups)], shards[len(groups) :], heads)


def _expand(starts: Tensor, lengths: Tensor, size: int) -> Tensor:
    """`Runs.indices` on the device. `size` is known to the host, which therefore does not wait."""
    offsets = starts - (lengths.cumsum(0) - lengths)
    return offsets.repeat_interleave(lengths, output_size=size) + torch.arange(size, device=starts.device)


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

    # Shards: one KV head of some tokens. `group` is the index of a group of heads.

    def start_gather(self, group: int, k: Tensor, v: Tensor) -> Pending:
        """Starts to gather the shards of a group from `k` and `v` `[batch, local_tokens, kv_heads, …]`."""
        units, heads = self._indices.pack_units[group], self._indices.pack_heads[group]
        rows = torch.cat([self._by_unit(x)[:, units, :, heads] for x in (k, v)], -1)
        padding = self.plan.groups[group].width - len(rows)
        return self._group.all_gather(torch.nn.functional.pad(rows, (0, 0) * 3 + (0, padding)))

    def unpack_shard(self, group: int, gathered: Tensor) -> Tensor:
        """Returns the shards of a group, one after another, `[batch, tokens, head_dim + v_head_dim]`."""
        return gathered[self._indices.unpack[group]].transpose(0, 1).flatten(1, 2)

    def pack_shard_gradients(self, group: int, dshard: Tensor, dtype: torch.dtype) -> Tensor:
        """Returns the gradients of `unpack_shard` ordered by the ranks that own them, in `dtype`."""
        rows = self._by_unit(dshard).transpose(0, 1).to(dtype)
        packed = rows.new_zeros(self._group.ranks * self.plan.groups[group].width, *rows.shape[1:])
        packed[self._indices.unpack[group]] = rows
        return packed

    def start_shard_return(self, group: int, packed: Tensor) -> Pending:
        """Starts to send the gradients of the shards of a group to the ranks that own them.

        With `summed` this is a reduce-scatter that rounds once and adds in a fixed order.
        """
        width = self.plan.groups[group].width
        if not width:
            return self._group.nothing(packed)
        return self._group.all_to_all(packed, *[[width] * self._group.ranks] * 2)

    def summed(self, group: int, returned: Tensor, dtype: torch.dtype) -> Tensor:
        """Adds up the shard gradients that all ranks returned: `[owned units, batch, …]` in `dtype`."""
        owned = len(self._indices.pack_units[group])
        return returned.unflatten(0, (self._group.ranks, -1))[:, :owned].sum(0, dtype=dtype)

    def add_shard(self, group: int, total: Tensor, dk: Tensor, dv: Tensor) -> None:
        """Adds the result of `summed` to `dk` and `dv`."""
        units, heads = self._indices.pack_units[group], self._indices.pack_heads[group]
        for grad, part in zip((dk, dv), total.split([dk.shape[-1], dv.shape[-1]], -1)):
            self._by_unit(grad)[:, units, :, heads] += part

    def _by_unit(self, x: Tensor) -> Tensor:
        return x.unflatten(1, (-1, self.plan.unit))

    def _halo_tokens(self) -> list[int]:
        return [units * self.plan.unit for units in self.plan.halo]
