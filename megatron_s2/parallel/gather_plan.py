"""The index plan of the gather schedule: what each context-parallel rank sends, receives and computes.

Queries stay on their rank. A rank lacks the rest of every head's shard, 1/vert_stride of the past, which one
all-gather brings to all ranks, and the halos: the keys of the window that lie before its two chunks.

Positions are cut into units of `unit` tokens, the largest length that divides blocks, chunks and documents.
All indices count units unless they are said to count tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from megatron_s2.parallel.layout import Zigzag
from megatron_s2.pattern import S2Pattern

Range = tuple[int, int]  # (start, stop)
Documents = tuple[Range, ...]  # tokens of each document in the sequence


@dataclass(frozen=True)
class QuerySlice:
    """The queries of one document in one chunk, and the keys of their window. All fields count tokens.

    Args:
        document: index of the document.
        chunk: 0 or 1, which of the rank's two chunks.
        start, stop: range of the queries among the tokens of the rank.
        q_start: position of the first query in the document.
        keys: range of the window's keys among the keys of the chunk with its halo before them.
        keys_start: position of the first of these keys in the document.
    """

    document: int
    chunk: int
    start: int
    stop: int
    q_start: int
    keys: Range
    keys_start: int

    @property
    def q_stop(self) -> int:
        """Position after the last query in the document."""
        return self.q_start + self.stop - self.start


@dataclass(frozen=True, eq=False)
class GatherPlan:
    """The plan of one rank for one sequence.

    Args:
        rank: context-parallel rank.
        zigzag: layout of the sequence over the ranks.
        unit: tokens per unit.
        slices: the queries that the rank computes.
        shards: `[documents][kv_heads]`, range of each shard in the gathered shards, in tokens.
        width: units that every rank contributes to the all-gather; a rank that owns fewer pads.
        pack_units, pack_heads: `[owned]`, unit and KV head of each of the rank's keys that it contributes.
        unpack: `[gathered]`, index of each unit of the gathered shards in the result of the all-gather
            (`ranks * width` units).
        halo: units in the halo of each chunk.
        send_units: units of the rank that are halo of any rank (itself included), ordered by destination.
        send_parts: `[2 * ranks]`, number of them for each chunk of each destination. The two halos of one
            rank may hold the same unit.
        recv_counts: `[ranks]`, halo units received from each rank.
        halo_unpack: index of each unit of the two halos among the received units.
    """

    rank: int
    zigzag: Zigzag
    unit: int
    slices: tuple[QuerySlice, ...]
    shards: tuple[tuple[Range, ...], ...]
    width: int
    pack_units: np.ndarray
    pack_heads: np.ndarray
    unpack: np.ndarray
    halo: tuple[int, int]
    send_units: np.ndarray
    send_parts: tuple[int, ...]
    recv_counts: tuple[int, ...]
    halo_unpack: np.ndarray

    @property
    def send_counts(self) -> tuple[int, ...]:
        """`[ranks]`, halo units sent to each rank."""
        return tuple(a + b for a, b in zip(self.send_parts[::2], self.send_parts[1::2]))

    def __str__(self) -> str:
        others = [p for p in range(self.zigzag.ranks) if p != self.rank]
        halos = ", ".join(
            f"{self.recv_counts[p] * self.unit} from {p}" for p in others if self.recv_counts[p]
        )
        chunks = " and ".join(f"{a}..{b - 1}" for a, b in self.zigzag.chunks(self.rank))
        return (
            f"rank {self.rank} of {self.zigzag.ranks} holds tokens {chunks}; contributes "
            f"{len(self.pack_units) * self.unit} of the {len(self.unpack) * self.unit} keys of all shards; "
            f"halo tokens: {halos or 'none'}"
        )


@lru_cache(maxsize=64)
def plan_gather(pattern: S2Pattern, zigzag: Zigzag, rank: int, documents: Documents) -> GatherPlan:
    """Returns the plan of one rank for one sequence.

    Args:
        pattern: pattern of the KV heads that the ranks hold.
        zigzag: layout of the sequence over the ranks.
        rank: context-parallel rank.
        documents: documents of the sequence, contiguous from 0 to `zigzag.tokens`, none empty.
    """
    unit = math.gcd(pattern.block_size, zigzag.chunk, *(edge for document in documents for edge in document))
    shards, units, heads = _shards(pattern, documents, unit)
    owner = zigzag.owner(units * unit)
    owned = owner == rank
    counts = np.bincount(owner, minlength=zigzag.ranks)
    width = int(counts.max(initial=0))
    # Index of each unit among its owner's: its index in the stable sort by owner, minus the owner's first.
    order = np.argsort(owner, kind="stable")
    index = np.empty_like(order)
    index[order] = np.arange(len(order)) - (np.cumsum(counts) - counts)[owner[order]]

    halos = [_halo_units(pattern, zigzag, p, documents, unit) for p in range(zigzag.ranks)]
    requested = [halo[zigzag.owner(halo * unit) == rank] for both in halos for halo in both]
    sends = [zigzag.local(units * unit) // unit for units in requested]
    sources = zigzag.owner(np.concatenate(halos[rank]) * unit)
    halo_unpack = np.empty(len(sources), dtype=np.int64)
    halo_unpack[np.argsort(sources, kind="stable")] = np.arange(len(sources))
    halo = tuple(len(h) for h in halos[rank])
    return GatherPlan(
        rank=rank,
        zigzag=zigzag,
        unit=unit,
        slices=_slices(pattern, zigzag, rank, documents, [h * unit for h in halo]),
        shards=shards,
        width=width,
        pack_units=zigzag.local(units[owned] * unit) // unit,
        pack_heads=heads[owned],
        unpack=owner * width + index,
        halo=halo,
        send_units=np.concatenate(sends),
        send_parts=tuple(map(len, sends)),
        recv_counts=tuple(np.bincount(sources, minlength=zigzag.ranks).tolist()),
        halo_unpack=halo_unpack,
    )


def _shards(pattern: S2Pattern, documents: Documents, unit: int):
    """The range of every shard in tokens, and position and head of every unit in them.

    Ordered by document and then by head, so that the shards of neighbouring equal heads are adjacent.
    """
    B = pattern.block_size
    ranges: list[list[Range]] = [[] for _ in documents]
    units, heads, total = [], [], 0
    for of_document, (start, stop) in zip(ranges, documents):
        for g in range(pattern.num_kv_heads):
            size = pattern.shard_prefix(g, (stop - start - 1) // B)
            blocks = _shard_blocks(pattern, g, size)
            starts = (start + blocks * B) // unit
            units.append((starts[:, None] + np.arange(B // unit)).ravel())
            heads.append(np.full(len(units[-1]), g))
            of_document.append((total, total + size * B))
            total += size * B
    return tuple(map(tuple, ranges)), np.concatenate(units), np.concatenate(heads)


def _shard_blocks(pattern: S2Pattern, head: int, size: int) -> np.ndarray:
    """`pattern.shard_block(head, n)` for n = 0 .. size-1."""
    n = np.arange(size)
    strided = pattern.first_strided(head) + (n - pattern.sink_blocks) * pattern.strides[head]
    return np.where(n < pattern.sink_blocks, n, strided)


def _halo_units(
    pattern: S2Pattern, zigzag: Zigzag, rank: int, documents: Documents, unit: int
) -> list[np.ndarray]:
    """For each chunk of a rank, the units before it that the windows of its first document reach."""
    halos = []
    for first, stop in zigzag.chunks(rank):
        start = max((a for a, _ in documents if a <= first), default=0) if stop > first else first
        halos.append(np.arange(start + pattern.window_start(first - start), first, unit) // unit)
    return halos


def _slices(
    pattern: S2Pattern, zigzag: Zigzag, rank: int, documents: Documents, halo: Sequence[int]
) -> tuple[QuerySlice, ...]:
    slices = []
    for chunk, (first, last) in enumerate(zigzag.chunks(rank)):
        to_local, to_keys = chunk * zigzag.chunk - first, halo[chunk] - first
        for index, (start, stop) in enumerate(documents):
            a, b = max(start, first), min(stop, last)
            if a < b:
                keys_start = pattern.window_start(a - start)
                keys = (start + keys_start + to_keys, b + to_keys)
                slices.append(
                    QuerySlice(index, chunk, a + to_local, b + to_local, a - start, keys, keys_start)
                )
    return tuple(slices)
