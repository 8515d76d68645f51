"""scripts/calibrate.py and scripts/eval_retrieval.py on a tiny model, and what they refuse."""

import json
from pathlib import Path

import pytest
from hf_models import convert, make_model
from script_main import exit_status, load_main
from tiny_model import DATA, make_tiny_model

from megatron_s2.calibration.candidates import cost_of
from megatron_s2.calibration.source import load_source
from megatron_s2.pattern.pattern_file import read_pattern_file

CALIBRATE = "--seq-length 256 --block-size 16 --budget 0.4 --samples 2 --needles 2 --moves 2"


@pytest.fixture(scope="module")
def calibrate():
    return load_main("calibrate")


@pytest.fixture(scope="module")
def ask():
    return load_main("eval_retrieval")


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("calibration")
    make_tiny_model(directory)
    return directory


@pytest.fixture(scope="module")
def flags(directory) -> list[str]:
    return ["--hf", str(directory / "model"), "--data-path", str(directory / DATA)]


@pytest.fixture(scope="module")
def pattern_file(calibrate, directory, flags) -> Path:
    path = directory / "pattern.json"
    words = [
        *CALIBRATE.split(),
        "--resume",
        str(directory / "state"),
        "--plot",
        str(directory / "frontier.png"),
    ]
    assert exit_status(calibrate, [*flags, *words, "--output", str(path)]) == 0
    return path


def test_a_calibrated_pattern_keeps_its_budget_and_says_how_it_was_made(pattern_file, directory):
    settings = read_pattern_file(pattern_file, num_layers=2, num_kv_heads=2)
    assert settings.block_size == 16 and cost_of(settings, 256, "kv") <= 0.4
    content = json.loads(pattern_file.read_text())
    assert content["made_with"]["budget"] == 0.4 and "diverge from dense" in content["note"]
    assert (directory / "frontier.png").stat().st_size > 0


def test_a_finished_calibration_is_not_repeated(calibrate, pattern_file, directory, flags, capsys):
    words = [
        *CALIBRATE.split(),
        "--resume",
        str(directory / "state"),
        "--output",
        str(directory / "again.json"),
    ]
    assert exit_status(calibrate, [*flags, *words]) == 0
    assert "dense:" not in capsys.readouterr().err
    assert read_pattern_file(directory / "again.json") == read_pattern_file(pattern_file)


def test_needles_by_patterns_side_by_side(ask, pattern_file, directory, flags, capsys):
    words = f"--lengths 192,256 --depths 0.2,0.8 --kinds code,comment --s2-pattern-file {pattern_file}"
    words += f" --s2-block-size 16 --s2-local-blocks 2 --s2-sink-blocks 1 --plot {directory / 'needles.png'}"
    assert exit_status(ask, [*flags, *words.split()]) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    assert head.split() == ["pattern", "keys", "and", "values", "code", "comment", "found", "log-probability"]
    names = ["dense", "block 16, window 2 (32 tokens), stride 16, sinks 1", "pattern.json"]
    assert [line.split("  ")[0] for line in lines] == names
    assert all("of 4" in line and "of 8" in line for line in lines)
    assert (directory / "needles.png").stat().st_size > 0


def test_a_checkpoint_is_the_model_it_was_converted_from(ask, directory, flags, capsys):
    convert("hf-to-megatron", directory / "model", directory / "checkpoint")
    words = ["--lengths", "192", "--depths", "0.5", "--kinds", "code"]
    assert exit_status(ask, [*flags, *words]) == 0
    by_hf = capsys.readouterr().out
    assert exit_status(ask, ["--load", str(directory / "checkpoint"), *flags[2:], *words]) == 0
    assert capsys.readouterr().out == by_hf


@pytest.mark.parametrize(
    "words, message",
    [
        ("--budget 0", "--budget 0.0: must be more than 0 and at most 1"),
        ("--budget 0.01", "--budget 0.01: must be more than "),
        ("--block-size 24", "--block-size 24: must be a power of two >= 16"),
        ("--seq-length 64", "--seq-length 64: must be at least 8 blocks, 128"),
        ("--seq-length 100000", "--data-path {data}: has 0 windows of 100000 tokens"),
        ("--samples 0", "--samples 0: must be >= 1"),
        ("--hf {here}", "--hf {here}: is not a directory with a config.json"),
        ("--plot {here}/a.txt", "--plot {here}/a.txt: must end in .png or .svg"),
        ("--output {here}", "--output {here}: is a directory; give a file"),
    ],
)
def test_bad_input_is_refused_in_one_line(calibrate, directory, flags, capsys, words, message):
    names = {"here": directory, "data": flags[3]}
    given = [
        *flags,
        *CALIBRATE.split(),
        "--output",
        str(directory / "refused.json"),
        *words.format(**names).split(),
    ]
    assert exit_status(calibrate, given) == 2
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert line.startswith(f"error: {message.format(**names)}")


def test_a_model_with_a_pattern_of_its_own_is_not_calibrated(calibrate, ask, directory, flags, capsys):
    checkpoint, sparse = directory / "sparse-checkpoint", directory / "sparse"
    convert("hf-to-megatron", directory / "model", checkpoint, "--s2-attention", "--s2-block-size", "16")
    convert("megatron-to-hf", checkpoint, sparse)
    given = ["--hf", str(sparse), *flags[2:]]
    assert exit_status(calibrate, [*given, *CALIBRATE.split(), "--output", str(directory / "no.json")]) == 2
    assert "was trained with a pattern of its own; calibrate a dense model" in capsys.readouterr().err
    assert exit_status(ask, [*given, "--lengths", "192", "--depths", "0.5"]) == 0
    assert "\nthe model's" in capsys.readouterr().out


def test_needles_need_a_tokenizer(directory):
    make_model(directory / "bare", "llama3.1", vocab_size=270, num_hidden_layers=1)
    source = load_source(directory / "bare", None)
    with pytest.raises(ValueError, match=r"bare: has no tokenizer, which needles are made with"):
        source.required_tokenizer()
