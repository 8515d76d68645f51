"""The profile of an attention call: kernels of every pass, counters as ncu prints them, or the reason."""

from dataclasses import replace

import pytest
from conftest import rows_in

TOY = ["profile", "--device", "cpu", "--threads", "1", "--cases", "cpu", "--seq-lengths", "100"]
PRINTED = """==PROF== Connected to process 7
"ID","Kernel Name","Section Name","Metric Name","Metric Unit","Metric Value"
"0","fwd_kernel","metrics","dram__throughput.avg.pct_of_peak_sustained_elapsed","%","31.7"
"0","fwd_kernel","metrics","gpu__time_duration.sum","ns","1,250,000"
"0","fwd_kernel","metrics","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed","%","45.2"
"1","bwd_kernel","metrics","gpu__time_duration.sum","ns","2000"
"1","bwd_kernel","metrics","sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed","","n/a"
"""


@pytest.fixture(scope="module")
def profile(bench):
    from benchmarks import attention_profile

    return attention_profile


def test_each_pass_has_its_kernels_and_says_why_there_are_no_counters(bench, profile, tmp_path, capsys):
    options = [*TOY, "--implementations", "s2-torch", "sdpa", "--out", str(tmp_path)]
    assert bench.main(options) == 0
    rows = rows_in(tmp_path)
    assert [(row["implementation"], row["pass"]) for row in rows] == [
        (name, which) for name in ("s2-torch", "sdpa") for which in ("forward", "forward+backward")
    ]
    for row in rows:
        seconds = [kernel["seconds"] for kernel in row["kernels"]]
        assert seconds == sorted(seconds, reverse=True) and 0 < sum(seconds) <= row["kernel_seconds"]
        assert len(seconds) <= profile.MOST_KERNELS
        assert (row["counters"], row["no_counters"], row["not_measured"]) == (None, "not on cuda", None)
    out = capsys.readouterr().out
    assert out.count("TFLOP/s on visible pairs") == 4 and "_flash_attention" in out
    assert bench.main(options) == 0
    assert "nothing new" in capsys.readouterr().out


def test_a_wrong_result_has_no_profile(bench, profile, tmp_path, monkeypatch, capsys):
    right = profile.IMPLEMENTATIONS["s2-torch"]
    wrong = replace(right, prepare=lambda case: lambda q, k, v: right.prepare(case)(q, k, v) * 1.001)
    monkeypatch.setitem(profile.IMPLEMENTATIONS, "s2-torch", wrong)
    assert bench.main([*TOY, "--implementations", "s2-torch", "--out", str(tmp_path)]) == 1
    assert "error: wrong: s2-torch at 100 tokens: out is off by" in capsys.readouterr().err
    assert [row["kernels"] for row in rows_in(tmp_path)] == [None, None]


def test_counters_are_read_by_kernel(profile):
    counters, reason = profile.parse_counters(PRINTED, 0)
    assert reason is None
    assert counters == [
        {"name": "fwd_kernel", "dram_percent": 31.7, "seconds": 1.25e-3, "tensor_percent": 45.2},
        {"name": "bwd_kernel", "seconds": 2e-6, "tensor_percent": None},
    ]


@pytest.mark.parametrize(
    ("output", "status", "reason"),
    [
        (f"==ERROR== ERR_NVGPUCTRPERM - no permission\n{PRINTED}", 0, "ERR_NVGPUCTRPERM - no permission"),
        ("Traceback\nRuntimeError: CUDA error\n", 1, "RuntimeError: CUDA error"),
        ("", 0, "it printed nothing"),
    ],
)
def test_counters_that_cannot_be_read_are_named_with_the_reason(profile, output, status, reason):
    assert profile.parse_counters(output, status) == (None, f"ncu, status {status}: {reason}")


def test_ncu_is_asked_for_one_pass_of_one_implementation(profile, tmp_path, monkeypatch):
    from benchmarks.cases import SHAPES, Case

    case = Case(SHAPES["grouped"], 4096, "cuda")
    monkeypatch.setattr(profile.shutil, "which", lambda name: None)
    assert profile.counters("grouped", case, "s2-triton", "forward") == (None, "ncu is not on PATH")
    (tmp_path / "printed").write_text(PRINTED)
    ncu = tmp_path / "ncu"
    ncu.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words\ncat {tmp_path}/printed\n')
    ncu.chmod(0o755)
    monkeypatch.setattr(profile.shutil, "which", lambda name: str(ncu))
    counters, reason = profile.counters("grouped", case, "s2-triton", "forward")
    assert reason is None and len(counters) == 2
    words = (tmp_path / "words").read_text().split()
    assert words[-4:] == ["grouped", "4096", "s2-triton", "forward"]
    assert "--clock-control none --profile-from-start off" in " ".join(words)


@pytest.mark.gpu
def test_on_a_gpu_kernels_are_those_of_triton(bench, tmp_path):
    options = ["--cases", "grouped", "--seq-lengths", "2048", "--implementations", "s2-triton", "sdpa-flash"]
    assert bench.main(["profile", "--device", "cuda", *options, "--out", str(tmp_path)]) == 0
    for row in rows_in(tmp_path):
        assert row["kernel_seconds"] > 0 and bool(row["counters"]) != bool(row["no_counters"])
