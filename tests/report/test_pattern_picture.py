"""The picture of a pattern: it shows the heads and their union, and names lost blocks."""

import subprocess
import sys

import numpy as np
import pytest
from small_patterns import a_mask_pattern, a_pattern

pytest.importorskip("matplotlib")

from megatron_s2.pattern import S2Settings
from megatron_s2.report.pattern_picture import draw_model, draw_pattern


def panels(figure) -> list:
    return [axes for axes in figure.axes if axes.images]


def titles(figure) -> list[str]:
    return [axes.get_title() for axes in panels(figure)]


def legend(figure) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


def words(figure) -> str:
    return " | ".join(
        [text.get_text() for text in figure.texts]
        + [text.get_text() for axes in figure.axes for text in axes.texts]
    )


@pytest.mark.parametrize(
    ("suffix", "starts_with"), [(".png", b"\x89PNG\r\n\x1a\n"), (".svg", b"<?xml"), (".PNG", b"\x89PNG")]
)
def test_the_suffix_chooses_the_format(tmp_path, suffix, starts_with):
    path = tmp_path / f"pattern{suffix}"
    draw_pattern(a_pattern(), path)
    assert path.read_bytes().startswith(starts_with)


@pytest.mark.parametrize("suffix", [".png", ".svg"])
def test_the_same_pattern_gives_the_same_bytes(tmp_path, suffix):
    files = [tmp_path / f"{name}{suffix}" for name in ("first", "second")]
    for file in files:
        draw_pattern(a_pattern(), str(file), num_blocks=8)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("heads", [1, 2, 3, 4, 5, 8])
def test_one_panel_per_kv_head_and_one_for_all(heads):
    figure = draw_pattern(a_pattern(num_kv_heads=heads))
    assert len(panels(figure)) == heads + 1
    assert titles(figure)[0] == "KV head 0, phase 0"


def test_window_only_heads_are_named():
    figure = draw_pattern(a_pattern(vert_stride=(0, 4, 1, 0), sink_blocks=1))
    assert titles(figure)[:4] == [
        f"KV head {text}" for text in ("0, window only", "1, phase 0", "2, dense", "3, window only")
    ]
    assert "stride 4 and none" in words(figure)


def test_a_model_has_a_row_for_each_layer_and_a_column_for_each_head(tmp_path):
    layers = [{"dense": True}, {"local_blocks": 2, "sink_blocks": 1, "strides": [0, 4, 1]}]
    settings = S2Settings(2, 3, 16, layers=layers)
    figure = draw_model(settings, path := tmp_path / "model.png", num_blocks=32)
    assert path.read_bytes().startswith(b"\x89PNG")
    shares, means = (axes.images[0].get_array() for axes in panels(figure)[:2])
    pairs = [settings.pattern(n).visible_pairs(512) for n in (1, 2)]
    assert np.allclose(shares, np.array(pairs) / (512 * 513 / 2))
    assert np.allclose(means[:, 0], shares.mean(1))
    said = words(figure)
    for text in ("window | 4 | dense", "dense layer", "window 2, sinks 1", "2 layers of 3 KV heads"):
        assert text in said


def test_a_model_with_patterns_of_query_heads_has_a_column_for_each():
    """A layer whose groups see the same keeps keys of its KV heads, and is drawn for each query head."""
    layers = [{"dense": True}, {"local_blocks": 2, "strides": [4] * 4, "phases": [0, 1, 2, 3]}]
    settings = S2Settings(2, 2, 16, layers=layers, pattern_heads=4)
    figure = draw_model(settings, num_blocks=32)
    shares = panels(figure)[0].images[0].get_array()
    assert shares.shape == (2, 4) and (shares[0] == 1).all()
    kept = (2 * 512 + sum(settings.pattern(2).kv_tokens(512))) / (2 * 2 * 512)
    assert "2 layers of 4 query heads" in words(figure)
    assert f"{kept:.1%} of dense keys and values" in words(figure)
    assert titles(draw_pattern(settings.pattern(2), head_name="query head"))[-2:] == [
        "query head 3, phase 3",
        "all 4 query heads together",
    ]


