"""A tokenizer with more tokens than its model is noted by the conversion; no trained row is lost unasked."""

from pathlib import Path

import pytest
import torch
from hf_models import assert_refused, convert, make_model, run_conversion, weights
from tokenizers import Tokenizer, models

from megatron_s2.checkpoint.torch_dist import CheckpointReader

VOCAB_SIZE, TOKENS = 250, 255  # Megatron pads the embedding to 256 rows


def with_tokenizer(directory: Path, tokens: int) -> Path:
    source = make_model(directory / "hf", "llama2", num_hidden_layers=2, vocab_size=VOCAB_SIZE)
    vocabulary = {f"token{number}": number for number in range(tokens)}
    Tokenizer(models.WordLevel(vocabulary, "token0")).save(str(source / "tokenizer.json"))
    return source


@pytest.fixture
def converted(tmp_path) -> Path:
    source = with_tokenizer(tmp_path, TOKENS)
    status, printed, errors = run_conversion("hf-to-megatron", source, tmp_path / "megatron")
    assert status == 0 and "note" not in printed
    assert errors == (
        f"note: the tokenizer in {source} has token ids up to 254, the model has 250 tokens; to train the "
        "tokens beyond, resize the model's embedding (resize_token_embeddings in transformers) before it is "
        "converted\n"
    )
    return tmp_path / "megatron"


def test_the_export_asks_what_to_do_about_rows_that_may_be_trained(converted, tmp_path):
    message = (
        f"--vocab-size: must be given: the tokenizer in {converted}/huggingface has token ids up to 254, the "
        "model 250 tokens; 255 writes a row for each, 250 leaves out rows from 250 on"
    )
    assert_refused("megatron-to-hf", converted, message)
    other = "--vocab-size 256: the checkpoint, or the model that it began with, has 250; leave it out"
    assert_refused("megatron-to-hf", converted, other, "--vocab-size", "256")


@pytest.mark.parametrize("rows", [VOCAB_SIZE, TOKENS])
def test_the_export_writes_as_many_rows_as_asked(converted, tmp_path, rows):
    output = tmp_path / "back"
    status, _, errors = run_conversion("megatron-to-hf", converted, output, "--vocab-size", str(rows))
    assert (status, errors.startswith("note: the tokenizer in ")) == (0, rows == VOCAB_SIZE), errors
    embedding = weights(output)["model.embed_tokens.weight"]
    assert embedding.shape == (rows, 64)
    stored = CheckpointReader(converted).read("embedding.word_embeddings.weight", (0, 0), (rows, 64))
    assert torch.equal(embedding, stored)


def test_a_tokenizer_within_the_model_needs_no_word(tmp_path):
    source = with_tokenizer(tmp_path, VOCAB_SIZE)
    assert run_conversion("hf-to-megatron", source, tmp_path / "megatron")[2] == ""
    assert convert("megatron-to-hf", tmp_path / "megatron", tmp_path / "back")
