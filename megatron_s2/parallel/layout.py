"""The zigzag layout: which tokens of a sequence each context-parallel rank stores.

The sequence is cut into 2P equal chunks, and rank r of P stores chunks r and 2P-1-r, as in Megatron's data
loader. The cost of a query grows with its position, so one early and one late chunk per rank balance the
work.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Zigzag:
    """The layout of `tokens` positions over `ranks` ranks.

    Raises:
        ValueError: `ranks` is not positive, or `tokens` is not a multiple of 2 * ranks.
    """

    ranks: int
    tokens: int

    def __post_init__(self) -> None:
        if self.ranks < 1:
            raise ValueError(f"ranks {self.ranks}: must be >= 1")
        if self.tokens < 0 or self.tokens % (2 * self.ranks):
            raise ValueError(
                f"tokens {self.tokens}: must be a multiple of {2 * self.ranks} (two chunks for each of "
                f"{self.ranks} ranks)"
            )

    @property
    def chunk(self) -> int:
        """Tokens per chunk."""
        return self.tokens // (2 * self.ranks)

    @property
    def local_tokens(self) -> int:
        """Tokens per rank."""
        return 2 * self.chunk

    def chunks(self, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """Returns (start, stop) of the two chunks of a rank, in the order in which it stores them."""
        C = self.chunk
        late = 2 * self.ranks - 1 - rank
        return (rank * C, (rank + 1) * C), (late * C, (late + 1) * C)

    def owner(self, position: np.ndarray) -> np.ndarray:
        """Returns the rank that stores each position."""
        chunk = np.asarray(position) // max(self.chunk, 1)
        return np.minimum(chunk, 2 * self.ranks - 1 - chunk)

    def local(self, position: np.ndarray) -> np.ndarray:
        """Returns the index of each position among the tokens of the rank that stores it."""
        chunk, offset = np.divmod(np.asarray(position), max(self.chunk, 1))
        return offset + np.where(chunk < self.ranks, 0, self.chunk)

    def positions(self, rank: int) -> np.ndarray:
        """Returns the positions that a rank stores, in order."""
        return np.concatenate([np.arange(start, stop) for start, stop in self.chunks(rank)])

    def chunk_order(self) -> list[int]:
        """Returns for each chunk of the sequence its index among the chunks of all ranks, rank after rank."""
        P = self.ranks
        return [2 * c if c < P else 2 * (2 * P - 1 - c) + 1 for c in range(2 * P)]
