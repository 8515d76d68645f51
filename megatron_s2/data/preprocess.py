"""Tokenizes documents into Megatron's indexed dataset, with any number of processes."""

import contextlib
import functools
import multiprocessing
import os
import queue
import re
import shutil
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing.connection import Connection

from megatron_s2.data.documents import Corpus, Tally
from megatron_s2.data.output import check_absent, check_replaceable, check_writable
from megatron_s2.data.progress import Progress
from megatron_s2.data.token_ids import RECORD_SUFFIX, write_record
from megatron_s2.data.tokenizer import number_of_ids
from megatron_s2.errors import InputError

# The tokenizers of Megatron that need no flag besides --tokenizer-model.
TOKENIZER_TYPES = (
    "HuggingFaceTokenizer",
    "SentencePieceTokenizer",
    "GPTSentencePieceTokenizer",
    "Llama2Tokenizer",
)

_SUFFIXES = (".bin", RECORD_SUFFIX, ".idx")
_BATCH_BYTES = 1 << 18
_BATCHES_AHEAD_PER_WORKER = 4


@dataclass(frozen=True)
class PreprocessedDataset:
    """A dataset on disk, `{prefix}.bin` and `{prefix}.idx`; `prefix` is the value for `--data-path`."""

    prefix: str
    tokens: int
    largest_token_id: int
    dtype: str
    tally: Tally
    seconds: float


def preprocess_data(
    corpus: Corpus,
    output_prefix: str,
    tokenizer_type: str,
    tokenizer_model: str,
    *,
    append_eod: bool = False,
    workers: int = 1,
    overwrite: bool = False,
) -> PreprocessedDataset:
    """Tokenizes every document of `corpus` and writes `{output_prefix}_{json_key}_document.bin` and `.idx`.

    In the name, `/` and white space of `json_key` are `_`. The documents keep their order, and the files are
    the same for any number of `workers`. At most a few batches are in memory. Token ids are uint16 if the
    largest id of the tokenizer allows it, else int32, as in Megatron. Beside the dataset, `.ids` records its
    largest token id, which a training compares with its model. The files get their final names after
    everything is written. Megatron's index cache of an earlier dataset of the same name is removed, because
    Megatron would use it with the new tokens.

    Raises:
        InputError: the tokenizer is unknown, returns something that is not a token id, or has no
            end-of-document token for `append_eod`; `workers` is below 1; the corpus has no document; the
            output cannot be written, or exists and `overwrite` is False.
    """
    if workers < 1:
        raise InputError(f"--workers {workers}: must be at least 1")
    directory, name = os.path.split(output_prefix)
    if not name:
        raise InputError(f"--output-prefix {output_prefix!r}: must end in a file name, as in data/mytext")
    # A prefix with white space cannot be written into the file of --data-args-path.
    prefix = f"{output_prefix}_{re.sub(r'[/\0\s]', '_', corpus.json_key)}_document"
    check_writable("--output-prefix", directory or ".")
    if not overwrite:
        check_absent("--output-prefix", output_prefix, [f"{prefix}.bin", f"{prefix}.idx"])
    check_replaceable("--output-prefix", output_prefix, [prefix + suffix for suffix in _SUFFIXES])
    tokenizer = load_tokenizer(tokenizer_type, tokenizer_model)
    if append_eod and tokenizer.eod is None:
        raise InputError(f"--append-eod: {tokenizer_model} has no end-of-document (eos) token; leave it out")

    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype = DType.optimal_dtype(number_of_ids(tokenizer))
    encoder = _Encoder(tokenizer, tokenizer_model, append_eod, dtype)

    os.makedirs(directory or ".", exist_ok=True)
    partial = f"{prefix}.{os.getpid()}.partial"
    tally = Tally()
    try:
        builder = IndexedDatasetBuilder(f"{partial}.bin", dtype=dtype)
        tokens, largest = 0, 0
        with (
            contextlib.closing(builder.data_file),
            contextlib.closing(_encoded(encoder, _batches(corpus, tally), workers)) as batches,
            Progress("tokenizing") as progress,
        ):
            for size, documents in batches:
                for document in documents:
                    builder.add_document(document, [len(document)])
                    tokens += len(document)
                    largest = max(largest, int(document.max(initial=0)))
                progress.add(len(documents), size)
            seconds = progress.seconds
        if tokens == 0:
            raise InputError(f"--input {corpus.path}: no document with text in it ({tally.skipped()})")
        builder.finalize(f"{partial}.idx")
        write_record(partial + RECORD_SUFFIX, largest, os.path.getsize(f"{partial}.bin"))
        _publish(partial, prefix)
    finally:
        for suffix in _SUFFIXES:
            with contextlib.suppress(FileNotFoundError):
                os.remove(partial + suffix)
    return PreprocessedDataset(prefix, tokens, largest, dtype.__name__, tally, seconds)


def load_tokenizer(tokenizer_type: str, tokenizer_model: str):
    """Returns Megatron's tokenizer for `--tokenizer-type` and `--tokenizer-model`, as training builds it.

    Args:
        tokenizer_type: one of `TOKENIZER_TYPES`.
        tokenizer_model: path or, for HuggingFaceTokenizer, `organisation/name` on the Hugging Face Hub.

    Raises:
        InputError: the type is unknown, or the model does not exist or cannot be loaded.
    """
    if tokenizer_type not in TOKENIZER_TYPES:
        raise InputError(f"--tokenizer-type {tokenizer_type}: must be one of {', '.join(TOKENIZER_TYPES)}")
    if not os.path.exists(tokenizer_model) and not (
        tokenizer_type == "HuggingFaceTokenizer" and _names_hub_model(tokenizer_model)
    ):
        raise InputError(
            f"--tokenizer-model {tokenizer_model}: does not exist; scripts/train_tokenizer.py makes one"
        )
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.config import TokenizerConfig
    from transformers.utils import logging as transformers_logging

    transformers_logging.set_verbosity_error()  # no warning for each document longer than the model's context
    config = TokenizerConfig(
        tokenizer_type=tokenizer_type, tokenizer_model=tokenizer_model, pad_vocab_size=False
    )
    try:
        return build_tokenizer(config)
    except (ValueError, RuntimeError, OSError) as error:
        reason = " ".join(str(error).split())
        raise InputError(
            f"--tokenizer-model {tokenizer_model}: cannot be loaded as {tokenizer_type}: {reason}"
        ) from error


