"""The startup table that a run prints before training."""

import pytest

from megatron_s2.pattern import S2Settings
from megatron_s2.report.startup_table import startup_table


def rows(seq_len: int = 4096, head_dim: int = 64, bytes_per_element: int = 2, **fields) -> dict[str, str]:
    """The rows of the table by name."""
    settings = S2Settings(**{"num_layers": 8, "num_kv_heads": 4} | fields)
    title, *lines = startup_table(settings, seq_len, head_dim, bytes_per_element).splitlines()
    assert title == "S2 attention (arXiv 2407.17678)"
    assert all(line.startswith("  ") for line in lines)
    return dict(line.strip().split("  ", 1) for line in lines)


def text(row: str) -> str:
    return row.strip()


def test_the_table_of_the_defaults():
    table = {name: text(row) for name, row in rows().items()}
    assert table == {
        "core attention": "S2 in 8 of 8 layers",
        "pattern": "block 64, window 8 (512 tokens), stride 16",
        "layers 1, 5": "phases 0 4 8 12",
        "layers 2, 6": "phases 1 5 9 13",
        "layers 3, 7": "phases 2 6 10 14",
        "layers 4, 8": "phases 3 7 11 15",
        "distant past seen": "25% by one S2 layer, 100% by all S2 layers together",
        "attention FLOPs": table["attention FLOPs"],
        "keys and values": table["keys and values"],
    }


def test_columns_are_aligned():
    settings = S2Settings(num_layers=8, num_kv_heads=4, dense_layers=(1,))
    lines = startup_table(settings, 4096, 64, 2).splitlines()[1:]
    column = lines[0].index("S2 in 7 of 8 layers")
    assert all(line[column - 2 : column] == "  " and line[column] != " " for line in lines)


def test_dense_layers_are_listed_and_counted():
    table = rows(num_layers=12, dense_layers=(1, 2, 3, 7))
    assert text(table["core attention"]) == "S2 in 8 of 12 layers"
    assert text(table["dense layers"]) == "1-3, 7"


def test_a_pattern_names_sinks_and_dense_heads():
    table = rows(block_size=16, vert_stride=(4, 4, 8, 8), sink_blocks=1, num_dense_heads=1)
    assert text(table["pattern"]) == "block 16, window 8 (128 tokens), stride 4 4 8 1, sinks 1, dense heads 1"


def test_a_pattern_for_each_layer_is_listed_by_layers():
    layer = {"local_blocks": 4, "sink_blocks": 1, "strides": [8, 0], "phases": [3, 0]}
    layers = [{"dense": True}, layer, layer, {"local_blocks": 2, "strides": [0, 0]}]
    table = {name: text(row) for name, row in rows(num_layers=4, num_kv_heads=2, layers=layers).items()}
    assert table["dense layers"] == "1"
    assert table["pattern"] == "block 64, a pattern for each layer"
    assert table["layers 2-3"] == "window 4 (256 tokens), stride 8 0, sinks 1, phases 3 0"
    assert table["layers 4"] == "window 2 (128 tokens), no stride, phases 0 0"
    assert table["distant past seen"] == "0% to 12% by one S2 layer, 12% by all S2 layers together"


def test_window_only_heads_see_nothing_of_the_distant_past():
    assert text(rows(vert_stride=0)["distant past seen"]) == "0%: every head of the S2 layers is window-only"


def test_a_long_rotation_is_abbreviated():
    table = rows(num_layers=32, num_kv_heads=8, vert_stride=16)
    assert "layers 1, 3, 5, 7, 9, 11, …" in table
    table = rows(num_layers=1, num_kv_heads=16)
    assert text(table["layers 1"]) == "phases 0 1 2 3 4 5 6 7 …"


@pytest.mark.filterwarnings("ignore:S2 pattern. 3 of every 4 distant blocks")
def test_flops_are_compared_with_dense_attention():
    """Four blocks see themselves, and the last three block 0: 4 * 136 + 3 * 256 of 2080 pairs."""
    table = rows(seq_len=64, num_layers=1, block_size=16, local_blocks=1, vert_stride=4, phases=(0, 0, 0, 0))
    assert text(table["attention FLOPs"]) == "63.1% of dense at 64 tokens (1.6x fewer)"


def test_lost_distant_blocks_warn():
    lost = rows(num_layers=2)
    assert text(lost["distant past seen"]) == (
        "25% by one S2 layer, 50% by all S2 layers together "
        "(WARNING: 8 of every 16 distant blocks are seen by no layer)"
    )


def test_a_dense_layer_sees_all_blocks():
    assert "WARNING" not in rows(num_layers=3, dense_layers=(1,))["distant past seen"]


def test_all_layers_dense():
    table = rows(dense_layer_freq=1)
    assert text(table["core attention"]) == "S2 in 0 of 8 layers"
    assert text(table["attention FLOPs"]) == "100.0% of dense at 4096 tokens (1.0x fewer)"


@pytest.mark.parametrize(
    ("seq_len", "bytes_per_element", "size"),
    # Keys and values of 8 layers, 4 heads of 64 numbers.
    [(4096, 2, "32.00 MiB"), (4096, 4, "64.00 MiB"), (131072, 2, "1.00 GiB"), (512, 2, "4.00 MiB")],
)
def test_bytes_have_readable_units(seq_len, bytes_per_element, size):
    table = rows(seq_len=seq_len, bytes_per_element=bytes_per_element, vert_stride=1)
    assert text(table["keys and values"]) == (
        f"{size} per sequence of {seq_len} tokens in generation, 100.0% of dense ({size})"
    )


def test_the_kv_cache_holds_shard_and_window():
    """At 16384 tokens (256 blocks): 8 window blocks, and 248 / 16 shard blocks on average over the phases."""
    kept = 16384 // 64 / 16 + 8 - 0.5
    table = rows(seq_len=16384)
    assert f"{kept / 256:.1%} of dense (128.00 MiB)" in table["keys and values"]
