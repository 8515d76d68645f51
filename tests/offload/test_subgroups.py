"""The plan: subgroups partition the state, budgets hold to the byte, the GPU's share is spread evenly."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_s2.offload.plan import (
    ALIGNMENT,
    GB,
    HOST_BYTES,
    STATE_BYTES,
    make_plan,
    spread,
)

sizes = st.integers(1, 40).map(lambda n: n * ALIGNMENT)
elements = st.integers(1, 20_000)
fractions = st.floats(0, 1)


@given(elements, sizes, fractions)
def test_subgroups_partition_the_state(elements, size, fraction):
    plan = make_plan(elements, fraction, subgroup_size=size)
    assert [s.index for s in plan.subgroups] == list(range(len(plan.subgroups)))
    assert plan.subgroups[0].start == 0
    assert all(s.stop == after.start for s, after in zip(plan.subgroups, plan.subgroups[1:]))
    assert plan.elements == plan.subgroups[-1].stop == elements
    assert all(s.start % ALIGNMENT == 0 for s in plan.subgroups)
    assert {s.size for s in plan.subgroups[:-1]} <= {size}
    assert 0 < plan.subgroups[-1].size <= size


@given(st.integers(1, 200).flatmap(lambda n: st.tuples(st.just(n), st.integers(0, n))), st.data())
def test_spread_is_even_in_every_window(places_and_count, data):
    places, count = places_and_count
    marks = spread(places, count)
    assert len(marks) == places and sum(marks) == count
    length = data.draw(st.integers(0, places))
    for start in range(places - length + 1):
        in_window = sum(marks[start : start + length])
        assert places * in_window > length * count - places
        assert places * in_window < length * count + places


@given(elements, sizes, fractions)
def test_a_fraction_is_met_to_half_a_subgroup_and_evenly(elements, size, fraction):
    plan = make_plan(elements, fraction, subgroup_size=size)
    on_gpu = [s.device == "gpu" for s in plan.subgroups]
    assert abs(sum(on_gpu) - fraction * len(on_gpu)) <= 0.5
    assert on_gpu == spread(len(on_gpu), sum(on_gpu))


@given(elements, sizes, st.integers(0, 300_000))
def test_the_gpu_budget_is_used_to_the_last_subgroup_and_not_beyond(elements, size, budget):
    plan = make_plan(elements, subgroup_size=size, gpu_budget=budget)
    resident = STATE_BYTES * plan.tiers.gpu
    assert resident <= budget
    assert plan.tiers.streamed == 0 or resident + 2 * STATE_BYTES * size > budget
    assert (plan.tiers.streamed == 0) == (budget >= STATE_BYTES * elements)
    assert plan.gpu_bytes == resident + 2 * STATE_BYTES * plan.slot_elements
    assert {s.device for s in plan.subgroups if s.tier == "gpu"} <= {"gpu"}


@given(elements, sizes, st.integers(0, 400_000), st.integers(0, 300_000), fractions)
def test_the_host_budget_holds_at_every_fraction_or_is_refused_with_the_numbers(
    elements, size, budget, gpu_budget, fraction
):
    settings = {"subgroup_size": size, "gpu_budget": gpu_budget}
    try:
        plan = make_plan(elements, host_budget=budget, nvme=True, **settings)
    except ValueError as refused:
        needed = 4 * HOST_BYTES * min(size, elements)
        assert str(refused).startswith(f"--s2-offload-host-budget-gb {budget / GB:g}: a ring of 4 subgroups")
        assert budget < needed
        return
    assert plan.host_bytes <= budget
    assert plan.with_fraction(fraction).host_bytes == plan.host_bytes
    assert sum(plan.tiers) == elements
    all_on_host = make_plan(elements, **settings).host_bytes
    if plan.tiers.nvme:
        one_more = HOST_BYTES * size
        assert all_on_host > budget
        assert plan.host_bytes + 2 * one_more > budget
    else:
        assert plan.host_bytes == all_on_host


@given(elements, sizes, st.integers(0, 400_000))
def test_without_nvme_the_host_holds_all_or_refuses(elements, size, budget):
    needed = HOST_BYTES * elements
    if needed <= budget:
        assert make_plan(elements, subgroup_size=size, host_budget=budget).host_bytes == needed
    else:
        with pytest.raises(ValueError, match="--s2-offload-nvme-dir"):
            make_plan(elements, subgroup_size=size, host_budget=budget)


@given(elements, sizes, fractions, fractions, st.integers(0, 100_000))
def test_another_fraction_changes_devices_alone(elements, size, fraction, other, gpu_budget):
    plan = make_plan(elements, fraction, subgroup_size=size, gpu_budget=gpu_budget)
    changed = plan.with_fraction(other)
    assert changed == make_plan(elements, other, subgroup_size=size, gpu_budget=gpu_budget)
    assert [(s.start, s.stop, s.tier) for s in changed.subgroups] == [
        (s.start, s.stop, s.tier) for s in plan.subgroups
    ]


def test_tiers_fill_from_the_fastest_and_mix():
    # Of 100 subgroups the budgets hold exactly 25 on the GPU and 50, with the ring, on the host.
    state, both = 64 * STATE_BYTES, 64 * HOST_BYTES
    plan = make_plan(
        6400, 0.5, subgroup_size=64, gpu_budget=25 * state, host_budget=(50 + 4) * both, nvme=True
    )
    assert plan.tiers == (25 * 64, 50 * 64, 25 * 64)
    assert (plan.gpu_bytes, plan.host_bytes, plan.nvme_bytes) == (27 * state, 54 * both, 25 * state)
    for tier, count in (("gpu", 25), ("host", 50), ("nvme", 25)):
        in_tenths = [sum(s.tier == tier for s in plan.subgroups[i : i + 10]) for i in range(0, 100, 10)]
        assert sum(in_tenths) == count and max(in_tenths) - min(in_tenths) <= 1, tier


def test_the_default_subgroup_is_96_mib_of_state():
    assert STATE_BYTES * make_plan(10**9).slot_elements == 96 * 2**20


def test_steps_go_up_and_down_in_turn():
    plan = make_plan(1000, subgroup_size=128)
    assert [s.index for s in plan.order(0)] == list(range(8))
    assert plan.order(1) == plan.order(0)[::-1]
    assert plan.order(2) == plan.order(0)


def test_the_plan_reads_as_a_table():
    plan = make_plan(1_000_000, 0.3, subgroup_size=100_032, gpu_budget=2_500_000)
    assert str(plan) == (
        "1000000 parameters in 10 subgroups of 100032; the GPU updates 25.0% of those not resident on it\n"
        "  gpu   2 subgroups, 0.002 GB of state; 2 updated on the GPU, 0 on the CPU\n"
        "  host  8 subgroups, 0.010 GB of state; 2 updated on the GPU, 6 on the CPU\n"
        "  memory: 0.005 GB on the GPU, 0.013 GB on the host"
    )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"elements": 0}, "elements 0: must be >= 1"),
        ({"fraction": 1.5}, "--s2-offload-gpu-fraction 1.5: must be between 0 and 1"),
        ({"fraction": float("nan")}, "--s2-offload-gpu-fraction nan: must be between 0 and 1"),
        ({"subgroup_size": 100}, "--s2-offload-subgroup-size 100: must be a multiple of 64"),
        ({"subgroup_size": 0}, "--s2-offload-subgroup-size 0: must be a multiple of 64"),
        ({"gpu_budget": -GB}, "--s2-offload-gpu-budget-gb -1: must be >= 0"),
        ({"buffer_sets": 0}, "buffer_sets 0: must be >= 1"),
        ({"ring_slots": 0}, "ring_slots 0: must be >= 1"),
        (
            {"elements": 10**9, "host_budget": 10 * GB},
            "--s2-offload-host-budget-gb 10: the host must hold 16.000 GB (1000000000 parameters of 16 "
            "bytes); raise it, raise --s2-offload-gpu-budget-gb, or name a directory with "
            "--s2-offload-nvme-dir",
        ),
        (
            {"elements": 10**9, "host_budget": GB // 2, "nvme": True},
            "--s2-offload-host-budget-gb 0.5: a ring of 4 subgroups of 8388608 parameters takes 0.537 GB; "
            "raise it, or lower --s2-offload-subgroup-size",
        ),
    ],
    ids=lambda value: None if isinstance(value, str) else "-".join(f"{k}={v}" for k, v in value.items()),
)
def test_what_cannot_be_is_refused(settings, message):
    with pytest.raises(ValueError) as refused:
        make_plan(**{"elements": 1000} | settings)
    assert str(refused.value) == message


def test_devices_are_given_for_each_streamed_subgroup():
    plan = make_plan(1000, subgroup_size=128, gpu_budget=128 * STATE_BYTES)
    with pytest.raises(ValueError, match="on_gpu has 8 entries: must have 7"):
        plan.with_devices([True] * 8)
    with pytest.raises(ValueError, match="count 5: must be between 0 and 4"):
        spread(4, 5)
