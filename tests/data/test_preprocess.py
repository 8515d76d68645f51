"""The indexed dataset decodes to the text, for any number of workers; no unfinished files are left."""

import json
import multiprocessing
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron_run import run_command as run_in_fork
from preprocess_data import main
from script_main import exit_status
from waiting import PATIENCE, wait_until

from megatron_s2.data.command import run_command
from megatron_s2.data.documents import Corpus
from megatron_s2.data.preprocess import load_tokenizer, preprocess_data
from megatron_s2.data.token_ids import TokenIds, find_token_ids
from megatron_s2.data.tokenizer import number_of_ids, stored_number_of_ids
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
    assert sorted(os.listdir(tmp_path)) == [f"py_text_document.{kind}" for kind in ("bin", "ids", "idx")]
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


@pytest.mark.parametrize(
    ("key", "name"),
    [("body", "body"), ("a/b", "a_b"), ("my key", "my_key"), ("../x", ".._x"), ("größe", "größe")],
)
def test_the_json_key_names_the_dataset(tokenizer_dir, tmp_path, key, name):
    (tmp_path / "a.jsonl").write_text(json.dumps({key: "some text"}))
    corpus = Corpus(str(tmp_path / "a.jsonl"), json_key=key)
    assert preprocess(corpus, tokenizer_dir, tmp_path / "a").prefix == str(tmp_path / f"a_{name}_document")


def with_ids(tokenizer_dir, directory, changes, added=()):
    """Copies a tokenizer with other ids for tokens of its model, and with further tokens."""
    content = json.loads(Path(tokenizer_dir, "tokenizer.json").read_text())
    content["model"]["vocab"] |= changes
    content["added_tokens"] += [{**content["added_tokens"][0], "id": n, "content": f"<{n}>"} for n in added]
    directory.mkdir()
    (directory / "tokenizer.json").write_text(json.dumps(content))
    config = json.loads(Path(tokenizer_dir, "tokenizer_config.json").read_text())
    (directory / "tokenizer_config.json").write_text(json.dumps({**config, "split_special_tokens": False}))
    return str(directory)


@pytest.mark.parametrize(("number", "dtype"), [(410, "uint16"), (65_499, "int32"), (70_000, "int32")])
def test_token_ids_are_stored_by_the_largest_also_beyond_a_hole(tokenizer_dir, tmp_path, number, dtype):
    """400 tokens, of which one, used in the text, has this number."""
    tokenizer_dir = with_ids(tokenizer_dir, tmp_path / "tok", {"Z": number})
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Z and Z"}))
    made = preprocess(Corpus(str(tmp_path / "a.jsonl")), tokenizer_dir, tmp_path / "a")
    assert (made.dtype, made.largest_token_id) == (dtype, number)
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_dir)
    dataset = IndexedDataset(made.prefix)  # kept alive: its arrays are views of files that it closes
    assert tokenizer.detokenize(dataset[0].tolist()) == "Z and Z"
    assert find_token_ids(made.prefix) == TokenIds(0, number, 0, made.tokens)
    assert stored_number_of_ids(Path(tokenizer_dir)) == number_of_ids(tokenizer) == number + 1


def test_the_ids_of_added_tokens_count(tokenizer_dir, tmp_path):
    tokenizer_dir = with_ids(tokenizer_dir, tmp_path / "tok", {}, [400, 401])
    tokenizer = load_tokenizer("HuggingFaceTokenizer", tokenizer_dir)
    assert tokenizer.tokenize("<401>") == [401]
    assert stored_number_of_ids(Path(tokenizer_dir)) == number_of_ids(tokenizer) == 402


def test_the_ids_of_older_tokenizer_files_and_of_damaged_ones(tmp_path):
    assert stored_number_of_ids(tmp_path) is None
    (tmp_path / "vocab.json").write_text('{"a": 0, "b": 7}')
    assert stored_number_of_ids(tmp_path) == 8
    (tmp_path / "added_tokens.json").write_text('{"<c>": 8}')
    assert stored_number_of_ids(tmp_path) == 9
    (tmp_path / "tokenizer.json").write_text("{")
    assert stored_number_of_ids(tmp_path) is None


@pytest.mark.parametrize(
    ("returned", "shown"), [([3, 70_000], "70000"), ([3, -1], "-1"), ([3, None], "None")]
)
def test_what_is_no_token_id_is_refused(corpus, tmp_path, monkeypatch, returned, shown):
    tokenizer = SimpleNamespace(vocab_size=300, eod=0, tokenize=lambda text: returned)
    monkeypatch.setattr("megatron_s2.data.preprocess.load_tokenizer", lambda *model: tokenizer)
    message = f"--tokenizer-model given: returns {shown} as a token id; must be 0 … 65535 by"
    with pytest.raises(InputError, match=f"^{message}"):
        preprocess(corpus, "given", tmp_path / "py")
    assert os.listdir(tmp_path) == []


def test_tokens_beyond_the_model_of_the_tokenizer_are_noted(tokenizer_dir, tmp_path, capsys):
    tokenizer_dir = with_ids(tokenizer_dir, tmp_path / "tok", {}, [400, 401])
    Path(tokenizer_dir, "config.json").write_text('{"vocab_size": 401}')
    notes = {}
    for name, text in (("within", "a <400>"), ("beyond", "a <400><401>")):
        (tmp_path / f"{name}.jsonl").write_text(json.dumps({"text": text}))
        main(arguments(Corpus(str(tmp_path / f"{name}.jsonl")), tokenizer_dir, tmp_path / name))
        notes[name] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert notes["within"] == []
    assert [
        f"note: {tmp_path}/beyond_text_document has token ids up to 401, the model in {tokenizer_dir} has "
        "401 tokens (vocab_size in config.json); to train the tokens beyond, resize the model's embedding "
        "(resize_token_embeddings in transformers) before it is converted"
    ] == notes["beyond"]


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
        (
            ["--output-prefix", "taken", "--overwrite"],
            "--output-prefix taken: taken_text_document.bin is a directory; give another name or remove it",
        ),
        (["--output-prefix", "/proc/self/x"], "--output-prefix /proc/self: /proc/self is not writable ("),
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
    Path("taken_text_document.bin").mkdir()
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
        return run_in_fork(scripts / script, "--input", corpus.path, *words, cwd=tmp_path)

    trained = run("train_tokenizer.py", "--vocab-size", "300", "--output", "tok")
    made = run(
        *("preprocess_data.py", "--output-prefix", "data/py", "--append-eod", "--workers", "2"),
        *("--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "tok"),
    )
    assert trained.returncode == made.returncode == 0
    for result, label in ((trained, "training tokenizer"), (made, "tokenizing")):
        assert len(result.stdout.splitlines()) == 1
        assert "300 documents" in result.stdout
        assert "skipped 1 empty, 1 undecodable, 0 unreadable, 0 repeated" in result.stdout
        assert result.stderr.splitlines()[-1].startswith(f"{label}: 300 documents, ")
        assert len(result.stderr.splitlines()) == 1
