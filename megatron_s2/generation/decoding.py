"""The loop of generation: prompts are read in chunks, then a token of every sequence at a time."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from megatron_s2.generation.sampling import Sampling
from megatron_s2.kv_cache.cache import KVCache

# Of a prompt in one forward pass: bounds the memory of activations, and costs no time.
CHUNK = 4096


class Decoder(Protocol):
    """A model with a cache for a batch of sequences.

    Attributes:
        caches: of all layers, once there have been tokens.
    """

    caches: Sequence[KVCache]

    def feed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Takes further tokens of each sequence; a row may have none.

        Returns:
            Logits `[batch, vocabulary]` after the last token of each row; of a row without tokens, anything.
        """


@dataclass
class Generation:
    """What was generated, and what it took.

    Args:
        rows: tokens of each sequence, without the prompt, the stop token included.
        prompt_tokens, decoded_tokens: in all sequences together. The first token of a sequence follows from
            reading its prompt; the others are decoded.
        prefill_seconds, decode_seconds: for reading the prompts, and for the tokens after the first.
        kept_bytes, dense_bytes, capacity_bytes: of the caches at the end: what is kept, what a dense model
            would keep, what memory is set aside.
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
class Request:
    """What to generate.

    Args:
        prompts: token ids, at least one each.
        max_new_tokens: most tokens to generate per prompt.
        stop: tokens that end a sequence.
        sampling: how tokens are chosen.

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
        """Tokens of the longest sequence that a model may be fed: the last one generated is not."""
        return max(map(len, self.prompts)) + self.max_new_tokens - 1


def beyond_positions(tokens: int, positions: int) -> str | None:
    """What to tell where a model of `positions` is given a sequence of `tokens`; None where it fits."""
    if tokens <= positions:
        return None
    return f"{tokens} tokens in a row: the model knows {positions} positions (max_position_embeddings)"


@torch.no_grad()
def generate(
    decoder: Decoder, request: Request, on_token: Callable[[int, int], None] = lambda row, token: None
) -> Generation:
    """Continues every prompt of a request until a stop token or its end.

    Args:
        decoder: of as many sequences as there are prompts, none of which has had a token.
        on_token: called with row and token as soon as each is known.
    """
    batch = len(request.prompts)
    done = Generation([[] for _ in range(batch)], prompt_tokens=sum(map(len, request.prompts)))
    generators = [request.sampling.generator(row) for row in range(batch)]
    going = set(range(batch))

    def take(row: int, logits: Tensor) -> None:
        token = request.sampling.choose(logits, generators[row])
        done.rows[row].append(token)
        on_token(row, token)
        if token in request.stop or len(done.rows[row]) == request.max_new_tokens:
            going.discard(row)

    start = time.perf_counter()
    after = _prefill(decoder, request.prompts)
    done.prefill_seconds = time.perf_counter() - start
    for row in range(batch):
        take(row, after[row])
    start = time.perf_counter()
    while going:
        logits = decoder.feed([done.rows[row][-1:] if row in going else [] for row in range(batch)])
        done.decoded_tokens += len(going)
        for row in sorted(going):
            take(row, logits[row])
    done.decode_seconds = time.perf_counter() - start
    for cache in decoder.caches:
        done.kept_bytes += cache.bytes
        done.dense_bytes += cache.dense_bytes
        done.capacity_bytes += cache.capacity_bytes
    return done


def _prefill(decoder: Decoder, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Logits `[vocabulary]` after each prompt."""
    after: dict[int, Tensor] = {}
    for first in range(0, max(map(len, prompts)), CHUNK):
        rows = [prompt[first : first + CHUNK] for prompt in prompts]
        logits = decoder.feed(rows)
        # Moved to the CPU: then the computation has ended when the time is taken.
        after |= {row: logits[row].cpu() for row, tokens in enumerate(rows) if tokens}
    return [after[row] for row in range(len(prompts))]
