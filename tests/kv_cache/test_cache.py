"""The cache holds exactly the entries that later tokens see, in a number of bytes with a closed form."""

from types import SimpleNamespace

import pytest
import torch
from attention_cases import s2
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_s2 import S2Pattern
from megatron_s2.kv_cache.cache import KVCache, cache_bytes, dense_cache_bytes, kept_tokens
from megatron_s2.kv_cache.shard_part import shard_part

patterns = st.builds(
    lambda strides, phases, **others: S2Pattern(
        len(strides), 16, vert_stride=strides, phases=phases[: len(strides)], warn_lost=False, **others
    ),
    strides=st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple),
    phases=st.tuples(*[st.integers(0, 4)] * 3),
    local_blocks=st.integers(1, 3),
    sink_blocks=st.integers(0, 2),
    num_dense_heads=st.integers(0, 1),
)
PATTERN = s2(num_kv_heads=3, vert_stride=(4, 4, 1), sink_blocks=1)


def numbered(start: int, tokens: int, heads: int) -> torch.Tensor:
    """Keys `[1, tokens, heads, 2]` that consist of their position and their head."""
    positions = torch.arange(start, start + tokens)[:, None].expand(tokens, heads)
    return torch.stack([positions, torch.arange(heads).expand(tokens, heads)], -1)[None].float()


