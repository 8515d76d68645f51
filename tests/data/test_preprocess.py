"""The indexed dataset decodes to the text, for any number of workers; no unfinished files are left."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from preprocess_data import main
from script_main import exit_status
from waiting import PATIENCE, wait_until

from megatron_s2.data.command import run_command
from megatron_s2.data.documents import Corpus
from megatron_s2.data.preprocess import load_tokenizer, preprocess_data
from megatron_s2.errors import InputError

pytestmark = pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")


def preprocess(corpus, tokenizer_dir, prefix, **options):
    return preprocess_data(corpus, str(prefix), "HuggingFaceTokenizer", tokenizer_dir, **options)


def arguments(corpus, tokenizer_dir, prefix, *more):
    tokenizer = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", tokenizer_dir]
    return ["--input", corpus.path, "--output-prefix", str(prefix), *tokenizer, *more]


def test_the_dataset_decodes_to_the_documents(corpus, texts, tokenizer_dir, tmp_path):
    made = preprocess(corpus, tokenizer_dir, tmp_path / "py")
    assert made.prefix == str(tmp_path / "py_text_document")
    assert sorted(os.listdir(tmp_path)) == ["py_text_document.bin", "py_text_document.idx"]
    assert (made.tally.documents, made.tally.empty, made.tally.undecodable) == (len(texts), 1, 1)

    dataset = IndexedDataset(made.prefix)
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_dir)
    assert [tokenizer.detokenize(tokens.tolist()) for tokens in dataset] == texts
    assert dataset.document_indices.tolist() == list(range(len(texts) + 1))
    assert sum(len(tokens) for tokens in dataset) == made.tokens


def test_append_eod_adds_one_token_to_each_document(corpus, tokenizer_dir, tmp_path):
    plain = IndexedDataset(preprocess(corpus, tokenizer_dir, tmp_path / "plain").prefix)
    ended = IndexedDataset(preprocess(corpus, tokenizer_dir, tmp_path / "ended", append_eod=True).prefix)
    assert [tokens.tolist() for tokens in ended] == [[*tokens, 0] for tokens in plain]


@pytest.mark.parametrize("workers", [2, 5])
def test_any_number_of_workers_writes_the_same_bytes(corpus, tokenizer_dir, tmp_path, monkeypatch, workers):
    monkeypatch.setattr("megatron_s2.data.preprocess._BATCH_BYTES", 1000)
    preprocess(corpus, tokenizer_dir, tmp_path / "one", append_eod=True, workers=1)
    preprocess(corpus, tokenizer_dir, tmp_path / "many", append_eod=True, workers=workers)
    for suffix in ("bin", "idx"):
        one, many = (tmp_path / f"{name}_text_document.{suffix}" for name in ("one", "many"))
        assert one.read_bytes() == many.read_bytes()


def test_the_json_key_names_the_dataset(tokenizer_dir, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps({"body": "some text"}))
    corpus = Corpus(str(tmp_path / "a.jsonl"), json_key="body")
    assert preprocess(corpus, tokenizer_dir, tmp_path / "a").prefix == str(tmp_path / "a_body_document")


@pytest.mark.parametrize(("vocabulary", "dtype"), [(65_499, "uint16"), (65_500, "int32")])
def test_small_vocabularies_are_stored_in_two_bytes(corpus, tmp_path, monkeypatch, vocabulary, dtype):
    class Characters:
        vocab_size, eod = vocabulary, vocabulary - 1

        def tokenize(self, text):
            return [ord(character) % vocabulary for character in text]

    monkeypatch.setattr("megatron_s2.data.preprocess.load_tokenizer", lambda *model: Characters())
    made = preprocess(corpus, "unused", tmp_path / "py", append_eod=True)
    assert made.dtype == dtype
    dataset = IndexedDataset(made.prefix)  # kept alive: its arrays are views of files that it closes
    assert dataset[0].dtype == numpy.dtype(dtype)
    assert dataset[0][-1] == vocabulary - 1


def test_megatron_builds_training_samples(corpus, tokenizer_dir, tmp_path):
    from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    made = preprocess(corpus, tokenizer_dir, tmp_path / "py", append_eod=True)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        blend=([made.prefix], None),
        split="90,10,0",
        tokenizer=load_tokenizer("HuggingFaceTokenizer", tokenizer_dir),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )
    train, valid, _ = BlendedMegatronDatasetBuilder(GPTDataset, [50, 5, 0], lambda: True, config).build()
    assert len(train) >= 50
    assert len(valid) >= 5
    sample = train[0]
    assert sample["tokens"].shape == (64,)
    assert sample["tokens"][1:].equal(sample["labels"][:-1])
    assert any((train[index]["labels"] == 0).any() for index in range(20)), "no document ends within a sample"
    assert all(train[index]["loss_mask"].all() for index in range(20)), (
        "the loss of the end of a document is masked"
    )


def test_overwrite_replaces_a_dataset_and_its_index_cache(corpus, tokenizer_dir, tmp_path):
    made = preprocess(corpus, tokenizer_dir, tmp_path / "py")
    before = Path(f"{made.prefix}.bin").read_bytes()
    stale = Path(made.prefix, "cache", "GPTDataset_indices", "hash-train-sample_index.npy")
    stale.parent.mkdir(parents=True)
    stale.touch()
    with pytest.raises(InputError, match="exists already; add --overwrite"):
        preprocess(corpus, tokenizer_dir, tmp_path / "py", append_eod=True)
    assert Path(f"{made.prefix}.bin").read_bytes() == before
    assert stale.exists()
    preprocess(corpus, tokenizer_dir, tmp_path / "py", append_eod=True, overwrite=True)
    assert len(Path(f"{made.prefix}.bin").read_bytes()) == len(before) + 2 * made.tally.documents
    assert not stale.exists()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--input", "nowhere"], "--input nowhere: does not exist"),
        (["--input", "empty"], "--input empty: no document with text in it (skipped 1 empty, "),
        (["--input", "broken.jsonl"], "broken.jsonl:2: not a line of JSON: "),
        (["--input", "broken.jsonl", "--workers", "2"], "broken.jsonl:2: not a line of JSON: "),
        (["--json-key", "body"], "fine.jsonl:1: has no key 'body' (--json-key); it has ['text']"),
        (
            ["--tokenizer-model", "nowhere"],
            "--tokenizer-model nowhere: does not exist; scripts/train_tokenizer.py ",
        ),
        (
            ["--tokenizer-model", "empty"],
            "--tokenizer-model empty: cannot be loaded as HuggingFaceTokenizer: ",
        ),
        (["--tokenizer-type", "Unknown"], "argument --tokenizer-type: invalid choice: 'Unknown'"),
        (["--workers", "0"], "--workers 0: must be at least 1"),
        (["--output-prefix", "out/"], "--output-prefix 'out/': must end in a file name, as in data/mytext"),
        (["--output-prefix", "fine.jsonl/x"], "--output-prefix fine.jsonl: "),
        (["--output-prefix", "there"], "--output-prefix there: there_text_document.idx exists already"),
    ],
    ids=lambda value: "=".join(value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_line_and_status_2(tmp_path, monkeypatch, capfd, tokenizer_dir, changes, message):
    monkeypatch.chdir(tmp_path)
    Path("fine.jsonl").write_text('{"text": "fine"}')
    Path("broken.jsonl").write_text('{"text": "fine"}\n{"text"')
    Path("empty").mkdir()
    Path("empty/a").write_text("")
    Path("there_text_document.idx").touch()
    before = sorted(os.listdir())
    words = [*arguments(Corpus("fine.jsonl"), tokenizer_dir, "out"), *changes]
    status = exit_status(main, words)
    *progress, last = capfd.readouterr().err.splitlines()
    assert status == 2
    assert last.startswith(f"error: {message}")
    assert all(line.startswith("tokenizing: ") for line in progress)
    assert sorted(os.listdir()) == before


def test_append_eod_needs_an_end_of_document_token(corpus, tokenizer_dir, tmp_path):
    for name in ("tokenizer.json", "tokenizer_config.json"):
        content = json.loads(Path(tokenizer_dir, name).read_text())
        content.pop("eos_token", None)
        (tmp_path / name).write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"--append-eod: .* has no end-of-document"):
        preprocess(corpus, str(tmp_path), tmp_path / "py", append_eod=True)


@pytest.fixture
def start(tmp_path, corpus, tokenizer_dir):
    """Function that starts the command in a process on endless input and waits until it writes."""
    started = []

    def begin(workers):
        def command():
            os.setsid()
            sys.stderr = open(tmp_path / "stderr", "w")  # noqa: SIM115 (closed with the process)
            Corpus.read = lambda self, tally: _endless(tally)
            words = arguments(corpus, tokenizer_dir, tmp_path / "out" / "py", "--workers", str(workers))
            sys.exit(run_command(main, words))

        process = multiprocessing.get_context("fork").Process(target=command)
        process.start()
        started.append(process)
        partial = "*.partial.bin"
        wait_until(
            lambda: not process.is_alive() or any(f.stat().st_size for f in (tmp_path / "out").glob(partial))
        )
        assert process.is_alive(), (tmp_path / "stderr").read_text()
        return process

    yield begin
    for process in started:
        process.kill()
        process.join()


def _endless(tally):
    while True:
        tally.documents += 1
        tally.bytes += 50_000
        yield "x = 1\n" * 8_000


def processes_in_session(session):
    members = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = stat.read_text().rpartition(")")[2].split()[:4]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(owner) == session and state != "Z":
            members.append(stat.parent.name)
    return members


def state_of(pid):
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_ends_quietly_and_leaves_nothing(start, tmp_path, workers, number, status):
    process = start(workers)
    os.killpg(process.pid, number)  # to the workers, too, as a terminal does
    process.join(PATIENCE)
    assert process.exitcode == status
    assert os.listdir(tmp_path / "out") == []
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    wait_until(lambda: not processes_in_session(process.pid))


def test_workers_end_when_their_parent_is_killed(start, tmp_path):
    process = start(workers=3)
    assert len(processes_in_session(process.pid)) == 4
    process.kill()
    process.join(PATIENCE)
    wait_until(lambda: not processes_in_session(process.pid))
    assert all(".partial." in name for name in os.listdir(tmp_path / "out"))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_killed_in_the_middle_of_an_answer_is_reported(start, tmp_path, number):
    process = start(workers=3)
    os.kill(process.pid, signal.SIGSTOP)
    workers = [int(pid) for pid in processes_in_session(process.pid) if int(pid) != process.pid]
    wait_until(lambda: all(state_of(worker) == "S" for worker in workers))  # the pipes are full
    os.kill(workers[1], number)
    os.kill(process.pid, signal.SIGCONT)
    process.join(PATIENCE)
    assert process.exitcode == 2
    assert (
        (tmp_path / "stderr")
        .read_text()
        .splitlines()[-1]
        .startswith("error: --workers 3: a worker was killed")
    )
    assert os.listdir(tmp_path / "out") == []


def test_each_command_prints_one_line(scripts, corpus, tmp_path):
    def run(script, *words):
        command = [sys.executable, scripts / script, "--input", corpus.path, *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)

    trained = run("train_tokenizer.py", "--vocab-size", "300", "--output", "tok")
    made = run(
        *("preprocess_data.py", "--output-prefix", "data/py", "--append-eod", "--workers", "2"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "tok"),
    )
    for result, label in ((trained, "training tokenizer"), (made, "tokenizing")):
        assert len(result.stdout.splitlines()) == 1
        assert "300 documents" in result.stdout
        assert "skipped 1 empty, 1 undecodable, 0 unreadable, 0 repeated" in result.stdout
        assert result.stderr.splitlines()[-1].startswith(f"{label}: 300 documents, ")
        assert len(result.stderr.splitlines()) == 1
