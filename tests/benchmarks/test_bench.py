"""The benchmark runner: its rows are complete, and what is wrong is never timed."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

RUNNER = Path(__file__).parents[2] / "scripts" / "bench.py"
SHAPE = [
    "--heads",
    "4",
    "--head-dim",
    "16",
    "--block-size",
    "16",
    "--local-blocks",
    "2",
    "--vert-stride",
    "4",
]
TOY = [*SHAPE, "--repeats", "3", "--threads", "1"]
KEYS = {
    *("benchmark", "date", "machine", "versions", "commit"),
    *("implementation", "pass", "seq_length", "batch", "heads", "kv_heads", "head_dim", "dtype", "pattern"),
    *("seconds", "setup_seconds", "flops", "dense_flops", "speedup_bound"),
    *("input_bytes", "peak_bytes_above_inputs"),
}


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench", RUNNER)
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(RUNNER.parents[1])
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(autouse=True)
def same_threads():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def attention(bench):
    from benchmarks import attention

    return attention


def rows_in(directory: Path) -> list[dict]:
    return [
        json.loads(line) for path in directory.glob("*/*.jsonl") for line in path.read_text().splitlines()
    ]


@pytest.fixture(scope="module")
def run(bench, tmp_path_factory):
    """One run over two lengths, the longer without dense attention."""
    threads = torch.get_num_threads()
    out = tmp_path_factory.mktemp("results")
    options = ["--seq-length", "100", "200", "--dense-up-to", "150", "--out", str(out)]
    assert bench.main(["attention", *TOY, *options]) == 0
    torch.set_num_threads(threads)
    return out


def test_every_row_says_all_there_is_to_say(run):
    rows = rows_in(run)
    measured = [(row["seq_length"], row["implementation"], row["pass"]) for row in rows]
    assert measured == [
        (100, "s2-torch", "forward"),
        (100, "s2-torch", "forward+backward"),
        (100, "sdpa", "forward"),
        (100, "sdpa", "forward+backward"),
        (200, "s2-torch", "forward"),
        (200, "s2-torch", "forward+backward"),
    ]
    for row in rows:
        assert set(row) == KEYS
        assert set(row["machine"]) == {"name", "cpu", "cores", "threads", "load"}
        assert set(row["versions"]) == {"python", "torch", "triton", "megatron_s2"}
        assert len(row["commit"]["hash"]) == 40 and isinstance(row["commit"]["dirty"], bool)
        seconds = row["seconds"]
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"] and seconds["repeats"] == 3
        assert row["speedup_bound"] == row["dense_flops"] / row["flops"] >= 1
        assert (row["peak_bytes_above_inputs"] is None) == (row["pass"] == "forward")
        assert row["input_bytes"] == 4 * row["seq_length"] * 16 * (4 + 2 + 2 + 4)


def test_flops_are_those_of_the_pattern(run):
    row = rows_in(run)[0]
    dense_pairs = 4 * 100 * 101 // 2
    assert row["dense_flops"] == 4 * dense_pairs * 16 and row["flops"] < row["dense_flops"]


def test_the_table_shows_speed_ups_and_what_was_not_measured(run, attention):
    lines = attention.table(rows_in(run)).splitlines()
    assert sum("not measured" in line for line in lines) == 2
    speed_up = lines[1].split().index("speed-up") + 4  # units, the unnamed column and the pass come before
    assert [line.split()[speed_up] for line in lines if " 100 sdpa" in line] == ["1.00", "1.00"]


def test_pictures_come_from_the_stored_rows(run, bench, capsys):
    assert bench.main(["plot", "--out", str(run)]) == 0
    picture = Path(capsys.readouterr().out.strip())
    assert picture.parent.parent == run and picture.read_bytes()[:4] == b"\x89PNG"


def dense_instead(case):
    def attention(q, k, v):
        from megatron_s2 import s2_attention

        return s2_attention(q, k, v, replace(case.pattern, vert_stride=1), return_lse=False)

    return attention


class WrongGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, dx):
        return dx * 1.001


@pytest.mark.parametrize("what", ["dense instead of sparse", "a gradient off by a thousandth", "NaN"])
def test_a_wrong_result_is_neither_timed_nor_stored(bench, attention, monkeypatch, tmp_path, capsys, what):
    right = attention.IMPLEMENTATIONS["s2-torch"]

    def prepare(case):
        right_attention = right.prepare(case)
        return {
            "dense instead of sparse": dense_instead(case),
            "a gradient off by a thousandth": lambda q, k, v: right_attention(q, WrongGradient.apply(k), v),
            "NaN": lambda q, k, v: right_attention(q, k, v) * float("nan"),
        }[what]

    monkeypatch.setitem(attention.IMPLEMENTATIONS, "s2-torch", replace(right, prepare=prepare))
    assert bench.main(["attention", *TOY, "--seq-length", "200", "--out", str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("error: s2-torch at 200 tokens: ") and not rows_in(tmp_path)


@pytest.mark.parametrize(
    "options, message",
    [
        (["--block-size", "48"], "block_size 48: must be a power of two >= 16"),
        (["--heads", "5"], "--heads 5: must be a multiple of --kv-heads 2"),
        (["--repeats", "0"], "--repeats 0: must be >= 1"),
        (["--seq-length", "0"], "--seq-length 0: must be >= 1"),
        (["--threads", "0"], "--threads 0: must be >= 1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused_in_a_line(bench, tmp_path, capsys, options, message):
    assert bench.main(["attention", *TOY, "--out", str(tmp_path), *options]) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


def test_functions_take_turns_after_a_call_that_does_not_count(bench):
    from benchmarks.measure import interleaved_times

    calls = []

    def stages(name):
        calls.append(name)
        yield
        yield

    times = interleaved_times({"a": lambda: stages("a"), "b": lambda: stages("b")}, repeats=2)
    assert calls == ["a", "b"] * 3
    assert {name: seconds.shape for name, seconds in times.items()} == {"a": (2, 2), "b": (2, 2)}
    assert all((np.diff(seconds) >= 0).all() for seconds in times.values())


def allocate_64_mib(inputs_mib: int):
    inputs = bytearray(inputs_mib << 20)
    return lambda: [len(inputs), b"x" * (64 << 20)]


def test_peak_memory_is_counted_above_the_inputs(bench):
    from benchmarks.measure import peak_memory

    peak = peak_memory(allocate_64_mib, 200)
    if peak is None:
        pytest.skip("this system does not tell a process its peak memory")
    assert 60 << 20 < peak < 70 << 20
