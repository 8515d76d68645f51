"""The small KV cache of one layer: for each KV head only what later tokens may still see.

The next token, in block i, sees the blocks of the window that ends with i and the head's shard before it
(`pattern.py`); nothing else is ever seen again. So a head keeps, side by side in ascending position,

    [ shard blocks that the window has passed | tokens of the window ]

When a block is complete, the window moves on by one. If the block that leaves it is in the head's shard, it
already lies where the shard goes on and nothing moves; if not, the rest of the window moves over it: in the
mean `local_blocks - 1` tokens are moved per token, of the thousands that attention reads. What a head holds
is thus always one contiguous, gap-free slice, which a decoded token reads without a mask or a gather. A
dense head has stride 1: its shard is everything.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from megatron_s2.pattern.s2_pattern import S2Pattern

_SPARE = 4  # capacity grows to a quarter more than what is needed, in whole blocks


def kept_tokens(pattern: S2Pattern, tokens: int) -> tuple[int, ...]:
    """Per KV head, how many of `tokens` cached tokens a later token may still see.

    That is what the next token sees, itself left out: later ones see less of them.
    """
    return tuple(seen - 1 for seen in pattern.kv_tokens(tokens + 1))


def cache_bytes(pattern: S2Pattern, tokens: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that a layer keeps of a sequence of `tokens` tokens."""
    return 2 * head_dim * dtype.itemsize * sum(kept_tokens(pattern, tokens))


