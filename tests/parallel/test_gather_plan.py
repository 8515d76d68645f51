"""The index plans of the gather schedule: ranks exchange exactly the keys that each of them lacks."""

import sys
from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_layouts import packed, patterns, zigzags

from megatron_s2.parallel.gather_plan import GROUP_TOKENS, plan_gather
from megatron_s2.parallel.layout import Zigzag
from megatron_s2.pattern import S2Pattern


class PlayedExchange:
    """What each rank holds after the exchanges of its plan, with positions (and heads in shards) for keys."""

    def __init__(
        self,
        pattern: S2Pattern,
        zigzag: Zigzag,
        documents: tuple[tuple[int, int], ...],
        group_tokens: int = GROUP_TOKENS,
    ):
        self.pattern, self.zigzag, self.documents, self.group_tokens = (
            pattern,
            zigzag,
            documents,
            group_tokens,
        )
        self.plans = [
            plan_gather(pattern, zigzag, rank, documents, group_tokens) for rank in range(zigzag.ranks)
        ]
        unit = self.plans[0].unit
        self.units = [zigzag.positions(rank).reshape(-1, unit) for rank in range(zigzag.ranks)]
        self._gathered = [self._gather(n) for n in range(len(self.plans[0].groups))]

    def _gather(self, n: int) -> np.ndarray:
        contributed = []
        for plan, units in zip(self.plans, self.units):
            group = plan.groups[n]
            keys = np.full((group.width, plan.unit, 2), -1)
            keys[: group.pack.size, :, 0] = units[group.pack.indices()]
            heads = np.repeat(group.pack_heads, group.pack.lengths)
            keys[: group.pack.size, :, 1] = group.heads[0] + heads[:, None]
            contributed.append(keys)
        return np.concatenate(contributed)

    def shard(self, rank: int, document: int, head: int) -> np.ndarray:
        """`[tokens, 2]`, position and head of each key."""
        [(n, group)] = [
            (n, g) for n, g in enumerate(self.plans[rank].groups) if g.heads[0] <= head < g.heads[1]
        ]
        start, stop = group.shards(document)[head - group.heads[0]]
        return self._gathered[n][group.unpack.indices()].reshape(-1, 2)[start:stop]

    def sent(self, source: int, destination: int) -> np.ndarray:
        """`[units, unit]`, positions in the halo."""
        plan = self.plans[source]
        first = sum(plan.send_counts[:destination])
        return self.units[source][plan.send.indices()[first : first + plan.send_counts[destination]]]

    def windows(self, rank: int) -> list[np.ndarray]:
        """The positions of the keys of each chunk, its halo first."""
        plan = self.plans[rank]
        received = np.concatenate([self.sent(source, rank) for source in range(self.zigzag.ranks)])
        halos = np.split(received[plan.halo_unpack.indices()], [plan.halo[0]])
        chunks = np.split(self.zigzag.positions(rank), 2)
        return [np.concatenate([halo.ravel(), chunk]) for halo, chunk in zip(halos, chunks)]


@st.composite
def played(draw) -> PlayedExchange:
    pattern, zigzag = draw(patterns()), draw(zigzags())
    one = st.just(((0, zigzag.tokens),))
    group_tokens = draw(st.sampled_from([1, zigzag.tokens, GROUP_TOKENS]))
    return PlayedExchange(pattern, zigzag, draw(st.one_of(one, packed(zigzag.tokens))), group_tokens)


@given(played())
@settings(max_examples=60)
def test_every_query_is_in_one_slice_of_its_owner(played):
    for rank, plan in enumerate(played.plans):
        held = played.zigzag.positions(rank)
        computed = []
        for part in plan.slices:
            start, stop = played.documents[part.document]
            positions = held[part.start : part.stop]
            assert positions.tolist() == list(range(start + part.q_start, start + part.q_stop))
            assert positions[-1] < stop
            computed += positions.tolist()
        assert computed == held.tolist()


@given(played())
@settings(max_examples=60)
def test_the_gathered_shards_are_the_shards_of_the_pattern(played):
    for document, (start, stop) in enumerate(played.documents):
        last = played.pattern.num_blocks(stop - start) - 1
        for head in range(played.pattern.num_kv_heads):
            blocks = [
                played.pattern.shard_block(head, n) for n in range(played.pattern.shard_prefix(head, last))
            ]
            size = played.pattern.block_size
            expected = [[start + block * size + token, head] for block in blocks for token in range(size)]
            for rank in range(played.zigzag.ranks):
                assert played.shard(rank, document, head).tolist() == expected


@given(played())
@settings(max_examples=60)
def test_chunk_and_halo_hold_the_windows_of_all_queries(played):
    for rank, plan in enumerate(played.plans):
        windows = played.windows(rank)
        for part in plan.slices:
            start, _ = played.documents[part.document]
            keys = windows[part.chunk][part.keys[0] : part.keys[1]]
            assert keys.tolist() == list(range(start + part.keys_start, start + part.q_stop))
            assert part.keys_start == played.pattern.window_start(part.q_start)


@given(played())
@settings(max_examples=60)
def test_ranks_expect_what_others_send_and_contribute_as_much_as_the_largest_owner(played):
    for rank, plan in enumerate(played.plans):
        assert list(plan.recv_counts) == [other.send_counts[rank] for other in played.plans]
    for same in zip(*(plan.groups for plan in played.plans)):
        assert {group.width for group in same} == {max(group.pack.size for group in same)}


@given(played())
@settings(max_examples=60)
def test_groups_are_all_heads_in_order_and_no_larger_than_asked(played):
    one = PlayedExchange(played.pattern, played.zigzag, ((0, played.zigzag.tokens),), played.group_tokens)
    groups = one.plans[0].groups
    heads = [range(*group.heads) for group in groups]
    assert [head for of_group in heads for head in of_group] == list(range(played.pattern.num_kv_heads))
    sizes = [group.edges[-1, -1] for group in groups]
    assert all(size <= played.group_tokens or len(of) == 1 for size, of in zip(sizes, heads))
    # As few as possible: no group has room for the next head.
    following = [group.shards(0)[0] for group in groups[1:]]
    assert all(size + stop > played.group_tokens for size, (_, stop) in zip(sizes, following))
    assert [group.heads for group in played.plans[0].groups] == [group.heads for group in groups]


def test_a_plan_is_described_in_one_line():
    pattern = S2Pattern(num_kv_heads=2, block_size=16, local_blocks=2, vert_stride=4)
    plan = plan_gather(pattern, Zigzag(2, 256), 1, ((0, 256),))
    assert str(plan) == (
        "rank 1 of 2 holds tokens 64..127 and 128..191; contributes 64 of the 112 keys of all shards; "
        "halo tokens: 16 from 0"
    )


def test_many_documents_are_planned_by_array_operations():
    """Function calls, which do not depend on the load of the machine: 89,000 for loops over documents."""
    pattern = S2Pattern(num_kv_heads=8, block_size=64, local_blocks=16, vert_stride=16)
    edges = [0, *range(100, 512 * 256, 257), 512 * 256]
    calls = 0

    def count(frame, event, argument):
        nonlocal calls
        calls += event.endswith("call")

    documents = tuple(pairwise(edges))
    sys.setprofile(count)
    try:
        plan_gather(pattern, Zigzag(8, 512 * 256), 3, documents)
    finally:
        sys.setprofile(None)
    assert calls < 2 * len(documents)
