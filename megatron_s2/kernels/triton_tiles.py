"""What the Triton kernels share: where a head's shard lies, and what a query sees of a run of keys.

The functions are those of `S2Pattern`, on device. A head's shard is described by four integers: `first`, its
first block after the sinks, `stride`, and where it begins in a compact source (of all heads' shards one after
another) and among the parts of its gradients.

An arbitrary mask (CSR, a constant of each kernel) is a dense head with a window of one block, of whose shard
a row sees the blocks in its list alone. Its tables hold what is visible before the diagonal: the blocks of
each row, or the rows of each block.
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
def list_bounds(p_starts, i_g, i, num_blocks):
    """Where the list of row (or block) i of KV head i_g begins and ends."""
    p = p_starts + i_g * (num_blocks + 1) + i
    return tl.load(p), tl.load(p + 1)


@triton.jit
def first_at_least(p_list, begin, end, value):
    """Place of the first entry >= value in the ascending entries begin .. end-1, or end."""
    while begin < end:
        middle = (begin + end) // 2
        less = tl.load(p_list + middle) < value
        begin = tl.where(less, middle + 1, begin)
        end = tl.where(less, end, middle)
    return begin


@triton.jit
def listed_token(index, m_i, p_list, BLOCK: tl.constexpr):
    """Position of token `index` of the blocks of a list."""
    return tl.load(p_list + index // BLOCK, mask=m_i, other=0) * BLOCK + index % BLOCK


@triton.jit
def window_run_visible(pos, key, first, stride, sinks, window, BLOCK: tl.constexpr, SHARD: tl.constexpr):
    """Bool `[queries, keys]`: which keys of a run that contains its rows' windows each query sees; without
    SHARD in its window alone."""
    row, block = pos[:, None] // BLOCK, key[None, :] // BLOCK
    seen = row - block < window
    if SHARD:
        seen = seen | in_shard(block, first, stride, sinks)
    return seen & (key[None, :] <= pos[:, None])
