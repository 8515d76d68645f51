"""Device functions that several Triton kernels share: where a head's shard lies, and what each query sees.

They mirror the methods of `S2Pattern`. A row of the table `p_heads` describes the shard of one KV head:

    0  first   first block of the shard after the sinks
    1  stride  blocks between two blocks of the shard
    2  start   first token of this head's shard in a compact source, which holds the shards of all heads one
               after another
    3  offset  first token of this head's shard among the parts of the gradients of a compact source

An arbitrary mask (constant CSR) is a dense head with a window of one block that sees, of the blocks before
the diagonal, only those in a list: the key blocks of each row, or for dK/dV the rows of each key block.

Names have the prefixes of flash-linear-attention: `p_` pointer, `s_` stride, `i_` index, `o_` offsets, `m_`
mask, `b_` block of values. Strides end in `b` for batch, `t` token and `h` head. In shapes, BM is the number
of query rows of a tile, BN of its keys, BD and BDV are head_dim of K and V rounded up to a power of two. With
PACK the rows of a tile are those of PACK query heads of one KV head, BM // PACK tokens of each.

`d_` is a tensor descriptor `[batch, head, token, dim]`: with it (constant DESC) the hardware copies a whole
tile from one token on (TMA), without addresses and masks in registers. A tile that would reach beyond its
document begins earlier and masks what it has read before: beyond a packed document's end lie others' tokens,
which must not be multiplied even by zero."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)

# Triton decides this when a kernel is defined, which is when this package's kernels are first imported.
INTERPRETED = triton.knobs.runtime.interpret


@triton.jit
def query_program(p_tiles, seq_q, GROUP: tl.constexpr, PACK: tl.constexpr, PACKED: tl.constexpr):
    """What a program over query rows computes: (i_m, i_b, i_h, i_g, doc, seq_q).

    It is tile i_m of query heads i_h .. i_h+PACK-1 of sequence i_b. In a packed batch, a row of p_tiles holds
    the first token and the length of the program's document, and the tile's index in it.
    """
    # Late tiles have the most keys: they start first.
    i_m = tl.num_programs(0) - 1 - tl.program_id(0)
    i_h, i_b = (tl.program_id(1) * PACK).to(tl.int64), tl.program_id(2)
    i_g = i_h // GROUP
    doc = tl.zeros((), dtype=tl.int64)
    if PACKED:
        doc = tl.load(p_tiles + 3 * i_m).to(tl.int64)
        seq_q = tl.load(p_tiles + 3 * i_m + 1)
        i_m = tl.load(p_tiles + 3 * i_m + 2)
    return i_m, i_b, i_h, i_g, doc, seq_q


@triton.jit
def key_program(i_n, p_tiles, seq_q, PACKED: tl.constexpr):
    """What program i_n over keys computes: (i_n, doc, seq_q, offset).

    In a packed batch, a row of p_tiles holds the first token and the length of the program's document, the
    tile's index in it, and the first token of the document's shard among the parts of the gradients.
    """
    doc = tl.zeros((), dtype=tl.int64)
    offset = tl.zeros((), dtype=tl.int64)
    if PACKED:
        doc = tl.load(p_tiles + 4 * i_n).to(tl.int64)
        seq_q = tl.load(p_tiles + 4 * i_n + 1)
        offset = tl.load(p_tiles + 4 * i_n + 3).to(tl.int64)
        i_n = tl.load(p_tiles + 4 * i_n + 2)
    return i_n, doc, seq_q, offset


@triton.jit
def load_tile(p, t, s_t, o_d, m_t, m_d):
    """Rows `[BN, BD]` at tokens t of a tensor, zeros where there is none."""
    return tl.load(p + t[:, None] * s_t + o_d, mask=m_t[:, None] & m_d[None, :], other=0.0)


@triton.jit
def load_box(d, i_b, i_h, t, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows `[ROWS, COLUMNS]` from token t on, through a tensor descriptor; all of them exist."""
    return d.load([i_b, i_h, t, 0]).reshape(ROWS, COLUMNS)


