"""Sequences of the needle experiment: keys with values, hidden in noise and asked for; tokens that repeat.

Token ids are those of noise (`HAY` of them), then of keys, then of values; the last id of `VOCABULARY` is
never used. Noise is a Markov chain in which four tokens may follow each: little of the loss is spent on it.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from megatron_s2.data.token_ids import RECORD_SUFFIX, write_record

HAY, KEYS, VALUES = 16, 32, 15
VOCABULARY = HAY + KEYS + VALUES + 1
_FOLLOWERS = np.random.default_rng(0).integers(0, HAY, (HAY, 4))
_SHORT_PERIODS, _PERIODS = (6, 14), (6, 48)  # shortest and longest
_LARGEST_SHIFT = 256


def needles_of(length: int) -> int:
    """Returns the number of needles of a sequence, trained on or asked: one per 16 tokens, 32 at most."""
    return min(KEYS, length // 16)


def needle_sequences(
    rng: np.random.Generator, count: int, length: int, needles: int
) -> tuple[np.ndarray, np.ndarray]:
    """Returns sequences that end in questions, and where their answers are.

    A needle is a key and, right after it, a value; keys of a sequence differ. There is one needle in each of
    equal parts of the noise, anywhere in its part. At the end all keys follow in another order, each with its
    value: the last `2 * needles` tokens.

    Returns:
        Tokens `[count, length]`; place of the key of each question's needle `[count, needles]`.

    Raises:
        ValueError: more needles than keys, or than have room.
    """
    noise = length - 2 * needles
    if not 1 <= needles <= min(KEYS, noise // 2):
        raise ValueError(f"needles {needles}: must be between 1 and {min(KEYS, noise // 2)}")
    tokens = _hay(rng, count, length)
    part = noise / 2 / needles
    slots = ((np.arange(needles) + rng.random((count, needles))) * part).astype(int)
    places = 2 * rng.permuted(slots, axis=1)
    keys = HAY + rng.permuted(np.tile(np.arange(KEYS), (count, 1)), axis=1)[:, :needles]
    values = HAY + KEYS + rng.integers(0, VALUES, (count, needles))
    rows = np.arange(count)[:, None]
    questions = noise + 2 * np.arange(needles)[None]
    for at in (places, questions):
        tokens[rows, at], tokens[rows, at + 1] = keys, values
    return tokens, places


def shifted_needle_sequences(rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Returns sequences `[count, length]` of `needle_sequences`, each shifted by another number of tokens.

    Up to 256 tokens of its beginning, a half at most, come after the questions: which are then in blocks of
    all phases, and not only in the last blocks, whose heads would learn later than others.
    """
    sequences, _ = needle_sequences(rng, count, length, needles_of(length))
    shifts = rng.integers(0, min(_LARGEST_SHIFT, length // 2) + 1, (count, 1))
    return np.take_along_axis(sequences, (np.arange(length) + shifts) % length, axis=1)


def _hay(rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    choices = rng.integers(0, _FOLLOWERS.shape[1], (length, count))
    tokens = np.empty((length, count), dtype=np.int64)
    tokens[0] = rng.integers(0, HAY, count)
    for n in range(1, length):
        tokens[n] = _FOLLOWERS[tokens[n - 1], choices[n]]
    return np.ascontiguousarray(tokens.T)


def periodic_sequences(rng: np.random.Generator, count: int, length: int) -> np.ndarray:
    """Returns sequences `[count, length]` of two parts, in each of which distinct tokens repeat periodically.

    What follows a token is known from its last occurrence, and from no fixed distance: the logarithm of a
    period is uniform. That of the first part is so short that a window of two blocks of 16 has it. Longer
    ones, for which a head needs its shards, are in the second, which has other tokens, and begins anywhere
    in the first 256: its first blocks, from which all that follows can be copied, are equally often of each
    phase. Heads that see nothing of use come to rest, with all of their attention on one token, and hardly
    learn afterwards.
    """
    sequences = np.empty((count, length), dtype=np.int64)
    for tokens in sequences:
        short, long = (round(np.exp(rng.uniform(*np.log(some)))) for some in (_SHORT_PERIODS, _PERIODS))
        names = rng.permutation(VOCABULARY - 1)
        first, second = np.split(tokens, [rng.integers(min(_LARGEST_SHIFT, length // 2))])
        first[:] = np.resize(names[:short], len(first))
        second[:] = np.resize(names[short : short + long], len(second))
    return sequences


def write_sequences(prefix: Path, batches: Iterable[np.ndarray]) -> None:
    """Writes sequences as the documents of an indexed dataset, whose index is written last."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix.parent.mkdir(parents=True, exist_ok=True)
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for batch in batches:
        for sequence in batch:
            builder.add_document(sequence.astype(np.uint16), [len(sequence)])
    builder.data_file.close()
    write_record(f"{prefix}{RECORD_SUFFIX}", VOCABULARY - 2, os.path.getsize(f"{prefix}.bin"))
    builder.finalize(f"{prefix}.idx")
