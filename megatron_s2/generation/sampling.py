"""Chooses the next token: greedily, or by sampling with temperature, top-k and top-p."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from logits.

    Args:
        temperature: divisor of the logits; 0 chooses the most likely token.
        top_k: number of most likely tokens to sample from; 0 for all.
        top_p: sum of probabilities; of the `top_k` tokens, the most likely ones that reach it are sampled
            from. 1 for all.
        seed: seed of the first row of a batch. Each row has its own, so that rows do not affect each other.

    Raises:
        ValueError: a field is out of range; the message starts with its flag.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        for flag, value, ok, allowed in (
            ("--temperature", self.temperature, 0 <= self.temperature < math.inf, ">= 0 and finite"),
            ("--top-k", self.top_k, self.top_k >= 0, ">= 0"),
            ("--top-p", self.top_p, 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("--seed", self.seed, 0 <= self.seed < 2**63, ">= 0 and below 2**63"),
        ):
            if not ok:
                raise ValueError(f"{flag} {value}: must be {allowed}")

    def generator(self, row: int) -> torch.Generator:
        """Returns the random generator of row `row` of a batch."""
        return torch.Generator().manual_seed(self.seed + row)

    def choose(self, logits: Tensor, generators: Mapping[int, torch.Generator]) -> dict[int, int]:
        """Returns the next token of each row in `generators`, in one copy from the device.

        Args:
            logits: `[batch, vocabulary]`.
            generators: random generator by row.
        """
        if self.temperature == 0:
            tokens = logits.argmax(-1).tolist()
            return {row: tokens[row] for row in generators}
        logits = logits.cpu()
        return {
            row: int(torch.multinomial(self.probabilities(logits[row]), 1, generator=generator))
            for row, generator in generators.items()
        }

    def probabilities(self, logits: Tensor) -> Tensor:
        """Returns the probability of each token, float32, for `logits` `[vocabulary]` on the CPU."""
        logits, tokens = logits.double().sort(descending=True, stable=True)
        logits = (logits - logits[0]) / self.temperature  # at most 0, so finite at any temperature
        if self.top_k:
            logits[self.top_k :] = float("-inf")
        p = logits.softmax(0)
        # A token is kept if the tokens before it have not reached the sum, so the first is always kept.
        p[p.cumsum(0) - p >= self.top_p] = 0
        return torch.zeros_like(p).scatter_(0, tokens, p / p.sum()).float()
