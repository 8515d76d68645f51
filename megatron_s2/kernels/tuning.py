"""How the Triton kernels are cut into tiles: the shipped table, what autotuning may try beside it, or one
configuration that a caller pins."""

from __future__ import annotations

from dataclasses import astuple, dataclass


@dataclass(frozen=True)
class Tiles:
    """One kernel's launch: query rows and keys of a tile (powers of two >= 16), Triton's warps and stages.

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


@dataclass(frozen=True)
class Tuning:
    """One call's launches. Results do not depend on it but for rounding; the same one gives the same bits.

    Args:
        forward, dq, dkv: tiles of the kernels.
        span: query rows of one program of a shard column of dK/dV; by default so many that there are about
            `_COLUMN_PROGRAMS` programs, and never fewer than `_SHORTEST_SPAN`.
    """

    forward: Tiles
    dq: Tiles
    dkv: Tiles
    span: int | None = None

    def __post_init__(self) -> None:
        if self.span is not None and self.span < 1:
            raise ValueError(f"span {self.span}: must be >= 1")

    def encode(self) -> list[int]:
        """As the custom operators take it: plain integers."""
        return [*astuple(self.forward), *astuple(self.dq), *astuple(self.dkv), self.span or 0]

    @classmethod
    def decode(cls, code: list[int]) -> Tuning:
        """What `encode` gave."""
        return cls(*(Tiles(*code[i : i + 4]) for i in (0, 4, 8)), span=code[12] or None)

    def splits(self, columns: int, rows: int) -> int:
        """Into how many programs each of `columns` shard tiles is cut, that up to `rows` query rows see."""
        if self.span is not None:
            return -(-rows // self.span)
        return max(1, min(-(-_COLUMN_PROGRAMS // max(columns, 1)), -(-rows // _SHORTEST_SPAN)))


# Constants, not properties of the chip: the order of summation, and so the bits, stay the same everywhere.
_COLUMN_PROGRAMS = 2048
_SHORTEST_SPAN = 1024

# By largest head_dim: forward, dQ, dK/dV, each (rows, keys, warps, stages). None spills registers at head_dim
# 64 and 128 in 16 bits with the Triton of docs/kernel-resources.md.
_HOPPER_ON = {
    64: Tuning(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2)),
    128: Tuning(Tiles(128, 64, 8, 3), Tiles(128, 64, 8, 2), Tiles(64, 64, 8, 2)),
    256: Tuning(Tiles(64, 32, 8, 2), Tiles(64, 16, 8, 2), Tiles(32, 32, 8, 2)),
}
_AMPERE = _HOPPER_ON | {
    128: Tuning(Tiles(128, 32, 8, 3), Tiles(128, 32, 8, 2), Tiles(64, 64, 8, 2)),
}
_AMPERE_PASSES = _AMPERE | {
    64: Tuning(Tiles(128, 64, 8, 3), Tiles(128, 32, 8, 3), Tiles(32, 64, 4, 3)),
}


KERNELS = ("forward", "dq", "dkv")

# Multiplied without tensor cores, for full precision.
_FLOAT32 = {
    64: Tuning(Tiles(64, 32, 8, 2), Tiles(64, 32, 8, 2), Tiles(32, 16, 8, 2)),
    128: Tuning(Tiles(32, 16, 8, 2), Tiles(32, 16, 8, 2), Tiles(32, 16, 8, 2)),
    256: Tuning(Tiles(32, 16, 8, 2), Tiles(32, 16, 8, 2), Tiles(16, 16, 8, 2)),
}

# What autotuning tries after the shipped choice, by the same head_dim, under the same limits.
_HOPPER_ALSO = {
    64: {
        "forward": (Tiles(128, 128, 8, 2), Tiles(64, 64, 4, 3)),
        "dq": (Tiles(128, 32, 8, 3), Tiles(64, 64, 4, 3)),
        "dkv": (Tiles(64, 128, 8, 2), Tiles(32, 64, 4, 3)),
    },
    128: {
        "forward": (Tiles(64, 64, 4, 3),),
        "dq": (Tiles(128, 32, 8, 3),),
        "dkv": (Tiles(32, 64, 8, 2),),
    },
}
_AMPERE_ALSO = {
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


def tuning_for(capability: int, head_dim: int, element_size: int, passes: bool = False) -> Tuning:
    """The shipped choice for a chip (major compute capability), larger head_dim and bytes per element.

    `passes`: for window and shard one after the other, which takes a few registers more.
    """
    ampere = _AMPERE_PASSES if passes else _AMPERE
    tunings = _FLOAT32 if element_size > 2 else _HOPPER_ON if capability >= 9 else ampere
    return tunings[min(d for d in tunings if d >= head_dim)]


def candidates(kernel: str, capability: int, head_dim: int, element_size: int) -> tuple[Tiles, ...]:
    """The tiles among which autotuning chooses, the shipped ones first; arguments as of `tuning_for`."""
    by_head_dim = {} if element_size > 2 else _HOPPER_ALSO if capability >= 9 else _AMPERE_ALSO
    more = next((tiles[kernel] for most, tiles in by_head_dim.items() if head_dim <= most), ())
    return (getattr(tuning_for(capability, head_dim, element_size), kernel), *more)
