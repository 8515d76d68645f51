"""Text to tokens and back, for the tokenizers that a model may come with."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from megatron_s2.data.tokenizer import has_tokenizer

_UNFINISHED = "\ufffd"  # what a decoder shows for bytes that are no character yet


@dataclass(frozen=True)
class Text:
    """How a model reads and writes.

    Args:
        encode: token ids of a prompt; raises ValueError for what it cannot read.
        decode: text of token ids.
        stop: tokens that end a text.
    """

    encode: Callable[[str], list[int]]
    decode: Callable[[Sequence[int]], str]
    stop: frozenset[int]


def token_ids(stop: frozenset[int] = frozenset()) -> Text:
    """No tokenizer: the text is the token ids, with spaces between."""

    def encode(text: str) -> list[int]:
        try:
            return [int(word) for word in text.split()]
        except ValueError:
            raise ValueError(f"--prompt {text!r}: must be token ids, such as '12 7 30'") from None

    return Text(encode, lambda ids: " ".join(map(str, ids)), stop)


def stop_tokens(directory: Path) -> frozenset[int]:
    """The tokens that end a text, as a Hugging Face directory says; none where it does not.

    Raises:
        ValueError: its files are damaged.
    """
    for path in (directory / "generation_config.json", directory / "config.json"):
        if not path.is_file():
            continue
        try:
            said = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id")
        except (ValueError, AttributeError) as error:
            raise ValueError(f"{path}: is not read: {error}") from None
        if said is not None:
            return frozenset([said] if isinstance(said, int) else said)
    return frozenset()


def hugging_face_text(directory: Path, stop: frozenset[int]) -> Text:
    """The tokenizer in a Hugging Face directory; `stop` are the model's own end tokens.

    Raises:
        ValueError: there is none.
    """
    if not has_tokenizer(directory):
        raise ValueError(f"--tokenizer-model {directory}: has no tokenizer; give another, or --token-ids")
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(directory)
    if not stop and tokenizer.eos_token_id is not None:
        stop = frozenset({tokenizer.eos_token_id})
    return Text(
        lambda text: tokenizer(text).input_ids,
        lambda ids: tokenizer.decode(  # cleaned up, text may get shorter by another token
            ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
        ),
        stop,
    )


def megatron_text(tokenizer, kind: str, stop: frozenset[int]) -> Text:
    """The tokenizer of a Megatron run; `kind` is its `--tokenizer-type`, `stop` the model's own end tokens.

    The end token of a NullTokenizer is made up, and need not be one of the model's.
    """
    if kind == "NullTokenizer":
        return token_ids(stop)
    stop = stop or frozenset({tokenizer.eod})

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.detokenize([token for token in ids if token not in stop], skip_special_tokens=True)

    return Text(tokenizer.tokenize, decode, stop)


@dataclass
class Stream:
    """Text of a growing list of tokens, given out as it becomes certain.

    What a token reads as may depend on those before it. So new ones are decoded behind the ones that were
    written last, not behind all.
    """

    text: Text
    write: Callable[[str], object]
    _written: list[int] = field(default_factory=list)
    _new: list[int] = field(default_factory=list)

    def add(self, token: int) -> None:
        self._new.append(token)
        text = self._text_of_new()
        if text and not text.endswith(_UNFINISHED):
            self.write(text)
            self._written, self._new = self._new, []

    def end(self) -> None:
        self.write(self._text_of_new())

    def _text_of_new(self) -> str:
        before = self.text.decode(self._written)
        return self.text.decode(self._written + self._new)[len(before) :]
