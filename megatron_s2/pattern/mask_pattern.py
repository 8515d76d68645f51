"""A pattern given as a block mask, for patterns that S2's formula cannot describe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from megatron_s2.pattern.block_pattern import BlockPattern, require

if TYPE_CHECKING:
    import torch


class BlockMaskPattern(BlockPattern):
    """Any causal block mask, stored as one compressed sparse row (CSR) table per KV head.

    Args:
        mask: bool `[num_kv_heads, num_blocks, num_blocks]` (query, key): a tensor, array or nested lists.
            Causal, with the diagonal visible.
        block_size: tokens per block, a power of two >= 16.

    Raises:
        ValueError: the mask has another shape, shows a later block, or hides a diagonal block.
    """

    def __init__(self, mask: torch.Tensor, block_size: int) -> None:
        import numpy as np

        mask = np.asarray(mask, dtype=bool)
        require(
            mask.ndim == 3 and mask.shape[1] == mask.shape[2] and mask.size > 0,
            "mask shape",
            tuple(mask.shape),
            "[num_kv_heads, num_blocks, num_blocks]",
        )
        require(
            block_size >= 16 and block_size & (block_size - 1) == 0,
            "block_size",
            block_size,
            "a power of two >= 16",
        )
        require(not np.triu(mask, 1).any(), "mask", "sees later blocks", "lower triangular")
        require(
            mask.diagonal(axis1=1, axis2=2).all(), "mask", "hides diagonal blocks", "true on the diagonal"
        )
        self.block_size = block_size
        self.num_kv_heads, self.max_blocks, _ = mask.shape
        self._rows = [CsrTable.from_mask(head) for head in mask]

    def _check_row(self, row: int) -> None:
        require(0 <= row < self.max_blocks, "block", row, f"one of the mask's {self.max_blocks} blocks")

    def _check_size(self, num_blocks: int) -> None:
        require(
            0 <= num_blocks <= self.max_blocks,
            "blocks",
            num_blocks,
            f"at most the mask's {self.max_blocks} blocks",
        )

    def row_blocks(self, head: int, row: int) -> list[int]:
        self._check_row(row)
        return self._rows[head].row(row)

    def column_rows(self, head: int, block: int, num_blocks: int) -> list[int]:
        self._check_size(num_blocks)
        return self._rows[head].column(block, num_blocks)

    def visible_blocks(self, head: int, row: int) -> int:
        self._check_row(row)
        starts = self._rows[head].starts
        return int(starts[row + 1] - starts[row])

    def _past_blocks(self, head: int, num_rows: int) -> int:
        self._check_size(num_rows)
        return int(self._rows[head].starts[num_rows]) - num_rows

    def slice_heads(self, start: int, stop: int) -> BlockMaskPattern:
        require(
            0 <= start < stop <= self.num_kv_heads, "heads", f"{start}:{stop}", f"in 0:{self.num_kv_heads}"
        )
        part = object.__new__(BlockMaskPattern)
        part.block_size, part.max_blocks = self.block_size, self.max_blocks
        part.num_kv_heads = stop - start
        part._rows = self._rows[start:stop]
        return part

    def past_lists(self) -> CsrTable:
        """The visible blocks before the diagonal by row and by column, in the layout that the kernels read.

        Returns:
            `starts` is int64 `[2, num_kv_heads, max_blocks + 1]`. For KV head g, the key blocks of row i are
            `blocks[starts[0, g, i] : starts[0, g, i + 1]]`, and the rows that see key block j are
            `blocks[starts[1, g, j] : starts[1, g, j + 1]]`.
        """
        import numpy as np

        pairs = [table.past_pairs() for table in self._rows]
        lists = [CsrTable.from_pairs(*pair, self.max_blocks) for pair in pairs]
        lists += [CsrTable.from_pairs(*reversed(pair), self.max_blocks) for pair in pairs]
        sizes = np.cumsum([0, *(len(part.blocks) for part in lists[:-1])])
        starts = np.stack([part.starts for part in lists]).astype(np.int64) + sizes[:, None]
        return CsrTable(
            starts.reshape(2, self.num_kv_heads, -1), np.concatenate([part.blocks for part in lists])
        )

    def block_mask(self, num_blocks: int) -> torch.Tensor:
        import torch

        self._check_size(num_blocks)
        mask = torch.zeros(self.num_kv_heads, num_blocks, num_blocks, dtype=torch.bool)
        for g, table in enumerate(self._rows):
            for row in range(num_blocks):
                mask[g, row, table.row(row)] = True
        return mask


class CsrTable(NamedTuple):
    """The visible key blocks of each row of one head, row after row."""

    starts: Sequence[int]  # [num_blocks + 1]
    blocks: Sequence[int]  # [visible blocks], ascending within a row

    @classmethod
    def from_mask(cls, mask) -> CsrTable:
        import numpy as np

        return cls.from_pairs(*np.nonzero(mask), len(mask))

    @classmethod
    def from_pairs(cls, rows, blocks, num_rows: int) -> CsrTable:
        """From arrays of the row and the block of each entry, sorted by row and block or block and row."""
        import numpy as np

        starts = np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=num_rows))])
        return cls(starts, blocks[np.argsort(rows, kind="stable")].astype(np.int32))

    def past_pairs(self):
        """Two arrays with the row and the block of each entry before the diagonal."""
        import numpy as np

        rows = np.repeat(np.arange(len(self.starts) - 1), np.diff(self.starts))
        past = rows != self.blocks
        return rows[past], self.blocks[past]

    def row(self, row: int) -> list[int]:
        return self.blocks[self.starts[row] : self.starts[row + 1]].tolist()

    def column(self, block: int, num_blocks: int) -> list[int]:
        """The rows below `num_blocks` that hold `block`, in ascending order."""
        import numpy as np

        hits = np.flatnonzero(self.blocks[: self.starts[num_blocks]] == block)
        return (np.searchsorted(self.starts, hits, side="right") - 1).tolist()
