"""Tile sizes of the Triton kernels: the shipped ones for each chip, and the candidates of autotuning."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import astuple, dataclass, replace
from functools import cache, cached_property

KERNELS = ("forward", "dq", "dkv")


@dataclass(frozen=True)
class Tiles:
    """Launch configuration of one kernel.

    Args:
        rows: query rows of a tile, a power of two >= 16.
        keys: keys of a tile, a power of two >= 16.
        warps: Triton's num_warps.
        stages: Triton's num_stages.

    Raises:
        ValueError: a field is out of range; the message starts with its name.
    """

    rows: int
    keys: int
    warps: int
    stages: int

    def __post_init__(self) -> None:
        for name in ("rows", "keys"):
            size = getattr(self, name)
            if size < 16 or size & (size - 1):
                raise ValueError(f"{name} {size}: must be a power of two >= 16")
        if self.warps not in (1, 2, 4, 8, 16):
            raise ValueError(f"warps {self.warps}: must be 1, 2, 4, 8 or 16")
        if self.stages < 1:
            raise ValueError(f"stages {self.stages}: must be >= 1")

    def with_rows(self, rows: int) -> Tiles:
        """Returns smaller tiles, with no more warps than have 16 rows each: others would compute them
        again."""
        return replace(self, rows=rows, warps=max(1, min(self.warps, rows // 16)))

    def with_keys(self, keys: int) -> Tiles:
        """The same of keys, which are the rows of the products of dK and dV."""
        return replace(self, keys=keys, warps=max(1, min(self.warps, keys // 16)))


def packed_heads(group: int, rows: int, block_size: int) -> int:
    """Returns how many query heads of a group of `group` share a tile of `rows` rows.

    With as many as there are blocks in the tile, it has the tokens of one block of each: they see the same
    blocks, and only those on the diagonal are masked.
    """
    return math.gcd(group, max(1, rows // block_size))


def box_rows(kernel: str, head_dim: int) -> tuple[str, ...]:
    """Returns the tensor descriptors by which a kernel over query rows reads them: d_q, and d_do in dq. What
    arrives so stays in registers, which hold neither in dq beyond 128 numbers a row."""
    return ("d_q",) if kernel == "forward" else ("d_q", "d_do") if head_dim <= 128 else ()


def separate_dkv(tiles: Tiles, head_dims: int) -> bool:
    """Returns whether dK and dV are computed one after the other: where their accumulators of `head_dims`
    numbers per key would take more than half of a thread's registers."""
    return tiles.keys * head_dims > 128 * 32 * tiles.warps


@dataclass(frozen=True)
class Tuning:
    """Launch configuration of one call. It affects the rounding of results: equal ones give equal bits
    where strides and alignment, which decide between descriptors and pointers, are equal.

    Args:
        forward, dq, dkv: tiles of the kernels.
        span: query rows of one program of a shard column of dK/dV. By default there are programs enough to
            fill a chip and even out (`splits`).
    """

    forward: Tiles
    dq: Tiles
    dkv: Tiles
    span: int | None = None

    def __post_init__(self) -> None:
        if self.span is not None and self.span < 1:
            raise ValueError(f"span {self.span}: must be >= 1")

    @cached_property
    def code(self) -> str:
        """The integers as text, which the custom operators take."""
        return encode((*astuple(self.forward), *astuple(self.dq), *astuple(self.dkv), self.span or 0))

    def __hash__(self) -> int:
        return hash(self.code)  # which keeps its hash

    @classmethod
    @cache
    def decode(cls, code: str) -> Tuning:
        """Returns the tuning that has this `code`."""
        numbers = decode(code)
        return cls(*(Tiles(*numbers[i : i + 4]) for i in (0, 4, 8)), span=numbers[12] or None)

    def splits(self, columns: int, rows: int) -> int:
        """Returns the number of programs per shard tile: `columns` tiles that up to `rows` query rows see."""
        if self.span is not None:
            return -(-rows // self.span)
        to_fill, to_even_out = (
            -(-programs // max(columns, 1)) for programs in (_FEWEST_PROGRAMS, _MOST_PROGRAMS)
        )
        return max(1, min(max(to_fill, min(to_even_out, _SPLITS)), -(-rows // _SHORTEST_SPAN)))


# Constants, not properties of the chip: how the columns of a shard are summed does not depend on it. Each
# program writes its part of dK and dV in float32. Of few columns there are programs for every multiprocessor;
# of more, `_SPLITS` let the last programs end about together, until the columns alone are so many.
_FEWEST_PROGRAMS, _MOST_PROGRAMS = 1024, 4096
_SPLITS = 8
_SHORTEST_SPAN = 1024

# Tables by largest head_dim, for kernels in 16 bits. `scripts/kernel_resources.py --check` holds them to
# what docs/kernel-resources.md says: no product computed twice, copies ahead of their use, hardly any local
# memory. A third stage of dK and dV at head_dim 128 would leave room for one program only where now there
# are two.
_HOPPER = {
    64: Tuning(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 3)),
    128: Tuning(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2)),
    256: Tuning(Tiles(128, 64, 8, 2), Tiles(128, 32, 8, 3), Tiles(32, 128, 8, 2)),
}
# Blackwell accumulates in a memory of its own: there eight warps share a product of 64 rows.
_BLACKWELL = {
    64: Tuning(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2)),
    128: Tuning(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2)),
    256: Tuning(Tiles(64, 32, 8, 2), Tiles(64, 16, 8, 2), Tiles(32, 32, 8, 2)),
}
_AMPERE = _BLACKWELL | {
    128: Tuning(Tiles(128, 32, 8, 3), Tiles(128, 32, 8, 2), Tiles(64, 64, 8, 2)),
}
# Window and shard in two passes take a few registers more.
_AMPERE_PASSES = _AMPERE | {
    64: Tuning(Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 3), Tiles(32, 64, 4, 3)),
}
# float32 is multiplied in full precision, without tensor cores.
_FLOAT32 = {
    64: Tuning(Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 16, 8, 2)),
    128: Tuning(Tiles(32, 16, 8, 2), Tiles(32, 16, 8, 2), Tiles(32, 16, 8, 2)),
    256: Tuning(Tiles(32, 16, 8, 2), Tiles(32, 16, 8, 2), Tiles(16, 16, 8, 2)),
}

