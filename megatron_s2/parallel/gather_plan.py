"""The index plan of the gather schedule: what each context-parallel rank sends, receives and computes.

Queries stay on their rank. A rank lacks the rest of every head's shard, 1/vert_stride of the past, which
all-gathers bring to all ranks, one for each group of KV heads, and the halos: the keys of the window that lie
before its two chunks. The shard of a window-only head is its sinks; without sinks nothing of it is gathered.

Positions are cut into units of `unit` tokens, the largest length that divides blocks, chunks and documents.
All indices count units unless they are said to count tokens. With packed documents a unit is mostly one
token, so indices are kept as runs of consecutive ones: their number grows with the blocks of the shards, not
with the tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from megatron_s2.parallel.layout import Zigzag
from megatron_s2.pattern import S2Pattern
from megatron_s2.pattern.pair_counts import shard_sizes

Range = tuple[int, int]  # (start, stop)
Documents = tuple[Range, ...]  # tokens of each document in the sequence

# Keys whose gradients, at head_dim 128 in bf16, take 2 GiB: a dense layer of 8 KV heads and 128K tokens is
# one group, and one of a million tokens has a group for each head.
GROUP_TOKENS = 1 << 20


class Runs(NamedTuple):
    """Indices as runs of consecutive ones, one after another: `starts` and `lengths`, `[runs]`."""

    starts: np.ndarray
    lengths: np.ndarray

    @property
    def size(self) -> int:
        """Number of indices."""
        return int(self.lengths.sum())

    def indices(self) -> np.ndarray:
        """Returns the indices one by one."""
        return np.repeat(self.starts - _exclusive_sum(self.lengths), self.lengths) + np.arange(self.size)


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
class HeadGroup:
    """The shards of consecutive KV heads, which one collective moves.

    Args:
        heads: range of the KV heads.
        pattern: pattern of these heads.
        edges: `[documents, heads + 1]`, where each shard begins and the last one ends in the gathered shards
            of the group, in tokens. The shards of a document lie one after another.
        width: units that every rank contributes to the all-gather; a rank that owns fewer pads.
        pack: units of the rank that it contributes.
        pack_heads: `[runs]`, index in the group of the KV head of each run of `pack`.
        unpack: index of each unit of the gathered shards in the result of the all-gather (`ranks * width`
            units).
    """

    heads: Range
    pattern: S2Pattern
    edges: np.ndarray
    width: int
    pack: Runs
    pack_heads: np.ndarray
    unpack: Runs

    def shards(self, document: int) -> list[Range]:
        """Range of each KV head's shard of a document in the gathered shards of the group, in tokens."""
        edges = self.edges[document].tolist()
        return list(pairwise(edges))


@dataclass(frozen=True, eq=False)
class GatherPlan:
    """The plan of one rank for one sequence.

    Args:
        rank: context-parallel rank.
        zigzag: layout of the sequence over the ranks.
        unit: tokens per unit.
        slices: the queries that the rank computes.
        groups: the shards of all KV heads, in groups of consecutive heads.
        halo: units in the halo of each chunk.
        send: units of the rank that are halo of any rank (itself included), ordered by destination.
        send_parts: `[2 * ranks]`, number of them for each chunk of each destination. The two halos of one
            rank may hold the same unit.
        recv_counts: `[ranks]`, halo units received from each rank.
        halo_unpack: index of each unit of the two halos among the received units.
    """

    rank: int
    zigzag: Zigzag
    unit: int
    slices: tuple[QuerySlice, ...]
    groups: tuple[HeadGroup, ...]
    halo: Range
    send: Runs
    send_parts: tuple[int, ...]
    recv_counts: tuple[int, ...]
    halo_unpack: Runs

    @property
    def send_counts(self) -> tuple[int, ...]:
        """`[ranks]`, halo units sent to each rank."""
        return tuple(a + b for a, b in zip(self.send_parts[::2], self.send_parts[1::2]))

    @property
    def width(self) -> int:
        """Units that every rank contributes to the all-gathers of all groups."""
        return sum(group.width for group in self.groups)

    def __str__(self) -> str:
        others = [p for p in range(self.zigzag.ranks) if p != self.rank]
        halos = ", ".join(
            f"{self.recv_counts[p] * self.unit} from {p}" for p in others if self.recv_counts[p]
        )
        chunks = " and ".join(f"{a}..{b - 1}" for a, b in self.zigzag.chunks(self.rank))
        owned, gathered = (
            sum(runs.size for runs in of_groups)
            for of_groups in zip(*((group.pack, group.unpack) for group in self.groups))
        )
        return (
            f"rank {self.rank} of {self.zigzag.ranks} holds tokens {chunks}; contributes "
            f"{owned * self.unit} of the {gathered * self.unit} keys of all shards; "
            f"halo tokens: {halos or 'none'}"
        )


