"""Hypothesis strategies for patterns and layouts that do not fit each other: strides that divide no chunk,
windows over several chunks, chunks that are not whole blocks, heads that differ."""

from hypothesis import strategies as st

from megatron_s2.parallel.layout import Zigzag
from megatron_s2.pattern import S2Pattern

BLOCK = 16


@st.composite
def patterns(draw) -> S2Pattern:
    heads = draw(st.integers(1, 4))
    return S2Pattern(
        num_kv_heads=heads,
        block_size=BLOCK,
        local_blocks=draw(st.integers(1, 7)),
        vert_stride=draw(st.tuples(*[st.integers(0, 9)] * heads)),
        sink_blocks=draw(st.sampled_from([0, 0, 1, 3, 20])),
        num_dense_heads=draw(st.integers(0, heads)) // 2,
        layer=draw(st.integers(0, 5)),
    )


@st.composite
def zigzags(draw) -> Zigzag:
    ranks = draw(st.sampled_from([1, 2, 3, 4, 7]))
    blocks = st.integers(1, 5).map(lambda n: n * BLOCK)
    chunk = draw(st.one_of(blocks, st.integers(1, 70)))
    return Zigzag(ranks, 2 * ranks * chunk)


@st.composite
def packed(draw, tokens: int) -> tuple[tuple[int, int], ...]:
    """Documents of any lengths, one after another."""
    edges = sorted(draw(st.sets(st.integers(1, tokens - 1), max_size=4)))
    return tuple(zip([0, *edges], [*edges, tokens]))
