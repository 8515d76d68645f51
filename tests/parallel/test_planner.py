"""The planner: bytes equal those of the index plans, work is exact and balanced, choices have reasons."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_layouts import patterns, zigzags

from megatron_s2.parallel import planner
from megatron_s2.parallel.cost import (
    SCHEDULES,
    AttentionCall,
    ExchangeBytes,
    exchange_bytes,
    key_value_tokens,
    pair_counts,
    plan_heads,
    query_tokens,
    transfers,
)
from megatron_s2.parallel.gather_plan import GROUP_TOKENS, plan_gather
from megatron_s2.parallel.planner import choose, plan_layer, plan_model, time_text
from megatron_s2.parallel.time_model import Cluster
from megatron_s2.pattern import S2Pattern, S2Settings
from megatron_s2.pattern.block_pattern import attention_flops

MIB = 2**20
# 128K tokens on 8 ranks, 32/8 heads of 128 in bf16, window 1024 tokens, stride 8.
PATTERN = S2Pattern(num_kv_heads=8, block_size=64, local_blocks=16, vert_stride=8)
CALL = AttentionCall(
    ranks=8, tokens=131072, batch=1, query_heads=32, head_dim=128, v_head_dim=128, element_size=2
)


@st.composite
def calls(draw) -> tuple[S2Pattern, AttentionCall]:
    pattern, zigzag = draw(patterns()), draw(zigzags())
    sizes = {name: draw(st.integers(1, 3)) for name in ("batch", "head_dim", "v_head_dim", "element_size")}
    heads = pattern.num_kv_heads * draw(st.integers(1, 4))
    sizes["group_tokens"] = draw(st.sampled_from([1, zigzag.tokens, GROUP_TOKENS]))
    return pattern, AttentionCall(zigzag.ranks, zigzag.tokens, query_heads=heads, **sizes)


def gather_plans(pattern: S2Pattern, call: AttentionCall) -> list:
    zigzag = call.zigzag
    documents = ((0, zigzag.tokens),)
    return [plan_gather(pattern, zigzag, rank, documents, call.group_tokens) for rank in range(zigzag.ranks)]


def without(values, rank: int) -> int:
    return sum(value for other, value in enumerate(values) if other != rank)


# ---------------------------------------------------------------------------------------------------------
# bytes


@given(calls())
@settings(max_examples=200)
def test_gather_moves_the_bytes_of_its_index_plans(case):
    pattern, call = case
    for rank, plan in enumerate(gather_plans(pattern, call)):
        token = plan.unit * call.batch * (call.head_dim + call.v_head_dim) * call.element_size
        shards = (call.ranks - 1) * plan.width * token
        received = shards + token * pattern.num_kv_heads * without(plan.recv_counts, rank)
        sent = shards + token * pattern.num_kv_heads * without(plan.send_counts, rank)
        assert exchange_bytes("gather", pattern, call, rank) == ExchangeBytes(
            received, sent, backward_received=sent, backward_sent=received
        )


def test_a_pattern_for_each_query_head_costs_copies_only_in_our_schedules():
    """Of shards with different phases it moves the union, once; ring and all-gather move KV heads."""
    of_query_heads = S2Pattern(32, 64, 16, 8, phases=tuple((h + 1) % 8 for h in range(32)))
    call = replace(CALL, kv_group=4)
    for schedule in ("ring", "all_gather"):
        assert exchange_bytes(schedule, of_query_heads, call, 0) == exchange_bytes(schedule, PATTERN, CALL, 0)
        assert (
            key_value_tokens(schedule, of_query_heads, call).tolist()
            == key_value_tokens(schedule, PATTERN, CALL).tolist()
        )
    shards = {
        pattern: transfers("gather", pattern, of_call).gathered
        for pattern, of_call in ((PATTERN, CALL), (of_query_heads, call))
    }
    assert shards[of_query_heads] == pytest.approx(4 * shards[PATTERN], rel=0.02)

    settings = S2Settings(2, 8, 64, 16, 8, phases=of_query_heads.phases, dense_layer_freq=2, pattern_heads=32)
    sizes = {"seq_length": 16384, "head_dim": 128, "context_parallel": 4, "tensor_parallel": 2}
    plan = plan_model(settings, num_attention_heads=32, **sizes)
    patterns = {group.layers: group.plan.pattern.num_kv_heads for group in plan.groups}
    assert patterns == {(1,): 16, (2,): 4}
    with pytest.raises(ValueError, match="pattern_heads 32: must be the 64 query heads of the model"):
        plan_model(settings, num_attention_heads=64, **sizes)


@given(calls(), st.booleans())
def test_window_only_heads_move_only_halos(case, has_sinks):
    pattern, call = case
    pattern = replace(pattern, vert_stride=0, num_dense_heads=0, sink_blocks=int(has_sinks))
    for rank, plan in enumerate(gather_plans(pattern, call)):
        halo = call.key_value_bytes * pattern.num_kv_heads * plan.unit * without(plan.recv_counts, rank)
        gathered = (call.ranks - 1) * plan.width * plan.unit * call.key_value_bytes
        assert exchange_bytes("gather", pattern, call, rank).forward_received == halo + gathered
        assert plan.width * plan.unit <= has_sinks * pattern.num_kv_heads * pattern.block_size


def a2a_from_to(pattern: S2Pattern, call: AttentionCall) -> tuple[np.ndarray, np.ndarray]:
    """`[from, to]` bytes: queries, keys and values of the receiver's heads; outputs of the sender's heads."""
    plan, ranks = plan_heads(pattern, call), range(call.ranks)
    token = call.tokens // call.ranks * call.batch * call.element_size
    inputs = [
        sum((s.stop - s.start) * call.head_dim + call.head_dim + call.v_head_dim for s in plan.shares[to])
        for to in ranks
    ]
    outputs = [sum(s.stop - s.start for s in plan.shares[source]) * call.v_head_dim for source in ranks]
    others = token * (1 - np.eye(call.ranks, dtype=int))
    return others * np.array(inputs)[None, :], others * np.array(outputs)[:, None]


@given(calls().filter(lambda case: case[1].query_heads >= case[1].ranks))
def test_a2a_moves_queries_keys_values_and_outputs_of_each_ranks_heads(case):
    pattern, call = case
    there, back = a2a_from_to(pattern, call)
    for rank in range(call.ranks):
        received = (there[:, rank] + back[:, rank]).sum()
        sent = (there[rank] + back[rank]).sum()
        assert exchange_bytes("a2a", pattern, call, rank) == ExchangeBytes(received, sent, sent, received)


@given(calls())
def test_ring_and_all_gather_move_all_keys_and_values_and_in_the_backward_their_gradients_too(case):
    pattern, call = case
    heads, dims = pattern.num_kv_heads, call.head_dim + call.v_head_dim
    others = call.tokens - call.tokens // call.ranks
    moved = call.batch * heads * dims * others * call.element_size
    for schedule in ("ring", "all_gather"):
        assert exchange_bytes(schedule, pattern, call, 0) == ExchangeBytes(moved, moved, 2 * moved, 2 * moved)


@given(calls(), st.integers(1, 5))
def test_bytes_within_and_between_nodes_are_counted_by_the_node_of_the_peer(case, node_ranks):
    pattern, call = case
    node = np.arange(call.ranks) // node_ranks
    same = node[:, None] == node[None, :]
    plans = gather_plans(pattern, call)
    unit = plans[0].unit * call.key_value_bytes * pattern.num_kv_heads
    cases = {"gather": unit * np.array([plan.send_counts for plan in plans])}
    if call.query_heads >= call.ranks:
        cases["a2a"] = sum(a2a_from_to(pattern, call))
    for schedule, from_to in cases.items():
        others = from_to * (1 - np.eye(call.ranks, dtype=int))
        moved = transfers(schedule, pattern, call, node_ranks)
        for link, over_link in enumerate((others * same, others * ~same)):
            assert moved.received[link].tolist() == over_link.sum(axis=0).tolist()
            assert moved.sent[link].tolist() == over_link.sum(axis=1).tolist()


@pytest.mark.parametrize(
    ("schedule", "most_mib"), [("gather", 63.5), ("a2a", 280), ("ring", 448), ("all_gather", 448)]
)
def test_a_long_sequence_on_eight_ranks(schedule, most_mib):
    received = [exchange_bytes(schedule, PATTERN, CALL, rank).forward_received for rank in range(8)]
    assert max(received) == most_mib * MIB


def test_other_schedules_and_uneven_groups_are_refused():
    with pytest.raises(ValueError, match=r"^schedule tree: must be one of gather, a2a, ring, all_gather$"):
        exchange_bytes("tree", PATTERN, CALL, 0)
    with pytest.raises(ValueError, match=r"^query_heads 12: must be a multiple of the 8 KV heads$"):
        exchange_bytes("gather", PATTERN, replace(CALL, query_heads=12), 0)


@pytest.mark.parametrize("field", list(AttentionCall.__dataclass_fields__))
def test_a_call_has_positive_sizes(field):
    with pytest.raises(ValueError, match=f"^{field} 0: must be >= 1$"):
        replace(CALL, **{field: 0})


# ---------------------------------------------------------------------------------------------------------
# work and memory


@given(calls())
def test_work_is_the_visible_pairs_of_each_ranks_queries(case):
    pattern, call = case
    no_shard = {"vert_stride": 10**6, "phases": (1,) * pattern.num_kv_heads}
    window = replace(pattern, **no_shard, sink_blocks=0, num_dense_heads=0, warn_lost=False)
    counts = pair_counts("gather", pattern, call)
    heads = call.batch * call.query_heads // pattern.num_kv_heads
    for rank in range(call.ranks):
        for which, counted in ((pattern, counts.pairs), (window, counts.window_pairs)):
            chunks = call.zigzag.chunks(rank)
            pairs = sum(sum(which.visible_pairs(b)) - sum(which.visible_pairs(a)) for a, b in chunks)
            assert counted[rank] == heads * pairs


@given(calls().filter(lambda case: case[1].query_heads >= case[1].ranks))
def test_every_schedule_computes_the_same_pairs(case):
    pattern, call = case
    totals = {int(pair_counts(schedule, pattern, call).pairs.sum()) for schedule in SCHEDULES}
    heads = call.query_heads // pattern.num_kv_heads
    assert totals == {call.batch * heads * sum(pattern.visible_pairs(call.tokens))}


@given(calls())
def test_gather_holds_its_own_keys_the_shards_and_the_halos(case):
    pattern, call = case
    held = key_value_tokens("gather", pattern, call)
    for rank, plan in enumerate(gather_plans(pattern, call)):
        own_and_halo = call.zigzag.local_tokens + sum(plan.halo) * plan.unit
        gathered = sum(group.unpack.size for group in plan.groups)
        assert held[rank] == pattern.num_kv_heads * own_and_halo + gathered * plan.unit


def test_a2a_holds_the_whole_sequence_of_its_heads():
    plan = plan_heads(PATTERN, CALL)
    tokens = [CALL.tokens * len(plan.kv_heads(rank)) for rank in range(8)]
    assert key_value_tokens("a2a", PATTERN, CALL).tolist() == tokens
    assert query_tokens("a2a", PATTERN, CALL).tolist() == [CALL.tokens * 4] * 8
    assert query_tokens("gather", PATTERN, CALL).tolist() == [CALL.tokens // 8 * 32] * 8


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 16, 64])
@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"num_dense_heads": 2},
        {"sink_blocks": 4},
        {"vert_stride": 16, "layer": 1},
        {"vert_stride": (8, 16, 32, 8, 16, 32, 4, 1)},
    ],
    ids=str,
)
def test_zigzag_is_even(fields, ranks):
    pattern = replace(PATTERN, **fields)
    call = replace(CALL, ranks=ranks, tokens=384 * 1024)
    assert pair_counts("gather", pattern, call).imbalance <= 1.02


# ---------------------------------------------------------------------------------------------------------
# time and choice

# 1 GB/s within nodes of two ranks, half of that between them, 10**9 FLOP/s.
SLOW = Cluster(
    gpus_per_node=2,
    intra_gigabytes_per_s=1.0,
    inter_gigabytes_per_s=0.5,
    chip_tflops=0.002,
    efficiency=0.5,
)
SMALL = S2Pattern(num_kv_heads=4, block_size=16, local_blocks=2, vert_stride=4)
SMALL_CALL = AttentionCall(
    ranks=4, tokens=1024, batch=1, query_heads=4, head_dim=8, v_head_dim=8, element_size=2
)


def seconds_of(schedule: str, cluster: Cluster) -> tuple[float, float]:
    plan = plan_layer(SMALL, SMALL_CALL, cluster).schedules[schedule]
    return plan.forward_seconds, plan.backward_seconds


def compute_seconds(pairs: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Forward and backward, by rank, at 10**9 FLOP/s."""
    return tuple(np.array([attention_flops(int(n), 8)[way] for n in pairs]) / 1e9 for way in (0, 1))


