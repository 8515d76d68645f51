"""Block patterns in the form that the Triton kernels take: integers, and tables of an arbitrary mask."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

from megatron_s2.kernels.call_cache import cached_in_eager
from megatron_s2.kernels.triton_capture import require_no_capture
from megatron_s2.kernels.tuning import decode, encode
from megatron_s2.pattern import BlockMaskPattern, BlockPattern, S2Pattern


@dataclass(frozen=True)
class KernelPattern:
    """The integers of an `S2Pattern`.

    An arbitrary mask is described as dense heads with a window of one block; its tables say which of the
    blocks before the diagonal are visible.

    Args:
        block_size: tokens per block.
        window: blocks of the window, the diagonal block included.
        sinks: number of sink blocks.
        firsts: per KV head, the first block of its shard after the sinks.
        strides: per KV head, blocks between two blocks of its shard; of a window-only head the
            `S2Pattern.steps`, which no sequence reaches.
    """

    block_size: int
    window: int
    sinks: int
    firsts: tuple[int, ...]
    strides: tuple[int, ...]

    @classmethod
    def of(cls, pattern: BlockPattern) -> KernelPattern:
        """Returns the integers of a pattern, for equal `S2Pattern`s the same object."""
        if isinstance(pattern, S2Pattern):
            return _of_s2(pattern)
        heads = pattern.num_kv_heads
        return cls(pattern.block_size, 1, 0, (0,) * heads, (1,) * heads)

    @cached_property
    def code(self) -> str:
        """The integers as text, which the custom operators take."""
        heads = (x for head in zip(self.firsts, self.strides) for x in head)
        return encode((self.block_size, self.window, self.sinks, *heads))

    def __hash__(self) -> int:
        return hash(self.code)  # which keeps its hash

    @classmethod
    @lru_cache(maxsize=1024)
    def decode(cls, code: str) -> KernelPattern:
        """Returns the pattern that has this `code`, for equal ones the same object."""
        numbers = decode(code)
        return cls(*numbers[:3], numbers[3::2], numbers[4::2])

    def shard_tokens(self, query_blocks: ArrayLike) -> np.ndarray:
        """Per KV head, the shard tokens that lie beyond the window of the last of `query_blocks` blocks:
        `[kv_heads]`, of an array of them `[..., kv_heads]`."""
        blocks = np.maximum(0, np.asarray(query_blocks)[..., None] - self.window)
        strided = np.maximum(0, -(-(blocks - self.firsts) // self.strides))
        return self.block_size * (np.minimum(blocks, self.sinks) + strided)

    def visible_pairs(self, tokens: int) -> int:
        """Query-key pairs that a sequence of `tokens` tokens sees, over all KV heads."""
        pattern = S2Pattern(
            num_kv_heads=len(self.strides),
            block_size=self.block_size,
            local_blocks=self.window,
            vert_stride=self.strides,
            sink_blocks=self.sinks,
            phases=tuple(-first % stride for first, stride in zip(self.firsts, self.strides)),
            warn_lost=False,
        )
        return sum(pattern.visible_pairs(tokens))


@cached_in_eager(maxsize=1024)
def _of_s2(pattern: S2Pattern) -> KernelPattern:
    firsts = tuple(map(pattern.first_strided, range(pattern.num_kv_heads)))
    return KernelPattern(pattern.block_size, pattern.local_blocks, pattern.sink_blocks, firsts, pattern.steps)


@cached_in_eager(maxsize=64)
def edges_code(documents: tuple[tuple[int, int], ...]) -> str:
    """Returns start and stop of each document, one after another, as text, which the custom operators
    take."""
    return encode(edge for document in documents for edge in document)


@lru_cache(maxsize=64)
def decode_edges(code: str) -> tuple[int, ...]:
    """Returns the integers of an `edges_code`, for equal ones the same object."""
    return decode(code)


_MASK_TABLES: WeakKeyDictionary[BlockMaskPattern, dict[torch.device, tuple[Tensor, Tensor]]] = (
    WeakKeyDictionary()
)


def mask_tables(pattern: BlockMaskPattern, device: torch.device) -> tuple[Tensor, Tensor]:
    """Returns `BlockMaskPattern.past_lists` as tensors on the device: starts and blocks.

    Raises:
        RuntimeError: they are not there yet, and a CUDA graph is being captured.
    """
    on_devices = _MASK_TABLES.setdefault(pattern, {})
    if device not in on_devices:
        require_no_capture(device)
        starts, blocks = pattern.past_lists()
        on_devices[device] = torch.tensor(starts, device=device), torch.tensor(blocks, device=device)
    return on_devices[device]


def mask_pairs(pattern: BlockMaskPattern, documents: Sequence[tuple[int, int]], q_start: int) -> int:
    """Visible query-key pairs of all documents and KV heads, for queries from `q_start` on."""
    before = sum(pattern.visible_pairs(q_start))
    return sum(sum(pattern.visible_pairs(q_start + b - a)) - before for a, b in documents)
