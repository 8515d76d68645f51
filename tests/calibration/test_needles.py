"""Needles: where they lie, what is asked, and when they count as found."""

from random import Random

import pytest
import torch

from megatron_s2.calibration.needles import KINDS, hide_needles


class Characters:
    """A tokenizer with a token for each character."""

    def encode(self, text: str, add_special_tokens: bool) -> list[int]:
        assert not add_special_tokens
        return [ord(character) for character in text]

    def decode(self, tokens: list[int]) -> str:
        return "".join(map(chr, tokens))


TEXT = torch.tensor([ord(character) for character in "some text of 20 char\n" * 40])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_lies_at_its_depth_and_is_asked_for_at_the_end(kind, depth):
    needle = hide_needles(Characters(), TEXT, [(kind, depth)], Random(1))[0]
    assert needle.tokens.shape == TEXT.shape
    text = Characters().decode(needle.tokens.tolist())
    question, answer = text[-needle.answer - needle.question : -needle.answer], text[-needle.answer :]
    assert question.startswith("\n") and answer.startswith(" ")
    statement = question.removeprefix("\n") + answer + "\n"
    assert text.count(statement) == 1
    place = text.index(statement)
    assert place == 0 or text[place - 1] == "\n"
    body = len(TEXT) - len(statement) - needle.question - needle.answer
    assert abs(place - depth * body) <= 21


def test_names_and_values_follow_the_seed():
    first, same, other = (
        hide_needles(Characters(), TEXT, [("code", 0.3)], Random(seed))[0] for seed in (1, 1, 2)
    )
    assert torch.equal(first.tokens, same.tokens) and not torch.equal(first.tokens, other.tokens)


def test_needles_of_one_text_differ_at_its_end_only():
    needles = hide_needles(
        Characters(), TEXT, [(kind, 0.8 - 0.25 * n) for n, kind in enumerate(KINDS)], Random(3)
    )
    first, *others = needles
    texts = [Characters().decode(needle.tokens.tolist()) for needle in needles]
    for needle in others:
        common = len(TEXT) - max(n.question + n.answer for n in (first, needle))
        assert torch.equal(needle.tokens[:common], first.tokens[:common])
    for needle, text in zip(needles, texts):
        statement = text[-needle.question - needle.answer + 1 :] + "\n"
        assert all(other.count(statement) == 1 for other in texts)


def test_a_text_without_room_is_refused():
    with pytest.raises(ValueError, match=r"^--seq-length 29: must be more than the \d+ tokens of needles"):
        hide_needles(Characters(), TEXT[:30], [("code", 0.5)], Random(0))
