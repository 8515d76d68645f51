"""Text to tokens and back, for the tokenizers that a model may come with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

# transformers makes an empty tokenizer of a directory with none of these.
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json")
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


def hugging_face_text(directory: Path, stop: frozenset[int]) -> Text:
    """The tokenizer in a Hugging Face directory; `stop` are the model's own end tokens.

    Raises:
        ValueError: there is none.
    """
    if not any((directory / name).is_file() for name in _TOKENIZERS):
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


def megatron_text(tokenizer, kind: str) -> Text:
    """The tokenizer of a Megatron run; `kind` is its `--tokenizer-type`."""
    stop = frozenset({tokenizer.eod})
    if kind == "NullTokenizer":
        return token_ids(stop)

    def decode(ids: Sequence[int]) -> str:
        return tokenizer.detokenize([token for token in ids if token not in stop])

    return Text(tokenizer.tokenize, decode, stop)


@dataclass
class Stream:
    """Text of a growing list of tokens, given out as it becomes certain."""

    text: Text
    write: Callable[[str], object]
    _tokens: list[int] = field(default_factory=list)
    _written: int = 0

    def add(self, token: int) -> None:
        self._tokens.append(token)
        text = self.text.decode(self._tokens)
        if not text.endswith(_UNFINISHED):
            self.write(text[self._written :])
            self._written = len(text)

    def end(self) -> None:
        self.write(self.text.decode(self._tokens)[self._written :])
