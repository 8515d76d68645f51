"""The context-parallel benchmark: wrong results or bytes are never timed, ranks end with the run."""

import json
import os
import signal
import subprocess
import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import RUNNER, rows_in
from waiting import PATIENCE, wait_until

TOY = ["context-parallel", "--seq-length", "2048", "--threads", "1", "--device", "cpu"]
KEYS = {
    *("benchmark", "date", "machine", "versions", "commit", "parallel_code"),
    *("ranks", "schedule", "case", "seq_length", "device", "threads_per_rank"),
    *("batch", "heads", "kv_heads", "head_dim", "dtype", "pattern"),
    *("compared_queries", "bytes", "predicted_bytes", "megatron_bytes", "imbalance"),
    *("other_cpus", "seconds", "note"),
}


@pytest.fixture(scope="module")
def benchmark(bench):
    from benchmarks import context_parallel

    return context_parallel


@pytest.fixture(scope="module")
def run(bench, tmp_path_factory):
    out = tmp_path_factory.mktemp("results")
    options = ["--ranks", "2", "--cases", "s2", "--repeats", "3", "--out", str(out)]
    assert bench.main([*TOY, *options]) == 0
    return out, options


def test_every_row_says_all_there_is_to_say(run):
    rows = rows_in(run[0])
    assert [(row["ranks"], row["schedule"], row["case"]) for row in rows] == [
        (2, "gather", "s2"),
        (2, "a2a", "s2"),
    ]
    token = 2 * 64 * 4  # bytes of a token's key and value of one head
    for row in rows:
        assert set(row) == KEYS
        assert row["bytes"] == row["predicted_bytes"] and len(row["bytes"]) == 2
        assert row["megatron_bytes"]["ring"]["forward_received"] == 1024 * 4 * token
        assert row["megatron_bytes"]["ring"] == row["megatron_bytes"]["all_gather"]
        seconds = row["seconds"]
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"] and seconds["repeats"] == 3
        assert row["imbalance"] >= 1 and row["compared_queries"] == 256
        assert "measure no network" in row["note"]
    # Half of the tokens' outputs or queries, keys and values of half of the heads: from either rank.
    assert [x["forward_received"] for x in rows[1]["bytes"]] == [1024 * 4 * 64 * 4 * 3] * 2


def test_the_table_shows_what_the_rows_say(run, benchmark):
    rows = rows_in(run[0])
    table = benchmark.BENCHMARK.table([{**row, "other_cpus": 0.0} for row in rows])
    for row in rows:
        (line,) = (line for line in table.splitlines() if f" 2 {row['schedule']} " in line)
        most = max(x["forward_received"] for x in row["bytes"]) / 2**20
        assert f" {most:.2f} " in line and f" {1e3 * row['seconds']['median']:.1f} ms" in line
    assert table.endswith(benchmark.NOTE) and "cores busy" not in table
    busy = benchmark.BENCHMARK.table([{**row, "other_cpus": 0.7} for row in rows])
    assert busy.count("2 ranks") == 1 and "other processes kept 0.7 cores busy" in busy


def test_the_picture_comes_from_the_stored_rows(run, bench, capsys):
    assert bench.main(["plot", "--out", str(run[0])]) == 0
    picture = Path(capsys.readouterr().out.strip())
    assert picture.name == "context-parallel.png" and picture.read_bytes()[:4] == b"\x89PNG"


