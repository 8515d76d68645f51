"""Where the caches of all layers store the next token of each sequence: one copy to the device per step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from megatron_s2.kernels.host_integers import copy_to_device


@dataclass(frozen=True)
class DecodeStep:
    """Where one cache stores one token of each of some sequences.

    Args:
        rows: the sequences that get a token.
        lengths: number of tokens of every sequence before.
        stored: number of entries that the storages have of every sequence and KV head afterwards; zeros for
            the other sequences.
        read: number of these, from the first on, that attention reads.
        row_index: `rows`, int64 `[rows]` on the device of the cache.
        slots: index of the new entry in each KV head, int64 `[rows, kv_heads]` on that device.
        read_table: `read`, int32 `[batch, kv_heads]`, contiguous, on that device.
    """

    rows: list[int]
    lengths: list[int]
    stored: list[list[int]]
    read: list[list[int]]
    row_index: Tensor
    slots: Tensor
    read_table: Tensor


class PlannedCache(Protocol):
    """What a step is planned for: a `KVCache`, whose attributes these are."""

    device: torch.device
    heads: int
    lengths: list[int]
    planned: DecodeStep | None

    def step_counts(self, rows: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]: ...


def plan_step(
    caches: Sequence[PlannedCache], rows: Sequence[int], *tables: Sequence[Sequence[int]]
) -> list[Tensor]:
    """Plans the next `write` of one token of each of `rows` into every cache.

    The numbers of all caches, and `tables`, travel in one pinned buffer per device and number of heads, for
    which the host does not wait.

    Args:
        caches: caches of the layers of one model, of the same sequences.
        tables: further numbers that the step needs on the device of the first cache, such as tokens.

    Returns:
        The tables, int64, in the shape in which they were given.
    """
    alike: dict[tuple[torch.device, int], list[PlannedCache]] = {}
    for cache in caches:
        alike.setdefault((cache.device, cache.heads), []).append(cache)
    first, *others = alike.values()
    for group in others:
        _plan(group, rows, ())
    return _plan(first, rows, tables)


def _plan(
    caches: Sequence[PlannedCache], rows: Sequence[int], tables: Sequence[Sequence[Sequence[int]]]
) -> list[Tensor]:
    counts = [cache.step_counts(rows) for cache in caches]
    slots = [[entries - 1 for entries in stored[row]] for stored, _ in counts for row in rows]
    [row_index], slot_table, read_table, *copies = copy_to_device(
        caches[0].device, [rows], slots, [row for _, read in counts for row in read], *tables
    )
    slot_tables, read_tables = (
        table.unflatten(0, (len(caches), -1)) for table in (slot_table, read_table.int())
    )
    for n, cache in enumerate(caches):
        cache.planned = DecodeStep(
            list(rows), list(cache.lengths), *counts[n], row_index, slot_tables[n], read_tables[n]
        )
    return copies
