"""What Megatron computes with a checkpoint: the user's command up to its first forward pass.

`logits` starts one process for all runs, because a start costs 8 s; as a script, this file is that process.
"""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import torch

from megatron_s2 import pretrain
from megatron_s2.training import forward_step as gpt

_ONE_STEP = """
    --micro-batch-size 1 --global-batch-size 1 --train-iters 1 --eval-iters 1 --eval-interval 1 --skip-train
    --lr 1e-3 --num-workers 0 --mock-data --tokenizer-type NullTokenizer --exit-on-missing-checkpoint
"""


def logits(directory: Path, checkpoints: dict[str, Path], tokens: torch.Tensor) -> dict[str, torch.Tensor]:
    """Logits `[batch, seq, padded vocabulary]` of each converted checkpoint, by name, loaded with `--load`
    and the flags in its `resume.args`.

    Args:
        directory: for files on the way.
        tokens: int64 `[batch, seq]`.
    """
    torch.save(tokens, directory / "tokens.pt")
    jobs = {
        name: [*(path / "resume.args").read_text().split(), "--load", str(path)]
        for name, path in checkpoints.items()
    }
    (directory / "jobs.json").write_text(json.dumps(jobs))
    done = subprocess.run([sys.executable, __file__, directory], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stdout[-4000:] + done.stderr[-4000:])
    return torch.load(directory / "logits.pt")


class _ComputedError(Exception):
    """Ends a run: it has the logits."""

    def __init__(self, logits: torch.Tensor):
        self.logits = logits


def _run_all(directory: Path) -> None:
    from megatron.training import training

    tokens = torch.load(directory / "tokens.pt")
    length = tokens.shape[1]

    def forward_step(data_iterator, model):
        positions = torch.arange(length).expand_as(tokens)
        later = torch.ones(1, 1, length, length).triu(1).bool()
        raise _ComputedError(model(tokens, positions, later).float())

    gpt.forward_step = forward_step
    computed = {}
    for name, flags in json.loads((directory / "jobs.json").read_text()).items():
        try:
            pretrain.train([*shlex.split(_ONE_STEP), "--seq-length", str(length), *flags])
        except _ComputedError as end:
            computed[name] = end.logits
        training.destroy_global_state()
    torch.save(computed, directory / "logits.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    with torch.no_grad():
        _run_all(Path(sys.argv[1]))
