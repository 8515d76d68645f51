"""What the Triton kernels share: where a head's shard lies, and what a query sees of a run of keys.

The functions are those of `S2Pattern`, on device. A head's shard is described by two integers: `first`, its
first block after the sinks, and `stride`.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)


@triton.jit
def shard_count(block, first, stride, sinks):
    """Shard blocks among blocks 0 .. block-1."""
    strided = tl.maximum(0, block - first + stride - 1) // stride
    return tl.minimum(block, sinks) + strided


@triton.jit
def shard_block(n, first, stride, sinks):
    """The block at place n of the shard."""
    return tl.where(n < sinks, n, first + (n - sinks) * stride)


@triton.jit
def in_shard(block, first, stride, sinks):
    return (block < sinks) | ((block - first) % stride == 0)


@triton.jit
def shard_token(index, first, stride, sinks, BLOCK: tl.constexpr, COMPACT: tl.constexpr):
    """Where token `index` of a shard lies: there, in a compact source; in its block, in the whole K/V."""
    if COMPACT:
        return index
    return shard_block(index // BLOCK, first, stride, sinks) * BLOCK + index % BLOCK


@triton.jit
def window_run_visible(pos, key, first, stride, sinks, window, BLOCK: tl.constexpr):
    """Bool `[queries, keys]`: which keys of a run that contains its rows' windows each query sees."""
    row, block = pos[:, None] // BLOCK, key[None, :] // BLOCK
    seen = (row - block < window) | in_shard(block, first, stride, sinks)
    return seen & (key[None, :] <= pos[:, None])