FAST_LINKS = replace(SLOW, intra_gigabytes_per_s=1e12, inter_gigabytes_per_s=1e12)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_transfers_a_step_takes_the_time_of_its_flops(schedule):
    expected = [one.max() for one in compute_seconds(pair_counts(schedule, SMALL, SMALL_CALL).pairs)]
    assert seconds_of(schedule, FAST_LINKS) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("shards", ["outlast the windows", "arrive earlier"])
def test_gather_waits_for_halos_and_for_shards_that_the_windows_do_not_hide(shards):
    faster = 1000 if shards == "outlast the windows" else 1  # the chip
    counts = pair_counts("gather", SMALL, SMALL_CALL)
    everything, windows = (
        np.array(compute_seconds(pairs)) / faster for pairs in (counts.pairs, counts.window_pairs)
    )
    moved = transfers("gather", SMALL, SMALL_CALL, node_ranks=2)
    between = np.maximum(moved.received, moved.sent)
    halos = between[0] / 1e9 + between[1] / 0.5e9
    # Two of the four parts come from the other node. In an all-gather each of two ranks fetches one of them
    # and passes it on; in an all-to-all, which the backward has, it fetches both.
    part = moved.gathered
    shards_take = ((part + part) / 1e9 + part / 0.5e9, part / 1e9 + 2 * part / 0.5e9)
    assert all((take > window.max()) == (faster > 1) for take, window in zip(shards_take, windows))
    expected = [
        (halos + np.maximum(take, window) + whole - window).max()
        for take, window, whole in zip(shards_take, windows, everything)
    ]
    cluster = replace(SLOW, chip_tflops=faster * SLOW.chip_tflops)
    assert seconds_of("gather", cluster) == pytest.approx(expected)


