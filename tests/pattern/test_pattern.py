"""Specification of patterns: each closed form is compared with brute force from the definition."""

import json
import math
import tracemalloc
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_patterns import a_mask_pattern, a_pattern

from megatron_s2 import BlockMaskPattern, S2Pattern
from megatron_s2.pattern.block_pattern import attention_flops, dense_pairs

DKERNEL_MASKS = json.loads((Path(__file__).parents[1] / "golden" / "dkernel_block_masks.json").read_text())
DKERNEL_ARGUMENTS = (
    "num_heads",
    "num_kv_heads",
    "block_size",
    "local_blocks",
    "vert_stride",
    "homo_head",
    "num_dense_heads",
    "head_sliding_offset",
)


# The definition, written from the formula and independent of the package.


def stride_of(p: S2Pattern, g: int) -> int:
    if g >= p.num_kv_heads - p.num_dense_heads:
        return 1
    return p.vert_stride if isinstance(p.vert_stride, int) else p.vert_stride[g]


def phase_of(p: S2Pattern, g: int) -> int:
    return p.phases[g] if p.phases is not None else p.head_phases[g]


def visible(p: S2Pattern, i: int, j: int, g: int) -> bool:
    return j <= i and (i - j < p.local_blocks or in_shard(p, j, g))


def in_shard(p: S2Pattern, j: int, g: int) -> bool:
    v = stride_of(p, g)
    return j < p.sink_blocks or (v > 0 and (j + phase_of(p, g)) % v == 0)


def mask_of(p: S2Pattern, n: int) -> np.ndarray:
    """bool [num_kv_heads, n, n] (query block, key block)."""
    return np.array(
        [[[visible(p, i, j, g) for j in range(n)] for i in range(n)] for g in range(p.num_kv_heads)],
        dtype=bool,
    ).reshape(p.num_kv_heads, n, n)


