"""Pattern files: a pattern for each layer of a model, written, read and refused."""

import json

import pytest

from megatron_s2.errors import InputError
from megatron_s2.pattern import S2Pattern, S2Settings
from megatron_s2.pattern.pattern_file import read_pattern_file, write_pattern_file

CONTENT = {
    "format": "megatron-s2-pattern",
    "version": 1,
    "num_layers": 4,
    "num_kv_heads": 3,
    "block_size": 16,
    "layers": [
        {"dense": True},
        {"local_blocks": 4, "sink_blocks": 1, "strides": [8, 0, 4], "phases": [9, 7, 2]},
        {"local_blocks": 2, "strides": [0, 0, 0]},
        {"local_blocks": 3, "sink_blocks": 2, "strides": [4, 1, 4]},
    ],
}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pattern.json"


def written(path, content) -> object:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def with_layer(number: int, **fields) -> dict:
    layers = [*CONTENT["layers"]]
    layers[number - 1] = {
        name: value for name, value in (layers[number - 1] | fields).items() if value != ...
    }
    return CONTENT | {"layers": layers}


def without(name: str) -> dict:
    return {key: value for key, value in CONTENT.items() if key != name}


def test_each_layer_has_the_pattern_of_its_entry(path):
    settings = read_pattern_file(written(path, CONTENT), num_layers=4, num_kv_heads=3)
    assert settings.sparse_layers == [2, 3, 4]
    assert settings.pattern(1).visible_pairs(100) == (5050,) * 3
    # Left-out phases are the default ones, which rotate over the S2 layers; those of window-only heads are 0.
    for number, pattern in {
        2: S2Pattern(3, 16, 4, (8, 0, 4), 1, phases=(1, 0, 2), warn_lost=False),
        3: S2Pattern(3, 16, 2, (0, 0, 0), 0),
        4: S2Pattern(3, 16, 3, (4, 1, 4), 2, layer=2),
    }.items():
        assert settings.pattern(number).select_heads(range(3)) == pattern.select_heads(range(3))
    pairs = sum(sum(settings.pattern(n).visible_pairs(300)) for n in (1, 2, 3, 4))
    assert settings.mean_pairs(300) == pytest.approx(pairs / 12)
    assert settings.first_pattern == settings.pattern(2)


def test_what_is_written_is_read(path):
    settings = read_pattern_file(written(path, CONTENT))
    write_pattern_file(path, settings, note="for a test", made_with={"budget": 0.25})
    assert read_pattern_file(path) == settings
    content = json.loads(path.read_text())
    assert (content["note"], content["made_with"]) == ("for a test", {"budget": 0.25})
    assert len(path.read_text().splitlines()) == 4 + 11, "a line per layer"


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"vert_stride": (16, 0, 4), "sink_blocks": 1},
        {"dense_layer_freq": 2, "vert_stride": 3, "phases": (2, 1, 0)},
    ],
    ids=str,
)
def test_settings_without_layers_are_written_layer_by_layer(path, fields):
    settings = S2Settings(num_layers=4, num_kv_heads=3, **fields)
    write_pattern_file(path, settings)
    again = read_pattern_file(path)
    assert again == settings.per_layer == again.per_layer
    assert again != settings
    for n in (1, 2, 3, 4):
        assert again.pattern(n).visible_pairs(5000) == settings.pattern(n).visible_pairs(5000)
    assert again.coverage() == settings.coverage()
    assert again.mean_pairs(5000) == settings.mean_pairs(5000)


PER_QUERY_HEAD = CONTENT | {
    "version": 2,
    "pattern_heads": 6,
    "layers": [
        {"dense": True},
        {"local_blocks": 4, "strides": [8, 8, 0, 4, 1, 1], "phases": [1, 2, 0, 0, 0, 0]},
        {"local_blocks": 2, "strides": [4, 4, 0, 0, 2, 2], "phases": [1, 1, 0, 0, 0, 0]},
        {"local_blocks": 2, "strides": [6] * 6},
    ],
}


def test_a_file_of_version_2_has_patterns_for_query_heads(path):
    settings = read_pattern_file(written(path, PER_QUERY_HEAD), num_kv_heads=3, num_query_heads=6)
    assert [settings.pattern(n).num_kv_heads for n in (1, 2, 3, 4)] == [3, 6, 3, 6]
    assert settings.pattern(3).strides == (4, 0, 2)
    assert settings.pattern(4).head_phases == (0, 1, 2, 3, 4, 5)
    write_pattern_file(path, settings)
    assert json.loads(path.read_text())["version"] == 2
    assert read_pattern_file(path) == settings == settings.per_layer
    only_layer_3 = [{"dense": True}, {"dense": True}, PER_QUERY_HEAD["layers"][2], {"dense": True}]
    write_pattern_file(path, read_pattern_file(written(path, PER_QUERY_HEAD | {"layers": only_layer_3})))
    assert json.loads(path.read_text())["version"] == 1, "of KV heads, which is all that it needs"


