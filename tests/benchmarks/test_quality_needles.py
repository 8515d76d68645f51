"""The needle experiment: its sequences, its stages, and what is recalled."""

import json
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import RUNNER, rows_in
from megatron_run import environment_of_forks

ROOT = RUNNER.parents[1]


@pytest.fixture(scope="module")
def data(bench):
    from benchmarks import quality_needles_data

    return quality_needles_data


@pytest.fixture(scope="module")
def needles(bench):
    from benchmarks import quality_needles

    return quality_needles


def test_each_key_is_asked_for_once_and_its_value_follows_both_times(data):
    tokens, places = data.needle_sequences(np.random.default_rng(0), 3, 512, 32)
    assert tokens.shape == (3, 512) and places.shape == (3, 32)
    for sequence, keys in zip(tokens, places):
        for question, place in zip(range(512 - 64, 512, 2), keys):
            assert np.flatnonzero(sequence == sequence[question]).tolist() == [place, question]
            assert sequence[place + 1] == sequence[question + 1] >= data.HAY + data.KEYS
        assert np.array_equal(np.sort(keys) * 32 // 448, np.arange(32)), "one in each part"
        assert not np.array_equal(np.sort(keys), keys), "asked for in another order"
    assert tokens.max() < data.VOCABULARY - 1


def test_periods_are_of_all_lengths_and_the_long_ones_begin_in_blocks_of_all_phases(data):
    sequences = data.periodic_sequences(np.random.default_rng(0), 400, 512)
    assert sequences.max() < data.VOCABULARY - 1
    begins, periods = [], []
    for sequence in sequences:
        of_second = np.isin(sequence, sequence[-48:])
        begin = int(of_second.argmax())
        assert not of_second[:begin].any() and of_second[begin:].all(), "the parts have other tokens"
        assert begin < 14 or 6 <= period_of(sequence[:begin]) <= 14
        begins.append(begin)
        periods.append(period_of(sequence[begin:]))
    assert np.quantile(begins, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx([0, 64, 128, 192, 255], abs=16)
    assert np.quantile(periods, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx([6, 10, 17, 29, 48], rel=0.15)


def period_of(tokens):
    return next(p for p in range(1, len(tokens)) if (tokens[p:] == tokens[:-p]).all())


def test_shifted_sequences_have_their_questions_in_blocks_of_all_phases(data):
    sequences = data.shifted_needle_sequences(np.random.default_rng(0), 400, 512)
    values = sequences >= data.HAY + data.KEYS
    assert (values.sum(1) == 2 * 32).all(), "each needle twice"
    dense = np.lib.stride_tricks.sliding_window_view(values, 64, axis=1).sum(2)
    begins = dense.argmax(1)
    assert (dense.max(1) == 32).all()
    assert np.quantile(begins, [0, 0.25, 0.5, 0.75, 1]) == pytest.approx([192, 256, 320, 384, 448], abs=20)


@pytest.mark.parametrize(("count", "length"), [(0, 64), (30, 64), (33, 512)])
def test_needles_that_have_no_room_are_refused(data, count, length):
    with pytest.raises(ValueError, match=rf"needles {count}: must be between 1 and"):
        data.needle_sequences(np.random.default_rng(0), 1, length, count)


def test_a_dataset_is_the_same_each_time_and_its_sequences_fill_the_steps(needles):
    stage = needles.Stage(64, 5, 3, 1e-3, 1e-4, periodic=0.5)
    first, again = (np.concatenate([*stage.sequences()]) for _ in range(2))
    assert np.array_equal(first, again)
    assert first.shape == (16, 64), "one more, for the last label"
    assert stage.row()["hash"] != needles.Stage(64, 5, 3, 1e-3, 1e-4).row()["hash"]


def test_answers_are_the_probabilities_of_values(bench, data):
    from benchmarks.quality_recall import answers

    class Model:
        def token_losses(self, tokens):
            """Certain of the values at the end, sure of nothing else."""
            labels, at = tokens[:, 1:], torch.arange(tokens.shape[1] - 1)
            values = (labels >= data.HAY + data.KEYS) & (at >= tokens.shape[1] - 1 - 2 * 8)
            return torch.where(values, labels / 1000, 99.0)

    sequence, _ = data.needle_sequences(np.random.default_rng(0), 1, 128, 8)
    assert answers(Model(), sequence, 8) == pytest.approx(np.exp(-sequence[0, -15::2] / 1000))


def test_windows_cost_as_much_as_shards_at_the_longest_stage(needles):
    longest = max(stage.length for stage in needles.STAGES.values())
    s2, window = (needles.MODEL.settings(variant, longest) for variant in ("s2", "window-only"))
    assert s2.coverage().lost == 0 and s2.vert_stride == 16
    assert s2.mean_pairs(longest) <= window.mean_pairs(longest) < 1.05 * s2.mean_pairs(longest)
    for layer in range(1, s2.num_layers + 1):
        assert set(s2.pattern(layer).head_phases) == set(range(16)), "every layer sees every block"


def test_recall_forms_with_s2_where_a_window_holds_all_and_controls_begin_there(needles):
    from benchmarks.quality_training import Launcher

    launcher = Launcher("python", Path("work"), "cpu", ranks=1, threads=1)
    args = Namespace(toy=False, dtype="float32", seeds=None, sizes=needles.STAGES, variants=needles.VARIANTS)
    settings = [run.setting for run in needles.runs(args, launcher)]
    runs = {(setting["variant"], setting["size"]): setting for setting in settings}
    later = ["2048", "8192", "32768"]
    assert [size for variant, size in runs if variant == "s2"] == ["periods", "512", *later]
    for control in ("window-only", "dense"):
        assert [size for variant, size in runs if variant == control] == later
        assert runs[control, "2048"]["former"] == runs["s2", "2048"]["former"]
        assert runs[control, "2048"]["attention"] != runs["s2", "2048"]["attention"]
        assert runs[control, "8192"]["former"].startswith(f"needles-2048-{control}-1-")


@pytest.mark.exhaustive
def test_stages_begin_from_the_former_and_are_not_repeated(bench, needles, tmp_path, monkeypatch, capsys):
    for name, value in environment_of_forks().items():
        monkeypatch.setenv(name, value)
    options = [
        "quality",
        "needles",
        "--toy",
        "--work",
        str(tmp_path / "work"),
        "--out",
        str(tmp_path / "out"),
    ]
    options += ["--threads", "1", "--device", "cpu", "--variants", "s2", "--python", "python"]
    assert bench.main([*options, "--sizes", "128"]) == 0, "the stage before has no row and is trained, too"
    [row] = rows_in(tmp_path / "out")
    assert {cell["length"] for cell in row["cells"]} == {64, 128}
    for by, groups in (("depth", 2), ("phase", 2)):
        cells = [cell for cell in row["cells"] if by in cell]
        assert len(cells) == 2 * groups
        assert sum(cell["asked"] for cell in cells) == 2 * 16, "16 of each length"
    assert "--finetune" in row["command"] and str(tmp_path) not in row["command"]
    trained = len([*tmp_path.glob("work/needles-*/checkpoint")])
    assert bench.main(options) == 0
    assert len(rows_in(tmp_path / "out")) == 2 and trained == 2
    assert bench.main([*options, "--variants", "window-only"]) == 0
    [control] = (row for row in rows_in(tmp_path / "out") if row["variant"] == "window-only")
    assert control["size"] == "128" and control["former"] == row["former"], "it begins where S2 does"
    assert "--s2-vert-stride 0" in control["command"]
    assert len([*tmp_path.glob("work/needles-*/checkpoint")]) == trained + 1
    assert "mean / worst depth / worst phase" in capsys.readouterr().out
    assert bench.main(["plot", "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "quality-needles.png").exists()


def test_the_quality_page_and_the_readme_say_what_the_newest_row_says(needles):
    files = sorted((ROOT / "benchmarks" / "results").glob("*/quality-*.jsonl"))
    rows = [json.loads(line) for file in files for line in file.open()]
    rows = [row for row in rows if row["experiment"] == "needles" and row["variant"] == "s2"]
    row = max((row for row in rows if row["size"] == "32768"), key=lambda row: row["date"])
    phases = needles.found_shares(row, "phase")
    page = (ROOT / "docs" / "quality.md").read_text()
    for length, depths in needles.found_shares(row).items():
        line = f"| {length} | {depths.mean():.1%} | {depths.min():.1%} | {phases[length].min():.1%} |"
        assert line in page
    readme = " ".join((ROOT / "README.md").read_text().split())
    told = (
        f"finds {depths.mean():.1%} of the needles in 32768 tokens, and at the worst depth {depths.min():.1%}"
    )
    assert length == 32768 and told in readme
