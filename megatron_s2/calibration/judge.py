"""What a pattern really costs: losses of whole texts and needles in a run with it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_s2.calibration.layered_model import Attend, LayeredModel
from megatron_s2.calibration.needles import Needle


@dataclass(frozen=True)
class Answer:
    """How a model answers the question of a needle.

    Args:
        kind, depth: of the needle.
        length: number of tokens of the text with needle and question.
        log_prob: mean log-probability of the tokens of the right answer.
        found: whether greedy decoding gives the right answer.
    """

    kind: str
    depth: float
    length: int
    log_prob: float
    found: bool


@torch.no_grad()
def answer(model: LayeredModel, needle: Needle, attend: Attend) -> Answer:
    """Returns how a model with an attention answers.

    One pass over question and right answer says both: greedy decoding gives the answer exactly if each of its
    tokens is the most probable one after those before it.
    """
    hidden = model.run(needle.tokens[:-1], attend)[:, -needle.answer :]
    log_probs = model.logits(hidden)[0].log_softmax(-1)
    labels = needle.tokens[-needle.answer :].to(model.device)
    right = log_probs.gather(-1, labels[:, None])[:, 0]
    found = bool((log_probs.argmax(-1) == labels).all())
    return Answer(needle.kind, needle.depth, len(needle.tokens) - 1, right.mean().item(), found)


@torch.no_grad()
def text_loss(model: LayeredModel, texts: Iterable[Tensor], attend: Attend) -> float:
    """Returns the mean cross entropy in nats per token over texts, each int64 `[seq_length + 1]`."""
    total, count = 0.0, 0
    for text in texts:
        losses = model.token_losses(model.run(text[:-1], attend), text[1:])
        total += losses.double().sum().item()
        count += losses.numel()
    return total / count
