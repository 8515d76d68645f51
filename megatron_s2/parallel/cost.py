"""Cost of one attention call on each context-parallel rank: bytes transferred, pairs computed, keys stored.

All counts are exact and in closed form: a chunk's part of a shard, of a window or of the visible pairs is the
difference of a count at its two ends. The largest arrays have one entry per chunk.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from megatron_s2.parallel.gather_plan import GROUP_TOKENS, head_groups
from megatron_s2.parallel.head_plan import HeadPlan, assign_heads
from megatron_s2.parallel.layout import Zigzag
from megatron_s2.pattern import S2Pattern
from megatron_s2.pattern.pair_counts import shard_sizes, visible_pairs

SCHEDULES = ("gather", "a2a", "ring", "all_gather")


@dataclass(frozen=True)
class AttentionCall:
    """The shapes of one attention call of one tensor-parallel rank under context parallelism.

    Args:
        ranks: number of context-parallel ranks.
        tokens: tokens per sequence, over all ranks; a multiple of 2 * ranks.
        batch: number of sequences.
        query_heads: number of query heads of one tensor-parallel rank.
        head_dim: elements per head of a query or key.
        v_head_dim: elements per head of a value.
        element_size: bytes per element.
        group_tokens: shard tokens that `gather` moves at a time (`head_groups`).
        kv_group: heads of the pattern that share a KV head: 1, or query heads per KV head for a pattern that
            has a head for each. `gather` and `a2a` exchange keys and values of every head of the pattern;
            `ring` and `all_gather`, those of the KV heads.

    Raises:
        ValueError: a field is not positive, or `tokens` is not a multiple of 2 * ranks.
    """

    ranks: int
    tokens: int
    batch: int
    query_heads: int
    head_dim: int
    v_head_dim: int
    element_size: int
    group_tokens: int = GROUP_TOKENS
    kv_group: int = 1

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value < 1:
                raise ValueError(f"{name} {value}: must be >= 1")
        _ = self.zigzag

    @property
    def zigzag(self) -> Zigzag:
        """Layout of the tokens over the ranks."""
        return Zigzag(self.ranks, self.tokens)

    @property
    def key_value_bytes(self) -> int:
        """Bytes of the keys and values of one token and KV head, over the batch."""
        return self.batch * (self.head_dim + self.v_head_dim) * self.element_size


@dataclass(frozen=True)
class ExchangeBytes:
    """Bytes that one rank exchanges with the other ranks in one attention call."""

    forward_received: int
    forward_sent: int
    backward_received: int
    backward_sent: int


def exchange_bytes(schedule: str, pattern: S2Pattern, call: AttentionCall, rank: int) -> ExchangeBytes:
    """Returns the bytes that `rank` receives and sends, for sequences of one document each.

    gather: every rank contributes as much to the all-gather of the shards as the rank that owns most, and
    each chunk receives the keys and values of the window before it. The backward sends gradients back.
    a2a: each rank receives queries, keys and values of its heads from all others, and sends outputs back. The
    backward does the same with gradients.
    ring, all_gather (offered by Transformer Engine, for comparison): every rank receives all keys and values;
    the backward moves them again, and their gradients as well.

    Args:
        schedule: one of `SCHEDULES`.
        pattern: pattern of the KV heads of one tensor-parallel rank.
        call: shapes of the call.
        rank: context-parallel rank.

    Raises:
        ValueError: another schedule; the query heads are not a multiple of the KV heads; or, for `a2a`, there
            are fewer query heads than ranks.
    """
    total = transfers(schedule, pattern, call)
    gathered = (call.ranks - 1) * total.gathered
    received, sent = (gathered + int(count[:, rank].sum()) for count in (total.received, total.sent))
    if schedule in ("ring", "all_gather"):
        return ExchangeBytes(received, sent, 2 * received, 2 * sent)
    return ExchangeBytes(received, sent, backward_received=sent, backward_sent=received)


@dataclass(frozen=True, eq=False)
class Transfers:
    """Bytes that all ranks transfer in one forward.

    Args:
        gathered: bytes that every rank contributes to the all-gather, or passes round the ring.
        received, sent: `[2, ranks]`, all other bytes of each rank, within its node and between nodes.
    """

    gathered: int
    received: np.ndarray
    sent: np.ndarray


@lru_cache(maxsize=256)
def transfers(schedule: str, pattern: S2Pattern, call: AttentionCall, node_ranks: int = 1) -> Transfers:
    """Returns the bytes of one forward on nodes of `node_ranks` neighbouring ranks.

    Raises:
        ValueError: as for `exchange_bytes`.
    """
    if schedule not in SCHEDULES:
        raise ValueError(f"schedule {schedule}: must be one of {', '.join(SCHEDULES)}")
    if call.query_heads % pattern.num_kv_heads:
        raise ValueError(
            f"query_heads {call.query_heads}: must be a multiple of the {pattern.num_kv_heads} KV heads"
        )
    if schedule == "a2a":
        return _a2a_transfers(plan_heads(pattern, call), call, node_ranks)
    token_bytes = call.key_value_bytes
    if schedule == "gather":
        halo = token_bytes * pattern.num_kv_heads * _halo_tokens(pattern, call.zigzag, node_ranks)
        width = sum(int(tokens.max()) for tokens in _group_shard_tokens(pattern, call))
        return Transfers(token_bytes * width, *halo)
    nothing = np.zeros((2, call.ranks), dtype=np.int64)
    kv_heads = pattern.num_kv_heads // call.kv_group
    return Transfers(token_bytes * kv_heads * call.zigzag.local_tokens, nothing, nothing)


@dataclass(frozen=True, eq=False)
class PairCounts:
    """Query-key pairs that each rank computes, over its query heads and the batch.

    Args:
        pairs: `[ranks]`, all visible pairs.
        window_pairs: `[ranks]`, pairs inside the windows in the schedules in which queries stay; 0 in `a2a`.
    """

    pairs: np.ndarray
    window_pairs: np.ndarray

    @property
    def imbalance(self) -> float:
        """Largest number of pairs of a rank divided by the mean."""
        return float(self.pairs.max() / self.pairs.mean())


def pair_counts(schedule: str, pattern: S2Pattern, call: AttentionCall) -> PairCounts:
    """Returns the pairs that each rank computes; they are equal in all schedules in which queries stay.

    Raises:
        ValueError: as for `exchange_bytes`.
    """
    if schedule == "a2a":
        costs = call.batch * np.array(plan_heads(pattern, call).costs)
        return PairCounts(costs, np.zeros_like(costs))
    heads = call.batch * call.query_heads // pattern.num_kv_heads
    pairs = sum(_chunk_pairs(head, call.zigzag) for head in _single_heads(pattern))
    window = pattern.num_kv_heads * _chunk_pairs(_window_only(pattern), call.zigzag)
    return PairCounts(heads * _per_rank(pairs), heads * _per_rank(window))


def key_value_tokens(schedule: str, pattern: S2Pattern, call: AttentionCall) -> np.ndarray:
    """`[ranks]`, tokens of keys and values, summed over KV heads, that a rank stores for one sequence.

    gather: its tokens, the gathered shards and the halos. a2a: the whole sequence of its heads. Both keep
    them for the backward. ring: its tokens and those of the rank before it. all_gather: the whole sequence.
    """
    zigzag, heads = call.zigzag, pattern.num_kv_heads
    if schedule == "gather":
        halos = _halo_of_rank(pattern, zigzag)
        return heads * (zigzag.local_tokens + halos) + sum(
            tokens.sum() for tokens in _group_shard_tokens(pattern, call)
        )
    if schedule == "a2a":
        plan = plan_heads(pattern, call)
        return call.tokens * np.array([len(plan.kv_heads(rank)) for rank in range(call.ranks)])
    tokens = {"ring": 2 * zigzag.local_tokens, "all_gather": call.tokens}[schedule]
    return np.full(call.ranks, heads // call.kv_group * tokens)


def query_tokens(schedule: str, pattern: S2Pattern, call: AttentionCall) -> np.ndarray:
    """`[ranks]`, tokens of queries, summed over query heads, that a rank computes."""
    if schedule == "a2a":
        plan = plan_heads(pattern, call)
        return call.tokens * np.array([len(plan.query_heads(rank)) for rank in range(call.ranks)])
    return np.full(call.ranks, call.zigzag.local_tokens * call.query_heads)


def gather_backward_bytes(pattern: S2Pattern, call: AttentionCall) -> np.ndarray:
    """`[ranks]`, bytes that the backward of `gather` stores at its peak, beside what the forward kept.

    The gradients of queries and windows are complete at the end and are summed in float32 (float64 for
    float64 tensors), as is what other ranks return for the shards. The gradients of the shards of a group
    of heads count twice: what a kernel returns is added to them, and the messages sent and received take no
    more. The copies that a kernel makes of queries are not counted.
    """
    zigzag, size, accumulator = call.zigzag, call.element_size, max(call.element_size, 4)
    token = call.batch * (call.head_dim + call.v_head_dim)
    own = pattern.num_kv_heads * zigzag.local_tokens * token
    windows = own + pattern.num_kv_heads * _halo_of_rank(pattern, zigzag) * token
    queries = call.batch * call.head_dim * call.query_heads * zigzag.local_tokens
    groups = _group_shard_tokens(pattern, call)
    returned = sum(groups) * token
    largest = max(int(tokens.sum()) for tokens in groups) * token

    held = accumulator * (queries + windows + returned) + size * windows
    results = accumulator * own + (size * (queries + own) if size < accumulator else 0)
    return held + np.maximum(2 * accumulator * largest, results)


@lru_cache(maxsize=256)
def plan_heads(pattern: S2Pattern, call: AttentionCall) -> HeadPlan:
    """Returns the heads that each rank computes in the a2a schedule.

    Raises:
        ValueError: fewer query heads than ranks.
    """
    pairs = tuple(int(_chunk_pairs(head, call.zigzag).sum()) for head in _single_heads(pattern))
    return assign_heads(pairs, call.query_heads, call.ranks)


def _group_shard_tokens(pattern: S2Pattern, call: AttentionCall) -> list[np.ndarray]:
    """For each group of heads `[ranks]`, tokens of their shards that each rank owns."""
    by_head = [_per_rank(_chunk_shard_tokens(head, call.zigzag)) for head in _single_heads(pattern)]
    groups = head_groups(pattern, call.tokens, call.group_tokens)
    return [sum(by_head[slice(*heads)]) for heads in groups]


def _single_heads(pattern: S2Pattern) -> list[S2Pattern]:
    """Each KV head as a pattern of one head; heads that see the same blocks are equal in all layers."""
    return [replace(pattern.slice_heads(g, g + 1), layer=0) for g in range(pattern.num_kv_heads)]


def _window_only(pattern: S2Pattern) -> S2Pattern:
    """A pattern of one head with the same window and an empty shard."""
    return S2Pattern(1, pattern.block_size, pattern.local_blocks, vert_stride=0)


def _per_rank(per_chunk: np.ndarray) -> np.ndarray:
    """Sums over the two chunks of each rank."""
    ranks = len(per_chunk) // 2
    return per_chunk[:ranks] + per_chunk[: ranks - 1 : -1]


def _edges(zigzag: Zigzag) -> np.ndarray:
    """`[chunks + 1]`, the position at which each chunk begins, and the end of the sequence."""
    return np.arange(2 * zigzag.ranks + 1) * zigzag.chunk


@lru_cache(maxsize=1024)
def _chunk_pairs(head: S2Pattern, zigzag: Zigzag) -> np.ndarray:
    """`[chunks]`, visible pairs of the queries of each chunk, for one query head."""
    return np.diff(visible_pairs(head, _edges(zigzag))[0])


@lru_cache(maxsize=1024)
def _chunk_shard_tokens(head: S2Pattern, zigzag: Zigzag) -> np.ndarray:
    """`[chunks]`, tokens of the head's shard in each chunk; the shard ends where the last window begins."""
    B = head.block_size
    whole = head.shard_prefix(0, head.num_blocks(zigzag.tokens) - 1)
    blocks, cut = np.divmod(_edges(zigzag), B)
    size, with_cut = (np.minimum(shard_sizes(head, blocks + more)[0], whole) for more in (0, 1))
    return np.diff(size * B + (with_cut - size) * cut)


