"""The head plans of the a2a schedule: every head is computed once, and the ranks have even work."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_s2.parallel.head_plan import HeadPlan, assign_heads


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
    "equal": (SPARSE,) * 8,
    "two phases": (SPARSE, ROTATED) * 4,
    "one dense": (*(SPARSE,) * 7, DENSE),
    "two dense": (*(SPARSE,) * 6, *(DENSE,) * 2),
    "half dense": (*(SPARSE,) * 4, *(DENSE,) * 4),
    "three strides": (DENSE, DENSE // 2, DENSE // 4, SPARSE, SPARSE, SPARSE, DENSE // 2, SPARSE),
    "longest first is not optimal": (3, 3, 2, 2, 2),
    "longest first is not optimal on three ranks": (5, 5, 4, 4, 3, 3, 3),
    "sixteen": (*(SPARSE,) * 11, *(DENSE,) * 5),
}


@pytest.mark.parametrize("ranks", [2, 3, 4, 5])
@pytest.mark.parametrize("mix", MIXES)
def test_no_worse_than_the_best_of_a_thousand_random_assignments(mix, ranks):
    pairs = MIXES[mix]
    rng = random.Random(f"{mix} {ranks}")
    best = min(_largest_random_load(pairs, ranks, rng) for _ in range(1000))
    for group in (1, 4):
        plan = assign_heads(pairs, group * len(pairs), ranks)
        assert max(plan.costs) <= group * best


def _largest_random_load(pairs: tuple[int, ...], ranks: int, rng: random.Random) -> int:
    loads = [0] * ranks
    for cost in pairs:
        loads[rng.randrange(ranks)] += cost
    return max(loads)


def test_expensive_groups_are_split_if_whole_ones_are_uneven():
    whole = assign_heads(MIXES["two dense"], 8, 4)
    split = assign_heads(MIXES["two dense"], 32, 4)
    assert whole.imbalance > 1.4  # a dense head alone is more than a rank's mean
    assert split.imbalance <= 1.02


def test_equal_groups_stay_whole():
    plan = assign_heads(MIXES["two phases"], 32, 4)
    assert [len(shares) for shares in plan.shares] == [2, 2, 2, 2]
    assert {share.stop - share.start for shares in plan.shares for share in shares} == {4}


def test_fewer_query_heads_than_ranks_are_refused():
    with pytest.raises(ValueError, match=r"^ranks 9: must be at most the 8 query heads"):
        assign_heads((1, 1), 8, 9)


def test_a_head_plan_names_the_heads_of_each_rank():
    assert (
        str(assign_heads((10, 10), 4, 2))
        == "rank 0: query heads 0-1 of KV 0; rank 1: query heads 2-3 of KV 1"
    )
