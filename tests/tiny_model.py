"""A tiny dense model with a tokenizer, and text in its tokens."""

from pathlib import Path

from hf_models import make_model

from megatron_s2.data.documents import Corpus
from megatron_s2.data.preprocess import preprocess_data
from megatron_s2.data.tokenizer import train_tokenizer

DATA = "data_text_document"


def make_tiny_model(directory: Path) -> None:
    """Writes `model`, with two layers of two KV heads, and the dataset `DATA` into a directory."""
    model, text = str(directory / "model"), directory / "text"
    make_model(directory / "model", "llama3.1", vocab_size=270, num_hidden_layers=2)
    text.mkdir()
    (text / "a.txt").write_text("\n".join(f"line {n} of some text" for n in range(400)))
    train_tokenizer(Corpus(str(text)), 270, model)
    preprocess_data(Corpus(str(text)), str(directory / "data"), "HuggingFaceTokenizer", model)
