"""Launches of one attention call: tensors, and all else, which is worked out once for equal layouts.

A layer of a model calls the kernels again and again with other tensors of the same shapes and strides. What
follows from these (`CallLayout`) is kept, as launches without tensors (`Launch`); a call fills in its own.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from functools import cache, cached_property, lru_cache
from itertools import accumulate
from operator import mul
from typing import NamedTuple

import numpy as np
import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from megatron_s2.kernels.triton_capture import is_capturing, keep
from megatron_s2.kernels.triton_common import INTERPRETED, LOG2_E
from megatron_s2.kernels.triton_pattern import KernelPattern
from megatron_s2.kernels.triton_programs import Documents, Part, Programs, Table, documents_of
from megatron_s2.kernels.triton_support import capability_of, takes_boxes
from megatron_s2.kernels.tuning import Tiles, Tuning, box_rows, packed_heads, separate_dkv


class Layout(NamedTuple):
    """What a launch depends on in a tensor, but for its address.

    Args:
        shape, strides: of its dimensions, in elements.
        aligned: whether the address is a multiple of 16 bytes, as tensor descriptors need.
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    aligned: bool

    @classmethod
    def of(cls, x: Tensor | None) -> Layout | None:
        if x is None:
            return None
        return tuple.__new__(cls, (x.shape, x.stride(), not x.data_ptr() % 16))  # as cls(…), twice as fast

    @classmethod
    def contiguous(cls, *shape: int) -> Layout:
        """The layout of a new tensor."""
        strides = [*accumulate(reversed(shape[1:]), mul, initial=1)]
        return cls(shape, tuple(reversed(strides)), True)


_BASES = {f"d_{name}": f"p_{name}" for name in ("q", "do", "k", "v", "ks", "vs")}


class Launch(NamedTuple):
    """A launch of a kernel without tensors; the layers and steps of a model share it.

    Args:
        grid: number of programs along each axis.
        constants: keyword arguments that are not tensors.
        tables: tables by the argument that takes them.
        boxes: tensor descriptors by their argument; each is copied with its tensor (`_BASES`) as base.
    """

    grid: tuple[int, int, int]
    constants: dict[str, object]
    tables: dict[str, Table]
    boxes: dict[str, TensorDescriptor]

    def arguments(self, tensors: dict[str, Tensor | None], device: torch.device) -> dict[str, object]:
        """Returns all keyword arguments."""
        found = self.constants | tensors
        for name, table in self.tables.items():
            found[name] = table.on(device)
        for name, box in self.boxes.items():
            # Not by the constructor: its checks were made for this layout, and take longer than the rest.
            found[name] = descriptor = object.__new__(TensorDescriptor)
            descriptor.__dict__ = box.__dict__ | {"base": tensors[_BASES[name]]}
        return found


@dataclass(eq=False)  # not frozen: to set the fields of a frozen class takes 4 us
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

    @cached_property
    def layout(self) -> CallLayout:
        """The call without its tensors, for equal ones the same object."""
        return _call_layout(
            *map(Layout.of, (self.q, self.k, self.v, self.k_shard, self.v_shard)), self.q.dtype,
            self.q.device, self.pattern, self.scale, documents_of(self.edges, self.q.shape[1]), self.q_start,
            self.tuning, 0 if self.mask is None else self.mask[0].shape[2] - 1, self.shard_starts,
            self.keys_start,
        )  # fmt: skip

    @property
    def window(self) -> dict[str, Tensor]:
        return {"p_k": self.k, "p_v": self.v}

    @property
    def shard(self) -> dict[str, Tensor]:
        if self.k_shard is None:
            return {"p_ks": self.k, "p_vs": self.v}
        return {"p_ks": self.k_shard, "p_vs": self.v_shard}

    def lists(self, of_keys: bool = False) -> dict[str, Tensor | None]:
        """The lists of an arbitrary mask: of the key blocks of each row, or of the rows of each key block."""
        if self.mask is None:
            return {"p_starts": None, "p_list": None}
        starts, blocks = self.mask
        if is_capturing(blocks.device):
            keep(starts, blocks)
        return {"p_starts": starts[int(of_keys)], "p_list": blocks}

    def launches(
        self, plan: Callable[..., list[Launch]], tensors: dict[str, Tensor | None], *options: Hashable
    ) -> Iterator[tuple[tuple[int, int, int], dict[str, object]]]:
        """Yields grid and keyword arguments of each launch of a kernel.

        Args:
            plan: called with `layout` and `options`, returns the launches; once for equal ones.
            tensors: tensors by the argument that takes them.
        """
        for launch in _launches(plan, self.layout, options):
            yield launch.grid, launch.arguments(tensors, self.q.device)


@lru_cache(maxsize=512)
def _launches(
    plan: Callable[..., list[Launch]], call: CallLayout, options: tuple[Hashable, ...]
) -> list[Launch]:
    return plan(call, *options)


