"""A run that would break or hang later is refused first, by the flag that names the cause."""

import json
from argparse import Namespace

import numpy as np
import pytest

from megatron_s2.training.checks import check_model, check_paths, check_splits


def arguments(**given) -> Namespace:
    names = (
        "data_path train_data_path valid_data_path test_data_path data_args_path per_split_data_args_path "
        "split load save pretrained_checkpoint tokenizer_model vocab_file merge_file use_checkpoint_args"
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


def test_a_data_flag_without_a_value_is_refused():
    with pytest.raises(ValueError, match=r"^--data-path: must be followed by a prefix"):
        check_paths(arguments(data_path=[]))


# Splits.


@pytest.fixture(scope="module")
def documents(tmp_path_factory):
    """Prefixes of data with 0, 1 and 400 documents of three tokens."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    directory = tmp_path_factory.mktemp("documents")

    def write(number: int) -> str:
        prefix = str(directory / f"of-{number}")
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
        for _ in range(number):
            builder.add_document([1, 2, 3], [3])
        builder.finalize(f"{prefix}.idx")
        return prefix

    return {number: write(number) for number in (0, 1, 400)}


@pytest.mark.parametrize(
    ("number", "split", "empty"),
    [(400, "969,30,1", "test"), (400, None, "test"), (1, "90,10", "validation"), (1, "1,99,0", "training")],
)
def test_a_split_without_documents_is_refused_with_what_to_do(documents, number, split, empty):
    prefix = documents[number]
    shown = split or "969, 30, 1"
    with pytest.raises(ValueError) as refused:
        check_splits(arguments(data_path=[prefix], split=split))
    assert str(refused.value).startswith(
        f"--split {shown}: leaves the {empty} split of {prefix} without documents (of its {number})"
    )
    assert "--split 100,0,0 --eval-iters 0 trains on all" in str(refused.value)


def test_each_part_of_a_blend_needs_documents_in_each_split(documents):
    with pytest.raises(ValueError, match=f"validation split of {documents[1]} "):
        check_splits(arguments(data_path=["1", documents[400], "1", documents[1]], split="90,10,0"))


def test_splits_with_documents_are_accepted(documents):
    check_splits(arguments(data_path=[documents[400]], split="969,30,2"))
    check_splits(arguments(data_path=[documents[1]], split="100,0,0"))
    check_splits(arguments(train_data_path=[documents[1]], valid_data_path=[documents[1]]))
    check_splits(arguments(data_path=["s3://bucket/text"], split="99,1,0"))


def test_data_without_documents_is_refused_by_its_own_flag(documents):
    with pytest.raises(ValueError, match=r"^--valid-data-path .*: has no documents"):
        check_splits(arguments(train_data_path=[documents[1]], valid_data_path=[documents[0]]))


@pytest.mark.parametrize("split", ["0,0,0", "1,2,3,4", "most,some", "1,-1,0"])
def test_a_split_is_up_to_three_shares(documents, split):
    with pytest.raises(ValueError, match=f"^--split {split}: must be the shares"):
        check_splits(arguments(data_path=[documents[400]], split=split))


def test_a_blend_file_needs_a_split(documents, tmp_path):
    lines = tmp_path / "blend.txt"
    lines.write_text(documents[400])
    with pytest.raises(ValueError, match=r"^--split: must be given with --data-args-path"):
        check_splits(arguments(data_args_path=str(lines)))


def test_a_file_that_is_no_index_is_refused(prefix):
    with pytest.raises(ValueError, match=r"^--data-path .*text\.idx is not an index"):
        check_splits(arguments(data_path=[prefix], split="1"))


# The model.


def model(**given):
    known = {"num_attention_heads": 4, "group_query_attention": True, "num_query_groups": 2}
    return Namespace(**{**known, "config_logger_dir": "", **given})


def test_the_query_groups_divide_the_heads():
    check_model(model())
    check_model(model(group_query_attention=False, num_query_groups=3))
    for groups in (0, 3, 8):
        message = f"^--num-query-groups {groups}: must divide --num-attention-heads 4"
        with pytest.raises(ValueError, match=message):
            check_model(model(num_query_groups=groups))


def test_the_config_logger_is_refused():
    with pytest.raises(
        ValueError, match=r"^--config-logger-dir /tmp/c: Megatron cannot write its configuration"
    ):
        check_model(model(config_logger_dir="/tmp/c"))
