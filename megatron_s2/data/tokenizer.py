"""Trains a byte-level BPE tokenizer that Megatron loads as `--tokenizer-type HuggingFaceTokenizer`."""

import contextlib
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_s2.data.documents import Corpus, Tally
from megatron_s2.data.output import check_absent, check_replaceable, check_writable
from megatron_s2.data.progress import Progress
from megatron_s2.errors import InputError

END_OF_DOCUMENT = "<|endoftext|>"

# Distinct from the end-of-document token: Megatron masks the loss of every label that equals the padding
# token, so that a model that pads with the end-of-document token never learns to end a document.
PADDING = "<|padding|>"

_SPECIAL_TOKENS = [END_OF_DOCUMENT, PADDING]
SMALLEST_VOCABULARY = 256 + len(_SPECIAL_TOKENS)

GROW_MODEL = (
    "to train the tokens beyond, resize the model's embedding (resize_token_embeddings in transformers) "
    "before it is converted"
)

# From a directory without any of these files, transformers builds an empty tokenizer.
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json")


@dataclass(frozen=True)
class TrainedTokenizer:
    """A trained tokenizer; `vocab_size` is less than requested if the text has no more pairs to merge."""

    directory: str
    vocab_size: int
    tally: Tally
    seconds: float


def has_tokenizer(directory: Path) -> bool:
    """Returns whether a directory has the files of a Hugging Face tokenizer."""
    return any((directory / name).is_file() for name in _TOKENIZER_FILES)


def number_of_ids(tokenizer) -> int:
    """Returns one more than the largest id of a Megatron tokenizer.

    It is more than the size of a Hugging Face vocabulary whose ids leave gaps.
    """
    hugging_face = getattr(getattr(tokenizer, "_tokenizer", None), "tokenizer", None)
    vocabulary = hugging_face.get_vocab() if hasattr(hugging_face, "get_vocab") else {}
    return max(tokenizer.vocab_size, 1 + max(vocabulary.values(), default=-1))


def stored_number_of_ids(directory: Path) -> int | None:
    """Returns one more than the largest id of the tokenizer in a Hugging Face directory.

    Returns None without a tokenizer, and for one that is damaged or only tokenizer.model, which names no ids.
    """
    vocabulary: dict[str, int] = {}
    if (directory / "tokenizer.json").is_file():
        from tokenizers import Tokenizer

        try:
            vocabulary = Tokenizer.from_file(str(directory / "tokenizer.json")).get_vocab()
        except Exception:  # tokenizers raises no other class
            return None
    else:
        for name in ("vocab.json", "added_tokens.json"):
            with contextlib.suppress(OSError, ValueError, RecursionError):
                vocabulary |= json.loads((directory / name).read_bytes())
    ids = [number for number in vocabulary.values() if isinstance(number, int)]
    return 1 + max(ids) if ids else None


def beyond_model(directory: Path, number_of_ids: int, what: str) -> str | None:
    """Returns a note where token ids have no row in the model that a tokenizer comes with; else None.

    Args:
        directory: Hugging Face directory with config.json, or none.
        number_of_ids: one more than the largest id.
        what: subject of the note, which has that id.
    """
    try:
        vocab_size = json.loads((directory / "config.json").read_bytes()).get("vocab_size")
    except (OSError, ValueError, RecursionError, AttributeError):
        return None
    if not isinstance(vocab_size, int) or number_of_ids <= vocab_size:
        return None
    return (
        f"{what} has token ids up to {number_of_ids - 1}, the model in {directory} has {vocab_size} tokens "
        f"(vocab_size in config.json); {GROW_MODEL}"
    )


def train_tokenizer(
    corpus: Corpus,
    vocab_size: int,
    output: str,
    *,
    max_bytes: int | None = None,
    overwrite: bool = False,
) -> TrainedTokenizer:
    """Trains a byte-level BPE tokenizer like that of GPT-2 (Radford et al. 2019) and writes it to `output`.

    Every string decodes to itself, and the same corpus results in the same files. Token 0 is end-of-document,
    token 1 is padding; text that contains their names is encoded as ordinary text.

    Args:
        max_bytes: number of bytes to train on, approximately, in documents spread evenly over the corpus;
            None for all.

    Raises:
        InputError: `vocab_size` is below 258 (all bytes and the two special tokens) or `max_bytes` below 1;
            the corpus has no document; the output cannot be written, or exists and `overwrite` is False.
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
    check_replaceable("--output", output, [tokenizer_path, config_path])

    tally = Tally()
    with Progress("training tokenizer") as progress, _interruptible_outside_python():
        bpe = _train_bpe(_with_progress(_sample(corpus, tally, max_bytes), progress), vocab_size)
        seconds = progress.seconds
    if tally.documents == 0:
        raise InputError(f"--input {corpus.path}: no document with text in it ({tally.skipped()})")

    os.makedirs(output, exist_ok=True)
    _write_atomically(config_path, json.dumps(_tokenizer_config(), indent=2) + "\n")
    _write_atomically(tokenizer_path, bpe.to_str(pretty=True) + "\n")  # last: a directory with it is complete
    return TrainedTokenizer(output, bpe.get_vocab_size(), tally, seconds)


def _train_bpe(texts: Iterator[str], vocab_size: int):
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
    """Yields documents of about `max_bytes` in total, spread evenly over the corpus, and counts them."""
    if max_bytes is None:
        yield from corpus.read(tally)
        return
    fraction = min(1.0, max_bytes / max(corpus.size(), 1))
    read = Tally()
    for text in corpus.read(read):
        size = len(text.encode("utf-8"))
        if tally.bytes <= fraction * (read.bytes - size):
            tally.documents += 1
            tally.bytes += size
            yield text
    tally.empty, tally.undecodable = read.empty, read.undecodable
    tally.unreadable, tally.repeated = read.unreadable, read.repeated


def _with_progress(texts: Iterator[str], progress: Progress) -> Iterator[str]:
    for text in texts:
        progress.add(1, len(text.encode("utf-8")))
        yield text


@contextlib.contextmanager
def _interruptible_outside_python() -> Iterator[None]:
    """Makes Ctrl-C and SIGTERM end the process at once; Python would wait until the trainer returns.

    No file has been written by then.
    """
    numbers = (signal.SIGINT, signal.SIGTERM)
    previous = [signal.signal(number, signal.SIG_DFL) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, previous):
            signal.signal(number, handler)


def _write_atomically(path: str, content: str) -> None:
    partial = f"{path}.{os.getpid()}.partial"
    try:
        with open(partial, "w", encoding="utf-8") as file:
            file.write(content)
        os.replace(partial, path)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.remove(partial)
