"""Head-shard assignment: what each context-parallel rank holds, sends, receives and computes, in integers.

Two schedules. In **gather** queries stay where they are. What a rank's queries lack is the rest of every
head's shard, 1/vert_stride of the past, which one all-gather brings to all ranks, and the halo: the keys of
the window that lie before its two chunks. In **a2a** heads move: each rank computes some KV groups over the
whole sequence.

Positions are cut into units of `unit` tokens, the largest length that divides blocks, chunks and documents;
every index below counts units.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from heapq import heappop, heappush

import numpy as np

from megatron_s2.parallel.layout import Zigzag
from megatron_s2.pattern import S2Pattern

Documents = tuple[tuple[int, int], ...]  # (start, stop) of each document in the sequence


@dataclass(frozen=True)
class Piece:
    """Queries of one document in one chunk, and where the keys of their window lie.

    Args:
        document: number of the document.
        chunk: 0 or 1, which of the rank's chunks.
        start, stop: the queries among the rank's tokens.
        q_start: position of the first of them in the document.
        keys: (start, stop) of the window's keys in the chunk's keys with the halo before them.
        keys_start: position of the first of these keys in the document.
    """

    document: int
    chunk: int
    start: int
    stop: int
    q_start: int
    keys: tuple[int, int]
    keys_start: int

    @property
    def q_stop(self) -> int:
        """Position after the last query in the document."""
        return self.q_start + self.stop - self.start


@dataclass(frozen=True)
class Shard:
    """Where the shard of one document and head lies in the gathered shards, in tokens: `stop` excluded."""

    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class GatherPlan:
    """What one rank does in the gather schedule, for one sequence.

    Args:
        rank, zigzag, unit: whose plan, over which layout, in units of how many tokens.
        pieces: the queries it computes.
        shards: `[documents][kv_heads]`, places in the gathered shards.
        width: units that every rank adds to the all-gather; a rank that owns fewer pads.
        pack_units, pack_heads: `[owned]`, the units of its own keys, and of which heads, that it adds.
        unpack: `[gathered]`, for each unit of the gathered shards its place in the all-gather's result
            (`ranks * width` units).
        halo: units of the halo of each chunk.
        send_units: its units that other ranks (and itself) need as halo, destination after destination.
        send_parts: `[2 * ranks]`, how many of them for each chunk of each destination. Both halos of one rank
            may hold the same unit.
        recv_counts: `[ranks]`, units from each rank.
        halo_unpack: for each unit of both halos its place among those received.
    """

    rank: int
    zigzag: Zigzag
    unit: int
    pieces: tuple[Piece, ...]
    shards: tuple[tuple[Shard, ...], ...]
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
        """`[ranks]`, units to each rank."""
        return tuple(a + b for a, b in zip(self.send_parts[::2], self.send_parts[1::2]))

    def __str__(self) -> str:
        others = [p for p in range(self.zigzag.ranks) if p != self.rank]
        halos = ", ".join(
            f"{self.recv_counts[p] * self.unit} from {p}" for p in others if self.recv_counts[p]
        )
        chunks = " and ".join(f"{a}..{b - 1}" for a, b in self.zigzag.chunks(self.rank))
        return (
            f"rank {self.rank} of {self.zigzag.ranks} holds tokens {chunks}; gives "
            f"{len(self.pack_units) * self.unit} and gets {len(self.unpack) * self.unit} keys of all shards; "
            f"halo tokens: {halos or 'none'}"
        )


@lru_cache(maxsize=64)
def plan_gather(pattern: S2Pattern, zigzag: Zigzag, rank: int, documents: Documents) -> GatherPlan:
    """The gather schedule of one rank for the documents of one sequence.

    Args:
        pattern: the pattern of the KV heads that the ranks hold.
        documents: contiguous, from 0 to `zigzag.tokens`; none is empty.
    """
    unit = math.gcd(pattern.block_size, zigzag.chunk, *(edge for document in documents for edge in document))
    shards, units, heads = _shards(pattern, documents, unit)
    owner = zigzag.owner(units * unit)
    owned = owner == rank
    counts = np.bincount(owner, minlength=zigzag.ranks)
    width = int(counts.max(initial=0))
    # A unit's number among those of its owner: its place in the stable sort by owner, less the owner's first.
    order = np.argsort(owner, kind="stable")
    place = np.empty_like(order)
    place[order] = np.arange(len(order)) - (np.cumsum(counts) - counts)[owner[order]]

    halos = [_halo_units(pattern, zigzag, p, documents, unit) for p in range(zigzag.ranks)]
    mine = [halo[zigzag.owner(halo * unit) == rank] for both in halos for halo in both]
    sends = [zigzag.local(units * unit) // unit for units in mine]
    sources = zigzag.owner(np.concatenate(halos[rank]) * unit)
    halo_unpack = np.empty(len(sources), dtype=np.int64)
    halo_unpack[np.argsort(sources, kind="stable")] = np.arange(len(sources))
    halo = tuple(len(h) for h in halos[rank])
    return GatherPlan(
        rank=rank,
        zigzag=zigzag,
        unit=unit,
        pieces=_pieces(pattern, zigzag, rank, documents, [h * unit for h in halo]),
        shards=shards,
        width=width,
        pack_units=zigzag.local(units[owned] * unit) // unit,
        pack_heads=heads[owned],
        unpack=owner * width + place,
        halo=halo,
        send_units=np.concatenate(sends),
        send_parts=tuple(map(len, sends)),
        recv_counts=tuple(np.bincount(sources, minlength=zigzag.ranks).tolist()),
        halo_unpack=halo_unpack,
    )


def _shards(pattern: S2Pattern, documents: Documents, unit: int):
    """Places of all shards, and of every unit in them its position and head: document after document, in
    each head after head, so that the shards of neighbouring equal heads lie side by side."""
    B = pattern.block_size
    places: list[list[Shard]] = [[] for _ in documents]
    units, heads, total = [], [], 0
    for document, (start, stop) in zip(places, documents):
        for g in range(pattern.num_kv_heads):
            size = pattern.shard_prefix(g, (stop - start - 1) // B)
            blocks = _shard_blocks(pattern, g, size)
            firsts = (start + blocks * B) // unit
            units.append((firsts[:, None] + np.arange(B // unit)).ravel())
            heads.append(np.full(len(units[-1]), g))
            document.append(Shard(total, total + size * B))
            total += size * B
    return tuple(map(tuple, places)), np.concatenate(units), np.concatenate(heads)


def _shard_blocks(pattern: S2Pattern, head: int, size: int) -> np.ndarray:
    """`pattern.shard_block(head, n)` for n = 0 .. size-1."""
    n = np.arange(size)
    strided = pattern.first_strided(head) + (n - pattern.sink_blocks) * pattern.strides[head]
    return np.where(n < pattern.sink_blocks, n, strided)


def _halo_units(
    pattern: S2Pattern, zigzag: Zigzag, rank: int, documents: Documents, unit: int
) -> list[np.ndarray]:
    """For both chunks of a rank the units before it that the windows of its first document reach."""
    halos = []
    for first, stop in zigzag.chunks(rank):
        start = max((a for a, _ in documents if a <= first), default=0) if stop > first else first
        halos.append(np.arange(start + pattern.window_start(first - start), first, unit) // unit)
    return halos


def _pieces(
    pattern: S2Pattern, zigzag: Zigzag, rank: int, documents: Documents, halo: Sequence[int]
) -> tuple[Piece, ...]:
    pieces = []
    for chunk, (first, last) in enumerate(zigzag.chunks(rank)):
        here, origin = chunk * zigzag.chunk - first, halo[chunk] - first
        for number, (start, stop) in enumerate(documents):
            a, b = max(start, first), min(stop, last)
            if a < b:
                keys_start = pattern.window_start(a - start)
                keys = (start + keys_start + origin, b + origin)
                pieces.append(Piece(number, chunk, a + here, b + here, a - start, keys, keys_start))
    return tuple(pieces)


# ---------------------------------------------------------------------------------------------------------
# a2a: which KV groups each rank computes.


@dataclass(frozen=True)
class HeadShare:
    """Query heads `start` .. `stop`-1, all of KV head `kv_head`, computed by one rank."""

    kv_head: int
    start: int
    stop: int


@dataclass(frozen=True)
class HeadPlan:
    """The a2a schedule: for each rank the heads it computes, and what that costs (in visible pairs)."""

    shares: tuple[tuple[HeadShare, ...], ...]
    costs: tuple[int, ...]

    @property
    def imbalance(self) -> float:
        """Largest cost of a rank over the mean."""
        return max(self.costs) * len(self.costs) / sum(self.costs)

    def query_heads(self, rank: int) -> list[int]:
        """The query heads that a rank computes, in order."""
        return [h for share in self.shares[rank] for h in range(share.start, share.stop)]

    def kv_heads(self, rank: int) -> list[int]:
        """The KV head of each of a rank's shares."""
        return [share.kv_head for share in self.shares[rank]]

    def __str__(self) -> str:
        heads = [[f"{s.start}-{s.stop - 1} of KV {s.kv_head}" for s in shares] for shares in self.shares]
        return "; ".join(f"rank {rank}: query heads {', '.join(mine)}" for rank, mine in enumerate(heads))