# Further candidates of autotuning, by largest head_dim; held to the same.
_HOPPER_CANDIDATES = {
    64: {
        "forward": (Tiles(64, 64, 4, 3),),
        "dq": (Tiles(128, 32, 8, 3), Tiles(64, 64, 4, 3)),
        "dkv": (Tiles(64, 64, 4, 2),),
    },
    128: {
        "forward": (Tiles(128, 32, 8, 3),),
        "dq": (Tiles(128, 32, 8, 3),),
        "dkv": (Tiles(32, 64, 4, 3),),
    },
}
_BLACKWELL_CANDIDATES = {
    64: {
        "forward": (Tiles(64, 64, 4, 3),),
        "dq": (Tiles(128, 32, 8, 3), Tiles(64, 64, 4, 3)),
        "dkv": (Tiles(32, 64, 4, 3),),
    },
    128: {
        "forward": (Tiles(64, 64, 4, 3),),
        "dq": (Tiles(128, 32, 8, 3),),
        "dkv": (Tiles(32, 64, 8, 2),),
    },
}
_AMPERE_CANDIDATES = {
    64: {
        "forward": (Tiles(64, 64, 4, 3),),
        "dq": (Tiles(128, 32, 8, 3), Tiles(64, 64, 4, 3)),
        "dkv": (Tiles(64, 128, 8, 2),),
    },
    128: {
        "forward": (Tiles(64, 32, 4, 3),),
        "dq": (Tiles(64, 32, 4, 2),),
        "dkv": (Tiles(32, 64, 8, 2),),
    },
}


def encode(numbers: Iterable[int]) -> str:
    """Returns integers as text: operators of PyTorch take it in and out faster than a list of them."""
    return ",".join(map(str, numbers))


def decode(code: str) -> tuple[int, ...]:
    """Returns the integers that `encode` wrote."""
    return tuple(map(int, code.split(","))) if code else ()


def tuning_for(capability: int, head_dim: int, element_size: int, passes: bool = False) -> Tuning:
    """Returns the shipped tuning.

    Args:
        capability: major compute capability of the GPU.
        head_dim: the larger head_dim of K and V.
        element_size: bytes per element of q, k and v.
        passes: whether window and shard are read in two passes.
    """
    ampere = _AMPERE_PASSES if passes else _AMPERE
    tunings = _FLOAT32 if element_size > 2 else _of_chip(capability, _BLACKWELL, _HOPPER, ampere)
    return tunings[min(d for d in tunings if d >= head_dim)]


def candidates(kernel: str, capability: int, head_dim: int, element_size: int) -> tuple[Tiles, ...]:
    """Returns the tiles that autotuning measures, the shipped ones first; arguments as in `tuning_for`."""
    tables = _of_chip(capability, _BLACKWELL_CANDIDATES, _HOPPER_CANDIDATES, _AMPERE_CANDIDATES)
    tables = {} if element_size > 2 else tables
    more = next((tiles[kernel] for most, tiles in tables.items() if head_dim <= most), ())
    return (getattr(tuning_for(capability, head_dim, element_size), kernel), *more)


def _of_chip(capability: int, blackwell: dict, hopper: dict, ampere: dict) -> dict:
    # From 12 on (GeForce, RTX PRO) there are neither Blackwell's tensor cores nor its shared memory.
    return blackwell if capability in (10, 11) else hopper if capability == 9 else ampere
