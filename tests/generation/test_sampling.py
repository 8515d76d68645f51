"""Sampling: greedy at temperature 0; top-k and top-p keep the most likely tokens; a seed fixes the draws."""

import pytest
import torch

from megatron_s2.generation.sampling import Sampling

P = torch.tensor([0.1, 0.4, 0.2, 0.3])
LOGITS = P.log()


def test_temperature_0_is_greedy():
    assert Sampling().choose(LOGITS[None], {0: torch.Generator()}) == {0: 1}


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_k": 2}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_k": 9}, [0.1, 0.4, 0.2, 0.3]),
        ({"top_p": 0.4}, [0, 1, 0, 0]),
        ({"top_p": 0.5}, [0, 4 / 7, 0, 3 / 7]),
        ({"top_p": 1e-9}, [0, 1, 0, 0]),
        ({"top_k": 3, "top_p": 0.9}, [0, 4 / 9, 2 / 9, 3 / 9]),
    ],
)
def test_top_k_and_top_p(options, expected):
    got = Sampling(temperature=1.0, **options).probabilities(LOGITS)
    assert torch.allclose(got, torch.tensor(expected, dtype=torch.float32), atol=1e-6)


def test_a_low_temperature_sharpens():
    got = Sampling(temperature=0.5).probabilities(LOGITS)
    assert torch.allclose(got, P**2 / (P**2).sum())


@pytest.mark.parametrize("temperature", [1e-5, 1e-40, 1e-300])
def test_the_lowest_temperatures_are_greedy(temperature):
    assert Sampling(temperature=temperature).probabilities(100 * LOGITS).tolist() == [0, 1, 0, 0]


def test_draws_follow_the_probabilities_and_the_seed():
    sampling = Sampling(temperature=1.0, top_k=3, seed=5)
    draws = [
        [sampling.choose(LOGITS[None], {0: generator})[0] for _ in range(3000)]
        for generator in (sampling.generator(0),) * 2
    ]
    again = sampling.generator(0)
    assert draws[0] == [sampling.choose(LOGITS[None], {0: again})[0] for _ in range(3000)]
    assert draws[1] != draws[0]
    shares = torch.tensor(draws[0]).bincount(minlength=4) / 3000
    assert torch.allclose(shares, torch.tensor([0, 4 / 9, 2 / 9, 3 / 9]), atol=0.03)
