"""Generation with a Megatron GPTModel whose core attention is S2, through the small cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_s2.kv_cache.cache import KVCache
from megatron_s2.layers.core_attention import S2CoreAttention

_POSITIONS = ("learned_absolute", "rope", "yarn", "none")


class GPTDecoder:
    """A `Decoder` (decoding.py) over a Megatron model on one rank.

    Megatron's own inference contexts keep all keys, before the rotary embedding. Here the model is run as in
    training, on the new tokens alone: their positions are given to it, and its core attention has a cache.
    After `close` the model is as it was.

    Args:
        model: on one rank, every layer with S2 core attention; put into evaluation mode.
        batch: sequences.
        max_tokens: most tokens that a sequence will be fed.
        vocab_size: tokens that may come; the rest of the output layer is padding. None for all.

    Raises:
        ValueError: the model cannot be run so; says why.
    """

    def __init__(self, model: GPTModel, batch: int, max_tokens: int, vocab_size: int | None = None) -> None:
        config = model.config
        layers = [module for module in model.modules() if isinstance(module, S2CoreAttention)]
        for name in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
            if (size := getattr(config, name)) > 1:
                raise ValueError(f"--{name.replace('_', '-')} {size}: must be 1 in generation")
        if len(layers) != config.num_layers:
            raise ValueError(
                f"--s2-attention: must be given: {config.num_layers - len(layers)} of {config.num_layers} "
                "layers have another attention, which keeps no cache"
            )
        if model.position_embedding_type not in _POSITIONS:
            raise ValueError(
                f"--position-embedding-type {model.position_embedding_type}: must be one of "
                f"{', '.join(_POSITIONS)} in generation"
            )
        if model.position_embedding_type == "learned_absolute" and max_tokens > model.max_position_embeddings:
            raise ValueError(
                f"--max-position-embeddings {model.max_position_embeddings}: must be at least the "
                f"{max_tokens} tokens of prompt and continuation"
            )
        self._model = model.eval()
        self._max_tokens = max_tokens
        self._vocab_size = vocab_size
        self._lengths = [0] * batch
        # Fused kernels rotate all rows of a batch alike; here each has positions of its own.
        self._fused, config.apply_rope_fusion = config.apply_rope_fusion, False
        self._layers = layers
        weight = next(model.parameters())
        self.caches = [
            KVCache(layer.pattern, batch, config.kv_channels, weight.dtype, weight.device, max_tokens)
            for layer in layers
        ]
        for layer, cache in zip(layers, self.caches):
            layer.kv_cache = cache

    def close(self) -> None:
        """Takes the caches out of the model."""
        self._model.config.apply_rope_fusion = self._fused
        for layer in self._layers:
            layer.kv_cache = None

    @torch.no_grad()
    def feed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """See `Decoder`."""
        counts = [len(row) for row in rows]
        width, device = max(counts), self.caches[0].device
        tokens = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows], device=device)
        starts = torch.tensor(self._lengths, device=device)[:, None]
        # Of padding too: it must have some position within the table.
        positions = (starts + torch.arange(width, device=device)).clamp(max=self._max_tokens - 1)
        for cache in self.caches:
            cache.incoming = counts
        last = torch.tensor([max(count - 1, 0) for count in counts], device=device)
        with self._rotated_at(positions):
            logits = self._model(
                tokens,
                positions,
                attention_mask=None,
                runtime_gather_output=True,  # asked for by Megatron where one of its engines has been
                output_processor=_logits_after,
                output_processor_context=last,
            )
        self._lengths = [length + count for length, count in zip(self._lengths, counts)]
        return logits[:, : self._vocab_size]

    @contextmanager
    def _rotated_at(self, positions: Tensor) -> Iterator[None]:
        """Rotary angles are those of `positions` `[batch, tokens]`: the table of all, and its rows."""
        table = getattr(self._model, "rotary_pos_emb", None)
        if table is None:
            yield
            return

        def ask_for_all(module, arguments):
            return (self._max_tokens, *arguments[1:])

        def pick(module, arguments, angles):
            if isinstance(angles, tuple):  # YaRN's, with the factor on the attention
                return (angles[0][positions.T].squeeze(2), *angles[1:])
            return angles[positions.T].squeeze(2)  # [tokens, batch, 1, dim]

        hooks = table.register_forward_pre_hook(ask_for_all), table.register_forward_hook(pick)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _logits_after(*, hidden_states, output_layer, output_weight, scale_logits, context, **_) -> Tensor:
    """Logits `[batch, vocabulary]` after token `context[row]` of each row of `[tokens, batch, hidden]`."""
    chosen = hidden_states[context, torch.arange(hidden_states.shape[1], device=hidden_states.device)]
    logits, _ = output_layer(chosen[None], weight=output_weight)
    return scale_logits(logits)[0]
