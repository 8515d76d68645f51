"""The performance model against hand-worked numbers, and its best fraction against every other."""

import math
import random

import pytest
from rate_sets import PARAMS, RATES, random_rates

from megatron_s2.offload.model import Load, Rates, best_fraction, limits, predict
from megatron_s2.offload.plan import make_plan


def test_each_limit_is_the_formula():
    load = Load(host=PARAMS, gpu=PARAMS // 10)
    rates = Rates(cpu=2e9, gpu=80e9, h2d=50e9, d2h=40e9, dram=200e9)
    assert limits(rates, load, 0.25) == pytest.approx(
        {
            "cpu": 0.75 / 2,
            "h2d": (2 * 0.75 + 12 * 0.25) / 50,
            "d2h": 12 * 0.25 / 40,
            "gpu": (0.1 + 0.25) / 80,
            "buffers": 0.25 * (12 / 50 + 1 / 80 + 12 / 40) / 2,
            "dram": (32 * 0.75 + 24 * 0.25) / 200,
        }
    )


def test_nvme_is_read_and_written_once_and_its_gradients_come_late():
    load = Load(host=PARAMS, nvme=PARAMS, reused=PARAMS // 5)
    rates = Rates(cpu=2e9, gpu=80e9, h2d=50e9, d2h=40e9, dram=200e9, nvme_read=6e9, nvme_write=5e9)
    found = limits(rates, load, 0.25)
    assert found["nvme_read"] == pytest.approx(12 * 0.8 / 6)
    assert found["nvme_write"] == pytest.approx(12 / 5)
    assert found["d2h"] == pytest.approx((12 * 0.5 + 4 * 0.75) / 40)
    # 26 of state and weights, 4 of the gradient, 2 of weights sent; state up and down; NVMe both ways.
    assert found["dram"] == pytest.approx((32 * 1.5 + 24 * 0.5 + 12 * 1.8 + 4 * 0.75) / 200)


def test_the_load_of_a_plan_counts_its_tiers_and_what_the_ring_keeps():
    plan = make_plan(6400, subgroup_size=64, gpu_budget=640 * 12, host_budget=16 * 64 * 24, nvme=True)
    assert Load.of(plan) == Load(host=20 * 64, gpu=640, nvme=70 * 64, reused=4 * 64)
    assert Load.of(make_plan(6400)) == Load(host=6400)


def test_with_links_of_50_gb_and_a_cpu_of_2_gparams_cpu_and_upload_balance():
    # (1 - g) / 2 = (2 + 10 g) / 50
    assert best_fraction(RATES, Load(host=PARAMS)) == pytest.approx(23 / 35)
    prediction = predict(RATES, Load(host=7 * PARAMS), 23 / 35)
    assert prediction.update_seconds == pytest.approx(1.2)
    assert prediction.bottleneck in (
        "host to GPU limits the update to 1.2 s, then CPU with 1.2 s",
        "CPU limits the update to 1.2 s, then host to GPU with 1.2 s",
    )


def test_the_bottleneck_names_what_is_slowest():
    assert predict(RATES, Load(host=7 * PARAMS), 0.5).bottleneck == (
        "CPU limits the update to 1.75 s, then host to GPU with 0.98 s"
    )


def test_no_other_fraction_is_better():
    rng = random.Random(1)
    inside = 0
    for _ in range(300):
        rates = random_rates(rng)
        load = Load(host=PARAMS, gpu=rng.choice((0, PARAMS // 3)))
        best = best_fraction(rates, load)
        seconds = predict(rates, load, best).update_seconds
        for other in (*(n / 64 for n in range(65)), best - 1e-4, best + 1e-4):
            if 0 <= other <= 1:
                assert seconds <= predict(rates, load, other).update_seconds * (1 + 1e-9), (rates, other)
        inside += 0 < best < 1
    assert inside > 100


def test_of_equally_good_fractions_the_middle_is_taken():
    # NVMe takes 12 s whatever the fraction; the CPU keeps up from g = 0.4 on, the download up to 0.7.
    rates = Rates(cpu=0.05e9, gpu=80e9, h2d=50e9, d2h=0.8e9, nvme_read=1e9, nvme_write=1e9)
    load = Load(host=0, nvme=PARAMS)
    least, most = 0.4, 0.7
    assert predict(rates, load, least).update_seconds == pytest.approx(12)
    assert predict(rates, load, most).update_seconds == pytest.approx(12)
    assert best_fraction(rates, load) == pytest.approx((least + most) / 2)


def test_dram_decides_for_the_side_that_moves_less():
    # On the CPU 32 bytes of DRAM per parameter, through the GPU 24.
    balanced = best_fraction(RATES, Load(host=PARAMS))
    scarce = Rates(cpu=2e9, gpu=80e9, h2d=50e9, d2h=50e9, dram=20e9)
    assert best_fraction(scarce, Load(host=PARAMS)) == 1
    ample = Rates(cpu=2e9, gpu=80e9, h2d=50e9, d2h=50e9, dram=400e9)
    assert best_fraction(ample, Load(host=PARAMS)) == balanced


@pytest.mark.parametrize(("backward", "exposed"), [(None, 0), (0, 0.06), (0.02, 0.04), (0.06, 0), (1, 0)])
def test_backward_hides_the_flush_as_long_as_it_lasts(backward, exposed):
    # The CPU's share of what lies on the host: 4 bytes of 0.75e9 parameters at 50 GB/s.
    prediction = predict(RATES, Load(host=PARAMS, gpu=PARAMS), 0.25, backward)
    assert prediction.flush_seconds == pytest.approx(0.06)
    assert prediction.exposed_seconds == pytest.approx(exposed)
    assert prediction.step_seconds == prediction.exposed_seconds + prediction.update_seconds
    assert prediction.update_seconds == predict(RATES, Load(host=PARAMS, gpu=PARAMS), 0.25).update_seconds


def test_dram_slows_the_flush_too():
    slow = Rates(cpu=2e9, gpu=80e9, h2d=50e9, d2h=50e9, dram=10e9)
    assert predict(slow, Load(host=PARAMS), 0).flush_seconds == pytest.approx(0.4)


@pytest.mark.parametrize("name", ["cpu", "gpu", "h2d", "d2h", "dram", "nvme_read", "nvme_write"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_a_rate_that_is_no_positive_number_is_refused(name, value):
    given = {"cpu": 1.0, "gpu": 1.0, "h2d": 1.0, "d2h": 1.0} | {name: value}
    with pytest.raises(ValueError, match=f"^{name} {value}: must be a positive number$"):
        Rates(**given)


def test_what_cannot_be_predicted_is_refused():
    with pytest.raises(ValueError, match="nvme_read and nvme_write: must be given"):
        best_fraction(RATES, Load(host=1, nvme=1))
    with pytest.raises(ValueError, match="backward_seconds -1: must be >= 0"):
        predict(RATES, Load(host=1), 0.5, -1)
    with pytest.raises(ValueError, match="--s2-offload-gpu-fraction 2: must be between 0 and 1"):
        predict(RATES, Load(host=1), 2)
