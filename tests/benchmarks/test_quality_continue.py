"""The experiment `continue`: a model is judged as it is and after training, each variant beside dense."""

import json
import shutil
from pathlib import Path

import pytest
from conftest import rows_in
from megatron_run import environment_of_forks
from tiny_model import make_tiny_model

from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.pattern_file import write_pattern_file


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A directory with `model` and the pattern file `calibrated.json`."""
    directory = tmp_path_factory.mktemp("continue")
    make_tiny_model(directory)
    settings = S2Settings(2, 2, block_size=64, local_blocks=2, vert_stride=0, sink_blocks=1)
    write_pattern_file(directory / "calibrated.json", settings)
    return directory


def words(made: Path, tmp_path: Path, *more: str) -> list[str]:
    options = ["--toy", "--work", str(tmp_path / "work"), "--out", str(tmp_path / "out"), "--threads", "1"]
    model = ["--hf", str(made / "model"), "--pattern-file", str(made / "calibrated.json")]
    return ["quality", "continue", *options, *model, "--device", "cpu", "--dtype", "float32", *more]


@pytest.fixture
def recipe(monkeypatch, made):
    """Stands in for the recipe, which trains nothing; yields its calls."""
    from benchmarks import quality_continue
    from benchmarks.quality_training import Trained

    calls = []

    def train_by_recipe(launcher, directory, hf, text, pattern, seq_length, flags, steps, save_interval):
        calls.append((directory.name, pattern, flags))
        shutil.copytree(hf, directory / "exported")
        loss = 2.0 + 0.1 * len(calls)
        seconds = {"median": 0.5, "p20": 0.5, "p80": 0.5, "repeats": steps}
        return Trained(directory / "checkpoint", "bash …", {n + 1: loss for n in range(steps)}, seconds, 0.0)

    monkeypatch.setattr(quality_continue, "train_by_recipe", train_by_recipe)
    return calls


def test_each_variant_is_judged_before_and_after(bench, made, recipe, tmp_path, capsys):
    from benchmarks import quality_continue

    options = words(made, tmp_path)
    assert bench.main(options) == 0
    rows = rows_in(tmp_path / "out")
    before, after = ([row for row in rows if row["size"] == size] for size in ("0", "toy"))
    assert [row["variant"] for row in before] == ["dense", "uniform", "calibrated"]
    assert [row["variant"] for row in after] == [
        *("dense", "uniform", "calibrated", "uniform-annealed", "calibrated-annealed")
    ]
    assert [row["kv"] for row in before] == pytest.approx([1, 1, 3 / 8]), "8 blocks of 64, or 3 of them"
    assert all(row["tokens"] == 0 and len(row["needles"]) == 20 for row in before)
    assert quality_continue._control(after[1], rows) is after[0]
    needles = after[1]["needles"]
    for row in (before[0], after[0]):
        row["needles"] = [{**needle, "found": n < 4} for n, needle in enumerate(needles)]
    after[1]["needles"] = [{**needle, "found": n in (0, 5, 6, 17)} for n, needle in enumerate(needles)]
    cells = quality_continue._cells(after[1], after[0])
    assert "3/10 / 1/10" in cells, "at each length"
    assert "25% / -" in cells, "of dense's needles, not of their number"
    assert str(tmp_path) not in json.dumps(rows), "a row has no directories of this machine"
    assert len({tuple(row["flags"]) for row in after}) == 1
    assert [row["anneal_steps"] for row in after] == [0, 0, 0, 1, 1]
    assert recipe[3][2] == [*after[3]["flags"], "--s2-anneal-steps", "1"]
    calibrated = str(made / "calibrated.json")
    assert [pattern[-1] for _, pattern, _ in recipe] == ["1", "1", calibrated, "1", calibrated]
    assert len({name for name, _, _ in recipe}) == 5, "a directory for each"
    printed = capsys.readouterr().out
    assert "toy    calibrated-annealed" in printed
    assert bench.main(options) == 0 and len(recipe) == 5, "none is repeated"
    assert bench.main(["plot", "--out", str(tmp_path / "out")]) == 0
    assert [path.name for path in (tmp_path / "out").glob("*.png")] == ["quality-continue.png"]


def test_a_model_must_be_given(bench, tmp_path, capsys):
    assert bench.main(["quality", "continue", "--toy", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: --hf: must be given; make it with ")


@pytest.mark.exhaustive
def test_the_recipe_trains(bench, made, monkeypatch, tmp_path):
    for name, value in environment_of_forks().items():
        monkeypatch.setenv(name, value)
    options = words(made, tmp_path, "--sizes", "toy", "--variants", "calibrated-annealed")
    assert bench.main([*options, "--python", "python"]) == 0
    [row] = rows_in(tmp_path / "out")
    assert row["kv"] == pytest.approx(3 / 8) and len(row["train_losses"]) == 2
    assert row["command"].startswith("PATTERN='--s2-pattern-file calibrated.json' SAMPLES=1 bash examples/")
    assert not any(str(directory) in json.dumps(row) for directory in (tmp_path, made))
