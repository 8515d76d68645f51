"""Generates with a Megatron GPTModel whose core attention is S2, with the small KV cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from megatron_s2.errors import flag_name
from megatron_s2.kernels.host_integers import copy_to_device
from megatron_s2.kv_cache.cache import KVCache
from megatron_s2.kv_cache.decode_step import plan_step
from megatron_s2.layers.core_attention import S2CoreAttention
from megatron_s2.parallel.collectives import ContextParallelGroup

_POSITION_TYPES = ("learned_absolute", "rope", "yarn", "none")


class GPTDecoder:
    """A `Decoder` (decoding.py) over a Megatron model, on one rank or tensor-parallel.

    Megatron's inference contexts keep all keys, without rotary embedding. This class runs the model as in
    training, on the new tokens only: it passes their positions, and gives each core attention a cache.
    `close` restores the model.

    Args:
        model: model with S2 core attention in every layer; set to evaluation mode.
        batch: number of sequences.
        max_tokens: largest number of tokens of a sequence.
        vocab_size: number of tokens; further rows of the output layer are padding. None for all rows.
        context: ranks over which the keys and values of every head are spread. Each has a decoder, with the
            same part of the model, that is fed the same tokens. None to keep all keys and values here.

    Raises:
        ValueError: the model is pipeline- or context-parallel, has a layer without S2 attention or too few
            positions, or an unsupported position embedding.
    """

    def __init__(
        self,
        model: GPTModel,
        batch: int,
        max_tokens: int,
        vocab_size: int | None = None,
        context: ContextParallelGroup | None = None,
    ) -> None:
        config = model.config
        layers = [module for module in model.modules() if isinstance(module, S2CoreAttention)]
        for name in ("pipeline_model_parallel_size", "context_parallel_size"):
            if (size := getattr(config, name)) > 1:
                raise ValueError(f"{flag_name(name)} {size}: must be 1 in generation")
        if len(layers) != config.num_layers:
            raise ValueError(
                f"--s2-attention: must be given: {config.num_layers - len(layers)} of {config.num_layers} "
                "layers have another attention, which keeps no cache"
            )
        if model.position_embedding_type not in _POSITION_TYPES:
            raise ValueError(
                f"--position-embedding-type {model.position_embedding_type}: must be one of "
                f"{', '.join(_POSITION_TYPES)} in generation"
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
        # The fused kernel uses the same positions for all rows of a batch; here they differ.
        self._rope_fusion, config.apply_rope_fusion = config.apply_rope_fusion, False
        self._layers = layers
        weight = next(model.parameters())
        tensor_parallel = config.tensor_model_parallel_size
        kv_heads = max(1, config.num_query_groups // tensor_parallel)  # of this rank
        self._use(
            [
                KVCache(
                    layer.pattern,
                    batch,
                    config.kv_channels,
                    weight.dtype,
                    weight.device,
                    max_tokens,
                    kv_heads,
                    context,
                )
                for layer in layers
            ]
        )

    def _use(self, caches: list[KVCache]) -> None:
        self.caches = caches
        for layer, cache in zip(self._layers, caches):
            layer.kv_cache = cache

    def fork(self, rows: Sequence[int | None]) -> None:
        """See `Decoder.fork`."""
        self._use([cache.fork(rows) for cache in self.caches])
        self._lengths = list(self.caches[0].lengths)

    def close(self) -> None:
        """Removes the caches from the model."""
        self._model.config.apply_rope_fusion = self._rope_fusion
        for layer in self._layers:
            layer.kv_cache = None

    @torch.no_grad()
    def feed(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """See `Decoder.feed`. Rows are padded on the right. The host waits for nothing."""
        counts = [len(row) for row in rows]
        width, device = max(counts), self.caches[0].device
        tables = (
            [[*row, *[0] * (width - len(row))] for row in rows],
            [[length] for length in self._lengths],
            [[max(count - 1, 0)] for count in counts],
        )
        if width == 1:
            active = [row for row, count in enumerate(counts) if count]
            tokens, starts, last = plan_step(self.caches, active, *tables)
        else:
            tokens, starts, last = copy_to_device(device, *tables)
        # Padding tokens, too, need a position within the table.
        positions = (starts + torch.arange(width, device=device)).clamp(max=self._max_tokens - 1)
        for cache in self.caches:
            cache.incoming = counts
        with self._rotary_positions(positions):
            logits = self._model(
                tokens,
                positions,
                attention_mask=None,
                runtime_gather_output=True,  # Megatron asks for it once one of its engines has run
                output_processor=_last_logits,
                output_processor_context=last[:, 0],
            )
        self._lengths = [length + count for length, count in zip(self._lengths, counts)]
        return logits[:, : self._vocab_size]

    @contextmanager
    def _rotary_positions(self, positions: Tensor) -> Iterator[None]:
        """Makes the model use the rotary angles of `positions` `[batch, tokens]`."""
        table = getattr(self._model, "rotary_pos_emb", None)
        if table is None:
            yield
            return

        def compute_all_positions(module, arguments):
            return (self._max_tokens, *arguments[1:])

        def select_positions(module, arguments, angles):
            if isinstance(angles, tuple):  # YaRN also returns a scale of the attention
                return (angles[0][positions.T].squeeze(2), *angles[1:])
            return angles[positions.T].squeeze(2)  # [tokens, batch, 1, dim]

        hooks = (
            table.register_forward_pre_hook(compute_all_positions),
            table.register_forward_hook(select_positions),
        )
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _last_logits(*, hidden_states, output_layer, output_weight, scale_logits, context, **_) -> Tensor:
    """Returns the logits `[batch, vocabulary]` after token `context[row]` of each row of the hidden states
    `[tokens, batch, hidden]`."""
    last = hidden_states[context, torch.arange(hidden_states.shape[1], device=hidden_states.device)]
    logits, _ = output_layer(last[None], weight=output_weight, runtime_gather_output=True)
    return scale_logits(logits)[0]
