"""The cases of the attention benchmarks: shapes, precisions and patterns by name, at any length."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.benchmark import Row
from megatron_s2 import S2Pattern

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
PASSES = ("forward", "forward+backward")


@dataclass(frozen=True)
class Shape:
    """An attention call but for its length and device."""

    pattern: S2Pattern
    batch: int
    heads: int
    head_dim: int
    dtype: str

    def row(self) -> Row:
        p = self.pattern
        return {
            "batch": self.batch,
            "heads": self.heads,
            "kv_heads": p.num_kv_heads,
            "head_dim": self.head_dim,
            "dtype": self.dtype,
            "pattern": {
                "block_size": p.block_size,
                "local_blocks": p.local_blocks,
                "vert_stride": list(p.strides),
                "phases": list(p.head_phases),
                "sink_blocks": p.sink_blocks,
            },
        }


SHAPES = {
    "cpu": Shape(S2Pattern(2, 64, 8, 16), batch=1, heads=8, head_dim=64, dtype="float32"),
    "cpu-bfloat16": Shape(S2Pattern(2, 64, 8, 16), batch=1, heads=8, head_dim=64, dtype="bfloat16"),
    "grouped": Shape(S2Pattern(8, 64, 8, 16), batch=1, heads=32, head_dim=128, dtype="bfloat16"),
    # The default of DKernel's own benchmark; its phases are ours because heads = stride.
    "dkernel": Shape(S2Pattern(16, 64, 8, 16), batch=4, heads=16, head_dim=128, dtype="bfloat16"),
    # A quarter of grouped's shards: at 131072 tokens its FLOPs are 1/44 of those of dense attention.
    "stride-64": Shape(S2Pattern(8, 64, 8, 64), batch=1, heads=32, head_dim=128, dtype="bfloat16"),
}
DEFAULT_SHAPES = {"cpu": ["cpu"], "cuda": ["grouped", "dkernel"]}
DEFAULT_LENGTHS = {"cpu": [4096, 16384], "cuda": [2**n for n in range(12, 19)]}


def shape_name(row: Row) -> str | None:
    """Returns the name of a row's shape, or None if it is none of `SHAPES`."""
    return next((name for name, shape in SHAPES.items() if shape.row().items() <= row.items()), None)


def describe_shape(row: Row) -> str:
    """Describes heads and pattern of a row; the caller adds batch, length or device."""
    p = row["pattern"]
    return (
        f"heads {row['heads']}, KV heads {row['kv_heads']}, head_dim {row['head_dim']}, {row['dtype']}; "
        f"block {p['block_size']}, window {p['local_blocks']}, "
        f"stride {' '.join(map(str, sorted(set(p['vert_stride']))))}"
    )


@dataclass(frozen=True)
class Case:
    """One attention call: a shape at a length on a device, `cpu` or `cuda`, beside some other processes that
    never stop computing."""

    shape: Shape
    seq_length: int
    device: str
    busy_loops: int = 0

    @property
    def pattern(self) -> S2Pattern:
        return self.shape.pattern

    def inputs(self) -> tuple[Tensor, ...]:
        """Returns q, k, v and the gradient of the output, `[batch, seq, heads, head_dim]`, drawn from a fixed
        seed; q, k and v require gradients."""
        generator = torch.Generator(self.device).manual_seed(0)
        heads, kv_heads = self.shape.heads, self.pattern.num_kv_heads
        q, k, v, dout = (
            torch.randn(
                (self.shape.batch, self.seq_length, count, self.shape.head_dim),
                generator=generator,
                device=self.device,
                dtype=DTYPES[self.shape.dtype],
            )
            for count in (heads, kv_heads, kv_heads, heads)
        )
        return *(x.requires_grad_() for x in (q, k, v)), dout

    def input_bytes(self) -> int:
        tokens = self.shape.batch * self.seq_length * 2 * (self.shape.heads + self.pattern.num_kv_heads)
        return tokens * self.shape.head_dim * DTYPES[self.shape.dtype].itemsize

    def flops(self, pattern: S2Pattern) -> dict[str, int]:
        """Returns the FLOPs of each pass on the visible pairs of `pattern`."""
        forward, backward = pattern.flops(self.seq_length, self.shape.heads, self.shape.head_dim)
        batch = self.shape.batch
        return dict(zip(PASSES, (batch * forward, batch * (forward + backward))))

    def row(self) -> Row:
        return {"seq_length": self.seq_length, "device": self.device, **self.shape.row()}
