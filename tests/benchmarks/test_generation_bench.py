"""The generation benchmark: dense and sparse side by side, with the caches that they keep."""

import pytest
from conftest import rows_in
from tiny_model import DATA, make_tiny_model

from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.pattern_file import write_pattern_file


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    directory = tmp_path_factory.mktemp("generation")
    make_tiny_model(directory)
    (directory / "files").mkdir()
    everything = S2Settings(2, 2, block_size=16, local_blocks=2, vert_stride=1)
    window = S2Settings(2, 2, block_size=16, local_blocks=2, vert_stride=0, sink_blocks=1)
    for name, settings in (("everything", everything), ("window", window)):
        write_pattern_file(directory / "files" / f"{name}.json", settings)
    return directory


def words(directory, tmp_path, *more: str) -> list[str]:
    options = f"generation --hf {directory / 'model'} --data-path {directory / DATA} --prompt 128 --repeats 2"
    options += f" --new-tokens 5 --pattern-files {directory / 'files'} --threads 1 --dtype float32"
    return [*options.split(), "--device", "cpu", "--out", str(tmp_path), *more]


def test_dense_and_patterns_are_measured_side_by_side(bench, directory, tmp_path, capsys):
    options = words(directory, tmp_path, "--only", "everything", "window")
    assert bench.main(options) == bench.main(options) == 0
    dense, everything, window = rows_in(tmp_path)
    assert [row["pattern"] for row in (dense, everything, window)] == [
        *("dense, transformers", "everything", "window")
    ]
    assert dense["prefill_seconds"]["repeats"] == 2 and dense["decoded_tokens"] == 4
    assert dense["cache_bytes"] == everything["cache_bytes"] > 2 * window["cache_bytes"] > 0
    out = capsys.readouterr().out
    assert "cache MiB" in out and "nothing new" in out


def test_both_generate_the_same_tokens_where_all_is_seen(bench, directory):
    from benchmarks import generation, patterns
    from megatron_s2.generation.decoding import GenerationRequest
    from megatron_s2.generation.hugging_face import load_pretrained

    model = load_pretrained(directory / "model", "float32")
    settings = patterns.named_patterns(2, 2, directory / "files")["everything"]
    request = GenerationRequest([list(range(5, 90))], 6)
    sparse, dense = generation._sparse(model, settings, request), generation._dense(model, request)
    assert sparse.rows == dense.rows and len(dense.rows[0]) == 6


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--only", "best"), "--only best: must be one of dense, uniform w8 v16 s0,"),
        (("--prompt", "0"), "--prompt 0: must be >= 1"),
    ],
)
def test_what_does_not_fit_is_refused(bench, directory, tmp_path, capsys, more, message):
    assert bench.main(words(directory, tmp_path, *more)) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