def dense_cache_bytes(num_kv_heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that a dense layer keeps of a sequence of `tokens` tokens."""
    return 2 * head_dim * dtype.itemsize * num_kv_heads * tokens


@dataclass
class Run:
    """Neighbouring KV heads of equal stride, stored together.

    Args:
        heads: their numbers.
        k, v: `[batch, heads, capacity, head_dim]`; of each row and head the first entries are in use.
    """

    heads: range
    k: Tensor
    v: Tensor


class KVCache:
    """Keys and values of one layer for a batch of sequences, each of a length of its own.

    Memory is set aside in two ways. Without `max_tokens` it grows with the longest sequence, to at most a
    quarter and one block more than that has needed; with it, exactly what a sequence of so many tokens needs
    at its peak is set aside at once. Either way for every sequence of the batch as much.

    Args:
        pattern: which blocks each KV head sees.
        batch: sequences.
        head_dim: size of a head's keys, and of its values.
        dtype, device: of keys and values.
        max_tokens: most tokens that a sequence will have, where that is known.

    Attributes:
        lengths: tokens that each sequence has had.
        incoming: how many of the next call's tokens are real in each row, the first ones; None for all. It
            holds for one call; who calls attention through a model sets it (`cached_attention`).

    Raises:
        ValueError: an argument is out of range; the message starts with its name.
    """

    def __init__(
        self,
        pattern: S2Pattern,
        batch: int,
        head_dim: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        max_tokens: int | None = None,
    ) -> None:
        for name, value in (("batch", batch), ("head_dim", head_dim), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: must be >= 1")
        self.pattern = pattern
        self.head_dim = head_dim
        self.dtype = dtype
        self.max_tokens = max_tokens
        self.lengths = [0] * batch
        self.incoming: list[int] | None = None
        self._starts = [0] * batch  # position of the first token of each sequence's window
        self.runs: list[Run] = []
        for _, run in groupby(range(pattern.num_kv_heads), lambda g: pattern.strides[g]):
            first, *rest = run
            heads = range(first, first + 1 + len(rest))
            capacity = 0 if max_tokens is None else self._peak(heads, max_tokens)
            # Zeros: what is masked away must be finite, or 0 * NaN would come through.
            empty = torch.zeros(batch, len(heads), capacity, head_dim, dtype=dtype, device=device)
            self.runs.append(Run(heads, empty, torch.zeros_like(empty)))

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def device(self) -> torch.device:
        return self.runs[0].k.device

    @property
    def bytes(self) -> int:
        """Bytes of the keys and values that are kept: the sum of `cache_bytes` over the sequences."""
        kept = sum(self.kept(row, g) for row in range(self.batch) for g in range(self.pattern.num_kv_heads))
        return 2 * self.head_dim * self.dtype.itemsize * kept

    @property
    def dense_bytes(self) -> int:
        """Bytes that a dense layer would keep of the same sequences."""
        return dense_cache_bytes(self.pattern.num_kv_heads, sum(self.lengths), self.head_dim, self.dtype)

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the memory that is set aside."""
        return sum(x.numel() * x.element_size() for run in self.runs for x in (run.k, run.v))

    def kept(self, row: int, head: int) -> int:
        """Tokens that KV head `head` holds of sequence `row`."""
        return self.shard_tokens(row, head) + self.lengths[row] - self._starts[row]

    def shard_tokens(self, row: int, head: int) -> int:
        """How many of them are in the shard, before the window."""
        B = self.pattern.block_size
        return self.pattern.shard_size(head, self._starts[row] // B) * B

    def window_start(self, row: int) -> int:
        """Position of the first token in the window of sequence `row`."""
        return self._starts[row]

    def entries(self, row: int, head: int) -> tuple[Tensor, Tensor]:
        """Keys and values `[kept, head_dim]` of one head, in ascending position: views."""
        run = next(run for run in self.runs if head in run.heads)
        place = row, head - run.heads.start, slice(self.kept(row, head))
        return run.k[place], run.v[place]

    def window(self, row: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The window of sequence `row` with new tokens behind it, `[kv_heads, tokens, head_dim]`: copies.

        Args:
            k, v: the new tokens' `[tokens, kv_heads, head_dim]`.
        """
        heads = range(self.pattern.num_kv_heads)
        kept = [self.entries(row, g) for g in heads]
        old = [
            torch.stack([pair[n][self.shard_tokens(row, g) :] for g, pair in zip(heads, kept)])
            for n in range(2)
        ]
        return tuple(torch.cat([part, new.transpose(0, 1)], 1) for part, new in zip(old, (k, v)))

    def append(self, k: Tensor, v: Tensor, new: Sequence[int] | None = None) -> None:
        """Takes up new tokens and forgets what no later token sees.

        Args:
            k, v: `[batch, tokens, kv_heads, head_dim]`.
            new: how many of the tokens are real in each row, the first ones; None for all.

        Raises:
            ValueError: an argument does not fit the cache; the message starts with its name.
        """
        for row, count in enumerate(self.counts(k, v, new)):
            if count:
                self.settle(row, self.window(row, k[row, :count], v[row, :count]), count)

    def settle(self, row: int, window: tuple[Tensor, Tensor], count: int) -> None:
        """Takes up `count` tokens of one sequence, given what `window` returned for them."""
        B, pattern = self.pattern.block_size, self.pattern
        old, length = self._starts[row], self.lengths[row] + count
        new = pattern.window_start(length)
        shards = [(pattern.shard_size(g, old // B), pattern.shard_size(g, new // B)) for g in self._heads]
        self._reserve(length, [stop * B + length - new for _, stop in shards])
        for run in self.runs:
            for place, g in enumerate(run.heads):
                first, stop = shards[g]
                passed = [pattern.shard_block(g, n) - old // B for n in range(first, stop)]
                for stored, tokens in zip((run.k, run.v), window):
                    head = stored[row, place]
                    if passed:
                        blocks = tokens[g, : new - old].unflatten(0, (-1, B))
                        head[first * B : stop * B] = blocks[passed].flatten(0, 1)
                    head[stop * B : stop * B + length - new] = tokens[g, new - old :]
        self.lengths[row], self._starts[row] = length, new

    def write(self, k: Tensor, v: Tensor, rows: Sequence[int]) -> None:
        """Takes up one token of each of `rows`; `forget` must follow when attention has read the cache.

        Args:
            k, v: `[batch, 1, kv_heads, head_dim]`.
        """
        for row in rows:
            self._reserve(self.lengths[row] + 1, [self.kept(row, g) + 1 for g in self._heads])
        at = torch.tensor(rows, device=self.device)[:, None]
        for run in self.runs:
            places = torch.tensor(
                [[self.kept(row, g) for g in run.heads] for row in rows], device=self.device
            )
            heads = torch.arange(len(run.heads), device=self.device)
            for stored, token in ((run.k, k), (run.v, v)):
                token = token[:, 0, run.heads.start : run.heads.stop]
                stored[at, heads, places] = token if len(rows) == self.batch else token[at[:, 0]]
        for row in rows:
            self.lengths[row] += 1

    def forget(self) -> None:
        """Forgets what no later token sees, where `write` has completed a block."""
        for row, length in enumerate(self.lengths):
            if self._starts[row] < self.pattern.window_start(length):
                empty = self.runs[0].k.new_empty(0, self.pattern.num_kv_heads, self.head_dim)
                self.settle(row, self.window(row, empty, empty), 0)

    def select(self, rows: Sequence[int]) -> None:
        """Makes the batch these of its sequences, in this order; one may occur several times."""
        at = torch.tensor(rows, device=self.device, dtype=torch.long)
        for run in self.runs:
            run.k, run.v = run.k[at], run.v[at]
        self.lengths = [self.lengths[row] for row in rows]
        self._starts = [self._starts[row] for row in rows]

    def counts(self, k: Tensor, v: Tensor, new: Sequence[int] | None) -> list[int]:
        """How many tokens of each row of k and v are real, checked.

        Raises:
            ValueError: as `append`.
        """
        shape = (self.batch, k.shape[1], self.pattern.num_kv_heads, self.head_dim)
        for name, x in (("k", k), ("v", v)):
            if x.shape != shape:
                raise ValueError(f"{name} {tuple(x.shape)}: must be {shape} for this cache")
            if x.dtype != self.dtype:
                raise ValueError(f"{name} {x.dtype}: must have the cache's {self.dtype}")
        if new is None:
            return [k.shape[1]] * self.batch
        if len(new) != self.batch or not all(0 <= count <= k.shape[1] for count in new):
            raise ValueError(
                f"new {list(new)}: must be {self.batch} numbers of tokens, one per row, up to {k.shape[1]}"
            )
        return list(new)

    @property
    def _heads(self) -> range:
        return range(self.pattern.num_kv_heads)

    def _peak(self, heads: range, tokens: int) -> int:
        """Most entries that one of `heads` ever holds of a sequence of `tokens` tokens.

        While a token is decoded, that is all it sees: the most at the end of a block.
        """
        complete = (tokens - 1) // self.pattern.block_size * self.pattern.block_size
        return max(self.pattern.kv_tokens(n)[g] for n in (complete, tokens) for g in heads)

    def _reserve(self, tokens: int, entries: Sequence[int]) -> None:
        """Makes room for a sequence of so many tokens, of which the heads hold so many entries."""
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise ValueError(f"max_tokens {self.max_tokens}: must be at least the {tokens} tokens of a row")
        B = self.pattern.block_size
        for run in self.runs:
            needed = max(entries[g] for g in run.heads)
            if needed > run.k.shape[2]:
                capacity = -(-(needed + needed // _SPARE) // B) * B
                run.k, run.v = (_longer(x, capacity) for x in (run.k, run.v))


def _longer(x: Tensor, capacity: int) -> Tensor:
    longer = x.new_zeros(*x.shape[:2], capacity, x.shape[3])
    longer[:, :, : x.shape[2]] = x
    return longer