def test_a2a_waits_for_the_larger_of_the_bytes_received_and_sent():
    pattern = replace(SMALL, num_kv_heads=3, num_dense_heads=1)
    call = replace(SMALL_CALL, ranks=2, tokens=480, query_heads=9)
    moved = transfers("a2a", pattern, call, node_ranks=2)
    received, sent = (way.sum(axis=0) for way in (moved.received, moved.sent))
    attention = compute_seconds(pair_counts("a2a", pattern, call).pairs)
    expected = [(np.maximum(received, sent) / 1e9 + one).max() for one in attention]
    assert all((received / 1e9 + one).max() < both for one, both in zip(attention, expected))
    plan = plan_layer(pattern, call, SLOW).schedules["a2a"]
    assert [plan.forward_seconds, plan.backward_seconds] == pytest.approx(expected)


def test_a_ring_hides_its_bytes_and_goes_at_the_pace_of_the_slowest_link():
    attention = [one.max() for one in compute_seconds(pair_counts("ring", SMALL, SMALL_CALL).pairs)]
    assert seconds_of("ring", SLOW) == pytest.approx(attention)
    around = exchange_bytes("ring", SMALL, SMALL_CALL, 0)
    two_nodes = replace(SLOW, chip_tflops=1000 * SLOW.chip_tflops)
    expected = [count / 0.5e9 for count in (around.forward_received, around.backward_received)]
    assert seconds_of("ring", two_nodes) == pytest.approx(expected)
    one_node = replace(two_nodes, gpus_per_node=4)
    assert seconds_of("ring", one_node) == pytest.approx([seconds / 2 for seconds in expected])


