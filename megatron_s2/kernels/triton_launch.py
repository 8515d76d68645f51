"""Launches of the Triton kernels: grids, strides and constants of one call on one device."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import accumulate
from statistics import median

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from megatron_s2.kernels.autotune import Autotuner, Key
from megatron_s2.kernels.triton_backend import capability_of
from megatron_s2.kernels.triton_columns import s2_bwd_kernel_dkv_shard, s2_bwd_kernel_dkv_window
from megatron_s2.kernels.triton_rows import s2_bwd_kernel_delta, s2_row_kernel
from megatron_s2.kernels.triton_tiles import LOG2_E
from megatron_s2.kernels.tuning import Tiles, Tuning, candidates, tuning_for

# Chosen, as Triton does, when the kernels are first imported.
INTERPRETED = triton.knobs.runtime.interpret
_REPEATS = 9  # launches to time one choice of tiles


def _seconds(launch: Callable[[], None]) -> float:
    """Median of a few launches on the GPU; infinite where the chip has not what they need."""
    try:
        launch()
    except OutOfResources:
        return float("inf")
    milliseconds = []
    for _ in range(_REPEATS):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        launch()
        stop.record()
        stop.synchronize()
        milliseconds.append(start.elapsed_time(stop))
    return median(milliseconds) / 1000


AUTOTUNER = Autotuner(_seconds)


@lru_cache(maxsize=256)
def _on_device(values: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.int32, device=device).view(-1, width)


@dataclass(frozen=True)
class KernelArgs:
    """One call, unpacked: what every launch needs."""

    q: Tensor
    k: Tensor
    v: Tensor
    shape: list[int]
    scale: float
    cuts: list[int]
    q_start: int
    tuning: Tuning | None  # None to be chosen by measuring
    starts: Tensor | None = None  # of a mask, as `BlockMaskPattern.past_lists`
    entries: Tensor | None = None
    k_shard: Tensor | None = None  # `[batch, tokens, 1, dim]`; None where the shard is part of k and v
    v_shard: Tensor | None = None
    places: tuple[int, ...] = ()  # of each KV head's shard in it, in tokens
    k_start: int = 0  # position of the first token of k and v

    @property
    def sources(self) -> list[Tensor]:
        """Window and shard."""
        shard = [self.k, self.v] if self.k_shard is None else [self.k_shard, self.v_shard]
        return [self.k, self.v, *shard]

    @property
    def num_blocks(self) -> int:
        """Rows of a mask."""
        return 0 if self.starts is None else self.starts.shape[2] - 1

    def lists(self, kernel: str) -> tuple[Tensor | None, Tensor | None]:
        """Those of rows, or of key blocks for dK/dV."""
        return None if self.starts is None else self.starts[int(kernel == "dkv")], self.entries

    def tiles(self, kernel: str) -> Tiles:
        """How a kernel is cut. What a list belongs to lies in one block: query rows, or keys in dK/dV."""
        tiles = getattr(self.tuning, kernel)
        if self.starts is None:
            return tiles
        block = self.shape[0]
        if kernel == "dkv":
            return replace(tiles, keys=min(tiles.keys, block))
        return replace(tiles, rows=min(tiles.rows, block))

    def tuned(self, kernel: str, launch: Callable[[KernelArgs], None]) -> KernelArgs:
        """The same with a tuning: its own, or the fastest tiles of one kernel among the shipped ones."""
        if self.tuning is not None:
            return self
        q, device = self.q, self.q.device
        about = capability_of(device), max(q.shape[-1], self.v.shape[-1]), q.element_size()
        shipped = tuning_for(*about)
        key = Key(
            kernel=kernel,
            chip=torch.cuda.get_device_name(device) if q.is_cuda else "interpreter",
            dtype=str(q.dtype),
            head_dim=q.shape[-1],
            v_head_dim=self.v.shape[-1],
            block_size=self.shape[0],
            group=q.shape[2] // self.k.shape[2],
            mask=self.starts is not None,
            triton=triton.__version__,
            candidates=candidates(kernel, *about),
        )

        def work(tiles: Tiles) -> KernelArgs:
            return replace(self, tuning=replace(shipped, **{kernel: tiles}))

        return work(AUTOTUNER.choose(key, lambda tiles: launch(work(tiles))))

    @property
    def documents(self) -> list[tuple[int, int]]:
        """(start, length) of each document."""
        if not self.cuts:
            return [(0, self.q.shape[1])]
        return [(a, b - a) for a, b in zip(self.cuts[::2], self.cuts[1::2])]

    @property
    def heads(self) -> Tensor:
        firsts, strides = self.shape[3::2], self.shape[4::2]
        places = self.places or (0,) * len(firsts)
        rooms = [end - tokens for end, tokens in zip(accumulate(self.seen), self.seen)]
        heads = zip(firsts, strides, places, rooms)
        return _on_device(tuple(x for head in heads for x in head), 4, self.q.device)

    @property
    def seen(self) -> list[int]:
        """Of each head's shard, the tokens that some query sees beyond its window, with one document."""
        return self._seen(self.q.shape[1])

    @property
    def pattern(self) -> tuple[int, int, float]:
        """Window, sinks, and the softmax scale in base 2, as the kernels take them."""
        return self.shape[1], self.shape[2], self.scale * LOG2_E.value

    def table(self, rows: list[tuple[int, ...]]) -> Tensor | None:
        """Which document, and which tile of it, each program computes; None where there is one document."""
        if not self.cuts:
            return None
        return _on_device(tuple(x for row in rows for x in row), len(rows[0]), self.q.device)

    def shard_tokens(self, length: int) -> int:
        """Tokens of the largest head's shard that some row of a document sees beyond its window."""
        return max(self._seen(length))

    def _seen(self, length: int) -> list[int]:
        block, window, sinks = self.shape[:3]
        before = max(0, (self.q_start + length - 1) // block - window + 1)
        return [
            block * (min(before, sinks) + max(0, -(-(before - first) // stride)))
            for first, stride in zip(self.shape[3::2], self.shape[4::2])
        ]

    def constants(self, tiles: Tiles) -> dict:
        """What all kernels are specialised for."""
        D, DV = self.q.shape[-1], self.v.shape[-1]
        return {
            "D": D,
            "DV": DV,
            "BD": max(16, triton.next_power_of_2(D)),
            "BDV": max(16, triton.next_power_of_2(DV)),
            "BLOCK": self.shape[0],
            "BM": tiles.rows,
            "BN": tiles.keys,
            "COMPACT": self.k_shard is not None,
            "CSR": self.starts is not None,
            "PACKED": bool(self.cuts),
            "PREC": "ieee" if self.q.dtype == torch.float32 else "tf32",
            "num_warps": tiles.warps,
            "num_stages": tiles.stages,
            "enable_fp_fusion": True,
        }


def _strides(*tensors: Tensor) -> list[int]:
    return [stride for x in tensors for stride in x.stride()[:3]]


def launch_rows(
    work: KernelArgs,
    kernel: str,
    out: Tensor,
    lse: Tensor,
    sinks: Tensor | None,
    dout: Tensor | None = None,
    delta: Tensor | None = None,
    source: str | None = None,
    resume: bool = False,
) -> None:
    """Writes out and lse, or dQ to `out`: through both sources, or through one, then `resume` adds to what
    the pass through the other wrote there."""
    q, tiles = work.q, work.tiles(kernel)
    count = [
        -(-(work.q_start + length) // tiles.rows) - work.q_start // tiles.rows for _, length in work.documents
    ]
    table = [(start, length, i) for (start, length), n in zip(work.documents, count) for i in range(n)]
    s2_row_kernel[(len(table), q.shape[0] * q.shape[2])](
        q, *work.sources, dout, out, out if resume else None, lse, delta, sinks, work.heads,
        *work.lists(kernel), work.table(table), *_strides(q, *work.sources, q if dout is None else dout, out),
        lse.stride(0), lse.stride(1), q.shape[1], work.q_start, work.k_start, *work.pattern,
        work.num_blocks, H=q.shape[2], GROUP=q.shape[2] // work.k.shape[2],
        DQ=dout is not None, HAS_SINK=sinks is not None, SHARD=source != "window", WINDOW=source != "shard",
        RESUME=resume, **work.constants(tiles),
    )  # fmt: skip


def launch_columns(
    work: KernelArgs, dout: Tensor, lse: Tensor, delta: Tensor, dk: Tensor, dv: Tensor
) -> None:
    """Writes dK and dV of a call whose shard is part of K and V."""
    launch_window_columns(work, dout, lse, delta, dk, dv, launch_shard_columns(work, dout, lse, delta))


def launch_shard_columns(work: KernelArgs, dout: Tensor, lse: Tensor, delta: Tensor) -> list[Tensor]:
    """dK and dV of the shard in float32, yet to be added up: `[splits, batch, tokens, kv_heads, dim]`; of a
    compact source `[splits, batch, tokens, dim]`, the `work.seen` tokens of each head one after another."""
    q, k = work.q, work.k
    batch, kv_heads = k.shape[0], k.shape[2]
    tiles = work.tiles("dkv")
    shard, room = [], 0
    for start, length in work.documents:
        tokens = work.shard_tokens(length)
        shard += [(start, length, i, room) for i in range(-(-tokens // tiles.keys))]
        room += tokens
    longest = max(length for _, length in work.documents)
    splits = work.tuning.splits(len(shard) * batch * kv_heads, longest) if shard else 0
    compact = work.k_shard is not None
    heads = [sum(work.seen)] if compact else [room, kv_heads]
    parts = [q.new_empty(splits, batch, *heads, x.shape[-1], dtype=torch.float32) for x in (k, work.v)]
    if shard:
        s2_bwd_kernel_dkv_shard[(len(shard), splits, batch * kv_heads)](
            q, *work.sources[2:], dout, lse, delta, *parts, work.heads, *work.lists("dkv"),
            work.table(shard), *_strides(q, *work.sources[2:], dout), lse.stride(0), lse.stride(1),
            *_part_strides(parts), q.shape[1], work.q_start, *work.pattern, -(-longest // splits),
            q.shape[2] // kv_heads, work.num_blocks, **work.constants(tiles), HKV=kv_heads,
        )  # fmt: skip
    return parts


def launch_window_columns(
    work: KernelArgs,
    dout: Tensor,
    lse: Tensor,
    delta: Tensor,
    dk: Tensor,
    dv: Tensor,
    parts: list[Tensor] | None = None,
) -> None:
    """Writes dK and dV of the window source, the parts of the shard added where it is the same."""
    q, k, v = work.q, work.k, work.v
    batch, kv_heads = k.shape[0], k.shape[2]
    tiles = work.tiles("dkv")
    window, room = [], 0
    for start, length in work.documents:
        keys = length if work.cuts else k.shape[1]
        window += [(start, length, i, room) for i in range(-(-keys // tiles.keys))]
        room += work.shard_tokens(length)
    splits, part_strides = (parts[0].shape[0], _part_strides(parts)) if parts else (0, [0] * 8)
    constants = work.constants(tiles)
    del constants["COMPACT"], constants["CSR"]
    s2_bwd_kernel_dkv_window[(len(window), batch * kv_heads)](
        q, k, v, dout, lse, delta, dk, dv, *(parts or (None, None)), work.heads, work.table(window),
        *_strides(q, k, v, dout), lse.stride(0), lse.stride(1), *_strides(dk, dv), *part_strides,
        q.shape[1], k.shape[1], work.q_start, work.k_start, *work.pattern, splits, q.shape[2] // kv_heads,
        ADD_SHARD=parts is not None, **constants, HKV=kv_heads,
    )  # fmt: skip


def _part_strides(parts: list[Tensor]) -> list[int]:
    """Strides of split, batch, token and, where they are apart, head."""
    strides = [part.stride()[:-1] for part in parts]
    return [stride for of_part in strides for stride in (*of_part, 0)[:4]]


def launch_delta(dout: Tensor, out: Tensor, dlse: Tensor | None, delta: Tensor) -> None:
    batch, seq, heads, dim = out.shape
    dlse = dlse if dlse is None else dlse.contiguous()
    rows = 64
    s2_bwd_kernel_delta[(-(-seq // rows), batch * heads)](
        dout, out, dlse, delta, *_strides(dout, out), seq,
        H=heads, DV=dim, BDV=max(16, triton.next_power_of_2(dim)), BM=rows, HAS_DLSE=dlse is not None,
        enable_fp_fusion=True,
    )  # fmt: skip
