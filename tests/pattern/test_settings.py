"""S2Settings: the pattern of each layer, and coverage and pairs of the whole model."""

import pytest

from megatron_s2.pattern import S2Pattern, S2Settings
from megatron_s2.pattern.block_pattern import dense_pairs


def settings(**fields) -> S2Settings:
    return S2Settings(
        **{"num_layers": 8, "num_kv_heads": 2, "block_size": 16, "local_blocks": 2, "vert_stride": 4} | fields
    )


def test_every_layer_is_sparse_by_default():
    assert settings().sparse_layers == [1, 2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("fields", "sparse"),
    [
        ({"dense_layers": (1, 2)}, [3, 4, 5, 6, 7, 8]),
        ({"dense_layers": (8, 1)}, [2, 3, 4, 5, 6, 7]),
        ({"dense_layer_freq": 4}, [1, 2, 3, 5, 6, 7]),
        ({"dense_layer_freq": 3, "dense_layers": (1,)}, [2, 4, 5, 7, 8]),
        ({"dense_layer_freq": 9}, [1, 2, 3, 4, 5, 6, 7, 8]),
        ({"dense_layer_freq": 1}, []),
    ],
    ids=str,
)
def test_dense_layers_are_listed_or_every_nth(fields, sparse):
    chosen = settings(**fields)
    assert chosen.sparse_layers == sparse
    assert [n for n in range(1, 9) if not chosen.is_dense(n)] == sparse


def test_a_dense_layer_sees_everything():
    chosen = settings(dense_layers=(2,), sink_blocks=1, num_dense_heads=1)
    assert chosen.pattern(2).visible_pairs(100) == (dense_pairs(100),) * 2


def test_a_sparse_layer_has_the_pattern_of_the_settings():
    fields = {"vert_stride": (4, 2), "sink_blocks": 3, "num_dense_heads": 1}
    assert settings(**fields).pattern(1) == S2Pattern(2, 16, 2, **fields)


def test_default_phases_rotate_from_layer_to_layer():
    chosen = settings()
    assert [chosen.pattern(n).head_phases for n in (1, 2, 3)] == [(0, 2), (1, 3), (0, 2)]


def test_dense_layers_do_not_break_the_rotation():
    """Otherwise, with every second layer dense, all sparse layers would have the same phases."""
    chosen = settings(dense_layer_freq=2)
    assert chosen.sparse_layers == [1, 3, 5, 7]
    assert [chosen.pattern(n).head_phases for n in chosen.sparse_layers] == [(0, 2), (1, 3)] * 2


def test_given_phases_are_the_same_in_every_layer_and_warn_once():
    with pytest.warns(UserWarning, match="2 of every 4 distant blocks are seen by no head") as warned:
        chosen = settings(phases=(1, 3))
        assert {chosen.pattern(n).head_phases for n in range(1, 9)} == {(1, 3)}
    assert len(warned) == 1


@pytest.mark.parametrize(
    ("fields", "lost"),
    [
        ({}, 0),
        ({"num_layers": 1}, 2),
        ({"num_layers": 2, "dense_layers": (1,)}, 2),
        ({"vert_stride": 16}, 0),
        ({"vert_stride": 16, "num_layers": 7}, 2),
    ],
    ids=str,
)
def test_coverage_counts_all_sparse_layers_together(fields, lost):
    assert settings(**fields).coverage().lost == lost


@pytest.mark.parametrize("seq_len", [1, 16, 37, 200])
@pytest.mark.parametrize(
    "fields",
    [{}, {"dense_layers": (1, 5)}, {"sink_blocks": 1, "num_dense_heads": 1}, {"dense_layer_freq": 1}],
    ids=str,
)
def test_mean_pairs_equal_those_of_the_masks(fields, seq_len):
    chosen = settings(**fields)
    blocks = -(-seq_len // 16)
    pairs = 0
    for layer in range(1, 9):
        mask = chosen.pattern(layer).block_mask(blocks)
        tokens = mask.repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :seq_len, :seq_len]
        pairs += int(tokens.tril().sum())
    assert chosen.mean_pairs(seq_len) == pytest.approx(pairs / 8 / 2, rel=1e-12)
    assert chosen.mean_pairs([[seq_len], [5]]).tolist() == [[chosen.mean_pairs(seq_len)], [15]]


def test_a_pattern_for_each_query_head():
    """Dense layers, and layers whose groups see the same, have the pattern of their KV heads."""
    chosen = settings(pattern_heads=4, vert_stride=4, phases=(1, 2, 3, 0), dense_layer_freq=2)
    assert [chosen.pattern(n).num_kv_heads for n in (1, 2, 3)] == [4, 2, 4]
    assert chosen.pattern(3).head_phases == (1, 2, 3, 0)
    assert chosen.mean_pairs(200) == pytest.approx(
        (sum(chosen.pattern(1).visible_pairs(200)) / 4 + dense_pairs(200)) / 2
    )
    alike = settings(pattern_heads=4, phases=(1, 1, 0, 0), vert_stride=2)
    per_kv_head = settings(phases=(1, 0), vert_stride=2)
    assert alike.pattern(1) == per_kv_head.pattern(1).select_heads((0, 1))
    assert alike.per_layer == per_kv_head.per_layer
    assert alike.distinct_patterns == per_kv_head.distinct_patterns
    assert alike.mean_pairs(200) == per_kv_head.mean_pairs(200)


def test_default_phases_spread_over_the_query_heads():
    assert settings(pattern_heads=4).pattern(1).head_phases == (0, 1, 2, 3)
    assert settings(pattern_heads=4).coverage().lost == 0


def test_the_query_heads_are_those_of_the_model():
    settings().check_query_heads(8)
    settings(pattern_heads=8).check_query_heads(8)
    with pytest.raises(ValueError, match="pattern_heads 4: must be the 8 query heads of the model, or left"):
        settings(pattern_heads=4).check_query_heads(8)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"pattern_heads": 3},
            "pattern_heads 3: must be the number of query heads, a multiple of the 2 KV heads",
        ),
        ({"dense_layers": (9,)}, "dense_layers 9: must be between 1 and the 8 layers"),
        ({"dense_layers": (0, 1)}, "dense_layers 0: must be between 1 and the 8 layers"),
        ({"dense_layer_freq": -1}, "dense_layer_freq -1: must be >= 0"),
        ({"block_size": 48}, "block_size 48: must be a power of two >= 16"),
        ({"local_blocks": 0}, "local_blocks 0: must be >= 1"),
        ({"vert_stride": (4, -1)}, r"vert_stride (4, -1): must be >= 0 (0 is window-only)"),
        ({"phases": (0, -1)}, r"phases (0, -1): must be >= 0"),
        ({"num_dense_heads": 3}, "num_dense_heads 3: must be between 0 and 2"),
    ],
    ids=str,
)
def test_a_field_out_of_range_is_refused_by_name(fields, message):
    with pytest.raises(ValueError) as refused:
        settings(**fields)
    assert str(refused.value) == message
