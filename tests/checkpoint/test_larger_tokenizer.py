"""A tokenizer with more tokens than its model is noted by the conversion; no trained row is lost unasked."""

from pathlib import Path

import pytest
import torch
from hf_models import assert_refused, convert, edit_config, make_model, run_conversion, weights
from tokenizers import Tokenizer, models

from megatron_s2.checkpoint.torch_dist import CheckpointReader

VOCAB_SIZE, TOKENS, ROWS = 250, 255, 256


def with_tokenizer(directory: Path, tokens: int, vocab_size: int = VOCAB_SIZE) -> Path:
    source = make_model(directory / "hf", "llama2", num_hidden_layers=2, vocab_size=vocab_size)
    vocabulary = {f"token{number}": number for number in range(tokens)}
    Tokenizer(models.WordLevel(vocabulary, "token0")).save(str(source / "tokenizer.json"))
    return source


@pytest.fixture
def trained(tmp_path) -> Path:
    """A checkpoint with the rows of Megatron's padding, as a training saves it, of a model of 250 tokens."""
    convert("hf-to-megatron", with_tokenizer(tmp_path, TOKENS, ROWS), tmp_path / "megatron")
    edit_config(tmp_path / "megatron" / "huggingface", vocab_size=VOCAB_SIZE)
    common = CheckpointReader(tmp_path / "megatron").common
    common["args"].vocab_size = VOCAB_SIZE
    torch.save(common, tmp_path / "megatron" / "release" / "common.pt")
    return tmp_path / "megatron"


def test_a_larger_tokenizer_is_noted_by_both_conversions(tmp_path):
    source = with_tokenizer(tmp_path, TOKENS)
    for direction, given, output in (
        ("hf-to-megatron", source, tmp_path / "megatron"),
        ("megatron-to-hf", tmp_path / "megatron", tmp_path / "back"),  # not trained: no rows of padding
    ):
        status, printed, errors = run_conversion(direction, given, output)
        assert status == 0 and "note" not in printed
        tokenizer = source if given == source else given / "huggingface"
        assert errors == (
            f"note: the tokenizer in {tokenizer} has token ids up to 254, the model has 250 tokens; to "
            "train the tokens beyond, resize the model's embedding (resize_token_embeddings in transformers) "
            "before it is converted\n"
        )


def test_the_export_asks_what_to_do_about_rows_that_may_be_trained(trained):
    message = (
        f"--vocab-size: must be given: the tokenizer in {trained}/huggingface has token ids up to 254, the "
        "model 250 tokens; 255 writes a row for each, 250 leaves out rows from 250 on"
    )
    assert_refused("megatron-to-hf", trained, message)
    other = "--vocab-size 256: the checkpoint, or the model that it began with, has 250; leave it out"
    assert_refused("megatron-to-hf", trained, other, "--vocab-size", "256")


@pytest.mark.parametrize("rows", [VOCAB_SIZE, TOKENS])
def test_the_export_writes_as_many_rows_as_asked(trained, tmp_path, rows):
    output = tmp_path / "back"
    status, _, errors = run_conversion("megatron-to-hf", trained, output, "--vocab-size", str(rows))
    assert (status, errors.startswith("note: the tokenizer in ")) == (0, rows == VOCAB_SIZE), errors
    before, after = weights(tmp_path / "hf"), weights(output)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        assert torch.equal(after[name], before[name][:rows])


def test_a_tokenizer_within_the_model_needs_no_word(tmp_path):
    source = with_tokenizer(tmp_path, VOCAB_SIZE)
    assert run_conversion("hf-to-megatron", source, tmp_path / "megatron")[2] == ""
    assert run_conversion("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")[2] == ""
