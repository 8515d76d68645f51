"""The decode benchmark: every implementation is checked before it is timed, rows say all there is to say."""

import json

import pytest
import torch

from megatron_s2.generation.cache import cache_bytes, dense_cache_bytes

TOY = ["decode", "--context", "1000", "--repeats", "2", "--threads", "1"]
KEYS = {
    *("benchmark", "date", "machine", "versions", "commit", "decode_code", "implementation"),
    *("seq_length", "device", "batch", "heads", "kv_heads", "head_dim", "dtype", "pattern"),
    *("checked_tokens", "tokens_per_run", "other_cpus", "seconds_per_token", "cache_bytes"),
}


@pytest.fixture(scope="module", autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def decode(bench):
    from benchmarks import decode

    return decode


def rows_in(directory) -> list[dict]:
    files = sorted(directory.glob("*/decode-*.jsonl"))
    return [json.loads(line) for path in files for line in path.read_text().splitlines()]


def test_rows_say_all_there_is_to_say(bench, decode, tmp_path, capsys):
    assert bench.main([*TOY, "--out", str(tmp_path)]) == 0
    rows = rows_in(tmp_path)
    assert [row["implementation"] for row in rows] == ["s2-cache", "sdpa", "sdpa-grouped"]
    tokens = 1000 + 3 * 64
    for row in rows:
        assert row.keys() == KEYS
        assert row["checked_tokens"] == row["tokens_per_run"] == 64
        assert row["seconds_per_token"]["repeats"] == 2
        kept = dense_cache_bytes(2, tokens, 64, torch.float32)
        if row["implementation"] == "s2-cache":
            kept = cache_bytes(decode.SHAPE.pattern, tokens, 64, torch.float32)
        assert row["cache_bytes"]["kept"] == kept
    assert "s2-cache" in capsys.readouterr().out
    assert bench.main([*TOY, "--out", str(tmp_path)]) == 0
    assert len(rows_in(tmp_path)) == 3
    assert "nothing new" in capsys.readouterr().out


def test_a_wrong_result_is_never_timed(bench, decode, tmp_path, monkeypatch, capsys):
    attend = decode.cached_attention
    monkeypatch.setattr(decode, "cached_attention", lambda *given: attend(*given) * 1.001)
    assert bench.main([*TOY, "--out", str(tmp_path)]) == 1
    assert not rows_in(tmp_path)
    assert capsys.readouterr().err.startswith("error: s2-cache at 1000 tokens: out is off by")


@pytest.mark.parametrize("option", ["--context", "--repeats"])
def test_refuses_options_out_of_range(bench, tmp_path, capsys, option):
    assert bench.main(["decode", option, "0", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == f"error: {option} 0: must be >= 1\n"
