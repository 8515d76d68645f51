"""The attention benchmark: rows are complete, what is wrong is told, never timed, a second call goes on."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import rows_in

from megatron_s2 import S2Pattern, s2_attention

PATTERN = ["--block-size", "16", "--local-blocks", "2", "--vert-stride", "4"]
SHAPE = ["--heads", "4", "--head-dim", "16", *PATTERN]
TOY = ["attention", *SHAPE, "--device", "cpu", "--repeats", "3", "--threads", "1"]
BOTH = ["--implementations", "s2-torch", "sdpa"]
KEYS = {
    *("benchmark", "date", "machine", "versions", "commit"),
    *("implementation", "pass", "case", "device"),
    *("seq_length", "batch", "heads", "kv_heads", "head_dim", "dtype", "pattern", "busy_loops"),
    *("not_measured", "checked_at", "other_cpus", "seconds", "setup_seconds"),
    *("flops", "dense_flops", "speedup_bound", "input_bytes", "peak_bytes_above_inputs"),
}


@pytest.fixture
def attention(bench):
    from benchmarks import attention

    return attention


@pytest.fixture
def trials(bench):
    from benchmarks import attention_trial

    return attention_trial


@pytest.fixture
def toy(bench, trials, monkeypatch, tmp_path):
    """Runs a toy case, without the peak memory, which takes fresh processes; returns the exit status."""
    monkeypatch.setattr(trials, "peak_memory", lambda prepare, arguments: None)
    return lambda *options: bench.main([*TOY, "--out", str(tmp_path), *options])


def measured_in(directory: Path) -> list[tuple]:
    return [(row["seq_length"], row["implementation"]) for row in rows_in(directory) if row["seconds"]]


@pytest.fixture(scope="module")
def run(bench, tmp_path_factory):
    """One run over two lengths, the longer without dense attention. Peak memory, which takes fresh processes,
    test_measure measures."""
    from benchmarks import attention_trial

    out = tmp_path_factory.mktemp("results")
    options = ["--seq-lengths", "100,200", "--dense-up-to", "150", "--out", str(out)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_trial, "peak_memory", lambda prepare, arguments: 2**20)
        assert bench.main([*TOY, *BOTH, *options]) == 0
    return out


# Rows.


def test_every_row_says_all_there_is_to_say(run):
    rows = rows_in(run)
    assert [(row["seq_length"], row["implementation"], row["pass"]) for row in rows] == [
        (length, name, which)
        for length in (100, 200)
        for name in ("s2-torch", "sdpa")
        for which in ("forward", "forward+backward")
    ]
    for row in rows:
        assert set(row) == KEYS
        assert set(row["machine"]) == {"name", "cpu", "gpu", "cores", "threads", "load"}
        assert set(row["versions"]) == {"python", "torch", "triton", "cudnn", "dkernel", "megatron_s2"}
        assert set(row["commit"]) == {"hash", "dirty", "code"} and len(row["commit"]["code"]) == 16
        assert row["case"] is None and row["device"] == "cpu" and row["busy_loops"] == 0
        assert row["speedup_bound"] == row["dense_flops"] / row["flops"] >= 1
        assert row["input_bytes"] == 4 * row["seq_length"] * 16 * (4 + 2 + 2 + 4)
        if row["implementation"] == "sdpa" and row["seq_length"] == 200:
            assert row["not_measured"] == "longer than --dense-up-to 150"
            assert row["seconds"] is row["setup_seconds"] is row["checked_at"] is None
            continue
        seconds = row["seconds"]
        assert 0 < seconds["p20"] <= seconds["median"] <= seconds["p80"] and seconds["repeats"] == 3
        assert row["not_measured"] is None and row["checked_at"] == row["seq_length"]
        assert (row["peak_bytes_above_inputs"] is None) == (row["pass"] == "forward")


def test_flops_are_those_of_the_pattern(run):
    row = rows_in(run)[0]
    assert row["dense_flops"] == 4 * (4 * 100 * 101 // 2) * 16
    assert row["flops"] == 4 * 2 * sum(S2Pattern(2, 16, 2, 4).visible_pairs(100)) * 16 < row["dense_flops"]


def test_the_table_shows_speed_ups_and_what_was_not_measured(run, attention):
    table, rows = attention.BENCHMARK.table(rows_in(run)), rows_in(run)
    assert table.count("not measured: longer than --dense-up-to 150") == 2
    for ours, dense in zip(rows[:2], rows[2:4]):
        (line,) = (
            line for line in table.splitlines() if f"{ours['pass']} " in line and " 100 s2-torch" in line
        )
        speedup = dense["seconds"]["median"] / ours["seconds"]["median"]
        assert f" {speedup:.2f} " in line and f" {ours['speedup_bound']:.2f} " in line


def test_the_table_says_when_others_were_at_work(run, attention):
    rows = [{**row, "other_cpus": 0.0} for row in rows_in(run)]
    assert "other processes" not in attention.BENCHMARK.table(rows)
    rows[0]["other_cpus"] = 0.75
    assert attention.BENCHMARK.table(rows).endswith("other processes kept 0.75 cores busy")


def test_beside_busy_loops_rows_and_tables_are_others(toy, tmp_path, monkeypatch, capsys, attention):
    from benchmarks import measure

    started, start = [], measure.subprocess.Popen

    def popen(command, **options):
        process = start(command, **options)
        started.extend([process] if "while True" in command[-1] else [])
        return process

    monkeypatch.setattr(measure.subprocess, "Popen", popen)
    both = [*BOTH, "--seq-lengths", "100", "--busy-loops", "0,2"]
    assert toy(*both) == 0
    assert [row["busy_loops"] for row in rows_in(tmp_path)] == [0] * 4 + [2] * 4
    assert len(started) == 2 and all(process.poll() is not None for process in started)
    table = capsys.readouterr().out
    assert table.count("; beside 2 busy loops") == 1 and table.count(" 100 s2-torch") == 4
    names = [path.name for path in attention.BENCHMARK.plot(rows_in(tmp_path), tmp_path)]
    assert names == ["attention-other-1.png", "attention-other-2-busy-2.png"]
    assert toy(*both) == 0 and len(rows_in(tmp_path)) == 8, "what is stored is not measured again"


def test_pictures_come_from_the_stored_rows(run, bench, capsys):
    assert bench.main(["plot", "--out", str(run)]) == 0
    picture = Path(capsys.readouterr().out.strip())
    assert picture.name == "attention-other-1.png" and picture.parent.parent == run
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_rows_from_before_a_field_was_added_are_still_shown(run, attention, tmp_path):
    added = ("case", "device", "not_measured", "checked_at", "other_cpus", "busy_loops")
    alone = [{**row, "other_cpus": 0.0} for row in rows_in(run)]
    rows = [row for row in alone if row["seconds"]]
    old = [{key: value for key, value in row.items() if key not in added} for row in rows]
    assert attention.BENCHMARK.table(old) == attention.BENCHMARK.table(rows)
    assert attention.BENCHMARK.plot(old, tmp_path)


# The registry.


def test_fixed_cases_are_those_that_the_project_is_judged_by(bench):
    from benchmarks.cases import DEFAULT_LENGTHS, DEFAULT_SHAPES, SHAPES, Case, shape_name

    for name, shape in SHAPES.items():
        row = Case(shape, 4096, "cpu").row()
        assert shape_name(json.loads(json.dumps(row))) == name
        assert shape_name({**row, "batch": 7}) is None
    p = SHAPES["grouped"].pattern
    assert (SHAPES["grouped"].heads, p.num_kv_heads, SHAPES["grouped"].head_dim) == (32, 8, 128)
    assert (p.block_size, p.local_blocks, p.vert_stride) == (64, 8, 16)
    authors = S2Pattern.from_dkernel(num_heads=16, block_size=64, local_blocks=8, vert_stride=16)
    p = SHAPES["dkernel"].pattern
    assert (p.strides, p.head_phases) == (authors.strides, authors.head_phases)
    assert DEFAULT_SHAPES["cuda"] == ["grouped", "dkernel"]
    assert (DEFAULT_LENGTHS["cuda"][0], DEFAULT_LENGTHS["cuda"][-1]) == (4096, 262144)


@pytest.mark.parametrize("tokens", [96, 100])
def test_flex_attention_gets_the_identical_mask(bench, tokens):
    from torch.nn.attention.flex_attention import create_mask

    from benchmarks.cases import Case, Shape
    from benchmarks.exactness import visible_keys
    from benchmarks.implementations import flex_block_mask

    pattern = S2Pattern(2, 16, 2, 4)
    case = Case(Shape(pattern, 1, 4, 16, "float32"), tokens, "cpu")
    mask = flex_block_mask(case)
    n = pattern.num_blocks(tokens)
    assert torch.equal(mask.to_dense()[0].bool(), pattern.block_mask(n).repeat_interleave(2, 0))
    causal = create_mask(mask.mask_mod, 1, 1, tokens, tokens, device="cpu")[0, 0]
    blocks = mask.to_dense()[0].bool().repeat_interleave(16, 1).repeat_interleave(16, 2)[:, :tokens, :tokens]
    expected = visible_keys(pattern, torch.arange(tokens), tokens).repeat_interleave(2, 0)
    assert torch.equal(blocks & causal, expected)


def test_flex_attention_measures_its_own_tiles_on_a_gpu(bench):
    from benchmarks.cases import Case, Shape
    from benchmarks.implementations import IMPLEMENTATIONS, flex_options

    small, large = (
        Case(Shape(S2Pattern(2, block, 2, 4), 1, 4, 64, "bfloat16"), 1024, "cuda") for block in (32, 64)
    )
    assert flex_options(replace(large, device="cpu")) == (None, {})
    assert flex_options(large) == ("max-autotune-no-cudagraphs", {})
    assert flex_options(large, "FLASH") == ("max-autotune-no-cudagraphs", {"BACKEND": "FLASH"})
    assert set(flex_options(small)[1].values()) == {32}
    missing = IMPLEMENTATIONS["flex-flash"].unavailable(large, "forward")
    assert missing is None or "flash-attn-4 is not installed" in missing


# Wrong results and failures.


def dense_instead(case):
    def attention(q, k, v):
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
def test_a_wrong_result_of_ours_is_told_and_not_timed(toy, attention, monkeypatch, tmp_path, capsys, what):
    right = attention.IMPLEMENTATIONS["s2-torch"]

    def prepare(case):
        right_attention = right.prepare(case)
        return {
            "dense instead of sparse": dense_instead(case),
            "a gradient off by a thousandth": lambda q, k, v: right_attention(q, WrongGradient.apply(k), v),
            "NaN": lambda q, k, v: right_attention(q, k, v) * float("nan"),
        }[what]

    monkeypatch.setitem(attention.IMPLEMENTATIONS, "s2-torch", replace(right, prepare=prepare))
    for _ in range(2):
        assert toy(*BOTH, "--seq-lengths", "200") == 1
        out, err = capsys.readouterr()
        assert err.startswith("error: wrong: s2-torch at 200 tokens: ")
        assert out.count("not measured: wrong: s2-torch at 200 tokens: ") == 2
        assert measured_in(tmp_path) == [(200, "sdpa")] * 2 and len(rows_in(tmp_path)) == 4, "stored once"


def test_ours_that_fails_at_one_length_leaves_the_others(toy, attention, monkeypatch, tmp_path, capsys):
    right = attention.IMPLEMENTATIONS["s2-torch"]

    def prepare(case):
        if case.seq_length == 200:
            raise RuntimeError("no such tile")
        return right.prepare(case)

    monkeypatch.setitem(attention.IMPLEMENTATIONS, "s2-torch", replace(right, prepare=prepare))
    assert toy("--implementations", "s2-torch", "--seq-lengths", "200,100") == 1
    assert measured_in(tmp_path) == [(100, "s2-torch")] * 2
    said = "error: wrong: s2-torch at 200 tokens: RuntimeError: no such tile\n"
    assert capsys.readouterr().err == said


class AsOnCuda:
    """A case of the CPU that is measured as those of CUDA are, a pass at a time."""

    def __init__(self, trials, monkeypatch, fails_at: str | None = None, says: str = ""):
        self.timed = []
        monkeypatch.setattr(trials, "cuda_peak_memory", lambda run: 0)

        def times(run, repeats):
            which = trials.PASSES[len(self.timed) % 2]
            self.timed.append(which)
            if which == fails_at:
                raise RuntimeError(says)
            return torch.ones(repeats).numpy()

        monkeypatch.setattr(trials, "cuda_times", times)


def measured_on_cuda(trials, passes=None):
    from benchmarks.cases import Case, Shape

    case = Case(Shape(S2Pattern(2, 16, 2, 4), 1, 4, 16, "float32"), 100, "cpu")
    trial = trials.Trial(trials.IMPLEMENTATIONS["s2-torch"], case)
    return trial, trials.measure_on_cuda(trial, passes or trials.PASSES, 2)


def test_on_cuda_a_pass_has_its_row_before_the_next_begins(trials, monkeypatch):
    cuda = AsOnCuda(trials, monkeypatch)
    trial, rows = measured_on_cuda(trials)
    first = next(rows)
    assert first["pass"] == "forward" and first["seconds"] and cuda.timed == ["forward"]
    assert trial.stored([first]) == [first]
    (second,) = rows
    assert second["pass"] == "forward+backward" and len(trial.stored([first, second])) == 2
    _, rest = measured_on_cuda(trials, ["forward+backward"])
    assert [row["pass"] for row in rest] == ["forward+backward"], "what is stored is not measured again"


def test_a_gpu_that_is_lost_is_said_of_the_pass_that_lost_it_alone(trials, monkeypatch):
    AsOnCuda(trials, monkeypatch, "forward", "CUDA error: an illegal memory access was encountered")
    trial, rows = measured_on_cuda(trials)
    (row,) = rows
    assert trial.lost_gpu and row["pass"] == "forward"
    assert "wrong: s2-torch at 100 tokens: RuntimeError: CUDA error" in row["not_measured"]


def fails(error: Exception):
    def prepare(case):
        raise error

    return prepare


@pytest.mark.parametrize(
    "prepare, reason",
    [
        (fails(torch.OutOfMemoryError("CUDA out of memory. Tried")), "out of memory"),
        (fails(RuntimeError("[enforce] DefaultCPUAllocator: can't allocate memory")), "out of memory"),
        (
            fails(RuntimeError("No available kernel.\nAborting")),
            "failed: sdpa at 200 tokens: RuntimeError: No available kernel. Aborting",
        ),
        (
            lambda case: lambda q, k, v: q * (k.mean() + v.mean()),
            "failed: sdpa at 200 tokens: out is off by",
        ),
    ],
    ids=["out of memory", "out of memory on the CPU", "refused", "wrong"],
)
def test_another_that_fails_is_stored_by_name_and_ours_is_measured(
    toy, attention, monkeypatch, tmp_path, capsys, prepare, reason
):
    monkeypatch.setitem(
        attention.IMPLEMENTATIONS, "sdpa", replace(attention.IMPLEMENTATIONS["sdpa"], prepare=prepare)
    )
    assert toy(*BOTH, "--seq-lengths", "200") == 0
    assert measured_in(tmp_path) == [(200, "s2-torch")] * 2
    rows = [row for row in rows_in(tmp_path) if row["implementation"] == "sdpa"]
    assert len(rows) == 2 and all(row["not_measured"].startswith(reason) for row in rows)
    assert capsys.readouterr().out.count(f"not measured: {reason}") == 2
    assert toy(*BOTH, "--seq-lengths", "200") == 0
    assert "nothing new" in capsys.readouterr().out, "the same code fails again"


def test_flex_attention_without_a_compiler_is_stored_by_name(bench, toy, monkeypatch, tmp_path):
    from benchmarks import implementations

    monkeypatch.setattr(implementations.shutil, "which", lambda name: None)
    assert toy("--implementations", "flex", "--seq-lengths", "64") == 0
    assert [(row["pass"], row["not_measured"]) for row in rows_in(tmp_path)] == [
        ("forward", "no C++ compiler, which FlexAttention needs on the CPU"),
        ("forward+backward", "no backward on cpu"),
    ]


def test_dkernel_that_is_not_installed_is_named(bench, monkeypatch):
    from benchmarks import implementations
    from benchmarks.cases import SHAPES, Case

    case, dkernel = Case(SHAPES["dkernel"], 4096, "cuda"), implementations.IMPLEMENTATIONS["dkernel"]
    monkeypatch.setattr(implementations.importlib.util, "find_spec", lambda name: None)
    assert dkernel.unavailable(case, "forward") == "the package dkernel is not installed"
    monkeypatch.setattr(implementations.importlib.util, "find_spec", lambda name: "found")
    assert dkernel.unavailable(case, "forward") is None


def test_a_backend_of_sdpa_that_pytorch_refuses_is_named_with_its_reason(bench):
    from torch.nn.attention import SDPBackend

    from benchmarks.cases import Case, Shape
    from benchmarks.implementations import _sdpa_refuses

    case = Case(Shape(S2Pattern(2, 16, 2, 4), 1, 4, 16, "float32"), 64, "cpu")
    assert _sdpa_refuses(SDPBackend.FLASH_ATTENTION, case) is None
    refused = _sdpa_refuses(SDPBackend.CUDNN_ATTENTION, case)
    assert refused.startswith("refused by PyTorch: No viable backend")


def test_too_long_a_comparison_is_made_at_a_shorter_length(bench):
    from benchmarks.cases import SHAPES, Case
    from benchmarks.exactness import checked_length

    case = Case(SHAPES["grouped"], 262144, "cuda")
    assert checked_length(case, memory=140 << 30) == 262144
    assert checked_length(case, memory=40 << 30) == 65536
    assert checked_length(replace(case, seq_length=4096), memory=40 << 30) == 4096


# A second call.


def test_an_interrupted_run_goes_on_where_it_stopped(toy, trials, monkeypatch, tmp_path, capsys):
    check = trials.check

    def check_until_200(implementation, case):
        if case.seq_length == 200:
            raise KeyboardInterrupt
        return check(implementation, case)

    lengths = [*BOTH, "--seq-lengths", "100,200"]
    with monkeypatch.context() as patch:
        patch.setattr(trials, "check", check_until_200)
        assert toy(*lengths) == 130
    first = rows_in(tmp_path)
    assert {row["seq_length"] for row in first} == {100} and len(first) == 4
    assert capsys.readouterr().err.endswith(
        "interrupted: what was measured is stored; the same command continues\n"
    )
    assert toy(*lengths) == 0
    assert rows_in(tmp_path)[:4] == first
    assert [row["seq_length"] for row in rows_in(tmp_path)[4:]] == [200] * 4
    assert " 100 sdpa" in capsys.readouterr().out
    monkeypatch.setattr(trials, "check", fails(RuntimeError("measured again")))
    assert toy(*lengths) == 0
    assert "nothing new" in capsys.readouterr().out and len(rows_in(tmp_path)) == 8


@pytest.mark.parametrize(
    "options",
    [["--again"], ["--threads", "2"], ["--sink-blocks", "1"], ["--kv-heads", "1"]],
    ids=lambda value: " ".join(value),
)
def test_what_is_asked_for_again_or_differs_is_measured(toy, tmp_path, options):
    assert toy(*BOTH, "--seq-lengths", "100") == 0
    assert toy(*BOTH, "--seq-lengths", "100", *options) == 0
    assert measured_in(tmp_path) == [(100, "s2-torch")] * 2 + [(100, "sdpa")] * 2 + measured_in(tmp_path)[4:]
    assert len(measured_in(tmp_path)) == 8


def test_rows_of_other_code_are_measured_again(toy, tmp_path):
    assert toy(*BOTH, "--seq-lengths", "100") == 0
    (path,) = tmp_path.glob("*/*.jsonl")
    rows = rows_in(tmp_path)
    other = [{**row, "commit": {**row["commit"], "code": "other"}} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in other))
    assert toy(*BOTH, "--seq-lengths", "100") == 0
    assert len(rows_in(tmp_path)) == 8


def test_a_row_that_was_cut_off_is_no_row(bench, tmp_path):
    from benchmarks.results import read_rows

    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "attention-1.jsonl").write_text('{"whole": 1}\n{"cut o')
    assert read_rows(tmp_path, "attention") == {tmp_path / "machine": [{"whole": 1}]}


# Flags.


@pytest.mark.parametrize(
    "options, message",
    [
        (["--block-size", "48"], "block_size 48: must be a power of two >= 16"),
        (["--heads", "5"], "--heads 5: must be a multiple of --kv-heads 2"),
        (["--repeats", "0"], "--repeats 0: must be >= 1"),
        (["--seq-lengths", "64,0"], "--seq-lengths 0: must be >= 1"),
        (["--threads", "0"], "--threads 0: must be >= 1"),
        (["--busy-loops", "0,-1"], "--busy-loops -1: must be >= 0, and 0 on cuda"),
        (
            ["--implementations", "dkernel"],
            "--implementations dkernel: must be of s2-torch, sdpa, flex with --device cpu",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_refused_in_a_line(toy, capsys, options, message):
    assert toy(*options) == 2
    assert capsys.readouterr().err == f"error: {message}\n"


@pytest.mark.parametrize(
    "options, message",
    [
        (
            ["--seq-lengths", "4k"],
            "argument --seq-lengths: 4k: must be numbers of tokens, such as 4096,16384",
        ),
        (["--cases", "huge"], "argument --cases: invalid choice: 'huge'"),
        (["--device", "tpu"], "argument --device: invalid choice: 'tpu'"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_no_flag_takes_is_refused_by_its_name(toy, capsys, options, message):
    with pytest.raises(SystemExit):
        toy(*options)
    assert message in capsys.readouterr().err


def test_cuda_without_a_gpu_is_refused_in_a_line(toy, monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert toy("--device", "cuda") == 2
    assert capsys.readouterr().err == (
        "error: --device cuda: must be cpu or auto here, PyTorch finds no CUDA device\n"
    )


@pytest.mark.gpu
def test_on_a_gpu_each_implementation_is_measured_or_named(bench, tmp_path):
    options = ["--cases", "grouped", "--seq-lengths", "2048", "--repeats", "3", "--out", str(tmp_path)]
    assert bench.main(["attention", "--device", "cuda", *options]) == 0
    rows = {(row["implementation"], row["pass"]): row for row in rows_in(tmp_path)}
    names = {"s2-triton", "sdpa-flash", "sdpa-cudnn", "flex", "flex-flash", "dkernel"}
    assert {name for name, _ in rows} == names
    for (name, _), row in rows.items():
        assert bool(row["seconds"]) != bool(row["not_measured"]), name
    for name in ("s2-triton", "sdpa-flash", "flex"):
        for which in ("forward", "forward+backward"):
            row = rows[name, which]
            assert row["not_measured"] is None and row["checked_at"] == 2048
            assert row["peak_bytes_above_inputs"] > 0
