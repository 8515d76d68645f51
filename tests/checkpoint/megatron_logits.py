"""Logits that Megatron computes with a checkpoint, by the user's command up to its first forward pass."""

import shlex
from pathlib import Path
from unittest import mock

import torch
from megatron_run import call_in_fork

from megatron_s2 import pretrain
from megatron_s2.training import forward_step as training_step

ONE_STEP = """
    --micro-batch-size 1 --global-batch-size 1 --train-iters 1 --eval-iters 1 --eval-interval 1 --skip-train
    --lr 1e-3 --num-workers 0 --mock-data --tokenizer-type NullTokenizer --exit-on-missing-checkpoint
"""


def logits(checkpoints: dict[str, Path], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the logits `[batch, seq, padded vocabulary]` of each converted checkpoint by name, loaded with
    `--load` and the flags in its `resume.args`.

    Args:
        tokens: int64 `[batch, seq]`.
    """
    flags = {
        name: [*(path / "resume.args").read_text().split(), "--load", str(path)]
        for name, path in checkpoints.items()
    }
    return call_in_fork("megatron_logits", "run_all", flags, tokens).returned


class _ComputedError(Exception):
    """Ends a run once it has computed the logits."""

    def __init__(self, logits: torch.Tensor):
        self.logits = logits


@torch.no_grad()
def run_all(flags: dict[str, list[str]], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Returns the logits of each list of flags."""
    from megatron.training import training

    length = tokens.shape[1]

    def forward_step(data_iterator, model):
        positions = torch.arange(length).expand_as(tokens)
        later = torch.ones(1, 1, length, length).triu(1).bool()
        raise _ComputedError(model(tokens, positions, later).float())

    computed = {}
    for name, words in flags.items():
        try:
            with mock.patch.object(training_step, "forward_step", forward_step):
                pretrain.train([*shlex.split(ONE_STEP), "--seq-length", str(length), *words])
        except _ComputedError as end:
            computed[name] = end.logits
        training.destroy_global_state()
    return computed
