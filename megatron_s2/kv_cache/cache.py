"""KV cache of one layer, which stores for each KV head only the entries that later tokens may see.

The next token, in block i, sees the blocks of the window that ends with i and the earlier blocks of the
head's shard (`S2Pattern`); no later token ever sees any others. A head therefore stores, side by side and in
ascending position,

    [ shard blocks that the window has passed | tokens of the window ]

When a block is complete, the window moves on by one block. If the block that leaves it is in the head's
shard, it already lies at the end of the stored shard and nothing moves. If not, the rest of the window moves
over it: on average `local_blocks - 1` tokens per token, of the thousands that attention reads. What a head
stores is thus always one contiguous slice without gaps, which a decoded token reads without mask or gather.
A dense head has stride 1: its shard is everything. The shard of a window-only head is its sinks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from megatron_s2.kv_cache.decode_step import DecodeStep, plan_step
from megatron_s2.pattern import S2Pattern

_SPARE = 4  # storage grows to what is needed plus 1 / _SPARE of it, in whole blocks


def kept_tokens(pattern: S2Pattern, tokens: int) -> tuple[int, ...]:
    """Number of entries per KV head, of `tokens` cached tokens, that a later token may see.

    These are the tokens that the next token sees besides itself; the tokens after it see fewer of them.
    """
    return tuple(seen - 1 for seen in pattern.kv_tokens(tokens + 1))


def cache_bytes(pattern: S2Pattern, tokens: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that a layer stores of a sequence of `tokens` tokens."""
    return 2 * head_dim * dtype.itemsize * sum(kept_tokens(pattern, tokens))


def dense_cache_bytes(num_kv_heads: int, tokens: int, head_dim: int, dtype: torch.dtype) -> int:
    """Bytes of keys and values that a dense layer stores of a sequence of `tokens` tokens."""
    return 2 * head_dim * dtype.itemsize * num_kv_heads * tokens


@dataclass
class HeadStorage:
    """Entries of neighbouring KV heads of equal stride.

    Args:
        heads: indices of the KV heads.
        k, v: keys and values `[batch, heads, capacity, head_dim]`; the first `KVCache.kept` entries of each
            row and head are in use.
    """

    heads: range
    k: Tensor
    v: Tensor


