"""What one attention call moves, computes and keeps on each context-parallel rank: exact, in closed form.

Nothing here grows with the sequence: a chunk's share of a shard, of a window or of the visible pairs is the
difference of a count at its two ends. The largest arrays have one entry per chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_s2.parallel.assignment import HeadPlan, assign_heads, window_start
from megatron_s2.parallel.layout import Zigzag
from megatron_s2.pattern import S2Pattern

SCHEDULES = ("gather", "a2a", "ring", "all_gather")


@dataclass(frozen=True)
class AttentionCall:
    """The shapes of one attention call under context parallelism, as one tensor-parallel rank sees them.

    Args:
        ranks: context-parallel ranks.
        tokens: tokens of a sequence, over all ranks; a multiple of 2 * ranks.
        batch: sequences.
        query_heads: query heads of one tensor-parallel rank.
        head_dim, v_head_dim: elements of a query or key, and of a value, per head.
        element_size: bytes of an element.

    Raises:
        ValueError: a field is not positive, or the tokens do not make two chunks per rank.
    """

    ranks: int
    tokens: int
    batch: int
    query_heads: int
    head_dim: int
    v_head_dim: int
    element_size: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} {value}: must be >= 1")
        _ = self.zigzag

    @property
    def zigzag(self) -> Zigzag:
        """Who holds which tokens."""
        return Zigzag(self.ranks, self.tokens)

    @property
    def key_value_bytes(self) -> int:
        """Bytes of one token's key and value of one KV head, over the batch."""
        return self.batch * (self.head_dim + self.v_head_dim) * self.element_size


@dataclass(frozen=True)
class ExchangeBytes:
    """Bytes between one rank and the others in one attention call. What a rank keeps is not counted."""

    forward_received: int
    forward_sent: int
    backward_received: int
    backward_sent: int


def exchange_bytes(schedule: str, pattern: S2Pattern, call: AttentionCall, rank: int) -> ExchangeBytes:
    """What `rank` receives from the others and sends to them, for sequences of one document each.

    gather: every rank adds equally much to the all-gather of the shards, as much as the fullest needs; each
    chunk gets the keys and values of the window before it. Backward, gradients go the way back.
    a2a: queries, keys and values of a rank's heads come from all others, outputs go back. Backward mirrors.
    ring, all_gather (what Transformer Engine has, for comparison): all keys and values reach every rank;
    backward they do so again, and their gradients return.

    Args:
        schedule: one of `SCHEDULES`.
        pattern: the pattern of the KV heads of one tensor-parallel rank.

    Raises:
        ValueError: another schedule; query heads that are no multiple of the KV heads; or, for `a2a`, fewer
            query heads than ranks.
    """
    moved = traffic(schedule, pattern, call)
    gathered = (call.ranks - 1) * moved.gathered
    received, sent = (gathered + int(way[:, rank].sum()) for way in (moved.received, moved.sent))
    if schedule in ("ring", "all_gather"):
        return ExchangeBytes(received, sent, 2 * received, 2 * sent)
    return ExchangeBytes(received, sent, backward_received=sent, backward_sent=received)


@dataclass(frozen=True, eq=False)
class Traffic:
    """Bytes of one forward, of all ranks.

    Args:
        gathered: what every rank adds to the all-gather (or passes round the ring).
        received, sent: `[2, ranks]`, what goes from rank to rank besides: within a node, between nodes.
    """

    gathered: int
    received: np.ndarray
    sent: np.ndarray


@lru_cache(maxsize=256)
def traffic(schedule: str, pattern: S2Pattern, call: AttentionCall, node_ranks: int = 1) -> Traffic:
    """The bytes of one forward when nodes hold `node_ranks` neighbouring ranks each.

    Raises:
        ValueError: as `exchange_bytes`.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule}: must be one of {', '.join(SCHEDULES)}")
    if call.query_heads % pattern.num_kv_heads:
        raise ValueError(
            f"query_heads {call.query_heads}: must be a multiple of the {pattern.num_kv_heads} KV heads"
        )
    if schedule == "a2a":
        return _a2a_traffic(head_plan(pattern, call), call, node_ranks)
    token_bytes = call.key_value_bytes
    if schedule == "gather":
        halo = token_bytes * pattern.num_kv_heads * _halo_tokens(pattern, call.zigzag, node_ranks)
        return Traffic(token_bytes * gathered_tokens(pattern, call.zigzag), *halo)
    nothing = np.zeros((2, call.ranks), dtype=np.int64)
    return Traffic(token_bytes * pattern.num_kv_heads * call.zigzag.local_tokens, nothing, nothing)


def head_plan(pattern: S2Pattern, call: AttentionCall) -> HeadPlan:
    """Which heads each rank computes in the a2a schedule.

    Raises:
        ValueError: fewer query heads than ranks.
    """
    pairs = tuple(int(_chunk_pairs(head, call.zigzag).sum()) for head in _heads(pattern))
    return assign_heads(pairs, call.query_heads, call.ranks)


def gathered_tokens(pattern: S2Pattern, zigzag: Zigzag) -> int:
    """Tokens that each rank adds to the all-gather of the shards, summed over the KV heads: as many as the
    rank that holds most."""
    return int(_per_rank(sum(_chunk_shard_tokens(head, zigzag) for head in _heads(pattern))).max())


def shard_tokens(pattern: S2Pattern, zigzag: Zigzag) -> int:
    """Tokens of all KV heads' shards over the whole sequence."""
    return int(sum(_chunk_shard_tokens(head, zigzag).sum() for head in _heads(pattern)))


