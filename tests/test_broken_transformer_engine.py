"""Where a part of Transformer Engine is missing, commands work: Megatron does not find the rest of it."""

import os
import subprocess
import sys

import pytest
from megatron_run import ROOT, launch
from waiting import PATIENCE

from megatron_s2.data.documents import Corpus
from megatron_s2.data.tokenizer import train_tokenizer


@pytest.fixture
def broken(tmp_path, monkeypatch):
    """A package in every process started that raises as its loader does; Megatron expects ImportError."""
    (tmp_path / "path" / "transformer_engine").mkdir(parents=True)
    package = tmp_path / "path" / "transformer_engine" / "__init__.py"
    package.write_text("raise AssertionError('of another version')")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path / 'path'}:{os.environ.get('PYTHONPATH', '')}")


@pytest.mark.exhaustive
def test_a_run_trains_without_it(broken, tmp_path):
    run = launch(tmp_path / "run", "--train-iters 1 --eval-iters 0", from_nothing=True)
    assert run.status == 0, run.output
    assert sorted(run.losses) == [1]


@pytest.mark.exhaustive
def test_a_data_set_is_written_without_it(broken, tmp_path):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "one.txt").write_text("the cat sat on the mat and the dog sat on the cat\n" * 50)
    train_tokenizer(Corpus(str(tmp_path / "text")), 270, str(tmp_path / "tokenizer"))
    words = f"--input {tmp_path / 'text'} --output-prefix {tmp_path / 'data'} --workers 2 "
    words += f"--tokenizer-type HuggingFaceTokenizer --tokenizer-model {tmp_path / 'tokenizer'}"
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts" / "preprocess_data.py"), *words.split()],
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "data_text_document.idx").exists()
