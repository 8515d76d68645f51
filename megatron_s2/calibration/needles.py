"""Needles: statements hidden in a text, which the model is asked to repeat at its end.

Four kinds, with names and values drawn at random: a four-digit code in a sentence, an assignment, a word in a
comment, and an entry of a mapping. A needle is found if greedy decoding gives exactly its answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from megatron_s2.generation.evaluation import windows

CALIBRATED_KINDS = ("code", "assignment", "comment")  # those that calibration hides
KINDS = (*CALIBRATED_KINDS, "entry")

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


def hide_needles(
    tokenizer: PreTrainedTokenizerBase, text: Tensor, places: Sequence[tuple[str, float]], random: Random
) -> list[Needle]:
    """Hides needles in a text, each at the beginning of a line if there is one near its depth.

    Args:
        text: tokens, int64 `[seq_length + 1]`; needles and question replace the last of them.
        places: kind and depth, between 0 and 1, of each needle.

    Returns:
        For each needle the text with all of them and the question for this one. The texts differ at their
        ends only.

    Raises:
        ValueError: the text is too short for the needles.
    """
    things = random.sample(_THINGS, len(places))
    parts = []
    for (kind, _), thing in zip(places, things):
        statement, answer = _sentence(kind, thing, random)
        words = statement + answer + "\n", "\n" + statement, answer
        parts.append([torch.tensor(tokenizer.encode(part, add_special_tokens=False)) for part in words])
    hidden = sum(len(statement) for statement, _, _ in parts)
    asked = max(len(question) + len(answer) for _, question, answer in parts)
    kept = len(text) - hidden - asked
    if kept < 1:
        raise ValueError(
            f"--seq-length {len(text) - 1}: must be more than the {hidden + asked} tokens of needles"
        )
    starts = [_line_start(tokenizer, text[:kept], round(depth * kept)) for _, depth in places]
    body, done = [], 0
    for start, (statement, _, _) in sorted(zip(starts, parts), key=lambda item: item[0]):
        body += [text[done:start], statement]
        done = start
    body = torch.cat([*body, text[done:]])
    needles = []
    for (kind, depth), (_, question, answer) in zip(places, parts):
        before = body[: len(text) - len(question) - len(answer)]
        needles.append(Needle(kind, depth, torch.cat([before, question, answer]), len(answer), len(question)))
    return needles


def _sentence(kind: str, thing: str, random: Random) -> tuple[str, str]:
    """Returns a statement about a thing without its answer, which is the question too, and the answer."""
    if kind == "comment":
        return f"# The password of the {thing} is", f" {random.choice(_WORDS)}"
    statements = {
        "code": f"The secret code of the {thing} is",
        "assignment": f"{thing}_limit =",
        "entry": f'    "{thing}":',
    }
    return statements[kind], f" {random.randrange(1000, 10000)}"


def _line_start(tokenizer: PreTrainedTokenizerBase, text: Tensor, place: int) -> int:
    """Returns where the last line begins that begins at most `_REACH` tokens before `place`, else `place`."""
    for start in range(place, max(0, place - _REACH), -1):
        if "\n" in tokenizer.decode([int(text[start - 1])]):
            return start
    return place


def needle_grid(
    tokenizer: PreTrainedTokenizerBase,
    prefix: str | Path,
    lengths: Sequence[int],
    depths: Sequence[float],
    kinds: Sequence[str],
    seed: int,
) -> list[Needle]:
    """Returns a needle of each kind for each length and depth, each in a text of its own, drawn at random.

    Args:
        prefix: indexed dataset of the tokenizer's tokens, as for `windows`.
        lengths: numbers of tokens of the texts.

    Raises:
        ValueError: the dataset is missing, damaged or too short, or a length too short for a needle.
    """
    random, needles = Random(seed), []
    for length in lengths:
        texts = windows(prefix, length, len(depths) * len(kinds), seed=seed)
        places = ((depth, kind) for depth in depths for kind in kinds)
        for (depth, kind), [text] in zip(places, texts):
            needles += hide_needles(tokenizer, text, [(kind, depth)], random)
    return needles
