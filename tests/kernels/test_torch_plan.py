"""Specification of the torch backend's plan, in integers: which calls cover which query-key pairs."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_s2 import BlockMaskPattern, S2Pattern
from megatron_s2.kernels.reference import visible_tokens
from megatron_s2.kernels.torch_plan import Band, Causal, Gathered, Past, equal_heads, plan_head

MAX_BLOCKS = 16


@st.composite
def s2_patterns(draw) -> S2Pattern:
    return S2Pattern(
        num_kv_heads=1,
        block_size=16,
        local_blocks=draw(st.integers(1, 5)),
        vert_stride=draw(st.integers(0, 6)),
        sink_blocks=draw(st.integers(0, 8)),
        phases=(draw(st.integers(0, 6)),),
        warn_lost=False,
    )


@st.composite
def mask_patterns(draw) -> BlockMaskPattern:
    mask = np.random.default_rng(draw(st.integers(0, 1000))).random((1, MAX_BLOCKS, MAX_BLOCKS)) < 0.3
    return BlockMaskPattern(np.tril(mask | np.eye(MAX_BLOCKS, dtype=bool)), 16)


@st.composite
def query_ranges(draw) -> tuple[int, int]:
    start = draw(st.integers(0, MAX_BLOCKS * 16 - 1))
    return start, draw(st.integers(start + 1, MAX_BLOCKS * 16))


def spans(blocks, size: int) -> np.ndarray:
    return np.concatenate([np.arange(j * size, (j + 1) * size) for j in blocks])


def pairs_of(call, pattern) -> list[tuple[range, np.ndarray]]:
    """The (queries, keys) rectangles of a call, before the causal mask."""
    B = pattern.block_size
    if isinstance(call, Causal):
        return [(range(call.start, call.stop), np.arange(call.start, call.stop))]
    if isinstance(call, Band):
        windows = (range(row - pattern.local_blocks + 1, row + 1) for row in range(call.first, call.last))
        return [(range(window[-1] * B, window[-1] * B + B), spans(window, B)) for window in windows]
    if isinstance(call, Gathered):
        return [(range(call.start, call.stop), spans(call.blocks, B))]
    keys = np.arange(call.keys_start, call.keys_stop)
    if call.source == "shard":
        keys = spans([pattern.shard_block(0, n) for n in range(call.keys_start // B, call.keys_stop // B)], B)
    return [(range(call.start, call.stop), keys)]


@given(pattern=s2_patterns() | mask_patterns(), queries=query_ranges())
def test_every_visible_pair_is_in_exactly_one_call(pattern, queries):
    q_start, q_stop = queries
    times = np.zeros((q_stop, q_stop), dtype=int)
    for call in plan_head(pattern, 0, q_start, q_stop):
        for rows, keys in pairs_of(call, pattern):
            if isinstance(call, Past | Gathered):
                assert keys.max() < rows.start, "calls without a mask see earlier keys only"
            for t in rows:
                times[t, keys[keys <= t]] += 1
    visible = visible_tokens(pattern, q_stop - q_start, q_stop, [(0, q_stop - q_start)], q_start)
    assert (times[q_start:] == visible[0].numpy()).all() and not times[:q_start].any()


@given(pattern=s2_patterns() | mask_patterns(), queries=query_ranges())
def test_the_first_call_of_every_query_holds_its_own_key(pattern, queries):
    reached = set()
    for call in plan_head(pattern, 0, *queries):
        rows = {t for part, _ in pairs_of(call, pattern) for t in part}
        if isinstance(call, Causal | Band):
            assert not rows & reached
            reached |= rows
        else:
            assert rows <= reached
    assert reached == set(range(*queries))


@given(pattern=s2_patterns(), queries=query_ranges())
def test_band_rows_are_full_and_so_are_their_windows(pattern, queries):
    for call in plan_head(pattern, 0, *queries):
        if isinstance(call, Band):
            assert queries[0] <= call.first * 16 < call.last * 16 <= queries[1]
            assert call.first - pattern.local_blocks + 1 >= 0


@pytest.mark.parametrize("length, most", [(1 << 14, 24), (1 << 20, 1032)])
def test_calls_grow_with_the_shard_alone(length, most):
    pattern = S2Pattern(2, 64, 8, 16)
    assert len(plan_head(pattern, 0, 0, length)) <= most


def test_neighbours_of_equal_pattern_are_computed_together():
    pattern = S2Pattern(6, 16, 2, 4, phases=(1, 1, 0, 1, 0, 0), num_dense_heads=2, warn_lost=False)
    assert [(heads.start, heads.stop) for heads in equal_heads(pattern)] == [(0, 2), (2, 3), (3, 4), (4, 6)]
