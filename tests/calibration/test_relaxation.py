"""A mixture of candidates: its corners are the patterns that runs use, its gradient is that of the loss."""

import numpy as np
import pytest
import torch
from tiny_llama import tiny_llama
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_s2.calibration.candidates import Candidates, Choice
from megatron_s2.calibration.judge import text_loss
from megatron_s2.calibration.layered_model import LayeredModel, dense_attention, pattern_attention
from megatron_s2.calibration.relaxation import Context, Probe, Relaxation

TOKENS, BLOCK, START = 160, 16, 128
PLAN = (Choice(1, 1, (0, 1)), Choice(3, 0, (4, 0)), Choice(3, 1, (1, 1)))


@pytest.fixture(scope="module")
def reference():
    return tiny_llama(vocab_size=97, layers=3, initializer_range=0.3)


@pytest.fixture(scope="module")
def tokens():
    return torch.from_numpy(np.random.default_rng(0).integers(0, 97, TOKENS + 1))


@pytest.fixture(scope="module")
def expected(reference, tokens):
    """Losses by transformers itself; before its attention is replaced."""
    with torch.no_grad():
        log_probs = reference(input_ids=tokens[None, :-1]).logits.log_softmax(-1)
    return -log_probs[0].gather(-1, tokens[1:, None])[:, 0]


@pytest.fixture(scope="module")
def model(reference, expected):
    return LayeredModel(reference)


@pytest.fixture(scope="module")
def candidates():
    return Candidates(3, 2, TOKENS, BLOCK, windows=(1, 3), sinks=(0, 1), strides=(0, 4))


def corner(candidates, plan):
    alpha = torch.zeros(3, 2, len(candidates.all))
    return of_rows(alpha.scatter(2, torch.from_numpy(candidates.places(plan))[..., None], 1.0))


def of_rows(alpha, rows=TOKENS - START):
    return alpha[:, :, None].repeat(1, 1, rows, 1)


def test_a_run_with_dense_attention_is_that_of_transformers(model, tokens, expected):
    losses = model.token_losses(model.run(tokens[:-1], dense_attention), tokens[1:])
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)
    assert text_loss(model, [tokens], dense_attention) == pytest.approx(expected.mean().item(), rel=1e-5)


@pytest.mark.parametrize("stop", [TOKENS, TOKENS - 5])
def test_corners_of_the_mixture_are_plans(model, candidates, tokens, stop):
    tokens = tokens[: stop + 1]
    attend = pattern_attention(candidates.settings(PLAN))
    exact = model.token_losses(model.run(tokens[:-1], attend), tokens[1:])
    probe = Probe(tokens, START, scored=20)
    relaxation = Relaxation(model, candidates)
    hidden = relaxation.hidden(
        probe, Context.run(model, tokens[:START], attend), corner(candidates, PLAN)[:, :, : probe.rows]
    )
    losses = model.token_losses(hidden, probe.labels)
    torch.testing.assert_close(losses, exact[-20:], rtol=1e-4, atol=1e-4)


def test_a_divergence_is_that_of_the_predictions(model, tokens):
    narrow = Candidates(3, 2, TOKENS, BLOCK, (1,), (0,), (0,)).settings((Choice(1, 0, (0, 0)),) * 3)
    dense, other = (model.run(tokens[:-1], pattern_attention(settings)) for settings in (None, narrow))
    p, q = model.logits(dense)[0].softmax(-1), model.logits(other)[0].softmax(-1)
    expected = (p * (p / q).log()).sum(-1)
    assert expected.max() > 0.1
    torch.testing.assert_close(model.divergences(other, dense), expected, rtol=1e-3, atol=1e-5)


def test_the_gradient_is_that_of_the_loss(model, candidates, tokens):
    probe = Probe(tokens, START, scored=32)
    context = Context.run(model, tokens[:START], dense_attention)
    relaxation = Relaxation(model, candidates)
    random = np.random.default_rng(1)
    alpha = of_rows(torch.from_numpy(random.dirichlet(np.ones(len(candidates.all)), (3, 2))).float())
    alpha.requires_grad_()

    def loss(alpha):
        return model.token_losses(relaxation.hidden(probe, context, alpha), probe.labels).mean()

    loss(alpha).backward()
    step = corner(candidates, PLAN) - alpha.detach()
    by_difference = [loss(alpha.detach() + t * step) for t in (-0.01, 0.01)]
    slope = float(by_difference[1] - by_difference[0]) / 0.02
    assert float((alpha.grad * step).sum()) == pytest.approx(slope, rel=0.02, abs=1e-4)


def test_what_is_not_kept_is_computed_again(model, candidates, tokens, monkeypatch):
    probe = Probe(tokens, START, scored=32)
    relaxation = Relaxation(model, candidates)
    context = Context.run(model, tokens[:START], dense_attention)
    gradients = []
    for kept in (2**30, 0):
        monkeypatch.setattr("megatron_s2.calibration.relaxation._KEPT_BYTES", kept)
        alpha = of_rows(torch.full((3, 2, len(candidates.all)), 1 / len(candidates.all))).requires_grad_()
        model.token_losses(relaxation.hidden(probe, context, alpha), probe.labels).mean().backward()
        gradients.append(alpha.grad)
    torch.testing.assert_close(*gradients)


def test_another_family_is_refused():
    config = AutoConfig.for_model("gpt2", n_layer=1, n_head=1, n_embd=8, vocab_size=11)
    with pytest.raises(ValueError, match=r"^model_type gpt2: must be one of "):
        LayeredModel(AutoModelForCausalLM.from_config(config))
