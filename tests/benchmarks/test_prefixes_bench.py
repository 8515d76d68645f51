"""The prefixes benchmark: the same tokens both ways, and the work counted."""

from conftest import rows_in

SIZES = {"prompts": 3, "prefix": 100, "tail": 5, "new-tokens": 3, "repeats": 2, "threads": 1}
TOY = ["prefixes", "--device", "cpu", *(x for name, size in SIZES.items() for x in (f"--{name}", str(size)))]


def test_a_row_for_shared_and_one_for_separate_prompts(bench, tmp_path, monkeypatch, capsys):
    from benchmarks import prefixes

    tiny = {"hidden": 32, "layers": 1, "heads": 2, "kv_heads": 1, "ffn": 32}
    monkeypatch.setitem(prefixes.SHAPES, "cpu", tiny)
    options = [*TOY, "--out", str(tmp_path)]
    assert bench.main(options) == bench.main(options) == 0
    shared, apart = rows_in(tmp_path)
    assert (shared["implementation"], apart["implementation"]) == ("shared", "apart")
    assert (shared["prefill_tokens"], apart["prefill_tokens"]) == (100 + 3 * 5, 3 * 105)
    assert shared["prefill_seconds"]["repeats"] == 2
    out = capsys.readouterr().out
    assert "shared" in out and "nothing new" in out


def test_sizes_out_of_range_are_refused(bench, tmp_path, capsys):
    assert bench.main([*TOY, "--new-tokens", "0", "--out", str(tmp_path)]) == 2
    assert "error: --new-tokens 0: must be >= 1" in capsys.readouterr().err
