"""docs/results.md is what the stored rows say: each target beside its bound, what is not measured named."""

import json
from pathlib import Path

import pytest
from conftest import RUNNER

ROOT = RUNNER.parents[1]
GPU = {"name": "nvidia-h200", "cpu": "a CPU", "gpu": "NVIDIA H200", "cores": 16, "threads": 16, "load": 0.0}
FACTS = {
    "machine": GPU,
    "date": "2026-11-21T12:00:00+00:00",
    "versions": {"python": "3.12", "torch": "2.15", "cudnn": 92100, "dkernel": None},
    "commit": {"hash": "0123456789abcdef", "dirty": False, "code": "x"},
}


@pytest.fixture(scope="module")
def results_page(bench):
    from benchmarks import results_page

    return results_page


def test_the_committed_page_is_made_of_the_committed_rows(results_page):
    expected = results_page.page(results_page.RESULTS, "../benchmarks/results")
    assert results_page.PAGE.read_text() == expected, "python -m benchmarks.results_page writes it anew"


def targets(results_page, directory: Path) -> list[str]:
    lines = results_page.page(directory, "rows").splitlines()
    first = lines.index("|---|---|---|---|") + 1
    return lines[first : first + len(results_page.TARGETS)]


def test_without_rows_nothing_is_claimed_and_bounds_are_told(results_page, tmp_path):
    text = results_page.page(tmp_path, "rows")
    assert "**No GPU has been measured yet**" in text
    lines = targets(results_page, tmp_path)
    assert all("| not measured | " in line for line in lines)
    assert "| 43.70x | not measured |" in lines[3]
    step = "| 3.72x to 4.95x | not measured; the target exceeds the bound |"
    assert lines[4].endswith(step)


def attention_rows(seconds: dict, shape: str, tokens: int) -> list[dict]:
    from benchmarks.cases import SHAPES, Case

    case = Case(SHAPES[shape], tokens, "cuda")
    return [
        {
            **FACTS,
            **case.row(),
            "implementation": name,
            "pass": "forward+backward",
            "case": shape,
            "seconds": {"median": x, "p20": x, "p80": x, "repeats": 7},
            "not_measured": None,
            "flops": 10**9,
            "dense_flops": 10**10,
            "speedup_bound": 10.0,
            "input_bytes": 1,
            "peak_bytes_above_inputs": 1,
        }
        for name, x in seconds.items()
    ]


def stored(directory: Path, benchmark: str, rows: list[dict]) -> None:
    (directory / "nvidia-h200").mkdir(parents=True, exist_ok=True)
    text = "".join(json.dumps({"benchmark": benchmark, **row}) + "\n" for row in rows)
    (directory / "nvidia-h200" / f"{benchmark}-20261121T120000.jsonl").write_text(text)


def test_a_target_is_judged_where_it_is_weakest(results_page, tmp_path):
    """At 16384 tokens the bound of grouped is 8.55x, at 32768 it is 11.12x."""
    rows = attention_rows({"s2-triton": 1.0, "sdpa-flash": 9.0, "flex": 1.5}, "grouped", 16384)
    rows += attention_rows({"s2-triton": 1.0, "sdpa-flash": 10.0, "flex": 0.9}, "grouped", 32768)
    rows += attention_rows({"s2-triton": 1.0, "sdpa-flash": 30.0}, "stride-64", 131072)
    stored(tmp_path, "attention", rows)
    flash, cudnn, flex, stride, *_ = targets(results_page, tmp_path)
    assert "| 10.00x at 32768 (grouped) | 11.12x | missed by 10.1% at 32768 (grouped), where 11.12x" in flash
    assert "; not measured at 65536 (grouped), 131072 (grouped)" in flash
    stored(tmp_path / "one", "attention", rows[:2])
    assert (
        "| met where measured (1 of 10); not measured at 32768" in targets(results_page, tmp_path / "one")[0]
    )
    assert "| not measured |" in cudnn
    assert "| 0.90x at 32768 (grouped) | 1.00x | missed by 10.0% at 32768 (grouped), where 1.00x" in flex
    assert stride.endswith("| 30.00x at 131072 (stride-64) | 43.70x | met |")
    page = results_page.page(tmp_path, "rows")
    assert "### NVIDIA H200" in page and "torch 2.15, cudnn 92100; commit 012345678" in page


