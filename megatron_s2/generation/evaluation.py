"""The loss of a model on a data set, so that a conversion or an attention pattern can be judged.

The data set is one stream of tokens, in the order of its documents, cut into windows of `seq_length` tokens
that follow one another; each predicts its next tokens. Nothing is shuffled, no token is predicted twice.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_s2.checkpoint.model import FAMILIES

# Tokens whose logits exist at a time: of 32768 tokens and 128256 words they would take 17 GB in float32.
PIECE = 1024


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
        path = Path(f"{prefix}{suffix}")
        if not path.is_file():
            raise ValueError(f"--data-path {prefix}: there is no file {path}")
        if path.stat().st_size == 0:
            raise ValueError(f"--data-path {prefix}: {path} is empty")
    try:
        data = IndexedDataset(str(prefix))
    except (AssertionError, struct.error, ValueError, IndexError) as error:
        raise ValueError(f"--data-path {prefix}: {prefix}.idx is damaged: {error}") from error
    size = int(np.sum(data.sequence_lengths)) * np.dtype(data.index.dtype).itemsize
    if Path(f"{prefix}.bin").stat().st_size < size:
        raise ValueError(f"--data-path {prefix}: {prefix}.bin is shorter than the {size} bytes of its index")
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


@dataclass(frozen=True)
class Judged:
    """A model whose loss can be asked for.

    Args:
        losses: of `[batch, tokens + 1]` int64 on the CPU, the cross entropy of each next token,
            `[batch, tokens]`; raises ValueError for a token that is not in the vocabulary.
        positions: that the model knows; beyond them its loss means nothing.
        notes: what to know of the model before its loss is compared with another's.
    """

    losses: Callable[[Tensor], Tensor]
    positions: int
    notes: tuple[str, ...] = ()


def hugging_face_model(directory: str | Path, dtype: str = "auto") -> Judged:
    """A transformers model of one of the families that are converted; with S2 attention where its config.json
    says so.

    Raises:
        ValueError: the directory holds no such model, or not all of it.
    """
    from megatron_s2.generation.hugging_face import load_pretrained

    model = load_pretrained(directory, dtype)
    config = model.config
    if config.model_type not in FAMILIES:
        # What others do to logits (scale them, say) is not known here.
        raise ValueError(
            f"--hf {directory}: model_type {config.model_type}: must be one of {', '.join(FAMILIES)}"
        )

    def losses(tokens: Tensor) -> Tensor:
        tokens = _known(tokens, config.vocab_size).to(model.device)
        hidden = model.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        pieces = [
            F.cross_entropy(model.lm_head(states).float().transpose(1, 2), next_tokens, reduction="none")
            for states, next_tokens in zip(hidden.split(PIECE, 1), tokens[:, 1:].split(PIECE, 1))
        ]
        return torch.cat(pieces, 1)

    return Judged(losses, config.max_position_embeddings)


def megatron_model(directory: str | Path) -> Judged:
    """The GPTModel of a checkpoint, whose losses are those that its training computes.

    Raises:
        ValueError: the directory holds no checkpoint that can be loaded.
    """
    from megatron_s2.generation.loading import load_gpt

    if not Path(directory).is_dir():
        raise ValueError(f"--load {directory}: is no directory")
    loaded = load_gpt(Path(directory), needs_cache=False, needs_tokenizer=False)
    device = next(loaded.model.parameters()).device

    has_table = loaded.model.position_embedding_type == "learned_absolute"

    def losses(tokens: Tensor) -> Tensor:
        tokens = _known(tokens, loaded.vocab_size).to(device)
        if has_table and tokens.shape[1] - 1 > loaded.positions:
            raise ValueError(
                f"--seq-length {tokens.shape[1] - 1}: must be at most {loaded.positions}, its positions"
            )
        positions = torch.arange(tokens.shape[1] - 1, device=device).expand(tokens.shape[0], -1)
        return loaded.model(
            tokens[:, :-1],
            positions,
            None,
            labels=tokens[:, 1:],
            runtime_gather_output=True,
            output_processor=_losses_in_pieces,
        )

    notes = [] if loaded.note is None else [loaded.note]
    if (padding := loaded.padded_vocab_size - loaded.vocab_size) > 0:
        notes.append(
            f"the loss counts {padding} rows of vocabulary padding, as its training does and --hf does not"
        )
    return Judged(losses, loaded.positions, tuple(notes))


def _losses_in_pieces(
    *, hidden_states, output_layer, output_weight, scale_logits, compute_language_model_loss, labels, **_
) -> Tensor:
    """`[batch, tokens]` of hidden states `[tokens, batch, hidden]`."""
    pieces = []
    for states, next_tokens in zip(hidden_states.split(PIECE), labels.split(PIECE, 1)):
        logits, _ = output_layer(states, weight=output_weight)
        pieces.append(compute_language_model_loss(next_tokens.contiguous(), scale_logits(logits)))
    return torch.cat(pieces, 1)


def _known(tokens: Tensor, vocab_size: int) -> Tensor:
    least, most = (int(token) for token in tokens.aminmax())
    if least < 0 or most >= vocab_size:
        bad = least if least < 0 else most
        raise ValueError(f"--data-path: has token {bad}, which is none of the model's {vocab_size}")
    return tokens


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
