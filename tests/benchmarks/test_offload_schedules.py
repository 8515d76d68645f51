"""Other schedules of optimizer offload are what they are said to be, and compared on equal terms."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))

from benchmarks.offload_schedules import SCHEDULES, compare, every
from megatron_s2.offload.model import Rates
from megatron_s2.offload.plan import GB, STATE_BYTES

RATES = Rates(cpu=2e9, gpu=80e9, h2d=50e9, d2h=50e9)
SIZE = 2**20


def test_with_links_of_50_gb_and_a_cpu_of_2_gparams_ours_beats_stride_2_and_streaming():
    """By hand: ours 1.2 s for 7B; stride 2 leaves the CPU 7/2/2 s; streaming waits for its buffer sets."""
    found = compare(7 * 10**9, RATES)
    ours = found["interleaved"].step_seconds
    assert ours == pytest.approx(1.2, rel=0.01)
    assert found["dos_k2"].step_seconds == pytest.approx(1.75, rel=0.01)
    assert found["streaming"].step_seconds == pytest.approx(7 * (0.24 + 0.0125 + 0.24) / 2, rel=0.01)
    assert found["dos_k2"].step_seconds / ours > 1.4
    assert found["streaming"].step_seconds / ours > 1.4
    assert all(one.step_seconds >= ours for one in found.values())
    assert tuple(found) == SCHEDULES


def test_the_peers_are_what_they_say():
    found = compare(100 * SIZE, RATES, subgroup_size=SIZE, gpu_budget=STATE_BYTES * SIZE * 10)
    ours = found["interleaved"].plan
    assert found["zero_offload"].plan.tiers == (0, 100 * SIZE, 0)
    assert found["zero_offload"].plan.fraction == found["twinflow"].plan.fraction == 0
    assert STATE_BYTES * found["twinflow"].plan.tiers.gpu == ours.gpu_bytes
    assert ours.tiers == (10 * SIZE, 90 * SIZE, 0)
    assert ours.tiers == found["dos_k3"].plan.tiers == found["streaming"].plan.tiers
    assert found["dos_k3"].plan.fraction == pytest.approx(1 / 3)
    assert found["streaming"].plan.fraction == 1
    assert compare(100 * SIZE, RATES, subgroup_size=SIZE, fraction=0.3)["interleaved"].plan.fraction == 0.3


def test_a_host_that_holds_ours_only_beside_the_gpu_is_no_hindrance():
    budgets = {"gpu_budget": STATE_BYTES * SIZE * 50, "host_budget": 16 * SIZE * 50}
    found = compare(100 * SIZE, RATES, subgroup_size=SIZE, **budgets)
    assert found["interleaved"].plan.host_bytes == budgets["host_budget"]
    assert found["zero_offload"].plan.host_bytes == 16 * SIZE * 100


def test_only_zero_offload_and_twinflow_flush_after_backward():
    found = compare(100 * SIZE, RATES, subgroup_size=SIZE, backward_seconds=10)
    flush = 4 * 100 * SIZE / 50e9
    assert found["zero_offload"].exposed_seconds == pytest.approx(flush)
    assert found["twinflow"].exposed_seconds == pytest.approx(flush * 0.98)
    for name in set(SCHEDULES) - {"zero_offload", "twinflow"}:
        assert found[name].exposed_seconds == 0
    assert found["dos_k2"].flush_seconds == pytest.approx(flush / 2)
    assert found["streaming"].flush_seconds == 0


def test_stride_k_is_the_last_of_every_k():
    assert every(7, 3) == [False, False, True, False, False, True, False]
    with pytest.raises(ValueError, match="stride 0: must be >= 1"):
        every(4, 0)


def test_a_budget_that_cannot_hold_the_state_is_refused():
    with pytest.raises(ValueError, match="--s2-offload-host-budget-gb 1: the host must hold"):
        compare(10**9, RATES, host_budget=GB)
