"""The simulator agrees with the closed form and keeps the rules that it states."""

import random
from collections import defaultdict
from dataclasses import replace
from itertools import pairwise

import pytest
from rate_sets import RATES, random_rates

from megatron_s2.offload.model import Load, Rates, limits, predict
from megatron_s2.offload.plan import STATE_BYTES, make_plan
from megatron_s2.offload.simulator import Simulation, auto_plan, simulate
from megatron_s2.offload.trace import QUEUES

SIZE = 2**20
COUNT = 400


def plan_of(fraction=0.0, count=COUNT, **settings):
    return make_plan(count * SIZE, fraction, subgroup_size=SIZE, **settings)


def closed_form(plan, rates: Rates) -> float:
    return predict(rates, Load.of(plan), plan.fraction).update_seconds


# What is slowest, the rates, the fraction, and how the plan is cut. DRAM: both sides the whole time, or one.
FAST = {"cpu": 4e9, "gpu": 400e9, "h2d": 400e9, "d2h": 400e9}
ON_NVME = {"host_budget": 16 * SIZE * 104, "nvme": True}
CASES = {
    "cpu": (FAST | {"cpu": 1e9}, 0.25, {}),
    "cpu, all": (FAST | {"cpu": 1e9}, 0.0, {}),
    "h2d": (FAST | {"h2d": 30e9, "d2h": 200e9}, 0.8, {}),
    "h2d, weights alone": (FAST | {"cpu": 40e9, "h2d": 10e9}, 0.0, {}),
    "d2h": (FAST | {"d2h": 20e9}, 0.7, {}),
    "d2h, streaming": (FAST | {"d2h": 40e9}, 1.0, {}),
    "gpu": (FAST | {"gpu": 5e9}, 0.9, {}),
    "gpu, residents": (FAST | {"cpu": 40e9, "gpu": 5e9}, 0.2, {"gpu_budget": STATE_BYTES * SIZE * 300}),
    "buffers": (FAST | {"gpu": 20e9, "h2d": 240e9, "d2h": 240e9, "cpu": 40e9}, 1.0, {}),
    "buffers, one set": (FAST | {"h2d": 60e9, "d2h": 60e9}, 1.0, {"buffer_sets": 1}),
    "cpu, h2d": ({"cpu": 2e9, "gpu": 80e9, "h2d": 50e9, "d2h": 50e9}, 23 / 35, {}),
    "dram, cpu": (FAST | {"dram": 60e9}, 0.0, {}),
    "dram, cpu and d2h": ({"cpu": 4e9, "gpu": 400e9, "h2d": 400e9, "d2h": 48e9, "dram": 150e9}, 0.5, {}),
    "nvme_read": (FAST | {"nvme_read": 6e9, "nvme_write": 12e9}, 0.5, ON_NVME),
    "nvme_write": (FAST | {"nvme_read": 12e9, "nvme_write": 6e9}, 0.5, ON_NVME),
    "nvme_write, all cpu": (FAST | {"nvme_read": 9e9, "nvme_write": 8e9}, 0.0, ON_NVME),
}


@pytest.mark.parametrize(("name", "case"), CASES.items(), ids=CASES)
def test_constructed_cases_agree_with_the_closed_form(name, case):
    given, fraction, settings = case
    rates, plan = Rates(**given), plan_of(fraction, **settings)
    prediction = predict(rates, Load.of(plan), plan.fraction)
    assert prediction.limits[name.split(",")[0]] == pytest.approx(prediction.update_seconds, rel=2e-3)
    assert simulate(plan, rates).update_seconds == pytest.approx(prediction.update_seconds, rel=0.01)


def test_the_closed_form_is_a_lower_bound_and_met_at_the_best_fraction():
    rng = random.Random(2)
    for _ in range(60):
        rates, plan = random_rates(rng, dram=rng.random() < 0.5), plan_of(rng.random(), count=200)
        assert simulate(plan, rates).update_seconds >= closed_form(plan, rates) * (1 - 1e-9), rates
        links = replace(rates, dram=None)
        auto = auto_plan(plan, links)
        assert simulate(auto, links).update_seconds <= 1.03 * closed_form(auto, links), rates


