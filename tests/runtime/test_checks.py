"""A run whose files are not there is refused, by the flag that names them."""

import json
from argparse import Namespace

import pytest

from megatron_s2.runtime.checks import check_paths


def arguments(**given) -> Namespace:
    names = (
        "data_path train_data_path valid_data_path test_data_path data_args_path per_split_data_args_path "
        "load save pretrained_checkpoint tokenizer_model vocab_file merge_file use_checkpoint_args"
    )
    return Namespace(**{**dict.fromkeys(names.split()), "tokenizer_type": "NullTokenizer", **given})


@pytest.fixture
def prefix(tmp_path) -> str:
    for suffix in (".bin", ".idx"):
        (tmp_path / f"text{suffix}").touch()
    return str(tmp_path / "text")


def test_what_exists_is_accepted(prefix, tmp_path):
    lines = tmp_path / "blend.txt"
    lines.write_text(f"0.3 {prefix} 0.7 {prefix}\n")
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": [prefix], "valid": f"1 {prefix}", "test": None}))
    for given in (
        {},
        {"data_path": [prefix]},
        {"data_path": ["30", prefix, "70", prefix]},
        {"data_path": [prefix, prefix]},
        {"train_data_path": [prefix], "valid_data_path": [prefix]},
        {"data_args_path": str(lines)},
        {"per_split_data_args_path": str(splits)},
        {"load": str(tmp_path)},
        {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": str(tmp_path)},
    ):
        check_paths(arguments(**given))


def test_the_first_launch_of_a_job_that_resumes_from_its_own_saves_is_accepted(tmp_path):
    check_paths(arguments(load=str(tmp_path / "run"), save=f"{tmp_path}/other/../run/"))


def test_a_name_on_the_hub_and_remote_data_are_not_looked_for_on_disk():
    check_paths(arguments(tokenizer_type="HuggingFaceTokenizer", tokenizer_model="Qwen/Qwen3-0.6B"))
    check_paths(arguments(data_path=["s3://bucket/text"]))


@pytest.mark.parametrize(
    "given",
    [
        {"data_path": ["/nowhere/text"]},
        {"data_path": ["0.5", "/nowhere/text", "0.5", "/nowhere/more"]},
        {"train_data_path": ["/nowhere/text"]},
        {"valid_data_path": ["/nowhere/text"]},
        {"test_data_path": ["/nowhere/text"]},
        {"data_args_path": "/nowhere/blend.txt"},
        {"per_split_data_args_path": "/nowhere/splits.json"},
        {"load": "/nowhere/run"},
        {"load": "/nowhere/run", "save": "/nowhere/else"},
        {"pretrained_checkpoint": "/nowhere/run"},
        {"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "/nowhere/tokenizer"},
        {"tokenizer_type": "SentencePieceTokenizer", "tokenizer_model": "tokenizer.model"},
        {"vocab_file": "/nowhere/vocab.json"},
        {"merge_file": "/nowhere/merges.txt"},
    ],
    ids=lambda given: next(iter(given)),
)
def test_what_does_not_exist_is_refused_by_its_flag(given):
    flag = "--" + next(name for name in given if name != "tokenizer_type").replace("_", "-")
    with pytest.raises(ValueError, match=f"^{flag} .*: there is no "):
        check_paths(arguments(**given))


@pytest.mark.parametrize(
    ("tokenizer", "flag"),
    [
        (None, "--vocab-file"),
        ("GPT2BPETokenizer", "--vocab-file"),
        ("HuggingFaceTokenizer", "--tokenizer-model"),
    ],
)
def test_a_tokenizer_needs_its_files_named(tokenizer, flag):
    with pytest.raises(ValueError, match=f"^{flag}: must be given"):
        check_paths(arguments(tokenizer_type=tokenizer))


def test_a_checkpoint_may_name_the_tokenizer():
    check_paths(arguments(tokenizer_type=None, use_checkpoint_args=True))


def test_both_files_of_a_dataset_are_needed(prefix, tmp_path):
    (tmp_path / "text.idx").unlink()
    with pytest.raises(ValueError, match=r"text\.idx"):
        check_paths(arguments(data_path=[prefix]))


def test_a_blend_file_is_read_to_its_last_entry(prefix, tmp_path):
    lines = tmp_path / "blend.txt"
    lines.write_text(f"0.3 {prefix} 0.7 {prefix}-missing")
    with pytest.raises(ValueError, match=r"--data-args-path .*missing"):
        check_paths(arguments(data_args_path=str(lines)))
    splits = tmp_path / "splits.json"
    splits.write_text(json.dumps({"train": [prefix], "valid": [prefix]}))
    with pytest.raises(ValueError, match='must have the keys "train", "valid" and "test"'):
        check_paths(arguments(per_split_data_args_path=str(splits)))