def test_tensor_parallel_ranks_stand_between_context_parallel_ones():
    assert [Cluster(gpus_per_node=8).node_ranks(size) for size in (1, 2, 4, 8, 16)] == [8, 4, 2, 1, 1]
    together, apart = (
        plan_layer(PATTERN, CALL, tensor_parallel=size).schedules["a2a"].seconds for size in (1, 8)
    )
    assert apart > together


@pytest.mark.parametrize("field", list(Cluster.__dataclass_fields__))
def test_rates_are_positive(field):
    with pytest.raises(ValueError, match=f"^{field} 0: must be positive$"):
        replace(Cluster(), **{field: 0})


def test_no_chip_exceeds_its_peak():
    with pytest.raises(ValueError, match=r"^efficiency 1.5: must be at most 1$"):
        Cluster(efficiency=1.5)


def test_auto_chooses_the_faster_schedule_and_says_by_how_much():
    plan = plan_layer(PATTERN, CALL)
    gather, a2a = (plan.schedules[name] for name in ("gather", "a2a"))
    assert plan.choice.schedule == "gather" and gather.seconds < a2a.seconds
    assert plan.choice.why == (
        f"{time_text(gather.seconds)} predicted for forward and backward against {time_text(a2a.seconds)} of "
        "a2a, which receives 280.0 MiB"
    )
    assert str(plan) == f"gather (63.5 MiB received in the forward): {plan.choice.why}"


