"""Training a byte-level BPE tokenizer that Megatron loads as `--tokenizer-type HuggingFaceTokenizer`."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_s2.data.documents import Corpus, Tally
from megatron_s2.data.output import check_absent, check_writable
from megatron_s2.data.progress import Progress
from megatron_s2.errors import InputError

END_OF_DOCUMENT = "<|endoftext|>"

# A token of its own: Megatron takes the loss off every label that equals the padding token, so a
# tokenizer that pads with its end-of-document token trains a model that never ends a document.
PADDING = "<|padding|>"

_SPECIAL_TOKENS = [END_OF_DOCUMENT, PADDING]
SMALLEST_VOCABULARY = 256 + len(_SPECIAL_TOKENS)

# transformers makes an empty tokenizer of a directory with none of these.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class TrainedTokenizer:
    """What was learnt from what. `vocab_size` is less than asked for when the text has no more to merge."""

    directory: str
    vocab_size: int
    tally: Tally
    seconds: float


def has_tokenizer(directory: Path) -> bool:
    """Whether it holds the files of one."""
    return any((directory / name).is_file() for name in _TOKENIZERS)


def train_tokenizer(
    corpus: Corpus,
    vocab_size: int,
    output: str,
    *,
    max_bytes: int | None = None,
    overwrite: bool = False,
) -> TrainedTokenizer:
    """Learn a byte-level BPE (as GPT-2's: Radford et al. 2019) and write it to the directory `output`.

    Every string is encoded without loss and decodes to itself; the same corpus gives the same files.
    Token 0 ends a document, token 1 is padding; text that spells their names is encoded as ordinary
    text. With `max_bytes`, about so many bytes are read from, as documents spread evenly over the corpus.

    Raises:
        InputError: `vocab_size` below 258 (all bytes and the two special tokens), `max_bytes` below 1,
            no document in the corpus, a place that cannot be written, or a tokenizer that is there
            already without `overwrite`.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise InputError(
            f"--vocab-size {vocab_size}: must be at least {SMALLEST_VOCABULARY} "
            f"(256 bytes and {len(_SPECIAL_TOKENS)} special tokens)"
        )
    if max_bytes is not None and max_bytes < 1:
        raise InputError(f"--max-bytes {max_bytes}: must be at least 1")
    tokenizer_path = os.path.join(output, "tokenizer.json")
    config_path = os.path.join(output, "tokenizer_config.json")
    check_writable("--output", output)
    if not overwrite:
        check_absent("--output", output, [tokenizer_path, config_path])

    tally = Tally()
    with Progress("training tokenizer") as progress, _interruptible_outside_python():
        bpe = _learn(_with_progress(_sample(corpus, tally, max_bytes), progress), vocab_size)
        seconds = progress.seconds
    if tally.documents == 0:
        raise InputError(f"--input {corpus.path}: no document with text in it ({tally.skipped()})")

    os.makedirs(output, exist_ok=True)
    _write(config_path, json.dumps(_tokenizer_config(), indent=2) + "\n")
    _write(tokenizer_path, bpe.to_str(pretty=True) + "\n")  # last: a directory that has it is complete
    return TrainedTokenizer(output, bpe.get_vocab_size(), tally, seconds)


def _learn(texts: Iterator[str], vocab_size: int):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=_SPECIAL_TOKENS,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    return bpe


def _tokenizer_config() -> dict:
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END_OF_DOCUMENT,
        "pad_token": PADDING,
        "split_special_tokens": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 10**12,
    }


def _sample(corpus: Corpus, tally: Tally, max_bytes: int | None) -> Iterator[str]:
    """Yield the corpus, or of it about `max_bytes` in documents spread evenly, counting what is yielded."""
    if max_bytes is None:
        yield from corpus.read(tally)
        return
    share = min(1.0, max_bytes / max(corpus.size(), 1))
    passed = Tally()
    for text in corpus.read(passed):
        size = len(text.encode("utf-8"))
        if tally.bytes <= share * (passed.bytes - size):
            tally.documents += 1
            tally.bytes += size
            yield text
    tally.empty, tally.undecodable = passed.empty, passed.undecodable
    tally.unreadable, tally.repeated = passed.unreadable, passed.repeated


def _with_progress(texts: Iterator[str], progress: Progress) -> Iterator[str]:
    for text in texts:
        progress.add(1, len(text.encode("utf-8")))
        yield text


@contextlib.contextmanager
def _interruptible_outside_python() -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the process at once: Python would see them only when the trainer returns.

    Nothing has been written by then.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)


def _write(path: str, content: str) -> None:
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(content)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