class KVCache:
    """Keys and values of one layer for a batch of sequences of different lengths.

    With `max_tokens`, exactly the memory that a sequence of so many tokens needs at its peak is allocated at
    once. Without it, memory grows with the longest sequence, to at most a quarter and one block more than
    that sequence has needed. Either way every sequence of the batch has the same capacity.

    A pattern with a head for each query head makes this a cache of query heads: each keeps its own shard and
    window, as if keys and values were not shared. Where the heads of a group have different phases that is
    the union of their shards, stored once, and a window for each of them.

    Args:
        pattern: key blocks that each query block of each KV head sees.
        batch: number of sequences.
        head_dim: head_dim of keys and of values.
        dtype, device: dtype and device of keys and values.
        max_tokens: most tokens of any sequence, if known.
        num_kv_heads: number of KV heads of the layer, if the pattern has a head for each query head.

    Attributes:
        lengths: number of tokens that each sequence has had so far.
        incoming: number of real tokens of each row in the next attention call, the first ones of the row;
            None if all are real. A caller that reaches attention through a model sets it before each call.
        planned: what `plan_step` has planned for the next `write`; None where `write` plans itself.

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
        num_kv_heads: int | None = None,
    ) -> None:
        for name, value in (("batch", batch), ("head_dim", head_dim), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: must be >= 1")
        self.pattern = pattern
        self.head_dim = head_dim
        self.dtype = dtype
        self.max_tokens = max_tokens
        self._num_kv_heads = num_kv_heads or pattern.num_kv_heads
        self.lengths = [0] * batch
        self.incoming: list[int] | None = None
        self.planned: DecodeStep | None = None
        self._window_starts = [0] * batch
        self.storages: list[HeadStorage] = []
        for _, alike in groupby(self._heads, lambda g: pattern.strides[g]):
            first, *rest = alike
            heads = range(first, first + 1 + len(rest))
            capacity = 0 if max_tokens is None else self._peak(heads, max_tokens)
            # Zeros, because masked entries must be finite: 0 * NaN is NaN.
            empty = torch.zeros(batch, len(heads), capacity, head_dim, dtype=dtype, device=device)
            self.storages.append(HeadStorage(heads, empty, torch.zeros_like(empty)))

    @property
    def batch(self) -> int:
        return len(self.lengths)

    @property
    def heads(self) -> int:
        """Number of heads that it keeps keys and values of: those of its pattern."""
        return self.pattern.num_kv_heads

    @property
    def device(self) -> torch.device:
        return self.storages[0].k.device

    @property
    def bytes(self) -> int:
        """Bytes of the entries in use: the sum of `cache_bytes` over the sequences."""
        kept = sum(self.kept(row, g) for row in range(self.batch) for g in self._heads)
        return 2 * self.head_dim * self.dtype.itemsize * kept

    @property
    def dense_bytes(self) -> int:
        """Bytes that a dense layer would store of the same sequences."""
        return dense_cache_bytes(self._num_kv_heads, sum(self.lengths), self.head_dim, self.dtype)

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the allocated memory."""
        return sum(x.numel() * x.element_size() for storage in self.storages for x in (storage.k, storage.v))

    def kept(self, row: int, head: int) -> int:
        """Number of entries of KV head `head` of sequence `row`."""
        return self.shard_tokens(row, head) + self.lengths[row] - self._window_starts[row]

    def kept_after_write(self, rows: Sequence[int]) -> list[list[int]]:
        """Entries of each sequence and KV head after one more token of `rows`; zeros for the others."""
        taking = set(rows)
        return [
            [self.kept(row, g) + 1 if row in taking else 0 for g in self._heads] for row in range(self.batch)
        ]

    def is_planned(self, rows: Sequence[int]) -> bool:
        """Returns whether a `write` of one token of each of `rows` is planned."""
        step = self.planned
        return step is not None and (step.rows, step.lengths) == (list(rows), self.lengths)

    def shard_tokens(self, row: int, head: int) -> int:
        """Number of these entries that are shard blocks before the window."""
        B = self.pattern.block_size
        return self.pattern.shard_size(head, self._window_starts[row] // B) * B

    def window_start(self, row: int) -> int:
        """Position of the first token in the window of sequence `row`."""
        return self._window_starts[row]

    def entries(self, row: int, head: int) -> tuple[Tensor, Tensor]:
        """Returns views of keys and values `[kept, head_dim]` of one head, in ascending position."""
        storage = next(storage for storage in self.storages if head in storage.heads)
        index = row, head - storage.heads.start, slice(self.kept(row, head))
        return storage.k[index], storage.v[index]

    def window(self, row: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the window of sequence `row` followed by new tokens: copies `[kv_heads, tokens, head_dim]`.

        Args:
            k, v: keys and values of the new tokens, `[tokens, kv_heads, head_dim]`.
        """
        kept = [self.entries(row, g) for g in self._heads]
        old = [
            torch.stack([pair[n][self.shard_tokens(row, g) :] for g, pair in zip(self._heads, kept)])
            for n in range(2)
        ]
        return tuple(torch.cat([part, new.transpose(0, 1)], 1) for part, new in zip(old, (k, v)))

    def append(self, k: Tensor, v: Tensor, new: Sequence[int] | None = None) -> None:
        """Stores new tokens and drops the entries that no later token sees.

        Args:
            k, v: `[batch, tokens, kv_heads, head_dim]`.
            new: number of real tokens of each row, the first ones of the row; None if all are real.

        Raises:
            ValueError: an argument does not fit the cache; the message starts with its name.
        """
        for row, count in enumerate(self.new_counts(k, v, new)):
            if count:
                self.commit(row, self.window(row, k[row, :count], v[row, :count]), count)

    def commit(self, row: int, window: tuple[Tensor, Tensor], count: int) -> None:
        """Stores `count` new tokens of one sequence, given what `window` returned for them."""
        B, pattern = self.pattern.block_size, self.pattern
        old, length = self._window_starts[row], self.lengths[row] + count
        new = pattern.window_start(length)
        shards = [(pattern.shard_size(g, old // B), pattern.shard_size(g, new // B)) for g in self._heads]
        self._reserve(length, [stop * B + length - new for _, stop in shards])
        for storage in self.storages:
            for i, g in enumerate(storage.heads):
                first, stop = shards[g]
                passed = [pattern.shard_block(g, n) - old // B for n in range(first, stop)]
                for stored, tokens in zip((storage.k, storage.v), window):
                    head = stored[row, i]
                    if passed:
                        blocks = tokens[g, : new - old].unflatten(0, (-1, B))
                        head[first * B : stop * B] = take_blocks(blocks, passed).flatten(0, 1)
                    head[stop * B : stop * B + length - new] = tokens[g, new - old :]
        self.lengths[row], self._window_starts[row] = length, new

    def write(self, k: Tensor, v: Tensor, rows: Sequence[int]) -> DecodeStep:
        """Stores one token of each of `rows`. `evict` must be called once attention has read the cache.

        The host waits for nothing; in a model, `plan_step` copies the numbers for all caches at once.

        Args:
            k, v: `[batch, 1, kv_heads, head_dim]`.

        Returns:
            Where the tokens are, and the number of entries that attention has to read.
        """
        if not self.is_planned(rows):
            plan_step([self], rows)
        step, self.planned = self.planned, None
        for row in rows:
            self._reserve(self.lengths[row] + 1, step.kept[row])
        for storage in self.storages:
            span = slice(storage.heads.start, storage.heads.stop)
            heads = torch.arange(len(storage.heads), device=self.device)
            for stored, token in ((storage.k, k), (storage.v, v)):
                token = token[:, 0, span]
                stored[step.row_index[:, None], heads, step.slots[:, span]] = (
                    token if len(rows) == self.batch else token[step.row_index]
                )
        for row in rows:
            self.lengths[row] += 1
        return step

    def evict(self) -> None:
        """Drops the entries that no later token sees, of sequences in which `write` has completed a block."""
        for row, length in enumerate(self.lengths):
            if self._window_starts[row] < self.pattern.window_start(length):
                empty = self.storages[0].k.new_empty(0, self.pattern.num_kv_heads, self.head_dim)
                self.commit(row, self.window(row, empty, empty), 0)

    def select(self, rows: Sequence[int]) -> None:
        """Replaces the batch by these of its sequences, in this order; a row may occur several times."""
        index = torch.tensor(rows, device=self.device, dtype=torch.long)
        for storage in self.storages:
            storage.k, storage.v = storage.k[index], storage.v[index]
        self.lengths = [self.lengths[row] for row in rows]
        self._window_starts = [self._window_starts[row] for row in rows]

    def new_counts(self, k: Tensor, v: Tensor, new: Sequence[int] | None) -> list[int]:
        """Checks the arguments of `append` and returns the number of real tokens of each row.

        Raises:
            ValueError: as in `append`.
        """
        shape = (self.batch, k.shape[1], self.pattern.num_kv_heads, self.head_dim)
        refuse_gradients(k=k, v=v)
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
        """Most entries that one of `heads` ever stores of a sequence of `tokens` tokens.

        While a token is decoded, a head stores all that the token sees; that is most at the end of a block.
        """
        complete = (tokens - 1) // self.pattern.block_size * self.pattern.block_size
        return max(self.pattern.kv_tokens(n)[g] for n in (complete, tokens) for g in heads)

    def _reserve(self, tokens: int, entries: Sequence[int]) -> None:
        """Grows the storages for a sequence of `tokens` tokens with this number of entries per KV head."""
        if self.max_tokens is not None and tokens > self.max_tokens:
            raise ValueError(f"max_tokens {self.max_tokens}: must be at least the {tokens} tokens of a row")
        B = self.pattern.block_size
        for storage in self.storages:
            needed = max(entries[g] for g in storage.heads)
            if needed > storage.k.shape[2]:
                capacity = -(-(needed + needed // _SPARE) // B) * B
                storage.k, storage.v = (_grown(x, capacity) for x in (storage.k, storage.v))


def take_blocks(blocks: Tensor, indices: Sequence[int]) -> Tensor:
    """Returns `blocks[indices]`, ascending, without a copy of the indices to the device.

    The blocks of a shard are evenly spaced, except sinks: a few slices are all of them.
    """
    runs: list[list[int]] = []
    for index in indices:
        if runs and (len(runs[-1]) == 1 or index - runs[-1][-1] == runs[-1][1] - runs[-1][0]):
            runs[-1].append(index)
        else:
            runs.append([index])
    parts = [blocks[run[0] : run[-1] + 1 : run[1] - run[0] if len(run) > 1 else 1] for run in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


def refuse_gradients(**tensors: Tensor) -> None:
    """Raises ValueError if gradients of a tensor are recorded: a cache stores numbers, not how they arose."""
    for name, x in tensors.items():
        if torch.is_grad_enabled() and x.requires_grad:
            raise ValueError(
                f"{name}: must not require gradients with a KV cache, which passes none on; train without a "
                "cache (use_cache=False), or generate under torch.no_grad()"
            )


def _grown(x: Tensor, capacity: int) -> Tensor:
    grown = x.new_zeros(*x.shape[:2], capacity, x.shape[3])
    grown[:, :, : x.shape[2]] = x
    return grown