@pytest.mark.parametrize("dram", [False, True], ids=["links", "links and DRAM"])
def test_auto_is_never_slower_than_the_better_of_all_cpu_and_all_gpu(dram):
    """500 rate sets, half of them with a limit of DRAM."""
    rng = random.Random(3)
    between = 0
    for _ in range(250):
        rates, plan = random_rates(rng, dram), plan_of(count=64)
        auto = auto_plan(plan, rates)
        of_one_side = min(simulate(plan.with_fraction(g), rates).update_seconds for g in (0, 1))
        seconds = simulate(auto, rates).update_seconds
        assert seconds <= 1.02 * of_one_side, rates
        between += seconds < 0.8 * of_one_side
    assert between > 50


def test_no_count_of_subgroups_is_much_better_than_auto():
    rng = random.Random(4)
    for _ in range(20):
        rates, plan = random_rates(rng), plan_of(count=32)
        best = min(simulate(plan.with_fraction(n / 32), rates).update_seconds for n in range(33))
        assert simulate(auto_plan(plan, rates), rates).update_seconds <= 1.03 * best, rates


def test_a_short_backward_exposes_the_rest_of_the_flush_and_the_timeline_begins_with_it():
    plan = plan_of(0.5, count=100)
    flush = 4 * 50 * SIZE / 50e9
    played = simulate(plan, RATES, backward_seconds=flush / 4)
    assert played.exposed_seconds == pytest.approx(flush * 3 / 4)
    assert played.step_seconds == played.exposed_seconds + played.update_seconds
    assert played.update_seconds == simulate(plan, RATES).update_seconds
    assert played.events[0].name in ("backward", "gradients 1")
    gradients = [event for event in played.events if event.name.startswith("gradients")]
    assert sum(event.end - event.start for event in gradients) == pytest.approx(flush)
    updates = [event for event in played.events if event.name.startswith(("update", "state"))]
    assert min(event.start for event in updates) == pytest.approx(flush)
    assert max(event.end for event in played.events) == pytest.approx(flush / 4 + played.step_seconds)
    check_one_at_a_time(played)


def check_one_at_a_time(played: Simulation) -> None:
    for queue in QUEUES:
        of_queue = sorted((e.start, e.end) for e in played.events if e.queue == queue)
        for (_, end), (start, _) in pairwise(of_queue):
            assert start >= end - 1e-9 * played.step_seconds


def held_at_once(spans: list[tuple[float, float]]) -> int:
    edges = sorted((time, change) for start, end in spans for time, change in ((start, 1), (end, -1)))
    most = now = 0
    for _, change in edges:
        now += change
        most = max(most, now)
    return most


@pytest.mark.parametrize("seed", range(20))
def test_the_rules_are_kept(seed):
    """Every subgroup is updated once, after it came and before it goes; slots are not exceeded; nothing is
    faster than its rate."""
    rng = random.Random(seed)
    plan = plan_of(
        rng.random(),
        count=60,
        gpu_budget=rng.choice((0, 7)) * STATE_BYTES * SIZE,
        host_budget=16 * SIZE * rng.randint(4, 70),
        nvme=True,
        buffer_sets=rng.choice((1, 2, 3)),
    )
    rates = Rates(**vars(random_rates(rng, dram=rng.random() < 0.5)) | {"nvme_read": 7e9, "nvme_write": 5e9})
    step = rng.randint(0, 1)
    played = simulate(plan, rates, step=step)
    check_one_at_a_time(played)
    of = defaultdict(dict)
    for event in played.events:
        what, index = event.name.split()
        assert (event.queue, what) not in of[int(index)]
        of[int(index)][event.queue, what] = event
    amounts = {"state": 12, "weights": 2, "gradients": 4, "update": 1}
    late = 1e-9 * played.update_seconds
    reused = [s.index for s in plan.order(step) if s.tier == "nvme"][: plan.ring_slots]
    for subgroup in plan.subgroups:
        events = of[subgroup.index]
        chain = {
            "gpu": [("h2d", "state"), ("gpu", "update"), ("d2h", "state")],
            "cpu": [("cpu", "update"), ("h2d", "weights")],
        }[subgroup.device]
        if subgroup.tier == "gpu":
            chain = [("gpu", "update")]
        elif subgroup.tier == "nvme":
            if subgroup.device == "cpu":
                chain.insert(0, ("d2h", "gradients"))
            if subgroup.index not in reused:
                chain.insert(0, ("nvme_read", "state"))
            chain.append(("nvme_write", "state"))
        assert set(events) == set(chain)
        for before, after in pairwise(chain):
            assert events[before].end <= events[after].start + late
        for (queue, what), event in events.items():
            least = amounts[what] * subgroup.size / getattr(rates, queue)
            assert event.end - event.start >= least * (1 - 1e-6)

    through_gpu = [of[s.index] for s in plan.subgroups if s.device == "gpu" and s.tier != "gpu"]
    buffers = [(e["h2d", "state"].start + late, e["d2h", "state"].end - late) for e in through_gpu]
    assert held_at_once(buffers) <= plan.buffer_sets
    on_nvme = [of[s.index] for s in plan.subgroups if s.tier == "nvme"]
    read = ("nvme_read", "state")
    ring = [(e[read].start + late if read in e else 0, e["nvme_write", "state"].end - late) for e in on_nvme]
    assert held_at_once(ring) <= plan.ring_slots
    assert all(0 < share <= 1 + 1e-9 for share in played.busy.values())


