"""Generation with a Hugging Face model whose attention is S2, through the small cache."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import PreTrainedModel

from megatron_s2.generation.cache import KVCache
from megatron_s2.hf import S2Cache


class HuggingFaceDecoder:
    """A `Decoder` (decoding.py) over a causal language model of transformers.

    Args:
        model: with `attn_implementation="s2"`; put into evaluation mode.
        batch: sequences.
        max_tokens: most tokens that a sequence will be fed.

    Raises:
        ValueError: the model runs with another attention, or has no S2 settings.
    """

    def __init__(self, model: PreTrainedModel, batch: int, max_tokens: int) -> None:
        self._model = model.eval()
        self._cache = S2Cache(model.config, max_tokens)
        self._lengths = [0] * batch
        self._mask = torch.zeros(batch, 0, dtype=torch.long, device=model.device)

    @property
    def caches(self) -> list[KVCache]:
        return self._cache.caches

    @torch.no_grad()
    def feed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """See `Decoder`."""
        width, device = max(map(len, rows)), self._model.device
        padding = [width - len(row) for row in rows]
        tokens = torch.tensor([[*[0] * pad, *row] for pad, row in zip(padding, rows)], device=device)
        columns = torch.arange(width, device=device)
        real = columns >= torch.tensor(padding, device=device)[:, None]
        starts = torch.tensor([n - pad for n, pad in zip(self._lengths, padding)], device=device)
        self._mask = torch.cat([self._mask, real.long()], 1)
        logits = self._model(
            tokens,
            attention_mask=self._mask,
            position_ids=(starts[:, None] + columns).clamp(min=0),
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1,
        ).logits
        self._lengths = [length + len(row) for length, row in zip(self._lengths, rows)]
        return logits[:, -1]
