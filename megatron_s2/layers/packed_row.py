"""A packed row: one sequence of several documents, whose boundaries the host knows.

Megatron gives the boundaries of a micro-batch as one tensor `cu_seqlens` to all that reads them: the rotary
embedding, core attention and the count of FLOPs. What follows from them is computed once for all layers, and
is stored in an attribute of that tensor.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_s2.kernels.host_integers import copy_to_device
from megatron_s2.parallel.gather_plan import Documents
from megatron_s2.parallel.layout import Zigzag

_ATTRIBUTE = "s2_packed_row"


class PackedRow:
    """The documents of a packed row.

    Args:
        edges: token offsets of the documents, non-decreasing from 0 to the number of tokens.
    """

    def __init__(self, edges: Sequence[int]) -> None:
        self.edges = list(edges)
        # By the place and shape of the angles, which stay in memory, so that no others take the place.
        self._rotary: dict[tuple, tuple[Tensor, Tensor, Tensor]] = {}

    @cached_property
    def documents(self) -> Documents:
        """Start and stop of each document that has tokens."""
        return tuple((start, stop) for start, stop in pairwise(self.edges) if start < stop)

    def rotary_table(
        self, cu_seqlens: Tensor, freqs: Tensor, dtype: torch.dtype, scale: float, group: ProcessGroup
    ) -> tuple[Tensor, Tensor]:
        """Returns cosine and sine of the rotary angles of each token of this context-parallel rank, which
        stores two chunks of the row (`Zigzag`).

        Args:
            cu_seqlens: `edges` on the device.
            freqs: angles of each position in a document `[positions, 1, 1, dim]`; with as many positions as
                the row has tokens, those of each position in the row.
            dtype: dtype of the result.
            scale: factor on the result.
            group: context-parallel group.

        Returns:
            Two tensors `[local_tokens, 1, 1, dim]`.
        """
        key = freqs.data_ptr(), freqs.shape, dtype, scale
        if key not in self._rotary:
            zigzag = Zigzag(group.size(), self.edges[-1])
            chunks = [torch.arange(*chunk, device=freqs.device) for chunk in zigzag.chunks(group.rank())]
            positions = torch.cat(chunks)
            if len(freqs) != zigzag.tokens:
                documents = torch.searchsorted(cu_seqlens, positions, right=True) - 1
                positions = positions - cu_seqlens[documents]
            cos, sin = ((turn(freqs) * scale).to(dtype)[positions] for turn in (torch.cos, torch.sin))
            self._rotary[key] = freqs, cos, sin
        return self._rotary[key][1:]


def row_on_device(edges: Sequence[int], device: torch.device) -> Tensor:
    """Returns the boundaries of a packed row as int32 `cu_seqlens`, without waiting for the device."""
    [copy] = copy_to_device(device, edges)
    cu_seqlens = copy.int()
    setattr(cu_seqlens, _ATTRIBUTE, PackedRow(edges))
    return cu_seqlens


def packed_row(cu_seqlens: Tensor) -> PackedRow:
    """Returns the row whose boundaries `cu_seqlens` are; waits for the device, once, if `row_on_device` has
    not made it."""
    if not hasattr(cu_seqlens, _ATTRIBUTE):
        setattr(cu_seqlens, _ATTRIBUTE, PackedRow(cu_seqlens.tolist()))
    return getattr(cu_seqlens, _ATTRIBUTE)
