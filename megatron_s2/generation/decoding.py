"""The generation loop: prompts are prefilled in chunks, what they share once, then every sequence is decoded
token by token."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_s2.generation.prefill import LEAST_SHARED, PrefillPass, plan_prefill
from megatron_s2.generation.ranks import tokens_of_first_rank
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

    def fork(self, rows: Sequence[int | None]) -> None:
        """Replaces the sequences by continuations of `rows`, in this order; None is a new sequence.

        Those that continue the same row share what they have in common (`KVCache.fork`).
        """


@dataclass
class GenerationResult:
    """The generated tokens, and statistics over all sequences.

    Args:
        rows: tokens generated for each prompt, including the stop token.
        prompt_tokens: number of tokens of the prompts.
        prefill_tokens: number of these that ran through the model, without padding; the prompts share the
            others.
        decoded_tokens: number of generated tokens without the first of each sequence, which prefill computes.
        prefill_seconds, decode_seconds: time spent on the prompts and on the decoded tokens.
        kept_bytes, dense_bytes, capacity_bytes: size of the caches at the end: of the entries they keep, of
            those that dense attention would keep without sharing, and of the memory allocated.
    """

    rows: list[list[int]]
    prompt_tokens: int = 0
    prefill_tokens: int = 0
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
        least_shared: fewest tokens at the beginning of several prompts that run through the model once.

    Raises:
        ValueError: a field is out of range; the message starts with its flag.
    """

    prompts: Sequence[Sequence[int]]
    max_new_tokens: int
    stop: Collection[int] = ()
    sampling: Sampling = field(default_factory=Sampling)
    least_shared: int = LEAST_SHARED

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise ValueError(f"--max-new-tokens {self.max_new_tokens}: must be >= 1")
        if not self.prompts or not all(self.prompts):
            raise ValueError("--prompt: must have at least one token")

    @property
    def max_tokens(self) -> int:
        """Largest number of tokens of a sequence that are fed to the model; the last generated one is not."""
        return max(map(len, self.prompts)) + self.max_new_tokens - 1

    @cached_property
    def passes(self) -> list[PrefillPass]:
        """How the prompts are fed."""
        return plan_prefill(self.prompts, self.least_shared)

    @property
    def first_batch(self) -> int:
        """Number of sequences with which a decoder starts."""
        return len(self.passes[0].rows)


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
    ranks: ProcessGroup | None = None,
) -> GenerationResult:
    """Continues every prompt of a request until a stop token or `max_new_tokens`.

    Args:
        decoder: a new decoder for `request.first_batch` sequences: as many as there are prompts, unless some
            begin alike.
        on_token: called with the row and the token as soon as a token is chosen.
        ranks: ranks that generate together, each with a decoder for the same request; None for one rank. All
            of them continue with the tokens that the first one chooses.
    """
    batch = len(request.prompts)
    result = GenerationResult([[] for _ in range(batch)], prompt_tokens=sum(map(len, request.prompts)))
    active = {row: request.sampling.generator(row) for row in range(batch)}

    def append_tokens(logits: Tensor) -> None:
        chosen = request.sampling.choose(logits, active)
        if ranks is not None:
            chosen = tokens_of_first_rank(chosen, ranks, decoder.caches[0].device)
        for row, token in chosen.items():
            result.rows[row].append(token)
            on_token(row, token)
            if token in request.stop or len(result.rows[row]) == request.max_new_tokens:
                del active[row]

    start = time.perf_counter()
    prompt_logits = _prefill(decoder, request.passes)
    result.prefill_tokens = sum(len(row) for step in request.passes for row in step.rows)
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


def _prefill(decoder: Decoder, passes: Sequence[PrefillPass]) -> Tensor:
    """Returns the logits after each prompt, `[batch, vocabulary]` on the CPU."""
    after: dict[int, Tensor] = {}
    for step in passes:
        if step.parents is not None:
            decoder.fork(step.parents)
        for start in range(0, max(map(len, step.rows)), PREFILL_CHUNK):
            stop = start + PREFILL_CHUNK
            logits = decoder.feed([row[start:stop] for row in step.rows])
            ending = {prompt: n for prompt, n in step.ends.items() if start < len(step.rows[n]) <= stop}
            if ending:
                # The copy to the CPU waits for the GPU, so that the measured time includes its work.
                logits = logits.cpu()
                after |= {prompt: logits[n] for prompt, n in ending.items()}
    return torch.stack([after[prompt] for prompt in range(len(after))])
