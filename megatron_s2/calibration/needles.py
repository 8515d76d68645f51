"""Needles: statements hidden in a text, which the model is asked to repeat at its end.

Three kinds, with names and values drawn at random: a four-digit code in a sentence, an assignment, and a word
in a comment. A needle is found if greedy decoding gives exactly its answer.
"""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

KINDS = ("code", "assignment", "comment")

_THINGS = (
    *("harbor", "garden", "library", "bridge", "castle", "market", "tunnel", "museum", "station", "forest"),
    *("factory", "island", "tower", "valley", "kitchen", "school", "airport", "temple", "archive", "village"),
)
_WORDS = (
    *("copper", "winter", "orange", "silver", "rabbit", "violin", "thunder", "pepper", "window", "candle"),
    *("marble", "pocket", "summer", "yellow", "dragon", "button", "planet", "cotton", "ladder", "river"),
)
# Tokens around the wanted depth among which the end of a line is looked for.
_REACH = 200


@dataclass(frozen=True)
class Needle:
    """A text with a needle and the question at its end.

    Args:
        kind: one of `KINDS`.
        depth: place of the needle, as a share of the text before the question.
        tokens: int64 `[seq_length + 1]`; all but the last are inputs.
        answer: number of tokens of the answer, the last ones.
        question: number of tokens of the question before it.
    """

    kind: str
    depth: float
    tokens: Tensor
    answer: int
    question: int


def make_needle(
    tokenizer: PreTrainedTokenizerBase, text: Tensor, kind: str, depth: float, random: Random
) -> Needle:
    """Hides a needle in a text, at the beginning of a line if there is one near its depth.

    Args:
        text: tokens, int64 `[seq_length + 1]`; the needle and the question replace the last of them.
        kind: one of `KINDS`.
        depth: between 0 and 1.

    Raises:
        ValueError: the text is too short for a needle.
    """
    statement, answer = _sentences(kind, random)
    hidden, asked, answered = (
        torch.tensor(tokenizer.encode(part, add_special_tokens=False))
        for part in (statement + answer + "\n", "\n" + statement, answer)
    )
    kept = len(text) - len(hidden) - len(asked) - len(answered)
    if kept < 1:
        raise ValueError(
            f"--seq-length {len(text) - 1}: must be more than the {len(text) - kept} tokens of a needle"
        )
    place = _line_start(tokenizer, text[:kept], round(depth * kept))
    tokens = torch.cat([text[:place], hidden, text[place:kept], asked, answered])
    return Needle(kind, depth, tokens, len(answered), len(asked))


def _sentences(kind: str, random: Random) -> tuple[str, str]:
    """Returns a statement without its answer, which is the question too, and the answer."""
    thing, digits = random.choice(_THINGS), str(random.randrange(1000, 10000))
    if kind == "code":
        return f"The secret code of the {thing} is", f" {digits}"
    if kind == "assignment":
        return f"{thing}_limit =", f" {digits}"
    return f"# The password of the {thing} is", f" {random.choice(_WORDS)}"


def _line_start(tokenizer: PreTrainedTokenizerBase, text: Tensor, place: int) -> int:
    """Returns the number of tokens before the last line that begins at most `_REACH` tokens before `place`."""
    for start in range(place, max(0, place - _REACH), -1):
        if "\n" in tokenizer.decode([int(text[start - 1])]):
            return start
    return place
