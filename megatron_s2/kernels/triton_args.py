"""Keyword arguments that the launches of one attention call share: tensors, strides and constants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache, cached_property, lru_cache
from itertools import accumulate

import torch
import triton
from torch import Tensor

from megatron_s2.kernels.triton_common import LOG2_E
from megatron_s2.kernels.triton_pattern import KernelPattern
from megatron_s2.kernels.tuning import Tiles, Tuning


class Programs(tuple):
    """The programs of a launch, each a row of p_tiles: see `query_program` and `key_program`.

    All layers share those of a micro-batch, and compare them by identity: there may be thousands.
    """

    __hash__ = object.__hash__
    __eq__ = object.__eq__


@dataclass(frozen=True)
class KernelArgs:
    """One attention call.

    Args:
        q: queries `[batch, seq_q, heads, head_dim]`. The last dimension of every tensor has stride 1.
        k, v: window source, `[batch, seq_k, kv_heads, head_dim]`: keys and values from `keys_start` on.
        pattern: key blocks that each query block sees.
        scale: factor on the scores.
        packed: token ranges (start, stop) of packed documents; empty where the batch is not packed.
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
    packed: tuple[tuple[int, int], ...] = ()
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

    @property
    def documents(self) -> list[tuple[int, int]]:
        """Start and length of each document."""
        return _documents(self.packed, self.q.shape[1])

    @cached_property
    def shard_tokens(self) -> list[int]:
        """Per KV head, the shard tokens that some query sees beyond its window; one document."""
        return self.shard_tokens_of(self.q.shape[1])

    def shard_tokens_of(self, length: int) -> list[int]:
        """`shard_tokens` of a document of `length` queries."""
        return _shard_tokens(self.pattern, self.q_start, length)

    def tiles(self, kernel: str) -> Tiles:
        """Tiles of a kernel. With a mask, a tile lies in the one block whose list it reads: the rows of a
        tile in forward and dq, its keys in dkv."""
        tiles = getattr(self.tuning, kernel)
        if self.mask is None:
            return tiles
        block = self.pattern.block_size
        if kernel == "dkv":
            return replace(tiles, keys=min(tiles.keys, block))
        return replace(tiles, rows=min(tiles.rows, block))

    def query_programs(self, rows: int) -> Programs:
        """One program per tile of `rows` queries. Tiles are aligned to absolute positions."""
        return _query_programs(self.packed, self.q.shape[1], self.q_start, rows)

    def shard_key_programs(self, keys: int) -> tuple[Programs, int]:
        """One program per tile of `keys` shard tokens, and the shard tokens of a KV head in all documents."""
        return _shard_key_programs(self.packed, self.q.shape[1], self.q_start, self.pattern, keys)

    def key_programs(self, keys: int) -> Programs:
        """One program per tile of `keys` tokens of the window source."""
        seq_k = self.k.shape[1]
        return _key_programs(self.packed, self.q.shape[1], seq_k, self.q_start, self.pattern, keys)

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
        num_blocks = starts.shape[2] - 1
        return {"p_starts": starts[int(of_keys)], "p_list": blocks, "num_blocks": num_blocks, "CSR": True}

    @cached_property
    def pattern_args(self) -> dict[str, object]:
        """The pattern, and the softmax scale in base 2."""
        pattern, tokens = self.pattern, self.shard_tokens
        starts = self.shard_starts or (0,) * len(tokens)
        offsets = accumulate(tokens[:-1], initial=0)
        heads = zip(pattern.firsts, pattern.strides, starts, offsets)
        return {
            "p_heads": _on_device(tuple(heads), self.q.device),
            "window": pattern.window,
            "sinks": pattern.sinks,
            "scale": self.scale * LOG2_E.value,
        }

    def program_args(self, programs: Programs) -> dict[str, object]:
        """The table `p_tiles` of a packed batch."""
        table = _on_device(programs, self.q.device) if self.packed else None
        return {"p_tiles": table, "PACKED": bool(self.packed)}

    def tile_args(self, tiles: Tiles) -> dict[str, object]:
        """Sizes, and the options of Triton's compiler."""
        D, DV = self.q.shape[-1], self.v.shape[-1]
        return {
            "D": D, "DV": DV, "BD": padded(D), "BDV": padded(DV), "BLOCK": self.pattern.block_size,
            "BM": tiles.rows, "BN": tiles.keys, **compile_args(self.q.dtype, tiles),
        }  # fmt: skip


def _documents(packed: tuple[tuple[int, int], ...], tokens: int) -> list[tuple[int, int]]:
    return [(a, b - a) for a, b in packed or ((0, tokens),)]


def _shard_tokens(pattern: KernelPattern, q_start: int, length: int) -> list[int]:
    return pattern.shard_tokens((q_start + length - 1) // pattern.block_size + 1)


@lru_cache(maxsize=64)
def _query_programs(packed: tuple[tuple[int, int], ...], tokens: int, q_start: int, rows: int) -> Programs:
    first = q_start // rows
    return Programs(
        (start, length, i)
        for start, length in _documents(packed, tokens)
        for i in range(-(-(q_start + length) // rows) - first)
    )


@lru_cache(maxsize=64)
def _shard_key_programs(
    packed: tuple[tuple[int, int], ...], tokens: int, q_start: int, pattern: KernelPattern, keys: int
) -> tuple[Programs, int]:
    programs, offset = [], 0
    for start, length in _documents(packed, tokens):
        count = max(_shard_tokens(pattern, q_start, length))
        programs += [(start, length, i, offset) for i in range(-(-count // keys))]
        offset += count
    return Programs(programs), offset


@lru_cache(maxsize=64)
def _key_programs(
    packed: tuple[tuple[int, int], ...],
    tokens: int,
    seq_k: int,
    q_start: int,
    pattern: KernelPattern,
    keys: int,
) -> Programs:
    programs, offset = [], 0
    for start, length in _documents(packed, tokens):
        count = length if packed else seq_k
        programs += [(start, length, i, offset) for i in range(-(-count // keys))]
        offset += max(_shard_tokens(pattern, q_start, length))
    return Programs(programs)


def strides(name: str, x: Tensor | None, dims: str = "bth") -> dict[str, int]:
    """Returns the strides of the first dimensions of x as keywords; zeros where there is no tensor.

    For the name "q" and dims "bth" (batch, token, head) these are `s_qb`, `s_qt` and `s_qh`.
    """
    values = (0,) * len(dims) if x is None else x.stride()
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


_CAPTURED: dict[int, Tensor] = {}  # tables that a CUDA graph reads, by address; kept as long as the process


def _on_device(rows: tuple[tuple[int, ...], ...], device: torch.device) -> Tensor:
    table, copied = _cached_table(rows, device)
    if _is_capturing(device):
        _CAPTURED[table.data_ptr()] = table
    elif copied is not None and not copied.query():
        torch.cuda.current_stream(device).wait_event(copied)  # another stream may have started the copy
    return table


@lru_cache(maxsize=256)
def _cached_table(
    rows: tuple[tuple[int, ...], ...], device: torch.device
) -> tuple[Tensor, torch.cuda.Event | None]:
    """A table on the device, and an event after its copy, for which the host does not wait."""
    if device.type != "cuda" or _is_capturing(device):  # a graph would copy again from memory that is free
        return torch.tensor(rows, dtype=torch.int32, device=device), None
    with torch.cuda.device(device):
        table = torch.tensor(rows, dtype=torch.int32, pin_memory=True).to(device, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
    return table, copied


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
