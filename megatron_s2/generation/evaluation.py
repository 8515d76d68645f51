"""The loss of a model on a dataset, to compare the two sides of a conversion or two attention patterns.

The dataset is one stream of tokens, in the order of its documents, cut into consecutive windows of
`seq_length` tokens; each token of a window predicts the next one. Nothing is shuffled, and no token is
predicted twice.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_s2.checkpoint.families import FAMILIES
from megatron_s2.data.token_ids import Vocabulary
from megatron_s2.pattern import S2Settings
from megatron_s2.pattern.block_pattern import dense_pairs
from megatron_s2.report.table import aligned

# Tokens whose logits are in memory at a time. Those of 32768 tokens and a vocabulary of 128256 would take
# 17 GB in float32.
LOGITS_CHUNK = 1024


@dataclass(frozen=True)
class Evaluation:
    """The loss of a model on a dataset.

    Args:
        loss: mean cross entropy in nats per token.
        tokens: number of predicted tokens.
        window: tokens of a window.
        by_position: mean loss of each of the equal parts into which a window was cut, first to last.
    """

    loss: float
    tokens: int
    window: int
    by_position: tuple[float, ...]

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    def __str__(self) -> str:
        return f"loss {self.loss:.6f}, perplexity {self.perplexity:.4f}, over {self.tokens} tokens"

    def position_table(self) -> str:
        """Returns a table of the loss by position in the window, counted from 1."""
        part = self.window // len(self.by_position)
        rows = [("tokens", "loss")]
        for n, loss in enumerate(self.by_position):
            rows.append((f"{n * part + 1} to {(n + 1) * part}", f"{loss:.4f}"))
        return "\n".join(aligned(rows))


def windows(
    prefix: str | Path,
    seq_length: int,
    samples: int | None = None,
    batch: int = 1,
    seed: int | None = None,
) -> Iterator[Tensor]:
    """Yields windows of an indexed dataset, each with the token after it.

    Args:
        prefix: path of the `.bin` and `.idx` files without suffix, as scripts/preprocess_data.py prints it.
        seq_length: number of tokens of a window.
        samples: number of windows; None for all complete windows.
        batch: number of windows per batch.
        seed: chooses `samples` windows of all at random, in random order; None takes the first ones.

    Yields:
        Batches of tokens, int64 `[<= batch, seq_length + 1]`.

    Raises:
        ValueError: an argument is not positive, or the files are missing, damaged or too short.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    for flag, value in (("--seq-length", seq_length), ("--samples", samples), ("--micro-batch-size", batch)):
        if value is not None and value < 1:
            raise ValueError(f"{flag} {value}: must be >= 1")
    for suffix in (".bin", ".idx"):
        path = Path(f"{prefix}{suffix}")
        if not path.is_file():
            raise ValueError(f"--data-path {prefix}: there is not a file {path}")
        if path.stat().st_size == 0:
            raise ValueError(f"--data-path {prefix}: {path} is empty")
    try:
        dataset = IndexedDataset(str(prefix))
    except (AssertionError, struct.error, ValueError, IndexError) as error:
        raise ValueError(f"--data-path {prefix}: {prefix}.idx is damaged: {error}") from error
    tokens = int(np.sum(dataset.sequence_lengths))
    size = tokens * np.dtype(dataset.index.dtype).itemsize
    if Path(f"{prefix}.bin").stat().st_size < size:
        raise ValueError(f"--data-path {prefix}: {prefix}.bin is shorter than the {size} bytes of its index")
    available = max(tokens - 1, 0) // seq_length
    count = available if samples is None else samples
    if not 1 <= count <= available:
        raise ValueError(
            f"--data-path {prefix}: has {available} windows of {seq_length} tokens, not {max(count, 1)}"
        )
    chosen = range(count) if seed is None else Random(seed).sample(range(available), count)
    return _batches(dataset, seq_length, chosen, batch)


def check_position_parts(parts: int, seq_length: int) -> None:
    """Raises ValueError unless windows of `seq_length` tokens can be cut into equal parts."""
    if parts < 1 or seq_length % parts:
        raise ValueError(
            f"--position-parts {parts}: must be >= 1 and divide --seq-length {seq_length}; give another"
        )


