"""The generation loop: prompts are prefilled in chunks, then every sequence is decoded token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_s2.generation.sampling import Sampling
from megatron_s2.kv_cache.cache import KVCache

# Tokens of a prompt per forward pass: bounds the memory of activations without costing time.
PREFILL_CHUNK = 4096


class Decoder(Protocol):
    """A model with a KV cache for a batch of sequences.

    Attributes:
        caches: caches of all layers; empty before the first tokens.
    """

    caches: Sequence[KVCache]

    def feed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Appends tokens to each sequence; a row may be empty.

        Returns:
            Logits `[batch, vocabulary]` after the last token of each row; undefined for an empty row.
        """


@dataclass
class GenerationResult:
    """The generated tokens, and statistics over all sequences.

    Args:
        rows: tokens generated for each prompt, including the stop token.
        prompt_tokens: number of tokens of the prompts.
        decoded_tokens: number of generated tokens without the first of each sequence, which prefill computes.
        prefill_seconds, decode_seconds: time spent on the prompts and on the decoded tokens.
        kept_bytes, dense_bytes, capacity_bytes: size of the caches at the end: of the entries they keep, of
            those that dense attention would keep, and of the memory allocated.
    """

    rows: list[list[int]]
    prompt_tokens: int = 0
    decoded_tokens: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    kept_bytes: int = 0
    dense_bytes: int = 0
    capacity_bytes: int = 0


@dataclass(frozen=True)
class GenerationRequest:
    """What to generate.

    Args:
        prompts: token ids of each prompt, at least one.
        max_new_tokens: largest number of tokens to generate per prompt.
        stop: tokens that end a sequence.
        sampling: how the next token is chosen.

    Raises:
        ValueError: a field is out of range; the message starts with its flag.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    stop: Collection[int] = ()
    sampling: Sampling = field(default_factory=Sampling)

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens}: must be >= 1")
        if not self.prompts or not all(self.prompts):
            raise ValueError("--prompt: must have at least one token")

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens of a sequence that are fed to the model; the last generated one is not."""
        return max(map(len, self.prompts)) + self.max_new_tokens - 1


def beyond_positions(tokens: int, positions: int) -> str | None:
    """Returns a message if a sequence of `tokens` exceeds the `positions` that a model was made for."""
    if tokens <= positions:
        return None
    return f"{tokens} tokens in a row: the model has {positions} positions (max_position_embeddings)"


@torch.no_grad()
def generate(
    decoder: Decoder,
    request: GenerationRequest,
    on_token: Callable[[int, int], None] = lambda row, token: None,
) -> GenerationResult:
    """Continues every prompt of a request until a stop token or `max_new_tokens`.

    Args:
        decoder: a new decoder for as many sequences as there are prompts.
        on_token: called with the row and the token as soon as a token is chosen.
    """
    batch = len(request.prompts)
    result = GenerationResult([[] for _ in range(batch)], prompt_tokens=sum(map(len, request.prompts)))
    active = {row: request.sampling.generator(row) for row in range(batch)}

    def append_tokens(logits: Tensor) -> None:
        for row, token in request.sampling.choose(logits, active).items():
            result.rows[row].append(token)
            on_token(row, token)
            if token in request.stop or len(result.rows[row]) == request.max_new_tokens:
                del active[row]

    start = time.perf_counter()
    prompt_logits = _prefill(decoder, request.prompts)
    result.prefill_seconds = time.perf_counter() - start
    append_tokens(prompt_logits)
    start = time.perf_counter()
    while active:
        logits = decoder.feed([result.rows[row][-1:] if row in active else [] for row in range(batch)])
        result.decoded_tokens += len(active)
        append_tokens(logits)
    result.decode_seconds = time.perf_counter() - start
    for cache in decoder.caches:
        result.kept_bytes += cache.bytes
        result.dense_bytes += cache.dense_bytes
        result.capacity_bytes += cache.capacity_bytes
    return result


def _prefill(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> Tensor:
    """Returns the logits after each prompt, `[batch, vocabulary]` on the CPU."""
    after: list[Tensor | None] = [None] * len(prompts)
    for start in range(0, max(map(len, prompts)), PREFILL_CHUNK):
        rows = [prompt[start : start + PREFILL_CHUNK] for prompt in prompts]
        logits = decoder.feed(rows)
        ending = [n for n, prompt in enumerate(prompts) if start < len(prompt) <= start + PREFILL_CHUNK]
        if ending:
            # The copy to the CPU waits for the GPU, so that the measured time includes its work.
            logits = logits.cpu()
            for row in ending:
                after[row] = logits[row]
    return torch.stack(after)
