"""What one attention call moves, computes and keeps on each context-parallel rank: exact, in closed form.

Nothing here grows with the sequence: a chunk's share of a shard, of a window or of the visible pairs is the
difference of a count at its two ends. The largest arrays have one entry per chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_s2.parallel.assignment import HeadPlan, assign_heads
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
    moved = transfers(schedule, pattern, call)
    gathered = (call.ranks - 1) * moved.gathered
    received, sent = (gathered + int(way[:, rank].sum()) for way in (moved.received, moved.sent))
    if schedule in ("ring", "all_gather"):
        return ExchangeBytes(received, sent, 2 * received, 2 * sent)
    return ExchangeBytes(received, sent, backward_received=sent, backward_sent=received)


@dataclass(frozen=True, eq=False)
class Transfers:
    """Bytes of one forward, of all ranks.

    Args:
        gathered: what every rank adds to the all-gather (or passes round the ring).
        received, sent: `[2, ranks]`, what goes from rank to rank besides: within a node, between nodes.
    """

    gathered: int
    received: np.ndarray
    sent: np.ndarray


@lru_cache(maxsize=256)
def transfers(schedule: str, pattern: S2Pattern, call: AttentionCall, node_ranks: int = 1) -> Transfers:
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
        return _a2a_transfers(head_plan(pattern, call), call, node_ranks)
    token_bytes = call.key_value_bytes
    if schedule == "gather":
        halo = token_bytes * pattern.num_kv_heads * _halo_tokens(pattern, call.zigzag, node_ranks)
        return Transfers(token_bytes * gathered_tokens(pattern, call.zigzag), *halo)
    nothing = np.zeros((2, call.ranks), dtype=np.int64)
    return Transfers(token_bytes * pattern.num_kv_heads * call.zigzag.local_tokens, nothing, nothing)


@dataclass(frozen=True, eq=False)
class Work:
    """Visible pairs that each rank computes, `[ranks]`, over its query heads and the batch.

    Args:
        pairs: all of them.
        window: those of the windows alone, in the schedules where queries stay; nothing in `a2a`.
    """

    pairs: np.ndarray
    window: np.ndarray

    @property
    def imbalance(self) -> float:
        """The largest number of pairs over the mean."""
        return float(self.pairs.max() / self.pairs.mean())


def work(schedule: str, pattern: S2Pattern, call: AttentionCall) -> Work:
    """What each rank computes. The schedules in which queries stay where they are share one answer.

    Raises:
        ValueError: as `exchange_bytes`.
    """
    if schedule == "a2a":
        costs = call.batch * np.array(head_plan(pattern, call).costs)
        return Work(costs, np.zeros_like(costs))
    heads = call.batch * call.query_heads // pattern.num_kv_heads
    pairs = sum(_chunk_pairs(head, call.zigzag) for head in _heads(pattern))
    window = pattern.num_kv_heads * _chunk_pairs(_window_alone(pattern, call.tokens), call.zigzag)
    return Work(heads * _per_rank(pairs), heads * _per_rank(window))


def key_value_tokens(schedule: str, pattern: S2Pattern, call: AttentionCall) -> np.ndarray:
    """`[ranks]`, tokens of keys and values, over the KV heads, that a rank holds for the attention of one
    sequence.

    gather: its own, the gathered shards, the halo. a2a: the whole sequence of its heads. Both keep them for
    the backward. ring: its own and those passing by. all_gather: all.
    """
    zigzag, heads = call.zigzag, pattern.num_kv_heads
    if schedule == "gather":
        shards = shard_tokens(pattern, zigzag)
        return heads * (zigzag.local_tokens + halo_tokens(pattern, zigzag)) + shards
    if schedule == "a2a":
        plan = head_plan(pattern, call)
        return call.tokens * np.array([len(plan.kv_heads(rank)) for rank in range(call.ranks)])
    held = {"ring": 2 * zigzag.local_tokens, "all_gather": call.tokens}[schedule]
    return np.full(call.ranks, heads * held)


def query_tokens(schedule: str, pattern: S2Pattern, call: AttentionCall) -> np.ndarray:
    """`[ranks]`, tokens of queries (and outputs), over the query heads, that a rank computes."""
    if schedule == "a2a":
        plan = head_plan(pattern, call)
        return call.tokens * np.array([len(plan.query_heads(rank)) for rank in range(call.ranks)])
    return np.full(call.ranks, call.zigzag.local_tokens * call.query_heads)


@lru_cache(maxsize=256)
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


def _window_alone(pattern: S2Pattern, tokens: int) -> S2Pattern:
    """One head with the window and an empty shard."""
    blocks = pattern.num_blocks(tokens)
    fields = {"num_kv_heads": 1, "vert_stride": blocks + 1, "phases": (1,), "num_dense_heads": 0}
    return replace(pattern, **fields, sink_blocks=0, layer=0, warn_lost=False)


def _per_rank(of_chunks: np.ndarray) -> np.ndarray:
    """Sums over the two chunks of each rank."""
    ranks = len(of_chunks) // 2
    return of_chunks[:ranks] + of_chunks[: ranks - 1 : -1]


def _edges(zigzag: Zigzag) -> np.ndarray:
    """Where chunks begin, and the end of the last."""
    return np.arange(2 * zigzag.ranks + 1) * zigzag.chunk


def _shard_sizes(head: S2Pattern, blocks: np.ndarray) -> np.ndarray:
    """`head.shard_size(0, n)` for each n of `blocks`."""
    strided = -(-(blocks - head.first_strided(0)) // head.strides[0])
    return np.clip(blocks, 0, head.sink_blocks) + np.maximum(strided, 0)


@lru_cache(maxsize=1024)
def _chunk_pairs(head: S2Pattern, zigzag: Zigzag) -> np.ndarray:
    """`[chunks]`, visible pairs of the queries of each chunk, for one query head.

    Pairs before a position are those of its whole rows and those of the row it cuts. The n-th shard block, j,
    is seen beyond the window by all rows from j + L on.
    """
    B, L, sinks, first, stride = (
        head.block_size,
        head.local_blocks,
        head.sink_blocks,
        head.first_strided(0),
        head.strides[0],
    )
    rows, cut = np.divmod(_edges(zigzag), B)

    seen = _shard_sizes(head, rows - L)  # shard blocks beyond the window of the last whole row
    from_sinks = np.minimum(seen, sinks)
    strided = seen - from_sinks
    positions = from_sinks * (from_sinks - 1) // 2 + strided * first + stride * (strided * (strided - 1) // 2)
    ramp = np.minimum(rows, L)
    window = ramp * (ramp - 1) // 2 + (rows - ramp) * (L - 1)
    past = window + seen * (rows - L) - positions
    past_of_cut = _shard_sizes(head, rows - L + 1) + np.minimum(rows, L - 1)
    triangles = rows * (B * (B + 1) // 2) + cut * (cut + 1) // 2
    return np.diff(B * B * past + B * cut * past_of_cut + triangles)


@lru_cache(maxsize=1024)
def _chunk_shard_tokens(head: S2Pattern, zigzag: Zigzag) -> np.ndarray:
    """`[chunks]`, tokens of the head's shard in each chunk. The shard ends where the last window starts."""
    B = head.block_size
    whole = head.shard_prefix(0, head.num_blocks(zigzag.tokens) - 1)
    blocks, cut = np.divmod(_edges(zigzag), B)
    size, with_cut = (np.minimum(_shard_sizes(head, blocks + more), whole) for more in (0, 1))
    return np.diff(size * B + (with_cut - size) * cut)


def _window_starts(pattern: S2Pattern, zigzag: Zigzag) -> np.ndarray:
    """`[chunks]`, the first position that the window of each chunk's first query reaches."""
    return np.array([pattern.window_start(edge) for edge in _edges(zigzag)[:-1].tolist()])


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


def _a2a_transfers(plan: HeadPlan, call: AttentionCall, node_ranks: int) -> Transfers:
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
    return Transfers(0, peers * inputs + from_others(outputs), from_others(inputs) + peers * outputs)
