"""Rates that tests of offload share: one set worked by hand, and random ones."""

import random

from megatron_s2.offload.model import Rates

PARAMS = 10**9
# Links of 50 GB/s, a CPU of 2 Gparams/s; a GPU whose memory moves 30 bytes per
# parameter at 2.4 TB/s, as an H100's does.
RATES = Rates(cpu=2e9, gpu=80e9, h2d=50e9, d2h=50e9)


def log_uniform(rng: random.Random, least: float, most: float) -> float:
    return least * (most / least) ** rng.random()


def random_rates(rng: random.Random, dram: bool = False) -> Rates:
    """From a laptop's links to a Grace Hopper's."""
    return Rates(
        cpu=log_uniform(rng, 0.2e9, 10e9),
        gpu=log_uniform(rng, 10e9, 200e9),
        h2d=log_uniform(rng, 5e9, 400e9),
        d2h=log_uniform(rng, 5e9, 400e9),
        dram=log_uniform(rng, 40e9, 600e9) if dram else None,
    )