def test_auto_chooses_a2a_if_shards_are_large():
    choice = choose("auto", replace(PATTERN, vert_stride=1), replace(CALL, ranks=16), Cluster())
    assert choice.schedule == "a2a"


@pytest.mark.parametrize("asked", ["gather", "a2a"])
def test_a_given_schedule_is_chosen(asked):
    choice = choose(asked, PATTERN, CALL)
    assert choice.schedule == asked
    assert choice.why.startswith("as asked; ")


def test_fewer_heads_than_ranks_leave_only_gather():
    call = replace(CALL, query_heads=8, ranks=16)
    plan = plan_layer(PATTERN, call, tensor_parallel=4)
    assert plan.schedules["a2a"] is None
    few = "a2a cannot give 8 query heads of a tensor-parallel rank to 16 ranks"
    assert plan.choice == ("gather", few)
    assert choose("gather", PATTERN, call).why == f"as asked; {few}"
    with pytest.raises(ValueError) as refused:
        choose("a2a", PATTERN, call, tensor_parallel=4)
    assert str(refused.value) == (
        "--s2-cp-schedule a2a: must be auto or gather where --context-parallel-size 16 is larger than the 8 "
        "query heads of a tensor-parallel rank (--num-attention-heads 32 over --tensor-model-parallel-size 4)"
    )


def test_schedules_for_comparison_cannot_be_chosen():
    with pytest.raises(ValueError, match=r"^--s2-cp-schedule ring: must be one of auto, gather, a2a$"):
        choose("ring", PATTERN, CALL)


@pytest.mark.parametrize("schedule", ["auto", "gather", "a2a"])
def test_the_batch_does_not_change_the_choice(schedule):
    chosen = {
        batch: [
            choose(schedule, pattern, replace(CALL, ranks=16, tokens=tokens, batch=batch)).schedule
            for pattern in (replace(PATTERN, vert_stride=1), PATTERN)
            for tokens in (2**14, 2**17)
        ]
        for batch in (1, 3, 8)
    }
    assert chosen[1] == chosen[3] == chosen[8]
    assert set(chosen[1]) == ({"gather", "a2a"} if schedule == "auto" else {schedule})