_EVEN = 1.02  # imbalance at which no group is cut any further: each cut sends a KV head twice
_MOST_STEPS = 20_000
_LARGEST_SEARCH = 256  # shares x ranks beyond which the search has no chance


@lru_cache(maxsize=256)
def assign_heads(pairs: tuple[int, ...], num_query_heads: int, ranks: int) -> HeadPlan:
    """Assigns KV groups to ranks so that the largest cost is small.

    Longest processing time first (Graham 1969); then moves and swaps between two ranks as long as one of
    them lowers the larger of their costs; then a search over all assignments for something better, exact
    where few heads share few ranks and given up after `_MOST_STEPS` elsewhere. Where there are fewer KV
    groups than ranks, each group's query heads are cut into as many parts as that takes. Where that leaves
    the ranks uneven, groups are cut into smaller parts, dear ones first.

    Args:
        pairs: visible pairs of each KV head, for one query head.
        num_query_heads: query heads, a multiple of the KV heads.
        ranks: over how many ranks.

    Raises:
        ValueError: fewer query heads than ranks.
    """
    if num_query_heads < ranks:
        raise ValueError(
            f"ranks {ranks}: must be at most the {num_query_heads} query heads (of a tensor-parallel rank) "
            "when heads move"
        )
    group = num_query_heads // len(pairs)
    best = None
    for way, parts in enumerate(_ways_to_cut(pairs, group, ranks)):
        shares = [
            HeadShare(g, g * group + group * part // count, g * group + group * (part + 1) // count)
            for g, count in enumerate(parts)
            for part in range(count)
        ]
        plan = _assign(shares, pairs, group, ranks, search=way == 0)
        best = plan if best is None or plan.imbalance < best.imbalance else best
        if best.imbalance <= _EVEN:
            break
    return best


def _ways_to_cut(pairs: tuple[int, ...], group: int, ranks: int) -> Iterator[list[int]]:
    """Into how many parts to cut each KV group: as few as ranks need, then so that no part costs more than a
    rank's mean, half of it, and so on down to single query heads."""
    fewest = min(group, -(-ranks // len(pairs)))
    yield [fewest] * len(pairs)
    finer, parts = 1, []
    while fewest < group and parts != [group] * len(pairs):
        parts = [min(group, max(fewest, -(-finer * ranks * cost // sum(pairs)))) for cost in pairs]
        yield parts
        finer *= 2


def _assign(
    shares: list[HeadShare], pairs: tuple[int, ...], group: int, ranks: int, search: bool
) -> HeadPlan:
    cost = {share: pairs[share.kv_head] * (share.stop - share.start) for share in shares}
    assigned: list[list[HeadShare]] = [[] for _ in range(ranks)]
    emptiest = [(0, 0, rank) for rank in range(ranks)]  # load, shares, rank: an idle rank is first at load 0
    for share in sorted(shares, key=cost.__getitem__, reverse=True):
        load, count, rank = heappop(emptiest)
        assigned[rank].append(share)
        heappush(emptiest, (load + cost[share], count + 1, rank))
    loads = [load for load, _, rank in sorted(emptiest, key=lambda entry: entry[2])]
    _improve(assigned, loads, cost)
    if search:
        assigned = _search(assigned, cost)
    loads = [sum(cost[share] for share in mine) for mine in assigned]
    return HeadPlan(_contiguous(assigned, group), tuple(loads))


def _contiguous(assigned: list[list[HeadShare]], group: int) -> tuple[tuple[HeadShare, ...], ...]:
    """Deals each group's query heads out anew, as many to each rank, so that no rank has two shares of one
    KV head and receives it twice."""
    dealt: Counter[int] = Counter()
    shares = []
    for mine in assigned:
        counts: Counter[int] = Counter()
        for share in mine:
            counts[share.kv_head] += share.stop - share.start
        firsts = {g: g * group + dealt[g] for g in sorted(counts)}
        shares.append(tuple(HeadShare(g, first, first + counts[g]) for g, first in firsts.items()))
        dealt += counts
    return tuple(shares)


def _improve(assigned: list[list[HeadShare]], loads: list[int], cost: dict[HeadShare, int]) -> None:
    """Takes load off the fullest rank by a move or a swap with another rank, while that helps."""
    while True:
        full = max(range(len(loads)), key=loads.__getitem__)
        best = None
        for other in range(len(loads)):
            if other == full or loads[other] == loads[full]:
                continue
            for mine in assigned[full]:
                for theirs in [None, *assigned[other]] if len(assigned[full]) > 1 else assigned[other]:
                    shift = cost[mine] - (cost[theirs] if theirs else 0)
                    larger = max(loads[full] - shift, loads[other] + shift)
                    if larger < (best[0] if best else loads[full]):
                        best = larger, other, mine, theirs, shift
        if best is None:
            return
        _, other, mine, theirs, shift = best
        assigned[full].remove(mine)
        assigned[other].append(mine)
        if theirs:
            assigned[other].remove(theirs)
            assigned[full].append(theirs)
        loads[full] -= shift
        loads[other] += shift


def _search(assigned: list[list[HeadShare]], cost: dict[HeadShare, int]) -> list[list[HeadShare]]:
    """The best assignment that branch and bound meets within `_MOST_STEPS`, or `assigned` if none beats it.

    Dearest share first, emptiest rank first; ranks of equal load are interchangeable.
    """
    shares = sorted(cost, key=cost.__getitem__, reverse=True)
    ranks = len(assigned)
    best = max(sum(cost[share] for share in mine) for mine in assigned)
    least = max(-(-sum(cost.values()) // ranks), cost[shares[0]])
    loads, owner, steps = [0] * ranks, [0] * len(shares), 0

    def place(n: int) -> None:
        nonlocal assigned, best, steps
        if n == len(shares):
            best = max(loads)
            assigned = [[s for s, r in zip(shares, owner) if r == rank] for rank in range(ranks)]
            return
        tried = set()
        for rank in sorted(range(ranks), key=loads.__getitem__):
            load = loads[rank]
            if best == least or steps >= _MOST_STEPS or load + cost[shares[n]] >= best:
                return
            if load not in tried:
                tried.add(load)
                steps += 1
                loads[rank], owner[n] = load + cost[shares[n]], rank
                place(n + 1)
                loads[rank] = load

    if len(shares) * ranks <= _LARGEST_SEARCH:
        place(0)
    return assigned
