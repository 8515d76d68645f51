"""Assignment: ranks exchange exactly what each of them needs, and heads are shared out evenly."""

import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_layouts import packed, patterns, zigzags

from megatron_s2.parallel.assignment import HeadPlan, assign_heads, plan_gather
from megatron_s2.parallel.layout import Zigzag
from megatron_s2.pattern.s2_pattern import S2Pattern

# ---------------------------------------------------------------------------------------------------------
# gather, played with positions in place of keys


class Played:
    """What each rank has after the exchanges of its plan. A key is its position; in a shard, and its head."""

    def __init__(self, pattern: S2Pattern, zigzag: Zigzag, documents: tuple[tuple[int, int], ...]):
        self.pattern, self.zigzag, self.documents = pattern, zigzag, documents
        self.plans = [plan_gather(pattern, zigzag, rank, documents) for rank in range(zigzag.ranks)]
        unit = self.plans[0].unit
        self.units = [zigzag.positions(rank).reshape(-1, unit) for rank in range(zigzag.ranks)]
        given = []
        for plan, mine in zip(self.plans, self.units):
            keys = np.full((plan.width, unit, 2), -1)
            keys[: len(plan.pack_units), :, 0] = mine[plan.pack_units]
            keys[: len(plan.pack_units), :, 1] = plan.pack_heads[:, None]
            given.append(keys)
        self._gathered = np.concatenate(given)

    def shard(self, rank: int, document: int, head: int) -> np.ndarray:
        """`[tokens, 2]` position and head."""
        plan = self.plans[rank]
        place = plan.shards[document][head]
        return self._gathered[plan.unpack].reshape(-1, 2)[place.start : place.stop]

    def sent(self, source: int, destination: int) -> np.ndarray:
        """`[units, unit]` positions of the halo."""
        plan = self.plans[source]
        first = sum(plan.send_counts[:destination])
        return self.units[source][plan.send_units[first : first + plan.send_counts[destination]]]

    def windows(self, rank: int) -> list[np.ndarray]:
        """For both chunks the positions of its keys, the halo first."""
        plan = self.plans[rank]
        received = np.concatenate([self.sent(source, rank) for source in range(self.zigzag.ranks)])
        halos = np.split(received[plan.halo_unpack], [plan.halo[0]])
        chunks = np.split(self.zigzag.positions(rank), 2)
        return [np.concatenate([halo.ravel(), chunk]) for halo, chunk in zip(halos, chunks)]


@st.composite
def played(draw) -> Played:
    pattern, zigzag = draw(patterns()), draw(zigzags())
    one = st.just(((0, zigzag.tokens),))
    return Played(pattern, zigzag, draw(st.one_of(one, packed(zigzag.tokens))))


@given(played())
@settings(max_examples=60)
def test_every_query_is_in_one_piece_of_its_owner(played):
    for rank, plan in enumerate(played.plans):
        held = played.zigzag.positions(rank)
        seen = []
        for piece in plan.pieces:
            start, stop = played.documents[piece.document]
            positions = held[piece.start : piece.stop]
            assert positions.tolist() == list(range(start + piece.q_start, start + piece.q_stop))
            assert positions[-1] < stop
            seen += positions.tolist()
        assert seen == held.tolist()


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
def test_the_windows_of_all_queries_are_there_after_the_halo(played):
    for rank, plan in enumerate(played.plans):
        windows = played.windows(rank)
        for piece in plan.pieces:
            start, _ = played.documents[piece.document]
            keys = windows[piece.chunk][piece.keys[0] : piece.keys[1]]
            assert keys.tolist() == list(range(start + piece.keys_start, start + piece.q_stop))
            assert piece.keys_start == played.pattern.window_start(piece.q_start)


@given(played())
@settings(max_examples=60)
def test_what_is_sent_is_what_is_expected_and_no_rank_adds_more_than_the_fullest(played):
    for rank, plan in enumerate(played.plans):
        assert list(plan.recv_counts) == [other.send_counts[rank] for other in played.plans]
    assert {plan.width for plan in played.plans} == {max(len(plan.pack_units) for plan in played.plans)}