def test_with_many_heads_seven_and_the_last_are_shown_and_named():
    figure = draw_pattern(a_pattern(num_kv_heads=32, num_dense_heads=1))
    assert len(panels(figure)) == 9
    assert titles(figure)[-2:] == ["KV head 31, dense", "all 32 KV heads together"]
    assert "shown: KV heads 0 to 6 and 31 of 32" in words(figure)
    assert "1 dense head" in words(figure)


def test_each_kind_of_block_has_a_colour_and_a_legend_entry():
    figure = draw_pattern(a_pattern(sink_blocks=1), num_blocks=12)
    assert legend(figure) == [
        "diagonal, causal inside",
        "window",
        "sink",
        "strided",
        "not seen by this head",
    ]
    image = panels(figure)[0].images[0]
    colours = {tuple(colour) for colour in image.cmap(image.norm(image.get_array())).reshape(-1, 4)}
    assert len(colours) == 6  # the future is the sixth


def test_the_union_counts_the_heads_that_see_each_block():
    p = a_pattern(sink_blocks=1, vert_stride=(4, 2, 8, 3))
    union = panels(draw_pattern(p, num_blocks=20))[-1].images[0].get_array()
    future = np.triu(np.ones((20, 20), dtype=bool), 1)
    assert np.array_equal(np.where(future, -1, p.block_mask(20).sum(dim=0).numpy()), union)


def test_blocks_seen_by_no_head_are_named_and_disappear_when_layers_rotate():
    p = a_pattern(vert_stride=8)
    assert "seen by no head" in legend(draw_pattern(p))
    both = draw_pattern(p, num_layers=2)
    assert "seen by no head" not in legend(both)
    assert titles(both)[-1] == "all 4 KV heads of layers 0 to 1 together"
    assert "100% of the past" in words(both)


def test_a_block_mask_pattern_has_neither_sinks_nor_shards():
    figure = draw_pattern(a_mask_pattern(), num_blocks=8, title="mine")
    assert len(panels(figure)) == 3
    assert legend(figure) == ["diagonal, causal inside", "seen"]
    assert "mine" in words(figure)


@pytest.mark.parametrize("num_blocks", [1, 2, 100])
def test_any_number_of_blocks_can_be_drawn(tmp_path, num_blocks):
    draw_pattern(a_pattern(), path := tmp_path / "pattern.png", num_blocks=num_blocks)
    assert path.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("pattern", "name", "fields", "message"),
    [
        (a_pattern(), "pattern.gif", {}, "must end in .png or .svg"),
        (a_pattern(), "pattern", {}, "must end in .png or .svg"),
        (a_pattern(), "pattern.png", {"num_blocks": 0}, "num_blocks 0: must be >= 1"),
        (a_pattern(), "pattern.png", {"num_layers": 0}, "num_layers 0: must be >= 1"),
        (
            a_mask_pattern(),
            "pattern.png",
            {"num_blocks": 8, "num_layers": 2},
            "num_layers 2: must be 1 for a BlockMaskPattern",
        ),
        (a_mask_pattern(), "pattern.png", {"num_blocks": 9}, "must be one of the mask's 8 blocks"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refusals_leave_no_file(tmp_path, pattern, name, fields, message):
    with pytest.raises(ValueError, match=message):
        draw_pattern(pattern, tmp_path / name, **fields)
    assert list(tmp_path.iterdir()) == []


def test_without_matplotlib_the_message_names_the_extra():
    code = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from megatron_s2 import S2Pattern\n"
        "from megatron_s2.report.pattern_picture import draw_pattern\n"
        "p = S2Pattern(num_kv_heads=2, block_size=16, local_blocks=2, vert_stride=2)\n"
        "try: draw_pattern(p, 'never.png')\n"
        "except ImportError as error: print(error)\n"
    )
    message = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "megatron-s2[plot]" in message