def test_a_model_of_window_only_layers_sees_nothing_of_the_distant_past():
    layer = {"local_blocks": 2, "strides": [0, 0]}
    assert S2Settings(2, 2, layers=(layer, layer)).coverage().fraction == 0
    assert S2Settings(2, 2, layers=(layer, layer | {"strides": [0, 2]})).coverage().fraction == 0.5


LAYER_FIELDS = "dense, local_blocks, sink_blocks, strides, phases"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON: Expecting property name enclosed in double quotes in line 1, column 2"),
        ('{"a": 1, "a": 2}', "a: is there twice"),
        ("[]", 'is not a pattern file: its "format" must be "megatron-s2-pattern"'),
        (CONTENT | {"format": "x"}, 'is not a pattern file: its "format" must be "megatron-s2-pattern"'),
        (CONTENT | {"version": 3}, "version 3: must be 1 or 2, the ones that this version reads"),
        (without("version"), "version None: must be 1 or 2, the ones that this version reads"),
        (CONTENT | {"version": 2}, "pattern_heads: is missing"),
        (CONTENT | {"pattern_heads": 6}, "pattern_heads: needs version 2"),
        (
            PER_QUERY_HEAD | {"pattern_heads": 4},
            "pattern_heads 4: must be the number of query heads, a multiple of the 3 KV heads",
        ),
        (
            PER_QUERY_HEAD | {"pattern_heads": 12},
            "layer 2: strides [8, 8, 0, 4, 1, 1]: must be one per query head (12)",
        ),
        (
            CONTENT | {"version": 2, "pattern_heads": 3},
            "pattern_heads 3: must be the 6 query heads of the model, or left out for a pattern per KV head",
        ),
        (CONTENT | {"window": 3}, "window: is not a field of a pattern file"),
        (without("layers"), "layers: is missing"),
        (without("block_size"), "block_size: is missing"),
        (CONTENT | {"layers": {}}, "layers: must be a list with one object per layer"),
        (CONTENT | {"block_size": 48}, "block_size 48: must be a power of two >= 16"),
        (CONTENT | {"num_layers": "4"}, "num_layers '4': must be a whole number >= 1"),
        (CONTENT | {"num_layers": 5}, "num_layers 5: is for another model; this one has 4"),
        (CONTENT | {"num_kv_heads": 2}, "num_kv_heads 2: is for another model; this one has 3"),
        (CONTENT | {"layers": CONTENT["layers"][:3]}, "layer 4: is missing, of 4 layers"),
        (CONTENT | {"layers": CONTENT["layers"] * 2}, "layer 5: must not be there, with 4 layers"),
        (CONTENT | {"layers": [*CONTENT["layers"][:3], 7]}, "layer 4 7: must be an object"),
        (CONTENT | {"layers": [*CONTENT["layers"][:3], None]}, "layer 4 null: must be an object"),
        (
            with_layer(2, strides=[8, 0, 4, 4]),
            "layer 2: strides [8, 0, 4, 4]: must be one per KV head (3)",
        ),
        (
            with_layer(2, strides=[8, -1, 4]),
            "layer 2: strides [8, -1, 4]: must be a list of whole numbers >= 0, one per KV head (3)",
        ),
        (
            with_layer(3, strides=16),
            "layer 3: strides 16: must be a list of whole numbers >= 0, one per KV head (3)",
        ),
        (with_layer(2, phases=[1]), "layer 2: phases [1]: must be one per KV head (3)"),
        (with_layer(4, local_blocks=0), "layer 4: local_blocks 0: must be a whole number >= 1"),
        (with_layer(4, sink_blocks=True), "layer 4: sink_blocks True: must be a whole number >= 0"),
        (with_layer(4, local_blocks=...), "layer 4: local_blocks: is missing; a dense layer has dense true"),
        (
            with_layer(4, stride=3),
            f"layer 4: stride: is not a field of a layer; must be one of {LAYER_FIELDS}",
        ),
        (with_layer(1, strides=[1, 1, 1]), "layer 1: strides: must not be set with dense"),
        (with_layer(1, dense=False), "layer 1: dense False: must be true, or left out"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_a_file_that_is_not_for_the_model_is_refused_by_layer_and_field(path, content, message):
    with pytest.raises(InputError) as refused:
        read_pattern_file(written(path, content), num_layers=4, num_kv_heads=3, num_query_heads=6)
    assert str(refused.value) == f"--s2-pattern-file {path}: {message}"


def test_a_file_that_cannot_be_read_is_refused(path, tmp_path):
    for name, message in ((path, "there is no such file"), (tmp_path, "cannot be read: Is a directory")):
        with pytest.raises(InputError, match=message):
            read_pattern_file(name)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is not JSON: it is not text"):
        read_pattern_file(path)


def test_layers_exclude_the_fields_of_all_layers():
    with pytest.raises(ValueError, match="sink_blocks 1: must not be set with a pattern for each layer"):
        S2Settings(1, 1, sink_blocks=1, layers=({"dense": True},))
