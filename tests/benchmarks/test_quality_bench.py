"""The quality benchmark: a row for each training, which goes on if it was interrupted and is not repeated."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import RUNNER, rows_in
from megatron_run import environment_of_forks
from waiting import PATIENCE, wait_until

KEYS = {
    *("benchmark", "date", "machine", "versions", "commit", "experiment", "size", "variant", "seed", "dtype"),
    *("steps", "flags", "evaluated", "text", "parameters", "seq_length", "tokens", "pairs", "loss"),
    *("by_position", "evaluated_tokens", "train_losses", "tokens_per_second", "step_seconds", "other_cpus"),
    *("command", "ranks", "attention"),
}


@pytest.fixture(scope="module")
def scratch(bench):
    from benchmarks import quality_scratch

    return quality_scratch


@pytest.fixture
def in_forks(monkeypatch):
    """What the benchmark starts runs in forks, with `--python python`."""
    for name, value in environment_of_forks().items():
        monkeypatch.setenv(name, value)
    commands = os.environ["PATH"].partition(":")[0]
    monkeypatch.setenv("PYTHON_EXEC", f"{commands}/python")  # which torchrun starts


def words(tmp_path: Path, *more: str) -> list[str]:
    options = ["--toy", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--threads", "1"]
    return ["quality", "scratch", *options, "--device", "cpu", *more]


def test_a_training_from_text_to_picture(bench, scratch, in_forks, tmp_path, capsys):
    options = words(tmp_path, "--variants", "s2", "--python", "python")
    assert bench.main(options) == 0
    [row] = rows_in(tmp_path / "out")
    assert row.keys() == KEYS
    size = scratch.TOY_SIZES["toy"]
    assert (row["size"], row["variant"], row["seed"], row["tokens"]) == ("toy", "s2", 1, size.tokens)
    assert len(row["train_losses"]) == size.steps and row["train_losses"][0][0] == 1
    assert row["loss"] == pytest.approx(np.log(512), abs=1) and row["evaluated_tokens"] == 4 * 128
    assert len(row["by_position"]) == scratch.PARTS
    assert np.mean(row["by_position"]) == pytest.approx(row["loss"], abs=1e-4)
    assert row["command"].startswith("torchrun --standalone --nproc-per-node 1 scripts/pretrain_gpt.py ")
    assert str(tmp_path) not in json.dumps(row), "a row has no directories of this machine"
    assert row["text"]["packages"].keys() == {"filelock", "packaging"}
    assert "toy   s2 " in capsys.readouterr().out
    assert bench.main(options) == 0
    assert "nothing new" in capsys.readouterr().out
    assert bench.main(["plot", "--out", str(tmp_path / "out")]) == 0
    pictures = {path.name for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"quality-scratch-sizes.png", "quality-scratch-positions.png"}


# What is trained.


class Fakes:
    """Takes the place of text, trainings and evaluations; `ran` has the directories of trainings."""

    def __init__(self, monkeypatch, scratch):
        from benchmarks.quality_text import Text
        from benchmarks.quality_training import Trained, TrainingError

        self.ran, self.failing, self.text_hash = [], "none", "a"

        def make_text(work, python, packages, held_out, tokenizer, workers):
            directory = work / "text"
            return Text(directory, directory / "tokenizer", {"torch": "2"}, 1000, 100, self.text_hash)

        def train(launcher, directory, flags, steps, save_interval):
            self.ran.append(directory.name)
            if self.failing in directory.name:
                raise TrainingError("ended with status 1, the log is there")
            seconds = {"median": 0.5, "p20": 0.5, "p80": 0.5, "repeats": steps}
            return Trained(directory / "checkpoint", "torchrun …", {steps: 5.0}, seconds, 0.0)

        def evaluate(launcher, trained, data, seq_length, samples, parts, log):
            loss = 4.0 if log.parent.name.split("-")[2] == "dense" else 4.1
            by_position = np.linspace(loss + 0.1, loss - 0.1, parts).tolist()
            return {"loss": loss, "by_position": by_position, "evaluated_tokens": (samples or 9) * seq_length}

        for function in (make_text, train, evaluate):
            monkeypatch.setattr(scratch, function.__name__, function)


@pytest.fixture
def fakes(monkeypatch, scratch):
    return Fakes(monkeypatch, scratch)


def names(fakes) -> list[str]:
    return [name.removeprefix("scratch-").rpartition("-")[0] for name in fakes.ran]


def test_each_size_has_all_variants_on_the_same_text(bench, scratch, fakes, tmp_path):
    options = [word for word in words(tmp_path) if word != "--toy"]
    assert bench.main(options) == 0
    seeds = [("1.4M", 1), ("1.4M", 2), ("4M", 1), ("12M", 1)]
    assert names(fakes) == [f"{size}-{variant}-{n}" for size, n in seeds for variant in scratch.VARIANTS]
    rows = rows_in(tmp_path / "out")
    for size in scratch.SIZES:
        mine = [row for row in rows if row["size"] == size and row["seed"] == 1]
        assert len({tuple(row["flags"]) for row in mine}) == 1 and "--bf16" in mine[0]["flags"]
        assert len({tuple(row["attention"]) for row in mine}) == len(scratch.VARIANTS)


def test_a_row_of_any_machine_counts_unless_the_text_is_another(bench, fakes, tmp_path):
    options = words(tmp_path, "--variants", "s2")
    assert bench.main(options) == 0
    [path] = (tmp_path / "out").glob("*/quality-*.jsonl")
    elsewhere = path.parent.parent / "another-machine"
    path.parent.rename(elsewhere)
    row = json.loads((elsewhere / path.name).read_text())
    row["commit"]["code"], row["machine"]["name"] = "other", "another-machine"
    (elsewhere / path.name).write_text(json.dumps(row) + "\n")
    assert bench.main(options) == 0 and len(fakes.ran) == 1
    assert bench.main([*options, "--seeds", "2"]) == 0 and len(fakes.ran) == 2
    fakes.text_hash = "b"
    assert bench.main(options) == 0 and len(fakes.ran) == 3
    assert len(set(fakes.ran)) == 3, "a directory for each"


def test_one_that_fails_is_told_of_and_the_others_go_on(bench, fakes, tmp_path, capsys):
    fakes.failing = "window-only"
    assert bench.main(words(tmp_path)) == 1
    message = "toy window-only seed 1 ended with status 1, the log is there"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"
    others = ["dense", "s2-first-two-dense", "s2", "no-shards"]
    assert [row["variant"] for row in rows_in(tmp_path / "out")] == others
    fakes.failing = "none"
    assert bench.main(words(tmp_path)) == 0 and len(fakes.ran) == 6, "it alone is tried again"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sizes", "4M"], "--sizes 4M: must be one of toy with --toy"),
        (
            ["--variants", "ring"],
            "--variants ring: must be one of dense, s2-first-two-dense, s2, window-only, no-shards",
        ),
        (["--ranks", "0"], "--ranks 0: must be >= 1"),
        (["--python", "/no/python"], "--python /no/python: "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_does_not_fit_is_refused_by_name(bench, tmp_path, capsys, options, message):
    assert bench.main([*words(tmp_path), *options]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith(f"error: {message}")


def test_ranks_have_equally_many_sequences(bench, fakes, tmp_path, capsys):
    assert bench.main(words(tmp_path, "--ranks", "3")) == 2
    message = "--ranks 3: must divide the 2 sequences of a step"
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"


def test_sizes_are_what_they_are_called_and_windows_cost_as_much_as_shards(scratch):
    from megatron_s2.pattern.block_pattern import dense_pairs

    for name, size in scratch.SIZES.items():
        assert size.parameters == pytest.approx(float(name[:-1]) * 1e6, rel=0.03)
        s2, window = size.settings("s2"), size.settings("window-only")
        assert s2.coverage().lost == 0
        pairs = s2.mean_pairs(size.seq_length), window.mean_pairs(size.seq_length)
        assert pairs[0] <= pairs[1] < 1.2 * pairs[0] < 0.5 * dense_pairs(size.seq_length)
        assert size.settings("no-shards") == replace(s2, vert_stride=0)
        assert replace(window, local_blocks=s2.local_blocks) == size.settings("no-shards")
        assert size.settings("s2-first-two-dense").sparse_layers == list(range(3, size.num_layers + 1))
        assert size.settings("dense").sparse_layers == []


def test_no_file_is_in_both_datasets(bench, tmp_path, monkeypatch):
    from benchmarks import quality_text

    files = []
    for n in range(12):
        files.append(str(tmp_path / f"{n}.py"))
        Path(files[n]).write_text(
            f"def function_{n % 11}():\n    return {n % 11}\n"
        )  # two have the same text
    sources = {"package": {"version": "1", "files": files}}
    monkeypatch.setattr(quality_text, "_sources", lambda python, packages: sources)
    text = quality_text.make_text(tmp_path / "work", "python", ("package",), 4, 300, 1)
    held_out, train = map(documents, (text.held_out, text.train))
    assert (len(held_out), len(train)) == (3, 8) and held_out.isdisjoint(train)
    assert (text.held_out_tokens, text.train_tokens) == tuple(
        sum(map(len, some)) for some in (held_out, train)
    )
    assert quality_text.make_text(tmp_path / "again", "python", ("package",), 4, 300, 1).hash == text.hash


def documents(prefix: Path) -> set[tuple[int, ...]]:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    dataset = IndexedDataset(str(prefix))
    return {tuple(dataset[n].tolist()) for n in range(len(dataset))}


# Tables.


def test_gaps_are_to_the_dense_model_of_the_same_size_seed_and_tokens(
    bench, scratch, fakes, tmp_path, capsys
):
    assert bench.main(words(tmp_path, "--seeds", "1,2")) == 0
    printed = capsys.readouterr().out
    assert len(re.findall(r" 4\.1000 +\+2\.50% ", printed)) == 8, "4.1 over 4.0, of eight models"
    [group] = scratch.newest(rows_in(tmp_path / "out"))
    dense, *_, s2, _ = group[:4]
    assert scratch.dense_of(s2, group) is dense
    gaps = scratch.over_dense(s2, dense, scratch.PARTS)
    expected = 100 * (np.array(s2["by_position"]) / np.array(dense["by_position"]) - 1)
    assert gaps == pytest.approx(expected)
    assert scratch.dense_of({**s2, "tokens": 1}, group) is None
    assert scratch.dense_of({**s2, "flags": ["--lr", "1"]}, group) is None
    assert scratch.mean_over_dense([s2, {**s2, "seed": 3}], group) == pytest.approx([2.5])


def test_the_results_page_has_one_section_for_all_machines(bench, fakes, tmp_path):
    from benchmarks import results_page

    assert bench.main(words(tmp_path)) == 0
    assert bench.main(["plot", "--out", str(tmp_path / "out")]) == 0
    page = results_page.page(tmp_path / "out", "rows")
    [machine] = (path.name for path in (tmp_path / "out").iterdir() if path.is_dir())
    assert f"## quality, on all machines\n\n- quality, on {machine}: python " in page
    assert f"## {machine}\n" not in page, "nothing else was measured there"
    assert "![quality-scratch-sizes](rows/quality-scratch-sizes.png)" in page


# Interruption.


@pytest.mark.exhaustive
@pytest.mark.parametrize(
    ("number", "to_all", "status"), [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 143)]
)
def test_what_is_interrupted_goes_on_from_its_checkpoint(tmp_path, number, to_all, status):
    """As a terminal interrupts, which signals to all, and as `kill` does. Not in forks, which have groups of
    their own."""
    command = [sys.executable, str(RUNNER), *words(tmp_path, "--variants", "s2")]
    environment = {**os.environ, "PYTHONPATH": str(RUNNER.parents[1])}
    running = subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, process_group=0)

    def has_checkpoint() -> bool:
        return any(tmp_path.glob("work/*/checkpoint/latest_checkpointed_iteration.txt"))

    wait_until(lambda: has_checkpoint() or running.poll() is not None)
    (os.killpg if to_all else os.kill)(running.pid, number)
    assert running.wait(PATIENCE) == status, running.stderr.read()
    [lock] = tmp_path.glob("work/*/lock")
    with lock.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)  # no process of the training is left
    assert not (tmp_path / "out").exists()
    assert subprocess.run(command, env=environment, timeout=PATIENCE).returncode == 0
    [row] = rows_in(tmp_path / "out")
    assert len(row["train_losses"]) == row["steps"]
    [log] = tmp_path.glob("work/*/log.txt")
    assert "successfully loaded checkpoint" in log.read_text()