def halo_tokens(pattern: S2Pattern, zigzag: Zigzag) -> np.ndarray:
    """`[ranks]`, tokens before the two chunks of each rank that its windows reach, its own included."""
    chunks = np.arange(2 * zigzag.ranks)
    return _per_rank(chunks * zigzag.chunk - _window_starts(pattern, zigzag))


def _heads(pattern: S2Pattern) -> list[S2Pattern]:
    """Each KV head as a pattern of its own; heads that see the same are equal, in whatever layer."""
    return [replace(pattern.slice_heads(g, g + 1), layer=0) for g in range(pattern.num_kv_heads)]


def _per_rank(of_chunks: np.ndarray) -> np.ndarray:
    """Sums over the two chunks of each rank."""
    ranks = len(of_chunks) // 2
    return of_chunks[:ranks] + of_chunks[: ranks - 1 : -1]


def _edges(zigzag: Zigzag) -> list[int]:
    return [chunk * zigzag.chunk for chunk in range(2 * zigzag.ranks + 1)]


@lru_cache(maxsize=1024)
def _chunk_pairs(head: S2Pattern, zigzag: Zigzag) -> np.ndarray:
    """`[chunks]`, visible pairs of the queries of each chunk, for one query head."""
    return np.diff([head.visible_pairs(edge)[0] for edge in _edges(zigzag)])


@lru_cache(maxsize=1024)
def _chunk_shard_tokens(head: S2Pattern, zigzag: Zigzag) -> np.ndarray:
    """`[chunks]`, tokens of the head's shard in each chunk. The shard ends where the last window starts."""
    B = head.block_size
    whole = head.shard_prefix(0, head.num_blocks(zigzag.tokens) - 1)

    def before(position: int) -> int:
        block, part = divmod(position, B)
        size = head.shard_size(0, block)
        return min(whole, size) * B + (part if size < min(whole, head.shard_size(0, block + 1)) else 0)

    return np.diff([before(edge) for edge in _edges(zigzag)])


def _window_starts(pattern: S2Pattern, zigzag: Zigzag) -> np.ndarray:
    """`[chunks]`, the first position that the window of each chunk's first query reaches."""
    return np.array([window_start(pattern, edge) for edge in _edges(zigzag)[:-1]])


def _halo_tokens(pattern: S2Pattern, zigzag: Zigzag, node_ranks: int) -> np.ndarray:
    """`[2, 2, ranks]`, halo tokens received and sent, within a node and between nodes, by each rank."""
    starts = _window_starts(pattern, zigzag)
    own, node, all_ranks = (
        _halo_within(starts, zigzag, group) for group in (1, node_ranks, max(node_ranks, zigzag.ranks))
    )
    return np.stack([node - own, all_ranks - node], axis=1)


def _halo_within(starts: np.ndarray, zigzag: Zigzag, group: int) -> np.ndarray:
    """`[2, ranks]`, halo tokens that each rank receives from and sends to its group of neighbouring ranks,
    itself included. `starts` is where each chunk's halo begins."""
    P, C = zigzag.ranks, zigzag.chunk
    chunk = np.arange(2 * P)
    rank = np.minimum(chunk, 2 * P - 1 - chunk)
    first = rank // group * group
    last = np.minimum(first + group, P)
    begin, end = chunk * C, (chunk + 1) * C
    # Halos that begin before a chunk or at its first token take all of it, those that begin inside a part.
    whole = np.searchsorted(starts, begin, side="right")
    some = np.searchsorted(starts, end, side="left")
    summed = np.concatenate([[0], np.cumsum(starts)])

    def sent_before(limit: np.ndarray) -> np.ndarray:
        """Tokens that each chunk gives to later chunks before `limit`."""
        upto, inside = np.minimum(limit, whole), np.minimum(limit, some)
        parts = (inside - upto) * end - (summed[inside] - summed[upto])
        return np.maximum(upto - chunk - 1, 0) * C + parts

    received = np.zeros(2 * P, dtype=np.int64)
    sent = np.zeros(2 * P, dtype=np.int64)
    for low, high in ((first, last), (2 * P - last, 2 * P - first)):  # the group's early and late chunks
        received += np.maximum(np.minimum(begin, high * C) - np.maximum(starts, low * C), 0)
        sent += sent_before(high) - sent_before(low)
    return np.stack([_per_rank(received), _per_rank(sent)])


def _a2a_traffic(plan: HeadPlan, call: AttentionCall, node_ranks: int) -> Traffic:
    """Each rank gets the queries, keys and values of its heads from every other; their outputs go back."""
    rank = np.arange(call.ranks)
    first = rank // node_ranks * node_ranks
    last = np.minimum(first + node_ranks, call.ranks)
    token = call.zigzag.local_tokens * call.batch * call.element_size
    heads = np.array([len(plan.query_heads(r)) for r in rank])
    kv_heads = np.array([len(plan.kv_heads(r)) for r in rank])
    outputs = token * heads * call.v_head_dim
    inputs = token * (heads * call.head_dim + kv_heads * (call.head_dim + call.v_head_dim))

    def from_others(values: np.ndarray) -> np.ndarray:
        """Sums over the other ranks of the node, and over those of other nodes."""
        summed = np.concatenate([[0], np.cumsum(values)])
        node = summed[last] - summed[first]
        return np.stack([node - values, summed[-1] - node])

    peers = from_others(np.ones_like(rank))
    return Traffic(0, peers * inputs + from_others(outputs), from_others(inputs) + peers * outputs)
