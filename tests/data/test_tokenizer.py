"""A trained tokenizer is lossless and reproducible, and Megatron loads it."""

import json
import multiprocessing
import os
import signal
from pathlib import Path

import pytest
from script_main import exit_status
from train_tokenizer import main
from waiting import PATIENCE

from megatron_s2.data.command import run_command
from megatron_s2.data.documents import Corpus
from megatron_s2.data.preprocess import load_tokenizer
from megatron_s2.data.tokenizer import train_tokenizer
from megatron_s2.errors import InputError


@pytest.fixture(scope="module")
def tokenizer(tokenizer_dir):
    return load_tokenizer("HuggingFaceTokenizer", tokenizer_dir)


def test_megatron_loads_the_special_tokens(tokenizer):
    assert tokenizer.vocab_size == 400
    assert (tokenizer.eod, tokenizer.pad) == (0, 1)


@pytest.mark.parametrize(
    "text",
    [
        "plain",
        " leading and  inner   spaces ",
        "\r\n\ttabs\n\n\n    x",
        "Größe 漢字 🙂\u200d\ufeff",
        "''' \\ \x01\x7f",
    ],
)
def test_every_text_decodes_to_itself(tokenizer, text):
    ids = tokenizer.tokenize(text)
    assert tokenizer.detokenize(ids) == text
    assert not {tokenizer.eod, tokenizer.pad} & set(ids)


def test_text_never_encodes_to_special_tokens(tokenizer):
    text = "before<|endoftext|>after<|padding|>"
    assert tokenizer.eod not in tokenizer.tokenize(text)
    assert tokenizer.detokenize(tokenizer.tokenize(text)) == text


def test_training_is_reproducible(tokenizer_dir, corpus, tmp_path):
    train_tokenizer(corpus, 400, str(tmp_path))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / name).read_bytes() == Path(tokenizer_dir, name).read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["tokenizer.json", "tokenizer_config.json"]


def test_a_sample_is_spread_over_the_corpus(tmp_path):
    lines = [json.dumps({"text": f"document {number:03} " + "x" * 87}) for number in range(200)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    corpus = Corpus(str(tmp_path / "a.jsonl"))
    trained = train_tokenizer(corpus, 300, str(tmp_path / "tok"), max_bytes=corpus.size() // 4)
    assert trained.tally.documents == 50
    assert trained.tally.bytes == 50 * 100


def test_a_small_corpus_results_in_a_smaller_vocabulary(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"text": "abab"}')
    arguments = [
        "--input",
        str(tmp_path / "a.jsonl"),
        "--vocab-size",
        "5000",
        "--output",
        str(tmp_path / "tok"),
    ]
    assert run_command(main, arguments) == 0
    assert capsys.readouterr().out.startswith(f"{tmp_path / 'tok'}: 260 tokens learnt from 1 documents")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--vocab-size": "257"}, "--vocab-size 257: must be at least 258 (256 bytes and 2 special tokens)"),
        ({"--vocab-size": "many"}, "argument --vocab-size: invalid int value: 'many'"),
        ({"--max-bytes": "0"}, "--max-bytes 0: must be at least 1"),
        ({"--input": "nowhere"}, "--input nowhere: does not exist; give a .jsonl file or a directory"),
        ({"--input": "empty"}, "--input empty: no document with text in it (skipped 1 empty, "),
        ({"--input": "broken.jsonl"}, "broken.jsonl:1: not a line of JSON: "),
        (
            {"--output": "there"},
            "--output there: there/tokenizer.json exists already; add --overwrite to replace it",
        ),
        ({"--output": "fine.jsonl/tok"}, "--output fine.jsonl/tok: "),
        ({"--output": "fine.jsonl"}, "--output fine.jsonl: "),
        ({"--output": "/proc/tok"}, "--output /proc/tok: /proc is not writable ("),
        (
            {"--output": "taken", "--overwrite": None},
            "--output taken: taken/tokenizer.json is a directory; give another name or remove it",
        ),
        ({"--jsn-key": "x"}, "unrecognized arguments: --jsn-key x"),
    ],
    ids=lambda value: next(iter(value.items()))[1] if isinstance(value, dict) else "",
)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capfd, changes, message):
    monkeypatch.chdir(tmp_path)
    Path("fine.jsonl").write_text('{"text": "fine"}')
    Path("broken.jsonl").write_text('{"text"')
    Path("empty").mkdir()
    Path("empty/a").write_text("")
    Path("there").mkdir()
    Path("there/tokenizer.json").write_text("{}")
    Path("taken/tokenizer.json").mkdir(parents=True)
    flags = {"--input": "fine.jsonl", "--vocab-size": "300", "--output": "tok"} | changes
    status = exit_status(main, [word for pair in flags.items() for word in pair if word])
    *progress, last = capfd.readouterr().err.splitlines()
    assert status == 2
    assert last.startswith(f"error: {message}")
    assert all(line.startswith("training tokenizer: ") for line in progress)
    assert not Path("tok").exists()
    assert Path("there/tokenizer.json").read_text() == "{}"


def test_overwrite_replaces_a_tokenizer(tmp_path, corpus):
    train_tokenizer(corpus, 300, str(tmp_path))
    with pytest.raises(InputError, match="exists already"):
        train_tokenizer(corpus, 310, str(tmp_path))
    train_tokenizer(corpus, 310, str(tmp_path), overwrite=True)
    assert len(json.loads((tmp_path / "tokenizer.json").read_text())["model"]["vocab"]) == 310


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_training_leaves_nothing(tmp_path, corpus, number):
    receiver, sender = multiprocessing.Pipe(duplex=False)

    def command():
        Corpus.read = lambda self, tally: endless()
        words = ["--input", corpus.path, "--vocab-size", "300", "--output", str(tmp_path / "tok")]
        run_command(main, words)

    def endless():
        sender.send(None)
        while True:
            yield "x = 1\n" * 8_000

    process = multiprocessing.get_context("fork").Process(target=command)
    process.start()
    receiver.recv()
    os.kill(process.pid, number)
    process.join(PATIENCE)
    assert process.exitcode == -number
    assert os.listdir(tmp_path) == []
