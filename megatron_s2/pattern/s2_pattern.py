"""The S2 pattern: which key blocks each query block sees, in closed form.

The sequence is cut into blocks of `block_size` tokens. Query block i of KV head g sees key block j if
(arXiv 2407.17678, section 3, with always-visible first blocks added)

    j <= i  and  ( i - j < local_blocks                            the window, diagonal block included
                   or j < sink_blocks                              the sinks
                   or (j + phase[g]) % vert_stride[g] == 0 )       the strided blocks

Inside the diagonal block attention is causal token by token. A head of stride 0 has no strided blocks: it is
*window-only*, a sliding window with sinks. A head's *shard* is the ascending list of its sink blocks and its
strided blocks. Positions are absolute: a block outside the shard is never seen again once
the window has passed it. So the blocks that row i sees beyond its window are a *prefix* of the shard. All
counts below follow from that in closed form; no array grows with the square of the sequence length.

In all arithmetic, kernels included, a window-only head is one whose strided blocks begin at a block that no
sequence reaches (`steps`, `first_strided`), so that no closed form has a case for it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from megatron_s2.pattern.block_pattern import BlockPattern, require

if TYPE_CHECKING:
    import torch

_MAX_COVERAGE_PERIOD = 1 << 20
# First strided block of a window-only head, and the distance to the next. Sequences are shorter, and neither
# these numbers nor a block more or less overflow the 32-bit integers in which kernels count blocks.
_NEVER, _NEVER_STEP = 1 << 29, 1 << 30


class Coverage(NamedTuple):
    """The share of the distant past (beyond every window) that at least one head sees.

    No head sees `lost` of every `period` consecutive distant blocks.
    """

    period: int
    lost: int

    @property
    def fraction(self) -> float:
        """Share of the distant past that is seen, between 0 and 1."""
        return 1 - self.lost / self.period


@dataclass(frozen=True)
class S2Pattern(BlockPattern):
    """The S2 pattern of one layer: a window, sinks, and strided blocks of each KV head.

    Args:
        num_kv_heads: number of KV heads of the layer, over all tensor-parallel ranks; or of its query heads,
            if those of a group see different blocks (`BlockPattern`).
        block_size: tokens per block, a power of two >= 16.
        local_blocks: size of the window in blocks, including the diagonal block, >= 1.
        vert_stride: distance between two strided blocks, in blocks, one for all heads or one per KV head; 1
            is a dense head, 0 a window-only head, which sees window and sinks alone.
        sink_blocks: number of blocks at the start of the sequence that every head always sees.
        phases: phase of each KV head, whose strided blocks are the j with (j + phase) % stride == 0. By
            default phases spread evenly over the heads of equal stride v. If there are fewer such heads than
            v, phases rotate with `layer`, so that any ceil(v / heads) consecutive layers see everything.
            Window-only heads have none; what is given for them has no effect.
        num_dense_heads: number of dense KV heads, which are the last ones, for any `vert_stride`.
        layer: index of the layer from 0; it rotates default phases and has no effect on given ones.
        warn_lost: whether to warn if given `phases` leave distant blocks that no head sees.

    Raises:
        ValueError: a field is out of range; the message starts with its name.
    """

    num_kv_heads: int
    block_size: int
    local_blocks: int
    vert_stride: int | tuple[int, ...]
    sink_blocks: int = 0
    phases: tuple[int, ...] | None = None
    num_dense_heads: int = 0
    layer: int = 0
    warn_lost: bool = field(default=True, repr=False, compare=False)

    def __post_init__(self) -> None:
        H, B = self.num_kv_heads, self.block_size
        require(H >= 1, "num_kv_heads", H, ">= 1")
        require(B >= 16 and B & (B - 1) == 0, "block_size", B, "a power of two >= 16")
        require(self.local_blocks >= 1, "local_blocks", self.local_blocks, ">= 1")
        require(self.sink_blocks >= 0, "sink_blocks", self.sink_blocks, ">= 0")
        require(0 <= self.num_dense_heads <= H, "num_dense_heads", self.num_dense_heads, f"between 0 and {H}")
        require(self.layer >= 0, "layer", self.layer, ">= 0")
        if hasattr(self.vert_stride, "__index__"):  # an int, or numpy's
            object.__setattr__(self, "vert_stride", int(self.vert_stride))
            require(self.vert_stride >= 0, "vert_stride", self.vert_stride, ">= 0 (0 is window-only)")
        else:
            object.__setattr__(self, "vert_stride", tuple(self.vert_stride))
            require(
                len(self.vert_stride) == H, "vert_stride", self.vert_stride, f"one or one per KV head ({H})"
            )
            require(min(self.vert_stride) >= 0, "vert_stride", self.vert_stride, ">= 0 (0 is window-only)")
        if self.phases is not None:
            object.__setattr__(self, "phases", tuple(self.phases))
            require(len(self.phases) == H, "phases", self.phases, f"one per KV head ({H})")
            require(min(self.phases) >= 0, "phases", self.phases, ">= 0")
            if self.warn_lost and any(self.strides) and (coverage := self.coverage()).lost:
                warnings.warn(
                    f"S2 pattern: {coverage.lost} of every {coverage.period} distant blocks "
                    "are seen by no head of the layer",
                    stacklevel=3,
                )

    @classmethod
    def from_dkernel(
        cls,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        block_size: int,
        local_blocks: int,
        vert_stride: int,
        homo_head: bool = False,
        num_dense_heads: int = 0,
        head_sliding_offset: int = 0,
    ) -> S2Pattern:
        """Returns the pattern that DKernel (the authors' code, github.com/linxihui/dkernel) builds from the
        same arguments, for checkpoints trained with DKernel.

        DKernel computes its phase step, `vert_stride // num_heads` but at least 1, from *query* heads and
        applies it to KV heads. With GQA part of the past may therefore be seen by no head, which warns.
        `homo_head` gives every head the phase of head 0.

        Without `num_kv_heads` the pattern has a head for each query head, also where keys and values are
        shared: `s2_attention` then repeats them, as DKernel's users do. This is the pattern of Phi-3-small,
        `from_dkernel(num_heads=32, block_size=64, local_blocks=16, vert_stride=8, head_sliding_offset=1)`.

        Raises:
            ValueError: as for `S2Pattern`, or `homo_head` is combined with dense heads.
        """
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        require(
            num_kv_heads >= 1 and num_heads % num_kv_heads == 0,
            "num_kv_heads",
            num_kv_heads,
            f"a divisor of {num_heads} query heads",
        )
        require(not (homo_head and num_dense_heads), "num_dense_heads", num_dense_heads, "0 with homo_head")
        require(vert_stride >= 1, "vert_stride", vert_stride, ">= 1")
        step = 0 if homo_head else max(1, vert_stride // num_heads)
        return cls(
            num_kv_heads=num_kv_heads,
            block_size=block_size,
            local_blocks=local_blocks,
            vert_stride=vert_stride,
            phases=tuple((g * step + head_sliding_offset) % vert_stride for g in range(num_kv_heads)),
            num_dense_heads=num_dense_heads,
        )

    @cached_property
    def strides(self) -> tuple[int, ...]:
        """Stride of each KV head in blocks; 1 for dense, 0 for window-only heads."""
        given = (
            (self.vert_stride,) * self.num_kv_heads if isinstance(self.vert_stride, int) else self.vert_stride
        )
        return given[: self.num_kv_heads - self.num_dense_heads] + (1,) * self.num_dense_heads

    @cached_property
    def steps(self) -> tuple[int, ...]:
        """Distance of each KV head's strided blocks in arithmetic: its stride, or 2**30 if it is window-only,
        in which case `first_strided` is 2**29."""
        return tuple(stride or _NEVER_STEP for stride in self.strides)

    @cached_property
    def head_phases(self) -> tuple[int, ...]:
        """Phase of each KV head, 0 <= phase < stride; 0 for window-only heads."""
        if self.phases is not None:
            return tuple(phase % (stride or 1) for phase, stride in zip(self.phases, self.strides))
        rank_in_class: dict[int, int] = {}
        phases = []
        for stride in self.strides:
            if stride == 0:
                phases.append(0)
                continue
            rank = rank_in_class.get(stride, 0)
            rank_in_class[stride] = rank + 1
            heads = min(stride, self.strides.count(stride))
            rotation = self.layer % -(-stride // heads)
            phases.append((rank * stride // heads + rotation) % stride)
        return tuple(phases)

    def is_dense(self, head: int) -> bool:
        """Whether KV head `head` sees the whole past."""
        return self.strides[head] == 1

    def is_window_only(self, head: int) -> bool:
        """Whether KV head `head` sees nothing beyond its window but sinks."""
        return self.strides[head] == 0

    def for_layer(self, layer: int) -> S2Pattern:
        """Returns the pattern of layer index `layer` (from 0): default phases rotate, given phases stay."""
        return replace(self, layer=layer, warn_lost=False)

    def slice_heads(self, start: int, stop: int) -> S2Pattern:
        """Returns the pattern of KV heads `start` .. `stop`-1, with their phases in this pattern."""
        require(
            0 <= start < stop <= self.num_kv_heads, "heads", f"{start}:{stop}", f"in 0:{self.num_kv_heads}"
        )
        return self.select_heads(range(start, stop))

    def select_heads(self, heads: Sequence[int]) -> S2Pattern:
        """Returns the pattern of the KV heads `heads`, in this order, with their phases in this pattern."""
        return replace(
            self,
            num_kv_heads=len(heads),
            vert_stride=tuple(self.strides[g] for g in heads),
            phases=tuple(self.head_phases[g] for g in heads),
            num_dense_heads=0,
            layer=0,  # has no effect on given phases, and equal heads then make equal patterns
            warn_lost=False,
        )

    def shared_by(self, num_kv_heads: int) -> S2Pattern:
        """Returns the pattern of `num_kv_heads` KV heads that shows the same blocks, if the heads of each
        group see the same; else this one, which has a head for each query head.

        Raises:
            ValueError: `num_kv_heads` does not divide the heads.
        """
        heads = self.num_kv_heads
        require(
            num_kv_heads >= 1 and heads % num_kv_heads == 0,
            "num_kv_heads",
            num_kv_heads,
            f"a divisor of the pattern's {heads} heads",
        )
        group = heads // num_kv_heads
        if group == 1:
            return self
        firsts = range(0, heads, group)
        seen = list(zip(self.strides, self.head_phases))
        if any(len(set(seen[first : first + group])) > 1 for first in firsts):
            return self
        return self.select_heads(firsts)

    # A head's shard: the sink blocks 0 .. sink_blocks-1, then every stride-th block from `first_strided` on.

    def first_strided(self, head: int) -> int:
        """The first strided block of the head that is not a sink block; 2**29 for a window-only head."""
        if self.is_window_only(head):
            return _NEVER
        return self.sink_blocks + -(self.sink_blocks + self.head_phases[head]) % self.strides[head]

    def shard_block(self, head: int, index: int) -> int:
        """The key block at position `index` of the head's shard."""
        if index < self.sink_blocks:
            return index
        return self.first_strided(head) + (index - self.sink_blocks) * self.steps[head]

    def shard_size(self, head: int, num_blocks: int) -> int:
        """Number of the head's shard blocks among key blocks 0 .. num_blocks-1."""
        strided = -(-(num_blocks - self.first_strided(head)) // self.steps[head])
        return min(max(num_blocks, 0), self.sink_blocks) + max(0, strided)

    def shard_prefix(self, head: int, row: int) -> int:
        """Number of shard blocks that query block `row` sees before its window."""
        return self.shard_size(head, row - self.local_blocks + 1)

    def window_start(self, position: int) -> int:
        """Position of the first token in the window of the query at `position`."""
        return max(0, position // self.block_size - self.local_blocks + 1) * self.block_size

    def row_blocks(self, head: int, row: int) -> list[int]:
        shard = [self.shard_block(head, n) for n in range(self.shard_prefix(head, row))]
        return [*shard, *range(max(0, row - self.local_blocks + 1), row + 1)]

    def column_rows(self, head: int, block: int, num_blocks: int) -> range:
        in_shard = block < self.sink_blocks or (block - self.first_strided(head)) % self.steps[head] == 0
        return range(block, num_blocks if in_shard else min(num_blocks, block + self.local_blocks))

    def visible_blocks(self, head: int, row: int) -> int:
        return self.shard_prefix(head, row) + min(row + 1, self.local_blocks)

    def _past_blocks(self, head: int, num_rows: int) -> int:
        # Row i sees min(i, L-1) window blocks before the diagonal. The rows from j + L on see shard block j
        # beyond their windows.
        L = self.local_blocks
        ramp = min(num_rows, L)
        window = ramp * (ramp - 1) // 2 + (num_rows - ramp) * (L - 1)
        seen = self.shard_prefix(head, num_rows - 1) if num_rows else 0
        sinks = min(seen, self.sink_blocks)
        strided = seen - sinks
        shard = (
            seen * (num_rows - L)
            - sinks * (sinks - 1) // 2
            - strided * self.first_strided(head)
            - self.steps[head] * strided * (strided - 1) // 2
        )
        return window + shard

    def coverage(self, num_layers: int = 1) -> Coverage:
        """The share of the distant past that the heads of `num_layers` consecutive layers see together."""
        require(num_layers >= 1, "num_layers", num_layers, ">= 1")
        if self.phases is not None:
            return coverage_of([self])
        return coverage_of(self.for_layer(layer) for layer in range(self.layer, self.layer + num_layers))

    def block_mask(self, num_blocks: int) -> torch.Tensor:
        import torch

        rows = torch.arange(num_blocks)[None, :, None]
        cols = torch.arange(num_blocks)[None, None, :]
        step = torch.tensor(self.steps)[:, None, None]
        first = torch.tensor([self.first_strided(g) for g in range(self.num_kv_heads)])[:, None, None]
        visible = (rows - cols < self.local_blocks) | (cols < self.sink_blocks) | ((cols - first) % step == 0)
        return visible & (cols <= rows)

    def describe(self) -> str:
        """The pattern without its phases as text: `block 64, window 8 (512 tokens), stride 16`."""
        stride = str(self.vert_stride) if isinstance(self.vert_stride, int) else _short(self.strides)
        parts = [
            f"block {self.block_size}",
            f"window {self.local_blocks} ({self.local_blocks * self.block_size} tokens)",
            f"stride {stride}" if any(self.strides) else "no stride",
        ]
        if self.sink_blocks:
            parts.append(f"sinks {self.sink_blocks}")
        if self.num_dense_heads:
            parts.append(f"dense heads {self.num_dense_heads}")
        return ", ".join(parts)

    def describe_phases(self) -> str:
        """The phases of the KV heads as text: `phases 0 2 4 6`."""
        return f"phases {_short(self.head_phases)}"


def coverage_of(patterns: Iterable[S2Pattern]) -> Coverage:
    """The share of the distant past that the heads of all `patterns` see together.

    Counted over one period, the least common multiple of the strides, but at most 2**20 blocks. Window-only
    heads see nothing of the distant past: with no others, everything is lost.
    """
    shards = {
        (stride, phase)
        for pattern in patterns
        for stride, phase in zip(pattern.strides, pattern.head_phases)
        if stride
    }
    period = min(math.lcm(*(stride for stride, _ in shards)), _MAX_COVERAGE_PERIOD)
    seen = bytearray(period)
    for stride, phase in shards:
        first = -phase % stride
        if first < period:
            seen[first::stride] = b"\x01" * len(range(first, period, stride))
    return Coverage(period, lost=seen.count(0))


def _short(values: Sequence[int], limit: int = 8) -> str:
    return " ".join(map(str, values[:limit])) + (" …" if len(values) > limit else "")
