"""A small corpus and a tokenizer trained on it."""

from pathlib import Path

import pytest

from megatron_s2.data.documents import Corpus
from megatron_s2.data.tokenizer import train_tokenizer

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.fixture(scope="session")
def scripts():
    """The directory of the scripts."""
    return SCRIPTS


@pytest.fixture(scope="session")
def texts():
    return [
        f"def f{i}(x):\n    return x + {i * i}  # Größe 🙂 {'ab' * (i % 7)}\n" * (i % 5 + 1)
        for i in range(300)
    ]


@pytest.fixture(scope="session")
def corpus(tmp_path_factory, texts):
    directory = tmp_path_factory.mktemp("corpus")
    for number, text in enumerate(texts):
        (directory / f"{number:04}.py").write_text(text, encoding="utf-8")
    (directory / "empty.py").write_text("")
    (directory / "binary.py").write_bytes(b"\xff\xfe")
    return Corpus(str(directory))


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory, corpus):
    directory = str(tmp_path_factory.mktemp("tokenizer") / "bpe")
    train_tokenizer(corpus, 400, directory)
    return directory