def _window_starts(pattern: S2Pattern, zigzag: Zigzag) -> np.ndarray:
    """`[chunks]`, the first position in the window of each chunk's first query."""
    return np.array([pattern.window_start(edge) for edge in _edges(zigzag)[:-1].tolist()])


def _halo_of_rank(pattern: S2Pattern, zigzag: Zigzag) -> np.ndarray:
    """`[ranks]`, tokens in the two halos of each rank, those from itself included."""
    return _per_rank(_edges(zigzag)[:-1] - _window_starts(pattern, zigzag))


def _halo_tokens(pattern: S2Pattern, zigzag: Zigzag, node_ranks: int) -> np.ndarray:
    """`[2, 2, ranks]`, halo tokens that each rank receives and sends, within its node and between nodes."""
    starts = _window_starts(pattern, zigzag)
    within_rank, within_node, everywhere = (
        _halo_within(starts, zigzag, group) for group in (1, node_ranks, max(node_ranks, zigzag.ranks))
    )
    return np.stack([within_node - within_rank, everywhere - within_node], axis=1)


def _halo_within(starts: np.ndarray, zigzag: Zigzag, group: int) -> np.ndarray:
    """`[2, ranks]`, halo tokens that each rank receives from and sends to its group of neighbouring ranks,
    including itself.

    Args:
        starts: `[chunks]`, the position at which the halo of each chunk begins.
        group: ranks per group.
    """
    P, C = zigzag.ranks, zigzag.chunk
    chunk = np.arange(2 * P)
    rank = np.minimum(chunk, 2 * P - 1 - chunk)
    first = rank // group * group
    last = np.minimum(first + group, P)
    begin, end = chunk * C, (chunk + 1) * C
    # The halos of the chunks below `whole` begin before a chunk or at its first token and take all of it;
    # those from `whole` to `partly` begin inside the chunk and take a part.
    whole = np.searchsorted(starts, begin, side="right")
    partly = np.searchsorted(starts, end, side="left")
    summed = np.concatenate([[0], np.cumsum(starts)])

    def sent_before(limit: np.ndarray) -> np.ndarray:
        """Tokens that each chunk sends to later chunks before `limit`."""
        taking_all, taking_any = np.minimum(limit, whole), np.minimum(limit, partly)
        parts = (taking_any - taking_all) * end - (summed[taking_any] - summed[taking_all])
        return np.maximum(taking_all - chunk - 1, 0) * C + parts

    received = np.zeros(2 * P, dtype=np.int64)
    sent = np.zeros(2 * P, dtype=np.int64)
    for low, high in ((first, last), (2 * P - last, 2 * P - first)):  # the group's early and late chunks
        received += np.maximum(np.minimum(begin, high * C) - np.maximum(starts, low * C), 0)
        sent += sent_before(high) - sent_before(low)
    return np.stack([_per_rank(received), _per_rank(sent)])


def _a2a_transfers(plan: HeadPlan, call: AttentionCall, node_ranks: int) -> Transfers:
    """Each rank receives queries, keys and values of its heads from all others, and sends outputs back."""
    rank = np.arange(call.ranks)
    first = rank // node_ranks * node_ranks
    last = np.minimum(first + node_ranks, call.ranks)
    token = call.zigzag.local_tokens * call.batch * call.element_size
    heads = np.array([len(plan.query_heads(r)) for r in rank])
    kv_heads = np.array([len(plan.kv_heads(r)) for r in rank])
    outputs = token * heads * call.v_head_dim
    inputs = token * (heads * call.head_dim + kv_heads * (call.head_dim + call.v_head_dim))

    def from_others(values: np.ndarray) -> np.ndarray:
        """`[2, ranks]`, sums over the other ranks of the node, and over the ranks of other nodes."""
        summed = np.concatenate([[0], np.cumsum(values)])
        node = summed[last] - summed[first]
        return np.stack([node - values, summed[-1] - node])

    peers = from_others(np.ones_like(rank))
    return Transfers(0, peers * inputs + from_others(outputs), from_others(inputs) + peers * outputs)