@triton.jit
def load_heads(d, i_b, i_h, t, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows `[ROWS, COLUMNS]` of the heads in a box, i_h the first, from token t on. Those beyond a document
    are other documents' rows, and are to be computed with each on its own."""
    return d.load([i_b, i_h, t, 0]).reshape(ROWS, COLUMNS)


@triton.jit
def shard_count(block, first, stride, sinks):
    """Number of shard blocks among blocks 0 .. block-1."""
    strided = tl.maximum(0, block - first + stride - 1) // stride
    return tl.minimum(block, sinks) + strided


@triton.jit
def shard_block(n, first, stride, sinks):
    """Block number of the n-th block of the shard."""
    return tl.where(n < sinks, n, first + (n - sinks) * stride)


@triton.jit
def in_shard(block, first, stride, sinks):
    """Whether a block belongs to the shard."""
    return (block < sinks) | ((block - first) % stride == 0)


@triton.jit
def shard_token(index, first, stride, sinks, BLOCK: tl.constexpr, COMPACT: tl.constexpr):
    """Position in the shard source of token `index` of the shard: the same in a compact source, that of its
    block in the whole K/V."""
    if COMPACT:
        return index
    return shard_block(index // BLOCK, first, stride, sinks) * BLOCK + index % BLOCK


@triton.jit
def list_bounds(p_starts, i_g, i, num_blocks):
    """First and last (exclusive) entry of the list of row (or key block) i of KV head i_g."""
    p = p_starts + i_g * (num_blocks + 1) + i
    return tl.load(p), tl.load(p + 1)


@triton.jit
def first_at_least(p_list, begin, end, value):
    """Index of the first entry >= value in the ascending entries begin .. end-1, or end."""
    while begin < end:
        middle = (begin + end) // 2
        less = tl.load(p_list + middle) < value
        begin = tl.where(less, middle + 1, begin)
        end = tl.where(less, end, middle)
    return begin


@triton.jit
def listed_token(index, m_index, p_list, BLOCK: tl.constexpr):
    """Position of token `index` of the blocks in a list."""
    return tl.load(p_list + index // BLOCK, mask=m_index, other=0) * BLOCK + index % BLOCK


@triton.jit
def listed_tile(i_n, p_list, BLOCK: tl.constexpr, BN: tl.constexpr):
    """Positions `[BN]` of tokens i_n .. i_n+BN-1 of the blocks in a list."""
    o_n = tl.arange(0, BN)
    if BN <= BLOCK:  # the tile lies in one block: a single load
        return listed_token(i_n, True, p_list, BLOCK) + o_n
    return listed_token(i_n + o_n, o_n >= 0, p_list, BLOCK)


@triton.jit
def shard_tile(
    i_n, p_list, first, stride, sinks,
    BLOCK: tl.constexpr, BN: tl.constexpr, COMPACT: tl.constexpr, CSR: tl.constexpr,
):  # fmt: skip
    """Positions `[BN]` in the shard source of shard tokens i_n .. i_n+BN-1, all of which exist."""
    if CSR:
        t = listed_tile(i_n, p_list, BLOCK, BN)
    else:
        t = shard_token(i_n + tl.arange(0, BN), first, stride, sinks, BLOCK, COMPACT)
    return t.to(tl.int64)


@triton.jit
def shard_tail_tile(
    index, m_n, p_list, first, stride, sinks, BLOCK: tl.constexpr, COMPACT: tl.constexpr, CSR: tl.constexpr
):
    """Positions `[BN]` in the shard source of shard tokens `index`, of which `m_n` exist."""
    if CSR:
        t = listed_token(index, m_n, p_list, BLOCK)
    else:
        t = shard_token(index, first, stride, sinks, BLOCK, COMPACT)
    return t.to(tl.int64)


@triton.jit
def shard_run(
    p_starts, i_g, row0, row1, low, first, stride, sinks, window, num_blocks,
    BLOCK: tl.constexpr, SHARD: tl.constexpr, WINDOW: tl.constexpr, CSR: tl.constexpr,
):  # fmt: skip
    """Shard tokens that a tile of query rows in blocks row0 .. row1 reads: (begin, seen, tokens).

    Tokens [0, seen) lie before block `low`, where the window of the first row begins, so every row sees them.
    Tokens [seen, tokens) lie before the windows of later rows only; they are read from the shard where the
    window is not read (WINDOW is off). `begin` is the first entry of the list of the row (CSR).
    """
    begin = 0
    seen = 0
    tokens = 0
    if SHARD:
        if CSR:
            begin, end = list_bounds(p_starts, i_g, row0, num_blocks)
            seen = (end - begin).to(tl.int32) * BLOCK
        else:
            seen = shard_count(low, first, stride, sinks) * BLOCK
        tokens = seen
        if not WINDOW:
            tokens = shard_count(tl.maximum(0, row1 - window + 1), first, stride, sinks) * BLOCK
    return begin, seen, tokens


@triton.jit
def list_entry(i, in_shard, p_list, BLOCK: tl.constexpr, BN: tl.constexpr, CSR: tl.constexpr):
    """Block of the i-th of `in_shard` tiles of a list; to be loaded an iteration ahead, because a load that a
    copy depends on would take one of the copy's stages. 0 without a list."""
    entry = 0
    if CSR:
        entry = tl.load(p_list + i // (BLOCK // BN), mask=i < in_shard, other=0)
    return entry


@triton.jit
def whole_tile(
    i, entry, in_shard, shard_start, window_start, first, stride, sinks,
    BLOCK: tl.constexpr, BN: tl.constexpr, COMPACT: tl.constexpr, CSR: tl.constexpr,
):  # fmt: skip
    """First token in its source of the i-th tile that all rows see: `in_shard` tiles of the shard, the first
    of which counts from token `shard_start`, and behind them those of the window from token `window_start`
    on."""
    if COMPACT:
        t = i * BN
    elif CSR:
        t = entry * BLOCK + i % (BLOCK // BN) * BN
    else:
        t = shard_block(i // (BLOCK // BN), first, stride, sinks) * BLOCK + i % (BLOCK // BN) * BN
    return tl.where(i < in_shard, shard_start + t, window_start + (i - in_shard) * BN)


@triton.jit
def window_run(row0, row1, low, window, BLOCK: tl.constexpr, BN: tl.constexpr):
    """Window keys that a tile of query rows in blocks row0 .. row1 reads: (low, left, inner), in tokens.

    In [low, left) rows differ, because the windows of later rows have left these blocks. In [left, inner)
    every row sees every key. From `inner` on lies the diagonal.
    """
    low = low * BLOCK
    diagonal = row0 * BLOCK
    left = tl.minimum(tl.maximum(low, (row1 - window + 1) * BLOCK), diagonal)
    inner = left + (diagonal - left) // BN * BN
    return low, left, inner


@triton.jit
def window_mask(pos, key, first, stride, sinks, window, BLOCK: tl.constexpr, SHARD: tl.constexpr):
    """Bool `[BM, BN]`: which blocks of the window run each query sees. With SHARD that includes blocks of the
    shard which its own window has left."""
    row, block = pos[:, None] // BLOCK, key[None, :] // BLOCK
    seen = row - block < window
    if SHARD:
        seen = seen | in_shard(block, first, stride, sinks)
    return seen