def _names_hub_model(model: str) -> bool:
    organisation, _, name = model.partition("/")
    return bool(organisation and name) and "/" not in name and not os.path.exists(organisation)


class _Encoder:
    """Maps the texts of a batch to arrays of token ids `[tokens]`."""

    def __init__(self, tokenizer, tokenizer_model: str, append_eod: bool, dtype: type):
        self._tokenizer = tokenizer
        self._tokenizer_model = tokenizer_model
        self._ending = [tokenizer.eod] if append_eod else []
        self._dtype = dtype

    def __call__(self, texts: list[str]) -> list:
        return [self._array([*self._tokenizer.tokenize(text), *self._ending]) for text in texts]

    def _array(self, ids: list[int]):
        import numpy

        most = numpy.iinfo(self._dtype).max
        array = numpy.array(ids or [0])
        if array.dtype.kind not in "iu" or array.min() < 0 or array.max() > most:
            bad = next(token for token in ids if token is None or not 0 <= token <= most)
            raise InputError(
                f"--tokenizer-model {self._tokenizer_model}: returns {bad} as a token id; must be 0 … {most} "
                "by the size of its vocabulary; give another tokenizer"
            )
        return array[: len(ids)].astype(self._dtype)


def _batches(corpus: Corpus, tally: Tally) -> Iterator[tuple[int, list[str]]]:
    """Yields (bytes, texts); how texts are grouped affects only the speed."""
    texts, start = [], 0
    for text in corpus.read(tally):
        texts.append(text)
        if tally.bytes - start >= _BATCH_BYTES:
            yield tally.bytes - start, texts
            texts, start = [], tally.bytes
    if texts:
        yield tally.bytes - start, texts


def _encoded(
    encoder: _Encoder, batches: Iterator[tuple[int, list[str]]], workers: int
) -> Iterator[tuple[int, list]]:
    """Yields (bytes, encoded documents) in the order of `batches`, of which a few are read ahead."""
    if workers == 1:
        for size, texts in batches:
            yield size, encoder(texts)
        return
    with _worker_pool(encoder, workers) as submit:
        pending = deque()
        for size, texts in batches:
            pending.append((size, submit(texts)))
            if len(pending) >= workers * _BATCHES_AHEAD_PER_WORKER:
                size, future = pending.popleft()
                yield size, future.result()
        for size, future in pending:
            yield size, future.result()


@contextlib.contextmanager
def _worker_pool(encoder: _Encoder, workers: int) -> Iterator[Callable[[list[str]], Future]]:
    """Yields a function that has one of `workers` forked processes encode a batch.

    Each process has a pipe of its own, so that a worker killed in the middle of an answer ends the pipe. The
    queue that the workers of a ProcessPoolExecutor share stays open then, and its reader waits forever.
    """
    # Forked workers have the tokenizer at once; a spawned process would import for seconds. The threads of
    # the Rust tokenizer do not survive a fork, and do not help with one text at a time.
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    fork = multiprocessing.get_context("fork")
    processes, connections = [], []
    idle = queue.SimpleQueue()

    def encode(texts: list[str]) -> list:
        connection = idle.get()
        try:
            connection.send(texts)
            answer = connection.recv()
        except (EOFError, OSError) as error:
            raise InputError(
                f"--workers {workers}: a worker was killed, most likely for lack of memory; use fewer"
            ) from error
        finally:
            idle.put(connection)
        if isinstance(answer, Exception):
            raise answer
        return answer

    threads = ThreadPoolExecutor(workers)  # each waits for one worker
    # No signal is lost or handled twice while the workers start.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
    try:
        for _ in range(workers):
            connection, workers_end = fork.Pipe()
            connections.append(connection)
            process = fork.Process(target=_work, args=(encoder, workers_end, connections))
            process.start()
            processes.append(process)
            workers_end.close()
            idle.put(connection)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        yield functools.partial(threads.submit, encode)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        for process in processes:
            process.kill()
        threads.shutdown(cancel_futures=True)
        for process in processes:
            process.join()


def _work(encoder: _Encoder, connection: Connection, parents_ends: list[Connection]) -> None:
    """Encodes what the parent sends until the parent ends."""
    # Ctrl-C in a terminal is sent to the workers, too: they leave it blocked, and the parent stops them.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    for end in parents_ends:
        end.close()  # else the pipes of a killed parent stay open
    with contextlib.suppress(EOFError, OSError):
        while True:
            texts = connection.recv()
            try:
                answer = encoder(texts)
            except Exception as error:  # raised again by the parent
                error.add_note(traceback.format_exc())
                answer = error
            connection.send(answer)


def _publish(partial: str, prefix: str) -> None:
    """Renames the finished files, the index last: a dataset with an index is complete."""
    with contextlib.suppress(FileNotFoundError):
        os.remove(f"{prefix}.idx")
    shutil.rmtree(os.path.join(prefix, "cache"), ignore_errors=True)
    for suffix in _SUFFIXES:
        os.replace(partial + suffix, prefix + suffix)
