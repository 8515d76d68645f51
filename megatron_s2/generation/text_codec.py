"""Encodes text to token ids and decodes it, with the tokenizer of a model or without one."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_s2.data.tokenizer import has_tokenizer

_REPLACEMENT = "\ufffd"  # decoders return it for bytes that do not form a character yet


@dataclass(frozen=True)
class TextCodec:
    """How a model reads and writes text.

    Args:
        encode: returns the token ids of a prompt, however long; raises ValueError, which says what a prompt
            must be, for one that it cannot encode.
        decode: returns the text of token ids.
        stop: tokens that end a text.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    stop: frozenset[int]


def token_id_codec(stop: frozenset[int] = frozenset()) -> TextCodec:
    """Returns a codec without a tokenizer: the text is the token ids, separated by spaces."""

    def encode(text: str) -> list[int]:
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise ValueError("must be token ids, such as '12 7 30'") from None

    return TextCodec(encode, lambda ids: " ".join(map(str, ids)), stop)


def stop_tokens(directory: Path) -> frozenset[int]:
    """Returns the end-of-text tokens of a model, from its generation_config.json or config.json.

    Raises:
        ValueError: a file is damaged.
    """
    for path in (directory / "generation_config.json", directory / "config.json"):
        if not path.is_file():
            continue
        try:
            eos = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError, RecursionError) as error:
            raise ValueError(f"{path}: cannot be read: {error}") from None
        if eos is not None:
            return frozenset([eos] if isinstance(eos, int) else eos)
    return frozenset()


def hugging_face_codec(directory: Path, stop: frozenset[int]) -> TextCodec:
    """Returns the codec of the tokenizer in a Hugging Face directory.

    Args:
        stop: end-of-text tokens of the model; if empty, that of the tokenizer is used.

    Raises:
        ValueError: the directory has no tokenizer.
    """
    if not has_tokenizer(directory):
        raise ValueError(f"--tokenizer-model {directory}: has no tokenizer; give another, or --token-ids")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    if not stop and tokenizer.eos_token_id is not None:
        stop = frozenset({tokenizer.eos_token_id})
    return TextCodec(
        lambda text: tokenizer(text, verbose=False).input_ids,  # else it warns of its model_max_length
        lambda ids: tokenizer.decode(  # with clean-up, a further token could make the text shorter
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ),
        stop,
    )


def megatron_codec(tokenizer, tokenizer_type: str, stop: frozenset[int]) -> TextCodec:
    """Returns the codec of Megatron's tokenizer object.

    Args:
        tokenizer_type: Megatron's `--tokenizer-type`.
        stop: end-of-text tokens of the model; if empty, that of the tokenizer is used, except a
            NullTokenizer's, which need not be a token of the model.
    """
    if tokenizer_type == "NullTokenizer":
        return token_id_codec(stop)
    stop = stop or frozenset({tokenizer.eod})

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.detokenize([token for token in ids if token not in stop], skip_special_tokens=True)

    return TextCodec(tokenizer.tokenize, decode, stop)


@dataclass
class TokenStreamer:
    """Writes the text of a growing list of tokens, as soon as further tokens cannot change it.

    The text of a token may depend on the tokens before it. New tokens are therefore decoded together with
    those that were written last.
    """

    codec: TextCodec
    write: Callable[[str], object]
    _written: list[int] = field(default_factory=list)
    _new: list[int] = field(default_factory=list)

    def add(self, token: int) -> None:
        self._new.append(token)
        text = self._decode_new()
        if text and not text.endswith(_REPLACEMENT):
            self.write(text)
            self._written, self._new = self._new, []

    def end(self) -> None:
        self.write(self._decode_new())

    def _decode_new(self) -> str:
        written = self.codec.decode(self._written)
        return self.codec.decode(self._written + self._new)[len(written) :]
