"""The loss of a model on a data set, so that a conversion or an attention pattern can be judged.

The data set is one stream of tokens, in the order of its documents, cut into windows of `seq_length` tokens
that follow one another; each predicts its next tokens. Nothing is shuffled, no token is predicted twice.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Evaluation:
    """Mean cross entropy over tokens, in nats.

    Args:
        loss: in nats per token.
        tokens: predicted.
    """

    loss: float
    tokens: int

    def __str__(self) -> str:
        """One line."""
        perplexity = math.exp(self.loss) if self.loss < 700 else math.inf
        return f"loss {self.loss:.6f}, perplexity {perplexity:.4f}, over {self.tokens} tokens"


def windows(
    prefix: str | Path, seq_length: int, samples: int | None = None, batch: int = 1
) -> Iterator[Tensor]:
    """Batches of windows of an indexed data set, each with the token after it: int64
    `[<= batch, seq_length + 1]`.

    Args:
        prefix: of the `.bin` and `.idx` files that scripts/preprocess_data.py wrote.
        seq_length: tokens of a window.
        samples: the first so many windows; None for all whole ones.
        batch: windows at a time.

    Raises:
        ValueError: an argument is not positive, the files are not there, or hold too few tokens.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for flag, value in (("--seq-length", seq_length), ("--samples", samples), ("--micro-batch-size", batch)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value}: must be >= 1")
    for suffix in (".bin", ".idx"):
        if not Path(f"{prefix}{suffix}").is_file():
            raise ValueError(f"--data-path {prefix}: there is no file {prefix}{suffix}")
    data = IndexedDataset(str(prefix))
    there = max(int(np.sum(data.sequence_lengths)) - 1, 0) // seq_length
    wanted = there if samples is None else samples
    if not 1 <= wanted <= there:
        raise ValueError(
            f"--data-path {prefix}: has {there} windows of {seq_length} tokens, not {max(wanted, 1)}"
        )
    return _batches(data, seq_length, wanted, batch)


def evaluate(token_losses: Callable[[Tensor], Tensor], batches: Iterator[Tensor]) -> Evaluation:
    """The mean over all tokens of all batches.

    Args:
        token_losses: of `[batch, tokens + 1]` int64 on the CPU, the cross entropy of each next token,
            `[batch, tokens]`.
        batches: of whole windows.
    """
    total, count = 0.0, 0
    for tokens in batches:
        with torch.no_grad():
            losses = token_losses(tokens)
        total += losses.double().sum().item()
        count += losses.numel()
    return Evaluation(total / count, count)


def hugging_face_losses(directory: str | Path, dtype: str = "auto") -> Callable[[Tensor], Tensor]:
    """Those of a transformers model; with S2 attention where its config.json says so.

    Raises:
        ValueError: the directory holds no model that can be loaded.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    import megatron_s2.hf  # registers "s2"

    if not (Path(directory) / "config.json").is_file():
        raise ValueError(f"--hf {directory}: is no directory with a config.json")
    sparse = getattr(AutoConfig.from_pretrained(directory), "s2_attention", None) is not None
    model = AutoModelForCausalLM.from_pretrained(
        directory, dtype=dtype, attn_implementation=megatron_s2.hf.NAME if sparse else "sdpa"
    )
    model = model.to("cuda" if torch.cuda.is_available() else "cpu").eval()

    def losses(tokens: Tensor) -> Tensor:
        tokens = tokens.to(model.device)
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
        return torch.nn.functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], reduction="none")

    return losses


def megatron_losses(directory: str | Path) -> Callable[[Tensor], Tensor]:
    """Those of the GPTModel of a checkpoint, as its training computes them.

    Raises:
        ValueError: the directory holds no checkpoint that can be loaded.
    """
    from megatron_s2.generation.checkpoint import load_gpt

    if not Path(directory).is_dir():
        raise ValueError(f"--load {directory}: is no directory")
    model = load_gpt(Path(directory), needs_cache=False).model
    device = next(model.parameters()).device

    def losses(tokens: Tensor) -> Tensor:
        tokens = tokens.to(device)
        positions = torch.arange(tokens.shape[1] - 1, device=device).expand(tokens.shape[0], -1)
        return model(tokens[:, :-1], positions, None, labels=tokens[:, 1:].contiguous())

    return losses


def _batches(data, seq_length: int, samples: int, batch: int) -> Iterator[Tensor]:
    """Windows of the stream, of which only what is needed is in memory."""
    rows: list[np.ndarray] = []
    stream, held = _tokens(data), np.empty(0, dtype=np.int64)
    for left in range(samples, 0, -1):
        while held.size < seq_length + 1:
            held = np.concatenate([held, next(stream)])
        rows.append(held[: seq_length + 1])
        held = held[seq_length:]
        if len(rows) == batch or left == 1:
            yield torch.from_numpy(np.stack(rows))
            rows = []


def _tokens(data) -> Iterator[np.ndarray]:
    for sequence in range(len(data)):
        yield data[sequence].astype(np.int64)