def test_a_choice_is_made_once(monkeypatch):
    before = choose("auto", PATTERN, CALL)
    monkeypatch.setattr(planner, "plan_schedule", None)
    assert choose("auto", PATTERN, CALL) == before


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(2.5, "2.50 s"), (0.01234, "12.3 ms"), (0.18, "180 ms"), (0.013, "13.0 ms"), (4.19e-6, "4.19 us")],
)
def test_times_have_three_digits(seconds, text):
    assert time_text(seconds) == text


# ---------------------------------------------------------------------------------------------------------
# a model


def a_model(**changes):
    fields = {"num_layers": 8, "num_kv_heads": 8, "local_blocks": 16, "vert_stride": 16}
    whole = {"seq_length": 131072, "num_attention_heads": 32, "head_dim": 128, "context_parallel": 8}
    given_settings = {
        name: changes.pop(name) for name in list(changes) if hasattr(S2Settings, name) or name in fields
    }
    return plan_model(S2Settings(**fields | given_settings), **whole | changes)


def test_layers_with_equal_plans_are_grouped():
    plan = a_model(dense_layers=(1, 5))
    assert [group.layers for group in plan.groups] == [(1, 5), (2, 4, 7), (3, 6, 8)]
    assert [group.dense for group in plan.groups] == [True, False, False]
    strides = [set(group.plan.pattern.strides) for group in plan.groups]
    assert strides == [{1}, {16}, {16}]


def test_the_slowest_tensor_parallel_rank_counts():
    plan = a_model(num_dense_heads=2, tensor_parallel=4)
    (group,) = plan.groups
    assert group.plan.pattern.strides == (1, 1)  # the last two of eight heads, both dense
    assert group.plan.call.query_heads == 8


def test_time_is_summed_over_the_layers():
    plan = a_model(dense_layers=(1, 5))
    chosen = sum(len(group.layers) * group.plan.chosen.seconds for group in plan.groups)
    assert plan.seconds() == pytest.approx(chosen)
    ring = sum(len(group.layers) * group.plan.schedules["ring"].seconds for group in plan.groups)
    assert plan.seconds("ring") == pytest.approx(ring)
    assert a_model(context_parallel=64, tensor_parallel=1).seconds("a2a") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seq_length": 1000}, "--seq-length 1000: must be a multiple of 16 (2 x --context-parallel-size)"),
        ({"seq_length": 0}, "--seq-length 0: must be >= 1"),
        (
            {"num_attention_heads": 36},
            "--num-attention-heads 36: must be a multiple of 8 (--num-query-groups)",
        ),
        (
            {"tensor_parallel": 3},
            "--num-attention-heads 32: must be a multiple of 3 (--tensor-model-parallel-size)",
        ),
        (
            {"tensor_parallel": 6, "num_attention_heads": 24},
            "--num-query-groups 8: must be a multiple or a divisor of 6 (--tensor-model-parallel-size)",
        ),
        ({"context_parallel": 0}, "--context-parallel-size 0: must be >= 1"),
        ({"micro_batch": 0}, "--micro-batch-size 0: must be >= 1"),
        ({"num_layers": 0}, "--num-layers 0: must be >= 1"),
        ({"head_dim": -8}, "--kv-channels -8: must be >= 1"),
        ({"element_size": 0}, "--bytes-per-element 0: must be >= 1"),
    ],
    ids=str,
)
def test_values_that_do_not_fit_are_refused_by_flag(changes, message):
    with pytest.raises(ValueError) as refused:
        a_model(**changes)
    assert str(refused.value) == message


def test_four_thousand_ranks_need_little_memory():
    """Per-token arrays of a million tokens and 128 heads would take a gigabyte."""
    tracemalloc.start()
    try:
        plan = a_model(
            seq_length=2**23, context_parallel=4096, num_kv_heads=128, num_attention_heads=128, vert_stride=64
        )
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert plan.groups[0].plan.chosen.imbalance <= 1.02
    assert peak < 64 * MIB
