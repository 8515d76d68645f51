"""The decode benchmark: every implementation is checked before it is timed, rows say all there is to say."""

import json

import pytest
import torch
from conftest import RUNNER, rows_in

from megatron_s2.kv_cache.cache import cache_bytes, dense_cache_bytes

TOY = ["decode", "--device", "cpu", "--context", "1000", "--repeats", "2", "--threads", "1"]
KEYS = {
    *("benchmark", "date", "machine", "versions", "commit", "decode_code", "implementation"),
    *("seq_length", "device", "batch", "heads", "kv_heads", "head_dim", "dtype", "pattern"),
    *("not_measured", "checked_tokens", "tokens_per_run", "caches", "other_cpus", "cache_bytes"),
    *("seconds_per_token", "kernel_seconds_per_token", "closed_form_bytes"),
}


@pytest.fixture(scope="module")
def decode(bench):
    from benchmarks import decode

    return decode


def test_rows_say_all_there_is_to_say(bench, decode, tmp_path, capsys):
    assert bench.main([*TOY, "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path)
    assert [row["implementation"] for row in rows] == ["s2-cache", "sdpa", "sdpa-grouped"]
    tokens = 1000 + 3 * 64
    for row in rows:
        assert row.keys() == KEYS
        assert row["checked_tokens"] == row["tokens_per_run"] == 64 and row["caches"] == 1
        assert row["seconds_per_token"]["repeats"] == 2
        kept = dense_cache_bytes(2, tokens, 64, torch.float32)
        if row["implementation"] == "s2-cache":
            kept = cache_bytes(decode.DEFAULT_SHAPES["cpu"].pattern, tokens, 64, torch.float32)
        assert row["cache_bytes"]["kept"] == row["closed_form_bytes"] == kept
        assert row["kernel_seconds_per_token"] is None, "of CUDA only"
    assert "s2-cache" in capsys.readouterr().out
    assert bench.main([*TOY, "--out", str(tmp_path)]) == 0
    assert len(rows_in(tmp_path)) == 3
    assert "nothing new" in capsys.readouterr().out


def test_a_small_cache_is_one_of_several_so_that_l2_holds_none(bench, decode, tmp_path, monkeypatch, capsys):
    h200 = type("Properties", (), {"L2_cache_size": 60 * 2**20})
    monkeypatch.setattr(decode.torch.cuda, "get_device_properties", lambda device: h200)
    assert [decode.caches_beyond_l2(mib * 2**20, "cuda") for mib in (36, 60, 512)] == [4, 2, 1]
    monkeypatch.setattr(decode, "caches_beyond_l2", lambda size, device: 2 if size < 800_000 else 1)
    assert bench.main([*TOY, "--out", str(tmp_path)]) == 0
    rows = {row["implementation"]: row for row in rows_in(tmp_path)}
    assert [rows[name]["caches"] for name in ("s2-cache", "sdpa", "sdpa-grouped")] == [2, 1, 1]
    assert rows["s2-cache"]["cache_bytes"]["kept"] == rows["s2-cache"]["closed_form_bytes"]
    assert "several caches in turn" in capsys.readouterr().out


def test_contexts_are_measured_one_by_one_and_drawn(bench, decode, tmp_path, monkeypatch, capsys):
    measured = []

    def measure(case, repeats):
        measured.append(case.seq_length)
        seconds = dict.fromkeys(("median", "p20", "p80"), case.seq_length / 1e9)
        for name in decode.IMPLEMENTATIONS:
            shown = {"seconds_per_token": seconds, "cache_bytes": {"kept": 2**20}}
            yield {"implementation": name, "not_measured": None, **shown}

    monkeypatch.setattr(decode, "measure", measure)
    assert bench.main([*TOY, "--context", "1000,2000", "--out", str(tmp_path)]) == 0
    assert bench.main([*TOY, "--context", "2000,3000", "--out", str(tmp_path)]) == 0
    assert measured == [1000, 2000, 3000]
    capsys.readouterr()
    assert bench.main(["plot", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.strip().endswith("decode.png")


def test_the_row_stored_before_there_were_gpus_is_still_shown(decode):
    directory = RUNNER.parents[1] / "benchmarks" / "results" / "amd-epyc-2-cores"
    rows = [json.loads(line) for line in (directory / "decode-20261121T105139.jsonl").open()]
    assert "536.1" in decode.BENCHMARK.table(rows) and decode.BENCHMARK.plot(rows, directory) == []


@pytest.mark.gpu
def test_on_a_gpu_kernels_are_told_apart_from_launches(bench, tmp_path):
    options = ["--device", "cuda", "--context", "2048", "--out", str(tmp_path)]
    assert bench.main([*TOY, *options]) == 0
    rows = rows_in(tmp_path)
    assert len(rows) == 3 and {row["dtype"] for row in rows} == {"bfloat16"}
    for row in rows:
        assert row["kernel_seconds_per_token"] > 0
        assert row["cache_bytes"]["kept"] == row["closed_form_bytes"]


def test_a_wrong_result_is_never_timed(bench, decode, tmp_path, monkeypatch, capsys):
    attend = decode.cached_attention
    monkeypatch.setattr(decode, "cached_attention", lambda *given: attend(*given) * 1.001)
    assert bench.main([*TOY, "--out", str(tmp_path)]) == 1
    rows = {row["implementation"]: row for row in rows_in(tmp_path)}
    assert rows["s2-cache"]["seconds_per_token"] is None, "the others are timed"
    assert rows["sdpa"]["seconds_per_token"] and rows["sdpa-grouped"]["seconds_per_token"]
    out, err = capsys.readouterr()
    assert err.startswith("error: wrong: s2-cache at 1000 tokens: out is off by")
    assert "s2-cache      not measured: wrong: s2-cache at 1000 tokens: out is off by" in out


@pytest.mark.parametrize("option", ["--context", "--repeats"])
def test_refuses_options_out_of_range(bench, tmp_path, capsys, option):
    assert bench.main(["decode", option, "0", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {option} 0: must be >= 1\n"