def test_what_is_stored_is_not_measured_again_unless_the_code_is_another(run, bench, benchmark, monkeypatch):
    out, options = run

    def no_ranks(*arguments):
        raise AssertionError("ranks were started")

    monkeypatch.setattr(benchmark, "LocalRanks", no_ranks)
    assert bench.main([*TOY, *options]) == 0
    assert len(rows_in(out)) == 2
    monkeypatch.setattr(benchmark, "code_hash", lambda patterns: "another")
    with pytest.raises(AssertionError, match="ranks were started"):
        bench.main([*TOY, *options])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ranks", "1"], "--ranks 1: must be >= 2"),
        (["--ranks", "2,16"], "--ranks 16: must be at most 8, the query heads, for --schedules a2a"),
        (["--seq-length", "2046"], "--seq-length 2046: must be a multiple of 4 for --ranks 2"),
        (["--seq-length", "0"], "--seq-length 0: must be >= 1"),
        (["--repeats", "0"], "--repeats 0: must be >= 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_refused_by_name(bench, capsys, tmp_path, options, said):
    assert bench.main([*TOY, "--out", str(tmp_path), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {said}") and error.count("\n") == 1
    assert rows_in(tmp_path) == []


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ranks", "two"], "two: must be numbers of ranks, such as 2,4"),
        (["--schedules", "gather,ring"], "ring: must be of gather, a2a"),
    ],
)
def test_what_cannot_be_read_is_refused_by_name(bench, capsys, options, said):
    with pytest.raises(SystemExit, match="2"):
        bench.main([*TOY, *options])
    assert capsys.readouterr().err.rstrip().endswith(said)


def test_more_ranks_than_gpus_are_refused(benchmark, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    options = {"seq_length": 2048, "schedules": ["a2a"], "cases": ["s2"], "repeats": 1, "device": "cuda"}
    benchmark.require_options(Namespace(ranks=[2], **options))
    with pytest.raises(ValueError, match="--ranks 4: must be at most 2 with --device cuda"):
        benchmark.require_options(Namespace(ranks=[2, 4], **options))


# Ranks that are already there.


@pytest.fixture(scope="module")
def ranks(benchmark):
    with benchmark.LocalRanks(2, "cpu", threads=1) as ranks:
        yield ranks


@pytest.fixture(scope="module")
def case(benchmark):
    from benchmarks.cases import Case

    return Case(benchmark.SHAPES["s2"], 2048, "cpu")


@pytest.fixture(scope="module")
def reference(benchmark, case):
    return benchmark.reference_of(case)


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("schedule", "field"),
    [
        ("gather", "forward_received"),
        ("a2a", "forward_sent"),
        ("gather", "backward_sent"),
        ("a2a", "backward_received"),
    ],
)
def test_bytes_that_were_not_predicted_are_an_error(
    benchmark, ranks, case, reference, monkeypatch, field, schedule
):
    exact = benchmark.exchange_bytes

    def off_by_one(*arguments):
        predicted = exact(*arguments)
        return replace(predicted, **{field: getattr(predicted, field) + 1})

    benchmark.checked_bytes(ranks, case, reference, schedule)
    monkeypatch.setattr(benchmark, "exchange_bytes", off_by_one)
    with pytest.raises(benchmark.WrongResultError, match=f"{schedule} on 2 ranks.*rank 0 counted"):
        next(benchmark.measure(ranks, case, reference, [schedule], repeats=1))


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", ["out", "dq", "dk", "dv"])
def test_wrong_results_are_never_timed(benchmark, ranks, case, reference, name):
    exact, plain = ({**x, name: x[name] + 1e-2} for x in (reference.exact, reference.plain))
    wrong = replace(reference, exact=exact, plain=plain)
    with pytest.raises(benchmark.WrongResultError, match=f"gather on 2 ranks at 2048 tokens: {name} is off"):
        next(benchmark.measure(ranks, case, wrong, ["gather"], repeats=1))


@pytest.mark.exhaustive
def test_a_rank_that_dies_is_named(benchmark):
    with (
        benchmark.LocalRanks(1, "cpu", threads=1) as ranks,
        pytest.raises(RuntimeError, match="local rank 0 ended before its work was done"),
    ):
        ranks.call(os._exit, 3)


def children_of(pid: int) -> set[int]:
    """All processes below one, by /proc."""
    direct = {
        int(x) for path in Path(f"/proc/{pid}/task").glob("*/children") for x in path.read_text().split()
    }
    return direct.union(*map(children_of, direct))


def runs(pid: int) -> bool:
    """Whether a process is there and has not ended: one that nobody asked for its status has."""
    status = Path(f"/proc/{pid}/stat")
    return status.exists() and status.read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.exhaustive
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="needs /proc")
def test_an_interrupted_run_keeps_its_rows_and_leaves_no_process(tmp_path):
    options = ["--ranks", "2", "--repeats", "2", "--out", str(tmp_path)]
    long = [sys.executable, str(RUNNER), *TOY, *options, "--schedules", "gather"]
    process = subprocess.Popen(long, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        # Those of s2; dense comes next.
        wait_until(lambda: rows_in(tmp_path) or process.poll() is not None)
        assert process.poll() is None
        children = children_of(process.pid)
        assert len(children) >= 2
        os.killpg(process.pid, signal.SIGINT)
        error = process.communicate(timeout=PATIENCE)[1]
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 130 and "interrupted: what was measured is stored" in error
    assert [row["case"] for row in rows_in(tmp_path)] == ["s2"]
    wait_until(lambda: not any(map(runs, children)))  # multiprocessing's own helper ends a moment later


# What is stored.

ROOT = RUNNER.parents[1]
LAYERS = {"S2": "s2", "dense": "dense"}


def newest_rows() -> dict[tuple[str, int, str], dict]:
    """The last stored row of each case at 8192 tokens, number of ranks and schedule."""
    paths = sorted((ROOT / "benchmarks" / "results" / "amd-epyc-2-cores").glob("context-parallel-*.jsonl"))
    rows = [json.loads(line) for path in paths for line in path.read_text().splitlines()]
    return {(x["case"], x["ranks"], x["schedule"]): x for x in rows if x["seq_length"] == 8192}


def received(row: dict) -> str:
    """MiB of the rank that receives most, forward and backward."""
    most = (max(x[way] for x in row["bytes"]) for way in ("forward_received", "backward_received"))
    return f"{sum(most) / 2**20:.2f}"


def test_what_the_page_calls_measured_is_stored():
    page = (ROOT / "docs" / "context-parallel.md").read_text().partition("\n## Measured\n")[2]
    lines = [line.strip("| ").split(" | ") for line in page.splitlines() if line.startswith("| ")][1:]
    rows = newest_rows()
    assert {(LAYERS[layer], int(ranks)) for layer, ranks, *_ in lines} == {key[:2] for key in rows}
    for layer, ranks, *told in lines:
        gather, a2a = (rows[LAYERS[layer], int(ranks), schedule] for schedule in ("gather", "a2a"))
        assert gather["date"] == a2a["date"], "the times of a line are those of one run, taken in turns"
        ring = gather["megatron_bytes"]["ring"]
        assert told == [
            *map(received, (gather, a2a)),
            f"{(ring['forward_received'] + ring['backward_received']) / 2**20:.2f}",
            *(f"{1e3 * row['seconds']['median']:.0f} ms" for row in (gather, a2a)),
            f"{gather['other_cpus']:.2f}",
        ]


def test_stored_bytes_are_those_that_the_planner_predicts_today(benchmark):
    from benchmarks.cases import Case

    for (name, ranks, schedule), row in newest_rows().items():
        predicted = benchmark.predicted_bytes(schedule, Case(benchmark.SHAPES[name], 8192, "cpu"), ranks)
        assert row["bytes"] == row["predicted_bytes"] == [vars(x) for x in predicted]