def test_a_plan_says_in_a_line_what_it_does():
    pattern = S2Pattern(num_kv_heads=2, block_size=16, local_blocks=2, vert_stride=4)
    plan = plan_gather(pattern, Zigzag(2, 256), 1, ((0, 256),))
    assert str(plan) == (
        "rank 1 of 2 holds tokens 64..127 and 128..191; gives 64 and gets 112 keys of all shards; "
        "halo tokens: 16 from 0"
    )


# ---------------------------------------------------------------------------------------------------------
# a2a


@st.composite
def head_plans(draw) -> tuple[tuple[int, ...], int, HeadPlan]:
    kv_heads, group = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    ranks = draw(st.integers(1, kv_heads * group))
    pairs = tuple(draw(st.sampled_from([1000, 1003, 70, 77, 400])) for _ in range(kv_heads))
    return pairs, group, assign_heads(pairs, kv_heads * group, ranks)


@given(head_plans())
def test_every_query_head_is_computed_once_with_its_kv_head(case):
    pairs, group, plan = case
    heads = [h for rank in range(len(plan.shares)) for h in plan.query_heads(rank)]
    assert sorted(heads) == list(range(group * len(pairs)))
    for share in (share for shares in plan.shares for share in shares):
        assert {h // group for h in range(share.start, share.stop)} == {share.kv_head}


@given(head_plans())
def test_no_rank_is_idle_or_receives_a_kv_head_twice(case):
    _, _, plan = case
    for rank in range(len(plan.shares)):
        kv_heads = plan.kv_heads(rank)
        assert kv_heads and len(set(kv_heads)) == len(kv_heads)


@given(head_plans())
def test_costs_are_the_pairs_of_the_heads(case):
    pairs, group, plan = case
    for rank, cost in enumerate(plan.costs):
        assert cost == sum(pairs[h // group] for h in plan.query_heads(rank))
    assert plan.imbalance * sum(plan.costs) == pytest.approx(max(plan.costs) * len(plan.costs))


SPARSE, ROTATED, DENSE = 1_030, 1_033, 8_200
MIXES = {
    "alike": (SPARSE,) * 8,
    "two phases": (SPARSE, ROTATED) * 4,
    "one dense": (*(SPARSE,) * 7, DENSE),
    "two dense": (*(SPARSE,) * 6, *(DENSE,) * 2),
    "half dense": (*(SPARSE,) * 4, *(DENSE,) * 4),
    "three strides": (DENSE, DENSE // 2, DENSE // 4, SPARSE, SPARSE, SPARSE, DENSE // 2, SPARSE),
    "dearest first errs": (3, 3, 2, 2, 2),
    "dearest first errs on three": (5, 5, 4, 4, 3, 3, 3),
    "sixteen": (*(SPARSE,) * 11, *(DENSE,) * 5),
}


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
@pytest.mark.parametrize("mix", MIXES)
def test_no_worse_than_the_best_of_a_thousand_random_assignments(mix, ranks):
    pairs = MIXES[mix]
    dice = random.Random(f"{mix} {ranks}")
    best = min(_largest_random_load(pairs, ranks, dice) for _ in range(1000))
    for group in (1, 4):
        plan = assign_heads(pairs, group * len(pairs), ranks)
        assert max(plan.costs) <= group * best


def _largest_random_load(pairs: tuple[int, ...], ranks: int, dice: random.Random) -> int:
    loads = [0] * ranks
    for cost in pairs:
        loads[dice.randrange(ranks)] += cost
    return max(loads)


def test_dear_groups_are_cut_where_whole_ones_are_uneven():
    whole = assign_heads(MIXES["two dense"], 8, 4)
    cut = assign_heads(MIXES["two dense"], 32, 4)
    assert whole.imbalance > 1.4  # a dense head alone is more than a rank's mean
    assert cut.imbalance <= 1.02


def test_alike_groups_stay_whole():
    plan = assign_heads(MIXES["two phases"], 32, 4)
    assert [len(shares) for shares in plan.shares] == [2, 2, 2, 2]
    assert {share.stop - share.start for shares in plan.shares for share in shares} == {4}


def test_fewer_query_heads_than_ranks_are_refused():
    with pytest.raises(ValueError, match=r"^ranks 9: must be at most the 8 query heads"):
        assign_heads((1, 1), 8, 9)


def test_a_head_plan_says_who_computes_what():
    assert (
        str(assign_heads((10, 10), 4, 2))
        == "rank 0: query heads 0-1 of KV 0; rank 1: query heads 2-3 of KV 1"
    )
