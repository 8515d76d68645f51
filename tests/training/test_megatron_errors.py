"""What Megatron refuses is said with the flags that it concerns.

Assertions here must be as Python raises them: PYTEST_DONT_REWRITE.
"""

import json
from argparse import Namespace

import pytest

from megatron_s2.training import megatron_errors
from megatron_s2.training.megatron_errors import errors_that_name_flags

ARGS = Namespace(seq_length=256, max_position_embeddings=128, train_samples=8, iters=None)


def refusal(check, monkeypatch) -> str:
    monkeypatch.setattr(megatron_errors, "failed_assertion", str)  # this file is not Megatron's
    with pytest.raises(ValueError) as refused, errors_that_name_flags(ARGS):
        check(ARGS)
    return str(refused.value)


def lengths(args):
    raise ValueError(f"max_position_embeddings ({args.max_position_embeddings}) < seq_length of other_things")


def samples(args):
    assert args.train_samples is None, "expected iteration-based training"


def named(args):
    raise ValueError("--seq-length 256: must be smaller than train_samples")


def test_an_error_without_arguments_keeps_its_class():
    with pytest.raises(json.JSONDecodeError), errors_that_name_flags(ARGS):
        json.loads("{")


@pytest.mark.parametrize(
    ("check", "message"),
    [
        (lengths, "--max-position-embeddings (128) < --seq-length of other_things"),
        (samples, "--train-samples: expected iteration-based training"),
        (named, "--seq-length 256: must be smaller than train_samples"),
    ],
)
def test_arguments_become_flags(check, message, monkeypatch):
    assert refusal(check, monkeypatch) == message


def test_a_failed_assertion_of_others_is_no_refusal():
    with pytest.raises(AssertionError), errors_that_name_flags(ARGS):
        samples(ARGS)