def evaluate(
    token_losses: Callable[[Tensor], Tensor], batches: Iterator[Tensor], position_parts: int = 1
) -> Evaluation:
    """Returns the mean loss over all tokens of all batches, and by position.

    Args:
        token_losses: as `ScoredModel.token_losses`.
        batches: batches from `windows`.
        position_parts: number of equal parts of a window whose losses are told apart.

    Raises:
        ValueError: the parts do not divide the windows.
    """
    count, totals = 0, torch.zeros(position_parts, dtype=torch.float64)
    for tokens in batches:
        with torch.no_grad():
            losses = token_losses(tokens)
        window = losses.shape[1]
        check_position_parts(position_parts, window)
        totals += losses.double().sum(0).view(position_parts, -1).sum(1).cpu()
        count += losses.numel()
    by_position = (totals / (count / position_parts)).tolist()
    return Evaluation(totals.sum().item() / count, count, window, tuple(by_position))


@dataclass(frozen=True)
class ScoredModel:
    """A model whose loss can be computed.

    Args:
        token_losses: maps tokens, int64 `[batch, tokens + 1]` on the CPU, to the cross entropy of each next
            token, `[batch, tokens]`. Raises ValueError for a token that is not in the vocabulary.
        vocabulary: the tokens that the model knows.
        positions: number of positions that the model was made for; losses beyond it are meaningless.
        notes: what makes the loss incomparable with that of another model.
        read_pattern: returns the settings in a pattern file for the model; None if it cannot attend by one.
        set_pattern: makes the model attend by settings, or densely with None.
    """

    token_losses: Callable[[Tensor], Tensor]
    vocabulary: Vocabulary
    positions: int
    notes: tuple[str, ...] = ()
    read_pattern: Callable[[str], S2Settings] | None = None
    set_pattern: Callable[[S2Settings | None], None] | None = None


def compare_patterns(
    model: ScoredModel, files: Sequence[str], seq_length: int, batches: Callable[[], Iterator[Tensor]]
) -> str:
    """Returns a table of the losses of a dense model, dense and by each pattern file, without training.

    Its columns say what the last token of a window keeps of keys and values, how many query-key pairs a
    window has, both in percent of dense attention, and the loss.

    Args:
        files: pattern files, all of which are read before anything is computed.
        seq_length: tokens of a window.
        batches: returns the batches of `windows`, the same each time.

    Raises:
        ValueError: a file is not for the model.
    """
    patterns = [(file, model.read_pattern(file)) for file in files]
    model.set_pattern(None)
    dense = evaluate(model.token_losses, batches())
    rows = [
        ("pattern", "keys and values", "pairs", "loss", "over dense", "perplexity"),
        ("dense", "100.0%", "100.0%", f"{dense.loss:.4f}", "", f"{dense.perplexity:.4f}"),
    ]
    for file, settings in patterns:
        model.set_pattern(settings)
        found = evaluate(model.token_losses, batches())
        heads = settings.num_layers * settings.num_kv_heads
        tokens = sum(sum(settings.pattern(n + 1).kv_tokens(seq_length)) for n in range(settings.num_layers))
        kept, pairs = tokens / heads / seq_length, settings.mean_pairs(seq_length) / dense_pairs(seq_length)
        rows.append(
            (
                file,
                f"{kept:.1%}",
                f"{pairs:.1%}",
                f"{found.loss:.4f}",
                f"{found.loss - dense.loss:+.4f}",
                f"{found.perplexity:.4f}",
            )
        )
    return "\n".join([*aligned(rows), f"over {dense.tokens} tokens in windows of {seq_length}"])


def load_hugging_face(directory: str | Path, dtype: str = "auto") -> ScoredModel:
    """Loads a transformers model of a family that is converted, with S2 attention if its config.json has S2
    settings.

    Raises:
        ValueError: the directory has no such model, or an incomplete one.
    """
    from megatron_s2.generation.hugging_face import load_pretrained, pattern_of_file
    from megatron_s2.hf import set_pattern

    model = load_pretrained(directory, dtype)
    config = model.config
    if config.model_type not in FAMILIES:
        # Other families may transform the logits, for example scale them.
        raise ValueError(
            f"--hf {directory}: model_type {config.model_type}: must be one of {', '.join(FAMILIES)}"
        )

    vocabulary = Vocabulary(config.vocab_size, f"--hf {directory}")

    def token_losses(tokens: Tensor) -> Tensor:
        _check_tokens(tokens, vocabulary)
        tokens = tokens.to(model.device)
        hidden = model.base_model(input_ids=tokens[:, :-1], use_cache=False).last_hidden_state
        losses = [
            F.cross_entropy(model.lm_head(states).float().transpose(1, 2), labels, reduction="none")
            for states, labels in zip(hidden.split(LOGITS_CHUNK, 1), tokens[:, 1:].split(LOGITS_CHUNK, 1))
        ]
        return torch.cat(losses, 1)

    return ScoredModel(
        token_losses,
        vocabulary,
        config.max_position_embeddings,
        read_pattern=partial(pattern_of_file, model, directory),
        set_pattern=partial(set_pattern, model),
    )