def token_masks(p: S2Pattern, seq_len: int) -> np.ndarray:
    """bool [num_kv_heads, seq_len, seq_len] (query token, key token)."""
    n = -(-seq_len // p.block_size)
    tokens = np.kron(mask_of(p, n), np.ones((1, p.block_size, p.block_size), dtype=bool))
    return np.tril(tokens[:, :seq_len, :seq_len])


@st.composite
def patterns(draw, max_heads: int = 5, max_stride: int = 9) -> S2Pattern:
    """Any S2 pattern: one stride or one per head, given or default phases, sinks that may exceed the window,
    dense and window-only heads, any layer."""
    H = draw(st.integers(1, max_heads))
    stride = st.integers(0, max_stride)
    return S2Pattern(
        num_kv_heads=H,
        block_size=draw(st.sampled_from([16, 32])),
        local_blocks=draw(st.integers(1, 5)),
        vert_stride=draw(stride | st.tuples(*[stride] * H)),
        sink_blocks=draw(st.integers(0, 8)),
        phases=draw(st.none() | st.tuples(*[st.integers(0, 2 * max_stride)] * H)),
        num_dense_heads=draw(st.integers(0, H)),
        layer=draw(st.integers(0, 6)),
        warn_lost=False,
    )


# Visible blocks


@pytest.mark.parametrize("case", DKERNEL_MASKS, ids=lambda case: case["name"])
def test_from_dkernel_reproduces_the_masks_of_dkernels_own_code(case):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pattern = S2Pattern.from_dkernel(**{name: case[name] for name in DKERNEL_ARGUMENTS if name in case})
    num_blocks = case["seqlen"] // case["block_size"]
    rows_per_head = case["block_mask_hex"]
    golden = [
        [[bool(int(row, 16) >> j & 1) for j in range(num_blocks)] for row in rows] for rows in rows_per_head
    ]
    if case.get("homo_head"):
        assert len(golden) == 1
        kv_head_of = [0] * case["num_heads"]
        golden = golden * case["num_heads"]
    else:
        assert len(golden) == case["num_heads"]
        group = case["num_heads"] // pattern.num_kv_heads
        kv_head_of = [h // group for h in range(case["num_heads"])]
    assert torch.equal(pattern.block_mask(num_blocks)[kv_head_of], torch.tensor(golden))


def test_a_small_pattern_equals_a_mask_drawn_by_hand():
    pattern = a_pattern(num_kv_heads=2, vert_stride=4, sink_blocks=1, phases=(0, 3), warn_lost=False)
    drawn = [["".join(".#"[v] for v in row) for row in head] for head in pattern.block_mask(8).tolist()]
    assert drawn == [
        [
            "#.......",
            "##......",
            "###.....",
            "#.##....",
            "#..##...",
            "#...##..",
            "#...###.",
            "#...#.##",
        ],
        [
            "#.......",
            "##......",
            "###.....",
            "####....",
            "##.##...",
            "##..##..",
            "##...##.",
            "##...###",
        ],
    ]


@given(patterns(), st.integers(0, 24))
def test_block_mask_is_the_definition(p, n):
    mask = p.block_mask(n)
    assert mask.dtype == torch.bool
    assert np.array_equal(mask.numpy(), mask_of(p, n))


@given(patterns(), st.integers(1, 24))
def test_rows_and_columns_equal_those_of_the_mask(p, n):
    mask = mask_of(p, n)
    for g in range(p.num_kv_heads):
        for b in range(n):
            row = np.flatnonzero(mask[g, b]).tolist()
            assert list(p.row_blocks(g, b)) == row
            assert p.visible_blocks(g, b) == len(row)
            assert list(p.column_rows(g, b, n)) == np.flatnonzero(mask[g, :, b]).tolist()


@given(patterns(), st.integers(0, 40))
def test_the_shard_holds_sinks_and_strided_blocks_once_in_ascending_order(p, n):
    for g in range(p.num_kv_heads):
        shard = [j for j in range(n) if in_shard(p, j, g)]
        assert p.shard_size(g, n) == len(shard)
        assert [p.shard_block(g, k) for k in range(len(shard))] == shard
        assert p.shard_block(g, len(shard)) >= n


@given(patterns(), st.integers(0, 40))
def test_a_row_sees_a_prefix_of_the_shard_and_its_window(p, row):
    window_start = max(0, row - p.local_blocks + 1)
    for g in range(p.num_kv_heads):
        beyond_window = [j for j in range(window_start) if visible(p, row, j, g)]
        assert [p.shard_block(g, k) for k in range(p.shard_prefix(g, row))] == beyond_window


@given(patterns(), st.integers(1, 30))
def test_a_block_outside_the_shard_is_not_seen_again_after_the_window(p, row):
    for g in range(p.num_kv_heads):
        seen_before = set(p.row_blocks(g, row - 1))
        assert set(p.row_blocks(g, row)) <= seen_before | {row}


def test_a_window_or_sinks_over_the_whole_sequence_make_every_head_dense():
    n = 12
    for fields in ({"local_blocks": n}, {"sink_blocks": n}, {"vert_stride": 1}, {"num_dense_heads": 4}):
        mask = a_pattern(**fields).block_mask(n)
        assert torch.equal(mask, torch.ones_like(mask).tril()), fields


# Counts


@given(patterns(), st.integers(0, 150))
def test_visible_pairs_counts_every_token_pair(p, seq_len):
    counted = token_masks(p, seq_len).sum(axis=(1, 2))
    assert p.visible_pairs(seq_len) == tuple(counted.tolist())


@pytest.mark.parametrize("seq_len", [0, 1, 15, 16, 17, 31, 32, 33, 127, 128, 200])
@pytest.mark.parametrize("sink_blocks", [0, 1, 7], ids="sinks{}".format)
def test_visible_pairs_at_block_edges_and_ragged_tails(seq_len, sink_blocks):
    p = a_pattern(vert_stride=(5, 3, 9, 4), sink_blocks=sink_blocks, num_dense_heads=1, layer=2)
    assert p.visible_pairs(seq_len) == tuple(token_masks(p, seq_len).sum(axis=(1, 2)).tolist())


@given(patterns(), st.integers(1, 150))
def test_kv_tokens_are_the_keys_of_the_last_token(p, seq_len):
    last_row = token_masks(p, seq_len)[:, -1].sum(axis=1)
    assert p.kv_tokens(seq_len) == tuple(last_row.tolist())
    assert p.kv_bytes(seq_len, head_dim=64, bytes_per_element=2) == int(last_row.sum()) * 2 * 64 * 2


@given(patterns(), st.integers(0, 150), st.integers(1, 4))
def test_flops_are_two_products_forward_and_five_backward_on_visible_pairs(p, seq_len, group):
    d, dv = 8, 24
    pairs = group * int(token_masks(p, seq_len).sum())
    query_heads = group * p.num_kv_heads
    assert p.flops(seq_len, query_heads, d, dv) == (
        pairs * (2 * d + 2 * dv),
        pairs * (2 * d + 2 * dv + 2 * dv + 2 * d + 2 * d),
    )
    assert p.flops(seq_len, query_heads, d) == p.flops(seq_len, query_heads, d, d)


@given(st.integers(0, 10_000))
def test_a_dense_head_counts_as_causal_attention(seq_len):
    p = a_pattern(vert_stride=1)
    assert p.visible_pairs(seq_len) == (seq_len * (seq_len + 1) // 2,) * 4
    assert p.visible_pairs(seq_len) == (dense_pairs(seq_len),) * 4
    assert p.kv_tokens(seq_len) == (seq_len,) * 4
    assert p.flops(seq_len, 8, 64) == attention_flops(8 * dense_pairs(seq_len), 64)


def test_an_empty_sequence_has_no_pairs():
    for p in (a_pattern(sink_blocks=3), a_mask_pattern(num_blocks=4)):
        assert p.num_blocks(0) == 0
        assert set(p.visible_pairs(0)) == set(p.kv_tokens(0)) == {0}
        assert p.block_mask(0).shape == (p.num_kv_heads, 0, 0)


# Coverage


def lost_blocks(layers: list[S2Pattern], period: int) -> int:
    """Number of blocks in one distant period that no head of `layers` sees."""
    far = 1000 * period
    start = far // 2
    return sum(
        not any(visible(p, far, j, g) for p in layers for g in range(p.num_kv_heads))
        for j in range(start, start + period)
    )


@given(patterns(max_heads=4, max_stride=6), st.integers(1, 4))
def test_coverage_counts_the_distant_blocks_no_head_sees(p, num_layers):
    period = math.lcm(*(stride for g in range(p.num_kv_heads) if (stride := stride_of(p, g))))
    layers = [p.for_layer(p.layer + k) for k in range(num_layers)]
    coverage = p.coverage(num_layers)
    assert coverage == (period, lost_blocks(layers, period))
    assert coverage.fraction == pytest.approx(1 - coverage.lost / period)


@pytest.mark.parametrize("stride", [1, 2, 3, 5, 7, 8, 10, 16, 31, 64], ids="v{}".format)
@pytest.mark.parametrize("heads", [1, 2, 3, 4, 7, 8, 12, 32], ids="H{}".format)
def test_ceil_of_stride_over_heads_consecutive_layers_cover_everything(heads, stride):
    needed = -(-stride // heads)
    for first in range(2 * needed + 1):
        p = a_pattern(num_kv_heads=heads, vert_stride=stride, layer=first)
        assert p.coverage(needed).lost == 0
        assert p.coverage(1).lost == max(0, stride - heads), "heads of one layer repeat each other"


@given(patterns(max_stride=12))
def test_rotation_covers_everything_for_any_mix_of_strides(p):
    if p.phases is not None:
        return
    strides = [stride_of(p, g) for g in range(p.num_kv_heads)]
    needed = min((-(-stride // strides.count(stride)) for stride in strides if stride), default=None)
    if needed is None:
        assert p.coverage(4) == (1, 1), "window-only heads see nothing of the distant past"
    else:
        assert p.coverage(needed).lost == 0


@given(patterns())
def test_layers_rotate_default_phases_only(p):
    later = p.for_layer(p.layer + 1)
    assert later.layer == p.layer + 1
    assert later.strides == p.strides
    if p.phases is not None:
        assert later.head_phases == p.head_phases
    assert all(0 <= phase < (stride or 1) for phase, stride in zip(later.head_phases, later.strides))


def test_default_phases_spread_evenly_over_the_kv_heads():
    assert a_pattern(num_kv_heads=4, vert_stride=16).head_phases == (0, 4, 8, 12)
    assert a_pattern(num_kv_heads=4, vert_stride=16, layer=3).head_phases == (3, 7, 11, 15)
    assert a_pattern(num_kv_heads=4, vert_stride=16, layer=4).head_phases == (0, 4, 8, 12)
    assert a_pattern(num_kv_heads=8, vert_stride=4).head_phases == (0, 1, 2, 3, 0, 1, 2, 3)
    assert a_pattern(num_kv_heads=4, vert_stride=10).head_phases == (0, 2, 5, 7)
    assert a_pattern(num_kv_heads=4, vert_stride=(8, 2, 8, 2)).head_phases == (0, 0, 4, 1)
    assert a_pattern(num_kv_heads=4, num_dense_heads=2, vert_stride=4).head_phases == (0, 2, 0, 0)
    assert a_pattern(num_kv_heads=4, vert_stride=(4, 0, 4, 0), layer=1).head_phases == (1, 0, 3, 0)


def test_given_phases_that_lose_context_warn_with_the_number_of_lost_blocks():
    with pytest.warns(UserWarning, match="2 of every 4 distant blocks are seen by no head"):
        a_pattern(phases=(0, 0, 1, 1))
    with pytest.warns(UserWarning, match="8 of every 16 distant blocks"):
        S2Pattern.from_dkernel(num_heads=32, num_kv_heads=8, block_size=64, local_blocks=8, vert_stride=16)


def test_nothing_warns_where_nothing_is_lost_or_the_whole_was_judged_before():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = a_pattern(phases=(3, 1, 2, 0))
        whole.slice_heads(0, 1).slice_heads(0, 1)
        whole.tp_slice(1, 4)
        a_pattern(vert_stride=64).for_layer(7).tp_slice(1, 2).for_layer(8)
        S2Pattern.from_dkernel(num_heads=8, block_size=64, local_blocks=4, vert_stride=8)
        quiet = a_pattern(phases=(0, 0, 0, 0), warn_lost=False)
        quiet.for_layer(1)
        assert a_pattern(vert_stride=0, phases=(0, 1, 2, 3)).coverage().fraction == 0
    with pytest.warns(UserWarning, match="3 of every 4") as told:
        S2Pattern.from_dkernel(
            num_heads=4, block_size=16, local_blocks=2, vert_stride=4, homo_head=True
        ).for_layer(5)
    assert len(told) == 1


# Slices


@given(patterns(), st.data())
def test_slice_heads_keeps_the_blocks_of_each_head(p, data):
    start = data.draw(st.integers(0, p.num_kv_heads - 1))
    stop = data.draw(st.integers(start + 1, p.num_kv_heads))
    part = p.slice_heads(start, stop)
    assert part.num_kv_heads == stop - start
    assert torch.equal(part.block_mask(20), p.block_mask(20)[start:stop])
    assert part.visible_pairs(333) == p.visible_pairs(333)[start:stop]


@given(patterns(max_heads=8), st.data())
def test_tensor_parallel_slices_concatenate_to_the_whole_pattern(p, data):
    H = p.num_kv_heads
    size = data.draw(st.sampled_from([size for size in range(1, H + 1) if H % size == 0]))
    parts = [p.tp_slice(rank, size) for rank in range(size)]
    assert torch.equal(torch.cat([part.block_mask(20) for part in parts]), p.block_mask(20))


@given(patterns(max_heads=4), st.integers(2, 4))
def test_with_more_ranks_than_kv_heads_neighbouring_ranks_have_the_same_head(p, copies):
    size = copies * p.num_kv_heads
    mask = p.block_mask(20)
    for rank in range(size):
        part = p.tp_slice(rank, size)
        assert torch.equal(part.block_mask(20), mask[rank // copies, None])


# Query heads: patterns that differ within a KV group


def test_phi_3_small_has_dkernels_phases_per_query_head():
    """From the published model: query head h sees the blocks j of the past with (j + h + 1) % 8 == 0."""
    published = S2Pattern.from_dkernel(
        num_heads=32, block_size=64, local_blocks=16, vert_stride=8, head_sliding_offset=1
    )
    seen = [
        [[j <= i and (i - j < 16 or (j + h + 1) % 8 == 0) for j in range(40)] for i in range(40)]
        for h in range(32)
    ]
    assert published.block_mask(40).tolist() == seen
    assert published.shared_by(8) is published
    assert published.coverage().lost == 0


@given(patterns(), st.integers(1, 4))
def test_heads_that_see_the_same_are_one_head(p, group):
    repeated = p.select_heads([g for g in range(p.num_kv_heads) for _ in range(group)])
    shared = repeated.shared_by(p.num_kv_heads)
    assert torch.equal(shared.block_mask(20), p.block_mask(20))
    assert shared.num_kv_heads == p.num_kv_heads


def test_one_different_head_keeps_a_head_for_each_query_head():
    for different in ({"phases": (0, 0, 1, 2)}, {"vert_stride": (4, 4, 1, 4), "phases": (0, 0, 0, 0)}):
        pattern = a_pattern(**different, warn_lost=False)
        assert pattern.shared_by(2) is pattern
        assert pattern.slice_heads(0, 2).shared_by(1).num_kv_heads == 1
    with pytest.raises(ValueError, match="num_kv_heads 3: must be a divisor of the pattern's 4 heads"):
        pattern.shared_by(3)


# BlockMaskPattern: the same interface for any mask


@given(patterns(max_heads=3), st.integers(1, 14), st.data())
def test_a_block_mask_pattern_of_an_s2_mask_answers_like_the_s2_pattern(p, n, data):
    other = BlockMaskPattern(p.block_mask(n), p.block_size)
    seq_len = data.draw(st.integers(0, n * p.block_size))
    assert other.num_kv_heads == p.num_kv_heads
    assert other.num_blocks(seq_len) == p.num_blocks(seq_len)
    assert other.visible_pairs(seq_len) == p.visible_pairs(seq_len)
    assert other.kv_tokens(seq_len) == p.kv_tokens(seq_len)
    assert other.kv_bytes(seq_len, 64, 2) == p.kv_bytes(seq_len, 64, 2)
    assert other.flops(seq_len, p.num_kv_heads, 64) == p.flops(seq_len, p.num_kv_heads, 64)
    for m in range(n + 1):
        assert torch.equal(other.block_mask(m), p.block_mask(m))
        for g in range(p.num_kv_heads):
            for b in range(m):
                assert other.column_rows(g, b, m) == list(p.column_rows(g, b, m))
    for g in range(p.num_kv_heads):
        for row in range(n):
            assert other.row_blocks(g, row) == p.row_blocks(g, row)
            assert other.visible_blocks(g, row) == p.visible_blocks(g, row)
        assert torch.equal(other.slice_heads(g, g + 1).block_mask(n), p.slice_heads(g, g + 1).block_mask(n))
        assert torch.equal(
            other.tp_slice(g, p.num_kv_heads).block_mask(n), p.tp_slice(g, p.num_kv_heads).block_mask(n)
        )


@given(st.integers(1, 3), st.integers(1, 10), st.data())
def test_a_block_mask_pattern_keeps_any_causal_mask(heads, n, data):
    bits = data.draw(st.lists(st.booleans(), min_size=heads * n * n, max_size=heads * n * n))
    mask = np.tril(np.array(bits).reshape(heads, n, n)) | np.eye(n, dtype=bool)
    p = BlockMaskPattern(mask.tolist(), block_size=16)
    assert np.array_equal(p.block_mask(n).numpy(), mask)
    tokens = np.tril(np.kron(mask, np.ones((1, 16, 16), dtype=bool)))
    assert p.visible_pairs(16 * n) == tuple(tokens.sum(axis=(1, 2)).tolist())


# Refusals: a ValueError that names the field, its value and the allowed values


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 0}, "num_kv_heads 0: must be >= 1"),
        ({"block_size": 48}, "block_size 48: must be a power of two >= 16"),
        ({"block_size": 8}, "block_size 8: must be a power of two >= 16"),
        ({"block_size": 0}, "block_size 0: must be a power of two >= 16"),
        ({"block_size": -64}, "block_size -64: must be a power of two >= 16"),
        ({"local_blocks": 0}, "local_blocks 0: must be >= 1"),
        ({"vert_stride": -1}, "vert_stride -1: must be >= 0 (0 is window-only)"),
        ({"vert_stride": (4, 4, -1, 4)}, "vert_stride (4, 4, -1, 4): must be >= 0 (0 is window-only)"),
        ({"vert_stride": (4, 4)}, "vert_stride (4, 4): must be one or one per KV head (4)"),
        ({"sink_blocks": -1}, "sink_blocks -1: must be >= 0"),
        ({"phases": (0, 1, 2)}, "phases (0, 1, 2): must be one per KV head (4)"),
        ({"phases": (0, -1, 2, 3)}, "phases (0, -1, 2, 3): must be >= 0"),
        ({"num_dense_heads": 5}, "num_dense_heads 5: must be between 0 and 4"),
        ({"num_dense_heads": -1}, "num_dense_heads -1: must be between 0 and 4"),
        ({"layer": -1}, "layer -1: must be >= 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_s2_pattern_refuses(fields, message):
    with pytest.raises(ValueError) as refused:
        a_pattern(**fields)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_kv_heads": 3}, "num_kv_heads 3: must be a divisor of 8 query heads"),
        ({"num_kv_heads": 0}, "num_kv_heads 0: must be a divisor of 8 query heads"),
        ({"vert_stride": 0}, "vert_stride 0: must be >= 1"),
        ({"homo_head": True, "num_dense_heads": 1}, "num_dense_heads 1: must be 0 with homo_head"),
        ({"block_size": 48}, "block_size 48: must be a power of two >= 16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_from_dkernel_refuses(fields, message):
    arguments = {"num_heads": 8, "block_size": 64, "local_blocks": 4, "vert_stride": 8} | fields
    with pytest.raises(ValueError) as refused:
        S2Pattern.from_dkernel(**arguments)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: p.visible_pairs(-1), "seq_len -1: must be >= 0"),
        (lambda p: p.kv_tokens(-1), "seq_len -1: must be >= 0"),
        (lambda p: p.flops(64, 6, 64), "num_query_heads 6: must be a multiple of the pattern's 4 KV heads"),
        (lambda p: p.flops(64, 0, 64), "num_query_heads 0: must be a multiple of the pattern's 4 KV heads"),
        (lambda p: p.coverage(0), "num_layers 0: must be >= 1"),
        (lambda p: p.for_layer(-1), "layer -1: must be >= 0"),
        (lambda p: p.slice_heads(2, 2), "heads 2:2: must be in 0:4"),
        (lambda p: p.slice_heads(-1, 2), "heads -1:2: must be in 0:4"),
        (lambda p: p.slice_heads(0, 5), "heads 0:5: must be in 0:4"),
        (lambda p: p.tp_slice(0, 3), "size 3: must be a divisor or a multiple of 4 KV heads"),
        (lambda p: p.tp_slice(0, 6), "size 6: must be a divisor or a multiple of 4 KV heads"),
        (lambda p: p.tp_slice(0, 0), "size 0: must be a divisor or a multiple of 4 KV heads"),
        (lambda p: p.tp_slice(2, 2), "rank 2: must be between 0 and 1"),
        (lambda p: p.tp_slice(-1, 2), "rank -1: must be between 0 and 1"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_s2_pattern_methods_refuse(ask, message):
    with pytest.raises(ValueError) as refused:
        ask(a_pattern())
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("mask", "block_size", "message"),
    [
        ([[True]], 16, "mask shape (1, 1): must be [num_kv_heads, num_blocks, num_blocks]"),
        ([[[1, 0]]], 16, "mask shape (1, 1, 2): must be [num_kv_heads, num_blocks, num_blocks]"),
        ([], 16, "mask shape (0,): must be [num_kv_heads, num_blocks, num_blocks]"),
        ([[[1, 1], [1, 1]]], 16, "mask sees later blocks: must be lower triangular"),
        ([[[1, 0], [1, 0]]], 16, "mask hides diagonal blocks: must be true on the diagonal"),
        ([[[1]]], 24, "block_size 24: must be a power of two >= 16"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_block_mask_pattern_refuses(mask, block_size, message):
    with pytest.raises(ValueError) as refused:
        BlockMaskPattern(mask, block_size)
    assert str(refused.value) == message


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda p: p.row_blocks(0, 4), "block 4: must be one of the mask's 4 blocks"),
        (lambda p: p.row_blocks(0, -1), "block -1: must be one of the mask's 4 blocks"),
        (lambda p: p.visible_blocks(0, 4), "block 4: must be one of the mask's 4 blocks"),
        (lambda p: p.column_rows(0, 0, 5), "blocks 5: must be at most the mask's 4 blocks"),
        (lambda p: p.block_mask(5), "blocks 5: must be at most the mask's 4 blocks"),
        (lambda p: p.visible_pairs(81), "blocks 5: must be at most the mask's 4 blocks"),
        (lambda p: p.visible_pairs(65), "block 4: must be one of the mask's 4 blocks"),
        (lambda p: p.kv_tokens(65), "block 4: must be one of the mask's 4 blocks"),
        (lambda p: p.visible_pairs(-1), "seq_len -1: must be >= 0"),
        (lambda p: p.slice_heads(0, 3), "heads 0:3: must be in 0:2"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_block_mask_pattern_methods_refuse(ask, message):
    with pytest.raises(ValueError) as refused:
        ask(a_mask_pattern(num_blocks=4))
    assert str(refused.value) == message


# Equality, hashing and descriptions


def test_patterns_are_compared_and_hashed_by_value():
    p = a_pattern(vert_stride=[4, 4, 8, 8], phases=[0, 1, 2, 3], warn_lost=False)
    assert p == a_pattern(vert_stride=(4, 4, 8, 8), phases=(0, 1, 2, 3), warn_lost=False)
    assert len({p, p.for_layer(0), p.for_layer(1)}) == 2
    assert [p.is_dense(g) for g in range(4)] == [False] * 4
    assert a_pattern(num_dense_heads=1).is_dense(3)
    assert [a_pattern(vert_stride=(0, 4, 0, 1)).is_window_only(g) for g in range(4)] == [True, False] * 2


def test_descriptions_name_all_settings():
    p = S2Pattern(
        num_kv_heads=10, block_size=64, local_blocks=8, vert_stride=16, sink_blocks=2, num_dense_heads=2
    )
    assert p.describe() == "block 64, window 8 (512 tokens), stride 16, sinks 2, dense heads 2"
    assert p.describe_phases() == "phases 0 2 4 6 8 10 12 14 …"
    mixed = a_pattern(vert_stride=(2, 4, 2, 4))
    assert mixed.describe() == "block 16, window 2 (32 tokens), stride 2 4 2 4"
    assert mixed.describe_phases() == "phases 0 0 1 2"
    assert a_pattern(vert_stride=0).describe() == "block 16, window 2 (32 tokens), no stride"


# Memory


def test_a_million_tokens_and_32_heads_take_kilobytes():
    tracemalloc.start()
    try:
        p = S2Pattern(num_kv_heads=32, block_size=16, local_blocks=8, vert_stride=64, sink_blocks=4)
        p.visible_pairs(1 << 20)
        p.kv_tokens(1 << 20)
        p.flops(1 << 20, 128, 128)
        p.coverage(2)
        p.column_rows(31, 5, 1 << 16)
        for rank in range(32):
            p.tp_slice(rank, 32).visible_pairs(1 << 20)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 100_000, f"{peak} bytes; one row of blocks per head is already 2 MB"