def head_groups(pattern: S2Pattern, tokens: int, most: int = GROUP_TOKENS) -> tuple[Range, ...]:
    """Splits the KV heads into ranges whose shards are gathered, and their gradients returned, at a time.

    A rank stores the gradients of one range at a time, so the ranges bound the memory of the backward. Each
    is one collective, so there are as few as possible.

    Args:
        pattern: pattern of the KV heads.
        tokens: tokens of the sequence, taken as one document.
        most: tokens that the shards of a range have together; more only in a range of one head.
    """
    edges, total = [0], 0
    for g in range(pattern.num_kv_heads):
        size = pattern.shard_prefix(g, pattern.num_blocks(tokens) - 1) * pattern.block_size
        if g > edges[-1] and total + size > most:
            edges.append(g)
            total = 0
        total += size
    return tuple(pairwise([*edges, pattern.num_kv_heads]))


@lru_cache(maxsize=64)
def plan_gather(
    pattern: S2Pattern, zigzag: Zigzag, rank: int, documents: Documents, group_tokens: int = GROUP_TOKENS
) -> GatherPlan:
    """Returns the plan of one rank for one sequence.

    Args:
        pattern: pattern of the KV heads that the ranks hold.
        zigzag: layout of the sequence over the ranks.
        rank: context-parallel rank.
        documents: documents of the sequence, contiguous from 0 to `zigzag.tokens`, none empty.
        group_tokens: shard tokens that are gathered at a time (`head_groups`).
    """
    starts, stops = np.array(documents).T
    unit = int(np.gcd.reduce([pattern.block_size, zigzag.chunk, zigzag.tokens, *starts]))
    groups = tuple(
        _plan_group(pattern, zigzag, rank, starts, stops, unit, heads)
        for heads in head_groups(pattern, zigzag.tokens, group_tokens)
    )

    # The halos of all chunks, by the rank that receives them.
    ranks = np.arange(zigzag.ranks)
    chunks = np.stack([ranks, 2 * zigzag.ranks - 1 - ranks], 1).ravel()
    halo_starts = _halo_starts(pattern, zigzag, starts, chunks)
    halo_lengths = chunks * zigzag.chunk - halo_starts
    positions, lengths, halos = _split_at_chunks(zigzag, halo_starts, halo_lengths)
    owners, lengths = zigzag.owner(positions), lengths // unit
    sent, received = owners == rank, halos // 2 == rank
    recv_counts, index = _index_within(owners[received], lengths[received], zigzag.ranks)
    first = _exclusive_sum(recv_counts)[owners[received]]
    halo = halo_lengths[2 * rank : 2 * rank + 2] // unit
    return GatherPlan(
        rank=rank,
        zigzag=zigzag,
        unit=unit,
        slices=_slices(pattern, zigzag, rank, starts, stops, (halo * unit).tolist()),
        groups=groups,
        halo=tuple(halo.tolist()),
        send=Runs(zigzag.local(positions[sent]) // unit, lengths[sent]),
        send_parts=tuple(_sums(halos[sent], lengths[sent], 2 * zigzag.ranks).tolist()),
        recv_counts=tuple(recv_counts.tolist()),
        halo_unpack=Runs(first + index, lengths[received]),
    )


def _plan_group(
    pattern: S2Pattern,
    zigzag: Zigzag,
    rank: int,
    starts: np.ndarray,
    stops: np.ndarray,
    unit: int,
    heads: Range,
) -> HeadGroup:
    """Plans the shards of some KV heads, ordered by document and then by head, so that the shards of
    neighbouring equal heads are adjacent."""
    B, pattern = pattern.block_size, pattern.slice_heads(*heads)
    rows = (stops - starts - 1) // B  # the last block of each document
    sizes = shard_sizes(pattern, rows - pattern.local_blocks + 1).T  # [documents, heads], blocks
    ends = np.cumsum(sizes).reshape(sizes.shape) * B
    document, head = (x.ravel() for x in np.indices(sizes.shape))
    shard = np.repeat(np.arange(sizes.size), sizes.ravel())  # of each block
    n = Runs(np.zeros_like(document), sizes.ravel()).indices()
    blocks = _shard_blocks(pattern, head[shard], n)
    positions, lengths, block = _split_at_chunks(
        zigzag, starts[document[shard]] + blocks * B, np.full_like(blocks, B)
    )

    owners, lengths = zigzag.owner(positions), lengths // unit
    counts, index = _index_within(owners, lengths, zigzag.ranks)
    width, owned = int(counts.max()), owners == rank
    return HeadGroup(
        heads=heads,
        pattern=pattern,
        edges=np.concatenate([ends[:, :1] - sizes[:, :1] * B, ends], 1),
        width=width,
        pack=Runs(zigzag.local(positions[owned]) // unit, lengths[owned]),
        pack_heads=head[shard[block[owned]]],
        unpack=Runs(owners * width + index, lengths),
    )


def _shard_blocks(pattern: S2Pattern, heads: np.ndarray, n: np.ndarray) -> np.ndarray:
    """`pattern.shard_block(head, n)` for each head and n."""
    firsts = np.array([pattern.first_strided(g) for g in range(pattern.num_kv_heads)])
    strided = firsts[heads] + (n - pattern.sink_blocks) * np.array(pattern.steps)[heads]
    return np.where(n < pattern.sink_blocks, n, strided)


def _halo_starts(pattern: S2Pattern, zigzag: Zigzag, starts: np.ndarray, chunks: np.ndarray) -> np.ndarray:
    """The positions at which the windows of the first queries of chunks begin, inside their documents."""
    first = chunks * zigzag.chunk
    document = starts[np.searchsorted(starts, first, side="right") - 1]
    blocks = (first - document) // pattern.block_size - pattern.local_blocks + 1
    return document + np.maximum(blocks, 0) * pattern.block_size


def _split_at_chunks(
    zigzag: Zigzag, starts: np.ndarray, lengths: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits ranges of positions where a chunk begins: start and length of each part, and its range."""
    chunk = max(zigzag.chunk, 1)
    first = starts // chunk
    parts = np.where(lengths > 0, (starts + lengths - 1) // chunk - first + 1, 0)
    of_range = np.repeat(np.arange(len(starts)), parts)
    chunks = Runs(first, parts).indices()
    start = np.maximum(starts[of_range], chunks * chunk)
    stop = np.minimum((starts + lengths)[of_range], (chunks + 1) * chunk)
    return start, stop - start, of_range


def _index_within(owners: np.ndarray, lengths: np.ndarray, ranks: int) -> tuple[np.ndarray, np.ndarray]:
    """Number of units that each rank owns, and index of each run's first unit among those of its owner."""
    counts = _sums(owners, lengths, ranks)
    order = np.argsort(owners, kind="stable")
    index = np.empty_like(lengths)
    index[order] = _exclusive_sum(lengths[order]) - _exclusive_sum(counts)[owners[order]]
    return counts, index


def _sums(of: np.ndarray, lengths: np.ndarray, size: int) -> np.ndarray:
    """`[size]`, the sum of the lengths of each value of `of`."""
    return np.bincount(of, weights=lengths, minlength=size).astype(np.int64)


def _exclusive_sum(values: np.ndarray) -> np.ndarray:
    """The sum of the values before each value."""
    return np.cumsum(values) - values


def _slices(
    pattern: S2Pattern, zigzag: Zigzag, rank: int, starts: np.ndarray, stops: np.ndarray, halo: list[int]
) -> tuple[QuerySlice, ...]:
    slices = []
    for chunk, (first, last) in enumerate(zigzag.chunks(rank)):
        to_local, to_keys = chunk * zigzag.chunk - first, halo[chunk] - first
        begin = int(np.searchsorted(stops, first, side="right"))
        end = int(np.searchsorted(starts, last, side="left"))
        for index, start, stop in zip(
            range(begin, end), starts[begin:end].tolist(), stops[begin:end].tolist()
        ):
            a, b = max(start, first), min(stop, last)
            keys_start = pattern.window_start(a - start)
            keys = (start + keys_start + to_keys, b + to_keys)
            slices.append(QuerySlice(index, chunk, a + to_local, b + to_local, a - start, keys, keys_start))
    return tuple(slices)
