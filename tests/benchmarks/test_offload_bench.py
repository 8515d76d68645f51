"""The offload benchmark: what fails or has other losses has no row, each gain comes from its own rows."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from conftest import RUNNER, rows_in

ROOT = RUNNER.parents[1]
TOY = ["offload", "--device", "cpu", "--threads", "1", "--repeats", "2", "--accumulation", "1"]
MODEL = ["--hidden-size", "64", "--num-layers", "1", "--seq-length", "8", "--subgroup-size", "4096"]
STEPS = 3 + 2 * 2
LOSSES = tuple(5.5 - step / 100 for step in range(STEPS))
KEYS = {
    *("benchmark", "date", "machine", "versions", "commit", "offload_code", "packages"),
    *("case", "fraction", "flush", "accumulation", "device", "model", "flags", "warm_up", "repeats"),
    "gpu_memory_gb",
    *("not_measured", "parameters", "gpu_share", "losses", "seconds", "optimizer_seconds"),
    *("host_peak_bytes", "gpu_peak_bytes", "other_cpus", "note"),
}
PRINTED = """ > number of parameters on (tensor, pipeline) model parallel rank (0, 0): 82048
optimizer offload of rank 0: 82048 parameters in 21 subgroups of 4096; the GPU updates {}% of those"""


@pytest.fixture(scope="module")
def benchmark(bench):
    from benchmarks import offload

    return offload


@pytest.fixture
def trainings(benchmark, monkeypatch):
    """Takes the place of trainings: what those of a case leave can be set, by its flags; lists what ran."""
    fakes = Trainings(benchmark)
    monkeypatch.setattr(benchmark, "train", fakes)
    return fakes


class Trainings:
    def __init__(self, benchmark):
        self.benchmark, self.left, self.ran = benchmark, {}, []

    def __call__(self, flags, warm_up, repeats, device, threads, gpu_memory):
        line = " ".join(flags)
        found = [case for case in self.benchmark.CASES.values() if " ".join(case.flags) in line]
        case = max(found, key=lambda case: len(" ".join(case.flags)))
        self.ran.append(case.name)
        share = 0 if case.fraction in ("auto", None) else 100 * case.fraction
        left = {
            "status": 0,
            "output": PRINTED.format(share),
            "losses": LOSSES,
            "step_seconds": (0.2, 0.4),
            "optimizer_seconds": (0.1, 0.1),
            "host_peak_bytes": 2**30,
        }
        return self.benchmark.Training(**(left | self.left.get(case.name, {})))


# Trainings.


@pytest.fixture(scope="module")
def trained(benchmark):
    """Of a process each: two of the smallest, one of ours and one of Megatron's that needs a GPU; and the
    status of one without the process that began it."""
    model = benchmark.Model(64, num_layers=1, seq_length=8, subgroup_size=4096, bucket_size=16384)
    names = ("s2-0.5-flush", "hybrid")
    flags = [benchmark.flags(benchmark.CASES[name], model, 2, threads=1) for name in names]
    with ThreadPoolExecutor() as pool:
        runs = [pool.submit(benchmark.train, words, 1, 2, "cpu", 1) for words in flags]
        alone = [sys.executable, "-m", "benchmarks.training_process", "report.json", "0", "0", *flags[0]]
        left = subprocess.run(alone, cwd=ROOT, stdin=subprocess.DEVNULL, capture_output=True, check=False)
        return {name: run.result() for name, run in zip(names, runs)} | {"alone": left.returncode}


@pytest.mark.exhaustive
def test_a_training_says_what_it_took(benchmark, trained):
    training = trained["s2-0.5-flush"]
    assert training.status == 0, training.output
    assert len(training.losses) == 1 + 2 * 2 and training.losses[-1] < training.losses[0]
    assert len(training.step_seconds) == len(training.optimizer_seconds) == 2
    assert all(0 < seconds < 10 for seconds in training.step_seconds + training.optimizer_seconds)
    assert training.gpu_peak_bytes is None and 2**27 < training.host_peak_bytes < 2**32
    assert "gradients leave during backward" in training.output
    row = benchmark.results(training)
    assert row["parameters"] == 2 * 256 * 64 + 4 * 64 * 64 + 3 * 128 * 64 + 3 * 64
    assert benchmark.printed(benchmark.SHARE, training) == pytest.approx(50, abs=5)


@pytest.mark.exhaustive
def test_a_training_ends_with_what_began_it(trained):
    assert trained["alone"] == 1 and not (ROOT / "report.json").exists()


@pytest.mark.exhaustive
def test_megatrons_offload_says_why_it_does_not_run_without_a_gpu(benchmark, trained):
    row = benchmark.results(trained["hybrid"])
    assert trained["hybrid"].status == 2
    assert row["not_measured"] == (
        "error: --optimizer-cpu-offload: needs a GPU, and there is none here; remove it"
    )
    assert row["seconds"] is row["optimizer_seconds"] is row["parameters"] is None


@pytest.mark.parametrize(
    ("output", "said"),
    [
        (
            "Traceback\ntorch.OutOfMemoryError: no memory\n\nWARNING: group\n",
            "torch.OutOfMemoryError: no memory",
        ),
        ("training ...\nKilled\n", "Killed"),
        ("", "status -9, nothing printed"),
    ],
)
def test_what_failed_is_named_by_its_error(benchmark, output, said):
    assert benchmark.Training(-9, output).failure == said


@pytest.mark.gpu
def test_a_training_gets_no_more_of_the_gpu_than_it_may_take(benchmark):
    model = benchmark.Model(1024, num_layers=2, seq_length=64, subgroup_size=2**20, bucket_size=2**22)
    words = benchmark.flags(benchmark.NONE, model, 1, threads=1)
    assert benchmark.train(words, 1, 1, "cuda", 1).status == 0
    refused = benchmark.train(words, 1, 1, "cuda", 1, gpu_memory=2**28)
    assert refused.status and "OutOfMemoryError" in refused.output


# Rows.


def test_every_row_says_all_there_is_to_say(bench, trainings, tmp_path):
    trainings.left["hybrid"] = {"status": 2, "output": "error: no"}
    assert bench.main([*TOY, *MODEL, "--accumulation", "1,4", "--out", str(tmp_path)]) == 0
    names = list(trainings.benchmark.CASES)
    rows = rows_in(tmp_path)
    assert trainings.ran == 2 * names and [row["case"] for row in rows] == 2 * names
    assert [row["accumulation"] for row in rows] == [1] * len(names) + [4] * len(names)
    for row in rows:
        assert set(row) == KEYS
        assert (row["not_measured"] is None) == (row["case"] != "hybrid")
        if row["not_measured"] is None:
            assert row["seconds"] == pytest.approx({"median": 0.3, "p20": 0.24, "p80": 0.36, "repeats": 2})
            assert row["losses"] == list(LOSSES) and row["parameters"] == 82048
        batch = row["flags"].index("--global-batch-size")
        assert row["flags"][batch + 1] == str(row["accumulation"])
    shares = {row["case"]: row["gpu_share"] for row in rows}
    assert shares["none"] is None and shares["s2-0.75-flush"] == 0.75


def test_cases_differ_in_what_they_say_they_do(benchmark):
    cases = benchmark.CASES
    assert {case.fraction for case in cases.values()} == {None, 0, 0.25, 0.5, 0.75, 1, "auto"}
    for name, case in cases.items():
        assert ("--overlap-grad-reduce" in case.flags) == (case.flush is not False), name
        assert ("--s2-offload" in case.flags) == case.is_ours
        assert ("--overlap-cpu-optimizer-d2h-h2d" in case.flags) == (name == "hybrid-overlap")
    assert [name for name, case in cases.items() if case.may_be_refused] == ["hybrid", "hybrid-overlap"]


def test_what_is_stored_is_not_measured_again_unless_the_code_is_another(
    bench, trainings, tmp_path, monkeypatch
):
    options = [*TOY, *MODEL, "--out", str(tmp_path), "--cases"]
    assert bench.main([*options, "s2-0.5"]) == 0
    assert trainings.ran == ["none", "s2-0.5"]
    assert bench.main([*options, "s2-0.5", "s2-1"]) == 0
    assert trainings.ran == ["none", "s2-0.5", "s2-1"]
    monkeypatch.setattr(trainings.benchmark, "code_hash", lambda patterns: "another")
    assert bench.main([*options, "s2-1"]) == 0
    assert trainings.ran[3:] == ["none", "s2-1"]


def scaled(factor):
    return tuple(factor * x for x in LOSSES)


def one_bit_off(losses):
    last = torch.tensor(losses[-1])
    return (*losses[:-1], torch.nextafter(last, torch.tensor(9.0)).item())


LAST = f"the loss of step {STEPS} is"
WRONG = {
    "ours, by a bit": ("s2-1", {"losses": one_bit_off(LOSSES)}, f"s2-1 at accumulation 1: {LAST}"),
    "ours, not a number": ("s2-1", {"losses": (*LOSSES[:-1], float("nan"))}, "must have 7 finite losses"),
    "ours, one less": ("s2-1", {"losses": LOSSES[:-1]}, "s2-1 at accumulation 1: must have 7 finite losses"),
    "ours, failed": ("s2-1", {"status": 1, "output": "E\nKeyError: 3"}, "ended with status 1: KeyError: 3"),
    "megatron's": ("hybrid", {"losses": scaled(1.0012)}, "they may differ by 0.00113 of it"),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("stored", [False, True], ids=["", "the others stored"])
def test_wrong_losses_have_a_row_without_times(bench, trainings, tmp_path, capsys, wrong, stored):
    case, left, said = WRONG[wrong]
    options = [*TOY, *MODEL, "--out", str(tmp_path), "--cases", "s2-0.5"]
    if stored:
        assert bench.main(options) == 0
    trainings.left[case] = left
    assert bench.main([*options, case]) == 1
    assert said in capsys.readouterr().err
    *right, wrong = rows_in(tmp_path)
    assert [row["case"] for row in right] == ["none", "s2-0.5"] and wrong["case"] == case
    assert wrong["seconds"] is None and wrong["not_measured"].startswith("wrong: ")
    ran = list(trainings.ran)
    assert bench.main([*options, case, "s2-0"]) == 1, "the others go on, and what is wrong is said again"
    assert trainings.ran == [*ran, "s2-0"] and rows_in(tmp_path)[-1]["seconds"]


def test_without_losses_to_compare_with_nothing_is_proven(bench, trainings, tmp_path):
    trainings.left["none"] = {"status": 1, "output": "E\nKeyError: 3"}
    assert bench.main([*TOY, *MODEL, "--out", str(tmp_path), "--cases", "s2-0.5"]) == 1
    none, ours = rows_in(tmp_path)
    assert none["not_measured"].endswith("ended with status 1: KeyError: 3")
    assert ours["seconds"] is None and ours["unproven_seconds"]["median"] == pytest.approx(0.3)
    assert ours["not_measured"].endswith("s2-0.5 at accumulation 1: none has no losses to compare with")


def test_losses_may_differ_from_those_without_offload_by_rounding(bench, trainings, tmp_path):
    """A step has 8 tokens, or 2048."""
    ours = {"losses": scaled(1.001)}
    trainings.left = {"s2-0.5": ours, "s2-1-flush": ours, "hybrid": {"losses": scaled(0.999)}}
    options = ["--out", str(tmp_path), "--cases", "s2-0.5", "s2-1-flush", "hybrid"]
    assert bench.main([*TOY, *MODEL, *options]) == 0
    assert len(rows_in(tmp_path)) == 4
    trainings.left = {"hybrid": {"losses": scaled(1.00009)}}
    assert bench.main([*TOY, *MODEL, *options, "--seq-length", "2048"]) == 0
    trainings.left = {"hybrid": {"losses": scaled(1.00011)}}
    assert bench.main([*TOY, *MODEL, *options, "--seq-length", "2048", "--again"]) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--hidden-size", "100"], "--hidden-size 100: must be a positive multiple of 64"),
        (["--subgroup-size", "100"], "--subgroup-size 100: must be a positive multiple of 64"),
        (["--num-layers", "0"], "--num-layers 0: must be >= 1"),
        (["--seq-length", "0"], "--seq-length 0: must be >= 1"),
        (["--bucket-size", "0"], "--bucket-size 0: must be >= 1"),
        (["--repeats", "0"], "--repeats 0: must be >= 1"),
        (["--accumulation", "4,0"], "--accumulation 0: must be >= 1"),
        (["--gpu-memory-gb", "40"], "--gpu-memory-gb 40: must not be set with --device cpu"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_refused_by_name(bench, trainings, capsys, tmp_path, options, said):
    assert bench.main([*TOY, "--out", str(tmp_path), *options]) == 2
    assert capsys.readouterr().err == f"error: {said}\n"
    assert trainings.ran == []


# What people see.


@pytest.fixture
def rows(bench, trainings, tmp_path):
    """Ours take 400 ms at fraction 0, 200 at 0.5, 300 at 1, and half as long again with a late flush."""
    for fraction, seconds in ((0, 0.4), (0.25, 0.35), (0.5, 0.2), (0.75, 0.25), (1, 0.3), ("auto", 0.4)):
        trainings.left[f"s2-{fraction}-flush"] = {"step_seconds": (seconds, seconds)}
        trainings.left[f"s2-{fraction}"] = {"step_seconds": (1.5 * seconds, 1.5 * seconds)}
    trainings.left["hybrid"] = {"status": 2, "output": "error: needs a GPU"}
    assert bench.main([*TOY, *MODEL, "--out", str(tmp_path)]) == 0
    return [row | {"other_cpus": 0.0} for row in rows_in(tmp_path)]


def test_the_gains_of_flushing_and_of_interleaving_are_told_apart(benchmark, rows):
    table = benchmark.BENCHMARK.table(rows)
    lines = {line.split()[1]: line for line in table.splitlines() if line.startswith(" " * 11 + "1 ")}
    assert set(lines) == set(benchmark.CASES)
    for row in rows:
        line = lines[row["case"]]
        assert ("1.50x" in line) == (row["flush"] is True), line
        if row["seconds"]:
            assert f" {1e3 * row['seconds']['median']:.1f} ms" in line and "1024 MiB" in line
    assert lines["hybrid"].endswith("not measured: error: needs a GPU")
    gains = "accumulation 1, interleaving, flush in backward: best fraction 0.5, 2.00x over 0, 1.50x over 1"
    assert gains in table.splitlines()
    assert table.endswith(benchmark.NOTES["cpu"]) and "cores busy" not in table


def test_without_its_rows_a_gain_is_not_told(benchmark, rows):
    table = benchmark.BENCHMARK.table
    assert "interleaving" not in table([row for row in rows if row["case"] != "s2-0-flush"])
    assert "1.50x" not in table([row for row in rows if row["flush"] is not False]).replace(
        "1.50x over 1", ""
    )
    busy = table([row | {"other_cpus": 0.7} for row in rows])
    assert busy.count("other processes kept 0.7 cores busy") == len(rows)


def test_pictures_come_from_the_stored_rows(bench, rows, trainings, tmp_path, capsys):
    larger = [*TOY, *MODEL, "--hidden-size", "128", "--cases", "s2-0.5", "--out", str(tmp_path)]
    assert bench.main(larger) == 0
    capsys.readouterr()
    assert bench.main(["plot", "--out", str(tmp_path)]) == 0
    pictures = [Path(line) for line in capsys.readouterr().out.splitlines()]
    assert [picture.name for picture in pictures] == ["offload.png", "offload-2.png"]
    assert all(picture.read_bytes()[:4] == b"\x89PNG" for picture in pictures)