def test_dram_slows_all_that_touch_it_alike():
    # An upload of 12 bytes at 48 GB/s and an update that moves 30 bytes at 4 Gparams/s ask for 168 GB/s.
    rates = Rates(cpu=4e9, gpu=400e9, h2d=48e9, d2h=400e9, dram=84e9)
    plan = make_plan(2 * SIZE, 0.5, subgroup_size=SIZE)
    first = {event.name: event for event in simulate(plan, rates).events if event.start == 0}
    assert first["state 0"].end == pytest.approx(2 * 12 * SIZE / 48e9)
    assert first["update 1"].end == pytest.approx(2 * SIZE / 4e9)


def test_odd_steps_run_down():
    played = simulate(plan_of(count=8), RATES, step=1)
    updated = [event.name for event in played.events if event.queue == "cpu"]
    assert updated == [f"update {n}" for n in range(7, -1, -1)]


def test_the_bottleneck_is_named_with_its_share():
    played = simulate(plan_of(0.1, count=100), RATES)
    assert played.bottleneck == "CPU, busy 100%"
    needed = limits(RATES, Load.of(played.plan), 0.1)
    del needed["buffers"]
    assert played.busy == pytest.approx({name: needed[name] / played.update_seconds for name in needed})


def test_where_dram_slows_the_cpu_dram_is_named():
    # 32 bytes per parameter at 20 GB/s, for a CPU of 2 Gparams/s.
    played = simulate(plan_of(count=100), Rates(cpu=2e9, gpu=80e9, h2d=50e9, d2h=50e9, dram=20e9))
    assert played.bottleneck == "host DRAM, busy 100%"
    assert played.busy["cpu"] == pytest.approx(20 / 32 / 2, rel=0.01)


def test_nvme_without_rates_and_negative_times_are_refused():
    plan = plan_of(count=8, host_budget=16 * SIZE * 5, nvme=True)
    for play in (simulate, auto_plan):
        with pytest.raises(ValueError, match="nvme_read and nvme_write: must be given"):
            play(plan, RATES)
    with pytest.raises(ValueError, match="backward_seconds -1: must be >= 0"):
        simulate(plan_of(count=8), RATES, backward_seconds=-1)


def test_what_is_resident_waits_while_the_gpu_has_other_work():
    # Subgroups 0 and 2 stay on the GPU. While the first is updated, the others are uploaded.
    plan = make_plan(4 * SIZE, 1, subgroup_size=SIZE, gpu_budget=STATE_BYTES * SIZE * 2)
    played = simulate(plan, Rates(cpu=1e9, gpu=1e9, h2d=30e9, d2h=30e9))
    updated = [event.name for event in played.events if event.queue == "gpu"]
    assert updated == ["update 0", "update 1", "update 3", "update 2"]


def test_what_is_resident_needs_no_choice():
    plan = plan_of(count=8, gpu_budget=STATE_BYTES * SIZE * 8)
    assert auto_plan(plan, RATES) == plan
    assert simulate(plan, RATES).update_seconds == pytest.approx(8 * SIZE / 80e9)
