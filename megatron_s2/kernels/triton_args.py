"""Keyword arguments that the launches of one attention call share: tensors, strides and constants."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import accumulate

import numpy as np
import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_s2.kernels.triton_capture import keep_if_captured
from megatron_s2.kernels.triton_common import INTERPRETED, LOG2_E
from megatron_s2.kernels.triton_pattern import KernelPattern
from megatron_s2.kernels.triton_programs import Documents, Part, Table, documents_of
from megatron_s2.kernels.triton_support import capability_of, takes_boxes
from megatron_s2.kernels.tuning import Tiles, Tuning, box_rows, packed_heads, separate_dkv


@dataclass(frozen=True)
class KernelArgs:
    """One attention call.

    Args:
        q: queries `[batch, seq_q, heads, head_dim]`. The last dimension of every tensor has stride 1.
        k, v: window source, `[batch, seq_k, kv_heads, head_dim]`: keys and values from `keys_start` on.
        pattern: key blocks that each query block sees.
        scale: factor on the scores.
        edges: start and stop of each packed document, one after another; empty where nothing is packed.
        q_start: position of the first query.
        tuning: tiles of the kernels; None if they are to be measured (`triton_autotune`).
        mask: `mask_tables` of an arbitrary mask; None for an S2 pattern.
        k_shard, v_shard: shard source `[batch, tokens, 1, head_dim]`, the shards of the KV heads one after
            another; None where the shard is read from k and v.
        shard_starts: first token of each KV head's shard in the shard source.
        keys_start: position of the first token of k and v.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    pattern: KernelPattern
    scale: float
    edges: tuple[int, ...] = ()
    q_start: int = 0
    tuning: Tuning | None = None
    mask: tuple[Tensor, Tensor] | None = None
    k_shard: Tensor | None = None
    v_shard: Tensor | None = None
    shard_starts: tuple[int, ...] = ()
    keys_start: int = 0

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.q.shape[2] // self.k.shape[2]

    @cached_property
    def documents(self) -> Documents:
        return documents_of(self.edges, self.q.shape[1])

    @cached_property
    def shard_tokens(self) -> list[int]:
        """Per KV head, the shard tokens that some query sees beyond its window; one document."""
        last_block = (self.q_start + self.q.shape[1] - 1) // self.pattern.block_size
        return self.pattern.shard_tokens(last_block + 1).tolist()

    def tiles(self, kernel: str) -> Tiles:
        """Tiles of a kernel. With a mask, a tile lies in the one block whose list it reads: the rows of a
        tile in forward and dq, its keys in dkv."""
        tiles = getattr(self.tuning, kernel)
        if self.mask is None:
            return tiles
        block = self.pattern.block_size
        if kernel == "dkv":
            return tiles.with_keys(min(tiles.keys, block))
        return tiles.with_rows(min(tiles.rows, block * self.pack(kernel)))

    def pack(self, kernel: str) -> int:
        """Query heads of a tile of forward or dq."""
        return packed_heads(self.group, getattr(self.tuning, kernel).rows, self.pattern.block_size)

    # Keyword arguments. What depends on the call alone is computed once.

    @cached_property
    def query_args(self) -> dict[str, object]:
        return {"p_q": self.q, **strides("q", self.q), "seq_q": self.q.shape[1], "q_start": self.q_start}

    @cached_property
    def window_args(self) -> dict[str, object]:
        k, v = self.k, self.v
        return {"p_k": k, "p_v": v, **strides("k", k), **strides("v", v), "k_start": self.keys_start}

    @cached_property
    def shard_args(self) -> dict[str, object]:
        compact = self.k_shard is not None
        k, v = (self.k_shard, self.v_shard) if compact else (self.k, self.v)
        return {"p_ks": k, "p_vs": v, **strides("ks", k), **strides("vs", v), "COMPACT": compact}

    def list_args(self, of_keys: bool = False) -> dict[str, object]:
        """The lists of an arbitrary mask: of the key blocks of each row, or of the rows of each key block."""
        if self.mask is None:
            return {"p_starts": None, "p_list": None, "num_blocks": 0, "CSR": False}
        starts, blocks = self.mask
        keep_if_captured(starts, blocks)
        num_blocks = starts.shape[2] - 1
        return {"p_starts": starts[int(of_keys)], "p_list": blocks, "num_blocks": num_blocks, "CSR": True}

    @cached_property
    def pattern_args(self) -> dict[str, object]:
        """The pattern, and the softmax scale in base 2."""
        tokens = self.shard_tokens if self.k_shard is not None else ()
        return {
            "p_heads": _head_table(self.pattern, self.shard_starts, tuple(tokens)).on(self.q.device),
            "window": self.pattern.window,
            "sinks": self.pattern.sinks,
            "scale": self.scale * LOG2_E.value,
        }

    def source_launches(
        self, rows: dict[str, Tensor], kernel: str, source: str | None
    ) -> list[tuple[Part, dict[str, object]]]:
        """The launches over query rows of forward or dq: documents, and tensor descriptors of K and V of both
        sources, and of `rows` (q and dout), of boxes of a tile.

        Descriptors are None where tiles are read through pointers: in documents shorter than a tile of keys,
        and in all if such a tile is longer than a block.
        """
        tiles, pack, compact = self.tiles(kernel), self.pack(kernel), self.k_shard is not None
        tensors = {"d_k": self.k, "d_v": self.v} if source != "shard" else {}
        if source != "window" and (compact or not tensors):
            tensors |= (
                {"d_ks": self.k_shard, "d_vs": self.v_shard} if compact else {"d_k": self.k, "d_v": self.v}
            )
        descriptors = {}
        if tiles.keys <= self.pattern.block_size:
            names = box_rows(kernel, max(padded(x.shape[-1]) for x in (self.q, self.v)))
            boxes = dict.fromkeys(tensors, (1, tiles.keys)) | dict.fromkeys(names, (pack, tiles.rows // pack))
            descriptors = _descriptors(tensors | {name: rows[name] for name in names}, boxes)
        names = (*rows, "d_k", "d_v", "d_ks", "d_vs")
        return self._launches(names, descriptors, tiles.keys - self.q_start)

    def row_launches(self, dout: Tensor, tiles: Tiles) -> list[tuple[Part, dict[str, object]]]:
        """The launches over keys, as `source_launches`, with descriptors of q and dout, of boxes of rows;
        none where a box of a mask's rows could lie in two blocks."""
        tensors, rows, descriptors = {"d_q": self.q, "d_do": dout}, tiles.rows, {}
        if self.mask is None or (rows <= self.pattern.block_size and self.q_start % rows == 0):
            descriptors = _descriptors(tensors, dict.fromkeys(tensors, (1, rows)))
        return self._launches(tuple(tensors), descriptors, rows, len(self.dkv_passes(tiles)) == 1)

    def _launches(
        self,
        names: tuple[str, ...],
        descriptors: dict[str, TensorDescriptor],
        tokens: int,
        divided: bool = True,
    ) -> list[tuple[Part, dict[str, object]]]:
        """Documents of at least `tokens` tokens with descriptors, and the others without."""
        absent = dict.fromkeys(names) | {"DESC": False}
        if not descriptors:
            return [(self.documents.whole, absent)]
        return [
            (part, absent | descriptors | {"DESC": True} if part.fits else absent)
            for part in self.documents.parts(tokens, divided)
        ]

    def dkv_passes(self, tiles: Tiles) -> list[dict[str, bool]]:
        """What each launch of dK and dV computes. In wide heads each of the two has its launch, which
        computes the probabilities again: 5 products of tiles, not 4."""
        if separate_dkv(tiles, padded(self.q.shape[-1]) + padded(self.v.shape[-1])):
            return [{"GRAD_K": False, "GRAD_V": True}, {"GRAD_K": True, "GRAD_V": False}]
        return [{"GRAD_K": True, "GRAD_V": True}]

    def tile_args(self, tiles: Tiles) -> dict[str, object]:
        """Sizes, and the options of Triton's compiler."""
        D, DV = self.q.shape[-1], self.v.shape[-1]
        return {
            "D": D, "DV": DV, "BD": padded(D), "BDV": padded(DV), "BLOCK": self.pattern.block_size,
            "BM": tiles.rows, "BN": tiles.keys, **compile_args(self.q.dtype, tiles),
        }  # fmt: skip


def _descriptors(
    tensors: dict[str, Tensor], boxes: dict[str, tuple[int, int]]
) -> dict[str, TensorDescriptor]:
    """Tensor descriptors of tensors by the heads and tokens of their boxes; none if a tensor cannot have one:
    the kernels copy tiles of 16 bits an element."""
    first = next(iter(tensors.values()))
    if not takes_boxes(capability_of(first.device)) or (first.element_size() != 2 and not INTERPRETED):
        return {}
    found = {}
    for name, x in tensors.items():
        box = _box(x.shape, x.stride(), x.element_size(), *boxes[name])
        if box is None or x.data_ptr() % 16:
            return {}
        found[name] = TensorDescriptor(x, *box)
    return found


@lru_cache(maxsize=256)
def _box(
    shape: tuple[int, ...], stride: tuple[int, ...], element_size: int, heads: int, tokens: int
) -> tuple[list[int], list[int], list[int]] | None:
    """Shape, strides and box of the descriptor `[batch, head, token, dim]` of a tensor
    `[batch, token, head, dim]`; None where strides are not aligned to 16 bytes (CUDA driver API,
    cuTensorMapEncodeTiled)."""
    dims = (0, 2, 1)
    # The stride of a dimension of size 1 is never used, but has to be aligned.
    steps = [stride[dim] if shape[dim] > 1 else 16 for dim in dims]
    sizes = [step * element_size for step in steps]
    if 0 in shape or not all(0 < size < 1 << 40 and size % 16 == 0 for size in sizes):
        return None
    return [*(shape[dim] for dim in dims), shape[3]], [*steps, 1], [1, heads, tokens, padded(shape[3])]


@lru_cache(maxsize=1024)
def _head_table(pattern: KernelPattern, starts: tuple[int, ...], tokens: tuple[int, ...]) -> Table:
    """The table `p_heads`; of a compact source, with each head's first token in it and its shard tokens."""
    starts = starts or (0,) * len(pattern.firsts)
    offsets = accumulate(tokens[:-1], initial=0) if tokens else starts
    return Table(np.array(list(zip(pattern.firsts, pattern.strides, starts, offsets))))


def strides(name: str, x: Tensor | None, dims: str = "bth") -> dict[str, int]:
    """Returns the strides of the first dimensions of x as keywords; zeros where there is no tensor.

    For the name "q" and dims "bth" (batch, token, head) these are `s_qb`, `s_qt` and `s_qh`.
    """
    return _strides(name, dims, (0,) * len(dims) if x is None else x.stride())


@lru_cache(maxsize=1024)
def _strides(name: str, dims: str, values: tuple[int, ...]) -> dict[str, int]:
    return {f"s_{name}{dim}": stride for dim, stride in zip(dims, values)}


def compile_args(dtype: torch.dtype, tiles: Tiles) -> dict[str, object]:
    """How tl.dot multiplies float32, and the options of Triton's compiler."""
    return {
        "PREC": "ieee" if dtype == torch.float32 else "tf32",
        "num_warps": tiles.warps,
        "num_stages": tiles.stages,
        "enable_fp_fusion": True,
    }


@cache
def padded(size: int) -> int:
    """Smallest size of a tile that holds `size` elements: tl.dot multiplies powers of two >= 16."""
    return max(16, triton.next_power_of_2(size))