def load_megatron(directory: str | Path) -> ScoredModel:
    """Loads the GPTModel of a checkpoint; its losses are those that training computes.

    Raises:
        ValueError: the directory has no checkpoint that can be loaded.
    """
    from megatron_s2.generation.loading import load_gpt

    if not Path(directory).is_dir():
        raise ValueError(f"--load {directory}: is not a directory")
    loaded = load_gpt(Path(directory), needs_cache=False, needs_tokenizer=False)
    device = next(loaded.model.parameters()).device
    vocabulary = Vocabulary(loaded.vocab_size, f"--load {directory}")
    has_position_table = loaded.model.position_embedding_type == "learned_absolute"

    def token_losses(tokens: Tensor) -> Tensor:
        _check_tokens(tokens, vocabulary)
        tokens = tokens.to(device)
        length = tokens.shape[1] - 1
        if has_position_table and length > loaded.positions:
            raise ValueError(
                f"--seq-length {length}: must be at most {loaded.positions}, the model's positions"
            )
        return loaded.model(
            tokens[:, :-1],
            torch.arange(length, device=device).expand(tokens.shape[0], -1),
            None,
            labels=tokens[:, 1:],
            runtime_gather_output=True,
            output_processor=_losses_in_chunks,
        )

    notes = [] if loaded.note is None else [loaded.note]
    if (padding := loaded.padded_vocab_size - loaded.vocab_size) > 0:
        notes.append(
            f"the loss counts {padding} rows of vocabulary padding, as its training does and --hf does not"
        )
    return ScoredModel(token_losses, vocabulary, loaded.positions, tuple(notes))


def _losses_in_chunks(
    *, hidden_states, output_layer, output_weight, scale_logits, compute_language_model_loss, labels, **_
) -> Tensor:
    """Returns the losses `[batch, tokens]` of hidden states `[tokens, batch, hidden]`."""
    losses = []
    for states, next_tokens in zip(hidden_states.split(LOGITS_CHUNK), labels.split(LOGITS_CHUNK, 1)):
        logits, _ = output_layer(states, weight=output_weight)
        losses.append(compute_language_model_loss(next_tokens.contiguous(), scale_logits(logits)))
    return torch.cat(losses, 1)


def _check_tokens(tokens: Tensor, vocabulary: Vocabulary) -> None:
    smallest, largest = (int(token) for token in tokens.aminmax())
    if smallest < 0 or largest >= vocabulary.size:
        raise ValueError(vocabulary.refusal("--data-path", smallest if smallest < 0 else largest))


def _batches(dataset, seq_length: int, chosen: Sequence[int], batch: int) -> Iterator[Tensor]:
    """Yields the windows with the numbers `chosen` in batches, with only one batch in memory."""
    ends = np.cumsum(dataset.sequence_lengths, dtype=np.int64)
    for first in range(0, len(chosen), batch):
        rows = [_read(dataset, ends, n * seq_length, seq_length + 1) for n in chosen[first : first + batch]]
        yield torch.from_numpy(np.stack(rows))


def _read(dataset, ends: np.ndarray, start: int, count: int) -> np.ndarray:
    """Returns `count` tokens of the stream from `start` on.

    Args:
        ends: position in the stream after each sequence.
    """
    parts, index = [], int(np.searchsorted(ends, start, side="right"))
    while count:
        offset = start - int(ends[index] - dataset.sequence_lengths[index])
        part = dataset.get(index, offset, min(count, int(ends[index]) - start))
        parts.append(part.astype(np.int64))
        start, count, index = start + len(part), count - len(part), index + 1
    return np.concatenate(parts)
