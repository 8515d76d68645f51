"""The largest token id of an indexed dataset: recorded when it is written, else looked for in its data."""

import contextlib
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass

from megatron_s2.errors import InputError

RECORD_SUFFIX = ".ids"

# A record: magic, largest token id, bytes of the .bin file. Like an index it is not text, so that a corpus in
# the same directory does not gain a document.
_RECORD = struct.Struct("<8sQQ")
_RECORD_MAGIC = b"S2IDS\x00\x00\x01"
# Head of an .idx file: magic, version, code of the token type, number of sequences (which a GPT splits by).
_INDEX_HEAD = struct.Struct("<9sQBQ")
_INDEX_MAGIC = b"MMIDIDX\x00\x00"
_DTYPES = {1: "uint8", 2: "int8", 3: "int16", 4: "int32", 5: "int64", 8: "uint16"}
# Prefixes of paths that are not on a local disk.
REMOTE_SCHEMES = ("s3://", "msc://")

# Bytes of data that are read where datasets have no record, of all of them together: a second on most disks.
LOOK_BYTES = 1 << 28
_CHUNK_BYTES = 1 << 20

# The negative id that Megatron fills samples with, masks and does not look up.
PADDING_ID = -1


@dataclass(frozen=True)
class Index:
    """The head of a dataset's `.idx` file.

    Args:
        dtype: NumPy's name of the dtype of its token ids.
        sequences: number of sequences, each of them a document.
    """

    dtype: str
    sequences: int


@dataclass(frozen=True)
class Vocabulary:
    """The token ids that a model knows.

    Args:
        size: ids are 0 … size - 1.
        source: what says so, such as `--vocab-size 300`.
        advice: what to do about data with a larger id.
    """

    size: int
    source: str
    advice: str = "give data that was tokenized with the model's tokenizer"

    def refusal(self, where: str, token: int) -> str:
        """Returns the message that refuses a token id; `where` names the flag and the data."""
        return (
            f"{where}: has token id {token}; the model has {self.size} tokens ({self.source}); {self.advice}"
        )


@dataclass(frozen=True)
class TokenIds:
    """The token ids of a dataset.

    Args:
        smallest, largest: of the ids looked at; 0 and -1 where there are none.
        looked_at: number of ids looked at; 0 where the largest one was recorded.
        tokens: number of ids in the dataset.
    """

    smallest: int
    largest: int
    looked_at: int
    tokens: int


def read_index(prefix: str) -> Index:
    """Returns the head of `{prefix}.idx`.

    Raises:
        InputError: the file is not an index of token ids.
        OSError: it cannot be read.
    """
    with open(f"{prefix}.idx", "rb") as file:
        head = file.read(_INDEX_HEAD.size)
    if len(head) == _INDEX_HEAD.size:
        magic, _, dtype, sequences = _INDEX_HEAD.unpack(head)
        if magic == _INDEX_MAGIC and dtype in _DTYPES:
            return Index(_DTYPES[dtype], sequences)
    raise InputError(f"{prefix}.idx: is not an index of token ids that scripts/preprocess_data.py wrote")


def write_record(path: str, largest: int, size: int) -> None:
    """Writes the record of a dataset: its largest token id, and the size of its .bin file in bytes."""
    with open(path, "wb") as file:
        file.write(_RECORD.pack(_RECORD_MAGIC, largest, size))


def find_token_ids(prefix: str, most_bytes: int = LOOK_BYTES) -> TokenIds:
    """Returns the range of the token ids of a dataset.

    Args:
        prefix: path of the `.bin` and `.idx` files without suffix.
        most_bytes: largest number of bytes of the `.bin` file to read if there is no record, in pieces spread
            evenly over it.

    Raises:
        InputError: the index is damaged.
        OSError: a file cannot be read.
    """
    import numpy

    dtype = read_index(prefix).dtype
    size = os.path.getsize(f"{prefix}.bin")
    tokens = size // numpy.dtype(dtype).itemsize
    if (recorded := _recorded(prefix, size)) is not None:
        return TokenIds(0, recorded, 0, tokens)
    if tokens == 0:
        return TokenIds(0, -1, 0, 0)
    ids = numpy.memmap(f"{prefix}.bin", dtype, "r", shape=(tokens,))
    chunk = max(1, min(_CHUNK_BYTES, most_bytes) // ids.itemsize)
    chunks = -(-tokens // chunk)
    read = max(1, min(chunks, most_bytes // _CHUNK_BYTES))
    pieces = (ids[index * chunks // read * chunk :][:chunk] for index in range(read))
    ranges = [(int(piece.min()), int(piece.max()), piece.size) for piece in pieces]
    smallest, largest, sizes = zip(*ranges)
    return TokenIds(min(smallest), max(largest), sum(sizes), tokens)


def check_token_ids(data: Iterable[tuple[str, str]], vocabulary: Vocabulary) -> str | None:
    """Checks the token ids of datasets against the vocabulary of a model.

    Datasets that `preprocess_data` wrote have a record; in others at most `LOOK_BYTES` are looked at, all
    together.

    Args:
        data: flag and prefix of each dataset.

    Returns:
        A line that says how much was looked at; None where all datasets have a record.

    Raises:
        InputError: naming the flag, the prefix, the token id and the size of the vocabulary.
    """
    data = [(flag, prefix) for flag, prefix in dict.fromkeys(data) if not prefix.startswith(REMOTE_SCHEMES)]
    unrecorded = []
    for flag, prefix in data:
        ids = find_token_ids(prefix, LOOK_BYTES // len(data))
        negative = ids.smallest < PADDING_ID
        if negative or ids.largest >= vocabulary.size:
            bad = ids.smallest if negative else ids.largest
            raise InputError(vocabulary.refusal(f"{flag} {prefix}", bad))
        if ids.looked_at:
            unrecorded.append((prefix, ids))
    if not unrecorded:
        return None
    names = unrecorded[0][0] if len(unrecorded) == 1 else f"{len(unrecorded)} datasets"
    looked_at = sum(ids.looked_at for _, ids in unrecorded)
    tokens = sum(ids.tokens for _, ids in unrecorded)
    largest = max(ids.largest for _, ids in unrecorded)
    return (
        f"{names}: no record of the largest token id; looked at {looked_at} of {tokens} tokens, the largest "
        f"is {largest}, of {vocabulary.size} that the model has"
    )


def _recorded(prefix: str, size: int) -> int | None:
    """Returns the recorded largest id; None without a record, or with one of another .bin file."""
    with contextlib.suppress(OSError, struct.error):
        with open(prefix + RECORD_SUFFIX, "rb") as file:
            magic, largest, recorded_size = _RECORD.unpack(file.read(_RECORD.size + 1))
        if magic == _RECORD_MAGIC and recorded_size == size:
            return largest
    return None
