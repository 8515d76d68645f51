"""Data and tokenizers that a run would fail on, hang on or train wrongly on are refused by their flag."""

from argparse import Namespace

import numpy as np
import pytest
from parsed_arguments import arguments

from megatron_s2.training.data_checks import check_splits, check_vocabulary, vocabulary_of

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


@pytest.mark.parametrize("split", ["0,0,0", "1,2,3,4", "most,some", "1,-1,0", "99,nan,1", "inf,1", "1e2,1"])
def test_a_split_is_up_to_three_shares(documents, split):
    with pytest.raises(ValueError, match=f"^--split {split}: must be the shares"):
        check_splits(arguments(data_path=[documents[400]], split=split))


def test_a_blend_file_needs_a_split(documents, tmp_path):
    lines = tmp_path / "blend.txt"
    lines.write_text(documents[400])
    with pytest.raises(ValueError, match=r"^--split: must be given with --data-args-path"):
        check_splits(arguments(data_args_path=str(lines)))


def test_a_file_that_is_no_index_is_refused(tmp_path):
    for suffix in (".bin", ".idx"):
        (tmp_path / f"text{suffix}").touch()
    with pytest.raises(ValueError, match=r"^--data-path .*text\.idx: is not an index"):
        check_splits(arguments(data_path=[str(tmp_path / "text")], split="1"))


# Token ids.


def tokenizer(number: int, ids: tuple[int, ...] = (), eod: int | None = 0):
    """What Megatron builds: a number of tokens, and those of a Hugging Face vocabulary with further ids."""
    hugging_face = Namespace(get_vocab=lambda: dict(enumerate(ids)))
    return Namespace(vocab_size=number, eod=eod, _tokenizer=Namespace(tokenizer=hugging_face))


def vocabulary_arguments(**given) -> Namespace:
    sizes = {"make_vocab_size_divisible_by": 128, "tensor_model_parallel_size": 1, "padded_vocab_size": 384}
    return arguments(**{"tokenizer_type": "HuggingFaceTokenizer", "tokenizer_model": "tok", **sizes, **given})


@pytest.mark.parametrize(
    ("given", "built", "size", "source"),
    [
        ({}, tokenizer(300), 300, "--tokenizer-model tok"),
        ({}, tokenizer(300, (320,)), 321, "--tokenizer-model tok"),
        ({}, tokenizer(300, (390,)), 384, "--padded-vocab-size 384"),
        ({"vocab_size": 300}, tokenizer(305), 300, "--vocab-size 300"),
        ({"vocab_size": 300}, tokenizer(299), 299, "--tokenizer-model tok"),
        (
            {"tokenizer_type": "NullTokenizer", "tokenizer_model": None, "vocab_size": 255},
            tokenizer(255, eod=254),
            256,
            "--tokenizer-type NullTokenizer",
        ),
        ({}, tokenizer(300, eod=None), 300, "--tokenizer-model tok"),
    ],
)
def test_a_model_knows_the_tokens_that_tokenizer_vocabulary_and_embedding_have(given, built, size, source):
    found = vocabulary_of(vocabulary_arguments(**given), built)
    assert (found.size, found.source) == (size, source)


def test_data_of_another_tokenizer_are_refused_by_their_flag(documents):
    """Its ids are 1, 2 and 3."""
    prefix = documents[1]
    known, unknown = tokenizer(4), tokenizer(3)
    for flag in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        args = vocabulary_arguments(**{flag: [prefix]})
        (line,) = check_vocabulary(args, known)
        assert line.startswith(f"{prefix}: no record of the largest token id; looked at 3 of 3 tokens")
        with pytest.raises(ValueError) as refused:
            check_vocabulary(args, unknown)
        assert str(refused.value) == (
            f"--{flag.replace('_', '-')} {prefix}: has token id 3; the model has 3 tokens (--tokenizer-model "
            "tok); give data that was tokenized with the model's tokenizer"
        )


def test_a_tokenizer_with_more_tokens_than_the_model_is_noted_with_what_to_do():
    given = {"vocab_size": 300, "load": "converted"}
    (line,) = check_vocabulary(vocabulary_arguments(**given), tokenizer(305))
    assert line == (
        "--tokenizer-model tok has token ids up to 304, the model has 300 tokens (--vocab-size 300); data "
        "with ids beyond are refused; give data that was tokenized with the model's tokenizer; to train the "
        "tokens beyond, resize the model's embedding (resize_token_embeddings in transformers) before it is "
        "converted"
    )
    (line,) = check_vocabulary(vocabulary_arguments(vocab_size=300), tokenizer(305))
    assert line.endswith("; for all tokens of the tokenizer, remove --vocab-size")
    (line,) = check_vocabulary(vocabulary_arguments(), tokenizer(300, (390,)))
    assert line.endswith("; for a new model, --padded-vocab-size 512 has a row for each id of the tokenizer")
    assert check_vocabulary(vocabulary_arguments(vocab_size=300), tokenizer(300)) == []
    none = {"tokenizer_type": "NullTokenizer", "vocab_size": 384}
    assert check_vocabulary(vocabulary_arguments(**none), tokenizer(384, eod=383)) == []
