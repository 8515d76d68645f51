"""Plan of the torch backend, in integers: attention calls that cover the visible keys of each query.

    Causal    queries and keys over the same tokens: where the window reaches back to the start of the
              sequence, in dense heads, and at ragged ends
    Band      full rows with a full window, in one batched call: row i and its `local_blocks` key blocks
    Past      queries and keys that all of these queries see. Between two consecutive blocks of the shard,
              every row sees the same *prefix* of it: a segment of `vert_stride` rows is one call without mask
    Gathered  the same for one row of an arbitrary mask, whose blocks are selected by index

Positions are tokens from the start of the document, or in the shard tokens from its start.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby, pairwise

from megatron_s2.pattern import BlockPattern, S2Pattern


@dataclass(frozen=True)
class Causal:
    """Queries and keys `start` .. `stop`-1, causal."""

    start: int
    stop: int


@dataclass(frozen=True)
class Band:
    """Full query blocks `first` .. `last`-1, each with the window that ends with it."""

    first: int
    last: int


@dataclass(frozen=True)
class Past:
    """Queries `start` .. `stop`-1 and all keys `keys_start` .. `keys_stop`-1 of a source."""

    start: int
    stop: int
    source: str  # "window" or "shard"
    keys_start: int
    keys_stop: int


@dataclass(frozen=True)
class Gathered:
    """Queries `start` .. `stop`-1 of one row and all keys of some blocks."""

    start: int
    stop: int
    blocks: tuple[int, ...]


Call = Causal | Band | Past | Gathered


def plan_head(pattern: BlockPattern, head: int, q_start: int, q_stop: int) -> list[Call]:
    """Returns the attention calls of a KV head for the queries at positions `q_start` .. `q_stop`-1.

    Every visible (query, key) pair is in exactly one call, and every query is in a Causal or a Band call
    before any other.
    """
    if not isinstance(pattern, S2Pattern):
        return list(_plan_rows(pattern, head, q_start, q_stop))
    if pattern.is_dense(head):
        return list(_plan_start(q_start, q_stop))
    return [*_plan_window(pattern, q_start, q_stop), *_plan_shard(pattern, head, q_start, q_stop)]


def plan_window(pattern: S2Pattern, head: int, q_start: int, q_stop: int) -> list[Call]:
    """Returns the part of `plan_head` that reads the window, where that does not hold the whole past."""
    if pattern.is_dense(head):
        return list(_plan_start(q_start, q_stop, pattern.window_start(q_start)))
    return list(_plan_window(pattern, q_start, q_stop))


def plan_shard(pattern: S2Pattern, head: int, q_start: int, q_stop: int) -> list[Call]:
    """Returns the part of `plan_head` that reads the shard: what `plan_window` leaves out."""
    if not pattern.is_dense(head):
        return list(_plan_shard(pattern, head, q_start, q_stop))
    # The shard of a dense head is every block in order, so an index in it is a position.
    seen = pattern.window_start(q_start)
    return [Past(q_start, q_stop, "shard", 0, seen)] if seen else []


def _plan_start(q_start: int, q_stop: int, keys_start: int = 0) -> Iterator[Call]:
    """Queries that see every key from `keys_start` up to themselves."""
    yield Causal(q_start, q_stop)
    if q_start > keys_start:
        yield Past(q_start, q_stop, "window", keys_start, q_start)


def _plan_window(pattern: S2Pattern, q_start: int, q_stop: int) -> Iterator[Call]:
    B, L = pattern.block_size, pattern.local_blocks
    # Rows below L see all of their past.
    if q_start < L * B:
        yield from _plan_start(q_start, min(q_stop, L * B))
    start = max(q_start, L * B)
    first, last = -(-start // B), q_stop // B
    ragged = [(start, min(first * B, q_stop)), (max(last * B, start), q_stop)]
    for a, b in dict.fromkeys(ragged):
        if a < b:
            yield from _plan_start(a, b, pattern.window_start(a))
    if first < last:
        yield Band(first, last)


def _plan_shard(pattern: S2Pattern, head: int, q_start: int, q_stop: int) -> Iterator[Call]:
    B, L = pattern.block_size, pattern.local_blocks
    prefix = max(1, pattern.shard_prefix(head, q_start // B))
    last = pattern.shard_prefix(head, (q_stop - 1) // B)
    edges = [(pattern.shard_block(head, n - 1) + L) * B for n in range(prefix, last + 2)]
    for n, (a, b) in enumerate(pairwise(edges), prefix):
        yield Past(max(a, q_start), min(b, q_stop), "shard", 0, n * B)


def _plan_rows(pattern: BlockPattern, head: int, q_start: int, q_stop: int) -> Iterator[Call]:
    B = pattern.block_size
    for row in range(q_start // B, -(-q_stop // B)):
        start, stop = max(q_start, row * B), min(q_stop, (row + 1) * B)
        yield from _plan_start(start, stop, row * B)
        if blocks := pattern.row_blocks(head, row)[:-1]:
            yield Gathered(start, stop, tuple(blocks))


def equal_heads(pattern: BlockPattern) -> list[range]:
    """Returns ranges of neighbouring KV heads of equal pattern, each of which is computed as one."""
    if not isinstance(pattern, S2Pattern):
        return [range(g, g + 1) for g in range(pattern.num_kv_heads)]
    alike = groupby(range(pattern.num_kv_heads), lambda g: (pattern.strides[g], pattern.head_phases[g]))
    groups = (list(group) for _, group in alike)
    return [range(group[0], group[-1] + 1) for group in groups]
