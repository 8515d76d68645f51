"""Forked sequences share what they have in common, store the rest, and attend as if they shared nothing."""

import pytest
import torch
from attention_cases import s2

from megatron_s2 import s2_attention
from megatron_s2.kernels.compare import require_equal
from megatron_s2.kv_cache.cache import KVCache, cache_bytes
from megatron_s2.kv_cache.cached_attention import cached_attention

PATTERNS = {
    "s2": s2(2),
    "dense head": s2(3, vert_stride=(1, 4, 4), sink_blocks=1),
    "window only": s2(3, vert_stride=(0, 4, 3)),
    "one block window": s2(2, local_blocks=1),
}
DIM, GROUP = 8, 2


class Sequences:
    """Sequences with random queries, keys and values, and what attention through a cache gave for them."""

    def __init__(self, pattern, max_tokens=None, sinks=False):
        self.pattern, self.draw = pattern, torch.Generator().manual_seed(0)
        self.heads = GROUP * pattern.num_kv_heads, pattern.num_kv_heads, pattern.num_kv_heads
        self.sinks = self.random(self.heads[0]) if sinks else None
        self.cache = KVCache(pattern, 1, DIM, torch.float64, max_tokens=max_tokens)
        self.rows = [self.new()]

    def random(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=self.draw, dtype=torch.float64)

    def new(self) -> list[torch.Tensor]:
        """q, k, v and output `[tokens, heads, DIM]` of a sequence without tokens."""
        return [torch.zeros(0, heads, DIM, dtype=torch.float64) for heads in (*self.heads, self.heads[0])]

    def feed(self, *counts: int) -> None:
        q, k, v = (self.random(len(counts), max(counts), heads, DIM) for heads in self.heads)
        out = cached_attention(q, k, v, self.cache, sink_logits=self.sinks, new=counts)
        for row, count in enumerate(counts):
            assert not out[row, count:].any()
            more = (x[row, :count] for x in (q, k, v, out))
            self.rows[row] = [torch.cat(pair) for pair in zip(self.rows[row], more)]

    def fork(self, *rows: int | None) -> None:
        self.cache = self.cache.fork(rows)
        self.rows = [self.new() if row is None else self.rows[row] for row in rows]

    def require_exact(self) -> None:
        for row, (q, k, v, out) in enumerate(self.rows):
            assert self.cache.lengths[row] == len(q)
            exact = s2_attention(
                q[None], k[None], v[None], self.pattern, sink_logits=self.sinks, return_lse=False,
                backend="reference",
            )  # fmt: skip
            require_equal({"out": out}, {"out": exact[0]})
            for g in range(self.pattern.num_kv_heads):
                for entries, x in zip(self.cache.entries(row, g), (k, v)):
                    kept = self.pattern.row_blocks(g, len(q) // 16)
                    positions = [t for t in range(len(q)) if t // 16 in kept]
                    assert torch.equal(entries, x[positions, g])


@pytest.mark.parametrize("max_tokens", [None, 260], ids=["growing", "known maximum"])
@pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)
def test_attention_of_forked_sequences_is_exact(pattern, max_tokens):
    """Forks of forks, rows that are not forked, new ones, tokens in chunks and one by one."""
    sequences = Sequences(pattern, max_tokens, sinks=True)
    sequences.feed(100)
    sequences.fork(0, 0, None, 0)
    sequences.feed(3, 40, 50, 0)
    for _ in range(20):
        sequences.feed(1, 1, 0, 1)
    sequences.fork(1, 0, 2, 1, 3, 1)
    sequences.feed(1, 1, 1, 0, 1, 1)
    sequences.feed(1, 70, 0, 2, 1, 0)
    for _ in range(18):
        sequences.feed(1, 1, 1, 1, 1, 1)
    sequences.cache.select([5, 1, 1])
    sequences.rows = [sequences.rows[row] for row in (5, 1, 1)]
    sequences.feed(1, 1, 1)
    sequences.require_exact()


def test_a_fork_copies_windows_alone():
    pattern, prefix = s2(2, vert_stride=(4, 1)), 1000
    sequences = Sequences(pattern, max_tokens=1100)
    sequences.feed(prefix)
    original = sequences.cache
    lengths, own = [1000 + n for n in range(32)], range(32)
    sequences.fork(*[0] * 32)
    sequences.feed(*own)
    [shared] = sequences.cache.shared
    for (k, v), storage in zip(shared.parts, original.storages):
        assert k.data_ptr() == storage.k.data_ptr() and v.data_ptr() == storage.v.data_ptr()
    once = 2 * DIM * 8 * sum(shared.tokens)
    all_alone = sum(cache_bytes(pattern, length, DIM, torch.float64) for length in lengths)
    assert sequences.cache.bytes == all_alone - 31 * once
    assert once == cache_bytes(pattern, prefix, DIM, torch.float64) - 2 * DIM * 8 * 2 * (prefix - 61 * 16)
    # The shared storage, and for each sequence the window and what follows.
    most = 1100 - 61 * 16
    assert sequences.cache.capacity_bytes <= original.capacity_bytes + 32 * 2 * DIM * 8 * 2 * most


def test_neither_cache_changes_the_other():
    sequences = Sequences(s2(2, vert_stride=(4, 1)))
    sequences.feed(200)
    original, rows = sequences.cache, sequences.rows
    before = [x.clone() for g in range(2) for x in original.entries(0, g)]
    sequences.fork(0, 0)
    sequences.feed(90, 50)
    assert all(map(torch.equal, before, [x for g in range(2) for x in original.entries(0, g)]))
    forked, forked_rows = sequences.cache, sequences.rows
    sequences.cache, sequences.rows = original, rows
    sequences.feed(120)
    sequences.require_exact()
    sequences.cache, sequences.rows = forked, forked_rows
    sequences.feed(1, 1)
    sequences.require_exact()