@dataclass(frozen=True, eq=False)
class CallLayout:
    """One attention call without its tensors: all that launches depend on but addresses.

    Args:
        documents: documents of the packed batch, or its one sequence.
        num_blocks: blocks of an arbitrary mask; 0 for an S2 pattern.
        others: as in `KernelArgs`, with layouts of tensors.
    """

    q: Layout
    k: Layout
    v: Layout
    k_shard: Layout | None
    v_shard: Layout | None
    dtype: torch.dtype
    device: torch.device
    pattern: KernelPattern
    scale: float
    documents: Documents
    q_start: int
    tuning: Tuning | None
    num_blocks: int
    shard_starts: tuple[int, ...]
    keys_start: int

    @property
    def batch(self) -> int:
        return self.q.shape[0]

    @property
    def heads(self) -> int:
        return self.q.shape[2]

    @property
    def kv_heads(self) -> int:
        return self.k.shape[2]

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads

    @cached_property
    def shard_tokens(self) -> list[int]:
        """Per KV head, the shard tokens that some query sees beyond its window; one document."""
        last_block = (self.q_start + self.q.shape[1] - 1) // self.pattern.block_size
        return self.pattern.shard_tokens(last_block + 1).tolist()

    def tiles(self, kernel: str) -> Tiles:
        """Tiles of a kernel. With a mask, a tile lies in the one block whose list it reads: the rows of a
        tile in forward and dq, its keys in dkv."""
        tiles = getattr(self.tuning, kernel)
        if not self.num_blocks:
            return tiles
        block = self.pattern.block_size
        if kernel == "dkv":
            return tiles.with_keys(min(tiles.keys, block))
        return tiles.with_rows(min(tiles.rows, block * self.pack(kernel)))

    def pack(self, kernel: str) -> int:
        """Query heads of a tile of forward or dq."""
        return packed_heads(self.group, getattr(self.tuning, kernel).rows, self.pattern.block_size)

    @cached_property
    def shard_splits(self) -> tuple[int, int]:
        """Number of parts of dK and dV that come through the shard, and the query rows of each."""
        tiles, documents = self.tiles("dkv"), self.documents
        # All shards together decide about the splits: each launch fills its parts of the same gradients.
        columns = documents.whole.shard_key_programs(self.pattern, self.q_start, tiles.keys).count
        if not columns:
            return 0, 0
        splits = self.tuning.splits(columns * self.batch * self.kv_heads, documents.longest)
        span = -(-documents.longest // splits)
        if self.tuning.span is None:  # whole tiles but for the last
            span = -(-span // tiles.rows) * tiles.rows
        return splits, span

    @cached_property
    def shard_parts(self) -> tuple[Layout, Layout]:
        """The parts of dK and dV that come through the shard."""
        if self.k_shard is None:
            shape = int(self.documents.shards(self.pattern, self.q_start).sum()), self.kv_heads
        else:
            shape = sum(self.shard_tokens), 1
        splits, _ = self.shard_splits
        dks, dvs = (Layout.contiguous(splits, self.batch, *shape, x.shape[-1]) for x in (self.k, self.v))
        return dks, dvs

    # Keyword arguments.

    @property
    def query_args(self) -> dict[str, object]:
        return {**strides("q", self.q), "seq_q": self.q.shape[1], "q_start": self.q_start}

    @property
    def window_args(self) -> dict[str, object]:
        return {**strides("k", self.k), **strides("v", self.v), "k_start": self.keys_start}

    @property
    def shard_args(self) -> dict[str, object]:
        compact = self.k_shard is not None
        k, v = (self.k_shard, self.v_shard) if compact else (self.k, self.v)
        return {**strides("ks", k), **strides("vs", v), "COMPACT": compact}

    @property
    def list_args(self) -> dict[str, object]:
        return {"num_blocks": self.num_blocks, "CSR": self.num_blocks > 0}

    @property
    def pattern_args(self) -> dict[str, object]:
        """The pattern, and the softmax scale in base 2."""
        pattern = self.pattern
        return {"window": pattern.window, "sinks": pattern.sinks, "scale": self.scale * LOG2_E.value}

    def tables(self, programs: Programs) -> dict[str, Table]:
        """The pattern of each KV head and, of a packed batch, the programs of a launch."""
        tokens = tuple(self.shard_tokens) if self.k_shard is not None else ()
        tables = {"p_heads": _head_table(self.pattern, self.shard_starts, tokens)}
        return tables if programs.table is None else tables | {"p_tiles": programs.table}

    def source_launches(
        self, rows: dict[str, Layout], kernel: str, source: str | None
    ) -> list[tuple[Part, dict[str, TensorDescriptor], dict[str, object]]]:
        """The launches over query rows of forward or dq: documents, their tensor descriptors of K and V of
        both sources, and of `rows` (q and dout), of boxes of a tile, and the arguments that say so.

        There are none where tiles are read through pointers: in documents shorter than a tile of keys, and in
        all if such a tile is longer than a block.
        """
        tiles, pack, compact = self.tiles(kernel), self.pack(kernel), self.k_shard is not None
        sources = {"d_k": self.k, "d_v": self.v} if source != "shard" else {}
        if source != "window" and (compact or not sources):
            sources |= (
                {"d_ks": self.k_shard, "d_vs": self.v_shard} if compact else {"d_k": self.k, "d_v": self.v}
            )
        boxes = {}
        if tiles.keys <= self.pattern.block_size:
            names = box_rows(kernel, max(padded(x.shape[-1]) for x in (self.q, self.v)))
            sizes = dict.fromkeys(sources, (1, tiles.keys)) | dict.fromkeys(names, (pack, tiles.rows // pack))
            boxes = self._boxes(sources | {name: rows[name] for name in names}, sizes)
        names = (*rows, "d_k", "d_v", "d_ks", "d_vs")
        return self._parts(names, boxes, tiles.keys - self.q_start)

    def row_launches(self, dout: Layout) -> list[tuple[Part, dict[str, TensorDescriptor], dict[str, object]]]:
        """The launches over keys, as `source_launches`, with descriptors of q and dout, of boxes of rows;
        none where a box of a mask's rows could lie in two blocks."""
        layouts, rows, boxes = {"d_q": self.q, "d_do": dout}, self.tiles("dkv").rows, {}
        if not self.num_blocks or (rows <= self.pattern.block_size and self.q_start % rows == 0):
            boxes = self._boxes(layouts, dict.fromkeys(layouts, (1, rows)))
        return self._parts(tuple(layouts), boxes, rows, len(self.dkv_passes) == 1)

    def _parts(
        self, names: tuple[str, ...], boxes: dict[str, TensorDescriptor], tokens: int, divided: bool = True
    ) -> list[tuple[Part, dict[str, TensorDescriptor], dict[str, object]]]:
        """Documents of at least `tokens` tokens with descriptors, and the others without."""
        absent = dict.fromkeys(names) | {"DESC": False}
        if not boxes:
            return [(self.documents.whole, {}, absent)]
        return [
            (part, boxes, absent | {"DESC": True}) if part.fits else (part, {}, absent)
            for part in self.documents.parts(tokens, divided)
        ]

    @property
    def dkv_passes(self) -> list[dict[str, bool]]:
        """What each launch of dK and dV computes. In wide heads each of the two has its launch, which
        computes the probabilities again: 5 products of tiles, not 4."""
        if separate_dkv(self.tiles("dkv"), padded(self.q.shape[-1]) + padded(self.v.shape[-1])):
            return [{"GRAD_K": False, "GRAD_V": True}, {"GRAD_K": True, "GRAD_V": False}]
        return [{"GRAD_K": True, "GRAD_V": True}]

    def tile_args(self, kernel: str) -> dict[str, object]:
        """Sizes, and the options of Triton's compiler."""
        tiles, D, DV = self.tiles(kernel), self.q.shape[-1], self.v.shape[-1]
        return {
            "D": D, "DV": DV, "BD": padded(D), "BDV": padded(DV), "BLOCK": self.pattern.block_size,
            "BM": tiles.rows, "BN": tiles.keys, **compile_args(self.dtype, tiles),
        }  # fmt: skip

    def _boxes(
        self, layouts: dict[str, Layout], sizes: dict[str, tuple[int, int]]
    ) -> dict[str, TensorDescriptor]:
        """Tensor descriptors, without tensors, by the heads and tokens of their boxes; none if a tensor
        cannot have one: the kernels copy tiles of 16 bits an element."""
        if not takes_boxes(capability_of(self.device)) or (self.dtype.itemsize != 2 and not INTERPRETED):
            return {}
        nothing, found = torch.empty(0, dtype=self.dtype), {}
        for name, x in layouts.items():
            box = _box(x.shape, x.strides, self.dtype.itemsize, *sizes[name])
            if box is None or not x.aligned:
                return {}
            found[name] = TensorDescriptor(nothing, *box)
        return found


_call_layout = lru_cache(maxsize=256)(CallLayout)


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


def strides(name: str, x: Tensor | Layout | None, dims: str = "bth") -> dict[str, int]:
    """Returns the strides of the first dimensions of x as keywords; zeros where there is no tensor.

    For the name "q" and dims "bth" (batch, token, head) these are `s_qb`, `s_qt` and `s_qh`.
    """
    if x is None:
        return _strides(name, dims, (0,) * len(dims))
    return _strides(name, dims, x.strides if isinstance(x, Layout) else x.stride())


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
