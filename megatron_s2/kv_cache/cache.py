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

What the window has passed is never written again, so sequences that begin alike can share it: `fork` copies
the window alone, and the shard of the sequence that is forked becomes `SharedEntries`, which stay where they
are. Besides them each sequence stores `[ its further shard blocks | window ]` as above.

A cache can be spread over ranks. Each keeps the window and its part of the shards (`shard_part`); the last
rank, whose parts are the smallest, reads the window.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from itertools import groupby

import torch
from torch import Tensor

from megatron_s2.kv_cache.decode_step import DecodeStep, plan_step
from megatron_s2.kv_cache.shard_part import shard_part
from megatron_s2.parallel.collectives import ContextParallelGroup
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
        k, v: keys and values `[batch, heads, capacity, head_dim]`; the first `KVCache.own` entries of each
            row and head are in use.
    """

    heads: range
    k: Tensor
    v: Tensor


@dataclass(frozen=True)
class SharedEntries:
    """Shard entries that several sequences have in common; they are not written again.

    Args:
        rows: indices of the sequences, ascending.
        index: `rows`, int64 on the device of the cache.
        tokens: number of entries of each KV head.
        table: `tokens`, int64 on that device.
        parts: views `[heads, tokens, head_dim]` of the keys and of the values in each storage of the cache
            that was forked, as many tokens as the head that has the most.
    """

    rows: tuple[int, ...]
    index: Tensor
    tokens: tuple[int, ...]
    table: Tensor
    parts: list[tuple[Tensor, Tensor]]


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
        group: ranks over which the cache is spread, each of which stores the same tokens; None for a cache on
            one rank.

    Attributes:
        pattern: `pattern`, or the part of it that this rank keeps.
        reads_window: whether this rank attends to the window, which all ranks keep.
        shared: entries that sequences have in common, in ascending position.
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
        group: ContextParallelGroup | None = None,
    ) -> None:
        for name, value in (("batch", batch), ("head_dim", head_dim), ("max_tokens", max_tokens)):
            if value is not None and value < 1:
                raise ValueError(f"{name} {value}: must be >= 1")
        self.group = group
        self.pattern = pattern if group is None else shard_part(pattern, group.rank, group.ranks)
        self.reads_window = group is None or group.rank == group.ranks - 1
        self.head_dim = head_dim
        self.dtype = dtype
        self.max_tokens = max_tokens
        self._num_kv_heads = num_kv_heads or pattern.num_kv_heads
        self.lengths = [0] * batch
        self.incoming: list[int] | None = None
        self.planned: DecodeStep | None = None
        self.shared: list[SharedEntries] = []
        self._window_starts = [0] * batch
        self._shared_tokens = [(0,) * pattern.num_kv_heads] * batch
        most = (0,) * pattern.num_kv_heads if max_tokens is None else self._peaks(max_tokens)
        self.storages: list[HeadStorage] = []
        for _, alike in groupby(self._heads, lambda g: pattern.strides[g]):
            first, *rest = alike
            heads = range(first, first + 1 + len(rest))
            # Zeros, because masked entries must be finite: 0 * NaN is NaN.
            capacity = max(most[g] for g in heads)
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
        """Bytes of the entries in use: the sum of `cache_bytes` over the sequences, less what they share."""
        own = sum(self.own(row, g) for row in range(self.batch) for g in self._heads)
        return 2 * self.head_dim * self.dtype.itemsize * (own + sum(sum(x.tokens) for x in self.shared))

    @property
    def dense_bytes(self) -> int:
        """Bytes that a dense layer would store of the same sequences, on one rank and without sharing."""
        return dense_cache_bytes(self._num_kv_heads, sum(self.lengths), self.head_dim, self.dtype)

    @property
    def capacity_bytes(self) -> int:
        """Bytes of the allocated memory; of shared entries, that of the storages in which they lie."""
        parts = [(storage.k, storage.v) for storage in self.storages]
        parts += [part for entries in self.shared for part in entries.parts]
        memory = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for kv in parts for x in kv}
        return sum(memory.values())

    def kept(self, row: int, head: int) -> int:
        """Number of entries of KV head `head` of sequence `row`, with those that it shares."""
        return self.shard_tokens(row, head) + self.lengths[row] - self._window_starts[row]

    def own(self, row: int, head: int) -> int:
        """Number of these entries that the sequence shares with no other."""
        return self.kept(row, head) - self._shared_tokens[row][head]

    def step_counts(self, rows: Sequence[int]) -> tuple[list[list[int]], list[list[int]]]:
        """Entries of each sequence and KV head after one more token of `rows`; zeros for the others.

        Returns:
            How many the sequence stores for itself, and how many of these this rank attends to.
        """
        taking = set(rows)
        stored = [
            [self.own(row, g) + 1 if row in taking else 0 for g in self._heads] for row in range(self.batch)
        ]
        if self.reads_window:
            return stored, stored
        return stored, [
            [self.own_shard(row, g) if row in taking else 0 for g in self._heads] for row in range(self.batch)
        ]

    def is_planned(self, rows: Sequence[int]) -> bool:
        """Returns whether a `write` of one token of each of `rows` is planned."""
        step = self.planned
        return step is not None and (step.rows, step.lengths) == (list(rows), self.lengths)

    def shard_tokens(self, row: int, head: int) -> int:
        """Number of `kept` entries that are shard blocks before the window."""
        B = self.pattern.block_size
        return self.pattern.shard_size(head, self._window_starts[row] // B) * B

    def own_shard(self, row: int, head: int) -> int:
        """Number of these that the sequence shares with no other."""
        return self.shard_tokens(row, head) - self._shared_tokens[row][head]

    def window_start(self, row: int) -> int:
        """Position of the first token in the window of sequence `row`."""
        return self._window_starts[row]

    def entries(self, row: int, head: int) -> tuple[Tensor, Tensor]:
        """Returns keys and values `[kept, head_dim]` of one head, in ascending position."""
        _, window = self._split(row, head)
        return tuple(torch.cat([*parts, x]) for parts, x in zip(self.shard(row, head), window))

    def shard(self, row: int, head: int) -> tuple[list[Tensor], list[Tensor]]:
        """Returns views of the keys and of the values of the shard of one head before the window, in
        ascending position: `[tokens, head_dim]` in one or more parts."""
        own, _ = self._split(row, head)
        n, storage = self._storage_of(head)
        i = head - storage.heads.start
        shared = [entries for entries in self.shared if row in entries.rows]
        return tuple(
            [*(entries.parts[n][kv][i, : entries.tokens[head]] for entries in shared), own[kv]]
            for kv in range(2)
        )

    def window(self, row: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the window of sequence `row` followed by new tokens: copies `[kv_heads, tokens, head_dim]`.

        Args:
            k, v: keys and values of the new tokens, `[tokens, kv_heads, head_dim]`.
        """
        kept = [self._split(row, g)[1] for g in self._heads]
        old = [torch.stack([window[kv] for window in kept]) for kv in range(2)]
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
        self._reserve(
            length,
            [stop * B + length - new - self._shared_tokens[row][g] for g, (_, stop) in enumerate(shards)],
        )
        for storage in self.storages:
            for i, g in enumerate(storage.heads):
                first, stop = shards[g]
                start, behind = (n * B - self._shared_tokens[row][g] for n in (first, stop))
                passed = [pattern.shard_block(g, n) - old // B for n in range(first, stop)]
                for stored, tokens in zip((storage.k, storage.v), window):
                    head = stored[row, i]
                    if passed:
                        blocks = tokens[g, : new - old].unflatten(0, (-1, B))
                        head[start:behind] = take_blocks(blocks, passed).flatten(0, 1)
                    head[behind : behind + length - new] = tokens[g, new - old :]
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
            self._reserve(self.lengths[row] + 1, step.stored[row])
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
        index = self._index(rows)
        for storage in self.storages:
            storage.k, storage.v = storage.k[index], storage.v[index]
        self._keep_rows(rows)

    def fork(self, rows: Sequence[int | None]) -> KVCache:
        """Returns a cache of these sequences, in this order; None is a sequence without tokens.

        Sequences that continue the same row share its shard, which is not copied; their windows are. A row
        that occurs once is copied. This cache can be used on, and neither changes the other.
        """
        forked, repeated = copy(self), []
        forked.incoming = forked.planned = None
        forked._keep_rows(rows)
        for row, times in Counter(row for row in rows if row is not None).items():
            tokens = tuple(self.own_shard(row, g) for g in self._heads)
            if times > 1 and any(tokens):
                repeated.append(row)
                forked._share(self, row, [n for n, other in enumerate(rows) if other == row], tokens)
        forked._copy_own(self, rows, repeated)
        return forked

    def _keep_rows(self, rows: Sequence[int | None]) -> None:
        """Makes the counts and the shared entries those of other rows of the batch, the storages excepted."""
        none = (0,) * self.pattern.num_kv_heads
        self.lengths = [0 if row is None else self.lengths[row] for row in rows]
        self._window_starts = [0 if row is None else self._window_starts[row] for row in rows]
        self._shared_tokens = [none if row is None else self._shared_tokens[row] for row in rows]
        kept = [(x, tuple(n for n, row in enumerate(rows) if row in x.rows)) for x in self.shared]
        self.shared = [replace(x, rows=held, index=self._index(held)) for x, held in kept if held]

    def _share(self, source: KVCache, row: int, children: list[int], tokens: tuple[int, ...]) -> None:
        """Lets sequences `children` share what sequence `row` of `source` stores of its shard."""
        longest = [max(tokens[g] for g in storage.heads) for storage in source.storages]
        parts = [(x.k[row, :, :n], x.v[row, :, :n]) for x, n in zip(source.storages, longest)]
        self.shared.append(
            SharedEntries(tuple(children), self._index(children), tokens, self._index(tokens), parts)
        )
        for child in children:
            self._shared_tokens[child] = tuple(
                earlier + more for earlier, more in zip(self._shared_tokens[child], tokens)
            )

    def _copy_own(self, source: KVCache, rows: Sequence[int | None], repeated: Sequence[int]) -> None:
        """Allocates storages, and copies what each sequence does not share from its row of `source`."""
        own = [[self.own(row, g) for g in self._heads] for row in range(self.batch)]
        if self.max_tokens is not None:
            peaks = self._peaks(self.max_tokens)
            own = [[most - shared for most, shared in zip(peaks, row)] for row in self._shared_tokens]
        self.storages = []
        for storage in source.storages:
            capacity = max(row[g] for row in own for g in storage.heads)
            shape = self.batch, len(storage.heads), capacity, self.head_dim
            self.storages.append(
                HeadStorage(storage.heads, storage.k.new_zeros(shape), storage.v.new_zeros(shape))
            )
        for row in dict.fromkeys(row for row in rows if row is not None):
            children = self._index([n for n, other in enumerate(rows) if other == row])
            for old, new in zip(source.storages, self.storages):
                for i, g in enumerate(old.heads):
                    first, stop = source.own_shard(row, g) if row in repeated else 0, source.own(row, g)
                    new.k[children, i, : stop - first] = old.k[row, i, first:stop]
                    new.v[children, i, : stop - first] = old.v[row, i, first:stop]

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

    def _index(self, numbers: Sequence[int]) -> Tensor:
        return torch.tensor(numbers, device=self.device, dtype=torch.long)

    def _storage_of(self, head: int) -> tuple[int, HeadStorage]:
        return next((n, storage) for n, storage in enumerate(self.storages) if head in storage.heads)

    def _split(self, row: int, head: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Returns views of keys and values `[tokens, head_dim]` that the sequence stores for itself: of its
        shard, and of its window."""
        _, storage = self._storage_of(head)
        shard, stop = self.own_shard(row, head), self.own(row, head)
        k, v = (x[row, head - storage.heads.start] for x in (storage.k, storage.v))
        return (k[:shard], v[:shard]), (k[shard:stop], v[shard:stop])

    def _peaks(self, tokens: int) -> tuple[int, ...]:
        """Most entries that each KV head ever stores of a sequence of `tokens` tokens.

        While a token is decoded, a head stores all that the token sees; that is most at the end of a block.
        """
        complete = (tokens - 1) // self.pattern.block_size * self.pattern.block_size
        return tuple(map(max, *(self.pattern.kv_tokens(n) for n in (complete, tokens))))

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