def seen_later(pattern: S2Pattern, head: int, tokens: int) -> list[int]:
    """The positions that some query from `tokens` on sees, by definition, over two windows."""
    B = pattern.block_size
    rows = range(tokens // B, tokens // B + 2 * pattern.local_blocks + 1)
    blocks = set().union(*(pattern.row_blocks(head, row) for row in rows))
    return [position for position in range(tokens) if position // B in blocks]


@given(pattern=patterns, chunks=st.lists(st.integers(1, 70), max_size=6), decoded=st.integers(0, 40))
@settings(max_examples=60)
def test_the_cache_holds_exactly_what_later_tokens_see(pattern, chunks, decoded):
    heads, tokens = pattern.num_kv_heads, 0
    cache = KVCache(pattern, batch=1, head_dim=2)
    for chunk in chunks:
        cache.append(*[numbered(tokens, chunk, heads)] * 2)
        tokens += chunk
    for _ in range(decoded):
        cache.write(*[numbered(tokens, 1, heads)] * 2, rows=[0])
        cache.evict()
        tokens += 1
    for head in range(heads):
        for entries in cache.entries(0, head):
            assert entries[:, 0].tolist() == seen_later(pattern, head, tokens)
            assert set(entries[:, 1].tolist()) <= {head}
    assert cache.bytes == cache_bytes(pattern, tokens, 2, torch.float32)
    assert cache.bytes == sum(x.nbytes for head in range(heads) for x in cache.entries(0, head))
    assert cache.dense_bytes == dense_cache_bytes(heads, tokens, 2, torch.float32)


@given(pattern=patterns, lengths=st.lists(st.integers(0, 150), min_size=1, max_size=4))
@settings(max_examples=30)
def test_bytes_of_a_batch_are_the_sum_over_its_sequences(pattern, lengths):
    keys = torch.zeros(len(lengths), max(lengths), pattern.num_kv_heads, 4, dtype=torch.bfloat16)
    cache = KVCache(pattern, len(lengths), 4, torch.bfloat16)
    cache.append(keys, keys, lengths)
    assert cache.lengths == lengths
    assert cache.bytes == sum(cache_bytes(pattern, n, 4, torch.bfloat16) for n in lengths)


@given(pattern=patterns, tokens=st.integers(1, 300), ranks=st.integers(1, 3), rank=st.integers(0, 2))
@settings(max_examples=30)
def test_a_known_maximum_is_allocated_exactly(pattern, tokens, ranks, rank):
    """Also on each rank of several over which the cache is spread."""
    group = SimpleNamespace(rank=rank % ranks, ranks=ranks)
    cache = KVCache(pattern, 1, 2, max_tokens=tokens, group=group)
    capacity = cache.capacity_bytes
    most = [0] * len(cache.storages)
    for _ in range(tokens):
        cache.write(*[numbered(0, 1, pattern.num_kv_heads)] * 2, rows=[0])
        most = [
            max(n, *(cache.kept(0, g) for g in storage.heads)) for n, storage in zip(most, cache.storages)
        ]
        cache.evict()
    needed = sum(len(storage.heads) * entries for entries, storage in zip(most, cache.storages))
    assert cache.capacity_bytes == capacity == 2 * 2 * 4 * needed
    with pytest.raises(ValueError, match=rf"^max_tokens {tokens}: must be at least the {tokens + 1} tokens"):
        cache.write(*[numbered(0, 1, pattern.num_kv_heads)] * 2, rows=[0])


def test_growth_allocates_at_most_a_quarter_and_a_block_more_than_needed():
    cache, most = KVCache(PATTERN, 1, 2), 0
    for token in range(1000):
        cache.write(*[numbered(token, 1, 3)] * 2, rows=[0])
        most = max(most, *(cache.kept(0, g) for g in range(3)))
        cache.evict()
    for storage in cache.storages:
        needed = 16 + max(
            kept for n in range(1000) for kept in kept_tokens(PATTERN, n)[storage.heads.start :]
        )
        assert storage.k.shape[2] <= 1.25 * needed + 16


@pytest.mark.parametrize("layer", range(4))
def test_at_32k_tokens_the_cache_has_an_eighth_of_the_dense_bytes(layer):
    pattern = S2Pattern(8, block_size=64, local_blocks=8, vert_stride=16, layer=layer)
    tokens, head_dim = 32 * 1024, 4
    assert pattern.local_blocks * pattern.block_size == 512
    keys = torch.zeros(1, tokens, 8, head_dim, dtype=torch.bfloat16)
    cache = KVCache(pattern, 1, head_dim, torch.bfloat16, max_tokens=tokens)
    cache.append(keys, keys)
    assert cache.bytes == cache_bytes(pattern, tokens, head_dim, torch.bfloat16)
    dense = dense_cache_bytes(8, tokens, head_dim, torch.bfloat16)
    assert cache.bytes <= cache.capacity_bytes <= dense / 8


@given(pattern=patterns, ranks=st.integers(1, 4), blocks=st.integers(0, 40))
@settings(max_examples=60)
def test_the_shard_is_dealt_to_the_ranks_in_turn(pattern, ranks, blocks):
    for head in range(pattern.num_kv_heads):
        shard = [pattern.shard_block(head, n) for n in range(pattern.shard_size(head, blocks))]
        sinks = [block for block in shard if block < pattern.sink_blocks]
        for rank in range(ranks):
            part = shard_part(pattern, rank, ranks)
            dealt = [part.shard_block(head, n) for n in range(part.shard_size(head, blocks))]
            assert dealt == [*(sinks if rank == 0 else []), *shard[len(sinks) :][rank::ranks]]
            assert part.local_blocks == pattern.local_blocks


@given(pattern=patterns, tokens=st.integers(0, 600), ranks=st.integers(1, 4))
@settings(max_examples=30)
def test_a_rank_keeps_its_part_of_the_shard_and_the_window(pattern, tokens, ranks):
    """In bytes: those of the window, and of every `ranks`-th strided block of the head."""
    window, window_blocks = tokens - pattern.window_start(tokens), pattern.window_start(tokens) // 16
    for rank in range(ranks):
        kept = 0
        for head in range(pattern.num_kv_heads):
            sinks = min(pattern.sink_blocks, window_blocks)
            strided = pattern.shard_size(head, window_blocks) - sinks
            kept += window + 16 * (max(0, -(-(strided - rank) // ranks)) + (sinks if rank == 0 else 0))
        assert cache_bytes(shard_part(pattern, rank, ranks), tokens, 8, torch.bfloat16) == 2 * 8 * 2 * kept


def test_a_dense_layer_keeps_everything():
    pattern = s2(num_kv_heads=2, vert_stride=1)
    assert kept_tokens(pattern, 1000) == (1000, 1000)


def test_selected_sequences_are_copies():
    keys = torch.randn(2, 100, 3, 2)
    cache = KVCache(PATTERN, 2, 2)
    cache.append(keys, keys, [100, 70])
    before = [[cache.entries(row, g)[0].clone() for g in range(3)] for row in (0, 1)]
    cache.select([1, 0, 1])
    cache.append(keys[:1].expand(3, -1, -1, -1), keys[:1].expand(3, -1, -1, -1), [0, 0, 5])
    assert cache.lengths == [70, 100, 75]
    for row, was in enumerate([1, 0]):
        assert all(torch.equal(cache.entries(row, g)[0], before[was][g]) for g in range(3))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"k": torch.zeros(1, 4, 3, 2)}, r"^k \(1, 4, 3, 2\): must be \(2, 4, 3, 2\) for this cache$"),
        ({"v": torch.zeros(2, 4, 3, 8)}, r"^v \(2, 4, 3, 8\): must be"),
        ({"k": torch.zeros(2, 4, 3, 2).half()}, r"^k torch.float16: must have the cache's torch.float32$"),
        ({"new": [1]}, r"^new \[1\]: must be 2 numbers of tokens, one per row, up to 4$"),
        ({"new": [1, 5]}, r"^new \[1, 5\]: must be"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(given, message):
    cache = KVCache(PATTERN, 2, 2)
    fitting = {"k": torch.zeros(2, 4, 3, 2), "v": torch.zeros(2, 4, 3, 2)}
    with pytest.raises(ValueError, match=message):
        cache.append(**fitting | given)


@pytest.mark.parametrize("name", ["batch", "head_dim", "max_tokens"])
def test_sizes_out_of_range_are_refused(name):
    with pytest.raises(ValueError, match=f"^{name} 0: must be >= 1$"):
        KVCache(PATTERN, **{"batch": 1, "head_dim": 2, name: 0})