def test_a_step_that_misses_is_told_what_bounds_it(results_page, tmp_path, bench):
    from benchmarks.training_step import MODELS, step_flops

    model, tokens = MODELS["cuda"], 131072

    def row(case: str, seconds: float) -> dict:
        flops, dense = (step_flops(model, name, tokens) for name in (case, "dense"))
        return {
            **FACTS,
            "device": "cuda",
            "model": vars(model),
            "case": case,
            "seq_length": tokens,
            "flops": flops,
            "dense_flops": dense,
            "other_cpus": 0.0,
            "not_measured": None,
            "speedup_bound": sum(dense.values()) / sum(flops.values()),
            "seconds": {"median": seconds, "p20": seconds, "p80": seconds, "repeats": 3},
            "gpu_peak_bytes": 2**36,
            "host_peak_bytes": 2**33,
        }

    stored(tmp_path, "step", [row("dense", 18.0), row("s2-first-two-dense", 6.0), row("s2", 3.0)])
    line = targets(results_page, tmp_path)[4]
    assert "| 3.00x at 131072 (s2-first-two-dense) | 3.72x | missed by 50.0%" in line
    assert "; the bound is 3.72x" in line


def decode_row(name: str, microseconds: float, kept: int, formula: int) -> dict:
    from benchmarks.cases import SHAPES, Case

    times = dict.fromkeys(("median", "p20", "p80"), microseconds / 1e6)
    return {
        **FACTS,
        **Case(SHAPES["grouped"], 131072, "cuda").row(),
        "implementation": name,
        "seconds_per_token": {**times, "repeats": 15},
        "kernel_seconds_per_token": 1e-6,
        "cache_bytes": {"kept": kept, "set_aside": kept},
        "closed_form_bytes": formula,
    }


def test_decoding_is_compared_with_the_faster_dense_one(results_page, tmp_path):
    rows = [decode_row("s2-cache", 10, 500, 500), decode_row("sdpa", 300, 7600, 7600)]
    stored(tmp_path, "decode", rows)
    assert "| not measured |" in targets(results_page, tmp_path)[5], "one of the dense is missing"
    stored(tmp_path, "decode", [*rows, decode_row("sdpa-grouped", 90, 7600, 7600)])
    latency, memory = targets(results_page, tmp_path)[5:7]
    assert "| 9.00x at 131072 | 15.21x | missed by 10.0%" in latency
    assert memory.endswith("| 1.00x at 131072 | 1.00x | met |")
    stored(tmp_path, "decode", [decode_row("s2-cache", 10, 1000, 500)])
    assert "missed by 50.0%" in targets(results_page, tmp_path)[6]


def offload_row(case: str, seconds: float) -> dict:
    times = dict.fromkeys(("median", "p20", "p80"), seconds)
    model = {"hidden_size": 64, "num_layers": 1, "seq_length": 8, "subgroup_size": 64, "bucket_size": 64}
    return {
        **FACTS,
        "device": "cuda",
        "model": model,
        "gpu_memory_gb": 40.0,
        "warm_up": 3,
        "repeats": 3,
        "case": case,
        "accumulation": 1,
        "fraction": None,
        "flush": None,
        "not_measured": None,
        "seconds": {**times, "repeats": 3},
        "optimizer_seconds": times,
        "gpu_share": None,
        "parameters": 10**9,
        "host_peak_bytes": 1,
        "gpu_peak_bytes": 45 * 10**9,
        "other_cpus": 0.0,
        "note": "",
    }


def test_offload_is_compared_with_the_best_of_the_others(results_page, tmp_path):
    peers = {"hybrid": 3.0, "hybrid-overlap": 2.0, "s2-1-flush": 1.4, "s2-0.5-flush": 1.2}
    rows = [
        offload_row(name, seconds) for name, seconds in {"none": 0.5, "s2-auto-flush": 1.0, **peers}.items()
    ]
    stored(tmp_path, "offload", rows)
    hybrid, best = targets(results_page, tmp_path)[7:9]
    assert hybrid.endswith("| 3.00x at accumulation 1 in 40 GB | no formula | met |")
    assert "| 1.20x at accumulation 1 in 40 GB | no formula | missed by 7.7%" in best
    assert "40 GB of its memory; without offload it takes 45.0 GB" in results_page.page(tmp_path, "rows")


def test_the_page_shows_the_last_result_of_each_stage_of_the_record(results_page, tmp_path):
    stored(tmp_path, "attention", attention_rows({"s2-triton": 1.0}, "grouped", 16384))
    stage = ("2026-11-21T12:00:00Z", "same", "step", "scripts/bench.py step")
    lines = [
        (*stage, "failed", "7", "420", "exit status 1: E"),
        (*stage, "out of time", "420", "420", "time up"),
    ]
    text = "".join("\t".join(line) + "\n" for line in lines)
    (tmp_path / "nvidia-h200" / "record.tsv").write_text(text)
    page = results_page.page(tmp_path, "rows")
    assert "```text\nstep                 out of time       420 s  time up\n```" in page
